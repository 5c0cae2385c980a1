"""train.sbatch on two virtual nodes of two ranks each: it trains what one process trains, and comes back from whatever takes its nodes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
from programs import ROOT, start
from slurm_cluster import Cluster
from slurm_runs import Slowness, await_end, await_file, await_log, await_rank, await_step, losses

pytestmark = pytest.mark.slurm

STEPS = 24
SBATCH = ROOT / "examples/slurm/train.sbatch"
NODES = ("--nodes=2", "--cpus-per-task=2")


def words(data: Path, output: Path, *flags: object) -> list[str]:
    """CONFIG and flags: ulysses inside a node, ring across the two."""
    found = (
        ROOT / "examples/models/tiny.yaml", "--output_dir", output, "--data.train", f"[{data}/dataset]", "--data.tokenizer",
        f"{data}/tokenizer.model", "--data.template", "plain", "--model.llm.vocab_size", 448, "--data.context_length", 128,
        "--data.global_batch_size", 2, "--optimizer.lr", 0.001, "--training.steps", STEPS, "--parallel.ulysses_size", 2,
        "--parallel.ring_size", 2, "--logging.sample_ids", "true", *flags,
    )  # fmt: skip
    return list(map(str, found))


@pytest.fixture(scope="module")
def whole(cluster: Cluster, data: Path, tmp_path_factory) -> Path:
    """The run that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole") / "run"
    job = cluster.submit(*NODES, SBATCH, *words(data, output))
    cluster.wait(job, "COMPLETED")
    return output


def test_two_nodes_train_what_one_process_trains(whole: Path, data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "run"
    single = ("--parallel.ulysses_size", 1, "--parallel.ring_size", 1)
    code, text = start(sys.executable, "-m", "megatron_longvila.train", "--config", *words(data, alone, *single))
    assert code == 0, text
    assert [step for step, _ in losses(whole)] == list(range(1, STEPS + 1))
    for (step, one), (_, other) in zip(losses(whole), losses(alone), strict=True):
        assert abs(one - other) <= 1e-5 * abs(other), (step, one, other)


def minutes_since_start(cluster: Cluster, job: int) -> int:
    hours, minutes, _ = cluster.show(job)["RunTime"].split(":")
    return 60 * int(hours) + int(minutes)


def test_whatever_takes_the_nodes_the_losses_stay(whole: Path, cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """A preemption at a random step, one with a save of 40 s, an operator's requeue, and the time limit, all in the life of one job."""
    output, slow = tmp_path / "run", Slowness(tmp_path / "slow.json")
    job = cluster.submit(*NODES, "--time=20", "--signal=B:USR1@90", SBATCH, *words(data, output), **slow.environment)
    at = random.randint(1, 6)
    print(f"the first preemption comes after step {at}")
    await_step(output, at)
    cluster.preempt()
    cluster.wait(job, "PENDING")
    await_step(output, at + 4)
    slow.set(step=1, save=40)
    cluster.preempt()
    cluster.wait(job, "PENDING")
    slow.set(step=1)
    await_step(output, at + 8)
    cluster.run("scontrol", "requeue", job)
    cluster.wait(job, "PENDING")
    await_step(output, at + 12)
    slow.set(step=8)  # Slurm looks at time limits twice a minute
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes_since_start(cluster, job) + 2}")
    cluster.wait(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    slow.set(step=0)
    facts = cluster.wait(job, "COMPLETED")
    assert facts["Restarts"] == "4" and not (output / "interrupted").exists()
    assert losses(output) == losses(whole), cluster.log(facts)  # to the last bit


def test_lost_ranks_are_restarted_inside_the_allocation(whole: Path, cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """A killed and a stopped rank, named with host and cause; a third loss before the next checkpoint is one too many."""
    output, slow = tmp_path / "run", Slowness(tmp_path / "slow.json")
    flags = ("--checkpoint.save_interval", 6, "--parallel.timeout_s", 40)
    job = cluster.submit(*NODES, SBATCH, *words(data, output, *flags), LONGVILA_MAX_RESTARTS=1, **slow.environment)
    after = cluster.submit(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap=true")
    lost = [(3, signal.SIGKILL), (2, signal.SIGSTOP), (1, signal.SIGKILL)]
    for (rank, number), step in zip(lost, (7, 13, 14), strict=True):
        pid = await_rank(output, rank, step)
        os.kill(pid, number)
        await_end(pid)
    facts = cluster.wait(job, "FAILED")
    log = cluster.log(facts)
    assert log.count("starting again inside the allocation from the last complete checkpoint") == 2, log
    assert "host vn2, rank 3: killed by signal 9 (SIGKILL)" in log and "host vn1, rank 1: killed by signal 9 (SIGKILL)" in log, log
    assert "host vn2, rank 2: stopped, process state T" in log and "lost ranks 2 times without a new checkpoint" in log, log
    assert facts["Restarts"] == "0"
    done = losses(output)
    assert len(done) >= 13 and done == losses(whole)[: len(done)]  # to the last bit
    assert cluster.wait(after, "CANCELLED")


def test_an_exception_ends_the_job_and_its_dependents(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    for shard in broken.glob("dataset/shards/*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    job = cluster.submit(*NODES, SBATCH, *words(broken, tmp_path / "run", "--data.max_bad_fraction", 0.0))
    after = cluster.submit(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap=true")
    log = cluster.log(cluster.wait(job, "FAILED"))
    assert "Traceback (most recent call last)" in log and "is not started again" in log and "try 2" not in log, log
    assert cluster.wait(after, "CANCELLED")


def test_scancel_stays_cancelled(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """And while the job runs, no other one trains in its run directory."""
    output, slow = tmp_path / "a run", Slowness(tmp_path / "slow.json")
    job = cluster.submit("--nodes=2", f"--output={tmp_path}/the output.out", SBATCH, *words(data, output), **slow.environment)
    await_step(output, 2)
    second = cluster.submit("--nodes=2", SBATCH, *words(data, output))
    assert f"job {job} still trains in {output}" in cluster.log(cluster.wait(second, "FAILED"))
    cluster.run("scancel", job)
    await_file(output / "interrupted")
    step = json.loads((output / "interrupted").read_text())["step"]
    await_log(cluster, job, "and is not queued again")
    facts = cluster.wait(job, "CANCELLED")
    assert facts["Restarts"] == "0" and step < STEPS
    assert (output / "checkpoints" / "latest").read_text() == f"step_{step:07d}\n"
    console = output / f"logs/job_{job}/start_1_try_1/console.log"
    assert f"stopped by a signal after step {step}" in console.read_text()  # a path with a space is found


def test_a_time_limit_that_leaves_no_time_fails(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """It would train one step per start, for ever."""
    output, slow = tmp_path / "run", Slowness(tmp_path / "slow.json")
    slow.set(step=5)
    job = cluster.submit(*NODES, "--time=3", "--signal=B:USR1@170", SBATCH, *words(data, output), **slow.environment)
    facts = cluster.wait(job, "FAILED")
    assert "the time limit (00:03:00) leaves no time to train" in cluster.log(facts) and facts["Restarts"] == "0"
    assert (output / "checkpoints/latest").exists()


def test_submitted_with_gpus(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """By submit.sh as its header says: the ranks of a node are the GPUs that Slurm hands out."""
    python = tmp_path / "python"  # the ranks compute on the CPU, whatever this machine has
    python.write_text(f'#!/bin/bash\nCUDA_VISIBLE_DEVICES="" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    line = ("--nodes", 2, "--gpus", 2, "--time=20", *words(data, tmp_path / "run", "--training.steps", 2))
    settings = {"LONGVILA_PYTHON": python, "LONGVILA_RANKS_PER_NODE": 7, "LONGVILA_CPUS_PER_RANK": 1}
    said = cluster.run("bash", SBATCH.parent / "submit.sh", *line, **settings)
    assert "4 ranks = 2 nodes x 2" in said and "--gpus-per-node=2 --mem=0 --cpus-per-task=2" in said
    facts = cluster.wait(int(said.split()[-1]), "COMPLETED")
    assert ": 2 x 2 ranks, master" in cluster.log(facts) and len(losses(tmp_path / "run")) == 2


def test_a_lost_node(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """A job that one node is enough for goes on there; one that needs two waits, says so, and goes on when the node is back.

    The last node, and the first one, where the batch script runs.
    """
    small, large, slow = tmp_path / "small", tmp_path / "large", Slowness(tmp_path / "slow.json")
    slow.set(step=1.0)
    flags = ("--checkpoint.save_interval", 2, "--training.steps", 12)
    one = ("--parallel.ulysses_size", 2, "--parallel.ring_size", 1)
    first = cluster.submit("--nodes=1-2", SBATCH, *words(data, small, *flags, *one), **slow.environment)
    second = cluster.submit("--nodes=2", SBATCH, *words(data, large, *flags), **slow.environment)
    await_step(small, 3)
    await_step(large, 3)
    assert cluster.show(first)["NumNodes"] == "2"
    cluster.lose_node("vn2")
    slow.set(step=0.0)
    facts = cluster.wait(first, "COMPLETED")
    assert facts["NodeList"] == "vn1" and facts["Restarts"] == "1"
    facts = cluster.show(second)
    assert facts["JobState"] == "PENDING" and facts["Restarts"] == "1"
    assert "Slurm has queued the job again: it waits until enough nodes are healthy" in cluster.log(facts), cluster.log(facts)
    cluster.start_node("vn2")
    slow.set(step=1.0)
    await_step(large, 6)
    cluster.lose_node("vn1")
    slow.set(step=0.0)
    facts = cluster.wait(second, "PENDING")
    cluster.start_node("vn1")
    facts = cluster.wait(second, "COMPLETED")
    assert facts["Restarts"] == "2"
    for job, output, starts in ((first, small, 2), (second, large, 3)):
        assert [step for step, _ in losses(output)] == list(range(1, 13))
        assert cluster.log(cluster.show(job)).count("resumed from ") == starts - 1


def test_conversion_answers_and_texts(whole: Path, cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """The jobs around training: the run's checkpoint leaves in VILA's layout and answers its questions; texts are prepared by an array."""
    checkpoint, slurm = whole / f"checkpoints/step_{STEPS:07d}", SBATCH.parent
    export = cluster.submit(slurm / "convert.sbatch", "export", checkpoint, tmp_path / "vila", "--format", "vila")
    back = cluster.submit(f"--dependency=afterok:{export}", slurm / "convert.sbatch", "import", tmp_path / "vila", tmp_path / "back")
    found = tmp_path / "answers.json"
    answers = ("answers", "--checkpoint", checkpoint, "--data", data / "dataset", "--output", found)
    mesh = ("--parallel.ulysses_size", 2, "--parallel.ring_size", 1)
    answered = cluster.submit("--nodes=1", slurm / "evaluate.sbatch", *answers, *mesh)
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / f"texts/{number}.txt").write_text("What colour is the square? The square is red. " * 20)
    text = ("text", tmp_path / "texts", tmp_path / "parts", "--tokenizer", data / "tokenizer.model", "--context_length", 32)
    array = cluster.submit("--array=0-1", slurm / "preprocess.sbatch", *text)
    for job in (export, back, answered, f"{array}_0", f"{array}_1"):
        cluster.wait(job, "COMPLETED")
    assert (tmp_path / "vila/config.json").exists() and (tmp_path / "vila/llm").is_dir()
    assert any((tmp_path / "back").iterdir()) and json.loads(found.read_text())
    rows = [json.loads((tmp_path / f"parts/part_000{part}/report.json").read_text())["accepted"] for part in range(2)]
    assert rows == [2, 1]
    other = cluster.submit("--array=0-2", slurm / "preprocess.sbatch", *text)
    facts = cluster.wait(f"{other}_1", "FAILED")
    assert "was begun with 2 tasks and this array has 3" in cluster.log(facts)
