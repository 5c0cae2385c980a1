"""Records of annotation files, one at a time: JSON lines, one JSON list, or Parquet; a file of any size needs the memory of a record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

_CHUNK_BYTES = 1 << 20
_MAX_RECORD_BYTES = 64 << 20  # the longest public record is far below 1 MiB; a broken list must not be read as one record
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One record. `key` says where it stands (`file:line`, or `file#number` in a list or table, from 1); `done` is how much of the file
    has been read with it, in bytes."""

    key: str
    value: object
    done: int


@dataclass(frozen=True)
class Broken:
    """The value of a record that cannot be parsed, with the reason."""

    reason: str


def read_records(path: Path, columns: tuple[str, ...] = ()) -> Iterator[Record]:
    """Every record of a file in order.

    Args:
        columns: of a Parquet file, those that are read where it has them; none reads all.

    Raises:
        ValueError: what is wrong with the file as a whole. OSError: it cannot be read.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path, columns)
        return
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
        file.seek(0)
        yield from (_list if head.startswith(b"[") else _lines)(path, file)


def read_object(path: Path) -> dict:
    """A file that holds one JSON object. Raises ValueError."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _lines(path: Path, file: BinaryIO) -> Iterator[Record]:
    done = 0
    for number, line in enumerate(file, 1):
        done += len(line)
        line = line.removeprefix(_BOM) if number == 1 else line
        if line.strip():
            yield Record(f"{path.name}:{number}", _parse(line), done)


def _parse(text: bytes) -> object:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 text: {error}")
    except (ValueError, RecursionError) as error:
        return Broken(f"not JSON: {error}")


def _list(path: Path, file: BinaryIO) -> Iterator[Record]:
    """Elements of one list, cut at the brackets outside strings, so that each is parsed alone and a broken one costs itself."""
    done = buffer_start = 0
    number, opened, closed = 0, False, False
    buffer = b""
    while True:
        chunk = file.read(_CHUNK_BYTES)
        buffer += chunk
        place = 0
        while True:
            place = _skip(buffer, place, _SPACE + (b"," if number else b"") + (_BOM if not opened else b""))
            if place == len(buffer):
                break
            if not opened:
                opened, place = True, place + 1
                continue
            if buffer[place] == ord("]"):
                closed = True
                break
            end = _element_end(buffer, place)
            if end is None:
                break
            number, done = number + 1, buffer_start + end
            yield Record(f"{path.name}#{number}", _parse(buffer[place:end]), done)
            place = end
        if closed:
            if buffer[place + 1 :].strip() or file.read(_CHUNK_BYTES).strip():
                raise ValueError(f"{path}: something follows the end of the list after element {number}")
            return
        buffer_start, buffer = buffer_start + place, buffer[place:]
        if not chunk:
            raise ValueError(f"{path}: the list breaks off after element {number}; the file is cut")
        if len(buffer) > _MAX_RECORD_BYTES:
            raise ValueError(f"{path}: element {number + 1} does not end within {_MAX_RECORD_BYTES} bytes; the file is damaged there")


def _skip(buffer: bytes, place: int, characters: bytes) -> int:
    while place < len(buffer) and buffer[place] in characters:
        place += 1
    return place


def _element_end(buffer: bytes, start: int) -> int | None:
    """Where the list element that begins at `start` ends, None if it goes on past the buffer."""
    depth, place = 0, start
    while place < len(buffer):
        character = buffer[place]
        if character == 0x22:  # a string: to its closing quote
            place = _string_end(buffer, place)
            if place is None:
                return None
            continue
        if character in b"[{":
            depth += 1
        elif character in b"]}":
            if depth == 0:
                return place
            depth -= 1
            if depth == 0:
                return place + 1
        elif character == 0x2C and depth == 0:
            return place
        place += 1
    return None


def _string_end(buffer: bytes, start: int) -> int | None:
    place = start + 1
    while True:
        quote = buffer.find(b'"', place)
        if quote < 0:
            return None
        slashes = quote
        while buffer[slashes - 1] == 0x5C:
            slashes -= 1
        if (quote - slashes) % 2 == 0:
            return quote + 1
        place = quote + 1


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: Parquet files are read by pyarrow, which is missing; pip install 'megatron-longvila[parquet]'") from None
    size = path.stat().st_size
    try:
        file = pyarrow.parquet.ParquetFile(path)
        known = [name for name in file.schema_arrow.names if not columns or name in columns]
        number, rows = 0, max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=1024, columns=known):
            for value in batch.to_pylist():
                number += 1
                yield Record(f"{path.name}#{number}", value, size * number // rows)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}") from None
