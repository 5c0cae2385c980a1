"""The scripts without a cluster: what they print without arguments, what they refuse before anything is queued, what a dry run shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
        line.startswith("$ sbatch --nodes=2 --gpus-per-node=8 --time=1:00:00 ")
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
        (["--nodes", 1, *tiny], "--gpus G, the GPUs of a node, is missing"),
        (["--nodes", 1, "--gpus", 8], "CONFIG, a YAML file such as"),
        (["--time", "10", "--nodes", 1, "--gpus", 8, *tiny], "--time: options of sbatch are given as --name=value"),
    ):
        done = bash(SLURM / "submit.sh", *words, **with_queue(queue))
        assert done.returncode == 1 and said in done.stderr and not queue.exists(), done


def test_the_site_file_and_the_environment_reach_sbatch(tiny: list[str], queue: Path, tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text("export SBATCH_ACCOUNT=vision\n")
    site = {"LONGVILA_SITE": tmp_path / "site.sh"}
    done = bash(SLURM / "submit.sh", "--nodes=1", "--gpus=8", *tiny, **with_queue(queue), **site)
    assert done.returncode == 0, done.stderr
    assert queue.read_text().startswith("account=vision --nodes=1 --gpus-per-node=8 ")
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
    words = ("--nodes", 2, "--gpus", 2, "--time=10", tmp_path / "chain.yaml", tmp_path / "out", "--optimizer.lr", "0.1")
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
