"""Rows and media files to a dataset folder (see shards.py for what is in one).

Three passes, each of which can be killed at any point and goes on where it was: look at every media file once (worker processes,
answers journalled), write the shards (each under a temporary name, then renamed and journalled), write the index (dataset.json last).
What is written depends on the input alone, not on the number of workers, the order in which they finish, or earlier interrupted runs.
"""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_longvila.data.media import MediaError, MediaLimits, describe_failure, frame_files, open_source, resolve_below
from megatron_longvila.data.output import Journal, PreprocessError, Progress, Stored, output_folder, plan_shards, write_dataset
from megatron_longvila.data.rows import MediaReference, Row, RowError, read_rows
from megatron_longvila.data.shards import VERSION, Media, canonical_json
from megatron_longvila.data.tar import Member, SourceChanged
from megatron_longvila.data.video import probe
from megatron_longvila.data.workers import Killed, run_tasks

_KILL_AFTER_S = 5.0  # past timeout_s, for a native call that the reader's own check cannot end
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Options:
    """What a run does.

    Attributes:
        store: `tar` copies media into shards; `reference` only indexes them where they are.
        shard_bytes: a shard is closed before it grows past this; a medium is never split.
        timeout_s: wall-clock limit for looking at one media file.
    """

    input: Path
    media_root: Path
    output: Path
    store: str = "tar"
    num_workers: int = 4
    shard_bytes: int = 1 << 30
    timeout_s: float = 300.0
    limits: MediaLimits = field(default_factory=MediaLimits)
    dry_run: bool = False


@dataclass(frozen=True)
class Report:
    """What became of the rows; `changed` tells whether anything had to be written."""

    accepted: int
    rejected: int
    rows: tuple[dict, ...]
    num_media: int
    num_bytes: int
    duration_s: float
    num_shards: int
    changed: bool


def preprocess(options: Options, progress: Progress = lambda iterable, total, unit: iterable) -> Report:
    """Run all passes. Raises PreprocessError; OSError where the disk is full or fails."""
    rows = _load(options)
    with nullcontext() if options.dry_run else output_folder(options.output):
        files, problems = _resolve_all(rows, options.media_root)
        answers = _look(files, options, progress)
        samples, media, rejected = _accept(rows, files, problems, answers)
        if options.store == "tar":
            media = plan_shards(media, options.shard_bytes)
        changed = False
        if not options.dry_run:
            root = "" if options.store == "tar" else str(options.media_root.resolve())
            header = {"version": VERSION, "store": options.store, "media_root": root, "limits": asdict(options.limits)}
            report = {"input": options.input.name, "accepted": len(samples), "rejected": len(rejected), "rows": rejected}
            try:
                changed = write_dataset(options.output, header, samples, media, report, num_workers=options.num_workers, progress=progress)
            except SourceChanged as error:
                raise PreprocessError(str(error)) from None
    return Report(
        accepted=len(samples),
        rejected=len(rejected),
        rows=tuple(rejected),
        num_media=len(media),
        num_bytes=sum(one.num_bytes for one in media),
        duration_s=sum(one.media.duration_s for one in media),
        num_shards=len({one.media.shard for one in media if one.media.shard}),
        changed=changed,
    )


# ------------------------------------------------------------------------------------------------ rows and the files they name


@dataclass(frozen=True)
class _File:
    """A media file, or a folder of frames, as it is now; the same key means the same bytes."""

    path: str  # below the media root, as the first row that uses it spells it
    real: str
    fps: float | None
    key: str


def _load(options: Options) -> list[tuple[str, Row | RowError]]:
    if not options.media_root.is_dir():
        raise PreprocessError(f"--media_root {options.media_root} is not a folder; give the one that the rows' paths start from")
    try:
        rows = list(read_rows(options.input))
    except OSError as error:
        raise PreprocessError(f"--input {options.input} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PreprocessError(str(error)) from None
    first_use: dict[str, str] = {}
    for number, (key, row) in enumerate(rows):
        if isinstance(row, Row) and first_use.setdefault(row.id, key) != key:
            used = f"its id {row.id!r} was used before, in {first_use[row.id]}"
            rows[number] = (key, RowError(f"{used}; ids name samples in logs and skip lists"))
            rows[number][1].id = row.id
    return rows


def _resolve_all(rows: list[tuple[str, Row | RowError]], media_root: Path) -> tuple[dict[MediaReference, _File], dict[MediaReference, str]]:
    """The file of every reference, or what is wrong with it."""
    files, problems = {}, {}
    for reference in (reference for _, row in rows if isinstance(row, Row) for reference in row.media):
        if reference not in files and reference not in problems:
            try:
                files[reference] = _resolve(reference, media_root)
            except MediaError as error:
                problems[reference] = str(error)
    return files, problems


def _resolve(reference: MediaReference, media_root: Path) -> _File:
    real = resolve_below(media_root, reference.path)
    path = os.path.relpath(real, media_root.resolve())
    try:
        if not real.is_dir():
            status = real.stat()
            return _File(path, str(real), None, f"{path}|{status.st_size}|{status.st_mtime_ns}")
        digest = hashlib.sha256()
        for frame in frame_files(real):
            resolve_below(media_root, os.path.join(path, frame.name))  # a frame may be a link out of the root
            status = frame.stat()
            digest.update(f"{frame.name}|{status.st_size}|{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return _File(path, str(real), reference.fps, f"{path}|{reference.fps}|{digest.hexdigest()}")
    except MediaError as error:
        raise MediaError(f"{reference.path!r} {error}") from None
    except OSError as error:
        raise MediaError(f"{reference.path!r} cannot be read: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------ pass 1: look at every file once


@dataclass(frozen=True)
class _LookTask:
    file: _File
    timeout_s: float
    limits: MediaLimits


def look(task: _LookTask) -> dict:
    """Runs in a worker: what the index says about a medium, or {"error": reason, "final": whether a second try would say the same}."""
    file = task.file
    try:
        facts = probe(file.real, fps=file.fps, timeout_s=task.timeout_s, limits=task.limits)
        paths = frame_files(file.real) if facts.kind == "frames" else [file.real]
        members = [_hash_file(str(path), task.limits) for path in paths]
    except Exception as error:
        return describe_failure(error)
    sha256 = members[0][0]
    if facts.kind == "frames":  # the rate belongs to the identity: the same pictures at another rate are another video
        sha256 = hashlib.sha256("\n".join([f"frames {facts.fps!r}", *(member[0] for member in members)]).encode()).hexdigest()
    described = asdict(facts)
    timeline = base64.b64encode(described.pop("timeline")).decode()
    return {"sha256": sha256, "facts": described, "members": members, "timeline": timeline}


def _hash_file(path: str, limits: MediaLimits) -> tuple[str, int, str]:
    """(sha256, size, path)"""
    digest, size = hashlib.sha256(), 0
    with open_source(path, limits) as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size, path


def _look(files: dict[MediaReference, _File], options: Options, progress: Progress) -> dict[str, dict]:
    """Answer of `look` by file key; answers of earlier runs are taken from the journal."""
    header = canonical_json({"version": VERSION, "limits": asdict(options.limits)})
    journal = Journal(options.output / "state" / "media.jsonl", header, write=not options.dry_run)
    todo = {file.key: file for file in files.values() if not _is_known(journal.entries.get(file.key))}
    tasks = [_LookTask(file, options.timeout_s, options.limits) for file in todo.values()]
    results = run_tasks(look, tasks, num_workers=options.num_workers, timeout_s=options.timeout_s + _KILL_AFTER_S)
    answers = dict(journal.entries)
    with journal:
        for task, answer in progress(results, len(tasks), "file"):
            if isinstance(answer, Killed):
                answer = {"error": answer.reason, "final": False}
            answers[task.file.key] = answer
            if answer.get("final", True):
                journal.append(task.file.key, answer)
    return answers


def _is_known(answer: dict | None) -> bool:
    """Answers of before packet lists were stored are asked for again where there may be one; hash and shards stay as they are."""
    return answer is not None and ("error" in answer or "timeline" in answer or answer["facts"]["kind"] != "video")


def _accept(
    rows: list[tuple[str, Row | RowError]],
    files: dict[MediaReference, _File],
    problems: dict[MediaReference, str],
    answers: dict[str, dict],
) -> tuple[list[bytes], list[Stored], list[dict]]:
    """Lines of samples.jsonl, the media they show in order of first use, and the rejected rows of the report."""
    samples, media, rejected = [], {}, []
    for key, row in rows:
        reason = str(row) if isinstance(row, RowError) else _refusal(row, files, problems, answers)
        if reason:
            rejected.append({"key": key, "id": row.id, "reason": reason})
            continue
        shown = []
        for reference in row.media:
            file = files[reference]
            answer = answers[file.key]
            if answer["sha256"] not in media:
                media[answer["sha256"]] = _store(file, answer)
            shown.append(answer["sha256"])
        samples.append(canonical_json({"id": row.id, "conversations": list(row.conversations), "media": shown}).encode() + b"\n")
    return samples, list(media.values()), rejected


def _refusal(row: Row, files: dict[MediaReference, _File], problems: dict[MediaReference, str], answers: dict[str, dict]) -> str | None:
    for reference in row.media:
        if reference in problems:
            return problems[reference]
        answer = answers[files[reference].key]
        if "error" in answer:
            return f"{reference.path!r} {answer['error']}"
        is_image = answer["facts"]["kind"] == "image"
        if is_image != (reference.mark == "<image>"):
            return f"{reference.path!r} is {'an image' if is_image else 'a video'}, but its mark is {reference.mark}"
    return None


def _store(file: _File, answer: dict) -> Stored:
    facts = dict(answer["facts"])
    extension = facts.pop("extension")
    is_folder = facts["kind"] == "frames"
    members = tuple(
        Member(f"{answer['sha256']}.{number:06d}.{extension}" if is_folder else f"{answer['sha256']}.{extension}", sha256, size, path)
        for number, (sha256, size, path) in enumerate(answer["members"])
    )
    return Stored(
        Media(answer["sha256"], **facts, size=sum(member.size for member in members), path=file.path),
        members,
        base64.b64decode(answer.get("timeline", "")),
    )
