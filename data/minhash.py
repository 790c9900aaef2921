"""MinHash sketches of many texts at once: words are hashed once each, shingles are rolled with numpy,
and the sketches come as one matrix.

A text is a set of shingles of `k` consecutive words, padded at both ends so that every word, also the
first and the last, is in exactly `k` of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import rensa
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
SKETCH_VERSION = f"words-1/rensa-{rensa.RMinHash.ALGORITHM_VERSION}"
"""What decides a sketch besides the settings; part of every dataset hash."""
PAD = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)  # an odd constant with well-mixed bits (splitmix64)
SHIFT = np.uint64(31)
ASCII_WORDS = np.array([ord(c.lower()) if c.isalnum() else 32 for c in map(chr, range(128))] + [32] * 128, np.uint8)
"""What becomes of each byte of ASCII text."""


@dataclass(frozen=True)
class Shingles:
    """Shingle hashes of many texts in a row: text `i` has `hashes[offsets[i]:offsets[i+1]]`."""

    hashes: U64
    offsets: NDArray[np.int64]


def text_hashes(texts: Sequence[str]) -> U64:
    """64 bits of SHA-256 of each text."""
    return np.array(
        [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts], dtype=np.uint64
    )


def word_arrays(texts: pa.Array) -> tuple[U64, NDArray[np.int64]]:
    """Hash of every word of every text, and the offsets of the texts; case and punctuation are ignored."""
    lists = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(only_words(texts)))
    encoded = pc.dictionary_encode(lists.values)
    words: U64 = pd.util.hash_array(np.asarray(encoded.dictionary.to_pylist(), dtype=object), categorize=False)
    return words[encoded.indices.to_numpy()], lists.offsets.to_numpy().astype(np.int64)


def only_words(texts: pa.Array) -> pa.Array:
    """Texts in lower case, with spaces for all that is no letter and no digit."""
    if pc.all(pc.string_is_ascii(texts)).as_py() is not False:
        return _translate_ascii(texts)
    return pc.replace_substring_regex(pc.utf8_lower(texts), r"[^\p{L}\p{N}]", " ")


def _translate_ascii(texts: pa.Array) -> pa.Array:
    """The same for plain ASCII: one look-up a byte, several times as fast as the regular expression."""
    texts = pa.concat_arrays([texts.cast(pa.large_string())])  # whole buffers, without an offset
    _, offsets, data = texts.buffers()
    if data is None:
        return texts
    plain = ASCII_WORDS[np.frombuffer(data, dtype=np.uint8)]
    return pa.LargeStringArray.from_buffers(len(texts), offsets, pa.py_buffer(plain.tobytes()))


def shingle(texts: pa.Array, words_each: int) -> Shingles:
    """Hashes of the shingles of each text: words + `words_each` - 1 of them."""
    words, offsets = word_arrays(texts)
    pad = words_each - 1
    lengths = np.diff(offsets)
    starts = offsets[:-1] + pad * 2 * np.arange(len(lengths)) + pad  # where each text's words go
    padded = np.full(len(words) + pad * 2 * len(lengths), PAD, dtype=np.uint64)
    target = np.arange(len(words)) + np.repeat(starts - offsets[:-1], lengths)
    padded[target] = words
    rolled = np.zeros(len(padded) - pad, dtype=np.uint64)
    for shift in range(words_each):
        rolled = mix(rolled * MULTIPLIER + padded[shift : len(padded) - pad + shift])
    counts = lengths + pad
    ends = np.cumsum(counts)
    begin = starts - pad
    index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(begin - (ends - counts), counts)
    return Shingles(rolled[index], np.concatenate([[0], ends]).astype(np.int64))


def mix(values: U64) -> U64:
    """A bijection of 64 bits that spreads every input bit over all output bits."""
    values = (values ^ (values >> SHIFT)) * MULTIPLIER
    return values ^ (values >> SHIFT)


def sketch(shingles: Shingles, permutations: int, seed: int) -> NDArray[np.uint32]:
    """MinHash matrix [texts, permutations]."""
    offsets = shingles.offsets.astype(np.uint64)
    rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles.hashes, offsets, permutations, seed)
    return np.array(rows.to_rows(), dtype=np.uint32).reshape(len(offsets) - 1, permutations)


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
