"""MinHash sketches of many texts at once, from the bytes of an Arrow column, without a Python object a word.

A text is a set of shingles of `k` consecutive words, padded at both ends so that every word, also the
first and the last, is in exactly `k` of them. Words are hashed eight bytes at a time and shingles are sums of
word hashes weighed by place. A sketch takes one pass over the shingles: each falls into one bin and each bin keeps its
least value; empty bins borrow from others.

Sources: Li, Owen and Zhang 2012, "One Permutation Hashing", https://arxiv.org/abs/1208.1259; Shrivastava 2017,
"Optimal Densification for Fast and Accurate Minwise Hashing", https://arxiv.org/abs/1703.04664
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
SKETCH_VERSION = "words-2/one-permutation-1"
"""What decides a sketch besides the settings; part of every dataset hash."""
PAD = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)  # an odd constant with well-mixed bits (splitmix64)
SHIFT = np.uint64(31)
HALF = np.uint64(32)
FULL = (1 << 64) - 1
EMPTY = np.uint32(0xFFFFFFFF)
CACHED_TEXTS = 512
"""Texts worked on at once."""
WIDTH = 8
"""Bytes of a word hashed at once."""
MASKS = np.array([(1 << 8 * n) - 1 for n in range(WIDTH + 1)], np.uint64)
"""The first `n` bytes of a little-endian number."""
STOP = b"\xff "
"""Stands for a word of padding until words are hashed; no text in UTF-8 has this byte."""
CASE = np.uint8(ord("a") - ord("A"))
ASCII_WORDS = bytes([ord(c.lower()) if c.isalnum() else 32 for c in map(chr, range(128))] + list(range(128, 256)))
"""What becomes of each byte: letters in lower case, digits, and a space for the rest of ASCII."""


@dataclass(frozen=True)
class Shingles:
    """Shingle hashes of many texts in a row: text `i` has `hashes[offsets[i]:offsets[i+1]]`."""

    hashes: U64
    offsets: I64


def text_hashes(texts: Sequence[str]) -> U64:
    """64 bits of SHA-256 of each text."""
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def only_words(texts: pa.Array) -> pa.Array:
    """Texts in lower case, with spaces for all that is no letter and no digit."""
    odd = pc.invert(pc.string_is_ascii(texts))
    if not pc.any(odd).as_py():
        return _translated(texts)
    slow = pc.replace_substring_regex(pc.utf8_lower(texts.filter(odd)), r"[^\p{L}\p{N}]", " ")
    return pc.replace_with_mask(_translated(texts), odd, slow)


def _translated(texts: pa.Array) -> pa.Array:
    """Texts with each byte as `ASCII_WORDS` says, which is much faster than a pattern."""
    whole = pa.concat_arrays([texts])  # buffers without an offset
    valid, offsets, data = whole.buffers()
    words = data.to_pybytes().translate(ASCII_WORDS) if data is not None else b""
    return pa.Array.from_buffers(whole.type, len(whole), [valid, offsets, pa.py_buffer(words)], offset=whole.offset)


def shingle(texts: pa.Array, words_each: int) -> Shingles:
    """Hashes of the shingles of each text: words + `words_each` - 1 of them. Case and punctuation are ignored."""
    pad = words_each - 1
    raw, ends = _joined(texts, b" " + STOP * pad)
    starts, stops, lower = _words_in(raw)
    offsets = np.searchsorted(starts, ends).astype(np.int64)  # a text has its words and `pad` stops after them
    words = np.full(pad + len(starts), PAD, np.uint64)
    words[pad:] = _hash_words(lower, starts, stops - starts)
    for stop in range(pad):  # the stops before a text are those after the one before it
        words[offsets[1:] + stop] = PAD
    rolled = words[pad:] * MULTIPLIER
    for shift in reversed(range(pad)):
        rolled += words[shift : shift + len(starts)]
        rolled *= MULTIPLIER
    return Shingles(mix(rolled), offsets)


def _joined(texts: pa.Array, end: bytes) -> tuple[NDArray[np.uint8], I64]:
    """The bytes of all texts, each with `end` after it, and the offsets of the texts in them."""
    plain = texts if pc.all(pc.string_is_ascii(texts)).as_py() is not False else only_words(texts)
    binary = pa.large_binary()
    closed = [plain.cast(binary), pa.scalar(b"", binary), pa.scalar(end, binary)]
    whole = pc.binary_join_element_wise(*closed, null_handling="replace")
    offsets = np.frombuffer(whole.buffers()[1], np.int64)[: len(whole) + 1]
    data = whole.buffers()[2]
    return np.frombuffer(data if data is not None else b"", np.uint8)[: offsets[-1]], offsets


def _words_in(raw: NDArray[np.uint8]) -> tuple[I64, I64, NDArray[np.uint8]]:
    """Where words begin and end, and the bytes in lower case with `WIDTH` to spare. The last byte is in no word."""
    lower = np.zeros(len(raw) + WIDTH, np.uint8)
    small = lower[: len(raw)]
    np.bitwise_or(raw, (~raw >> 2) & CASE, out=small)
    inside = np.zeros(len(raw) + 1, bool)
    within = inside[1:]
    np.less(small - ord("a"), 26, out=within)
    within |= raw - ord("0") < 10
    within |= raw > 127
    changes = np.flatnonzero(within != inside[:-1])
    return changes[::2], changes[1::2], lower


def _hash_words(raw: NDArray[np.uint8], starts: I64, lengths: I64) -> U64:
    """A hash of the bytes of each word; `raw` has `WIDTH` bytes to spare at its end."""
    eights = np.lib.stride_tricks.as_strided(raw[:WIDTH].view("<u8"), (len(raw) - WIDTH + 1,), (1,))
    words = eights[starts]
    words &= MASKS.take(lengths, mode="clip")
    words *= MULTIPLIER
    words += lengths.view(np.uint64)
    words = mix(words)
    longer = np.flatnonzero(lengths > WIDTH)
    done = WIDTH
    while len(longer):
        rest = eights[starts[longer] + done] & MASKS.take(lengths[longer] - done, mode="clip")
        words[longer] = mix(words[longer] * MULTIPLIER + rest)
        done += WIDTH
        longer = longer[lengths[longer] > done]
    return words


def mix(values: U64) -> U64:
    """A bijection of 64 bits that spreads every input bit over all output bits."""
    mixed = values >> SHIFT
    mixed ^= values
    mixed *= MULTIPLIER
    mixed ^= mixed >> SHIFT
    return mixed


def sketch_column(texts: pa.Array, words_each: int, bins: int, seed: int) -> NDArray[np.uint32]:
    """Sketches [texts, bins] of a column, a part at a time that fits the processor's cache."""
    sketches = np.empty((len(texts), bins), np.uint32)
    for start in range(0, len(texts), CACHED_TEXTS):
        part = slice(start, start + CACHED_TEXTS)
        sketches[part] = sketch(shingle(texts[part], words_each), bins, seed)
    return sketches


def sketch(shingles: Shingles, bins: int, seed: int) -> NDArray[np.uint32]:
    """MinHash matrix [texts, bins]: two sets agree in a column with the probability of their Jaccard similarity.

    Every text needs a shingle.
    """
    number = len(shingles.offsets) - 1
    hashes = mix(shingles.hashes ^ np.uint64(seed * int(PAD) & FULL))
    values = np.minimum(hashes.astype(np.uint32), EMPTY - np.uint32(1))
    hashes >>= HALF
    hashes *= np.uint64(bins)
    hashes >>= HALF
    place = hashes.view(np.int64)
    place += np.repeat(np.arange(number) * bins, np.diff(shingles.offsets))
    least = np.full(number * bins, EMPTY, np.uint32)
    np.minimum.at(least, place, values)
    return _densify(least.reshape(number, bins), seed)


def _densify(least: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """Fills each empty bin from a bin drawn for it, then from the next drawn, until one is not empty."""
    bins = least.shape[1]
    filled = least.copy()
    values, into = least.ravel(), filled.ravel()
    place = np.flatnonzero(values == EMPTY)
    column = place % bins
    row = place - column
    attempt = 0
    while len(place):
        found = values.take(_draws(bins, seed, attempt).take(column) + row)
        into[place] = found
        empty = np.flatnonzero(found == EMPTY)
        place, row, column = (of.take(empty) for of in (place, row, column))
        attempt += 1
    return filled


@cache
def _draws(bins: int, seed: int, attempt: int) -> I64:
    """Which bin each bin borrows from."""
    if attempt >= 8 * bins:  # the last resort of a tiny set: one after the other
        return (np.arange(bins) + attempt) % bins
    draws = mix(mix(np.arange(bins, dtype=np.uint64) + np.uint64(attempt * int(PAD) & FULL)) + np.uint64(seed))
    return (draws % np.uint64(bins)).astype(np.int64)


def band_keys(sketches: NDArray[np.uint32], bands: int, salt: U64) -> U64:
    """Keys [texts, bands]: equal where all values of a band, its number and the text's salt are equal."""
    keys = np.zeros((len(sketches), bands), dtype=np.uint64)
    keys += np.arange(bands, dtype=np.uint64)[None, :]
    keys = mix(keys * MULTIPLIER + salt[:, None])
    for column in range(sketches.shape[1] // bands):
        keys = mix(keys * MULTIPLIER + sketches[:, column :: sketches.shape[1] // bands].astype(np.uint64))
    return keys


def similarity(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of rows of sketches cut to their lowest byte.

    Two different values agree in their lowest byte once in 256, which is taken out again.
    Source: Li and König 2010, "b-Bit Minwise Hashing", https://arxiv.org/abs/0910.3349
    """
    chance = 1 / 256
    agreeing: NDArray[np.float64] = (left == right).mean(axis=1)
    return (agreeing - chance) / (1 - chance)
