"""What examples/finetune/run.sh does when a step of it fails or is stopped, with a stand-in for python."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Writes down each step, and leaves what the script looks at afterwards.
STAND_IN = """#!/bin/bash
case "$*" in
  *"convert_checkpoint.py import"*) step=import; mkdir -p "$4"; touch "$4/complete.json" ;;
  *"convert_checkpoint.py verify"*) step=verify ;;
  *preprocess_video.py*) step=preprocess ;;
  *megatron_longvila.train*) step=train; mkdir -p "$OUTPUT/run/checkpoints"; echo step_0000004 >"$OUTPUT/run/checkpoints/latest"
    rm -f "$OUTPUT/run/interrupted"; [ "$STOPPED" = "" ] || touch "$OUTPUT/run/interrupted" ;;
  *"convert_checkpoint.py export"*) step=export ;;
  *) exit 9 ;;
esac
echo "$step" >>"$STEPS"
[ "$FAILS" != "$step" ]
"""


@pytest.fixture
def run(tmp_path: Path):
    """Run the script; returns its exit status and the steps that it began."""
    python, steps, output = tmp_path / "python", tmp_path / "steps", tmp_path / "output"
    python.write_text(STAND_IN)
    python.chmod(stat.S_IRWXU)

    def run(fails: str = "", stopped: str = "") -> tuple[int, list[str]]:
        steps.write_text("")
        settings = {"PYTHON": str(python), "STEPS": str(steps), "OUTPUT": str(output), "FAILS": fails, "STOPPED": stopped}
        words = ["bash", str(ROOT / "examples/finetune/run.sh"), "model", "rows.jsonl", "media", str(output)]
        done = subprocess.run(words, env=os.environ | settings, capture_output=True, text=True, timeout=60)
        return done.returncode, steps.read_text().split()

    return run


def test_a_model_that_was_not_proved_is_not_trained(run) -> None:
    assert run(fails="verify") == (1, ["import", "verify"])
    assert run(fails="verify") == (1, ["verify"])
    assert run() == (0, ["verify", "preprocess", "train", "export", "verify"])
    assert run() == (0, ["preprocess", "train", "export", "verify"])


def test_another_import_is_proved_again(run, tmp_path: Path) -> None:
    assert run(fails="preprocess") == (1, ["import", "verify", "preprocess"])
    shutil.rmtree(tmp_path / "output/imported")
    assert run(fails="verify") == (1, ["import", "verify"])
    assert run(fails="verify") == (1, ["verify"])


def test_half_a_training_is_not_exported(run) -> None:
    assert run(stopped="yes") == (1, ["import", "verify", "preprocess", "train"])
    assert run() == (0, ["preprocess", "train", "export", "verify"])
