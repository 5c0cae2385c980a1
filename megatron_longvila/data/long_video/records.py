"""The work folder of the long-video pipeline: logs that only grow, answers that are never asked for twice, and stage files.

    WORK/lock                   held by the kernel while a stage runs
    WORK/answers/<stage>.jsonl  every answer an endpoint ever gave, one line each, in the order of arrival; never rewritten
    WORK/answers/faults.jsonl   every fault of an endpoint, one line each
    WORK/<stage>.jsonl          what the stage hands on, made from the answers alone, in the order of the input, replaced as a whole
    WORK/<stage>.rejects.jsonl  what it refused and why
    WORK/<stage>.pending.jsonl  while it is unfinished: what the last run asked and got no answer to, and why
    WORK/<stage>.report.json    counts, and the hash of what it was made from

A kill can only cut the last line of a log; that line is dropped on the next start. All else is a pure function of the logs and the
input, so it does not matter when or how often a stage was killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from megatron_longvila.data.output import write_atomically
from megatron_longvila.data.shards import canonical_json


class WorkError(RuntimeError):
    """A stage cannot run; the message says why and what to do. What was stored is kept."""


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """Make the folder and keep a second stage out of it. Raises WorkError when it is in use or holds something else."""
    if path.exists() and not path.is_dir():
        raise WorkError(f"--work {path} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / "lock").is_file():
        raise WorkError(f"--work {path} holds files that this tool did not write; give a new or empty folder")
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        except BlockingIOError:
            raise WorkError(f"--work {path} is being written by another run; wait for it") from None
        (path / "answers").mkdir(exist_ok=True)
        yield path


class Log:
    """JSON lines that are only ever appended, each whole and on the disk before `append` returns; safe to use from many threads.

    A line is either there with its newline or it does not count. A last line that a kill has cut is taken off the file when it is opened,
    so that the next line cannot run into it; a write that fails half-way (a full disk) is taken off at once.
    """

    def __init__(self, path: Path, *, durable: bool = True):
        self.path = path
        self._durable = durable
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = self._drop_cut_line()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def append(self, record: dict) -> tuple[int, int]:
        """Add a line; returns its (offset, size). OSError when it cannot be stored: the log is then as it was before."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"  # ASCII: half a surrogate pair stays what it is
        with self._lock:
            start, written = self._end, 0
            try:
                while written < len(line):
                    written += os.pwrite(self._fd, line[written:], start + written)
                if self._durable:
                    os.fdatasync(self._fd)
            except OSError:
                os.ftruncate(self._fd, start)
                raise
            self._end = start + len(line)
        return start, len(line)

    def read(self, offset: int, size: int) -> dict:
        return json.loads(os.pread(self._fd, size, offset))

    def scan(self) -> Iterator[tuple[int, int, dict]]:
        """(offset, size, record) of every line. Raises WorkError for a damaged one."""
        with open(self.path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("not an object")
                except ValueError as error:
                    raise WorkError(
                        f"{self.path} line {number} is damaged ({error}), which no kill does; delete that line to ask for its answer again"
                    ) from None
                yield offset, len(line), record
                offset += len(line)

    def _drop_cut_line(self) -> int:
        """The size of the file up to its last newline, and the file cut to it."""
        end = size = os.fstat(self._fd).st_size
        while end:  # from the back: a log may be gigabytes, its last line is not
            start = max(0, end - (1 << 16))
            found = os.pread(self._fd, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._fd, end)
        return end


_NO_USAGE = {"answers": 0, "answers_without_usage": 0, "prompt_tokens": 0, "completion_tokens": 0}


class AnswerStore:
    """Answers by request key, on disk; memory holds only where each stands."""

    def __init__(self, path: Path):
        self._log = Log(path)
        self._places: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._usage: dict[str, dict[str, int]] = {}
        try:
            for offset, size, record in self._log.scan():
                self._count(record, (offset, size))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._log.close()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict | None:
        """The stored answer, or None where there is none."""
        place = self._places.get(key)
        return None if place is None else self._log.read(*place)["answer"]

    def usage_of(self, model: str) -> dict[str, int]:
        """What all stored answers of a model have used, whatever the prompt they answer."""
        return dict(self._usage.get(model, _NO_USAGE))

    def usage_without(self, model: str) -> dict[str, dict[str, int]]:
        """The same of each other model."""
        return {name: dict(usage) for name, usage in sorted(self._usage.items()) if name != model}

    def put(self, key: str, answer: dict, model: str) -> None:
        """Store an answer of `model` as it was asked for: {"text", "finish_reason", "model", "usage"}. On the disk when this returns."""
        assert key not in self._places, f"the answer to {key} is stored already and was asked for again"
        record = {"key": key, "model": model, "answer": answer}
        place = self._log.append(record)
        with self._lock:
            self._count(record, place)

    def _count(self, record: dict, place: tuple[int, int]) -> None:
        try:
            key, usage = record["key"], record["answer"]["usage"]
            model = record.get("model", record["answer"]["model"])  # older lines name only who answered
        except (KeyError, TypeError):
            raise WorkError(f"{self._log.path} holds a line that is no answer; delete it or give another --work folder") from None
        self._places[key] = place
        total = self._usage.setdefault(model, dict(_NO_USAGE))
        total["answers"] += 1
        total["answers_without_usage"] += usage is None
        for name in ("prompt_tokens", "completion_tokens"):
            total[name] += usage[name] if usage else 0


def request_key(request: dict) -> str:
    """Names a request by everything that shapes its answer: prompt, model, sampling, input and number of the try."""
    return hashlib.sha256(canonical_json(request).encode("utf-8", "surrogatepass")).hexdigest()


# ------------------------------------------------------------------------------------------------ stage files


def write_stage(work: Path, stage: str, records: Iterable[dict], rejects: Iterable[dict], report: dict, *, sources: list[Path]) -> dict:
    """Replace a stage's three files and return the report as written. `rejects` and `report` are read once `records` are taken.

    Records go to the disk one by one; a stage that fails among them leaves what an earlier run wrote as it was. The report comes last and
    names the hashes of `sources`, so that a half-written stage is no finished one.
    """
    report_path = work / f"{stage}.report.json"
    digest = write_lines(work / f"{stage}.jsonl", records, before=lambda: report_path.unlink(missing_ok=True))
    write_lines(work / f"{stage}.rejects.jsonl", rejects)
    made_from = {source.name: file_hash(source) for source in sources}
    report = {"stage": stage, "made_from": made_from, "hash": digest, **report}
    write_atomically(report_path, json.dumps(report, indent=1).encode() + b"\n")
    return report


def fail_stage(work: Path, stage: str, rejects: Iterable[dict]) -> None:
    """Leave a stage unfinished, with what it refused to read."""
    (work / f"{stage}.report.json").unlink(missing_ok=True)
    write_lines(work / f"{stage}.rejects.jsonl", rejects)


def write_lines(path: Path, records: Iterable[dict], *, before: Callable[[], None] = lambda: None) -> str:
    """Replace a file as a whole by a line per record, without keeping them; `before` runs once all are written. Returns their sha256."""
    temporary, digest = path.with_name(path.name + ".tmp"), hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for record in records:
                line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
                digest.update(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def read_stage(work: Path, stage: str) -> Iterator[dict]:
    """The records of a finished stage. Raises WorkError when it has not run, was cut short, or what it was made from has changed since."""
    report = read_report(work, stage)
    path = work / f"{stage}.jsonl"
    if not path.is_file() or file_hash(path) != report["hash"]:
        raise WorkError(f"{path} is not what `{stage}` wrote; run `{stage}` again (stored answers are not asked for again)")
    with open(path, "rb") as file:
        yield from (json.loads(line) for line in file)


class Groups:
    """The records of one video after the other, from a stage file that keeps the order of the videos."""

    def __init__(self, records: Iterable[dict]):
        self._groups = groupby(records, key=lambda record: record["video"])
        self._next = next(self._groups, None)

    def take(self, video: str) -> list[dict]:
        """The records of `video`, which is the next one that has any, or has none."""
        if self._next is None or self._next[0] != video:
            return []
        records = list(self._next[1])
        self._next = next(self._groups, None)
        return records

    def close(self) -> None:
        assert self._next is None, f"{self._next[0]!r} is not in the order of the videos"


def read_report(work: Path, stage: str) -> dict:
    """The report of a finished stage; WorkError as in read_stage."""
    path = work / f"{stage}.report.json"
    if not path.is_file():
        raise WorkError(f"`{stage}` has not finished in {work}; run it first")
    report = json.loads(path.read_bytes())
    for name, digest in report["made_from"].items():
        source = work / name
        if not source.is_file() or file_hash(source) != digest:
            raise WorkError(f"{name} has changed since `{stage}` ran; run `{stage}` again (stored answers are not asked for again)")
        read_report(work, name.removesuffix(".jsonl"))
    return report


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
