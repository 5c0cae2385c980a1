"""Input rows of the preprocessing tool: LLaVA-style JSON to checked dialogues and the media they show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_longvila.data.conversation import MARKS

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class RowError(ValueError):
    """A row that cannot be used; the message is the reason in the report, `id` the row's own where it has one."""

    id: str | None = None


@dataclass(frozen=True)
class MediaReference:
    """A medium as a row names it: `mark` is `<video>` or `<image>`, `path` below the media root, `fps` of a folder of frames."""

    mark: str
    path: str
    fps: float | None = None


@dataclass(frozen=True)
class Row:
    """One checked dialogue; `media` in the order of the marks."""

    id: str
    conversations: tuple[dict, ...]
    media: tuple[MediaReference, ...]


def read_rows(path: Path) -> Iterator[tuple[str, Row | RowError]]:
    """(key, row or what is wrong with it) of each row of a JSONL file, or of a JSON file that holds one list. Empty lines are no rows.

    The key is `file:line`, or `file#number` in a list, both counted from 1.

    Raises:
        ValueError: a JSON list that cannot be parsed at all; OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if head.startswith(b"["):
            try:
                records = json.loads(file.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} starts like a JSON list but is not one: {error}") from None
            for number, record in enumerate(records, 1):
                yield f"{path.name}#{number}", _check(record)
            return
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield f"{path.name}:{number}", _check_line(line)


def _check_line(line: bytes) -> Row | RowError:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 text: {error}")
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON: {error}")
    return _check(record)


def _check(record: object) -> Row | RowError:
    try:
        return parse_row(record)
    except RowError as error:
        error.id = _identity(record)
        return error


def _identity(record: object) -> str | None:
    identity = record.get("id") if isinstance(record, dict) else None
    usable = isinstance(identity, str | int) and not isinstance(identity, bool) and identity != ""
    return str(identity) if usable else None


def parse_row(record: object) -> Row:
    """Check one row. Raises RowError with the reason."""
    if not isinstance(record, dict):
        raise RowError(f"a row must be a JSON object, not {type(record).__name__}")
    identity = _identity(record)
    if identity is None:
        raise RowError("has no `id` (a text or a whole number)")
    conversations = _parse_conversations(record.get("conversations"))
    videos = [MediaReference("<video>", path, _parse_fps(record)) for path in _paths(record, "video")]
    if record.get("image") is not None and record.get("images") is not None:  # tables written as JSON name all columns in every row
        raise RowError("has both `image` and `images`; put all pictures into `images`")
    images = [MediaReference("<image>", path) for path in _paths(record, "image") + _paths(record, "images")]
    row = Row(identity, conversations, _match_marks(conversations, videos, images))
    try:
        json.dumps([row.id, conversations], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError("its text holds half a surrogate pair, which is no character") from None
    return row


def _parse_conversations(turns: object) -> tuple[dict, ...]:
    if not isinstance(turns, list) or not turns:
        raise RowError("has no `conversations` (a list of {from, value})")
    checked = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise RowError(f"turn {number} must be {{from, value}} with a text as value")
        speaker = _SPEAKERS.get(turn.get("from")) if isinstance(turn.get("from"), str) else None
        if speaker is None:
            raise RowError(f"turn {number} is from {turn.get('from')!r}; known are human, gpt and system")
        checked.append({"from": speaker, "value": turn["value"]})
    spoken = checked[1:] if checked[0]["from"] == "system" else checked
    if not spoken or len(spoken) % 2 or any(turn["from"] != ("human", "gpt")[number % 2] for number, turn in enumerate(spoken)):
        order = ", ".join(turn["from"] for turn in checked)
        raise RowError(f"turns must alternate human, gpt, ..., the last one gpt, after at most one system turn; they are {order[:100]}")
    for number, turn in enumerate(checked):
        if turn["from"] == "gpt" and not turn["value"].strip():
            raise RowError(f"the answer in turn {number} is empty")
    return tuple(checked)


def _paths(record: dict, name: str) -> list[str]:
    value = record.get(name)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in values):
        raise RowError(f"`{name}` must be a path or a list of paths")
    return values


def _parse_fps(record: dict) -> float | None:
    fps = record.get("fps")
    if fps is None:
        return None
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not math.isfinite(fps) or fps <= 0:
        raise RowError(f"`fps` must be a number above 0, not {fps!r}")
    return float(fps)


def _match_marks(conversations: tuple[dict, ...], videos: list[MediaReference], images: list[MediaReference]) -> tuple[MediaReference, ...]:
    """The medium of each mark of the human turns, in order; as many marks of each kind as media."""
    marks = [mark for turn in conversations if turn["from"] == "human" for mark in MARKS.findall(turn["value"])]
    for mark, name, media in (("<video>", "video", videos), ("<image>", "image", images)):
        if marks.count(mark) != len(media):
            raise RowError(f"{marks.count(mark)} {mark} marks in the human turns, but {len(media)} files in `{name}`")
    sources = {"<video>": iter(videos), "<image>": iter(images)}
    return tuple(next(sources[mark]) for mark in marks)
