"""Conversion as users meet it: the documented fine-tuning of a released model, and stage 1 from separate parts, from import to export."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
from media import video_bytes
from programs import ROOT, environment, preprocess, start

pytestmark = pytest.mark.end_to_end

CONVERT = [sys.executable, ROOT / "tools" / "convert_checkpoint.py"]
# The tiny model on a CPU: a frame costs 4 tokens, or 9 with the odd grid, and a newline. One video a row.
SMALL = [
    "--data.context_length", "96", "--data.global_batch_size", "2", "--data.video.num_frames", "7", "--training.precision", "fp32",
    "--training.recompute", "none", "--training.recompute_vision", "false", "--optimizer.lr", "0.001",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """rows.jsonl in the form the README shows, and the videos it names."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(4):
        (folder / f"{number}.mp4").write_bytes(video_bytes(range(9 + number)))
        turns = [{"from": "human", "value": "<video>\nHow many?"}, {"from": "gpt", "value": f"There are {number} circles."}]
        lines.append(json.dumps({"id": f"clip-{number}", "video": f"{number}.mp4", "conversations": turns}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(*words: object) -> str:
    code, text = start(*words)
    assert code == 0, text
    return text


def moved_tensors(first: Path, second: Path) -> tuple[int, int, str]:
    """(tensors that differ, tensors compared, everything that inspect says)."""
    code, text = start(*CONVERT, "inspect", first, second)
    assert code in (0, 1), text
    found = re.search(r"(\d+) of (\d+) tensors have other values", text)
    return (int(found[1]), int(found[2]), text) if found else (0, 0, text)


def test_the_documented_fine_tuning(rows, tmp_path):
    hf_models.save_vila(tmp_path / "model")
    output = tmp_path / "output"
    command = ["bash", ROOT / "examples/finetune/run.sh", tmp_path / "model", rows / "rows.jsonl", rows, output]
    settings = environment() | {"NUM_RANKS": "2", "PYTHON": sys.executable}
    line = [str(word) for word in (*command, *SMALL, "--training.epochs", "2", "--parallel.ulysses_size", "2")]
    done = subprocess.run(line, env=settings, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nthe same model\n") == 2, done.stdout  # after the import, and after the export
    metrics = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4 and metrics[-1]["loss"] < metrics[0]["loss"]

    # What was exported has the form of what was imported: all tensors, all files; and everything that should has been trained.
    changed, compared, text = moved_tensors(tmp_path / "model", output / "exported")
    assert compared == 109 and changed == 80, text  # the tower's last layer, post-norm and pooling head do not train
    assert "only the" not in text and "file " not in text, text
    names = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert names <= {str(path.relative_to(output / "exported")) for path in (output / "exported").rglob("*") if path.is_file()}

    # The same command again trains nothing and exports the same.
    done = subprocess.run(line, env=settings, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((output / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_stage_1_from_separate_parts(rows, tmp_path):
    """A language model and a tower come in, a projector is initialised and trained, and the whole goes out in VILA's layout."""
    hf_models.save_llm(tmp_path / "llm", tied=True)
    hf_models.save_siglip(tmp_path / "tower", hf_models.ODD_GRID)
    start_from, exported = tmp_path / "start", tmp_path / "exported"
    run(*CONVERT, "import", tmp_path / "llm", start_from, "--vision_tower", tmp_path / "tower")
    code, text = preprocess(rows / "rows.jsonl", rows, tmp_path / "dataset")
    assert code == 0, text
    run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "megatron_longvila.train",
        "--config", start_from / "config.yaml", "--config", ROOT / "examples/stages/stage1_alignment.yaml", *SMALL,
        "--checkpoint.load", start_from, "--data.train", json.dumps([str(tmp_path / "dataset")]), "--output_dir", tmp_path / "run",
        "--parallel.tp_size", 2, "--training.epochs", 3, "--data.context_length", 160, "--data.tokenizer", start_from / "source" / "llm",
    )  # fmt: skip
    checkpoints = tmp_path / "run" / "checkpoints"
    trained = checkpoints / (checkpoints / "latest").read_text().strip()
    run(*CONVERT, "export", trained, exported, "--format", "vila")
    assert "the same model" in run(*CONVERT, "verify", trained, exported)
    # The parts that did not train are what they were, to the last bit; the projector is new.
    for part, source in (("llm", "llm"), ("vision_tower", "tower")):
        changed, _, text = moved_tensors(tmp_path / source, exported / part)
        assert changed == 0 and "only the" not in text, text
        assert "the same model" in run(*CONVERT, "verify", tmp_path / source, exported)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert os.path.getsize(exported / "mm_projector" / "model.safetensors") > 0
