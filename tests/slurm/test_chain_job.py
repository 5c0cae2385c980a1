"""The five stages as Slurm jobs, from raw rows to the needle test, with a preemption in stage 3: the outcome is the same as without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from programs import ROOT, load_script, preprocess, read_lines, start
from slurm_cluster import GRACE_S, Cluster
from slurm_runs import Slowness, await_step, losses

pytestmark = pytest.mark.slurm

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
PREEMPTED, STEPS = "short_sft", 6
MESH = ("--parallel.ulysses_size", 2, "--parallel.ring_size", 2, "--parallel.ring_transport", "p2p")


@pytest.fixture(scope="module")
def world(cluster: Cluster, tmp_path_factory) -> Path:
    """Rows, media and needles of the quickstart's world, prepared: the pictures by a job array of two tasks."""
    folder = tmp_path_factory.mktemp("world")
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
            "flags": {"data.train": [str(folder / one) for one in data], "training.steps": STEPS},
        }
        for name, (config, data) in STAGES.items()
    ]
    flags = {"logging.interval": 1, "parallel.ring_transport": "p2p"}
    chain = {"base": [str(QUICKSTART / "model.yaml")], "tokenizer": "tokenizer.model", "flags": flags, "stages": stages}
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain))
    return folder


def needle_words(world: Path, output: Path) -> list[object]:
    """Arguments of tools/evaluate_needle.py for the model that a chain in `output` ends with."""
    needles = world / "needles"
    return [
        "--checkpoint", output / f"stages/long_sft/checkpoints/step_{STEPS:07d}", "--needles", needles / "needles.jsonl",
        "--haystack", needles / "haystack.mp4", "--lengths", "8,16", "--depths", "0,1", "--trials_per_cell", 2,
        "--protocol", "teacher_forcing", "--tokens_per_row", 1024, "--output", output / "needle", *MESH,
    ]  # fmt: skip


def what_was_found(output: Path) -> list[dict]:
    """The summary, and every trial of every cell with the tokens that the model said, without times and paths."""
    found = [json.loads((output / "needle/summary.json").read_text()), *read_lines(output / "needle/trials.jsonl")]
    return [{name: value for name, value in one.items() if name not in ("seconds", "checkpoint", "settings")} for one in found]


def test_the_chain_with_a_preemption_in_stage_3(world: Path, cluster: Cluster, tmp_path: Path) -> None:
    here, jobs, slow = tmp_path / "here", tmp_path / "jobs", Slowness(tmp_path / "slow.json")
    slow.set(step=0)
    text = cluster.run("bash", SLURM / "chain.sh", "--nodes=2", "--cpus-per-task=2", world / "chain.yaml", jobs, **slow.environment)
    assert text.count("4 ranks = 2 nodes x 2") == len(STAGES)
    stages = list(map(int, text.splitlines()[-1].removeprefix("jobs: ").split()))
    needle = cluster.submit(
        f"--dependency=afterok:{stages[-1]}", "--kill-on-invalid-dep=yes", "--nodes=2", "--cpus-per-task=2", SLURM / "evaluate.sbatch",
        "needle", *needle_words(world, jobs),
    )  # fmt: skip
    place = list(STAGES).index(PREEMPTED)
    cluster.wait(stages[place], "RUNNING", timeout_s=400)
    slow.set(step=2)
    await_step(jobs / "stages" / PREEMPTED, 2)
    cluster.preempt()
    cluster.wait(stages[place], "PENDING")
    slow.set(step=0)
    cluster.wait(needle, "RUNNING", timeout_s=600)
    cluster.set_grace(2)  # it does not leave by itself: nothing is to be saved
    cluster.preempt()
    cluster.wait(needle, "PENDING")
    cluster.set_grace(GRACE_S)
    assert cluster.wait(needle, "COMPLETED")["Restarts"] == "1"
    assert [cluster.show(job)["Restarts"] for job in stages] == [str(int(job == stages[place])) for job in stages]
    summary = json.loads((jobs / "summary.json").read_text())
    assert summary["finished"] and [stage["attempts"] for stage in summary["stages"]] == [1, 1, 2, 1, 1]

    chain = [ROOT / "tools/run_stages.py", "--chain", world / "chain.yaml", "--output_dir", here, "--num_ranks", 4]
    code, text = start(sys.executable, *chain, timeout_s=600)
    assert code == 0, text
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 4)
    code, text = start(*torchrun, ROOT / "tools/evaluate_needle.py", *needle_words(world, here), timeout_s=300)
    assert code == 0, text
    for name in STAGES:
        assert losses(jobs / "stages" / name) == losses(here / "stages" / name) and len(losses(here / "stages" / name)) == STEPS
    assert (jobs / "needle/cells.csv").read_text() == (here / "needle/cells.csv").read_text()
    assert what_was_found(jobs) == what_was_found(here)
    again = cluster.submit(
        "--nodes=2", SLURM / "train.sbatch", "--chain", world / "chain.yaml", "--output_dir", jobs, "--stage", "alignment"
    )
    assert "stage alignment has trained before" in cluster.log(cluster.wait(again, "COMPLETED"))
