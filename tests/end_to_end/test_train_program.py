"""The training command as a user starts it: torchrun and plain python, a signal on the way, real files on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import ROOT, environment, start, write_question_videos

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight H.264 videos with one question each, preprocessed by the tool, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_question_videos(folder)
    return folder


def run(command: list) -> str:
    code, text = start(*command, timeout_s=300)
    assert code == 0, text
    return text


def command(data: Path, output: Path, num_ranks: int, *flags: str) -> list[str]:
    launch = [sys.executable]
    if num_ranks > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    return [
        *launch, "-m", "megatron_longvila.train", "--config", str(ROOT / "examples/models/tiny.yaml"), "--output_dir", str(output),
        "--data.train", f"[{data}/dataset]", "--data.tokenizer", f"{data}/tokenizer.model", "--data.template", "plain",
        "--model.llm.vocab_size", "448", "--data.global_batch_size", "2", "--data.context_length", "128", "--optimizer.lr", "0.001",
        "--training.steps", "30", *flags,
    ]  # fmt: skip


def send_signal(line: list[str], output: Path, number: int, after_step: int) -> tuple[int, str]:
    """Start a training command and send a signal to rank 0 after a step; returns the exit code and the output."""
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        beat, deadline = output / "heartbeat.json", time.monotonic() + 120
        while not (beat.exists() and json.loads(beat.read_text())["step"] >= after_step):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        os.kill(json.loads(beat.read_text())["pid"], number)
        text = process.communicate(timeout=120)[0]
    return process.returncode, text


def test_signal_then_the_same_command_again(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    line = command(data, output, 2, "--parallel.ulysses_size", "2")
    returncode, text = send_signal(line, output, signal.SIGUSR1, after_step=2)
    assert returncode == 0, text
    stopped = json.loads((output / "interrupted").read_text())["step"]
    assert 2 <= stopped < 30 and f"stopped by a signal after step {stopped}" in text
    assert (output / "checkpoints" / "latest").read_text() == f"step_{stopped:07d}\n"
    assert f"step {stopped}/30 | loss" in text  # the live line

    text = run(line)
    assert f"steps {stopped + 1} to 30" in text and "finished after step 30" in text and not (output / "interrupted").exists()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_killed_rank_takes_the_job_down(data: Path, tmp_path: Path) -> None:
    """The other rank does not hang, torchrun fails, and the same command goes on from the last checkpoint."""
    output = tmp_path / "run"
    line = command(data, output, 2, "--checkpoint.save_interval", "3", "--checkpoint.async_save", "true")
    returncode, text = send_signal(line, output, signal.SIGKILL, after_step=8)
    assert returncode != 0 and "Signal 9 (SIGKILL)" in text and not (output / "interrupted").exists()
    text = run(line)
    resumed = int(text.split("resumed from ")[1].split("step_")[1][:7])
    assert resumed % 3 == 0 and resumed >= 3 and "finished after step 30" in text
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))


def test_plain_python_is_one_rank(data: Path, tmp_path: Path) -> None:
    text = run(command(data, tmp_path / "run", 1, "--training.steps", "2"))
    assert "finished after step 2" in text
    assert (tmp_path / "run" / "loss.png").exists()
