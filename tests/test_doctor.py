"""The doctor: what it finds here, what it says about broken things, and hosts that are measured against each other."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import environment

from megatron_longvila.doctor import codecs
from megatron_longvila.doctor.__main__ import find_first_node, main
from megatron_longvila.doctor.finding import NOTE, OK, PROBLEM, Finding, render
from megatron_longvila.doctor.host import check_disk, check_speed, memory_limit
from megatron_longvila.doctor.network import judge_pairs
from ranks import run_ranks

DOCTOR = [sys.executable, "-m", "megatron_longvila.doctor", "--disk_mib", "4", "--exchange_mib", "1"]
LIMITS = 'ulimit -n 512; exec "$@"'


def findings(done: subprocess.CompletedProcess) -> dict[str, list[dict]]:
    """By name; every one that is not fine says what to do, and the exit code says whether one is a problem."""
    found: dict[str, list[dict]] = {}
    for one in json.loads(done.stdout):
        found.setdefault(one["name"], []).append(one)
        assert one["status"] == OK or one["remedy"], one
    assert done.returncode == any(one["status"] == PROBLEM for those in found.values() for one in those), done.stderr
    return found


def test_one_host_with_a_low_limit_a_missing_folder_and_a_broken_package(tmp_path: Path) -> None:
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()  # or one that is installed would be found before
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: built for another torch')")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    words = ["bash", "-c", LIMITS, "bash", *DOCTOR, "--json", "--path", tmp_path, tmp_path / "nowhere"]
    done = subprocess.run(list(map(str, words)), env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    found = findings(done)
    wanted = "python torch megatron-core devices InfiniBand TE apex triton py-spy codecs /dev/shm memlock processors clock disk network"
    assert set(wanted.split()) <= set(found)
    assert found["codecs"][0]["status"] == OK and "h264, hevc, vp9, av1, mpeg4" in found["codecs"][0]["value"]
    assert found["torch"][0]["status"] == found["megatron-core"][0]["status"] == OK
    assert (found["open files"][0]["status"], found["open files"][0]["value"][:3]) == (PROBLEM, "512")
    assert "ulimit -n 65536" in found["open files"][0]["remedy"]
    good, missing = found["disk"]
    assert " MiB/s, reads " in good["value"] and missing["value"] == f"{tmp_path / 'nowhere'} is not there" and missing["status"] == PROBLEM
    assert found["TE"][0]["status"] == PROBLEM and "undefined symbol: built for another torch; uninstall it" in found["TE"][0]["remedy"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".doctor")]  # what it wrote is gone


def test_a_codec_that_does_not_work() -> None:
    assert codecs.try_codec("h264", "libx264") == "" and codecs.try_codec("h264", "no-encoder") == ""
    assert codecs.try_codec("no-decoder", "no-encoder") == "no such decoder"


def test_a_disk_without_room(tmp_path: Path) -> None:
    (finding,) = check_disk(tmp_path, 2**60)
    assert finding.status == PROBLEM and "GiB free" in finding.value and "make room" in finding.remedy


def test_slow_devices_and_pairs_are_named() -> None:
    assert list(check_speed({0: None})) == [] and next(check_speed({0: 700.0, 1: 690.0})).status == OK
    slow = next(check_speed({0: 700.0, 1: 690.0, 2: 300.0}))
    assert slow.status == PROBLEM and "slow ranks: 2 (300)" in slow.value
    assert list(judge_pairs({})) == [] and next(judge_pairs({"a - b": 10.0})).status == OK
    slow = next(judge_pairs({"a - b": 10.0, "b - c": 1.0, "c - a": 9.0}))
    assert slow.status == PROBLEM and "slow pairs: b - c" in slow.value


def test_hosts_that_agree_share_a_line() -> None:
    same = [Finding("torch", OK, "2.13", host=host) for host in ("a", "b")]
    text = render([*same, Finding("shm", PROBLEM, "1 MiB", "make it larger", "b"), Finding("apex", NOTE, "none", "build it", "a")])
    assert text.splitlines() == [
        "ok      torch          2.13",
        "PROBLEM shm            1 MiB [b]",
        "                       -> make it larger",
        "note    apex           none [a]",
        "                       -> build it",
        "2 hosts (a, b): 1 problem",
    ]
    assert render(same).endswith("2 hosts (a, b): no problem")


def _measure_clocks(rank: int, ahead_s: float) -> list[Finding]:
    from megatron_longvila.doctor import network
    from megatron_longvila.platform import hardware

    if rank == 1:
        real = time.time
        time.time = lambda: real() + ahead_s
    return list(network.check_clocks(hardware.cpu_group(60.0), {"first": 0, "other": 1}))


@pytest.mark.parametrize("ahead_s", [0.0, 90.0])
def test_a_clock_that_is_ahead(ahead_s: float) -> None:
    own, other = run_ranks(_measure_clocks, 2, ahead_s)[0]
    assert own.status == OK and own.value.startswith("first +0.000 s")
    assert other.status == (PROBLEM if ahead_s else OK)
    assert abs(float(other.value.split()[1]) - ahead_s) <= float(other.value.split("within ")[1].split()[0]) + 0.001


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu[003-005,9],cpu1", "gpu003"), ("a1,b[2-3]", "a1"), ("rack[2,4]-node", "rack2-node"), ("n[12]", "n12")],
)
def test_the_first_node_without_scontrol(nodes: str, first: str, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_first_node(nodes) == first


def test_the_lowest_memory_limit_above_this_process(tmp_path: Path) -> None:
    job = tmp_path / "system.slice" / "job_7"
    (job / "step_0").mkdir(parents=True)
    assert memory_limit("0::/system.slice/job_7/step_0\n", tmp_path) is None
    (job / "step_0" / "memory.max").write_text("max\n")
    (job / "memory.max").write_text("4096\n")
    (tmp_path / "system.slice" / "memory.max").write_text("8192\n")
    assert memory_limit("0::/system.slice/job_7/step_0\n", tmp_path) == 4096
    old = tmp_path / "memory" / "slurm"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2048\n")
    (old.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory_limit("5:cpu,cpuacct:/slurm\n4:memory:/slurm\n", tmp_path) == 2048


def _join_late(rank: int) -> list[str]:
    """Rank 0 looks at its host for longer than an exchange may take."""
    from megatron_longvila import platform
    from megatron_longvila.doctor import __main__ as doctor

    join = platform.init_distributed
    limits = []
    platform.limit_collectives(0.5)  # of the group that these ranks have already
    platform.init_distributed = lambda timeout_s: limits.append(timeout_s)
    doctor.host.check_host = lambda *args: time.sleep(2) or []
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    found = doctor.examine([], 1, 1 << 20, 30.0)
    assert join is not platform.init_distributed and limits == [doctor.JOIN_S]
    return [one.name for one in found or []]


def test_a_host_that_takes_long_to_look_at() -> None:
    assert "all-reduce" in run_ranks(_join_late, 2)[0]


def test_the_limit_it_reads_is_this_one(tmp_path: Path) -> None:
    from megatron_longvila.doctor.host import check_limits

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    value = next(one.value for one in check_limits() if one.name == "open files")
    assert value.startswith(f"{soft} ")


@pytest.mark.parametrize("flag", ["--disk_mib", "--exchange_mib", "--timeout_s"])
def test_a_size_that_measures_nothing_is_refused(flag: str, capsys) -> None:
    """No bytes in no time were a slow disk."""
    with pytest.raises(SystemExit) as error:
        main([flag, "0"])
    assert error.value.code == 2 and f"{flag} 0" in capsys.readouterr().err
