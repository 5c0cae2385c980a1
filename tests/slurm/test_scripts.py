"""The scripts without a cluster: what they print without arguments, what they refuse before anything is queued, what a dry run shows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import ROOT, environment

SLURM = ROOT / "examples/slurm"
SCRIPTS = sorted([*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")])
SOURCED = ("front.sh", "job.sh")


def bash(*words: object, cwd: Path = ROOT, **more: object) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in environment().items() if not name.startswith(("SLURM", "SBATCH", "LONGVILA_"))}
    settings = {"LONGVILA_PYTHON": sys.executable} | {name: str(value) for name, value in more.items()}
    return subprocess.run(["bash", *map(str, words)], cwd=cwd, env=clean | settings, capture_output=True, text=True, timeout=120)


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """CONFIG and flags of a run whose data are named and empty: everything is checked but not read."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/dataset.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_text("")
    return [
        str(ROOT / "examples/models/tiny.yaml"), "--data.train", f"[{tmp_path}/dataset]", "--data.tokenizer", f"{tmp_path}/tokenizer.model",
        "--output_dir", str(tmp_path / "run"), "--data.global_batch_size", "8",
    ]  # fmt: skip


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    """A stand-in for sbatch that writes its arguments, and the account it would read, to a file."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/sbatch"
    stand_in.write_text(f'#!/bin/bash\necho "account=$SBATCH_ACCOUNT" "$@" >>{tmp_path}/queue; echo 4$(wc -l <{tmp_path}/queue)\n')
    stand_in.chmod(0o755)
    return tmp_path / "queue"


def with_queue(queue: Path) -> dict[str, str]:
    return {"PATH": f"{queue.parent}/bin:{os.environ['PATH']}"}


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck on this machine: sudo apt-get install shellcheck")
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert len(SCRIPTS) >= 9 and done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.name not in SOURCED], ids=lambda path: path.name)
def test_usage_without_arguments(script: Path) -> None:
    done = bash(script)
    assert done.returncode == 2 and "usage" in done.stderr.lower() and "error" not in done.stderr and not done.stdout, done


def test_a_dry_run_shows_everything_and_submits_nothing(tiny: list[str], queue: Path) -> None:
    cp = ("--parallel.ulysses_size", "4", "--parallel.ring_size", "2")
    done = bash(SLURM / "submit.sh", "--dry-run", "--nodes", 2, "--gpus", 8, "--time=1:00:00", *tiny, *cp, **with_queue(queue))
    assert done.returncode == 0 and not queue.exists(), done.stderr
    assert "16 ranks = 2 nodes x 8: tp 1 x ulysses 4 x ring 2 x dp 2 x pp 1" in done.stdout
    assert (
        "8 rows a step = dp 2 x 4 micro-batches of one row; up to 1,024 tokens a row, 128 on each of cp 8 ranks, 8,192 a step"
        in done.stdout
    )
    assert "weights" in done.stdout and "gradients" in done.stdout and "optimizer" in done.stdout
    line = done.stdout.splitlines()[-1]
    assert (
        line.startswith("$ sbatch --nodes=2 --gpus-per-node=8 --mem=0 --cpus-per-task=64 --time=1:00:00 ")
        and "train.sbatch" in line
        and "--parallel.ring_size 2" in line
    )


@pytest.mark.parametrize(
    ("nodes", "gpus", "flags", "said"),
    [
        (3, 8, ["--parallel.cp_size", "16"], "world_size=24 must be divisible by"),
        ("1-3", 8, ["--parallel.cp_size", "8"], "3 nodes x 8 ranks: data.global_batch_size=8 must be divisible by dp_size"),
        (2, 8, ["--parallel.ulysses_size", "8"], "parallel.ulysses_size=8 must divide the KV heads"),
        (2, 8, ["--parallel.ulises_size", "8"], "parallel.ulysses_size"),
        (1, 8, ["--data.tokenizer", "/nowhere"], "data.tokenizer='/nowhere' does not exist"),
    ],
)
def test_what_cannot_run_is_never_queued(tiny: list[str], queue: Path, nodes: object, gpus: int, flags: list[str], said: str) -> None:
    done = bash(SLURM / "submit.sh", "--nodes", nodes, "--gpus", gpus, *tiny, *flags, **with_queue(queue))
    assert done.returncode == 1 and said in done.stderr and not queue.exists(), done


def test_options_of_the_front(tiny: list[str], queue: Path) -> None:
    for words, said in (
        (["--gpus", 8, *tiny], "--nodes N is missing"),
        (["--nodes", 1, *tiny], "--gpus G or TYPE:G, the GPUs of a node, is missing"),
        (["--nodes", 1, "--gpus", 8], "CONFIG, a YAML file such as"),
        (["--time", "10", "--nodes", 1, "--gpus", 8, *tiny], "--time: options of sbatch are given as --name=value"),
        (["--time=12", "--nodes", 1, "--gpus", 8, *tiny], "a time limit of 12 (720 s) leaves no time to train"),
    ):
        done = bash(SLURM / "submit.sh", *words, **with_queue(queue))
        assert done.returncode == 1 and said in done.stderr and not queue.exists(), done


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--gpus", "h100:8", "--exclusive"], "--nodes=1 --gpus-per-node=h100:8 --mem=0 --cpus-per-task=64 --exclusive"),
        (["--gpus=8", "--mem=200G", "--cpus-per-task=16"], "--nodes=1 --gpus-per-node=8 --mem=200G --cpus-per-task=16"),
        (["--gpus=8", "--mem-per-gpu=50G", "--cpus-per-gpu=4"], "--nodes=1 --gpus-per-node=8 --mem-per-gpu=50G --cpus-per-gpu=4"),
        (["--gpus=8", "--time=12:01"], "--nodes=1 --gpus-per-node=8 --mem=0 --cpus-per-task=64 --time=12:01"),
        (
            ["--gpus=8", "--time=5", "--signal=B:USR1@60"],
            "--nodes=1 --gpus-per-node=8 --mem=0 --cpus-per-task=64 --time=5 --signal=B:USR1@60",
        ),
        (["--gpus=8", "--time=1-0"], "--nodes=1 --gpus-per-node=8 --mem=0 --cpus-per-task=64 --time=1-0"),
        ([], "--nodes=1 --mem=0 --cpus-per-task=16"),  # LONGVILA_RANKS_PER_NODE: no GPUs
    ],
)
def test_what_sbatch_is_asked_for(tiny: list[str], queue: Path, given: list[str], line: str) -> None:
    """Besides nodes and GPUs: the CPUs and the memory that its defaults would not give."""
    done = bash(SLURM / "submit.sh", "--nodes=1", *given, *tiny, **with_queue(queue), LONGVILA_RANKS_PER_NODE=2)
    assert done.returncode == 0, done.stderr
    asked = queue.read_text().partition("account= ")[2].partition(f" {SLURM}/train.sbatch")[0]
    assert asked == line
    assert f"{2 if not given else 8} ranks = 1 nodes x" in done.stdout


def test_ranks_of_a_node_are_its_gpus_in_the_job_too() -> None:
    text = f"root={ROOT}; source {SLURM}/job.sh; find_ranks; echo $RANKS"
    done = bash("-c", text, SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE=4, LONGVILA_RANKS_PER_NODE=2, SLURM_CPUS_ON_NODE=1)
    assert done.stdout.splitlines()[-1] == "4" and "warning: 1 CPUs for the 4 ranks of a node" in done.stdout, done
    assert bash("-c", text, SLURM_JOB_ID="7", LONGVILA_RANKS_PER_NODE=2).stdout == "2\n"
    assert bash("-c", text, SLURM_JOB_ID="7").returncode == 1


def test_where_python_is_found_when_jobs_are_submitted(tiny: list[str], queue: Path) -> None:
    """Not inside of the jobs' container by chance: LONGVILA_SUBMIT_PYTHON, or through apptainer; pyxis serves jobs alone."""
    container = {"LONGVILA_PYTHON": "/opt/python-of-the-image", "LONGVILA_CONTAINER": "/images/a.sif"}
    apptainer = queue.parent / "bin/apptainer"
    apptainer.write_text(f'#!/bin/bash\necho apptainer "$@" >>{queue.parent}/contained\n')
    apptainer.chmod(0o755)
    words = (SLURM / "submit.sh", "--nodes=1", "--gpus=8", *tiny)
    done = bash(*words, **with_queue(queue), **container)
    assert done.returncode == 0, done.stderr
    assert f"/images/a.sif /opt/python-of-the-image {ROOT}/tools/slurm_plan.py" in (queue.parent / "contained").read_text()
    done = bash(*words, **with_queue(queue), **container, LONGVILA_SUBMIT_PYTHON=sys.executable)
    assert done.returncode == 0 and "8 ranks = 1 nodes x 8" in done.stdout, done
    done = bash(*words, **with_queue(queue), **container, LONGVILA_CONTAINER_RUNTIME="enroot")
    assert done.returncode == 1 and "set LONGVILA_SUBMIT_PYTHON" in done.stderr
    assert len(queue.read_text().splitlines()) == 2


def test_a_site_file_may_use_unset_names_and_fail(tiny: list[str], queue: Path, tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text('false; export SBATCH_ACCOUNT="vision$UNSET"\n')
    done = bash(SLURM / "submit.sh", "--nodes=1", "--gpus=8", *tiny, **with_queue(queue), LONGVILA_SITE=tmp_path / "site.sh")
    assert done.returncode == 0 and queue.read_text().startswith("account=vision "), done


@pytest.mark.slurm
def test_a_signal_reaches_only_ranks_that_can_hear_it(tmp_path: Path) -> None:
    """TERM and USR1 to the agent alone, as Slurm sends them where it tracks processes by cgroups: neither torchrun nor what a rank has
    started gets one, and a rank that is still starting gets it later."""
    (tmp_path / "rank.py").write_text(
        "import os, signal, subprocess, sys, time\n"
        "time.sleep(2)\n"
        "heard = []\n"
        "signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))\n"
        "child = subprocess.Popen(['sleep', '2'])\n"
        "end = time.monotonic() + 60\n"
        "while not heard and time.monotonic() < end: time.sleep(0.1)\n"
        "assert heard and child.wait() == 0\n"
        f"open('{tmp_path}/stopped_' + os.environ['RANK'], 'w')\n"
    )
    step = {"SLURM_STEP_ID": 0, "SLURM_NODEID": 0, "SLURM_NNODES": 1, "SLURM_JOB_ID": 1, "RANKS": 2, "PYTHON": sys.executable}
    clean = {name: value for name, value in environment().items() if not name.startswith(("SLURM", "LONGVILA_"))}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        step |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    line = ["bash", str(SLURM / "agent.sh"), str(tmp_path / "logs"), str(tmp_path / "rank.py")]
    with subprocess.Popen(line, env=clean | {name: str(value) for name, value in step.items()}, start_new_session=True) as agent:
        time.sleep(1)
        agent.terminate()
        time.sleep(4)
        agent.send_signal(signal.SIGUSR1)
        assert agent.wait(90) == 0
    assert sorted(path.name for path in tmp_path.glob("stopped_*")) == ["stopped_0", "stopped_1"]


def test_the_site_file_and_the_environment_reach_sbatch(tiny: list[str], queue: Path, tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text("export SBATCH_ACCOUNT=vision\n")
    site = {"LONGVILA_SITE": tmp_path / "site.sh"}
    done = bash(SLURM / "submit.sh", "--nodes=1", "--gpus=8", *tiny, **with_queue(queue), **site)
    assert done.returncode == 0, done.stderr
    assert queue.read_text().startswith("account=vision --nodes=1 --gpus-per-node=8 --mem=0 ")
    done = bash(SLURM / "submit.sh", "--nodes=1", "--gpus=8", *tiny, LONGVILA_SITE=tmp_path / "other.sh")
    assert done.returncode == 1 and "other.sh does not exist" in done.stderr


def test_a_chain_is_one_job_a_stage(queue: Path, tmp_path: Path) -> None:
    from tiny_tokenizers import write_sentencepiece

    write_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/dataset.json").write_text(json.dumps({"hash": "1"}))
    (tmp_path / "chain.yaml").write_text(
        f"base: [{ROOT}/examples/models/tiny.yaml]\ntokenizer: tokenizer.model\n"
        "flags: {data.train: [dataset], data.template: plain, model.llm.vocab_size: 448, data.global_batch_size: 4, training.steps: 3}\n"
        "stages: [{name: one}, {name: two}, {name: three}]\n"
    )
    words = ("--nodes", 2, "--gpus", 2, "--time=20", tmp_path / "chain.yaml", tmp_path / "out", "--optimizer.lr", "0.1")
    done = bash(SLURM / "chain.sh", "--dry-run", *words, **with_queue(queue))
    assert (
        done.returncode == 0
        and not queue.exists()
        and done.stdout.count("$ sbatch") == 3
        and done.stdout.count("4 ranks = 2 nodes x 2") == 3
    )
    done = bash(SLURM / "chain.sh", *words, **with_queue(queue))
    lines = queue.read_text().splitlines()
    assert done.stdout.splitlines()[-1] == "jobs: 41 42 43" and len(lines) == 3, done
    assert "--dependency" not in lines[0] and all("--kill-on-invalid-dep=yes" in line for line in lines[1:])
    assert "--dependency=afterok:41" in lines[1] and "--dependency=afterok:42" in lines[2]
    assert lines[1].endswith("--optimizer.lr 0.1 --stage two") and "--job-name=longvila-two" in lines[1]
    refused = bash(SLURM / "chain.sh", "--nodes=3", "--gpus=1", *words[5:], **with_queue(queue))
    assert refused.returncode == 1 and "stage one: data.global_batch_size=4 must be divisible" in refused.stderr
    queue.unlink()
    stand_in = queue.parent / "bin/sbatch"
    stand_in.write_text(stand_in.read_text() + f"(($(wc -l <{queue}) < 3))\n")
    refused = bash(SLURM / "chain.sh", *words, **with_queue(queue))
    assert refused.returncode == 1 and "stage three could not be submitted; jobs of the stages before, which go on: 41 42" in refused.stderr


@pytest.mark.parametrize("runtime", ["apptainer", "enroot"])
def test_a_container_is_put_around_python_on_every_node(runtime: str, tmp_path: Path) -> None:
    """The command lines alone: with programs that print them in the place of srun and the container."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "apptainer"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/bash\necho {name} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    text = f"root={ROOT}; source {SLURM}/job.sh; load_site; on_one_node python here; "
    text += 'run_step srun "${step_options[@]}" "${inside[@]}" there'
    settings = {"LONGVILA_CONTAINER": "/images/a.sif", "LONGVILA_CONTAINER_RUNTIME": runtime, "LONGVILA_CONTAINER_MOUNTS": "/data:/data"}
    done = bash("-c", text, SLURM_JOB_ID="7", PATH=f"{tmp_path}/bin:{os.environ['PATH']}", **settings)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    if runtime == "apptainer":
        around = f"apptainer exec --nv --pwd {ROOT} --bind /data:/data /images/a.sif"
        assert (first, second) == (f"{around} python here", f"srun {around} there")
    else:
        around = f"--container-image=/images/a.sif --container-mounts=/data:/data --container-workdir={ROOT}"
        assert (first, second) == (f"srun --overlap --nodes=1 --ntasks=1 {around} python here", f"srun {around} there")


def test_each_task_of_a_text_array_is_given_its_share(tmp_path: Path) -> None:
    """A task without a cluster, with a stand-in for python: the tool finds and deals out the files, whatever links and names there are."""
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    settings = {"SLURM_JOB_ID": 7, "SLURM_SUBMIT_DIR": ROOT, "LONGVILA_PYTHON": tmp_path / "python", "SLURM_ARRAY_TASK_COUNT": 2}
    words = (SLURM / "preprocess.sbatch", "text", "/data/texts /data/odd.jsonl", tmp_path / "out")
    for task in (3, 4):
        done = bash(*words, SLURM_ARRAY_TASK_MIN=3, SLURM_ARRAY_TASK_ID=task, **settings)
        assert done.returncode == 0, done.stderr
        given = done.stdout.partition("--input\n")[2].splitlines()
        assert given[:6] == ["/data/texts", "/data/odd.jsonl", "--share", f"{task - 3}/2", "--output", f"{tmp_path}/out/part_000{task - 3}"]
