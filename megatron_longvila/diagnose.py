"""Why a job ended, from what its ranks left in the run directory (`pulse.py`). Torch-free; for batch scripts and people.

    python -m megatron_longvila.diagnose RUN_DIR --since UNIX_TIME [--exit_status N] [--num_ranks N] [--log FILE]

The first lines name host, rank and cause. The exit code says what to do:

    0   the run stopped after a save because it was asked to (its marker is there)
    10  a rank was lost to a signal, or the launcher when its ranks had left, or ranks waited for each other beyond the limit: starting
        again from the last checkpoint makes sense
    20  an exception, a loss that is not finite, a full disk, a configuration error: starting again would end the same way.
        (A configuration error leaves no record: it is what an --exit_status below 128 without any heartbeat means; ranks that the launcher
        could not bring together leave none either, so the report names both. With --num_ranks, ranks that have none while others have.)
    30  the run directory says nothing about it, or the job still runs here
    2   wrong usage, such as a run directory that is not there
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_longvila.pulse import ENDED, MARKER, read_records
from megatron_longvila.watch import is_running

SAVED, RESTARTABLE, FINAL, UNKNOWN = 0, 10, 20, 30
LOG_TAIL_BYTES = 4 << 20
# What ranks say when a peer has gone or does not come. The one that says it is not the cause.
ECHOES = re.compile(
    r"Connection (closed|reset|refused)|closed by peer|Broken pipe|recvValue|sendBytes|read: errno|Gloo connectFullMesh|"
    r"store.*(wait|get).*fail|peers? (has|have) (gone|left)|[Ss]ocket ([Tt]ime-?out|has timed out)|connect\(\) timed out|"
    r"Timed out waiting \d+ ?ms|Timed out after \d+ seconds waiting for clients|[Ww]ait timeout after \d+ ?ms|Application timeout|"
    r"ncclRemoteError|ncclSystemError|remote process exited|unhandled system error|NCCL communicator (was|has been) aborted|"
    r"[Cc]ollective operation timeout|NCCL operations have failed or timed out|before timing out"
)
# A wrong call, or a full disk or /dev/shm, is the rank's own even where a library speaks of it in the same breath.
OWN_FAULTS = re.compile(r"[Ii]nvalid ?([Uu]sage|[Aa]rgument)|No space left on device|Disk quota exceeded")
ECHO_TYPES = {"RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistError", "TimeoutError", "CheckpointException"}
BROKEN_PIPES = {"ConnectionError", "ConnectionResetError", "ConnectionAbortedError", "ConnectionRefusedError", "BrokenPipeError"}
KILLED = re.compile(r"Signal (\d+) \(SIG\w+\) received by PID (\d+)")  # torchrun about a rank


@dataclass(frozen=True)
class Cause:
    """One thing that went wrong on one rank.

    Attributes:
        time_s: when it was recorded, Unix time.
        is_guess: seen from outside of a rank that was alive; what others say of themselves comes before it.
        restartable: whether a new start from the last checkpoint may get further.
        what: the cause in a line.
        details: last heartbeat, traceback or stack, line by line.
    """

    time_s: float
    rank: int
    is_guess: bool
    restartable: bool
    host: str
    what: str
    details: str


def diagnose(
    run_dir: Path, since_s: float, exit_status: int | None = None, log: Path | None = None, num_ranks: int | None = None
) -> tuple[int, str]:
    """(exit code, report) of the part of the run that began at `since_s` (Unix time).

    Args:
        exit_status: of the launcher, for the report.
        log: the launcher's output; torchrun names there the signal that ended a rank.
        num_ranks: of the job; what is known if all of them have begun.
    """
    marker = run_dir / MARKER
    if marker.exists() and marker.stat().st_mtime >= since_s:
        return SAVED, f"the run in {run_dir} was asked to stop, saved and left: {marker.read_text().strip()}"
    beats = read_records(run_dir, "beat", since_s)
    failures = read_records(run_dir, "failure", since_s)
    seen = read_records(run_dir, "seen", since_s)
    stalls = read_records(run_dir, "stall", since_s)
    signals = read_signals(log) if log is not None else {}
    own = {rank: record for rank, record in failures.items() if not is_echo(record)}
    causes = [describe_exception(rank, record) for rank, record in own.items()]
    aborted = [
        rank for rank, record in seen.items() if gave_up_waiting(record, stalls.get(rank), signals) or ended_by_launcher(record, signals)
    ]
    for rank, record in seen.items():
        slow = record["cause"] == "stuck" and rank in failures  # not stuck: it could still speak
        if rank not in own and not slow and rank not in aborted:
            causes.append(describe_seen(rank, record, signals))
    if not causes:
        causes = [describe_seen(rank, seen[rank], signals) for rank in aborted if rank not in failures]
    unborn = [rank for rank in range(num_ranks or 0) if rank not in beats]
    if not causes and beats and unborn and not signals:  # the others were ended because of it: their silence or echoes are no cause
        text = f"{run_dir}: {name_ranks(unborn)} never began, {name_ranks(beats)} did{describe_status(exit_status)}"
        return FINAL, f"{text}; a configuration error, or a program that does not start on their host: see their output in the job's log"
    running = [rank for rank, beat in beats.items() if exit_status is None and still_runs(beat)]
    if not causes and running:
        verb = "runs" if len(running) == 1 else "run"
        last = max(beats[rank]["step"] for rank in running)
        where = beats[running[0]]["host"]
        gone = [rank for rank, beat in beats.items() if beat["host"] == where and rank not in running and beat["phase"] != ENDED]
        left = f"; {name_ranks(gone)} {'is' if len(gone) == 1 else 'are'} gone" if gone else ""
        text = f"{run_dir}: {name_ranks(running)} still {verb} on {where}; the last heartbeat is of step {last}{left}"
        return UNKNOWN, "\n".join([text, *describe_waits(waits_of(stalls))])
    if not causes:
        silent = {rank: beat for rank, beat in beats.items() if rank not in failures and beat["phase"] != ENDED}
        spoke = {beats[rank]["host"] for rank in failures if rank in beats}
        alone = len({beat["host"] for beat in beats.values()}) == 1
        killed = bool(spoke) or (alone and exit_status is not None and exit_status > 128)  # the launcher too, and with it what watched
        causes = [describe_silent(rank, beat, signals, killed and beat["host"] not in spoke) for rank, beat in silent.items()]
    if not causes and failures:
        causes = [describe_exception(rank, record) for rank, record in failures.items()]
    if not causes:
        refused = not beats and exit_status is not None and 0 < exit_status < 128  # by no signal, and before anything began
        left = "every rank left as it should" if beats else "no rank got as far as its first heartbeat"
        cause = "; a configuration error, a program that does not start, or ranks that did not find each other" if refused else ""
        text = f"{run_dir} names no cause: {left}{describe_status(exit_status)}{cause}; see the job's log"
        late = bool(beats) and exit_status is not None and exit_status > 128  # the launcher was killed when its ranks had left
        return (FINAL if refused else RESTARTABLE if late else UNKNOWN), text
    causes.sort(key=lambda cause: (cause.is_guess, cause.time_s))
    code = RESTARTABLE if causes[0].restartable else FINAL
    return code, report(causes, failures.keys() | aborted, stalls)


def still_runs(beat: dict[str, Any]) -> bool:
    """Whether the process of a rank is there, as far as this host can tell: its number alone may be another process's by now."""
    if beat["host"] != socket.gethostname():
        return False
    try:
        return is_running(beat["pid"]) and psutil.Process(beat["pid"]).ppid() == beat["parent_pid"]
    except psutil.NoSuchProcess:  # it has just ended
        return False


def is_echo(failure: dict[str, Any]) -> bool:
    """Whether an exception only says that a peer has gone or does not come."""
    kind, message = failure["type"], failure["message"]
    if kind == "EOFError":  # of a pipe, not of a file that is cut short
        return "multiprocessing/connection.py" in failure["traceback"]
    return kind in BROKEN_PIPES or (kind in ECHO_TYPES and ECHOES.search(message) is not None and OWN_FAULTS.search(message) is None)


def gave_up_waiting(record: dict[str, Any], stall: dict[str, Any] | None, signals: dict[int, int]) -> bool:
    """Whether a lost rank was ended by NCCL's watchdog, which aborts a process that waits too long, without an exception."""
    number = record["cause"] == "lost" and (record["signal"] or signals.get(record["pid"]))
    return number == signal.SIGABRT and stall is not None and stall["waits_in"] is not None


def ended_by_launcher(record: dict[str, Any], signals: dict[int, int]) -> bool:
    """Whether a lost rank died of SIGTERM: torchrun sends it to the ranks that are left when one has failed."""
    return record["cause"] == "lost" and (record["signal"] or signals.get(record["pid"])) == signal.SIGTERM


def read_signals(log: Path) -> dict[int, int]:
    """The signal that ended a process, by pid, as torchrun wrote it at the end of its log."""
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    return {int(pid): int(number) for number, pid in KILLED.findall(text)}


def describe_exception(rank: int, failure: dict[str, Any]) -> Cause:
    """An exception with its traceback; one that only echoes a peer is restartable."""
    what = f"{failure['type']}: {failure['message']}"
    details = f"{describe_beat(failure['beat'])}\n{failure['traceback'].rstrip()}"
    return Cause(failure["time_s"], rank, False, is_echo(failure), failure["host"], what, details)


def describe_seen(rank: int, record: dict[str, Any], signals: dict[int, int]) -> Cause:
    """What the watcher of a host saw of a rank that could not speak."""
    details = [describe_beat(record["beat"])]
    restartable = True
    if record["cause"] == "lost":
        number = record["signal"] or signals.get(record["pid"])
        what = name_signal(number)
        if number is None and record["exit_code"]:
            what, restartable = f"ended with exit code {record['exit_code']} without an exception", False
    else:
        what = f"{record['cause']}, process state {record['state']}"
        details += [*describe_waits(record["waiting"]), record["stack"].rstrip()]
    what += f" (pid {record['pid']})"
    return Cause(record["time_s"], rank, record["cause"] == "stuck", restartable, record["host"], what, "\n".join(details))


def describe_silent(rank: int, beat: dict[str, Any], signals: dict[int, int], host_is_silent: bool) -> Cause:
    """A rank that stopped beating and of which nobody saw the end.

    A signal in the launcher's log, or a host of which no rank said anything while those of others lost touch (or, the only host, while its
    launcher ended by a signal), make it a loss. Else it may have ended in any way, also in one that a new start would repeat.
    """
    number = signals.get(beat["pid"])
    what = name_signal(number) if number else "went silent: nobody saw a signal, and it recorded no exception; see the job's log"
    if host_is_silent and not number:
        what = "went silent with its host: the host was lost, or everything on it was killed"
    return Cause(beat["time_s"], rank, False, bool(number) or host_is_silent, beat["host"], what, describe_beat(beat))


def describe_beat(beat: dict[str, Any]) -> str:
    """The last heartbeat in a line."""
    if not beat:
        return "  no heartbeat"
    samples = f", samples {', '.join(beat['sample_ids'])}" if beat["sample_ids"] else ""
    at = time.strftime("%H:%M:%S", time.localtime(beat["time_s"]))
    return f"  last heartbeat {at}: step {beat['step']}, phase {beat['phase']}{samples}"


def describe_waits(waiting: Sequence[dict[str, Any]]) -> list[str]:
    """Which ranks waited where, a line for each place."""
    places: dict[str, list[dict[str, Any]]] = {}
    for one in waiting:
        places.setdefault(one["waits_in"], []).append(one)
    return [
        f"  {name_ranks(one['rank'] for one in those)} waited in {place} for {max(one['waited_s'] for one in those):.0f} s"
        for place, those in places.items()
    ]


def waits_of(stalls: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The stall records of ranks that wait for others, with how long."""
    return [one | {"waited_s": one["time_s"] - one["since_s"]} for one in stalls.values() if one["waits_in"]]


def describe_status(status: int | None) -> str:
    """The launcher's exit status in words."""
    if status is None:
        return ""
    return f" (exit status {status}{', ' + name_signal(status - 128) if status > 128 else ''})"


def name_signal(number: int | None) -> str:
    """What a signal did."""
    if number is None:
        return "ended by a signal that nobody saw"
    known = number in {one.value for one in signal.Signals}
    return f"killed by signal {number}" + (f" ({signal.Signals(number).name})" if known else "")


def report(causes: Sequence[Cause], ended: Iterable[int], stalls: dict[int, dict[str, Any]]) -> str:
    """The first cause in full, the others by their first line, and where ranks waited if the first cause does not say so.

    Args:
        ended: ranks whose end is known; those that are no cause lost touch.
    """
    first, *others = causes
    lines = [f"host {first.host}, rank {first.rank}: {first.what}", first.details]
    groups: dict[tuple[str, str], list[int]] = {}
    for cause in others:
        groups.setdefault((cause.host, cause.what), []).append(cause.rank)
    lines += [f"also host {host}, {name_ranks(ranks)}: {what}" for (host, what), ranks in groups.items()]
    echoing = set(ended) - {cause.rank for cause in causes}
    if echoing:
        lines.append(f"{name_ranks(echoing)} lost touch and ended because of it")
    if " waited in " not in first.details:
        lines += describe_waits(waits_of(stalls))
    lines.append("starting again from the last checkpoint makes sense" if first.restartable else "starting again would end the same way")
    return "\n".join(lines)


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks with runs of neighbours shortened: ranks 0-2, 7."""
    pieces: list[list[int]] = []
    for rank in sorted(ranks):
        if pieces and pieces[-1][-1] == rank - 1:
            pieces[-1][1:] = [rank]
        else:
            pieces.append([rank])
    word = "rank" if len(pieces) == len(pieces[0]) == 1 else "ranks"
    return f"{word} {', '.join('-'.join(map(str, piece)) for piece in pieces)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_longvila.diagnose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--since", type=float, default=0.0, help="Unix time at which the launcher was started; older records are ignored")
    parser.add_argument("--exit_status", type=int, help="of the launcher")
    parser.add_argument("--num_ranks", type=int, help="of the job")
    parser.add_argument("--log", type=Path, help="output of the launcher")
    options = parser.parse_args(argv)
    if not options.run_dir.is_dir():
        what = "is not a folder" if options.run_dir.exists() else "does not exist"
        parser.error(f"RUN_DIR {options.run_dir} {what}; give the output_dir of the run")
    if options.log is not None and not options.log.is_file():
        parser.error(f"--log {options.log} is not a file; give what the launcher wrote, or leave it out")
    code, text = diagnose(options.run_dir, options.since, options.exit_status, options.log, options.num_ranks)
    sys.stdout.write(text + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
