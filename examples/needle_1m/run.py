"""A million tokens: train a small LongVILA through all stages on the GPUs of one host, then hide cards in videos of up to 6,000 frames.

    python examples/needle_1m/run.py --output_dir runs/needle_1m

makes its world of generated H.264 videos and texts, trains the stages of chain.yaml (the last three and the context extension with MM-SP
over all GPUs), and asks for cards that no training example shows in haystacks of 300 to 6,000 frames of 196 tokens: the longest have
1,176,000 tokens. Every part that is done is skipped, so the same command goes on where it stopped. Words that this command does not
know are fields of the configuration for all stages (--training.seed 1). summary.json says what came out; needle_map.png shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
SETS = ("images", "albums", "quizzes", "stories", "notes", "short", "long-512", "long-1536", "long-6000")
DATA = {
    "tower": ("images", "quizzes"),
    "language_model": ("stories", "notes", "passages-128"),
    "alignment": ("images",),
    "pretraining": ("images", "albums", "quizzes"),
    "short_sft": ("short",),
    "context_extension_64k": ("passages-4096", "passages-16384", "passages-65536"),
    "context_extension_1m": ("passages-4096", "passages-16384", "passages-65536", "passages-262144", "passages-1048576"),
    "long_sft_512": ("long-512",),
    "long_sft_1536": ("long-1536",),
    "long_sft_6000": ("long-6000",),
}  # fmt: skip
"""Which folders of data/ a stage reads."""
MM_SP = ("context_extension_64k", "context_extension_1m", "long_sft_512", "long_sft_1536", "long_sft_6000")
"""Stages whose rows are spread over all ranks."""
SHORT_LENGTHS, LENGTHS, CONTROL_LENGTHS = "8,32,100,300", "300,1500,3000,6000", "300,1500"


def run(words: list[object]) -> None:
    """Run a command of this repository; stop with its exit status if it fails."""
    words = [str(word) for word in words]
    print("$", shlex.join(words), flush=True)
    status = subprocess.run(words, env=environment(), cwd=ROOT).returncode
    if status:
        raise SystemExit(f"the command above failed with exit status {status}; run the same command again to continue")


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_NUM_THREADS": "4"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def part(out: Path, name: str, work: Callable[[], None]) -> None:
    """Do a part once; its seconds, over all attempts that finished something, are in progress.json."""
    path = out / "progress.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    if name in seconds:
        print(f"== {name}: done before", flush=True)
        return
    print(f"== {name}", flush=True)
    start = time.monotonic()
    work()
    path.write_text(json.dumps(seconds | {name: round(time.monotonic() - start, 1)}, indent=1) + "\n")


def preprocess(data: Path) -> None:
    """All datasets at once: each tool waits for its own files most of the time."""
    workers = max(1, (os.cpu_count() or 1) // 4)
    commands = []
    for name in SETS:
        files = ("--input", data / f"{name}.jsonl", "--media_root", data / "media", "--output", data / name)
        commands.append([sys.executable, ROOT / "tools/preprocess_video.py", *files, "--num_workers", workers])
    for path in sorted(data.glob("passages-*.jsonl")):
        files = ("--input", path, "--output", data / path.stem, "--tokenizer", data / "tokenizer.model")
        commands.append([sys.executable, ROOT / "tools/preprocess_text.py", *files, "--context_length", path.stem.split("-")[1]])
    running = []
    for words in commands:
        print("$", shlex.join(map(str, words)), flush=True)
        log = open(data / f"{Path(words[words.index('--output') + 1]).name}.log", "w")  # noqa: SIM115  (closed below)
        running.append((subprocess.Popen([str(word) for word in words], env=environment(), stdout=log, stderr=subprocess.STDOUT), log))
    for process, log in running:
        process.wait()
        log.close()
        if process.returncode:
            raise SystemExit(f"preprocessing failed with exit status {process.returncode}; its output is {log.name}")


def train(out: Path, num_ranks: int, overrides: list[str]) -> None:
    words = [sys.executable, ROOT / "tools/run_stages.py", "--chain", HERE / "chain.yaml", "--output_dir", out / "chain"]
    words += ["--num_ranks", num_ranks, "--data.tokenizer", out / "data/tokenizer.model"]
    for stage, folders in DATA.items():
        words += [f"--stages.{stage}.data.train", "[" + ",".join(str(out / "data" / folder) for folder in folders) + "]"]
    for stage in MM_SP:
        words += [f"--stages.{stage}.parallel.cp_size", num_ranks]
    run([*words, *overrides])


def checkpoint(out: Path, stage: str) -> Path:
    """The weights of a stage without adapters."""
    folder = out / "chain/stages" / stage / "checkpoints"
    return folder / (folder / "latest").read_text().strip()


def needle_test(out: Path, stage: str, folder: str, num_ranks: int, *flags: object) -> None:
    """Ask the model of a stage with MM-SP over all ranks; answers go to needle/FOLDER."""
    data = out / "data/needles"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_ranks]
    what = ("--needles", data / "needles.jsonl", "--haystack", data / "haystack.mp4", "--protocol", "teacher_forcing")
    where = ("--checkpoint", checkpoint(out, stage), "--output", out / "needle" / folder, "--title", f"after {stage}")
    run([*launch, ROOT / "tools/evaluate_needle.py", *what, *where, "--parallel.cp_size", num_ranks, *flags])


def stage_facts(out: Path) -> list[dict]:
    """What each stage took."""
    facts = []
    for stage in json.loads((out / "chain/summary.json").read_text())["stages"]:
        lines = [json.loads(line) for line in (out / "chain/stages" / stage["name"] / "metrics.jsonl").read_text().splitlines()]
        memory = max((line["memory_gib"] for line in lines if line.get("memory_gib")), default=None)
        kept = {name: stage[name] for name in ("name", "steps", "tokens", "frames", "final_loss", "wall_s")}
        facts.append(kept | {"trained_parameters": stage["parameters"]["total"]["trained"], "memory_gib": memory})
    return facts


def report(out: Path) -> None:
    """summary.json, needle_map.png and the last lines of the console."""
    import torch

    from megatron_longvila.evaluation.heat_map import draw_heat_maps

    needle = {folder.name: json.loads((folder / "summary.json").read_text()) for folder in sorted((out / "needle").iterdir())}
    grids = [needle[name] for name in ("short_sft", "long_sft_6000") if name in needle]
    draw_heat_maps(grids, ["after stage 3", "after stage 5"][: len(grids)], out / "needle_map.png")
    summary = {
        "hardware": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or [platform.processor() or "CPU"],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "command": shlex.join(["python", *sys.argv]),
        "seconds": json.loads((out / "progress.json").read_text()),
        "stages": stage_facts(out),
        "needle": needle,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for stage in summary["stages"]:
        print(
            f"{stage['name']:<20}{stage['steps']:>6} steps{stage['tokens']:>13,.0f} tokens{stage['frames']:>9,.0f} frames"
            f"  loss {stage['final_loss']:.4f}  {stage['wall_s']:.0f} s  {stage['memory_gib'] or 0:.1f} GiB"
        )
    for name, found in needle.items():
        by_length = "  ".join(f"{length}: {accuracy:.3f}" for length, accuracy in found["accuracy_by_length"].items())
        print(f"needle {name}: {found['correct']} of {found['trials']}; by frames {by_length}; control {found['no_needle_accuracy']}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs/needle_1m", help="everything goes here [%(default)s]")
    parser.add_argument("--num_ranks", type=int, help="GPUs of this host to use [all]")
    parser.add_argument("--data", nargs="*", default=[], help="arguments of make_world.py without their dashes: images=100 ...")
    parser.add_argument("--lengths", default=LENGTHS, help="frames of the haystacks [%(default)s]")
    parser.add_argument("--trials_per_cell", type=int, default=10, help="six cells, from depth 0 to 1, to a length [%(default)s]")
    parser.add_argument("--until", choices=("data", "train", "needle"), default="needle", help="stop after this part [%(default)s]")
    arguments, overrides = parser.parse_known_args(argv)
    out = arguments.output_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    num_ranks = arguments.num_ranks
    if num_ranks is None:
        import torch

        num_ranks = torch.cuda.device_count() or 1

    counts = [word for pair in arguments.data for word in (f"--{pair.split('=')[0]}", pair.split("=")[1])]
    part(out, "world", lambda: run([sys.executable, HERE / "make_world.py", "--output_dir", out / "data", *counts]))
    part(out, "preprocess", lambda: preprocess(out / "data"))
    if arguments.until == "data":
        return
    part(out, "train", lambda: train(out, num_ranks, overrides))
    if arguments.until == "train":
        return
    trials = ("--trials_per_cell", arguments.trials_per_cell)
    asked = {int(length) for length in arguments.lengths.split(",")}
    fitting = {key: ",".join(n for n in lengths.split(",") if int(n) <= max(asked)) for key, lengths in
               (("short", SHORT_LENGTHS), ("control", CONTROL_LENGTHS))}  # fmt: skip
    grid = ("--lengths", arguments.lengths, *trials)
    part(out, "needle", lambda: needle_test(out, "long_sft_6000", "long_sft_6000", num_ranks, *grid))
    control = ("--lengths", fitting["control"], "--no_needle", *trials)
    part(out, "needle_control", lambda: needle_test(out, "long_sft_6000", "control", num_ranks, *control))
    part(out, "needle_short_sft", lambda: needle_test(out, "short_sft", "short_sft", num_ranks, "--lengths", fitting["short"], *trials))
    report(out)


if __name__ == "__main__":
    main()
