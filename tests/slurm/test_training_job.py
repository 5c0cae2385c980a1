"""train.sbatch on two virtual nodes of two ranks each: it trains what one process trains, and comes back from whatever takes its nodes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
from programs import start
from slurm_cluster import Cluster
from slurm_runs import NODES, ONE_RANK, SBATCH, STEPS, Slowness, await_file, await_log, await_step, losses, resumed, words

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("beside")]


@pytest.fixture(scope="module")
def submitted(cluster: Cluster, question_videos: Path, tmp_path_factory) -> tuple[str, Path, str]:
    """The run that nothing disturbs, submitted with GPUs by submit.sh as its header says: what that printed, the run, the job's log."""
    folder = tmp_path_factory.mktemp("whole")
    python = folder / "python"  # the ranks compute on the CPU, whatever this machine has
    python.write_text(f'#!/bin/bash\nCUDA_VISIBLE_DEVICES="" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {"LONGVILA_PYTHON": python, "LONGVILA_RANKS_PER_NODE": 7, "LONGVILA_CPUS_PER_RANK": 1}
    line = ("--nodes", 2, "--gpus", 2, "--time=20", *words(question_videos, folder / "run"))
    said = cluster.run("bash", SBATCH.parent / "submit.sh", *line, **settings)
    return said, folder / "run", cluster.log(cluster.wait(int(said.split()[-1]), "COMPLETED"))


@pytest.fixture(scope="module")
def whole(submitted: tuple[str, Path, str]) -> Path:
    return submitted[1]


def test_the_ranks_of_a_node_are_the_gpus_that_slurm_hands_out(submitted: tuple[str, Path, str]) -> None:
    said, _, log = submitted
    assert "4 ranks = 2 nodes x 2" in said and "--gpus-per-node=2 --mem=0 --cpus-per-task=2" in said
    assert ": 2 x 2 ranks, master" in log


def test_two_nodes_train_what_one_process_trains(whole: Path, question_videos: Path, tmp_path: Path) -> None:
    alone = tmp_path / "run"
    single = ("--parallel.ulysses_size", 1, "--parallel.ring_size", 1)
    code, text = start(sys.executable, "-m", "megatron_longvila.train", "--config", *words(question_videos, alone, *single))
    assert code == 0, text
    assert [step for step, _ in losses(whole)] == list(range(1, STEPS + 1))
    for (step, one), (_, other) in zip(losses(whole), losses(alone), strict=True):
        assert abs(one - other) <= 1e-5 * abs(other), (step, one, other)


def minutes_since_start(cluster: Cluster, job: int) -> int:
    hours, minutes, _ = cluster.show(job)["RunTime"].split(":")
    return 60 * int(hours) + int(minutes)


def test_whatever_takes_the_nodes_the_losses_stay(whole: Path, cluster: Cluster, question_videos: Path, tmp_path: Path) -> None:
    """A preemption at a random step, with a save of 40 s, an operator's requeue, and the time limit, all in the life of one job."""
    output, slow = tmp_path / "run", Slowness(tmp_path / "slow.json")
    job = cluster.submit(*NODES, "--time=20", "--signal=B:USR1@90", SBATCH, *words(question_videos, output), **slow.environment)
    at = random.randint(1, 6)
    print(f"the preemption comes after step {at}")
    await_step(output, at)
    slow.set(step=1, save=40)
    cluster.preempt()
    cluster.wait(job, "PENDING")
    slow.set(step=1)
    await_step(output, at + 4)
    cluster.run("scontrol", "requeue", job)
    cluster.wait(job, "PENDING")
    await_step(output, at + 8)
    slow.set(step=8)  # Slurm looks at time limits twice a minute
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes_since_start(cluster, job) + 2}")
    cluster.wait(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    slow.set(step=0)
    facts = cluster.wait(job, "COMPLETED")
    assert facts["Restarts"] == "3" and not (output / "interrupted").exists()
    log = cluster.log(facts)
    assert losses(output) == losses(whole), log  # to the last bit
    # Each start went on from the save before it: one that began anew would come to the same losses.
    steps = resumed(log)
    assert len(steps) == 3 and steps[0] >= at and steps[1] >= at + 4 and steps[2] >= at + 8 and "try 2" not in log, log


SMALL_DISK = ("--training.steps", 8, "--checkpoint.save_interval", 2, "--checkpoint.keep_last", 3)


@pytest.fixture(scope="module")
def ends(cluster: Cluster, question_videos: Path, tmp_path_factory, request) -> dict[str, tuple[int, Path]]:
    """Jobs that end before their last step, side by side: each one's number and run directory."""
    folder = tmp_path_factory.mktemp("ends")
    slow = Slowness(folder / "slow.json")
    slow.set(step=3)
    shutil.copytree(question_videos, folder / "data")
    for shard in folder.glob("data/dataset/shards/*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))

    def submit(output: Path, data: Path, *options: str, flags: tuple = ()) -> tuple[int, Path]:
        flags = ("--parallel.ulysses_size", 1, "--data.max_bad_fraction", 0.0, *flags)
        line = ("--nodes=2", *options, SBATCH, *words(data, output, *flags))
        return cluster.submit(*line, **slow.environment, **ONE_RANK), output

    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], check=True)  # whoever may start Slurm's daemons may mount
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", disk], check=True))
    jobs = {
        "on a full disk": submit(disk / "run", question_videos, flags=SMALL_DISK),
        "not finite": submit(folder / "nan", question_videos, flags=("--optimizer.lr", 1e30, "--checkpoint.save_interval", 1)),
        "cancelled": submit(folder / "a run", question_videos, f"--output={folder}/the output.out"),
        "hurried": submit(folder / "hurried", question_videos, "--time=3", "--signal=B:USR1@170"),
        "broken": submit(folder / "broken", folder / "data"),
    }
    after = cluster.submit(f"--dependency=afterok:{jobs['broken'][0]}", "--kill-on-invalid-dep=yes", "--wrap=true")
    return jobs | {"after the broken one": (after, folder)}


def test_scancel_stays_cancelled(cluster: Cluster, question_videos: Path, ends: dict[str, tuple[int, Path]]) -> None:
    """And while the job runs, no other one trains in its run directory."""
    job, output = ends["cancelled"]
    await_step(output, 2)
    second = cluster.submit("--nodes=2", SBATCH, *words(question_videos, output))
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


def test_an_exception_ends_the_job_and_its_dependents(cluster: Cluster, ends: dict[str, tuple[int, Path]]) -> None:
    log = cluster.log(cluster.wait(ends["broken"][0], "FAILED"))
    assert "Traceback (most recent call last)" in log and "is not started again" in log and "try 2" not in log, log
    assert cluster.wait(ends["after the broken one"][0], "CANCELLED")


def test_a_loss_that_is_not_finite_ends_the_job(cluster: Cluster, ends: dict[str, tuple[int, Path]]) -> None:
    job, output = ends["not finite"]
    log = cluster.log(cluster.wait(job, "FAILED"))
    found = re.search(r"FloatingPointError: step (\d+): .*is not finite", log)
    assert found and "samples row-" in log and "is not started again" in log and "try 2" not in log, log
    assert (output / "checkpoints/latest").read_text() == f"step_{int(found[1]) - 1:07d}\n"


def test_a_full_disk_ends_the_job_and_a_cut_checkpoint_is_passed_over(
    cluster: Cluster, question_videos: Path, ends: dict[str, tuple[int, Path]]
) -> None:
    job, output = ends["on a full disk"]
    log = cluster.log(cluster.wait(job, "FAILED"))
    good = (output / "checkpoints/latest").read_text().strip()
    assert "OSError: [Errno 28] the checkpoint of step" in log and f"the last checkpoint, {good}, is as it" in log, log
    assert " needs " in log and " free; " in log and "is not started again" in log and "try 2" not in log
    subprocess.run(["mount", "-o", "remount,size=80m", output.parent], check=True)
    line = ("--nodes=2", SBATCH, *words(question_videos, output, "--parallel.ulysses_size", 1, "--data.max_bad_fraction", 0.0, *SMALL_DISK))
    cluster.wait(cluster.submit(*line, **ONE_RANK), "COMPLETED")
    newest = output / "checkpoints/step_0000008"
    largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    cut = largest.stat().st_size - 1
    os.truncate(largest, cut)
    log = cluster.log(cluster.wait(cluster.submit(*line, **ONE_RANK), "COMPLETED"))
    assert f"skipped checkpoint {newest}: {largest.name} has {cut} bytes instead of" in log and resumed(log) == [6], log
    assert [step for step, _ in losses(output)] == list(range(1, 9))


def test_a_time_limit_that_leaves_no_time_fails(cluster: Cluster, ends: dict[str, tuple[int, Path]]) -> None:
    """It would train one step per start, for ever."""
    job, output = ends["hurried"]
    facts = cluster.wait(job, "FAILED")
    assert "the time limit (00:03:00) leaves no time to train" in cluster.log(facts) and facts["Restarts"] == "0"
    assert (output / "checkpoints/latest").exists()


def test_conversion_answers_and_texts(whole: Path, cluster: Cluster, question_videos: Path, tmp_path: Path) -> None:
    """The jobs around training: the run's checkpoint leaves in VILA's layout and answers its questions; texts are prepared by an array."""
    checkpoint, slurm = whole / f"checkpoints/step_{STEPS:07d}", SBATCH.parent
    export = cluster.submit(slurm / "convert.sbatch", "export", checkpoint, tmp_path / "vila", "--format", "vila")
    back = cluster.submit(f"--dependency=afterok:{export}", slurm / "convert.sbatch", "import", tmp_path / "vila", tmp_path / "back")
    found = tmp_path / "answers.json"
    answers = ("answers", "--checkpoint", checkpoint, "--data", question_videos / "dataset", "--output", found)
    mesh = ("--parallel.ulysses_size", 2, "--parallel.ring_size", 1)
    answered = cluster.submit("--nodes=1", slurm / "evaluate.sbatch", *answers, *mesh)
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / f"texts/{number}.txt").write_text("What colour is the square? The square is red. " * 20)
    text = ("text", tmp_path / "texts", tmp_path / "parts", "--tokenizer", question_videos / "tokenizer.model", "--context_length", 32)
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


def test_lost_ranks_are_restarted_inside_the_allocation(whole: Path, beside: dict[str, Future]) -> None:
    """And what they do then is what the undisturbed run does, to the last bit."""
    done = beside["test_lost_ranks_are_restarted_inside_the_allocation"].result()
    assert len(done) >= 13 and done == losses(whole)[: len(done)]


def test_a_lost_node(beside: dict[str, Future]) -> None:
    beside["test_a_lost_node"].result()
