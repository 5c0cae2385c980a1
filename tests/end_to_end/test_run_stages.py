"""A chain of three stages as a user runs it: a rank is killed in every stage, and what comes out is what an undisturbed chain gives."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import ROOT, environment, read_lines, start, write_question_videos

pytestmark = pytest.mark.end_to_end

STEPS, KILLED_AFTER = 14, 8
NAMES = ("alignment", "sft", "extension")
CHAIN = f"""
name: three stages
base: [{ROOT}/examples/models/tiny.yaml]
tokenizer: tokenizer.model
flags:
  data.train: [dataset]
  data.template: plain
  data.context_length: 128
  data.global_batch_size: 2
  model.llm.vocab_size: 448
  model.init_std: 0.05
  optimizer.warmup_steps: 2
  training.steps: {STEPS}
  checkpoint.save_interval: 6
stages:
  - name: alignment
    flags: {{training.trainable: [projector], optimizer.lr: 0.005}}
  - name: sft
    flags: {{training.trainable: [vision, projector, llm], optimizer.lr: 0.001}}
  - name: extension
    config: [extension.yaml]
"""
EXTENSION = """
model: {lora: {rank: 4}, llm: {rotary_base: 40000.0}}
training: {trainable: [lora, llm_norms]}
optimizer: {lr: 0.005}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight H.264 videos with one question each, a tokenizer and a chain file that names them by relative paths."""
    folder = tmp_path_factory.mktemp("chain")
    write_question_videos(folder)
    (folder / "chain.yaml").write_text(CHAIN)
    (folder / "extension.yaml").write_text(EXTENSION)
    return folder


def command(folder: Path, output: Path, *flags: str) -> list[str]:
    chain = ["--chain", str(folder / "chain.yaml"), "--output_dir", str(output), "--num_ranks", "2", "--parallel.ulysses_size", "2"]
    return [sys.executable, str(ROOT / "tools" / "run_stages.py"), *chain, *flags]


def disturb(words: list[str], stage: Path, kill: int | None) -> tuple[int, str]:
    """Run a chain until `stage` has done some steps; then kill its first rank, or (None) ask the chain to stop."""
    beat, deadline = stage / "heartbeat.json", time.monotonic() + 400
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not (beat.exists() and json.loads(beat.read_text())["step"] >= KILLED_AFTER):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        if kill is None:
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(json.loads(beat.read_text())["pid"], kill)
        text = process.communicate(timeout=120)[0]
    return process.returncode, text


def losses(output: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(output / "stages" / name / "metrics.jsonl")]


def test_killed_in_every_stage(folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, text = start(*command(folder, whole), timeout_s=600)
    assert code == 0 and "all 3 stages finished" in text, text
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["finished"] and [stage["name"] for stage in summary["stages"]] == list(NAMES)

    for name in NAMES:
        code, text = disturb(command(folder, killed), killed / "stages" / name, signal.SIGKILL)
        assert code == 3 and f"error: stage {name}: training ended with exit status" in text, text
        assert json.loads((killed / "summary.json").read_text())["stages"][NAMES.index(name)]["status"] == "failed"
    code, text = start(*command(folder, killed), timeout_s=600)
    assert code == 0 and "alignment: finished before" in text and "sft: finished before" in text, text

    again = json.loads((killed / "summary.json").read_text())
    for name, one, other in zip(NAMES, summary["stages"], again["stages"], strict=True):
        assert [step for step, _ in losses(whole, name)] == list(range(1, STEPS + 1))
        assert losses(killed, name) == losses(whole, name)  # every loss of every stage, to the last bit
        for field in ("steps", "tokens", "labelled_tokens", "frames", "final_loss", "parameters", "trainable"):
            assert other[field] == one[field], field
        assert (one["attempts"], other["attempts"]) == ((2, 3) if name == "extension" else (1, 2))
        assert one["frames"] > 0 and one["tokens"] > one["labelled_tokens"] > 0
    check_hand_over(whole, summary)

    before = (killed / "stages" / "sft" / "metrics.jsonl").stat().st_mtime_ns
    code, text = start(*command(folder, killed), timeout_s=600)
    assert code == 0 and text.count("finished before") == 3 and (killed / "stages" / "sft" / "metrics.jsonl").stat().st_mtime_ns == before


def check_hand_over(output: Path, summary: dict) -> None:
    """Each stage began with the weights of the one before, froze what it had to, and says what it is."""
    alignment, sft, extension = summary["stages"]
    assert alignment["input"] == "" and sft["input"] == alignment["checkpoint"] and extension["input"] == sft["checkpoint"]
    assert extension["checkpoint"] == summary["checkpoint"] == str(output / "stages" / "extension" / "merged")
    counts = [stage["parameters"]["total"] for stage in summary["stages"]]
    assert counts[0]["trained"] < counts[0]["frozen"] and counts[1]["frozen"] == 0
    assert counts[0]["trained"] + counts[0]["frozen"] == counts[1]["trained"]
    assert extension["parameters"]["lora"]["frozen"] == 0 < extension["parameters"]["lora"]["trained"]
    assert alignment["final_loss"] < alignment["first_loss"] and sft["first_loss"] < alignment["first_loss"]
    tokens = json.loads((output / "stages" / "extension" / "merged" / "tokens.json").read_text())
    assert tokens["rotary_base"] == 40000.0 and tokens["newline_ids"] and tokens["template"] == "plain"
    page = (output / "summary.html").read_text()
    assert "<svg" in page and all(f"<td>{name}</td>" in page for name in NAMES)
    assert not re.search("<script|<link|<img|src=|@import", page)  # it needs no other file


def test_stopped_by_a_signal(folder: Path, tmp_path: Path) -> None:
    """SIGTERM to the chain: the running stage saves itself, the chain ends with status 0 and goes on from there."""
    words = command(folder, tmp_path / "run", "--stages.sft.training.steps", "4", "--stages.extension.training.steps", "4")
    code, text = disturb(words, tmp_path / "run" / "stages" / "alignment", None)
    assert code == 0 and "stopped by a signal at stage alignment" in text, text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [stage["status"] for stage in summary["stages"]] == ["interrupted", "pending", "pending"]
    assert (tmp_path / "run" / "stages" / "alignment" / "interrupted").exists()
