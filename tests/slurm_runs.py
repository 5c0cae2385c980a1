"""Runs as Slurm jobs seen from a test: what they have done, until when to wait, and how to make them slow."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
from programs import ROOT, read_lines
from slurm_cluster import Cluster

STEPS = 24
SBATCH = ROOT / "examples/slurm/train.sbatch"
NODES = ("--nodes=2", "--cpus-per-task=2")
ONE_RANK = {"LONGVILA_RANKS_PER_NODE": 1}  # what needs no more starts in half the time


def words(data: Path, output: Path, *flags: object) -> list[str]:
    """CONFIG and flags: ulysses inside a node, ring across the two."""
    found = (
        ROOT / "examples/models/tiny.yaml", "--output_dir", output, "--data.train", f"[{data}/dataset]", "--data.tokenizer",
        f"{data}/tokenizer.model", "--data.template", "plain", "--model.llm.vocab_size", 448, "--data.context_length", 128,
        "--data.global_batch_size", 2, "--optimizer.lr", 0.001, "--training.steps", STEPS, "--parallel.ulysses_size", 2,
        "--parallel.ring_size", 2, "--logging.sample_ids", "true", *flags,
    )  # fmt: skip
    return list(map(str, found))


def losses(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(output / "metrics.jsonl")]


def heartbeat(output: Path) -> int:
    """The last step that the run has done."""
    path = output / "heartbeat.json"
    return json.loads(path.read_text())["step"] if path.exists() else 0


def await_step(output: Path, step: int, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while heartbeat(output) < step:
        assert time.monotonic() < deadline, f"step {step} of {output} was not reached within {timeout_s} s"
        time.sleep(0.05)


def await_rank(output: Path, rank: int, step: int) -> int:
    """The process id of a rank once it has begun a step."""
    path, deadline = output / "heartbeats" / f"rank_{rank:05d}.json", time.monotonic() + 300
    while True:
        beat = json.loads(path.read_text()) if path.exists() else {"step": 0, "pid": 0}
        if beat["step"] >= step and psutil.pid_exists(beat["pid"]):
            return beat["pid"]
        assert time.monotonic() < deadline, f"rank {rank} of {output} did not reach step {step}: {beat}"
        time.sleep(0.05)


def resumed(log: str) -> list[int]:
    """The steps from which the starts of a job went on."""
    return list(map(int, re.findall(r"resumed from .*\(step (\d+)", log)))


def await_end(pid: int, timeout_s: float) -> None:
    """Of a process."""
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there after {timeout_s} s"
        time.sleep(0.1)


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.1)


def await_log(cluster: Cluster, job: int, text: str, timeout_s: float = 120.0) -> dict[str, str]:
    """The job's fields once its log holds a text."""
    deadline = time.monotonic() + timeout_s
    while text not in (log := cluster.log(facts := cluster.show(job))):
        assert time.monotonic() < deadline, log
        time.sleep(0.3)
    return facts


class Slowness:
    """How slow the ranks of a job are, changed while they run (slow/sitecustomize.py)."""

    def __init__(self, path: Path):
        self.path = path
        self.environment = {"SLOW_FILE": path, "PYTHONPATH": ROOT / "tests/slurm/slow"}
        self.set(step=1)

    def set(self, **seconds: float) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(seconds))
        partial.rename(self.path)
