"""What becomes of a job when a rank is killed, stopped or stuck, raises, sees a NaN or finds the disk full: real ranks under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from programs import ROOT, environment, read_lines, start
from small_disk import small_disk

pytestmark = pytest.mark.kill

TIMEOUT_S = 12  # parallel.timeout_s of the ranks here
LAUNCHER_S = 10  # what torchrun and the interpreter take to leave, on a busy machine


def command(data: Path, output: Path, *flags: object, harm: tuple | None = None) -> list[str]:
    """Two ranks, a checkpoint every second step; with `harm`, what harmful_train.py takes."""
    program = ["-m", "megatron_longvila.train"] if harm is None else [ROOT / "tests" / "harmful_train.py", *harm]
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *program,
        "--config", ROOT / "examples/models/tiny.yaml", "--output_dir", output, "--data.train", f"[{data}/dataset]",
        "--data.tokenizer", f"{data}/tokenizer.model", "--data.template", "plain", "--model.llm.vocab_size", 448,
        "--data.global_batch_size", 2, "--data.context_length", 128, "--training.steps", 400, "--parallel.ulysses_size", 2,
        "--parallel.timeout_s", TIMEOUT_S, "--checkpoint.save_interval", 2, *flags,
    ]  # fmt: skip
    return list(map(str, words))


def diagnose(output: Path, since_s: float, text: str) -> tuple[int, str]:
    """Exit code and report; `text` is what the launcher wrote."""
    log = output.parent / "launcher.log"
    log.write_text(text)
    return start(sys.executable, "-m", "megatron_longvila.diagnose", output, "--since", since_s, "--exit_status", 1, "--log", log)


def beat(output: Path, rank: int) -> dict:
    return json.loads((output / "heartbeats" / f"rank_{rank:05d}.json").read_text())


def harm_from_outside(line: list[str], output: Path, rank: int, number: int) -> tuple[float, str]:
    """Send a signal to a rank after its third step; returns how long the job then lived and what it wrote."""
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not ((output / "heartbeat.json").exists() and beat(output, rank)["step"] >= 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        began = time.monotonic()
        os.kill(beat(output, rank)["pid"], number)
        text = process.communicate(timeout=TIMEOUT_S + 60)[0]
    assert process.returncode == 1, text
    return time.monotonic() - began, text


def nobody_left(output: Path) -> bool:
    """No process of the run is there any more; the watch leaves within a second."""
    deadline = time.monotonic() + 10
    while any(str(output) in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_request_to_stop_that_comes_while_the_ranks_start(question_videos: Path, tmp_path: Path) -> None:
    """It waits until training can follow it."""
    output, since_s = tmp_path / "run", time.time()
    with subprocess.Popen(
        command(question_videos, output), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (output / "heartbeats" / "rank_00001.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        while process.poll() is None and time.monotonic() < deadline:  # a batch script asks until it has been heard
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat(output, 1)["pid"], signal.SIGUSR1)
            time.sleep(0.5)
        text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "stopped by a signal after step 1;" in text, text
    assert (output / "checkpoints" / "latest").read_text() == "step_0000001\n"
    code, said = diagnose(output, since_s, text)
    assert code == 0 and "was asked to stop, saved and left" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(question_videos: Path, tmp_path: Path, rank: int) -> None:
    output, since_s = tmp_path / "run", time.time()
    took_s, text = harm_from_outside(command(question_videos, output), output, rank, signal.SIGKILL)
    assert took_s < TIMEOUT_S + LAUNCHER_S, text
    code, said = diagnose(output, since_s, text)
    first, second, *_ = said.splitlines()
    last = beat(output, rank)
    assert code == 10, said
    assert first == f"host {last['host']}, rank {rank}: killed by signal 9 (SIGKILL) (pid {last['pid']})"
    assert f"step {last['step']}, phase {last['phase']}" in second and (last["phase"] == "save" or last["sample_ids"])
    assert all(name in second for name in last["sample_ids"]) and last["step"] >= 3
    assert f"rank {1 - rank} lost touch and ended because of it" in said
    assert nobody_left(output)


def test_a_stopped_rank_is_named_before_the_job_falls(question_videos: Path, tmp_path: Path) -> None:
    output, since_s = tmp_path / "run", time.time()
    took_s, text = harm_from_outside(command(question_videos, output), output, 1, signal.SIGSTOP)
    assert took_s < TIMEOUT_S + LAUNCHER_S, text
    code, said = diagnose(output, since_s, text)
    first, *rest = said.splitlines()
    assert code == 10 and "rank 1: stopped, process state T (stopped)" in first, said
    # The collective and who called it, in the step or in a save.
    assert any(re.search(r"rank 0 waited in \w+ at \S+\.py:\d+ in \w+ for \d+ s", line) for line in rest), said
    assert "does not go on: state T (stopped)" in text and text.index("does not go on") < text.index("is killed: its peers")
    if shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        assert "train_step (megatron_longvila/training/loop.py" in said or "fit (megatron_longvila/training/loop.py" in said
    else:
        assert "py-spy is not installed" in said
    assert nobody_left(output)


def test_a_stuck_rank_is_named_with_what_it_does(question_videos: Path, tmp_path: Path) -> None:
    output, since_s = tmp_path / "run", time.time()
    status, text = start(*command(question_videos, output, harm=("sleep", 1, 3)))
    assert status == 1, text
    code, said = diagnose(output, since_s, text)
    assert code == 10 and "rank 1: stuck, process state S (sleeping)" in said.splitlines()[0], said
    assert "its own account:" in said and "time.sleep(600)" in said and "rank 0 waited in " in said
    lived_s = json.loads((output / "failures" / "rank_00000.json").read_text())["time_s"] - beat(output, 1)["time_s"]
    assert lived_s < TIMEOUT_S + LAUNCHER_S, text
    assert nobody_left(output)


def test_an_exception_is_final_and_its_traceback_stands_first(question_videos: Path, tmp_path: Path) -> None:
    output, since_s = tmp_path / "run", time.time()
    code, text = start(*command(question_videos, output, harm=("exception", 1, 3)))
    assert code == 1, text
    code, said = diagnose(output, since_s, text)
    assert code == 20 and "rank 1: KeyError: 'harm was done'" in said.splitlines()[0], said
    assert 'raise KeyError("harm was done")' in said and "step 3, phase step, samples row-" in said
    assert "starting again would end the same way" in said
    assert "KeyError" in (output / "logs" / "rank_00001.log").read_text()
    assert nobody_left(output)


def test_a_nan_gradient_stops_before_the_weights_change(question_videos: Path, tmp_path: Path) -> None:
    output, since_s = tmp_path / "run", time.time()
    code, text = start(*command(question_videos, output, harm=("nan", 1, 3)))
    assert code == 1, text
    code, said = diagnose(output, since_s, text)
    first = said.splitlines()[0]
    assert code == 20 and "FloatingPointError: step 3: the gradient is not finite; rank " in first and "samples row-" in first, said
    assert "rank 1: 1 parameters from language_model.decoder.final_layernorm.weight on" in first, said  # where the harm was done
    assert (output / "checkpoints" / "latest").read_text() == "step_0000002\n"


def test_a_full_disk_then_room_and_a_cut_checkpoint(question_videos: Path, tmp_path: Path) -> None:
    """The run stops with the sizes and its checkpoint; with room it goes on; a checkpoint cut short is named and passed over."""
    flags = ("--training.steps", 8, "--checkpoint.keep_last", 3)
    with small_disk(tmp_path / "disk", "12m") as disk:
        output, since_s = disk / "run", time.time()
        code, text = start(*command(question_videos, output, *flags))
        assert code == 1, text
        code, said = diagnose(output, since_s, text)
        first = said.splitlines()[0]
        good = (output / "checkpoints" / "latest").read_text().strip()
        assert code == 20 and "OSError: [Errno 28] the checkpoint of step" in first and f"the last checkpoint, {good}, is as it" in first
        assert " needs " in first and " free; " in first, said

        subprocess.run(["mount", "-o", "remount,size=80m", disk], check=True)
        code, text = start(*command(question_videos, output, *flags))
        assert code == 0 and f"{good} (step" in text and "finished after step 8" in text, text
        assert [line["step"] for line in read_lines(output / "metrics.jsonl")] == list(range(1, 9))

        newest = output / "checkpoints" / "step_0000008"
        largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        cut = largest.stat().st_size - 1
        os.truncate(largest, cut)
        code, text = start(*command(question_videos, output, *flags))
        assert code == 0 and f"skipped checkpoint {newest}: {largest.name} has {cut} bytes instead of" in text, text
        assert "step_0000006 (step 6" in text and "finished after step 8" in text
