"""One import: records of all input files to one JSONL of rows, beside it the rejected records and a report.

OUTPUT                   rows, in the order of the input
OUTPUT.rejected.jsonl    {"key", "id", "kind", "reason"} of each record that gave no row
OUTPUT.report.json       counts; written last: without it the import is unfinished

A kill costs at most the last CHECKPOINT_RECORDS records: where the output stood after how many records is written down as it goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatron_longvila.data.documents import find_files
from megatron_longvila.data.importers.catalogue import IMPORTERS
from megatron_longvila.data.importers.records import Record
from megatron_longvila.data.importers.rows import MediaFolder, Missing, Settings
from megatron_longvila.data.output import PreprocessError, write_atomically
from megatron_longvila.data.rows import RowError, parse_row
from megatron_longvila.data.shards import canonical_json

CHECKPOINT_RECORDS = 2000
VERSION = 2  # raise when the same files and settings make other rows
_DIGEST_BYTES = 12  # two of 10**9 different rows share one with a probability below 10**-10


@dataclass(frozen=True)
class Options:
    """What an import does; `name` is a key of IMPORTERS, and `media_root` is only needed where rows have media."""

    name: str
    inputs: tuple[Path, ...]
    output: Path
    media_root: Path | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass
class Report:
    """What became of the records.

    Attributes:
        records: read from the input; one may give several rows or none.
        rows: written.
        renamed: of those, how many got another id because theirs was taken by a different row.
        unwanted: records of other splits or sources.
        rejected: rows that were not written, by kind (`missing media`, `duplicate`, `unusable`).
        changed: whether anything had to be done.
    """

    records: int = 0
    rows: int = 0
    renamed: int = 0
    unwanted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    changed: bool = True

    def counts(self) -> dict:
        """All but `changed`, as JSON values."""
        names = ("records", "rows", "renamed", "unwanted")
        return {name: getattr(self, name) for name in names} | {"rejected": dict(self.rejected)}


def run_import(options: Options, progress=lambda records, total: records) -> Report:
    """Import, or go on with an import that was interrupted.

    Args:
        progress: wraps the records to show how far they are; `done` of each counts bytes of the inputs, `total` is all of them.

    Raises:
        PreprocessError: inputs, folders or output that cannot be used. OSError: the disk is full or fails.
    """
    _check(options)
    with _locked(options.output):
        work = _Work(options)
        finished = work.finished()
        if finished is not None:
            return finished
        total = sum(_size(path) for path in options.inputs)
        try:
            with work:
                for record in progress(_all_records(options, skip=work.report.records), total):
                    work.add(record)
        except ValueError as error:  # of a file as a whole; a record's own is in the list of rejected ones
            raise PreprocessError(str(error)) from None
        return work.finish()


def _check(options: Options) -> None:
    importer = IMPORTERS[options.name]
    if not importer.is_text and (options.media_root is None or not options.media_root.is_dir()):
        raise PreprocessError(f"--media_root {options.media_root} is not a folder; give the one that holds the pictures or videos")
    for path in (*options.inputs, *filter(None, [options.settings.answers])):
        if not (path.is_file() or (importer.is_text and path.is_dir())):
            raise PreprocessError(f"{path} is not a file; give the annotation file as it was published")
    names = [path.resolve() for path in options.inputs]
    if len(set(names)) < len(names):
        raise PreprocessError("an input is named twice; its rows would be duplicates")
    if options.output.resolve() in names:
        raise PreprocessError(f"--output {options.output} is also an input; give another file")
    if options.output.is_dir():
        raise PreprocessError(f"--output {options.output} is a folder; give a file name such as {options.output / 'rows.jsonl'}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in find_files(path))


def _all_records(options: Options, *, skip: int) -> Iterator[Record]:
    """Records from number `skip` on, `done` counted over all inputs."""
    read, number, before = IMPORTERS[options.name].read, 0, 0
    for path in options.inputs:
        for key, value, done in read(path, options.settings):
            number += 1
            if number > skip:
                yield Record(key, value, before + done)
        before += _size(path)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_name(output.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreprocessError(f"--output {output} is being written by another run; wait for it") from None
        yield


class _Work:
    """The output files of one import and what is known about the rows in them."""

    def __init__(self, options: Options):
        self._options, self._importer = options, IMPORTERS[options.name]
        self._media = MediaFolder(options.media_root or Path(), search=options.settings.search)
        output = options.output
        self._rows, self._rejects, self._state, self._report_path = (
            output.with_name(output.name + ending) for ending in (".partial", ".rejected.jsonl.partial", ".state", ".report.json")
        )
        self._final_rejects = output.with_name(output.name + ".rejected.jsonl")
        self._made_from = _fingerprint(options)
        self.report = Report()
        self._ids: set[bytes] = set()
        self._contents: set[bytes] = set()
        self._stack = ExitStack()

    def finished(self) -> Report | None:
        """The report of a finished import of the same input that missed no media: files that were missing may have come since."""
        if not (self._report_path.is_file() and self._options.output.is_file() and self._final_rejects.is_file()):
            return None
        try:
            found = json.loads(self._report_path.read_bytes())
            same = found["made_from"] == self._made_from and found["size"] == self._options.output.stat().st_size
            counts = {name: found[name] for name in ("records", "rows", "renamed", "unwanted")}
            rejected = Counter(found["rejected"])
        except (ValueError, KeyError, TypeError):
            return None  # damaged: import again
        return Report(**counts, rejected=rejected, changed=False) if same and not rejected["missing media"] else None

    def __enter__(self) -> _Work:
        sizes = self._resume()
        self._files: list[BinaryIO] = []
        for path, size in zip((self._rows, self._rejects), sizes, strict=True):
            path.touch()
            file = self._stack.enter_context(open(path, "r+b"))
            file.truncate(size)
            file.seek(size)
            self._files.append(file)
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _resume(self) -> tuple[int, int]:
        """Take up the counts of the last checkpoint; returns the sizes the files had then."""
        try:
            state = json.loads(self._state.read_bytes())
            sizes = tuple(state["sizes"])
            there = [path.stat().st_size for path in (self._rows, self._rejects)]
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0
        if state["made_from"] != self._made_from or any(size < wanted for size, wanted in zip(there, sizes, strict=True)):
            return 0, 0
        self.report = Report(**{**state["report"], "rejected": Counter(state["report"]["rejected"])})
        if not self._importer.is_text:
            with open(self._rows, "rb") as file:
                while file.tell() < sizes[0]:
                    row = json.loads(file.readline())
                    self._ids.add(_digest(row["id"]))
                    self._contents.add(_digest(row.pop("origin", row["id"]), {**row, "id": ""}))
        return sizes

    def add(self, record: Record) -> None:
        """Write the rows of one record, or why it has none."""
        try:
            rows = self._importer.convert(record.value, self._media, self._options.settings)
        except RowError as error:
            rows = [error]
        for row in rows:
            try:
                if isinstance(row, RowError):
                    raise row
                self._files[0].write(self._line(row, record.key))
                self.report.rows += 1
            except RowError as error:
                self._reject(record, error)
        self.report.unwanted += not rows
        self.report.records += 1
        if self.report.records % CHECKPOINT_RECORDS == 0:
            self._checkpoint()

    def _line(self, row: dict, key: str) -> bytes:
        """The row with an id that no other has. Raises RowError for what the next tool would refuse, and for the same row again."""
        if self._importer.is_text:
            return canonical_json(row).encode() + b"\n"
        origin = row.get("id")
        origin = key if origin in (None, "") else str(origin) if type(origin) in (int, str) else origin
        row = {**row, "id": origin}
        parse_row(row)
        content = _digest(origin, {**row, "id": ""})
        if content in self._contents:
            raise _Duplicate(f"says and shows the same as an earlier record with the id {origin!r}")
        number = 1
        while _digest(row["id"]) in self._ids:
            number += 1
            row["id"] = f"{origin}-{number}"
        self._ids.add(_digest(row["id"]))
        self._contents.add(content)
        if number > 1:
            self.report.renamed += 1
            row["origin"] = origin
        return canonical_json(row).encode() + b"\n"

    def _reject(self, record: Record, error: RowError) -> None:
        kind = "missing media" if isinstance(error, Missing) else "duplicate" if isinstance(error, _Duplicate) else "unusable"
        self.report.rejected[kind] += 1
        given = record.value.get("id") if isinstance(record.value, dict) else None
        known = given if isinstance(given, str | int) else None
        line = json.dumps({"key": record.key, "id": known, "kind": kind, "reason": str(error)})
        self._files[1].write(line.encode() + b"\n")

    def _checkpoint(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        state = {"made_from": self._made_from, "sizes": [file.tell() for file in self._files], "report": self.report.counts()}
        write_atomically(self._state, json.dumps(state).encode())

    def finish(self) -> Report:
        """Put the finished files in place, the report last."""
        self._report_path.unlink(missing_ok=True)
        size = self._rows.stat().st_size
        os.replace(self._rejects, self._final_rejects)
        os.replace(self._rows, self._options.output)
        report = {"importer": self._options.name, "made_from": self._made_from, "size": size, **self.report.counts()}
        write_atomically(self._report_path, json.dumps(report, indent=1).encode() + b"\n")
        self._state.unlink(missing_ok=True)
        return self.report


class _Duplicate(RowError):
    """The same row was there before."""


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).digest()


def _fingerprint(options: Options) -> str:
    """Of what decides the rows, but for what lies in the media folder."""
    files = []
    for path in (*options.inputs, *filter(None, [options.settings.answers])):
        for one in [path] if path.is_file() else find_files(path):
            status = one.stat()
            files.append([str(one.resolve()), status.st_size, status.st_mtime_ns])
    settings = {name: str(value) for name, value in asdict(options.settings).items()}
    root = str(options.media_root.resolve()) if options.media_root else ""
    return hashlib.sha256(json.dumps([VERSION, options.name, files, settings, root]).encode()).hexdigest()
