"""Rows of text on disk: written by tools/preprocess_text.py, read through a memory map as samples of the training data.

DIR/dataset.json     the fields of Header and "kind": "text"; written last: without it the folder is unfinished
DIR/rows.bin, .idx   Megatron's indexed format: a row is a document of it, and the pieces of documents in the row are its sequences
DIR/report.json      what was accepted and refused, the sources before and after up-sampling
DIR/documents/       the tokenised input (tokens.py), from which rows of another length are made without tokenising again
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megatron_longvila.data.conversation import Encoded
from megatron_longvila.data.indexed import IndexedWriter
from megatron_longvila.data.media import DEFAULT_LIMITS
from megatron_longvila.parallel.plan import IGNORE_INDEX

VERSION = 1
_REBUILD = "run tools/preprocess_text.py again with the same flags (it only redoes what is missing)"
_HASH_BYTES = 1 << 20


@dataclass(frozen=True)
class Header:
    """What dataset.json says.

    Attributes:
        row_length: tokens of every row.
        num_pieces: of all rows; a document that crosses the end of a row goes on as another piece in the next.
        tokenizer: where it was, and tokenizer_hash its Tokenizer.hash.
        end_of_document: the token after every document and end_id its number; "" and None for none.
        largest_id: of any token.
        made_from: hash of the input files and settings.
        files: size of each file of rows in bytes.
        index_hash: sha256 of rows.idx, checked when the folder is opened.
        hash: sha256 of tokens, pieces and tokenizer: what a resumed run compares.
    """

    version: int
    row_length: int
    tokenizer: str
    tokenizer_hash: str
    end_of_document: str
    end_id: int | None
    largest_id: int
    settings: dict
    made_from: str
    num_rows: int = 0
    num_pieces: int = 0
    files: dict[str, int] = field(default_factory=dict)
    index_hash: str = ""
    hash: str = ""


class TextRow(NamedTuple):
    """A row as a sample: it has a name, and neither dialogue nor media."""

    id: str
    conversations: tuple[dict, ...] = ()
    media: tuple[str, ...] = ()


class TextRows(Sequence):
    """The rows of a folder as samples, numbered from 0."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        numbers = range(self._count)[index]
        return [self[number] for number in numbers] if isinstance(index, slice) else TextRow(f"row-{numbers}")


class TextDataset:
    """An opened folder of text rows, with what SampleIndex asks of any dataset. Safe to fork, pickle and thread.

    Attributes:
        samples: the rows' names; `encode` has their tokens.
        media: none.
    """

    media: dict = {}
    limits = DEFAULT_LIMITS

    def __init__(self, path: Path, header: Header):
        from megatron_longvila.platform import mcore  # noqa: F401  (imported first: its fixes; here, because few users of a dataset have text)

        from megatron.core.datasets.indexed_dataset import IndexedDataset  # isort: skip

        self.path, self.header, self.hash = path, header, header.hash
        self.samples = TextRows(header.num_rows)
        self._rows = IndexedDataset(str(path / "rows"), mmap=True)

    def __len__(self) -> int:
        return self.header.num_rows

    @property
    def row_length(self) -> int:
        """Tokens of every row."""
        return self.header.row_length

    def pieces(self, number: int) -> list[np.ndarray]:
        """Tokens of each piece of row `number`: views of the mapped file, which must not outlive this dataset."""
        first, end = self._rows.document_indices[number : number + 2].tolist()
        return self._rows[first:end]

    def encode(self, number: int, attention: Literal["row", "document"]) -> Encoded:
        """Row `number`; every token is trained on but the first of the row, or with `document` the first of each piece."""
        pieces = self.pieces(number)
        input_ids_L = np.concatenate(pieces).astype(np.int64)
        labels_L = np.append(input_ids_L[1:], IGNORE_INDEX)
        lengths = tuple(map(len, pieces)) if attention == "document" else ()
        labels_L[np.cumsum(lengths, dtype=np.int64) - 1] = IGNORE_INDEX
        return Encoded(input_ids_L, labels_L, (), (), lengths)


def open_text_rows(path: Path, header: dict) -> TextDataset:
    """Open a folder whose dataset.json has the kind `text`.

    Raises:
        ValueError: of another version, or changed since it was written (of rows.bin, which may be large, only the size is checked).
    """
    header_path = path / "dataset.json"
    if header.get("version") != VERSION:
        raise ValueError(
            f"{header_path} has version {header.get('version')}, this code reads version {VERSION}; preprocess into a new folder"
        )
    try:
        known = Header(**{one.name: header[one.name] for one in fields(Header)})
    except KeyError as error:
        raise ValueError(f"{header_path} is damaged (no {error}); {_REBUILD}") from None
    for name, size in known.files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, {size} when it was written"
            raise ValueError(f"{path / name} {state}; {_REBUILD}")
    if hash_file(path / "rows.idx") != known.index_hash:
        raise ValueError(f"{path / 'rows.idx'} was changed after it was written; delete it and {_REBUILD}")
    return TextDataset(path, known)


def cut_rows(pieces: Iterable[np.ndarray], row_length: int) -> Iterator[list[np.ndarray]]:
    """Cut a stream of documents into rows of exactly `row_length` tokens; a last row that stays short is not among them."""
    row: list[np.ndarray] = []
    room = row_length
    for tokens in pieces:
        while len(tokens) >= room:
            row.append(tokens[:room])
            yield row
            tokens, row, room = tokens[room:], [], row_length
        if len(tokens):
            row.append(tokens)
            room -= len(tokens)


def write_rows(folder: Path, rows: Iterable[list[np.ndarray]], dtype: type) -> tuple[int, int, dict[str, int]]:
    """Write rows.bin and rows.idx under temporary names, then put them in place. Returns rows, pieces and the files' sizes."""
    partial = {name: folder / f"{name}.tmp" for name in ("rows.bin", "rows.idx")}
    writer = IndexedWriter(partial["rows.bin"], dtype)
    num_rows = num_pieces = 0
    for row in rows:
        writer.add_document(np.concatenate(row), [len(piece) for piece in row])
        num_rows, num_pieces = num_rows + 1, num_pieces + len(row)
    writer.finish(partial["rows.idx"])
    for name, path in partial.items():
        os.replace(path, folder / name)
    return num_rows, num_pieces, {name: (folder / name).stat().st_size for name in partial}


def rows_hash(folder: Path, tokenizer_hash: str, row_length: int) -> str:
    """sha256 of what the rows say."""
    lines = [
        f"longvila text rows {VERSION}",
        tokenizer_hash,
        str(row_length),
        hash_file(folder / "rows.bin"),
        hash_file(folder / "rows.idx"),
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
