"""The output side of preprocessing: the locked folder, its journals, the plan of the shards, and the index, written last."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_longvila.data.shards import VERSION, Media, canonical_json, dataset_hash, media_line
from megatron_longvila.data.tar import Member, ShardTask, shard_index, write_shard

# What tells a folder of media from a folder of text rows, also an unfinished one, and who writes it.
_FOREIGN = {
    "media": (("documents", "rows.idx"), "tools/preprocess_text.py"),
    "text": (("shards", "samples.jsonl"), "tools/preprocess_video.py"),
    "copies": (("dataset.json", "samples.jsonl"), "tools/preprocess_video.py"),
}
_SHARD_NAME = re.compile(r"media-[0-9]{6}\.tar(\.tmp)?")

Progress = Callable[[Iterable, int, str], Iterable]
"""Wraps an iterable of known length to show progress: (iterable, total, what is counted)."""


class PreprocessError(RuntimeError):
    """The run cannot go on; the message says why and what to do. What was done so far is kept."""


@dataclass(frozen=True)
class Stored:
    """A medium of the dataset, the files its bytes come from (one, or one per frame), and its packed timeline."""

    media: Media
    members: tuple[Member, ...]
    timeline: bytes = b""

    @property
    def num_bytes(self) -> int:
        return sum(member.size for member in self.members)


@contextmanager
def output_folder(path: Path, kind: Literal["media", "text", "copies"] = "media") -> Iterator[None]:
    """Make the folder, and keep a second run out of it. Raises PreprocessError when it holds something else or is in use."""
    foreign, tool = _FOREIGN[kind]
    if any((path / name).exists() for name in foreign):
        raise PreprocessError(f"--output {path} holds a dataset of {tool}; give a new or empty folder")
    if path.exists() and not path.is_dir():
        raise PreprocessError(f"--output {path} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / "state").is_dir():
        raise PreprocessError(f"--output {path} holds files that this tool did not write; give a new or empty folder")
    (path / "state").mkdir(parents=True, exist_ok=True)
    with open(path / "state" / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        except BlockingIOError:
            raise PreprocessError(f"--output {path} is being written by another run; wait for it or give another folder") from None
        yield


class Journal:
    """Answers that survive a kill: one JSON line each, appended as soon as it is known. A last line that is cut is dropped.

    The first line is a header; a journal under another header answers another question and starts again.
    """

    def __init__(self, path: Path, header: str, *, write: bool):
        self.entries: dict[str, object] = {}
        self._file = None
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        if lines[0] != header.encode():
            lines = [header.encode(), b""]
        whole = b"".join(line + b"\n" for line in lines[:-1])  # what follows the last newline was being written when the kill came
        for line in lines[1:-1]:
            key, value = json.loads(line)
            self.entries[key] = value
        if write:
            if not path.is_file() or path.read_bytes() != whole:
                write_atomically(path, whole)
            self._file = open(path, "ab")  # noqa: SIM115 (closed by close)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, key: str, value: object) -> None:
        self.entries[key] = value
        if self._file is not None:
            self._file.write(json.dumps([key, value]).encode() + b"\n")
            self._file.flush()


def write_atomically(path: Path, data: bytes) -> bool:
    """Replace the file as a whole, unless it holds `data` already. Returns whether it was written."""
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return False
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return True


def plan_shards(media: list[Stored], shard_bytes: int) -> list[Stored]:
    """Name the shard of every medium: in order, a new shard where the next medium would take the current one past `shard_bytes`."""
    planned, number, filled = [], 0, 0
    for one in media:
        if filled and filled + one.num_bytes > shard_bytes:
            number, filled = number + 1, 0
        filled += one.num_bytes
        planned.append(replace(one, media=replace(one.media, shard=f"media-{number:06d}.tar", path="")))
    return planned


def write_dataset(
    output: Path, header: dict, samples: list[bytes], media: list[Stored], report: dict, *, num_workers: int, progress: Progress
) -> bool:
    """Write shards, index and report; what is there already is left alone. Returns whether anything had to be written."""
    tasks, signatures = _shard_tasks(output, media)
    changed = False
    with Journal(output / "state" / "shards.jsonl", canonical_json({"version": VERSION}), write=True) as journal:
        shards = output / "shards"
        todo = [task for name, task in tasks.items() if not _is_written(shards / name, journal.entries.get(name), signatures[name])]
        stale = [path for path in shards.glob("*") if _SHARD_NAME.fullmatch(path.name) and path.name not in tasks]
        if todo or stale:  # from here on the old index may name bytes that are no longer there
            (output / "dataset.json").unlink(missing_ok=True)
            shards.mkdir(exist_ok=True)
            changed = True
        for path in stale:
            path.unlink()
        for task in progress(_write_shards(todo, num_workers), len(todo), "shard"):
            name = Path(task.path).name
            journal.append(name, {"signature": signatures[name], "size": Path(task.path).stat().st_size})
    placed = _place_timelines(media, _place(output, media, list(tasks)))
    sample_bytes, media_bytes = b"".join(samples), "".join(media_line(one) + "\n" for one in placed).encode()
    header = {**header, "num_samples": len(samples), "num_media": len(placed), "hash": dataset_hash(sample_bytes, placed)}
    header_bytes = json.dumps(header, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"
    report_bytes = json.dumps(report, indent=1, ensure_ascii=True).encode() + b"\n"
    timeline_bytes = b"".join(one.timeline for one in media)
    index = {"timelines.bin": timeline_bytes, "samples.jsonl": sample_bytes, "media.jsonl": media_bytes, "dataset.json": header_bytes}
    if any(not (output / name).is_file() or (output / name).read_bytes() != data for name, data in index.items()):
        (output / "dataset.json").unlink(missing_ok=True)  # samples and media never stand under another run's header
    changed |= write_atomically(output / "report.json", report_bytes)
    for name, data in index.items():
        changed |= write_atomically(output / name, data)
    return changed


def _write_shards(tasks: list[ShardTask], num_workers: int) -> Iterator[ShardTask]:
    """Write in threads (copying and hashing run outside the interpreter lock), yielding each task when its shard is in place."""
    with ThreadPoolExecutor(num_workers) as threads:
        pending = {threads.submit(write_shard, task): task for task in tasks}
        try:
            for future in as_completed(pending):
                future.result()
                yield pending[future]
        finally:
            threads.shutdown(cancel_futures=True)


def _shard_tasks(output: Path, media: list[Stored]) -> tuple[dict[str, ShardTask], dict[str, str]]:
    """Per shard name: what to write, and a signature of it."""
    groups: dict[str, list[Stored]] = {}
    for one in media:
        if one.media.shard:
            groups.setdefault(one.media.shard, []).append(one)
    tasks, signatures = {}, {}
    for name, group in groups.items():
        contents = tuple((one.media.sha256, _description(one.media), one.members) for one in group)
        tasks[name] = ShardTask(str(output / "shards" / name), contents)
        listing = [[key, description, [member.name for member in members]] for key, description, members in contents]
        signatures[name] = hashlib.sha256(canonical_json(listing).encode()).hexdigest()
    return tasks, signatures


def _description(media: Media) -> str:
    """The JSON beside a medium in its shard: its facts, without where it is."""
    return media_line(replace(media, shard="", members=(), timeline=(), path="", offset=0))


def _is_written(path: Path, entry: object, signature: str) -> bool:
    return isinstance(entry, dict) and entry["signature"] == signature and path.is_file() and path.stat().st_size == entry["size"]


def _place(output: Path, media: list[Stored], shards: list[str]) -> list[Media]:
    """The media with their offsets, read from the headers of the finished shards."""
    offsets = {(name, member): place for name in shards for member, place in shard_index(output / "shards" / name).items()}
    placed = []
    for one in media:
        if not one.media.shard:
            placed.append(one.media)
            continue
        places = tuple(offsets[one.media.shard, member.name] for member in one.members)
        where = {"members": places} if one.media.kind == "frames" else {"offset": places[0][0]}
        placed.append(replace(one.media, **where))
    return placed


def _place_timelines(media: list[Stored], placed: list[Media]) -> list[Media]:
    """The media with the place of their timelines, which follow each other in order."""
    ends = list(itertools.accumulate(len(one.timeline) for one in media))
    return [
        replace(where, timeline=(end - len(one.timeline), len(one.timeline))) if one.timeline else where
        for one, where, end in zip(media, placed, ends, strict=True)
    ]
