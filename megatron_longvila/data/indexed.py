"""Megatron's indexed format, written and read here: importing megatron takes seconds in each process, which tokenising need not spend.

PREFIX.bin   the tokens of all sequences, one after the other
PREFIX.idx   magic, version u64, code of the tokens' type u8, number of sequences u64, number of bounds u64;
             length of each sequence int32, its first byte in .bin int64; bounds of the documents, in sequences, int64

Source: megatron/core/datasets/indexed_dataset.py of megatron-core 0.16.1, whose IndexedDataset reads these files in training; a test
compares every byte with what its IndexedDatasetBuilder writes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_CODES = {np.int32: 4, np.uint16: 8}  # the two that token ids are stored in
_SHORT_VOCABULARY = 65_500


def token_dtype(vocab_size: int) -> type:
    """The smallest type for ids below `vocab_size`, as megatron chooses it."""
    return np.uint16 if vocab_size < _SHORT_VOCABULARY else np.int32


class IndexedWriter:
    """Writes documents to a .bin file as they come, and the .idx file at the end."""

    def __init__(self, bin_path: Path, dtype: type):
        self._dtype, self._lengths, self._bounds = dtype, [], [0]
        self._file = open(bin_path, "wb")  # noqa: SIM115 (closed by finish)

    def add_document(self, tokens: np.ndarray, lengths: Sequence[int]) -> None:
        """Add a document whose sequences have these lengths."""
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._lengths.extend(lengths)
        self._bounds.append(len(self._lengths))

    def finish(self, idx_path: Path) -> None:
        """Close the .bin file and write the .idx file."""
        self._file.close()
        lengths = np.array(self._lengths, np.int64)
        starts = (np.cumsum(lengths) - lengths) * np.dtype(self._dtype).itemsize
        with open(idx_path, "wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[self._dtype], len(lengths), len(self._bounds)))
            for column in (lengths.astype(np.int32), starts, np.array(self._bounds, np.int64)):
                file.write(column.tobytes())


def read_lengths(idx_path: Path) -> tuple[np.ndarray, type]:
    """Length of each sequence (int32), and the type of the tokens.

    Raises:
        ValueError: the file is no .idx file of this version and of these types.
    """
    with open(idx_path, "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) == _HEADER.size:
            magic, version, code, count, _ = _HEADER.unpack(header)
            dtype = {code: dtype for dtype, code in _CODES.items()}.get(code)
            if (magic, version) == (_MAGIC, _VERSION) and dtype is not None:
                return np.fromfile(file, np.int32, count), dtype
    raise ValueError(f"{idx_path} is no index of tokens in megatron's format; delete it, and the same command makes it anew")
