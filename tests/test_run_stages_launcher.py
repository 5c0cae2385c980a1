"""How tools/run_stages.py reads its launcher, and asks what it has started to stop."""

import os
import signal
import subprocess
import time

import pytest
from programs import ROOT, load_script


@pytest.fixture(scope="module")
def tool():
    return load_script(ROOT / "tools" / "run_stages.py")


@pytest.mark.parametrize(
    ("launcher", "num_ranks", "wanted"),
    [
        (None, None, (1, 1)),
        (None, 4, (4, 4)),
        ("torchrun --nproc_per_node 4", None, (4, 4)),
        ("torchrun --nnodes=2 --nproc-per-node=8", None, (16, 8)),
        ("srun python", 16, (16, 16)),
        ("srun torchrun --nproc_per_node 8", 32, (32, 8)),
        ("srun --nodes=2 --ntasks-per-node=1 bash ranks.sh", 16, (16, 8)),
        ("/usr/bin/srun -N4 bash ranks.sh", 16, (16, 4)),
        ("srun --nodes 2 torchrun --nnodes 2 --nproc_per_node 8", None, (16, 8)),
        ("bash ranks.sh -N 2", 16, (16, 16)),
    ],
)
def test_ranks_of_a_launcher(tool, monkeypatch, launcher, num_ranks, wanted) -> None:
    monkeypatch.delenv("SLURM_NNODES", raising=False)
    words, *ranks = tool.choose_launcher(launcher, num_ranks)
    assert tuple(ranks) == wanted and (launcher is None or words == launcher.split())


def test_srun_takes_the_hosts_of_the_job_it_is_in(tool, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert tool.choose_launcher("srun bash ranks.sh", 16)[1:] == (16, 8)
    assert tool.choose_launcher("srun --nodes=1 bash ranks.sh", 16)[1:] == (16, 16)
    assert tool.choose_launcher("bash ranks.sh", 16)[1:] == (16, 16)
    assert tool.choose_launcher("srun bash ranks.sh", 15)[1:] == (15, 15)  # it cannot be on all hosts alike
    assert tool.choose_launcher("srun --label torchrun --nproc_per_node 8", 8)[1:] == (8, 8)
    with pytest.raises(ValueError, match="does not say how many ranks it starts .*--nodes N of srun"):
        tool.choose_launcher("srun --label torchrun --nproc_per_node 8", None)
    with pytest.raises(ValueError, match="--num_ranks 15 must be divisible by the 2 hosts"):
        tool.choose_launcher("srun -N 2 bash ranks.sh", 15)


@pytest.mark.parametrize(
    ("launcher", "num_ranks", "wanted"),
    [
        ("srun -n 1 python", 1, (1, 1)),
        ("srun -n2 python", 2, (2, 2)),
        ("srun -w node1 -n 3 bash r.sh", 3, (3, 3)),
        ("srun --mpi none --nodelist=node1 torchrun --nproc_per_node 8", 8, (8, 8)),
        ("srun --label --ntasks=1 torchrun --nproc_per_node 8", None, (8, 8)),
        ("srun --nodes=1-2 bash r.sh", 4, (4, 4)),
        ("srun bash r.sh -n 1", 16, (16, 8)),  # not srun's own
        ("srun --ntasks-per-node 4 python", 8, (8, 4)),
    ],
)
def test_srun_that_says_what_it_starts_need_not_take_all_hosts_of_its_job(tool, monkeypatch, launcher, num_ranks, wanted) -> None:
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert tool.choose_launcher(launcher, num_ranks)[1:] == wanted


def test_ranks_must_be_known(tool, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_NNODES", raising=False)
    with pytest.raises(ValueError, match="does not say how many ranks"):
        tool.choose_launcher("srun python", None)
    with pytest.raises(ValueError, match="--launcher is empty"):
        tool.choose_launcher(" ", 2)
    with pytest.raises(ValueError, match="which starts 16, differ"):
        tool.choose_launcher("torchrun --nnodes 2 --nproc_per_node 8", 8)


def test_a_heartbeat_of_an_earlier_start_is_not_asked_to_stop(tool, tmp_path) -> None:
    """Whatever its time: that of a file on a shared disk is not this host's."""
    beat = tmp_path / "heartbeat.json"
    beat.write_text('{"pid": 1}')
    os.utime(beat, (time.time() + 3600,) * 2)
    before = tool.read_heartbeat(beat)
    with subprocess.Popen(["sleep", "60"]) as launcher:
        assert not tool.ask_to_stop(launcher, signal.SIGTERM, beat, before) and launcher.poll() is None
        beat.write_text('{"pid": 2}')  # of a rank on another host
        os.utime(beat, (1.0, 1.0))
        assert tool.ask_to_stop(launcher, signal.SIGTERM, beat, before)
        assert launcher.wait(timeout=20) == -signal.SIGTERM
