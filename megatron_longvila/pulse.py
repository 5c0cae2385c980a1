"""What every rank leaves in the run directory, so that whoever asks afterwards why a job ended is told. Torch-free.

    RUN/heartbeats/rank_00003.json    the rank's last beat: step, phase, sample_ids, time_s, host, pid, parent_pid
    RUN/heartbeats/stall_00003.json   while it has not beaten for a while: the stacks of its threads and the collective it waits in
    RUN/failures/rank_00003.json      the exception that ended it: type, message, traceback, and its last beat
                                      (into room taken when the rank began: a full disk is what many failures are about)
    RUN/failures/seen_00003.json      written by `watch.py` about a rank that cannot speak any more: killed, stopped, stuck

A beat is one small file replaced in one step (median 0.1 ms in memory, 0.4 ms on a busy local disk; `doctor` says what the disk of a run
takes), by a thread of the rank and at most once a second: training does not wait for a shared disk, which is spared what short steps would
ask of it. The stacks come from the same thread, so they need no debugger and no rights; a rank that is stopped or stuck in native code
cannot run that thread, and `watch.py` looks at it from outside.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

HEARTBEATS, FAILURES = "heartbeats", "failures"
KINDS = ("beat", "stall", "failure", "seen")
MARKER = "interrupted"  # what a run leaves that stopped after a save
ENDED = "ended"  # the phase of a rank that left as it should
SAMPLES_PER_TIMEOUT = 32
BEAT_INTERVAL_S = 1.0
ROOM_BYTES = 64 << 10  # of a rank's failure record
DEVICE_WAITS = (
    ".tolist()",
    ".item()",
    ".cpu()",
    "synchronize(",
)  # for a GPU's queue, and so for a collective in it


def record_path(run_dir: Path, kind: str, rank: int) -> Path:
    """Where a record lies; `kind` is "beat", "stall", "failure" or "seen"."""
    folder = HEARTBEATS if kind in ("beat", "stall") else FAILURES
    prefix = kind if kind in ("stall", "seen") else "rank"
    return run_dir / folder / f"{prefix}_{rank:05d}.json"


def read_records(run_dir: Path, kind: str, since_s: float = 0.0, ranks: Iterable[int] | None = None) -> dict[int, dict[str, Any]]:
    """The records of one kind by rank, of all ranks or of these, written at or after `since_s` (Unix time).

    A record that cannot be read is left out.
    """
    found = {}
    pattern = record_path(run_dir, kind, 0)
    if ranks is None:
        paths = sorted(pattern.parent.glob(pattern.name.replace("00000", "*")))
    else:
        paths = [record_path(run_dir, kind, rank) for rank in ranks]
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if record["time_s"] >= since_s:
            found[int(path.stem.split("_")[1])] = record
    return found


def forget_earlier(run_dir: Path, num_ranks: int) -> None:
    """Remove what an earlier job left in its run directory and none of this one's `num_ranks` ranks would replace, so that nobody takes it
    for a word about this job: the mark of a saved stop, and records of ranks that there are no more. For rank 0 when it starts."""
    (run_dir / MARKER).unlink(missing_ok=True)
    for kind in KINDS:
        for rank in read_records(run_dir, kind):
            if rank >= num_ranks:
                record_path(run_dir, kind, rank).unlink(missing_ok=True)


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Replace a record in one step; a reader sees the old or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values))
    os.replace(temporary, path)


def write_into_room(room: Path, path: Path, values: dict[str, Any]) -> None:
    """Like `write_record`, into the blocks of the file `room`, which becomes the record. Of a long traceback the end is kept."""
    while len(json.dumps(values)) > ROOM_BYTES and values["traceback"]:
        values = values | {"traceback": values["traceback"][len(values["traceback"]) // 2 + 1 :]}
    with open(room, "r+b") as stream:
        stream.write(json.dumps(values).encode())
        os.fsync(stream.fileno())
        stream.truncate()
    os.replace(room, path)


@dataclass
class Stall:
    """What the thread of a rank remembers between two looks.

    Attributes:
        beat: the last one it saw.
        place: where the rank waits and how many collectives it had begun; None while it goes on.
        since_s: since when it is there, Unix time.
    """

    beat: dict[str, Any]
    place: tuple[str | None, int] | None = None
    since_s: float = 0.0


class Pulse:
    """The records of one rank. `beat` belongs to the main thread.

    Attributes:
        last: the last beat.
        progress: returns a number that grows with every collective this rank begins; two waits in the same place with different numbers
            are two waits. `platform.collectives_begun` once the job is joined.
    """

    def __init__(self, run_dir: Path, rank: int, host: str | None = None, *, timeout_s: float | None = None):
        """Make the folders and forget what this rank left in an earlier run.

        Args:
            host: what the job calls this host; its own name if not given.
            timeout_s: the limit of a collective; a rank without a beat for a small part of it writes its stacks. None: it never does, and
                there is no thread: a beat is written when it is made.

        Raises OSError if the run directory cannot be written.
        """
        self.run_dir, self.rank, self.host = run_dir, rank, host or socket.gethostname()
        self.progress: Callable[[], int] = int
        self.last: dict[str, Any] = {}
        self._warned = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._writing = threading.Lock()
        self._written: dict[str, Any] = {}
        for kind in KINDS:
            path = record_path(run_dir, kind, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        self._room = record_path(run_dir, "failure", rank).with_name(f".room_{rank:05d}")
        self._room.write_bytes(b" " * ROOM_BYTES)
        self.beat(0, "start")
        if timeout_s is not None:
            self._thread = threading.Thread(target=self._work, args=(timeout_s / SAMPLES_PER_TIMEOUT,), name="pulse", daemon=True)
            self._thread.start()

    def beat(self, step: int, phase: str, sample_ids: Sequence[str] = ()) -> None:
        """Say that `phase` of `step` has begun on these samples: start, step, save, evaluate, ended.

        A beat that cannot be written is a warning, once: training does not end for it.
        """
        self.last = self._stamp() | {"step": step, "phase": phase, "sample_ids": list(sample_ids), "parent_pid": os.getppid()}
        if self._thread is None or self._ended.is_set():
            self._write_beat()

    def _write_beat(self) -> None:
        with self._writing:
            if self.last is self._written:
                return
            self._written = last = self.last
            try:
                write_record(record_path(self.run_dir, "beat", self.rank), last)
            except OSError as error:
                self.warn(f"the heartbeat of rank {self.rank} cannot be written: {error}")

    def warn(self, text: str) -> None:
        """Log the first of the warnings about a disk that does not take a heartbeat."""
        if not self._warned:
            logger.warning(text)
        self._warned = True

    def end(self) -> None:
        """The rank leaves as it should."""
        self._ended.set()
        self.beat(self.last["step"], ENDED)
        self._room.unlink(missing_ok=True)

    def fail(self, error: BaseException) -> None:
        """Record what ends this rank, on a full disk too. Where the disk is gone altogether the record is in the log alone."""
        self._ended.set()
        self._write_beat()
        values = self._stamp() | {"type": type(error).__name__, "message": str(error), "beat": self.last}
        values["traceback"] = "".join(traceback.format_exception(error))
        try:
            write_into_room(self._room, record_path(self.run_dir, "failure", self.rank), values)
        except OSError as gone:
            logger.error("the failure of rank %d cannot be recorded: %s\n%s", self.rank, gone, values["traceback"])

    def _stamp(self) -> dict[str, Any]:
        return {"rank": self.rank, "host": self.host, "pid": os.getpid(), "time_s": time.time()}

    def _work(self, interval_s: float) -> None:
        """Body of the thread: write beats; between two looks, `interval_s` apart, without a beat in between the rank has stalled."""
        stall, looked_s = Stall(self.last), time.monotonic()
        while not self._ended.wait(min(BEAT_INTERVAL_S, interval_s)):
            self._write_beat()
            if time.monotonic() - looked_s < interval_s:
                continue
            looked_s = time.monotonic()
            try:
                self._look(stall)
            except Exception:  # it looks into a process at work: one failed look must not be the last
                logger.warning("rank %d could not look at itself", self.rank, exc_info=True)

    def _look(self, stall: Stall) -> None:
        """Write the stacks if there was no beat since the last look, forget them if there was one."""
        path = record_path(self.run_dir, "stall", self.rank)
        if self.last is not stall.beat:
            if stall.place is not None:
                path.unlink(missing_ok=True)
            stall.beat, stall.place = self.last, None
            return
        stacks = thread_stacks()
        waits_in = next(filter(None, map(describe_wait, stacks.values())), None)
        place = (waits_in, self.progress())
        if stall.place != place:
            stall.place, stall.since_s = place, time.time()
        text = "\n".join(f"{name}:\n{''.join(stack.format())}" for name, stack in stacks.items())
        record = self._stamp() | {"waits_in": waits_in, "since_s": stall.since_s, "stack": text, "beat": stall.beat}
        try:
            write_record(path, record)
        except OSError as error:
            logger.warning("the stacks of rank %d cannot be written (%s):\n%s", self.rank, error, text)


def thread_stacks() -> dict[str, traceback.StackSummary]:
    """Stacks of all threads of this process but the calling one, by name, the main thread first."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
    names = {thread.ident: thread.name for thread in threads}
    order = [ident for ident in names if ident in frames] + [ident for ident in frames if ident not in names]
    order.remove(threading.get_ident())
    return {names.get(ident, f"thread {ident}"): traceback.extract_stack(frames[ident]) for ident in order}


def describe_wait(stack: Sequence[traceback.FrameSummary]) -> str | None:
    """The collective a stack (outermost frame first) waits in and who called it; None if it waits in none."""
    inner = list(stack)
    calls = []
    while inner and any(part in inner[-1].filename for part in ("/torch/", "/megatron_longvila/platform/")):
        frame = inner.pop()
        if "/torch/distributed/" in frame.filename and frame.name != "wrapper":
            calls.append(frame.name)
    if not inner:
        return None
    caller, in_torch = inner[-1], len(inner) < len(stack)
    name = calls[-1] if calls else None
    if name is None and not in_torch and "/megatron" in caller.filename:  # not a thread that waits for another one
        line = caller.line or ""
        name = "wait" if ".wait(" in line else "wait for the device" if any(call in line for call in DEVICE_WAITS) else None
    if name is None:
        return None
    path = Path(caller.filename)
    return f"{name} at {'/'.join(path.parts[-3:])}:{caller.lineno} in {caller.name}"
