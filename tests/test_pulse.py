"""Heartbeats, stacks of a rank that has stalled, and the watch over real processes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import signal
import subprocess
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from small_disk import small_disk

from megatron_longvila import train
from megatron_longvila.config import Config
from megatron_longvila.diagnose import FINAL, diagnose
from megatron_longvila.pulse import (
    BEAT_INTERVAL_S,
    ROOM_BYTES,
    Pulse,
    describe_wait,
    read_records,
    record_path,
    thread_stacks,
    write_record,
)
from megatron_longvila.watch import Watch, allow_debugger, exit_status, is_running, process_state


def wait_for(condition, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_beats_and_failures(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, 3, "node7")
    first = read_records(tmp_path, "beat")[3]
    assert (first["step"], first["phase"], first["host"], first["pid"]) == (0, "start", "node7", os.getpid())
    pulse.beat(5, "step", ["a", "b"])
    try:
        raise KeyError("x")
    except KeyError as error:
        pulse.fail(error)
    record = read_records(tmp_path, "failure")[3]
    assert (record["type"], record["message"], record["beat"]["sample_ids"], record["beat"]["step"]) == ("KeyError", "'x'", ["a", "b"], 5)
    assert 'raise KeyError("x")' in record["traceback"] and read_records(tmp_path, "failure", time.time() + 1) == {}
    Pulse(tmp_path, 3).end()  # the next run of this rank
    assert read_records(tmp_path, "failure") == {} and read_records(tmp_path, "beat")[3]["phase"] == "ended"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rank_00003.json"]


def test_a_failure_on_a_full_disk_is_recorded(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        pulse = Pulse(disk, 0)
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as stream:
            while stream.write(b"x" * 4096):
                pass
        with pytest.raises(OSError, match="No space left"):
            write_record(disk / "other.json", {"a": "b" * 100})
        pulse.fail(OSError(errno.ENOSPC, "the checkpoint needs " + "\u00e9" * 2000))
        record = read_records(disk, "failure")[0]
        assert record["type"] == "OSError" and record["message"].endswith("\u00e9") and "the checkpoint needs" in record["traceback"]


def test_of_a_long_traceback_the_end_is_kept(tmp_path: Path) -> None:
    error = KeyError("x")
    error.add_note("\n\u00e9" * ROOM_BYTES + "the end")
    Pulse(tmp_path, 0).fail(error)
    path = record_path(tmp_path, "failure", 0)
    assert path.stat().st_size <= ROOM_BYTES and read_records(tmp_path, "failure")[0]["traceback"].endswith("the end\n")


def test_beats_of_short_steps_are_written_by_the_thread_at_most_once_a_second(tmp_path: Path, monkeypatch) -> None:
    writers = []

    def write(path: Path, values: dict) -> None:
        writers.append((threading.current_thread().name, values["step"], time.monotonic()))
        write_record(path, values)

    pulse = Pulse(tmp_path, 0, timeout_s=1000.0)
    monkeypatch.setattr("megatron_longvila.pulse.write_record", write)
    step, began = 0, time.monotonic()
    while time.monotonic() - began < 2.5:
        step += 1
        pulse.beat(step, "step")
        time.sleep(0.001)
    assert {name for name, _, _ in writers} == {"pulse"} and all(
        later - before > 0.9 * BEAT_INTERVAL_S for (_, _, before), (_, _, later) in itertools.pairwise(writers)
    )
    pulse.end()  # at once: nobody writes for it any more
    assert writers[-1][0] == "MainThread" and (read_records(tmp_path, "beat")[0]["phase"], writers[-1][1]) == ("ended", step)


def test_a_beat_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog) -> None:
    pulse = Pulse(tmp_path, 0)
    folder = record_path(tmp_path, "beat", 0).parent
    record_path(tmp_path, "beat", 0).unlink()
    folder.rmdir()
    with caplog.at_level(logging.WARNING, "megatron_longvila"):
        pulse.beat(1, "step")
        pulse.beat(2, "step")
    assert len(caplog.messages) == 1 and "the heartbeat of rank 0 cannot be written" in caplog.messages[0]
    assert pulse.last["step"] == 2


def test_a_stall_is_written_and_forgotten(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, 0, timeout_s=0.4)
    wait_for(lambda: read_records(tmp_path, "stall"))
    first = read_records(tmp_path, "stall")[0]
    assert first["waits_in"] is None and "test_a_stall_is_written_and_forgotten" in first["stack"] and first["beat"]["phase"] == "start"
    wait_for(lambda: read_records(tmp_path, "stall")[0]["time_s"] > first["time_s"])
    assert read_records(tmp_path, "stall")[0]["since_s"] == first["since_s"]  # the same wait
    pulse.progress = lambda: 7
    wait_for(lambda: read_records(tmp_path, "stall")[0]["since_s"] > first["since_s"])  # another one in the same place
    pulse.beat(1, "step")
    wait_for(lambda: not read_records(tmp_path, "stall"))
    pulse.end()


def test_a_look_that_fails_is_not_the_last(tmp_path: Path, caplog) -> None:
    pulse = Pulse(tmp_path, 0)
    answers = iter([RuntimeError("dictionary changed size during iteration")])

    def progress() -> int:
        for error in answers:
            raise error
        return 7

    pulse.progress = progress
    thread = threading.Thread(target=pulse._work, args=(0.02,))
    with caplog.at_level(logging.WARNING, "megatron_longvila"):
        thread.start()
        wait_for(lambda: read_records(tmp_path, "stall"))
    assert "could not look at itself" in caplog.messages[0] and "changed size" in caplog.text
    pulse.end()
    thread.join()


def frames(*places: tuple[str, str, str]) -> traceback.StackSummary:
    return traceback.StackSummary.from_list([(file, 10 + number, name, line) for number, (file, name, line) in enumerate(places)])


LOOP = ("/x/megatron_longvila/training/loop.py", "reduce_totals", "dist.all_reduce(totals)")
SHIM = ("/x/megatron_longvila/platform/cpu.py", "__torch_function__", "")
TORCH = "/venv/torch/distributed/distributed_c10d.py"


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        (frames(LOOP, ("/venv/torch/distributed/c10d_logger.py", "wrapper", "f()"), (TORCH, "all_reduce", "work.wait()")), "all_reduce"),
        (frames(LOOP, (TORCH, "all_gather_object", ""), (TORCH, "all_gather", "")), "all_gather_object"),
        (
            frames(LOOP, (TORCH, "send", ""), SHIM, (TORCH, "send", "")),
            "send",
        ),
        (frames(("/x/megatron/core/ring.py", "f", "handle.wait()")), "wait"),
        (frames(("/x/megatron_longvila/training/loop.py", "reduce_totals", "return totals.tolist()")), "wait"),
        (frames(LOOP), None),
        (frames(LOOP, ("/venv/torch/nn/modules/module.py", "forward", "x")), None),
        (frames(("/lib/threading.py", "wait", "waiter.acquire()")), None),
        (frames(("/x/other.py", "f", "event.wait()")), None),
    ],
)
def test_what_a_stack_waits_in(stack, said) -> None:
    found = describe_wait(stack)
    assert (found and found.split()[0]) == said
    if said == "all_reduce":
        assert found == "all_reduce at megatron_longvila/training/loop.py:10 in reduce_totals"


def test_stacks_of_all_threads_the_main_one_first() -> None:
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="waiting")
    thread.start()
    asked: dict = {}
    asking = threading.Thread(target=lambda: asked.update(thread_stacks()), name="asking")
    asking.start()
    asking.join()
    event.set()
    thread.join()
    assert next(iter(asked)) == "MainThread" and "waiting" in asked and "asking" not in asked


def test_a_process_from_outside() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        wait_for(lambda: process_state(process.pid).startswith("S (sleeping)"))
        assert is_running(process.pid) and exit_status(process.pid) is None
        os.kill(process.pid, signal.SIGSTOP)
        wait_for(lambda: process_state(process.pid).startswith("T (stopped)"))
    finally:
        process.kill()
    wait_for(lambda: not is_running(process.pid))
    assert exit_status(process.pid) == signal.SIGKILL  # before its parent has fetched it
    process.wait()
    assert exit_status(process.pid) is None and process_state(process.pid) == "" and not is_running(process.pid)


def test_another_process_may_look_into_one_that_allows_it() -> None:
    """Without root this needs the permission where the kernel has Yama's rule; elsewhere there is nothing to permit."""
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    assert allow_debugger() == yama.exists()


def test_a_rank_allows_a_debugger_before_it_is_watched(tmp_path: Path, monkeypatch) -> None:
    said = []
    monkeypatch.setattr(train.watch, "allow_debugger", lambda: said.append("allowed"))
    monkeypatch.setattr(train.watch, "start", lambda *args: said.append("watched"))
    monkeypatch.setattr(train, "open_log_file", lambda *args: None)
    train.take_pulse(replace(Config(), output_dir=str(tmp_path)), 1).end()
    assert said == ["allowed", "watched"]


def test_a_job_is_not_taken_for_the_one_before(tmp_path: Path, monkeypatch) -> None:
    """A job that stopped after a save, then one of four ranks that failed, then one of two that fails before its first step."""
    for rank, message in enumerate(("of rank 0", "of rank 1", "of rank 2", "of rank 3")):
        Pulse(tmp_path, rank).fail(KeyError(message))
    (tmp_path / "interrupted").write_text("{}")
    monkeypatch.setattr(train.watch, "start", lambda *args: None)
    monkeypatch.setattr(train, "open_log_file", lambda *args: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        train.take_pulse(replace(Config(), output_dir=str(tmp_path)), 2).fail(ValueError("another layout"))
    code, text = diagnose(tmp_path, since_s=0.0)
    assert code == FINAL and ": ValueError: another layout\n" in text and "KeyError" not in text


def write_beat(run_dir: Path, rank: int, pid: int, host: str = "here", **values) -> None:
    stamp = {"rank": rank, "host": host, "pid": pid, "time_s": time.time(), "parent_pid": os.getpid()}
    path = record_path(run_dir, "beat", rank)
    path.parent.mkdir(exist_ok=True)
    write_record(path, stamp | {"step": 4, "phase": "step", "sample_ids": ["clip"]} | values)


def write_wait(run_dir: Path, rank: int, since_s: float, time_s: float | None = None) -> None:
    stall = {"rank": rank, "time_s": time_s or time.time(), "since_s": since_s, "waits_in": "all_reduce at a.py:1 in f", "stack": ""}
    write_record(record_path(run_dir, "stall", rank), stall)


@pytest.fixture
def job(tmp_path: Path):
    """Two processes as ranks 0 and 1 of this host and a watch over them in a thread; rank 2 is on another host."""
    (tmp_path / "failures").mkdir()
    processes = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
    for rank, process in enumerate(processes):
        write_beat(tmp_path, rank, process.pid)
    write_beat(tmp_path, 2, 1, "there")
    thread = threading.Thread(target=Watch(tmp_path, "here", os.getpid(), range(2), timeout_s=2.0).run)
    thread.start()
    yield tmp_path, processes
    for process in processes:
        process.kill()
    thread.join(timeout=20)  # nobody has fetched the ended ranks yet: a watch that waited for that would never end
    for process in processes:
        process.wait()
    assert not thread.is_alive(), "the watch outlived its ranks"


def test_the_watch_names_a_stopped_rank_and_then_ends_it(job) -> None:
    run_dir, (waiting, stopped) = job
    since_s = time.time()
    os.kill(stopped.pid, signal.SIGSTOP)
    named_s = None
    while is_running(stopped.pid):
        assert time.time() - since_s < 60
        write_wait(run_dir, 0, since_s)  # as rank 0 would; so would rank 2 on the other host
        write_wait(run_dir, 2, since_s)
        if named_s is None and 1 in read_records(run_dir, "seen"):
            named_s = time.time()
            assert is_running(stopped.pid), "it is named while it can still be looked at"
        time.sleep(0.05)
    record = json.loads(record_path(run_dir, "seen", 1).read_text())
    assert named_s is not None and record["cause"] == "stopped" and record["state"].startswith("T (stopped)")
    assert {one["rank"] for one in record["waiting"]} == {0, 2} and record["beat"]["sample_ids"] == ["clip"]
    assert exit_status(stopped.pid) == signal.SIGKILL and is_running(waiting.pid)


@pytest.mark.parametrize(("kind", "values"), [("failure", {}), ("seen", {"cause": "lost", "signal": 6, "exit_code": 0})])
def test_the_watch_names_a_stuck_rank_takes_it_back_and_ends_it_when_the_job_falls(kind: str, values: dict, job) -> None:
    run_dir, (_, stuck) = job
    since_s = time.time()

    def named() -> bool:
        write_wait(run_dir, 2, since_s)
        write_wait(run_dir, 0, since_s)
        return 1 in read_records(run_dir, "seen")

    wait_for(named)
    assert read_records(run_dir, "seen")[1]["cause"] == "stuck" and time.time() - since_s > 1
    write_beat(run_dir, 1, stuck.pid)
    wait_for(lambda: not read_records(run_dir, "seen"))  # it went on
    wait_for(named)
    assert is_running(stuck.pid)
    write_record(record_path(run_dir, kind, 2), {"rank": 2, "time_s": time.time()} | values)  # a peer's collective has timed out
    wait_for(lambda: named() and not is_running(stuck.pid))
    assert exit_status(stuck.pid) == signal.SIGKILL


@pytest.fixture
def late(tmp_path: Path, monkeypatch):
    """A watch over one process, rank 0, that has not beaten for 50 s of a limit of 60."""
    monkeypatch.setattr("megatron_longvila.watch.stack_of", lambda pid: "")
    (tmp_path / "failures").mkdir()
    process = subprocess.Popen(["sleep", "100"])
    write_beat(tmp_path, 0, process.pid, time_s=time.time() - 50)

    def watch() -> Watch:
        found = Watch(tmp_path, "here", os.getpid(), range(1), timeout_s=60.0)
        found.find_ranks()
        return found

    yield watch, process
    process.kill()
    process.wait()


@pytest.mark.parametrize("ahead_s", [-3600.0, -12.0, 3600.0])
def test_the_watch_does_not_compare_the_clocks_of_hosts(ahead_s: float, late, tmp_path: Path) -> None:
    """A peer whose host has another time waits for 35 s, then times out."""
    there_s = time.time() + ahead_s
    write_record(record_path(tmp_path, "failure", 2), {"time_s": there_s - 1000})  # of an earlier job
    watch = late[0]()
    for waited_s in (1, 3, 25, 27, 33, 35):
        assert (0 in read_records(tmp_path, "seen")) == (waited_s > 33), waited_s
        write_wait(tmp_path, 1, there_s, time_s=there_s + waited_s)
        watch.look(list(watch.watched.values()))
    record = read_records(tmp_path, "seen")[0]
    assert record["cause"] == "stuck" and [round(one["waited_s"]) for one in record["waiting"]] == [33]
    assert is_running(late[1].pid)
    write_record(record_path(tmp_path, "failure", 1), {"time_s": there_s + 36})
    watch.look(list(watch.watched.values()))
    wait_for(lambda: not is_running(late[1].pid))


def test_the_watch_does_not_take_the_last_word_of_a_rank_for_its_state(late, tmp_path: Path) -> None:
    """A wait that nobody writes down again is none."""
    write_wait(tmp_path, 1, time.time() - 40)
    watch = late[0]()
    for _ in range(3):
        watch.look(list(watch.watched.values()))
    assert not read_records(tmp_path, "seen")


def test_the_watch_leaves_ranks_alone_that_nobody_waits_for(job) -> None:
    """Long steps, long evaluations: late beats alone mean nothing."""
    run_dir, processes = job
    time.sleep(3)
    assert all(is_running(process.pid) for process in processes) and read_records(run_dir, "seen") == {}


def test_the_watch_records_a_signal_but_no_end_that_was_spoken_of(job) -> None:
    run_dir, (leaving, killed) = job
    write_beat(run_dir, 0, leaving.pid, phase="ended")
    time.sleep(0.5)  # until it knows both
    leaving.terminate()
    os.kill(killed.pid, signal.SIGUSR2)
    wait_for(lambda: 1 in read_records(run_dir, "seen"))
    record = read_records(run_dir, "seen")
    assert list(record) == [1] and (record[1]["cause"], record[1]["signal"], record[1]["exit_code"]) == ("lost", signal.SIGUSR2, 0)


@pytest.mark.parametrize("old_kernel", [False, True])
def test_the_watch_records_an_exit_code(old_kernel: bool, tmp_path: Path, monkeypatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "there is no such system call")

    if old_kernel:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    (tmp_path / "failures").mkdir()
    process = subprocess.Popen(["sh", "-c", "sleep 1; exit 3"])
    write_beat(tmp_path, 0, process.pid)
    Watch(tmp_path, "here", os.getpid(), range(1), timeout_s=60.0).run()  # until its only rank has ended
    process.wait()
    record = read_records(tmp_path, "seen")[0]
    assert (record["cause"], record["signal"], record["exit_code"]) == ("lost", None, 3)
