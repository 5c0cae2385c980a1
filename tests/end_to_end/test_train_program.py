"""The training command as a user starts it: torchrun and plain python, a signal on the way, real files on disk."""

import json
import signal
from pathlib import Path

import pytest
from programs import question_training, read_lines, send_signal, start

pytestmark = pytest.mark.end_to_end


def run(command: list) -> str:
    code, text = start(*command, timeout_s=300)
    assert code == 0, text
    return text


def test_signal_then_the_same_command_again(question_videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    line = question_training(question_videos, output, 2, "--parallel.ulysses_size", "2")
    returncode, text = send_signal(line, output, signal.SIGUSR1, after_step=2)
    assert returncode == 0, text
    stopped = json.loads((output / "interrupted").read_text())["step"]
    assert 2 <= stopped < 30 and f"stopped by a signal after step {stopped}" in text
    assert (output / "checkpoints" / "latest").read_text() == f"step_{stopped:07d}\n"
    assert f"step {stopped}/30 | loss" in text  # the live line

    text = run(line)
    assert f"steps {stopped + 1} to 30" in text and "finished after step 30" in text and not (output / "interrupted").exists()
    lines = read_lines(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_killed_rank_takes_the_job_down(question_videos: Path, tmp_path: Path) -> None:
    """The other rank does not hang, torchrun fails, and the same command goes on from the last checkpoint."""
    output = tmp_path / "run"
    line = question_training(question_videos, output, 2, "--checkpoint.save_interval", "3", "--checkpoint.async_save", "true")
    returncode, text = send_signal(line, output, signal.SIGKILL, after_step=8)
    assert returncode != 0 and "Signal 9 (SIGKILL)" in text and not (output / "interrupted").exists()
    text = run(line)
    resumed = int(text.split("resumed from ")[1].split("step_")[1][:7])
    assert resumed % 3 == 0 and resumed >= 3 and "finished after step 30" in text
    lines = read_lines(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))


def test_plain_python_is_one_rank(question_videos: Path, tmp_path: Path) -> None:
    text = run(question_training(question_videos, tmp_path / "run", 1, "--training.steps", "2"))
    assert "finished after step 2" in text
    assert (tmp_path / "run" / "loss.png").exists()
