"""Loss parity: the same rows and weights on one GPU, on 4-way data parallel and on MM-SP, step by step (the paper's loss-parity figure).

Every run starts the ordinary training command with other flags. The largest loss difference between one GPU and MM-SP is set against
that between two one-GPU runs that differ only in their attention backend (cuDNN, flash): what rounding alone does over so many steps.

    python tools/benchmark_loss_parity.py --output_dir runs/parity

The model has the sizes of Qwen2-1.5B and SigLIP so400m (384 px), random weights; the rows are 32 frames of videos that this tool makes.
Writes loss_parity.json (hardware, versions, command, every loss) and loss_parity.png into --output_dir. A finished run is not repeated.
Runs of one GPU go side by side on the GPUs there are. Words that this command does not know are fields of the configuration for all runs
(--optimizer.lr 2e-6). Exit code 1 if a run failed or MM-SP strays by more than twice what rounding does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BASELINE, ROUNDING, DATA_PARALLEL, MM_SP = "one_gpu_cudnn", "one_gpu_flash", "dp4", "ulysses2_ring2"
WARM_UP_STEPS = 10  # left out of the medians of speed
LIMIT = 2  # how many times as far as another attention backend a run of several ranks may stray
NUM_VIDEOS, SIDE, NUM_FRAMES = 16, 384, 64
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (40, 70, 235), "white": (240, 240, 240)}
COMMON_FLAGS = (
    "--config", "examples/models/qwen2_1.5b_siglip_384.yaml", "--model.llm.rotary_base", "1000000",
    "--data.template", "plain", "--data.context_length", "8192", "--data.global_batch_size", "4", "--data.video.num_frames", "32",
    "--training.precision", "bf16", "--training.recompute_vision", "true", "--data.num_workers", "4",
    "--optimizer.lr", "2e-5", "--optimizer.warmup_steps", "10", "--checkpoint.save_at_end", "false",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One run: how many GPUs and which flags beside the common ones."""

    gpus: int
    flags: tuple[str, ...] = ()


def mesh(ulysses: int, ring: int) -> tuple[str, ...]:
    return ("--parallel.ulysses_size", str(ulysses), "--parallel.ring_size", str(ring))


VARIANTS = {
    BASELINE: Variant(1, ("--model.attention_backend", "cudnn")),
    ROUNDING: Variant(1, ("--model.attention_backend", "flash")),
    "one_gpu_te": Variant(1, ("--model.layers", "te")),
    "one_gpu_again": Variant(1, ("--model.attention_backend", "cudnn")),
    "ulysses2": Variant(2, mesh(2, 1)),
    "ring2": Variant(2, mesh(1, 2)),
    "ring2_p2p": Variant(2, (*mesh(1, 2), "--parallel.ring_transport", "p2p")),
    DATA_PARALLEL: Variant(4),
    MM_SP: Variant(4, mesh(2, 2)),
    "ulysses2_ring2_te": Variant(4, (*mesh(2, 2), "--model.layers", "te")),
    "tp2_ulysses2": Variant(4, (*mesh(2, 1), "--parallel.tp_size", "2", "--parallel.sequence_parallel", "true")),
}


def make_data(folder: Path, rows: int) -> None:
    """Videos of a square that drifts over noise, `rows` questions about them, a SentencePiece model, all preprocessed. Deterministic."""
    if (folder / "data" / "dataset.json").exists():
        return
    import av
    import numpy as np
    import sentencepiece

    rng = np.random.default_rng(0)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    drawn = []
    for index in range(NUM_VIDEOS):
        colour = list(COLOURS)[index % len(COLOURS)]
        x, y = rng.integers(0, SIDE - 120, 2)
        drawn.append(colour)
        with av.open(str(folder / "videos" / f"{index:02}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=16, options={"crf": "20", "preset": "veryfast", "threads": "1"})
            stream.width = stream.height = SIDE
            stream.pix_fmt = "yuv420p"
            for frame in range(NUM_FRAMES):
                pixels = rng.integers(60, 120, (SIDE, SIDE, 3), dtype=np.uint8)
                left, top = (x + 4 * frame) % (SIDE - 80), (y + 2 * frame * (index % 3)) % (SIDE - 80)
                pixels[top : top + 80, left : left + 80] = COLOURS[colour]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    lines = []
    for row in range(rows):
        video = row % NUM_VIDEOS
        answer = f"video {video} shows a {drawn[video]} square , and this is sentence {row // NUM_VIDEOS} about it"
        talk = [{"from": "human", "value": "<video>\nwhat moves here ?"}, {"from": "gpt", "value": answer}]
        lines.append({"id": f"row{row}", "video": f"{video:02}.mp4", "conversations": talk})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = [turn["value"] for line in lines for turn in line["conversations"]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, user_defined_symbols=["\n"], minloglevel=2,
    )  # fmt: skip
    tool = Path(__file__).with_name("preprocess_video.py")
    flags = ["--input", folder / "rows.jsonl", "--media_root", folder / "videos", "--output", folder / "data"]
    subprocess.run([sys.executable, tool, *flags], check=True)


def command(name: str, arguments: argparse.Namespace, folder: Path, port: int) -> list[str]:
    """The training command of a variant."""
    variant = VARIANTS[name]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={variant.gpus}", f"--master_port={port}"]
    data = [
        "--data.train",
        json.dumps([str(arguments.output_dir / "data")]),
        "--data.tokenizer",
        str(arguments.output_dir / "tokenizer.model"),
    ]
    common = [*COMMON_FLAGS, *arguments.flags, *data, "--training.steps", str(arguments.steps), "--output_dir", str(folder)]
    return [*launch, "-m", "megatron_longvila.train", *common, *variant.flags]


def losses(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_batch(names: list[str], arguments: argparse.Namespace) -> list[str]:
    """Run variants side by side, each on GPUs of its own; returns those that failed."""
    running, first_gpu = {}, 0
    for index, name in enumerate(names):
        folder = arguments.output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        gpus = range(first_gpu, first_gpu + VARIANTS[name].gpus)
        first_gpu = gpus.stop
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        words = command(name, arguments, folder, 29500 + index)
        print(f"{name}: GPUs {environment['CUDA_VISIBLE_DEVICES']}: {shlex.join(words[2:])}", flush=True)
        log = open(folder / "log.txt", "w")  # noqa: SIM115  (closed with the process)
        running[name] = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT), log
    failed = []
    for name, (process, log) in running.items():
        try:
            code = process.wait(timeout=arguments.timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"none within {arguments.timeout_s} s"
        log.close()
        steps = losses(arguments.output_dir / name)
        print(f"{name}: exit code {code}, {len(steps)} steps, last loss {steps[-1]['loss'] if steps else None}", flush=True)
        if code != 0:
            failed.append(name)
            print("\n".join((arguments.output_dir / name / "log.txt").read_text().splitlines()[-25:]), flush=True)
    return failed


def batches(names: list[str], num_gpus: int) -> list[list[str]]:
    """Neighbouring variants grouped so that each group fits on the machine at once."""
    groups: list[list[str]] = []
    for name in names:
        if groups and sum(VARIANTS[other].gpus for other in groups[-1]) + VARIANTS[name].gpus <= num_gpus:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def summarise(arguments: argparse.Namespace, names: list[str]) -> dict:
    """Losses, speeds and differences of all finished runs."""
    import torch

    runs = {}
    for name in names:
        steps = losses(arguments.output_dir / name)
        if len(steps) != arguments.steps:
            continue
        steady = steps[WARM_UP_STEPS:]
        runs[name] = {
            "gpus": VARIANTS[name].gpus,
            "flags": list(VARIANTS[name].flags),
            "loss": [step["loss"] for step in steps],
            "grad_norm": [step["grad_norm"] for step in steps],
            "median_tokens_per_s": statistics.median(step["tokens_per_s"] for step in steady) if steady else None,
            "median_mfu": statistics.median(step["mfu"] for step in steady) if steady and steady[0]["mfu"] else None,
            "memory_gib": max(step["memory_gib"] for step in steps),
        }
    if BASELINE in runs:
        for run in runs.values():
            differences = [abs(a - b) for a, b in zip(run["loss"], runs[BASELINE]["loss"], strict=True)]
            run["largest_difference"], run["median_difference"] = max(differences), statistics.median(differences)
    return {
        "hardware": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or [platform.processor() or "CPU"],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "command": shlex.join(["python", *sys.argv]),
        "steps": arguments.steps,
        "common_flags": [*COMMON_FLAGS, *arguments.flags],
        "runs": runs,
    }


def draw(summary: dict, path: Path) -> None:
    """Loss curves above, distance from the one-GPU run below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, constrained_layout=True)
    baseline = summary["runs"].get(BASELINE, {}).get("loss")
    styles = {BASELINE: "-", DATA_PARALLEL: "--", MM_SP: ":", "ulysses2": "--", "ring2": ":"}
    for name, run in summary["runs"].items():
        steps = range(1, len(run["loss"]) + 1)
        if name in styles:
            top.plot(steps, run["loss"], styles[name], linewidth=2, label=name)
        if baseline and name != BASELINE:
            bottom.semilogy(steps, [max(abs(a - b), 1e-7) for a, b in zip(run["loss"], baseline, strict=True)], label=name, linewidth=1)
    top.set(ylabel="loss per labelled token", title=f"{summary['hardware'][0]} x {len(summary['hardware'])}, bf16, same rows")
    bottom.set(xlabel="step", ylabel=f"|loss - loss of {BASELINE}|")
    for axis in (top, bottom):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--timeout_s", type=float, default=900, help="limit of one group of runs")
    parser.add_argument(
        "--runs", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME", help=f"any of {list(VARIANTS)}"
    )
    arguments, arguments.flags = parser.parse_known_args()

    import torch

    num_gpus = torch.cuda.device_count()
    names = [name for name in arguments.runs if VARIANTS[name].gpus <= num_gpus]
    for name in arguments.runs:
        if name not in names:
            print(f"{name}: left out, it needs {VARIANTS[name].gpus} GPUs and there are {num_gpus}", flush=True)
    make_data(arguments.output_dir, 4 * arguments.steps)
    unfinished = [name for name in names if len(losses(arguments.output_dir / name)) != arguments.steps]
    failed = [name for group in batches(unfinished, num_gpus) for name in run_batch(group, arguments)]

    summary = summarise(arguments, names)
    (arguments.output_dir / "loss_parity.json").write_text(json.dumps(summary, indent=1))
    draw(summary, arguments.output_dir / "loss_parity.png")
    print(f"{'run':20} {'GPUs':>4} {'tokens/s':>9} {'MFU':>6} {'GiB':>6} {'last loss':>10} {'largest difference':>19}")
    for name, run in summary["runs"].items():
        mfu = f"{run['median_mfu']:.1%}" if run["median_mfu"] else "-"
        difference = f"{run['largest_difference']:.2e}" if "largest_difference" in run else "-"
        speed = f"{run['median_tokens_per_s']:.0f}" if run["median_tokens_per_s"] else "-"
        print(f"{name:20} {run['gpus']:>4} {speed:>9} {mfu:>6} {run['memory_gib']:>6.1f} {run['loss'][-1]:>10.4f} {difference:>19}")
    if failed:
        print(f"failed: {failed}")
        return 1
    runs = summary["runs"]
    sharded = [name for name in runs if VARIANTS[name].gpus > 1 and name != DATA_PARALLEL]
    ratios = [runs[name]["largest_difference"] / runs[ROUNDING]["largest_difference"] for name in sharded if ROUNDING in runs]
    for name, ratio in zip(sharded, ratios, strict=False):
        print(f"{name} strays {ratio:.2f} times as far as another attention backend does; the limit is {LIMIT}")
    return 1 if any(ratio > LIMIT for ratio in ratios) else 0


if __name__ == "__main__":
    sys.exit(main())
