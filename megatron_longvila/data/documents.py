"""Input files of text preprocessing: which there are, how they are cut into tasks, and the documents they hold, bad ones with a reason.

A document is one line of a JSONL file (plain, .gz or .zst; SlimPajama's layout is folders of chunk*/example_*.jsonl.zst) or one whole .txt
file (also .gz or .zst). Plain JSONL files are cut into ranges of bytes, so that one large file is work for several processes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

FORMATS = tuple(kind + packing for kind in (".jsonl", ".txt") for packing in ("", ".gz", ".zst"))
PIECE_BYTES = 8 << 20  # of a plain JSONL file: a few seconds of work for one process, so that all end at about the same time
_BOM = b"\xef\xbb\xbf"
_PACKED_BYTES = 1 << 16  # small, because a frame may unpack to many times as much
_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes; the library's own limit, 128 MiB, is that of `zstd -d` without --long
_STREAM_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True)
class Piece:
    """A file, or the lines of a plain JSONL file that begin in the bytes [start, stop).

    Attributes:
        path: absolute; a link keeps its own name, which says how to read it (what it points to may have none: a cache of downloads).
        label: what reports call the file: its path from the --input it was found under.
        source: of documents that name none: the --input it was found under.
        size: bytes of the whole file, and mtime_ns its time stamp, when it was listed.
    """

    path: str
    label: str
    source: str
    size: int
    mtime_ns: int
    start: int
    stop: int

    @property
    def is_lines(self) -> bool:
        return self.path.endswith(FORMATS[:3])

    @property
    def is_packed(self) -> bool:
        return self.path.endswith((".gz", ".zst"))


class Document(NamedTuple):
    """One document; `line` counts from 1 at the start of the piece (0: the whole file)."""

    line: int
    source: str
    text: str


class Refused(NamedTuple):
    """What is wrong with a line or a file; `kind` is short and counted, `detail` says more about this one."""

    line: int
    kind: str
    detail: str = ""


def list_pieces(inputs: Sequence[Path], piece_bytes: int = PIECE_BYTES, share: tuple[int, int] = (0, 1)) -> tuple[list[Piece], int]:
    """All pieces of the input files in a fixed order, and the number of files in input folders that are of no known format.

    Args:
        share: (place, count), the files number `place`, `place + count`, ... alone.

    Raises:
        ValueError: an input that does not exist, is of no known format, holds no file, or is named twice; a share without a file.
        OSError: a folder cannot be listed.
    """
    place, count = share
    pieces: list[Piece] = []
    seen: dict[str, Path] = {}
    ignored = 0
    for root in inputs:
        if not root.exists():
            raise ValueError(f"--input {root} does not exist; correct the path")
        found = [root] if root.is_file() else find_files(root)
        files = [path for path in found if path.name.endswith(FORMATS)]
        if not files:
            raise ValueError(f"--input {root} holds no file that ends in {', '.join(FORMATS)}; give such a file, or a folder of them")
        ignored += len(found) - len(files)
        for path in files:
            real = str(path.resolve())
            if real in seen:
                raise ValueError(f"--input {root} and {seen[real]} both hold {real}; name it once (--long_share repeats long documents)")
            seen[real] = root
            if (len(seen) - 1) % count != place:
                continue
            label = path.name if root.is_file() else f"{root.name}/{path.relative_to(root).as_posix()}"
            source = root.name.split(".", 1)[0] if root.is_file() else root.name
            status = path.stat()
            size = status.st_size
            step = piece_bytes if path.suffix == ".jsonl" else max(1, size)
            pieces += [
                Piece(str(path.parent.resolve() / path.name), label, source, size, status.st_mtime_ns, start, min(start + step, size))
                for start in range(0, max(1, size), step)
            ]
    if not pieces:
        raise ValueError(f"--input holds {len(seen)} files, so that share {place}/{count} has none; make fewer shares")
    return pieces, ignored


def find_files(root: Path) -> list[Path]:
    """All files below a folder, sorted. Links to folders are followed, each folder once: chunks of a set may lie on several disks.

    Raises:
        OSError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    found, entered = [], set()
    for folder, names, files in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            names.clear()
            continue
        entered.add(real)
        names.sort()
        found += [path for path in (Path(folder, name) for name in files) if path.is_file()]
    return sorted(found)


def read_documents(piece: Piece, *, text_field: str, source_field: str) -> Iterator[Document | Refused]:
    """The documents of a piece in order, and what is no document. Empty lines are neither.

    Args:
        text_field: name of the text in a JSON object; dots step into objects (`meta.title`).
        source_field: name of the document's source; one without it belongs to `piece.source`.

    Raises:
        OSError: the file cannot be read. A compressed stream that is damaged or breaks off is a Refused instead: what came before is good.
    """
    if not piece.is_lines:
        yield _read_whole(piece)
        return
    line_number = 0
    with _open(piece.path) as file:
        position = _skip_started_line(file, piece.start)
        stop = float("inf") if piece.is_packed else piece.stop
        while position < stop:
            try:
                line = file.readline()
            except _STREAM_ERRORS as error:
                yield Refused(line_number + 1, "the compressed file is damaged from here on", str(error))
                return
            if not line:
                return
            if position == 0:
                line = line.removeprefix(_BOM)
            position += len(line)
            line_number += 1
            if line.strip():
                yield _parse_line(line, line_number, text_field, source_field, piece.source)


def count_lines(piece: Piece) -> int:
    """Lines that begin in the piece of a plain JSONL file: what lines of the next piece are counted from."""
    with open(piece.path, "rb") as file:
        position, count = _skip_started_line(file, piece.start), 0
        while position < piece.stop and (line := file.readline()):
            position, count = position + len(line), count + 1
    return count


def _skip_started_line(file: BinaryIO, start: int) -> int:
    """Go to the first line that begins at or after `start`."""
    if start:
        file.seek(start - 1)
        file.readline()
        return file.tell()
    return 0


def _parse_line(line: bytes, number: int, text_field: str, source_field: str, default_source: str) -> Document | Refused:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Refused(number, "not UTF-8 text", str(error))
    except (ValueError, RecursionError) as error:
        return Refused(number, "not JSON", str(error))
    if not isinstance(record, dict):
        return Refused(number, "not a JSON object", f"but {type(record).__name__}")
    text, source = _field(record, text_field), _field(record, source_field)
    if text is None:
        return Refused(number, f"no field {text_field!r}", f"it has {', '.join(map(repr, record))}"[:200])
    if not isinstance(text, str):
        return Refused(number, f"field {text_field!r} is not a text", f"but {type(text).__name__}")
    if not isinstance(source, str) or not source.strip() or not _is_unicode(source):
        source = default_source
    return _check_text(number, source, text)


def _check_text(line: int, source: str, text: str) -> Document | Refused:
    if not text.strip():
        return Refused(line, "empty text")
    if not _is_unicode(text):
        return Refused(line, "half a surrogate pair, which is no character")
    return Document(line, source, text)


def _field(record: dict, name: str) -> object:
    value: object = record
    for step in name.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_whole(piece: Piece) -> Document | Refused:
    with _open(piece.path) as file:
        try:
            text = file.read().removeprefix(_BOM).decode()
        except UnicodeDecodeError as error:
            return Refused(0, "not UTF-8 text", str(error))
        except _STREAM_ERRORS as error:
            return Refused(0, "the compressed file is damaged", str(error))
    return _check_text(0, piece.source, text)


class _ZstdFile(io.RawIOBase):
    """The bytes of a Zstandard file of one or more frames. zstandard's own reader takes a frame that breaks off for the end of the file."""

    def __init__(self, file: BinaryIO):
        super().__init__()
        self._file, self._frame, self._ready = file, None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Raises zstandard.ZstdError for damaged data and EOFError for a frame that breaks off."""
        while not self._ready:
            packed = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = packed or self._file.read(_PACKED_BYTES)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last frame breaks off")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))  # sliced without a copy
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    with open(path, "rb") as file:
        if path.endswith(".gz"):
            yield gzip.GzipFile(fileobj=file)
        elif path.endswith(".zst"):
            yield io.BufferedReader(_ZstdFile(file))
        else:
            yield file


def changed(piece: Piece) -> bool:
    """Whether the file is another one than was listed."""
    status = os.stat(piece.path)
    return (status.st_size, status.st_mtime_ns) != (piece.size, piece.mtime_ns)
