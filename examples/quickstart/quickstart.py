"""The quickstart: all five stages of LongVILA on a world of generated videos and texts, on four ranks, then the needle test.

Stage 3 ends with a model of videos of up to 8 frames, stage 4 extends its context on text, stage 5 trains it on videos of up to 64 frames.
The needle test then hides a card that no training example shows in videos of 8 to 64 frames and asks for it, before and after.

Every part that is already done is skipped, so a run that was interrupted goes on where it was. Exit status: 0 if the last model finds the
needles and those who cannot see them do not, else 1.
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
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
NUM_RANKS = 4
MEDIA = ("images", "albums", "short", "long", "stories")
TEXTS = {"passages-short": 128, "passages-middle": 320, "passages-long": 512}  # tokens of a row
# Which folders of data/ the stages of chain.yaml read.
DATA = {
    "tower": ("images",),
    "language_model": ("stories", "passages-short"),
    "alignment": ("images",),
    "pretraining": ("albums",),
    "short_sft": ("short",),
    "context_extension": ("passages-short", "passages-middle", "passages-long"),
    "long_sft": ("long",),
}
STOPPED_STAGE, STOP_AT = "short_sft", 0.4  # where the signal is sent, and after which share of its steps
FRAMES, TOKENS, DEPTHS = "8,16,32,48,64", "60,120,240,480", "0,0.25,0.5,0.75,1"
MIN_TRIALS, MIN_ACCURACY, MIN_TEXT_ACCURACY, MIN_GAP = 100, 0.95, 0.6, 0.2
MM_SP = ("--parallel.ulysses_size", "2", "--parallel.ring_size", "2")


class Progress:
    """What was done, in OUTPUT_DIR/progress.json: seconds of each finished part, where the run was stopped, the largest memory."""

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


def make_data(out: Path, counts: list[str]) -> None:
    data = out / "data"
    run(sys.executable, HERE / "make_data.py", "--output_dir", data, *counts)
    for name in MEDIA:
        tool = (sys.executable, ROOT / "tools/preprocess_video.py", "--input", data / f"{name}.jsonl")
        run(*tool, "--media_root", data / "media", "--output", data / name)
    for name, length in TEXTS.items():
        tool = (sys.executable, ROOT / "tools/preprocess_text.py", "--input", data / f"{name}.jsonl", "--output", data / name)
        run(*tool, "--tokenizer", data / "tokenizer.model", "--context_length", length)


def chain_command(out: Path, chain: Path) -> list[str]:
    """tools/run_stages.py on all stages of the chain file, each with its data."""
    words = [sys.executable, str(ROOT / "tools/run_stages.py"), "--chain", str(chain), "--output_dir", str(out / "chain")]
    words += ["--num_ranks", str(NUM_RANKS), "--data.tokenizer", str(out / "data/tokenizer.model")]
    for stage in yaml.safe_load(chain.read_text())["stages"]:
        folders = ",".join(str(out / "data" / folder) for folder in DATA[stage["name"]])
        words += [f"--stages.{stage['name']}.data.train", f"[{folders}]"]
    return words


def train_and_stop(out: Path, command: list[str], stop_step: int) -> None:
    """Start the chain, ask it to stop in the middle of a stage as a scheduler would, and check that the stage saved itself."""
    print("$", *command, flush=True)
    stage = out / "chain/stages" / STOPPED_STAGE
    beat = stage / "heartbeat.json"
    beat.unlink(missing_ok=True)
    with subprocess.Popen(command, env=environment(), cwd=ROOT) as process:
        while process.poll() is None and not (beat.exists() and json.loads(beat.read_text())["step"] >= stop_step):
            time.sleep(0.1)
        if process.poll() is None:
            print(f"== sending SIGUSR1 to the chain (process {process.pid})", flush=True)
            process.send_signal(signal.SIGUSR1)
    if process.returncode or not (stage / "interrupted").exists():
        raise SystemExit(f"the chain was to stop by a signal, but ended with exit status {process.returncode} and no `interrupted` mark")


def checkpoint(out: Path, stage: str) -> Path:
    """The weights that `stage` hands on."""
    folder = out / "chain/stages" / stage
    merged = folder / "merged"
    return merged if merged.exists() else folder / "checkpoints" / (folder / "checkpoints/latest").read_text().strip()


def needle_test(out: Path, stage: str, kind: str, trials: int, *flags: str) -> None:
    """Ask the model of a stage on all ranks, data parallel unless `flags` say otherwise; answers go to needle/KIND-STAGE."""
    data = out / "data"
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", NUM_RANKS)
    what = {
        "video": ("--needles", data / "needles/needles.jsonl", "--haystack", data / "needles/haystack.mp4", "--lengths", FRAMES),
        "text": ("--text", "--needles", data / "text_needles.jsonl", "--haystack", data / "filler.txt", "--lengths", TOKENS),
    }[kind]
    grid = ("--depths", DEPTHS, "--trials_per_cell", trials, "--tokens_per_row", 2048, "--title", stage)
    where = ("--checkpoint", checkpoint(out, stage), "--output", out / "needle" / f"{kind}-{stage}")
    run(*launch, ROOT / "tools/evaluate_needle.py", *what, *grid, *where, *flags)


def read_needle(out: Path, kind: str, stage: str) -> dict[str, Any]:
    return json.loads((out / "needle" / f"{kind}-{stage}" / "summary.json").read_text())


def draw(out: Path) -> None:
    """The heat maps side by side: video after the stages 3, 4 and 5, text before and after stage 4."""
    from megatron_longvila.evaluation.heat_map import draw_heat_maps

    stages = {"short_sft": "after stage 3", "context_extension": "after stage 4", "long_sft": "after stage 5"}
    draw_heat_maps([read_needle(out, "video", stage) for stage in stages], list(stages.values()), out / "needle_maps.png")
    titles = {"short_sft": "text, after stage 3", "context_extension": "text, after stage 4"}
    draw_heat_maps([read_needle(out, "text", stage) for stage in titles], list(titles.values()), out / "text_needle_maps.png")


def judge(after: dict[str, Any], text_before: dict[str, Any], text_after: dict[str, Any]) -> list[str]:
    """What is wrong with the result; nothing if the model finds what it sees and nothing else."""
    problems, chance = [], after["chance_given_question"]
    if after["trials"] < MIN_TRIALS:
        problems.append(f"{after['trials']} trials are fewer than {MIN_TRIALS}")
    if after["needle_accuracy"] < MIN_ACCURACY:
        problems.append(f"after stage 5 the needle is found in {after['needle_accuracy']:.3f} of the trials, below {MIN_ACCURACY}")
    if after["no_needle_accuracy"] > chance:
        problems.append(
            f"without the needle {after['no_needle_accuracy']:.3f} are right, above the {chance:.3f} of one answer per question"
        )
    longest = max(text_after["lengths"])
    gained = [part["accuracy_by_length"][str(longest)] for part in (text_before, text_after)]
    if gained[1] < MIN_TEXT_ACCURACY or gained[1] - gained[0] < MIN_GAP:
        problems.append(
            f"stage 4 did not extend the context: the text needle at {longest} tokens went from {gained[0]:.3f} to {gained[1]:.3f}, and "
            f"at least {MIN_TEXT_ACCURACY} and {MIN_GAP} more than before was to be reached"
        )
    return problems


def share_of_guesses(needles: Path) -> float:
    """What guessing gets on average: each question's answer drawn evenly among those that it has anywhere in the file of needles."""
    asked = [json.loads(line) for line in needles.read_text().splitlines()]
    answers: dict[str, set[str]] = {}
    for needle in asked:
        answers.setdefault(needle["question"], set()).add(needle["answer"])
    return sum(1 / len(answers[needle["question"]]) for needle in asked) / len(asked)


def report(out: Path, progress: Progress) -> list[str]:
    """Write summary.json, say what was done and return what is wrong."""
    video = {stage: read_needle(out, "video", stage) for stage in ("short_sft", "context_extension", "long_sft")}
    text = {stage: read_needle(out, "text", stage) for stage in ("short_sft", "context_extension")}
    after = video["long_sft"]
    problems = judge(after, text["short_sft"], text["context_extension"])
    trials = [json.loads(line) for line in (out / "needle/video-long_sft/trials.jsonl").read_text().splitlines()]
    example = max((trial for trial in trials if not trial.get("control")), key=lambda trial: (trial["length"], trial["depth"] == 0.5))
    files = {
        "videos and texts": out / "data", "training": out / "chain/summary.html", "checkpoint": checkpoint(out, "long_sft"),
        "heat maps": out / "needle_maps.png", "text heat maps": out / "text_needle_maps.png", "trials": out / "needle",
        "summary": out / "summary.json",
    }  # fmt: skip
    facts = progress.facts
    summary = {
        "passed": not problems, "problems": problems,
        "needle_accuracy_stage3": video["short_sft"]["needle_accuracy"],
        "needle_accuracy_stage4": video["context_extension"]["needle_accuracy"],
        "needle_accuracy_stage5": after["needle_accuracy"], "needle_accuracy_stage5_low_99": after["low"],
        "needle_trials": after["trials"], "needle_chance": after["chance_given_question"], "needle_chance_one_answer": after["chance"],
        "no_needle_accuracy": after["no_needle_accuracy"],
        "needle_accuracy_by_frames": {stage: part["accuracy_by_length"] for stage, part in video.items()},
        "text_needle_chance": text["context_extension"]["chance_given_question"],
        "text_needle_chance_guess": share_of_guesses(out / "data/text_needles.jsonl"),
        "text_needle_accuracy_by_tokens": {stage: part["accuracy_by_length"] for stage, part in text.items()},
        "stages": json.loads((out / "chain/summary.json").read_text())["stages"],
        "stopped": facts["stopped"], "seconds": facts["seconds"], "total_seconds": round(sum(facts["seconds"].values()), 1),
        "memory_gib": facts["memory_gib"], "example": example, "files": {name: str(path) for name, path in files.items()},
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    say(summary)
    return problems


def say(summary: dict[str, Any]) -> None:
    """The end of the console output."""
    print(
        f"\n== Done in {summary['total_seconds']:.0f} s, with at most {summary['memory_gib']:.1f} GiB of memory\n"
        f"Trained a tiny LongVILA in all stages on {NUM_RANKS} ranks; stopped it by a signal in {summary['stopped']} and resumed it.\n\n"
        f"{'stage':<20}{'steps':>6}{'trained parameters':>20}{'tokens':>12}{'frames':>9}{'loss':>8}{'seconds':>9}"
    )
    for stage in summary["stages"]:
        trained = stage["parameters"]["total"]["trained"]
        line = f"{stage['name']:<20}{stage['steps']:>6}{trained:>20,}{stage['tokens']:>12,.0f}{stage['frames']:>9,.0f}"
        print(f"{line}{stage['final_loss']:>8.3f}{stage['wall_s']:>9.0f}")
    print(f"\nA card no training example shows, hidden in a video ({summary['needle_trials']} trials each): found by the model")
    for stage, parts in summary["needle_accuracy_by_frames"].items():
        print(f"  after {stage:<18}" + "  ".join(f"{length} frames {accuracy:.2f}" for length, accuracy in parts.items()))
    print(
        f"  after long_sft in all {summary['needle_accuracy_stage5']:.1%}; without the card {summary['no_needle_accuracy']:.1%};"
        f" best answer per question {summary['needle_chance']:.1%}"
    )
    gap = summary["needle_accuracy_stage5"] - summary["needle_accuracy_stage3"]
    print(f"  stage 3 to stage 5: {gap:+.1%}" + (" (less than expected: see the maps)" if gap < MIN_GAP else ""))
    print("A sentence hidden in a text:")
    for stage, parts in summary["text_needle_accuracy_by_tokens"].items():
        print(f"  after {stage:<18}" + "  ".join(f"{length} tokens {accuracy:.2f}" for length, accuracy in parts.items()))
    print(f"  best answer per question {summary['text_needle_chance']:.1%}; a guess {summary['text_needle_chance_guess']:.1%}")
    example = summary["example"]
    print(f"\n{example['length']} frames, needle at {example['depth']:.0%}:{example['question']}")
    print(f"  model: {example['teacher_forcing']['predicted']}\n  truth: {example['expected']}\n")
    for name, path in summary["files"].items():
        print(f"  {name + ':':18}{path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs/quickstart", help="everything goes here [%(default)s]")
    parser.add_argument("--chain", type=Path, default=HERE / "chain.yaml", help="the stages [%(default)s]")
    parser.add_argument("--data", nargs="*", default=[], help="arguments of make_data.py without their dashes: images=100 ...")
    parser.add_argument("--trials_per_cell", type=int, default=5, help="of the needle test [%(default)s]")
    parser.add_argument("--restart", action="store_true", help="remove what an earlier run left in output_dir first")
    arguments = parser.parse_args(argv)
    out, chain = arguments.output_dir.resolve(), arguments.chain.resolve()
    if arguments.restart and (out / "progress.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(out / "progress.json")
    command, trials = chain_command(out, chain), arguments.trials_per_cell
    stage_file = next(stage for stage in yaml.safe_load(chain.read_text())["stages"] if stage["name"] == STOPPED_STAGE)["config"][-1]
    steps = yaml.safe_load((chain.parent / stage_file).read_text())["training"]["steps"]

    def first_half() -> None:
        train_and_stop(out, command, int(STOP_AT * steps))
        at = json.loads((out / "chain/stages" / STOPPED_STAGE / "interrupted").read_text())["step"]
        progress.facts["stopped"] = f"{STOPPED_STAGE} after step {at}"

    counts = [word for pair in arguments.data for word in (f"--{pair.split('=')[0]}", pair.split("=")[1])]
    progress.run("data", "Pictures, videos, texts and a tokenizer", lambda: make_data(out, counts))
    progress.run("train", f"The stages on {NUM_RANKS} ranks, to be stopped by a signal", first_half)
    progress.run("resume", "The same command again: training goes on", lambda: run(*command))
    quick = ("--protocol", "teacher_forcing")
    for stage, kind, flags in (
        ("short_sft", "video", quick),
        ("short_sft", "text", quick),
        ("context_extension", "video", quick),
        ("context_extension", "text", quick),
        ("long_sft", "video", ("--no_needle", *MM_SP)),
    ):
        work = partial(needle_test, out, stage, kind, trials, *flags)
        progress.run(f"needle-{kind}-{stage}", f"Needle test on {kind}, the model after {stage}", work)
    progress.run("draw", "Heat maps", lambda: draw(out))
    problems = report(out, progress)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
