"""The command lines as a user types them: own processes, real files, and a time limit, because bad input must never hang a run."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

from media import video_bytes
from tiny_tokenizers import write_sentencepiece

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """This repository's package before all others, one thread per rank."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def start(*words: object, timeout_s: float = 240) -> tuple[int, str]:
    """Run a command to its end; returns its exit code and all it wrote. AssertionError with what it wrote past the limit."""
    with subprocess.Popen(list(map(str, words)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            text = process.communicate(timeout=timeout_s)[0]
        except subprocess.TimeoutExpired:
            text = ""
            process.terminate()  # torchrun passes it on to its ranks, which a kill would leave running
            with contextlib.suppress(subprocess.TimeoutExpired):
                text = process.communicate(timeout=60)[0]
            process.kill()
            raise AssertionError(f"still running after {timeout_s} s: {words}\n{text}") from None
    return process.returncode, text


def preprocess(rows: Path, media_root: Path, output: Path, *flags: object) -> tuple[int, str]:
    """tools/preprocess_video.py"""
    paths = ["--input", rows, "--media_root", media_root, "--output", output]
    return start(sys.executable, ROOT / "tools" / "preprocess_video.py", *paths, "--num_workers", 1, *flags)


def train(output: Path, datasets: list[Path], tokenizer: Path, *flags: object, num_ranks: int = 2) -> tuple[int, str]:
    """One epoch of megatron_longvila.train with the tiny model; flags override."""
    return start(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_ranks,
        "-m", "megatron_longvila.train", "--config", ROOT / "examples" / "models" / "tiny.yaml", "--output_dir", output,
        "--data.train", json.dumps(list(map(str, datasets))), "--data.tokenizer", tokenizer, "--data.template", "plain",
        "--model.llm.vocab_size", 448, "--data.context_length", 128, "--data.global_batch_size", 2, "--logging.sample_ids", "true",
        "--checkpoint.save_at_end", "false", *flags,
    )  # fmt: skip


def question_training(data: Path, output: Path, num_ranks: int, *flags: str) -> list[str]:
    """The command that trains the tiny model for 30 steps on what `write_question_videos` wrote; flags override."""
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


def load_script(path: Path) -> ModuleType:
    """A script of tools/ or examples/ as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_question_videos(folder: Path) -> None:
    """Eight H.264 videos with one question each, preprocessed into folder/dataset, and folder/tokenizer.model."""
    (folder / "media").mkdir()
    rows = []
    for number in range(8):
        (folder / "media" / f"{number}.mp4").write_bytes(video_bytes(range(10 + number)))
        turns = [{"from": "human", "value": "<video>\nHow many?"}, {"from": "gpt", "value": f"There are {number} circles."}]
        rows.append({"id": f"row-{number}", "video": f"{number}.mp4", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = preprocess(folder / "rows.jsonl", folder / "media", folder / "dataset")
    assert code == 0, text
    write_sentencepiece(folder / "tokenizer.model")


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
