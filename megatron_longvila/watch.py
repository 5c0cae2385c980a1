"""Looks at the ranks of one host from outside and names those that cannot speak: killed, stopped, stuck. Torch-free.

    python -m megatron_longvila.watch RUN_DIR --host NAME --agent PID --first_rank 0 --num_ranks 8 --timeout_s 600

The training program starts it on every host (its local rank 0 does), in a session of its own, and it ends with the ranks.

* A rank that ends without having recorded a failure is `lost`; the kernel tells by which signal.
* A rank that is stopped for a quarter of the time limit, or that does something else for half of it while others wait in a collective, is
  named with its process state, what the others wait in, and its stack (py-spy where installed), while all of them are still there. If it
  goes on after all, that is forgotten.
* A rank still stopped after nine tenths of the limit while others wait is killed, and so is a stuck one once a peer's collective has
  timed out: a launcher would wait half a minute for a process that cannot follow its SIGTERM. So the job is down within the limit.

Peers may be on other hosts: what they wait in is read from the run directory. Where all ranks at once wait for something else than each
other, such as data from a shared disk that hangs, nobody is late: that is not detected, and the job waits with its disk.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longvila.pulse import ENDED, read_records, record_path, write_record

logger = logging.getLogger(__name__)

STOPPED_AFTER, STUCK_AFTER, KILLED_AFTER, LOOKS = 1 / 4, 1 / 2, 9 / 10, 32  # shares of the time limit, and looks in one
LONGEST_TICK_S = 1.0
PY_SPY_LIMIT_S = 20.0
STOPPED = {"T", "t"}
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, 2 ** (8 * ctypes.sizeof(ctypes.c_ulong)) - 1  # linux/prctl.h


@dataclass
class Watched:
    """A rank of this host.

    Attributes:
        descriptor: readable once the process has ended; -1 where the kernel has none.
        stopped_s: since when it is stopped (monotonic), None if it runs.
        named: its record is written.
    """

    rank: int
    pid: int
    descriptor: int
    beat: dict[str, Any]
    stopped_s: float | None = None
    named: bool = False
    alive: bool = True


class Watch:
    """Watches the ranks `ranks` of one host, children of the launcher `agent`.

    Attributes:
        waits: of each rank with a stall on record, the record's time, and when it was seen to change (monotonic, None: not yet).
        failed_before: what `find_failed` found when the watch began: of an earlier job.
    """

    def __init__(self, run_dir: Path, host: str, agent: int, ranks: range, timeout_s: float):
        self.run_dir, self.host, self.agent, self.ranks, self.timeout_s = run_dir, host, agent, ranks, timeout_s
        self.watched: dict[int, Watched] = {}
        self.waits: dict[int, tuple[float, float | None]] = {}
        self.failed_before = self.find_failed()
        self.tick_s = min(LONGEST_TICK_S, timeout_s / (2 * LOOKS))

    def run(self) -> None:
        """Watch until every rank has ended, or the launcher has and no rank is left."""
        looked = resumed = time.monotonic()
        while True:
            self.find_ranks()
            before = time.monotonic()
            self.wait()
            now = time.monotonic()
            if now - before > self.tick_s + self.timeout_s / LOOKS:
                resumed = now  # this process was stopped too, and with it probably the whole job: what is old is no sign of anything
            alive = [one for one in self.watched.values() if one.alive]
            if not alive and (len(self.watched) == len(self.ranks) or not is_running(self.agent)):
                return
            for one in alive:
                one.stopped_s = (one.stopped_s or now) if process_state(one.pid)[:1] in STOPPED else None
            if now - looked > self.timeout_s / LOOKS and now - resumed > self.timeout_s * STOPPED_AFTER:
                looked = now
                self.look(alive)

    def find_ranks(self) -> None:
        """Begin to watch ranks that have beaten for the first time."""
        missing = [rank for rank in self.ranks if rank not in self.watched]
        if not missing:
            return
        beats = read_records(self.run_dir, "beat", ranks=missing)
        for rank in missing:
            beat = beats.get(rank)
            if beat is None or (beat["host"], beat["parent_pid"]) != (self.host, self.agent):
                continue  # not there yet; the file is of an earlier run
            self.watched[rank] = one = Watched(rank, beat["pid"], -1, beat)
            try:
                one.descriptor = os.pidfd_open(one.pid)
            except ProcessLookupError:
                self.bury(one, None)
            except OSError:  # a kernel before 5.3: it is looked for once a tick
                continue

    def wait(self) -> None:
        """Sleep for a tick, or until a rank ends."""
        poll = select.poll()
        alive = [one for one in self.watched.values() if one.alive]
        by_descriptor = {one.descriptor: one for one in alive if one.descriptor >= 0}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.POLLIN)
        ended = [by_descriptor[descriptor] for descriptor, _ in poll.poll(self.tick_s * 1000)]
        ended += [one for one in alive if one.descriptor < 0 and not is_running(one.pid)]
        for one in ended:
            self.bury(one, exit_status(one.pid))  # at once: after its parent has fetched it nobody knows

    def bury(self, one: Watched, status: int | None) -> None:
        """Record the end of a rank that has not spoken of it. `status` is the kernel's, None if its parent was faster."""
        one.alive = False
        if one.descriptor >= 0:
            os.close(one.descriptor)
        one.beat = read_records(self.run_dir, "beat", ranks=[one.rank]).get(one.rank, one.beat)
        if one.named or one.beat["phase"] == ENDED or record_path(self.run_dir, "failure", one.rank).exists():
            return
        number, code = (None, None) if status is None else (status & 0x7F or None, status >> 8)
        self.record(one, {"cause": "lost", "signal": number, "exit_code": code})
        logger.error("rank %d (pid %d) has ended: %s", one.rank, one.pid, f"signal {number}" if number else f"exit code {code}")

    def look(self, alive: list[Watched]) -> None:
        """Name, and in the end kill, the ranks of this host for which the others wait."""
        now, old = time.time(), self.timeout_s * STOPPED_AFTER
        beats = read_records(self.run_dir, "beat", ranks=[one.rank for one in alive])
        for one in alive:
            before, one.beat = one.beat, beats.get(one.rank, one.beat)
            if one.named and one.beat["time_s"] > before["time_s"]:
                one.named = False
                record_path(self.run_dir, "seen", one.rank).unlink(missing_ok=True)
                logger.error("rank %d (pid %d) goes on", one.rank, one.pid)
        late = [one for one in alive if now - one.beat["time_s"] > old and one.beat["phase"] != ENDED]
        if not late:
            self.waits.clear()
            return
        stalls = self.find_stalls(old)
        waiting = {rank: stall["time_s"] - stall["since_s"] for rank, stall in stalls.items() if stall["waits_in"]}
        waited_s = max(waiting.values(), default=0.0)
        for one in late:
            if one.rank in waiting:
                continue
            stopped_s = 0.0 if one.stopped_s is None else time.monotonic() - one.stopped_s
            if not one.named and (stopped_s > old or waited_s > self.timeout_s * STUCK_AFTER):
                others = [{"rank": rank, "waits_in": stalls[rank]["waits_in"], "waited_s": since_s} for rank, since_s in waiting.items()]
                self.name(one, others, stalls.get(one.rank))
            if one.named and ((waiting and stopped_s > self.timeout_s * KILLED_AFTER) or self.job_has_failed()):
                logger.error("rank %d (pid %d) is killed: its peers have waited for %.0f s", one.rank, one.pid, waited_s)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)

    def find_stalls(self, old_s: float) -> dict[int, dict[str, Any]]:
        """The stalls of all ranks that were written again within `old_s`, while this looked on: a stalled rank writes once a look.

        Hosts have clocks of their own: times of one record can be compared with each other, and no more.
        """
        stalls, now = read_records(self.run_dir, "stall"), time.monotonic()
        for rank, stall in stalls.items():
            written_s, _ = self.waits.get(rank, (None, None))
            if written_s != stall["time_s"]:
                self.waits[rank] = stall["time_s"], None if written_s is None else now
        changed = {rank: changed_s for rank, (_, changed_s) in self.waits.items() if changed_s is not None}
        return {rank: stall for rank, stall in stalls.items() if rank in changed and now - changed[rank] <= old_s}

    def find_failed(self) -> set[tuple[int, float]]:
        """(rank, time by its own clock) of every exception and lost rank on record."""
        failed = read_records(self.run_dir, "failure").items()
        lost = [(rank, seen) for rank, seen in read_records(self.run_dir, "seen").items() if seen["cause"] == "lost"]
        return {(rank, record["time_s"]) for rank, record in (*failed, *lost)}

    def job_has_failed(self) -> bool:
        """Whether a rank has recorded an exception, or was lost, since this watch began. (NCCL's time-out aborts: no exception tells.)"""
        return bool(self.find_failed() - self.failed_before)

    def name(self, one: Watched, waiting: list[dict[str, Any]], stall: dict[str, Any] | None) -> None:
        """Write down what can be seen of a rank for which the others wait."""
        state = process_state(one.pid)
        stack = stack_of(one.pid)
        if stall is not None:
            stack += f"\nits own account:\n{stall['stack']}"
        self.record(one, {"cause": "stopped" if state[:1] in STOPPED else "stuck", "state": state, "waiting": waiting, "stack": stack})
        one.named = True
        places = "; ".join(sorted({peer["waits_in"] for peer in waiting})) or "nothing yet"
        logger.error("rank %d (pid %d) does not go on: state %s; the others wait in %s\n%s", one.rank, one.pid, state, places, stack)

    def record(self, one: Watched, values: dict[str, Any]) -> None:
        stamp = {"rank": one.rank, "host": self.host, "pid": one.pid, "time_s": time.time(), "beat": one.beat}
        try:
            write_record(record_path(self.run_dir, "seen", one.rank), stamp | values)
        except OSError as error:
            logger.error("what was seen of rank %d cannot be recorded (%s): %s", one.rank, error, values)


def process_state(pid: int) -> str:
    """State of a process in the kernel's words ("T (stopped)") and, for one that sleeps, in what; empty if it has ended."""
    try:
        with open(f"/proc/{pid}/status") as stream:
            state = next(line.split(maxsplit=1)[1].strip() for line in stream if line.startswith("State:"))
    except (OSError, StopIteration):
        return ""
    where = ""
    with contextlib.suppress(OSError):  # some kernels do not say
        where = Path(f"/proc/{pid}/wchan").read_text().strip("0\n ")
    return f"{state} in {where}" if where else state


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    return process_state(pid)[:1] not in ("", "Z", "X")


def exit_status(pid: int) -> int | None:
    """Wait status of a process that has ended and that its parent has not fetched yet, None if it has."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[-1]) if fields[0] == "Z" else None


def stack_of(pid: int) -> str:
    """Python stack of another process by py-spy, or why there is none."""
    beside = Path(sys.executable).with_name("py-spy")
    program = shutil.which("py-spy") or (str(beside) if beside.exists() else None)
    if program is None:
        return "no stack: py-spy is not installed (pip install py-spy)"
    try:
        done = subprocess.run([program, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=PY_SPY_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no stack: py-spy gave none within {PY_SPY_LIMIT_S:.0f} s"
    return done.stdout if done.returncode == 0 else f"no stack: {done.stderr.strip()}"


def allow_debugger() -> bool:
    """Let any process of this user look into this one: where the kernel has Yama (ptrace_scope=1, the default of many systems) py-spy may
    otherwise attach to its own children only. Returns whether the kernel knows such a rule."""
    return ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(PR_SET_PTRACER_ANY), 0, 0, 0) == 0


def start(run_dir: Path, host: str, ranks: range, timeout_s: float) -> None:
    """Start the watch of this host, from its first rank, in a session of its own: what ends the ranks must not end it first."""
    words = [run_dir, "--host", host, "--agent", os.getppid(), "--first_rank", ranks.start, "--num_ranks", len(ranks)]
    line = [sys.executable, "-m", "megatron_longvila.watch", *map(str, words), "--timeout_s", str(timeout_s)]
    subprocess.Popen(line, stdin=subprocess.DEVNULL, start_new_session=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Watch until the ranks have ended."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_longvila.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--host", required=True, help="as the ranks call it in their heartbeats")
    parser.add_argument("--agent", type=int, required=True, help="process id of the launcher, the parent of the ranks")
    parser.add_argument("--first_rank", type=int, default=0)
    parser.add_argument("--num_ranks", type=int, default=1)
    parser.add_argument("--timeout_s", type=float, required=True, help="parallel.timeout_s of the run")
    options = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the ranks, whose end is what this waits for
    logging.basicConfig(format=f"%(asctime)s [watch {options.host}] %(message)s", datefmt="%H:%M:%S")
    ranks = range(options.first_rank, options.first_rank + options.num_ranks)
    Watch(options.run_dir, options.host, options.agent, ranks, options.timeout_s).run()


if __name__ == "__main__":
    main()
