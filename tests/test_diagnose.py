"""The diagnosis of a job from records as ranks and watchers write them: which cause comes first, and whether to start again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longvila.diagnose import FINAL, RESTARTABLE, SAVED, UNKNOWN, diagnose, is_echo, main, name_ranks
from megatron_longvila.pulse import record_path, write_record

START_S = 1000.0
ECHO = ("RuntimeError", "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:31384: Connection reset by peer.")


def beat(rank: int, phase: str = "step") -> dict:
    return {
        "rank": rank, "host": f"node{rank // 2}", "pid": 100 + rank, "time_s": START_S + 5, "step": 7, "phase": phase,
        "sample_ids": [f"clip-{rank}"], "parent_pid": 99,
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path):
    """Write a record of a rank into the run directory."""

    def write(kind: str, rank: int, after_s: float = 10.0, phase: str = "step", **values) -> None:
        path = record_path(tmp_path, kind, rank)
        path.parent.mkdir(exist_ok=True)
        stamp = {"rank": rank, "host": f"node{rank // 2}", "pid": 100 + rank, "time_s": START_S + after_s, "beat": beat(rank)}
        write_record(path, beat(rank, phase) if kind == "beat" else stamp | values)

    for rank in range(4):
        write("beat", rank)
    return write


def failure(write, rank: int, kind: str, message: str, after_s: float = 10.0) -> None:
    write("failure", rank, after_s, type=kind, message=message, traceback=f"Traceback of rank {rank}\n{kind}: {message}\n")


def test_a_saved_stop_comes_before_everything(write, tmp_path):
    failure(write, 0, *ECHO)
    (tmp_path / "interrupted").write_text('{"step": 7}')
    assert diagnose(tmp_path, START_S)[0] == SAVED
    assert diagnose(tmp_path, (tmp_path / "interrupted").stat().st_mtime + 1)[0] != SAVED  # of an earlier part of the run


def test_the_first_own_exception_is_the_cause(write, tmp_path):
    failure(write, 0, *ECHO, after_s=9)
    failure(write, 3, "KeyError", "'x'", after_s=11)
    failure(write, 1, "KeyError", "'y'", after_s=10)
    write("seen", 2, 12, cause="lost", signal=15, exit_code=0)
    code, text = diagnose(tmp_path, START_S)
    lines = text.splitlines()
    assert code == FINAL and lines[0] == "host node0, rank 1: KeyError: 'y'"
    assert "step 7, phase step, samples clip-1" in lines[1] and lines[2] == "Traceback of rank 1"
    assert "also host node1, rank 3: KeyError: 'x'" in lines and "ranks 0, 2 lost touch and ended because of it" in lines


def test_a_rank_lost_to_a_signal_is_the_cause_of_what_follows(write, tmp_path):
    write("seen", 2, 8, cause="lost", signal=9, exit_code=0)
    for rank in (0, 1, 3):
        failure(write, rank, *ECHO)
    code, text = diagnose(tmp_path, START_S)
    assert code == RESTARTABLE and text.startswith("host node1, rank 2: killed by signal 9 (SIGKILL) (pid 102)\n")
    assert "ranks 0-1, 3 lost touch" in text
    failure(write, 1, "ValueError", "raised because a peer was gone", after_s=9)  # later than the loss
    assert diagnose(tmp_path, START_S)[0] == RESTARTABLE


def test_the_launcher_knows_the_signal_that_the_watch_missed(write, tmp_path):
    write("seen", 2, 8, cause="lost", signal=None, exit_code=None)
    assert "ended by a signal that nobody saw" in diagnose(tmp_path, START_S)[1]
    (tmp_path / "log").write_text("x" * 100 + "\n  traceback : Signal 11 (SIGSEGV) received by PID 102\n")
    assert "killed by signal 11 (SIGSEGV)" in diagnose(tmp_path, START_S, log=tmp_path / "log")[1]


def test_a_stuck_rank(write, tmp_path):
    waiting = [{"rank": rank, "waits_in": "all_reduce at training/loop.py:9 in reduce", "waited_s": 60.0} for rank in (0, 1, 3)]
    write("seen", 2, 8, cause="stopped", state="T (stopped)", waiting=waiting, stack="fit (loop.py:1)")
    failure(write, 0, *ECHO)
    code, text = diagnose(tmp_path, START_S)
    assert code == RESTARTABLE and text.startswith("host node1, rank 2: stopped, process state T (stopped) (pid 102)")
    assert "  ranks 0-1, 3 waited in all_reduce at training/loop.py:9 in reduce for 60 s\nfit (loop.py:1)" in text


def test_a_rank_that_nccl_aborts_while_it_waits_is_not_the_cause(write, tmp_path):
    write("seen", 2, 8, cause="stuck", state="S (sleeping)", waiting=[], stack="sleeps (a.py:1)")
    for rank, signal in ((0, 6), (1, None), (3, 6)):
        write("seen", rank, 11 + rank, cause="lost", signal=signal, exit_code=0)
        write("stall", rank, 9, waits_in="all_reduce at a.py:1 in f", since_s=START_S + 1, stack="")
    (tmp_path / "log").write_text("Signal 6 (SIGABRT) received by PID 101")
    code, text = diagnose(tmp_path, START_S, log=tmp_path / "log")
    assert code == RESTARTABLE and text.startswith("host node1, rank 2: stuck, process state S (sleeping)")
    assert (
        "ranks 0-1, 3 lost touch and ended because of it" in text and "  ranks 0-1, 3 waited in all_reduce at a.py:1 in f for 8 s" in text
    )
    record_path(tmp_path, "seen", 2).unlink()  # nobody was late: they waited for each other
    code, text = diagnose(tmp_path, START_S, log=tmp_path / "log")
    assert code == RESTARTABLE and text.startswith("host node0, rank 0: killed by signal 6 (SIGABRT)")
    write("stall", 3, 9, waits_in=None, since_s=START_S + 1, stack="")  # it aborted in its own work
    assert diagnose(tmp_path, START_S, log=tmp_path / "log")[1].startswith("host node1, rank 3: killed by signal 6 (SIGABRT)")


def test_ranks_that_torchrun_ends_are_not_the_cause(write, tmp_path):
    """They may get its SIGTERM before they notice that a peer has gone."""
    write("seen", 0, 9, cause="lost", signal=None, exit_code=0)
    write("seen", 1, 11, cause="lost", signal=9, exit_code=0)
    (tmp_path / "log").write_text("Signal 15 (SIGTERM) received by PID 100")
    code, text = diagnose(tmp_path, START_S, log=tmp_path / "log")
    assert code == RESTARTABLE and text.startswith("host node0, rank 1: killed by signal 9 (SIGKILL)")
    assert "rank 0 lost touch and ended because of it" in text and "SIGTERM" not in text
    record_path(tmp_path, "seen", 1).unlink()  # nothing else is known
    assert diagnose(tmp_path, START_S, log=tmp_path / "log")[1].startswith("host node0, rank 0: killed by signal 15 (SIGTERM)")


def test_an_exception_comes_before_what_was_only_guessed(write, tmp_path):
    write("seen", 2, 8, cause="stuck", state="S (sleeping)", waiting=[], stack="")
    failure(write, 0, *ECHO)
    assert diagnose(tmp_path, START_S)[0] == RESTARTABLE
    failure(write, 1, "KeyError", "'x'", after_s=20)
    code, text = diagnose(tmp_path, START_S)
    assert code == FINAL and text.startswith("host node0, rank 1: KeyError") and "also host node1, rank 2: stuck" in text


def test_a_rank_that_could_still_speak_was_not_stuck(write, tmp_path):
    write("seen", 0, 7, cause="stuck", state="R (running)", waiting=[], stack="")
    write("seen", 1, 8, cause="lost", signal=9, exit_code=0)
    failure(write, 0, *ECHO)
    code, text = diagnose(tmp_path, START_S)
    assert code == RESTARTABLE and text.startswith("host node0, rank 1: killed by signal 9") and "stuck" not in text
    assert "rank 0 lost touch and ended because of it" in text


def test_silent_ranks_when_nobody_saw_their_end(write, tmp_path):
    for rank in (0, 1):
        failure(write, rank, *ECHO)
    code, text = diagnose(tmp_path, START_S)
    assert code == RESTARTABLE and text.startswith("host node1, rank 2: went silent")
    assert "also host node1, rank 3: went silent with its host" in text and "ranks 0-1 lost touch" in text


@pytest.mark.parametrize("echoing", [(), (0, 1, 2)])
def test_silence_alone_is_no_signal(echoing, write, tmp_path):
    """A rank that could not write down what ended it, beside ranks of its host that could."""
    for rank in echoing:
        failure(write, rank, *ECHO)
    code, text = diagnose(tmp_path, START_S, exit_status=1)
    assert code == FINAL and text.startswith(f"host node{'1' if echoing else '0'}, rank {len(echoing)}: went silent: nobody saw a signal")
    (tmp_path / "log").write_text(f"Signal 9 (SIGKILL) received by PID {100 + len(echoing)}\n")
    assert diagnose(tmp_path, START_S, log=tmp_path / "log")[0] == RESTARTABLE


@pytest.mark.parametrize(("status", "verdict"), [(137, RESTARTABLE), (1, FINAL)])
def test_everything_on_the_only_host_is_killed(status, verdict, write, tmp_path):
    for rank in (2, 3):
        record_path(tmp_path, "beat", rank).unlink()
    assert diagnose(tmp_path, START_S, exit_status=status)[0] == verdict


@pytest.mark.parametrize(("num_ranks", "verdict"), [(4, FINAL), (2, RESTARTABLE)])
def test_a_host_whose_ranks_never_began_is_no_lost_host(num_ranks, verdict, write, tmp_path):
    """A wrong path on one node ends its ranks; srun then kills those of the other, which had begun."""
    for rank in (2, 3):
        record_path(tmp_path, "beat", rank).unlink()
    code, text = diagnose(tmp_path, START_S, exit_status=137, num_ranks=num_ranks)
    assert code == verdict and ("ranks 2-3 never began, ranks 0-1 did" in text) == (verdict == FINAL)
    (tmp_path / "log").write_text("Signal 9 (SIGKILL) received by PID 103\n")  # a rank of that host
    assert diagnose(tmp_path, START_S, exit_status=137, log=tmp_path / "log", num_ranks=num_ranks)[0] == RESTARTABLE


def test_a_time_out_of_all_ranks_shows_where_they_waited(write, tmp_path):
    for rank in range(4):
        failure(write, rank, "DistBackendError", "Watchdog caught collective operation timeout")
        place = "all_reduce at a.py:1 in f" if rank < 3 else "broadcast at b.py:2 in g"
        write("stall", rank, 9, waits_in=place, since_s=START_S + 1, stack="")
    code, text = diagnose(tmp_path, START_S)
    assert code == RESTARTABLE
    assert "  ranks 0-2 waited in all_reduce at a.py:1 in f for 8 s\n  rank 3 waited in broadcast at b.py:2 in g for 8 s\n" in text


def test_a_job_that_still_runs_has_no_cause(write, tmp_path):
    """As far as this host can tell; its launcher has not ended either."""
    here = {"host": socket.gethostname(), "pid": os.getpid(), "parent_pid": os.getppid()}
    write_record(record_path(tmp_path, "beat", 1), beat(1) | here)
    code, text = diagnose(tmp_path, START_S)
    assert code == UNKNOWN and text == f"{tmp_path}: rank 1 still runs on {here['host']}; the last heartbeat is of step 7"
    assert diagnose(tmp_path, START_S, exit_status=1)[0] == FINAL
    write_record(record_path(tmp_path, "beat", 1), beat(1) | here | {"parent_pid": 1 << 30})  # another process has its number now
    assert diagnose(tmp_path, START_S)[0] == FINAL
    write_record(record_path(tmp_path, "beat", 1), beat(1) | here)
    failure(write, 0, "KeyError", "'x'")
    assert diagnose(tmp_path, START_S)[0] == FINAL


def test_a_rank_that_is_gone_beside_those_that_still_wait_for_it(write, tmp_path):
    here = {"host": socket.gethostname(), "pid": os.getpid(), "parent_pid": os.getppid()}
    write_record(record_path(tmp_path, "beat", 1), beat(1) | here)
    write_record(record_path(tmp_path, "beat", 2), beat(2) | here | {"parent_pid": 1 << 30})
    write("stall", 1, 9, waits_in="all_reduce at a.py:1 in f", since_s=START_S + 1, stack="")
    code, text = diagnose(tmp_path, START_S)
    assert code == UNKNOWN and text.endswith("step 7; rank 2 is gone\n  rank 1 waited in all_reduce at a.py:1 in f for 8 s")


def test_leaving_with_a_code_of_its_own_is_final(write, tmp_path):
    write("seen", 2, 8, cause="lost", signal=None, exit_code=3)
    code, text = diagnose(tmp_path, START_S)
    assert code == FINAL and "rank 2: ended with exit code 3 without an exception" in text


def test_nothing_found(write, tmp_path):
    for rank in range(4):
        write("beat", rank, phase="ended")
    code, text = diagnose(tmp_path, START_S, exit_status=1)
    assert code == UNKNOWN and "every rank left as it should (exit status 1)" in text
    code, text = diagnose(tmp_path, START_S, exit_status=137)  # the launcher was killed: a new start finds what is left to do, if anything
    assert code == RESTARTABLE and "every rank left as it should (exit status 137, killed by signal 9 (SIGKILL))" in text
    later = START_S + 100
    assert diagnose(tmp_path, later)[0] == UNKNOWN and diagnose(tmp_path, later, exit_status=137)[0] == UNKNOWN
    code, text = diagnose(tmp_path, later, exit_status=1)  # no rank began, and no signal: a configuration error
    assert code == FINAL and "no rank got as far as its first heartbeat (exit status 1); a configuration error" in text
    assert "or ranks that did not find each other" in text
    assert diagnose(tmp_path / "nowhere", 0.0)[0] == UNKNOWN


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "nowhere does not exist"), (["log"], "log is not a folder"), ([".", "--log", "nowhere"], "nowhere is not a file")],
)
def test_a_path_that_is_wrong_is_not_diagnosed(words, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "log").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "message", "echo"),
    [
        (*ECHO, True),
        ("DistBackendError", "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error", True),
        ("RuntimeError", "[0] Timed out waiting 16000ms for recv operation to complete", True),
        ("DistStoreError", "Timed out after 601 seconds waiting for clients. 3/4 clients joined.", True),
        ("DistBackendError", "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(...) ran for 60 ms before timing out.", True),
        ("DistStoreError", "wait timeout after 300000ms, keys: /0//cpu//1/0", True),
        ("DistNetworkError", "The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29500).", True),
        ("ConnectionResetError", "[Errno 104] Connection reset by peer", True),
        ("BrokenPipeError", "[Errno 32]", True),
        ("CheckpointException", "ranks:dict_keys([1])\nTraceback\nRuntimeError: Connection closed by peer [127.0.0.1]:1", True),
        ("CheckpointException", "ranks:dict_keys([1])\nOSError: [Errno 28] No space left on device; Connection closed by peer", False),
        ("CheckpointException", "ranks:dict_keys([1])\nKeyError: 'x'", False),
        ("DistBackendError", "NCCL error in: NCCLUtils.cpp:1, invalid usage (run with NCCL_DEBUG=WARN), ncclInvalidUsage: invalid", False),
        ("DistBackendError", "NCCL error: unhandled system error, ncclSystemError: Error: /dev/shm/nccl: No space left on device", False),
        ("RuntimeError", "Triton compile timed out after 60 s", False),
        ("TimeoutError", "the file lock of cache/x was not free within 60 s", False),
        ("RuntimeError", "CUDA error: an illegal memory access was encountered", False),
        ("OutOfMemoryError", "CUDA out of memory", False),
        ("FloatingPointError", "step 3: the loss is not finite", False),
        ("OSError", "[Errno 28] the checkpoint of step 4 needs 5 MiB", False),
        ("MediaError", "clip.mp4 timed out", False),
    ],
)
def test_echoes_of_a_peer(kind, message, echo):
    assert is_echo({"type": kind, "message": message}) is echo


@pytest.mark.parametrize(("file", "echo"), [("multiprocessing/connection.py", True), ("pickle.py", False)])
def test_an_end_of_file_is_an_echo_where_a_pipe_ends(file, echo):
    assert is_echo({"type": "EOFError", "message": "", "traceback": f'  File "/usr/lib/python3.11/{file}", line 1, in f'}) is echo


def test_names_of_ranks():
    assert [name_ranks(ranks) for ranks in ([3], [3, 4], [5, 0, 1, 2, 9])] == ["rank 3", "ranks 3-4", "ranks 0-2, 5, 9"]


def test_the_program_needs_no_torch_and_exits_with_the_code(write, tmp_path):
    failure(write, 1, "KeyError", "'y'")
    words = ["-m", "megatron_longvila.diagnose", str(tmp_path), "--since", str(START_S)]
    done = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True)
    assert done.returncode == FINAL and done.stdout.startswith("host node0, rank 1: KeyError: 'y'\n")
    assert "pathlib" in done.stderr and not any(f" {name}\n" in done.stderr for name in ("torch", "numpy", "megatron.core"))


def test_a_torn_record_is_left_out(write, tmp_path):
    record_path(tmp_path, "beat", 1).write_text(json.dumps(beat(1))[:20])
    assert "rank 1" not in diagnose(tmp_path, START_S)[1]
