#!/usr/bin/env python3
"""Hide a picture in a long video (or a sentence in a long text), ask for it, and draw how often the model finds it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_longvila.config import Config
from megatron_longvila.config_check import check_device, refuse
from megatron_longvila.evaluation.configuration import evaluation_config

HELP = """
Hide a picture in a long video (or a sentence in a long text), ask for it, and draw how often the model finds it.

  torchrun --nproc_per_node 4 tools/evaluate_needle.py --checkpoint runs/a/checkpoints/step_0000300 --needles needles.jsonl \\
      --haystack movie.mp4 --lengths 8,16,32,64 --depths 0,0.2,0.4,0.6,0.8,1 --trials_per_cell 5 --output runs/a/needle \\
      --parallel.ulysses_size 2 --parallel.ring_size 2

A cell of the grid is a length in frames and a depth; each of its trials hides another needle. A line of needles.jsonl is
  {"id": "k7", "image": "cards/k7.png", "question": "What is on the red card?", "answer": "K", "distractors": ["cards/b2.png"]}
with paths relative to the file. The needle takes frame round(depth * (length - 1)); distractors (may be left out) take seeded others.

The haystack is one or more videos, --haystack_fps frames a second, file after file and from the first again when they are used up
(summary.json says how often frames repeat); or `--haystack generated`. The trials of a cell start at evenly spread places of it.

An answer is right when every token of it and the token that ends it are right. `teacher_forcing` (the paper's way) asks for each of them
after the right ones before it, `greedy` lets the model go on from its own; both must give the same verdict on every trial.
--no_needle asks everything once more with the haystack's own frame in the needle's place: a model that looks falls to chance.

With --text the haystack is a file of filler sentences, one a line, lengths are tokens of the passage, and a line of needles.jsonl is
  {"id": "owl", "facts": "the animal is owl .", "question": "what is the animal ?", "answer": "owl .", "distractors": ["..."]}
The passage and the question are a user's turn of the template; --plain_text joins passage, question and answer by spaces instead and
ends with the end-of-sequence token, for a model that has only seen running text.

--output DIR gets trials.jsonl, cells.csv, summary.json and heat_map.png. A finished cell is never asked again: the same command goes on
where it stopped, and other --lengths or --no_needle add cells. Any mesh gives the same answers; ranks beyond the mesh are data parallel.
Model, tokenizer and template are the checkpoint's; any field of the configuration can be given as a flag to change it.

The checkpoint files hold pickled Python objects: evaluate only checkpoints you trust.
"""
EPILOG = "Exit status: 0 done, 1 something you gave does not fit or the two protocols disagree on a trial, 2 wrong usage."


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str], str]:
    """Own arguments, the flags left over for the configuration, and the program's name."""
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a step_... folder of a run")
    parser.add_argument("--needles", type=Path, required=True, metavar="FILE", help="JSONL file of needles")
    parser.add_argument("--haystack", required=True, nargs="+", metavar="FILE", help="videos, or `generated`; with --text a text file")
    parser.add_argument("--lengths", type=_numbers(int), required=True, metavar="N,N,...", help="frames (with --text: tokens)")
    parser.add_argument(
        "--depths", type=_numbers(float), default=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), metavar="X,X,...", help="default 0,0.2,0.4,0.6,0.8,1"
    )
    parser.add_argument("--trials_per_cell", type=int, default=5, metavar="K", help="default 5, as the paper")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--protocol", choices=("both", "teacher_forcing", "greedy"), default="both", help="default both")
    parser.add_argument("--no_needle", action="store_true", help="ask everything without the needle too")
    parser.add_argument("--haystack_fps", type=float, default=1.0, metavar="X", help="frames a second of video (default 1)")
    parser.add_argument("--tokens_per_row", type=int, default=0, metavar="N", help="pack short trials up to this (default: a training row)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default 0)")
    parser.add_argument("--text", action="store_true", help="hide sentences in text")
    parser.add_argument("--plain_text", action="store_true", help="with --text: ask without the chat template")
    parser.add_argument("--title", default="", help="of the picture (default: the end of the checkpoint's path)")
    parser.add_argument("--dry_run", action="store_true", help="print the grid and its tokens, ask nothing")
    parser.add_argument("--restart", action="store_true", help="throw the trials in --output away")
    arguments, flags = parser.parse_known_args(argv)
    if arguments.plain_text and not arguments.text:
        parser.error("--plain_text goes with --text")
    if arguments.text and len(arguments.haystack) > 1:
        parser.error("--text takes one --haystack file")
    return arguments, flags, parser.prog


def _numbers(kind: type):
    """Parser of a comma-separated list."""

    def read(text: str) -> tuple:
        return tuple(kind(word) for word in text.split(",") if word.strip())

    read.__name__ = f"list of {kind.__name__}"  # argparse names it when it refuses
    return read


def build_test(arguments: argparse.Namespace, config: Config):
    """(NeedleTest, Haystack of frames or of text, settings that decide the trials). Raises ValueError for what does not fit."""
    from megatron_longvila.checkpoint.origin import check_tokens, describe_tokens
    from megatron_longvila.data.conversation import check_template
    from megatron_longvila.data.text import load_tokenizer
    from megatron_longvila.evaluation.needle import read_needles
    from megatron_longvila.evaluation.needle_grid import Grid
    from megatron_longvila.evaluation.needle_haystack import GeneratedHaystack, VideoHaystack
    from megatron_longvila.evaluation.needle_run import text_test, video_test
    from megatron_longvila.evaluation.text_needle import TextHaystack, read_text_needles

    tokenizer, vision = load_tokenizer(config.data.tokenizer), config.model.vision
    check_tokens(arguments.checkpoint, describe_tokens(tokenizer, config))
    scaling = config.model.llm.rope_scaling
    if arguments.protocol == "both" and scaling is not None and scaling.type == "dynamic":
        raise ValueError(
            "--protocol both compares nothing under model.llm.rope_scaling.type='dynamic': each token more changes the angles of all "
            "positions, so the two protocols ask different models; give --protocol teacher_forcing or --protocol greedy"
        )
    if not arguments.plain_text:
        check_template(config.data.template, tokenizer)
    needles = (read_text_needles if arguments.text else read_needles)(arguments.needles)
    grid = Grid(
        arguments.lengths, arguments.depths, arguments.trials_per_cell, len(needles), seed=arguments.seed, control=arguments.no_needle
    )
    if arguments.text:
        haystack = TextHaystack(Path(arguments.haystack[0]), tokenizer)
        template = None if arguments.plain_text else config.data.template
        row_tokens = arguments.tokens_per_row or config.data.context_length
        test = text_test(grid, needles, haystack, tokenizer, template, protocol=arguments.protocol, row_tokens=row_tokens)
    else:
        if arguments.haystack == ["generated"]:
            haystack = GeneratedHaystack(arguments.seed, vision.image_size)
        else:
            paths = [Path(path) for path in arguments.haystack]
            haystack = VideoHaystack(paths, fps=arguments.haystack_fps, vision=vision, fast_resize=config.data.video.fast_resize)
        test = video_test(grid, needles, haystack, tokenizer, config, protocol=arguments.protocol, row_tokens=arguments.tokens_per_row)
    test.check_positions(config.model.llm.max_position_embeddings)
    return test, haystack, trial_settings(arguments, config, tokenizer.hash, needles, haystack.describe())


def trial_settings(arguments: argparse.Namespace, config: Config, tokenizer_hash: str, needles: list, haystack: dict) -> dict:
    """What decides the trials and their answers: answers are kept only together with those of the same settings."""
    from megatron_longvila.evaluation.needle_haystack import file_ends

    pictures = hashlib.sha256()
    for needle in () if arguments.text else needles:
        for path in (needle.image, *needle.distractors):
            pictures.update(path.read_bytes())
    weights = hashlib.sha256()
    for path in sorted(path for path in arguments.checkpoint.iterdir() if path.is_file()):
        weights.update(path.name.encode() + file_ends(path))
    return {
        "mode": "plain_text" if arguments.plain_text else "text" if arguments.text else "video",
        "checkpoint": weights.hexdigest()[:16],
        "model": asdict(config.model),
        "precision": config.training.precision,
        "tokenizer": tokenizer_hash[:16],
        "template": config.data.template,
        "needles": hashlib.sha256(arguments.needles.read_bytes()).hexdigest()[:16],
        "pictures": pictures.hexdigest()[:16],
        "haystack": haystack,
        "depths": list(arguments.depths),
        "trials_per_cell": arguments.trials_per_cell,
        "protocol": arguments.protocol,
        "seed": arguments.seed,
    }


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Ask all cells that are not done and, on rank 0, write and print what was found. Returns the exit status."""
    import torch.distributed as dist
    from tqdm import tqdm

    from megatron_longvila import platform
    from megatron_longvila.config_check import check
    from megatron_longvila.evaluation.model import load_model
    from megatron_longvila.evaluation.needle_haystack import FrameReader
    from megatron_longvila.evaluation.needle_protocols import Examiner
    from megatron_longvila.evaluation.needle_results import Records, disagrees, is_correct
    from megatron_longvila.parallel.groups import initialize_groups
    from megatron_longvila.training.loss import predict

    test, haystack, settings = build_test(arguments, config)
    platform.init_distributed(config.parallel.timeout_s)
    groups = initialize_groups(check(config, dist.get_world_size()), timeout_s=config.parallel.timeout_s)
    is_first = dist.get_rank() == 0
    records = Records(arguments.output, settings, restart=arguments.restart) if is_first else None
    done = [records.done if is_first else set()]
    dist.broadcast_object_list(done, src=0)
    cells = [cell for cell in test.grid.cells if cell.key not in done[0]]

    if cells:
        examiner = Examiner(
            load_model(config, groups),
            groups,
            config,
            predict=lambda language_model, hidden, labels_T: predict(language_model, hidden, labels_T, config),
            read_frames=FrameReader(haystack, config.model.vision),
        )
        total = sum(arguments.trials_per_cell * test.max_tokens(cell.length) for cell in cells)
        with tqdm(total=total, desc="needle", unit="token", unit_scale=True, disable=not is_first) as bar:
            for batch in test.batches(cells, groups.mesh.dp_size):
                for cell, found in zip(batch, test.ask(batch, examiner), strict=True):
                    right, what = sum(map(is_correct, found)), "no needle" if cell.control else "needle"
                    bar.set_postfix_str(f"{what}, length {cell.length}, depth {cell.depth:.0%}: {right} of {len(found)}", refresh=False)
                    bar.update(arguments.trials_per_cell * test.max_tokens(cell.length))
                    if is_first:
                        records.add(cell, found)
    platform.shutdown_distributed()
    if not is_first:
        return 0
    summary = write_results(arguments, config, records, haystack)
    print(describe(summary, [trial for trial in records.trials if disagrees(trial)]))
    print(f"{summary['seconds']:.0f} s of questions; written to {arguments.output}")
    return 1 if summary["disagreements"] else 0


def write_results(arguments: argparse.Namespace, config: Config, records, haystack) -> dict[str, Any]:
    """summary.json, cells.csv and heat_map.png of all trials in the folder."""
    from megatron_longvila.checkpoint.sharded import write_text
    from megatron_longvila.evaluation.heat_map import draw_heat_maps
    from megatron_longvila.evaluation.needle_results import cells_csv, summarise

    parallel = config.parallel
    summary = summarise(records.trials)
    size = haystack.num_tokens if arguments.text else haystack.num_frames
    summary |= {
        "mode": "text" if arguments.text else "video",
        "protocol": arguments.protocol,
        "trials_per_cell": arguments.trials_per_cell,
        "checkpoint": str(arguments.checkpoint),
        "needles": str(arguments.needles),
        "haystack": haystack.describe() | {"shown_times": 1 if size is None else -(-max(summary["lengths"]) // size)},
        "mesh": {name: getattr(parallel, f"{name}_size") for name in ("tp", "pp", "cp", "ulysses", "ring")}
        | {"world_size": int(os.environ.get("WORLD_SIZE", "1"))},
        "settings": records.hash,
    }
    write_text(arguments.output / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(arguments.output / "cells.csv", cells_csv(summary))
    draw_heat_maps([summary], [arguments.title or "/".join(arguments.checkpoint.parts[-3:])], arguments.output / "heat_map.png")
    return summary


def print_plan(test, dp_size: int) -> None:
    """What would be asked."""
    plan = test.plan(dp_size)
    print(f"{'length':>10} {'cells':>6} {'trials':>7} {'tokens of a trial':>18} {'rows of a cell':>15} {'tokens':>15}")
    for line in plan:
        print(f"{line['length']:>10,} {line['cells']:>6} {line['trials']:>7} {line['tokens']:>18,} {line['rows']:>15} {line['all']:>15,}")
    trials, tokens = sum(line["trials"] for line in plan), sum(line["all"] for line in plan)
    print(
        f"{trials} trials of {len(test.needles)} needles, {tokens:,} tokens in each forward pass over all trials; protocol {test.protocol}"
    )


def describe(summary: dict[str, Any], trials: list[dict[str, Any]]) -> str:
    """The console's lines."""
    control = summary["no_needle_accuracy"]
    lines = [
        f"needle found in {summary['correct']} of {summary['trials']} trials = {summary['needle_accuracy']:.3f} "
        f"(99% interval {summary['low']:.3f} to {summary['high']:.3f}); chance {summary['chance']:.3f} with one answer to everything, "
        f"{summary['chance_given_question']:.3f} with one per question"
        + (f"; without the needle {control:.3f} of {summary['no_needle_trials']}" if control is not None else "")
    ]
    for trial in trials:
        said = ", ".join(f"{name} {trial[name]['predicted']!r}" for name in ("teacher_forcing", "greedy"))
        place = f"length {trial['length']}, depth {trial['depth']:.0%}, trial {trial['trial']}" + (", no needle" * trial["control"])
        lines.append(f"the protocols disagree on {place}: {said}, expected {trial['expected']!r}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments, flags, prog = parse_arguments(argv)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        gpus_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
        config = evaluation_config(arguments.checkpoint, flags, prog=prog, world_size=world_size, gpus_per_host=gpus_per_host)
        if arguments.dry_run:
            if int(os.environ.get("RANK", "0")) == 0:
                test, _, _ = build_test(arguments, config)
                print_plan(test, world_size // (config.parallel.tp_size * config.parallel.pp_size * config.parallel.cp_size))
            return 0
        check_device(config)
        return run(arguments, config)
    except ValueError as error:
        refuse(error, int(os.environ.get("LOCAL_RANK", "0")))


if __name__ == "__main__":
    sys.exit(main())
