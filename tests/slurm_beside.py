"""What runs as Slurm jobs on a second pair of nodes, beside the tests on the first: each is long, and mostly waits.

The five stages from raw rows to the needle test, with a preemption in stage 3: the outcome is the same as without. And nodes that are lost.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import yaml
from programs import ROOT, load_script, preprocess, read_lines, start
from slurm_cluster import Cluster
from slurm_runs import NODES, ONE_RANK, SBATCH, Slowness, await_end, await_log, await_rank, await_step, losses, resumed, words

QUICKSTART, SLURM = ROOT / "examples/quickstart", ROOT / "examples/slurm"
COUNTS = {"images": 48, "albums": 8, "short_videos": 16, "long_videos": 8, "stories": 8}
COUNTS |= {"short_passages": 16, "middle_passages": 4, "long_passages": 4}
STAGES = {
    "alignment": ("1_alignment", ["images/part_0000", "images/part_0001"]),
    "pretraining": ("2_pretraining", ["images/part_0000"]),
    "short_sft": ("3_short_sft", ["short"]),
    "context_extension": ("4_context_extension", ["passages"]),
    "long_sft": ("5_long_sft", ["long"]),
}
PREEMPTED, STAGE_STEPS = "short_sft", 6
TIMEOUT_S = 40  # parallel.timeout_s of the ranks that are lost
LAUNCHER_S = 60  # what torchrun, srun, the diagnosis and the interpreters take, on a busy machine
MESH = ("--parallel.ring_size", 2, "--parallel.ring_transport", "p2p")  # one rank a node: twice as many would take the time twice


def prepare_world(cluster: Cluster, folder: Path) -> None:
    """Rows, media and needles of the quickstart's world, prepared: the pictures by a job array of two tasks."""
    make_data = load_script(QUICKSTART / "make_data.py")
    make_data.main(["--output_dir", str(folder), *(f"--{name}={count}" for name, count in COUNTS.items()), "--needles=64"])
    array = cluster.submit(
        "--array=0-1", SLURM / "preprocess.sbatch", "video", folder / "images.jsonl", folder / "images", "--media_root", folder / "media"
    )
    for name in ("short", "long"):
        code, text = preprocess(folder / f"{name}.jsonl", folder / "media", folder / name)
        assert code == 0, text
    code, text = start(
        sys.executable, ROOT / "tools/preprocess_text.py", "--input", folder / "passages-short.jsonl", "--output", folder / "passages",
        "--tokenizer", folder / "tokenizer.model", "--context_length", 128,
    )  # fmt: skip
    assert code == 0, text
    for task in range(2):
        cluster.wait(f"{array}_{task}", "COMPLETED")
    parts = [json.loads((folder / f"images/part_000{part}/report.json").read_text()) for part in range(2)]
    assert [part["accepted"] for part in parts] == [COUNTS["images"] / 2] * 2
    stages = [
        {
            "name": name,
            "config": [str(QUICKSTART / f"stages/{config}.yaml")],
            "flags": {"data.train": [str(folder / one) for one in data], "training.steps": STAGE_STEPS},
        }
        for name, (config, data) in STAGES.items()
    ]
    flags = {"logging.interval": 1, "parallel.ring_transport": "p2p", "parallel.ulysses_size": 1}
    chain = {"base": [str(QUICKSTART / "model.yaml")], "tokenizer": "tokenizer.model", "flags": flags, "stages": stages}
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain))


def needle_words(world: Path, output: Path) -> list[object]:
    """Arguments of tools/evaluate_needle.py for the model that a chain in `output` ends with."""
    needles = world / "needles"
    return [
        "--checkpoint", output / f"stages/long_sft/checkpoints/step_{STAGE_STEPS:07d}", "--needles", needles / "needles.jsonl",
        "--haystack", needles / "haystack.mp4", "--lengths", "8,16", "--depths", "0,1", "--trials_per_cell", 2,
        "--protocol", "teacher_forcing", "--tokens_per_row", 1024, "--output", output / "needle", *MESH,
    ]  # fmt: skip


def what_was_found(output: Path) -> list[dict]:
    """The summary, and every trial of every cell with the tokens that the model said, without times and paths."""
    found = [json.loads((output / "needle/summary.json").read_text()), *read_lines(output / "needle/trials.jsonl")]
    return [{name: value for name, value in one.items() if name not in ("seconds", "checkpoint", "settings")} for one in found]


def run_chain(cluster: Cluster, data: Path, folder: Path) -> None:
    """The chain as jobs, with a preemption in stage 3 and one of the needle test, against the chain of one machine."""
    here, jobs, slow = folder / "here", folder / "jobs", Slowness(folder / "slow.json")
    prepare_world(cluster, folder)
    slow.set(step=0)
    line = (*NODES, folder / "chain.yaml", jobs)
    text = cluster.run("bash", SLURM / "chain.sh", *line, **slow.environment, **ONE_RANK)
    assert text.count("2 ranks = 2 nodes x 1") == len(STAGES)
    stages = list(map(int, text.splitlines()[-1].removeprefix("jobs: ").split()))
    line = (*NODES, SLURM / "evaluate.sbatch", "needle", *needle_words(folder, jobs))
    depends = (f"--dependency=afterok:{stages[-1]}", "--kill-on-invalid-dep=yes")
    needle = cluster.submit(*depends, *line, **slow.environment, **ONE_RANK)
    place = list(STAGES).index(PREEMPTED)
    cluster.wait(stages[place], "RUNNING")
    slow.set(step=2)
    await_step(jobs / "stages" / PREEMPTED, 2)
    cluster.preempt()
    cluster.wait(stages[place], "PENDING")
    slow.set(cell=60)
    cluster.wait(needle, "RUNNING", timeout_s=600)
    with cluster.grace(0):  # it does not leave by itself: nothing is to be saved
        cluster.preempt()
        cluster.wait(needle, "PENDING")
    slow.set(cell=0)
    assert cluster.wait(needle, "COMPLETED")["Restarts"] == "1"
    assert [cluster.show(job)["Restarts"] for job in stages] == [str(int(job == stages[place])) for job in stages]
    (step,) = resumed(cluster.log(cluster.show(stages[place])))
    assert 2 <= step < STAGE_STEPS  # the save of the preempted start, not once more from the beginning
    summary = json.loads((jobs / "summary.json").read_text())
    assert summary["finished"] and [stage["attempts"] for stage in summary["stages"]] == [1, 1, 2, 1, 1]
    stage = ("--chain", folder / "chain.yaml", "--output_dir", jobs, "--stage", "alignment")
    again = cluster.submit("--nodes=2", SBATCH, *stage, **ONE_RANK)

    chain = [ROOT / "tools/run_stages.py", "--chain", folder / "chain.yaml", "--output_dir", here, "--num_ranks", 2]
    code, text = start(sys.executable, *chain, timeout_s=600)
    assert code == 0, text
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    code, text = start(*torchrun, ROOT / "tools/evaluate_needle.py", *needle_words(folder, here), timeout_s=300)
    assert code == 0, text
    for name in STAGES:
        assert losses(jobs / "stages" / name) == losses(here / "stages" / name) and len(losses(here / "stages" / name)) == STAGE_STEPS
    assert (jobs / "needle/cells.csv").read_text() == (here / "needle/cells.csv").read_text()
    assert what_was_found(jobs) == what_was_found(here)
    assert "stage alignment has trained before" in cluster.log(cluster.wait(again, "COMPLETED"))


def lose_nodes(cluster: Cluster, data: Path, folder: Path) -> None:
    """A job that one node is enough for goes on there; one that needs two waits, says so, and goes on when the node is back.

    The last node, and the first one, where the batch script runs.
    """
    small, large, slow = folder / "small", folder / "large", Slowness(folder / "slow.json")
    slow.set(step=1.0)
    flags = ("--checkpoint.save_interval", 2, "--training.steps", 12, "--parallel.ulysses_size", 1)
    settings = slow.environment | ONE_RANK
    first = cluster.submit("--nodes=1-2", SBATCH, *words(data, small, *flags, "--parallel.ring_size", 1), **settings)
    second = cluster.submit("--nodes=2", SBATCH, *words(data, large, *flags), **settings)
    await_step(small, 3)
    await_step(large, 3)
    assert cluster.show(first)["NumNodes"] == "2"
    cluster.lose_node(cluster.names[1])
    slow.set(step=0.0)
    facts = cluster.wait(first, "COMPLETED")
    assert facts["NodeList"] == cluster.names[0] and facts["Restarts"] == "1"
    facts = cluster.show(second)
    assert facts["JobState"] == "PENDING" and facts["Restarts"] == "1"
    assert "Slurm has queued the job again: it waits until enough nodes are healthy" in cluster.log(facts), cluster.log(facts)
    cluster.start_node(cluster.names[1])
    slow.set(step=1.0)
    await_step(large, 6)
    cluster.lose_node(cluster.names[0])
    slow.set(step=0.0)
    facts = cluster.wait(second, "PENDING")
    cluster.start_node(cluster.names[0])
    facts = cluster.wait(second, "COMPLETED")
    # Or once more: a job that starts on the node just when its daemon does is missed there and queued again, in Slurm's own way.
    assert facts["Restarts"] in ("2", "3")
    for job, output, starts in ((first, small, 2), (second, large, 3)):
        assert [step for step, _ in losses(output)] == list(range(1, 13))
        # Once more than needed, too: a node that is back soon may still get the order to end the step that it lost, and ends the new one.
        assert cluster.log(cluster.show(job)).count("resumed from ") in (starts - 1, starts)


def lose_ranks(cluster: Cluster, data: Path, folder: Path) -> list[tuple[int, float]]:
    """A killed and a stopped rank, named with host and cause; a third loss before the next checkpoint is one too many.

    Returns the losses of the steps done.
    """
    output, slow = folder / "run", Slowness(folder / "slow.json")
    flags = ("--checkpoint.save_interval", 6, "--parallel.timeout_s", TIMEOUT_S)
    job = cluster.submit(*NODES, SBATCH, *words(data, output, *flags), LONGVILA_MAX_RESTARTS=1, **slow.environment)
    after = cluster.submit(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap=true")
    lost = [(3, signal.SIGKILL), (2, signal.SIGSTOP), (1, signal.SIGKILL)]
    for place, ((rank, number), step) in enumerate(zip(lost, (7, 13, 14), strict=True)):
        pid = await_rank(output, rank, step)
        os.kill(pid, number)
        await_end(pid, TIMEOUT_S + LAUNCHER_S)
        if place < 2:
            await_log(cluster, job, f"try {place + 2} on", LAUNCHER_S)
    facts = cluster.wait(job, "FAILED")
    log = cluster.log(facts)
    assert log.count("starting again inside the allocation from the last complete checkpoint") == 2, log
    first, last = cluster.names
    assert f"host {last}, rank 3: killed by signal 9 (SIGKILL)" in log and f"host {first}, rank 1: killed by signal 9 (SIGKILL)" in log, log
    assert f"host {last}, rank 2: stopped, process state T" in log and "lost ranks 2 times without a new checkpoint" in log, log
    assert facts["Restarts"] == "0" and resumed(log) == [6, 12]
    assert cluster.wait(after, "CANCELLED")
    return losses(output)
