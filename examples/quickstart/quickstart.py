"""The quickstart: make videos, preprocess them, train a tiny LongVILA on four ranks, stop and resume it, and ask it about unseen videos.

Every part that is already done is skipped, so a run that was interrupted goes on where it was. Exit status: 0 if the model answers better
than one that cannot see and no better than that with black frames, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/models/tiny.yaml"
NUM_RANKS = 4
MIN_QUESTIONS = 60
STOP_AT = 0.4  # of the steps: where the signal is sent


class Progress:
    """What was done, in OUTPUT_DIR/progress.json: seconds of each finished part, the step of the stop, the largest memory."""

    def __init__(self, path: Path):
        self._path = path
        self.facts: dict[str, Any] = {"seconds": {}, "memory_gib": 0.0} | (json.loads(path.read_text()) if path.exists() else {})

    def save(self) -> None:
        self._path.write_text(json.dumps(self.facts, indent=1) + "\n")

    def run(self, name: str, title: str, work: Callable[[], None]) -> None:
        """Do a part once."""
        if name in self.facts["seconds"]:
            print(f"\n== {title}: done before", flush=True)
            return
        print(f"\n== {title}", flush=True)
        start = time.monotonic()
        with MemoryWatch() as watch:
            work()
        self.facts["seconds"][name] = round(time.monotonic() - start, 1)
        self.facts["memory_gib"] = max(self.facts["memory_gib"], round(watch.peak_gib, 2))
        self.save()


class MemoryWatch:
    """The largest resident memory of this process and all it starts, summed (shared pages count once per process)."""

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._done.wait(0.5):
            total = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:  # it ended between the two lines
                    continue
            self.peak_gib = max(self.peak_gib, total / 2**30)


def run(*command: object) -> None:
    """Run a command of this repository; stop with its exit status if it fails."""
    print("$", *command, flush=True)
    status = subprocess.run([str(word) for word in command], env=environment(), cwd=ROOT).returncode
    if status:
        raise SystemExit(f"the command above failed with exit status {status}; run the quickstart again to continue")


def environment() -> dict[str, str]:
    """One thread per rank, because four ranks share the cores already; no GPU, because a machine need not have four."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def make_data(out: Path) -> None:
    run(sys.executable, HERE / "make_data.py", "--output_dir", out / "data")
    for split in ("train", "heldout"):
        tool = (sys.executable, ROOT / "tools/preprocess_video.py", "--input", out / f"data/{split}.jsonl")
        run(*tool, "--media_root", out / "data/videos", "--output", out / f"data/{split}")


def train_command(out: Path, train_config: Path) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(NUM_RANKS)]
    files = ["--config", str(MODEL), "--config", str(train_config), "--output_dir", str(out / "run")]
    data = ["--data.train", f"[{out}/data/train]", "--data.evaluation", f"[{out}/data/heldout]"]
    return [*launch, "-m", "megatron_longvila.train", *files, *data, "--data.tokenizer", f"{out}/data/tokenizer.model"]


def train_and_stop(out: Path, command: list[str], stop_step: int) -> None:
    """Start training, ask one rank to stop after `stop_step` as a scheduler would, and check that the run saved itself and left a mark."""
    print("$", *command, flush=True)
    beat = out / "run" / "heartbeat.json"
    beat.unlink(missing_ok=True)
    with subprocess.Popen(command, env=environment(), cwd=ROOT) as process:
        while process.poll() is None and not (beat.exists() and json.loads(beat.read_text())["step"] >= stop_step):
            time.sleep(0.1)
        if process.poll() is None:
            rank = json.loads(beat.read_text())["pid"]
            print(f"== sending SIGUSR1 to one rank (process {rank})", flush=True)
            os.kill(rank, signal.SIGUSR1)
    if process.returncode or not (out / "run/interrupted").exists():
        raise SystemExit(f"training was to stop by a signal, but ended with exit status {process.returncode} and no `interrupted` mark")


def evaluate(out: Path) -> None:
    checkpoint = out / "run/checkpoints" / (out / "run/checkpoints/latest").read_text().strip()
    where = ("--checkpoint", checkpoint, "--data", out / "data/heldout", "--output", out / "answers.json")
    run(sys.executable, ROOT / "tools/evaluate_answers.py", *where, "--blank_frames")


def draw_contact_sheet(out: Path, num_videos: int = 6) -> Path:
    """The frames the model sees of the first held-out videos, at the videos' own size, with questions and answers."""
    from matplotlib.figure import Figure

    from megatron_longvila.config_io import load
    from megatron_longvila.data.shards import open_dataset
    from megatron_longvila.data.video import decode_frames, select_frames

    dataset, config = open_dataset(out / "data/heldout"), load(out / "run/config.yaml")
    answers = json.loads((out / "answers.json").read_text())["shown"]["answers"]
    num_frames = config.data.video.num_frames
    figure = Figure(figsize=(1.3 * num_frames + 3.5, 1.35 * num_videos + 0.4))
    axes = figure.subplots(num_videos, num_frames + 1, width_ratios=[1] * num_frames + [2.7])
    figure.subplots_adjust(left=0.01, right=0.99, top=0.94, bottom=0.01, wspace=0.04, hspace=0.05)
    for row, sample in zip(axes, dataset.samples, strict=False):
        media = dataset.media[sample.media[0]]
        indices = select_frames(media.num_frames, media.duration_s, config.data.video)
        frames, _ = decode_frames(
            dataset.read(media),
            indices,
            image_size=media.width,
            preprocess="resize",
            fast_resize=False,
            timeout_s=config.data.video.timeout_s,
        )
        for place, axis in enumerate(row):
            axis.axis("off")
            if place < len(frames):
                axis.imshow(frames[place])
        for line, answer in enumerate(one for one in answers if one["sample_id"] == sample.id):
            verdict = "" if answer["correct"] else f"  (it is: {answer['expected']})"
            text = f"{answer['question']}\n  {answer['predicted']}{verdict}"
            row[num_frames].text(0.05, 0.72 - 0.32 * line, text, fontsize=8, color="black" if answer["correct"] else "red")
    figure.suptitle("Held-out videos: the frames the model sees, questions, and its answers (wrong ones in red)")
    figure.savefig(out / "contact_sheet.png", dpi=100)
    return out / "contact_sheet.png"


def judge(shown: dict[str, Any], blank: dict[str, Any]) -> list[str]:
    """What is wrong with the result; nothing if the model sees."""
    chance, problems = shown["question_only_accuracy"], []
    if shown["num_questions"] < MIN_QUESTIONS:
        problems.append(f"{shown['num_questions']} questions are fewer than {MIN_QUESTIONS}")
    if shown["low"] <= chance:
        problems.append(f"the accuracy's 99% lower bound {shown['low']:.3f} is not above {chance:.3f}, which needs no video")
    if blank["low"] > chance:
        problems.append(f"with black frames the 99% lower bound {blank['low']:.3f} is above {chance:.3f}: the text gives answers away")
    return problems


def report(out: Path, progress: Progress) -> list[str]:
    """Write summary.json, say what was done and return what is wrong."""
    result = json.loads((out / "answers.json").read_text())
    shown, blank = result["shown"]["summary"], result["blank"]["summary"]
    problems, example = judge(shown, blank), result["shown"]["answers"][0]
    files = {
        "videos": out / "data/videos", "dataset": out / "data/train", "checkpoint": Path(result["checkpoint"]),
        "metrics": out / "run/metrics.jsonl", "loss plot": out / "run/loss.png", "answers": out / "answers.json",
        "contact sheet": out / "contact_sheet.png", "summary": out / "summary.json",
    }  # fmt: skip
    facts = progress.facts
    summary = {
        "passed": not problems, "problems": problems, "accuracy": shown["accuracy"], "accuracy_low_99": shown["low"],
        "num_questions": shown["num_questions"], "chance": shown["question_only_accuracy"], "best_constant": shown["constant_accuracy"],
        "blank_accuracy": blank["accuracy"], "stopped_at_step": facts["stopped_at_step"], "seconds": facts["seconds"],
        "total_seconds": round(sum(facts["seconds"].values()), 1), "memory_gib": facts["memory_gib"],
        "example": example, "files": {name: str(path) for name, path in files.items()},
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    say(out, summary, shown)
    return problems


def say(out: Path, summary: dict[str, Any], shown: dict[str, Any]) -> None:
    """The end of the console output."""
    train, heldout = (len((out / f"data/{split}.jsonl").read_text().splitlines()) for split in ("train", "heldout"))
    example = summary["example"]
    print(
        f"\n== Done in {summary['total_seconds']:.0f} s, with at most {summary['memory_gib']:.1f} GiB of memory\n"
        f"Made {train + heldout} H.264 videos and trained a tiny LongVILA on {train} of them, on {NUM_RANKS} ranks that share each\n"
        f"sequence (ulysses 2 x ring 2); stopped it by a signal after step {summary['stopped_at_step']} and resumed it.\n\n"
        f"{shown['num_questions']} questions about the other {heldout} videos\n"
        f"  answered right:                   {shown['accuracy']:.1%} (99% interval {shown['low']:.1%} to {shown['high']:.1%})\n"
        f"  the same model, black frames:     {summary['blank_accuracy']:.1%}\n"
        f"  the best without the video:       {summary['chance']:.1%}\n\n"
        f"{example['sample_id']}.mp4: {example['question']}\n  model: {example['predicted']}\n  truth: {example['expected']}\n"
    )
    for name, path in summary["files"].items():
        print(f"  {name + ':':15}{path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs/quickstart", help="everything goes here [%(default)s]")
    parser.add_argument("--train_config", type=Path, default=HERE / "train.yaml", help="laid over the tiny model [%(default)s]")
    parser.add_argument("--restart", action="store_true", help="remove what an earlier run left in output_dir first")
    arguments = parser.parse_args(argv)
    out = arguments.output_dir.resolve()
    if arguments.restart and (out / "progress.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(out / "progress.json")
    steps = yaml.safe_load(arguments.train_config.read_text())["training"]["steps"]
    command = train_command(out, arguments.train_config.resolve())

    def first_half() -> None:
        train_and_stop(out, command, int(STOP_AT * steps))
        progress.facts["stopped_at_step"] = json.loads((out / "run/interrupted").read_text())["step"]

    progress.run("data", "Videos, questions and a tokenizer", lambda: make_data(out))
    progress.run("train", f"Training on {NUM_RANKS} ranks, to be stopped by a signal", first_half)
    progress.run("resume", "The same command again: training goes on", lambda: run(*command))
    progress.run("evaluate", "Questions about videos it has not seen", lambda: evaluate(out))
    progress.run("draw", "Contact sheet", lambda: print(draw_contact_sheet(out)))
    problems = report(out, progress)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
