"""Pieces of input files to parts: token ids in Megatron's indexed format, one document after the other, each with its end token.

DIR/<key>.bin, .idx   one document per sequence (indexed.py)
DIR/<key>.json        PartFacts; written last: without it the part is not finished

The key is a hash of the piece, the tokenizer and the settings, so a part is what it is under any number of workers and in any run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_longvila.data.documents import Document, Piece, Refused, changed, count_lines, read_documents
from megatron_longvila.data.indexed import IndexedWriter, read_lengths, token_dtype
from megatron_longvila.data.output import write_atomically
from megatron_longvila.data.shards import canonical_json
from megatron_longvila.data.text import Tokenizer, load_tokenizer

VERSION = 1
_BATCH_DOCUMENTS = 64
MAX_LISTED = 1000  # rejected lines that a part names one by one; all are counted

_load = lru_cache(maxsize=1)(load_tokenizer)


@dataclass(frozen=True)
class TokenTask:
    """What a worker does.

    Attributes:
        end_id: token that ends every document; None for none.
        key: name of the part.
    """

    piece: Piece
    folder: str
    tokenizer: str
    tokenizer_hash: str
    end_id: int | None
    text_field: str
    source_field: str

    @property
    def key(self) -> str:
        settings = asdict(replace(self, folder="", tokenizer=""))
        return hashlib.sha256(canonical_json([VERSION, settings]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class PartFacts:
    """What a part holds besides its tokens.

    Attributes:
        num_lines: lines of the piece; 0 where nothing follows them.
        num_tokens: end tokens included.
        num_bytes: of the .bin and the .idx file, as a check.
        largest_id: of any token; -1 for an empty part.
        sources: names, and `source_of` the place therein of each document.
        refused: [line, kind, detail] of at most MAX_LISTED refused lines, and `refused_kinds` how many there were of each kind.
    """

    num_lines: int
    num_tokens: int
    num_bytes: list[int]
    largest_id: int
    sources: list[str]
    source_of: list[int]
    refused: list[list]
    refused_kinds: dict[str, int]

    @property
    def num_documents(self) -> int:
        return len(self.source_of)


def tokenise(task: TokenTask) -> bool:
    """Runs in a worker: write the part of a piece. False if the input file is no longer the one that was listed (nothing is kept)."""
    tokenizer = _load(task.tokenizer)
    target = Path(task.folder, task.key)
    partial = target.with_name(f"{target.name}.tmp")
    writer = IndexedWriter(Path(f"{partial}.bin"), token_dtype(tokenizer.vocab_size))
    sources: dict[str, int] = {}
    source_of: list[int] = []
    refused: list[Refused] = []
    kinds: Counter[str] = Counter()
    largest, num_tokens = -1, 0
    for one, ids in _encoded(
        tokenizer, read_documents(task.piece, text_field=task.text_field, source_field=task.source_field), task.end_id
    ):
        if isinstance(ids, Refused):
            kinds[ids.kind] += 1
            if len(refused) < MAX_LISTED:
                refused.append(ids)
            continue
        writer.add_document(ids, [len(ids)])
        source_of.append(sources.setdefault(one.source, len(sources)))
        largest, num_tokens = max(largest, int(ids.max())), num_tokens + len(ids)
    writer.finish(Path(f"{partial}.idx"))
    num_lines = count_lines(task.piece) if task.piece.stop < task.piece.size else 0
    if changed(task.piece):
        for suffix in (".bin", ".idx"):
            os.unlink(f"{partial}{suffix}")
        return False
    num_bytes = [os.path.getsize(f"{partial}{suffix}") for suffix in (".bin", ".idx")]
    facts = PartFacts(num_lines, num_tokens, num_bytes, largest, list(sources), source_of, list(map(list, refused)), dict(kinds))
    for suffix in (".bin", ".idx"):
        os.replace(f"{partial}{suffix}", f"{target}{suffix}")
    write_atomically(Path(f"{target}.json"), json.dumps(asdict(facts)).encode())
    return True


def _encoded(
    tokenizer: Tokenizer, found: Iterator[Document | Refused], end_id: int | None
) -> Iterator[tuple[Document | Refused, np.ndarray | Refused]]:
    """Each document with its tokens (int64), or with what is wrong with it."""
    while batch := list(islice(found, _BATCH_DOCUMENTS)):
        documents = [one for one in batch if isinstance(one, Document)]
        try:
            encoded = iter(tokenizer.encode_many([document.text for document in documents]))
        except ValueError:  # of one of them
            encoded = (_encode(tokenizer, document) for document in documents)
        for one in batch:
            ids = one if isinstance(one, Refused) else next(encoded)
            if ids == []:
                ids = Refused(one.line, "no tokens")
            elif isinstance(ids, list):
                ids = ids if end_id is None else [*ids, end_id]
                ids = np.fromiter(ids, np.int64, len(ids))  # np.array takes half as long again
            yield one, ids


def _encode(tokenizer: Tokenizer, document: Document) -> list[int] | Refused:
    try:
        return tokenizer.encode(document.text)
    except ValueError as error:
        return Refused(document.line, "the tokenizer refuses it", str(error))


def read_facts(folder: Path, key: str) -> PartFacts | None:
    """Facts of a finished part; None if it is not finished or its tokens are not as they were written."""
    try:
        facts = PartFacts(**json.loads((folder / f"{key}.json").read_bytes()))
        whole = [(folder / f"{key}{suffix}").stat().st_size for suffix in (".bin", ".idx")] == facts.num_bytes
    except (OSError, ValueError, TypeError):
        return None
    return facts if whole else None


class Documents:
    """The documents of all parts as one numbered list, part after part; tokens are read from disk when asked for.

    Attributes:
        lengths: tokens of each document. int32 [documents].
        source_of: place in `sources` of each. int32 [documents].
        sources: names, sorted.
        dtype: of the tokens.
    """

    def __init__(self, folder: Path, keys: Sequence[str], parts: Sequence[PartFacts]):
        filled = [(key, part) for key, part in zip(keys, parts, strict=True) if part.num_documents]
        self._paths = [str(folder / f"{key}.bin") for key, _ in filled]
        self.sources = sorted({source for _, part in filled for source in part.sources})
        number_of = {source: number for number, source in enumerate(self.sources)}
        empty = [np.empty(0, np.int32)]
        self.source_of = np.concatenate(
            empty + [np.array([number_of[name] for name in part.sources])[part.source_of] for _, part in filled], dtype=np.int32
        )
        lengths, self.dtype = [], np.int32
        for key, _ in filled:
            found, self.dtype = read_lengths(folder / f"{key}.idx")
            lengths.append(found)
        self.lengths = np.concatenate(empty + lengths)
        self._first = np.cumsum([0, *(part.num_documents for _, part in filled)])
        ends = [np.cumsum(one, dtype=np.int64) for one in lengths]
        self._starts = np.concatenate([np.empty(0, np.int64)] + [end - one for end, one in zip(ends, lengths, strict=True)])

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> np.ndarray:
        """Tokens of a document. One open per call: with tens of thousands of parts they cannot all stay open."""
        path = self._paths[int(np.searchsorted(self._first, number, side="right")) - 1]
        offset = int(self._starts[number]) * np.dtype(self.dtype).itemsize
        return np.fromfile(path, dtype=self.dtype, count=int(self.lengths[number]), offset=offset)
