"""MinHash sketches of many texts at once, from the bytes of an Arrow column, without a Python object a word.

A text is a set of shingles of `k` consecutive words, padded at both ends so that every word, also the
first and the last, is in exactly `k` of them. Words are hashed eight bytes at a time and shingles are sums of
word hashes. A sketch takes one pass over the shingles: each falls into one bin and each bin keeps its
least value; empty bins borrow from others.

Sources: Li, Owen and Zhang 2012, "One Permutation Hashing", https://arxiv.org/abs/1208.1259; Shrivastava 2017,
"Optimal Densification for Fast and Accurate Minwise Hashing", https://arxiv.org/abs/1703.04664
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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
LOW = np.uint64(0xFFFFFFFF)
FULL = (1 << 64) - 1
EMPTY = np.uint32(0xFFFFFFFF)
CACHED_TEXTS = 512
"""Texts worked on at once."""
WIDTH = 8
"""Bytes of a word hashed at once."""
MASKS = np.array([(1 << 8 * n) - 1 for n in range(WIDTH + 1)], np.uint64)
"""The first `n` bytes of a little-endian number."""
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


def word_arrays(texts: pa.Array) -> tuple[U64, I64]:
    """Hash of every word of every text, and the offsets of the texts; case and punctuation are ignored."""
    plain = pa.concat_arrays([_ascii_or_words(texts).cast(pa.large_string())])  # whole buffers, without an offset
    offsets = np.frombuffer(plain.buffers()[1], np.int64)[: len(plain) + 1]
    data = plain.buffers()[2]
    size = int(offsets[-1]) if len(plain) else 0
    raw = (data.to_pybytes()[:size] if data is not None else b"").translate(ASCII_WORDS)
    starts, ends = _word_ends(np.frombuffer(raw, np.uint8), offsets)
    words = _hash_words(np.frombuffer(raw + bytes(WIDTH), np.uint8), starts, ends)
    return words, np.searchsorted(starts, offsets).astype(np.int64)


def _ascii_or_words(texts: pa.Array) -> pa.Array:
    """Texts of plain ASCII as they are; else in lower case, with spaces for all that is no letter and no digit."""
    if pc.all(pc.string_is_ascii(texts)).as_py() is not False:
        return texts
    return only_words(texts)


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


def _word_ends(raw: NDArray[np.uint8], offsets: I64) -> tuple[I64, I64]:
    """Where words begin and end; a word never reaches into the next text."""
    inside = np.zeros(len(raw) + 2, bool)
    inside[1:-1] = raw != 32
    starts = inside[1:-1] & ~inside[:-2]
    stops = inside[1:-1] & ~inside[2:]
    edges = offsets[(offsets > 0) & (offsets < len(raw))]
    starts[edges] = inside[1:-1][edges]
    stops[edges - 1] = inside[1:-1][edges - 1]
    return np.flatnonzero(starts), np.flatnonzero(stops) + 1


def _hash_words(raw: NDArray[np.uint8], starts: I64, ends: I64) -> U64:
    """A hash of the bytes of each word; `raw` has `WIDTH` bytes to spare at its end."""
    eights = np.lib.stride_tricks.as_strided(raw[:WIDTH].view("<u8"), (max(1, len(raw) - WIDTH + 1),), (1,))
    lengths = ends - starts
    words = mix((eights[starts] & MASKS[np.minimum(lengths, WIDTH)]) * MULTIPLIER + lengths.astype(np.uint64))
    longer = np.flatnonzero(lengths > WIDTH)
    done = WIDTH
    while len(longer):
        left = np.minimum(lengths[longer] - done, WIDTH)
        words[longer] = mix(words[longer] * MULTIPLIER + (eights[starts[longer] + done] & MASKS[left]))
        done += WIDTH
        longer = longer[lengths[longer] > done]
    return words


def shingle(texts: pa.Array, words_each: int) -> Shingles:
    """Hashes of the shingles of each text: words + `words_each` - 1 of them."""
    words, offsets = word_arrays(texts)
    pad = words_each - 1
    lengths = np.diff(offsets)
    starts = offsets[:-1] + pad * 2 * np.arange(len(lengths)) + pad  # where each text's words go
    padded = np.full(len(words) + pad * 2 * len(lengths), PAD, dtype=np.uint64)
    padded[np.arange(len(words)) + np.repeat(starts - offsets[:-1], lengths)] = words
    size = len(padded) - pad
    rolled = np.zeros(max(size, 0), dtype=np.uint64)
    factor = MULTIPLIER
    for shift in range(words_each if size > 0 else 0):
        rolled += padded[shift : size + shift] * factor
        factor = np.uint64(int(factor) * int(MULTIPLIER) & FULL | 1)
    counts = lengths + pad
    ends = np.cumsum(counts)
    index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - pad - (ends - counts), counts)
    return Shingles(mix(rolled[index]), np.concatenate([[0], ends]).astype(np.int64))


def mix(values: U64) -> U64:
    """A bijection of 64 bits that spreads every input bit over all output bits."""
    values = (values ^ (values >> SHIFT)) * MULTIPLIER
    return values ^ (values >> SHIFT)


def sketch_column(texts: pa.Array, words_each: int, bins: int, seed: int) -> NDArray[np.uint32]:
    """Sketches [texts, bins] of a column, a part at a time that fits the processor's cache."""
    parts = [
        sketch(shingle(texts.slice(start, CACHED_TEXTS), words_each), bins, seed)
        for start in range(0, len(texts), CACHED_TEXTS)
    ]
    return np.concatenate([np.zeros((0, bins), np.uint32), *parts])


def sketch(shingles: Shingles, bins: int, seed: int) -> NDArray[np.uint32]:
    """MinHash matrix [texts, bins]: two sets agree in a column with the probability of their Jaccard similarity.

    Every text needs a shingle.
    """
    number = len(shingles.offsets) - 1
    hashes = mix(shingles.hashes ^ np.uint64(seed * int(PAD) & FULL))
    row = np.repeat(np.arange(number) * bins, np.diff(shingles.offsets))
    place = row + ((hashes >> HALF) * np.uint64(bins) >> HALF).astype(np.int64)
    least = np.full(number * bins, EMPTY, np.uint32)
    np.minimum.at(least, place, np.minimum(hashes & LOW, LOW - np.uint64(1)).astype(np.uint32))
    return _densify(least.reshape(number, bins), seed)


def _densify(least: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """Fills each empty bin from a bin drawn for it, then from the next drawn, until one is not empty."""
    bins = least.shape[1]
    filled = least.copy()
    values, into = least.ravel(), filled.ravel()
    place = np.flatnonzero(values == EMPTY)
    row = place // bins * bins
    column = place - row
    attempt = 0
    while len(place):
        draws = mix(mix(np.arange(bins, dtype=np.uint64) + np.uint64(attempt * int(PAD) & FULL)) + np.uint64(seed))
        drawn = (draws % np.uint64(bins)).astype(np.int64)
        if attempt >= 8 * bins:  # the last resort of a tiny set: one after the other
            drawn = (np.arange(bins) + attempt) % bins
        into[place] = values[row + drawn[column]]
        empty = into[place] == EMPTY
        place, row, column = place[empty], row[empty], column[empty]
        attempt += 1
    return filled


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
