"""A run on one GPU that is stopped by a signal and resumed: weights, optimizer state and data are those of the run that was not stopped."""

from __future__ import annotations

import signal

import pytest
from programs import question_training, read_lines, send_signal, start

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_is_bit_equal(precision, question_videos, tmp_path):
    """With the reference attention, whose sums have one order; cuDNN's and flash's backward add up dQ in any."""
    flags = "--training.precision", precision, "--model.attention_backend", "reference"
    whole, stopped = (question_training(question_videos, tmp_path / name, 1, *flags) for name in ("whole", "stopped"))
    code, text = start(*whole)
    assert code == 0, text
    code, text = send_signal(stopped, tmp_path / "stopped", signal.SIGTERM, after_step=5)
    assert code == 0 and "stopped by a signal" in text, text
    assert len(read_lines(tmp_path / "stopped" / "metrics.jsonl")) < 30
    code, text = start(*stopped)
    assert code == 0 and "resumed from" in text, text
    runs = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped")]
    for field in ("step", "loss", "grad_norm", "lr"):
        assert [line[field] for line in runs[0]] == [line[field] for line in runs[1]], field
