#!/usr/bin/env python3
"""Count the answers a trained model gets exactly right on held-out data."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_longvila.config import Config
from megatron_longvila.config_check import check_device, refuse
from megatron_longvila.evaluation.configuration import evaluation_config

HELP = """
Count the answers a trained model gets exactly right on held-out data.

An answer is right when the most likely token is the right one at each of its positions, the end of the answer included, each time given
the right tokens before it (teacher forcing). The result is one JSON file with a summary and a record per question.

  python tools/evaluate_answers.py --checkpoint runs/a/checkpoints/step_0000300 --data /data/longvila/heldout --output answers.json

runs on one device. The checkpoint loads on any mesh; ranks beyond the mesh are data parallel:

  torchrun --nproc_per_node 4 tools/evaluate_answers.py ... --parallel.ulysses_size 2 --parallel.ring_size 2

Model, tokenizer, template and frame rule are those the checkpoint was trained with; any field of the configuration can be given as a
flag to change it, for example --data.video.num_frames 16 or --data.tokenizer PATH where the file has moved.

--blank_frames goes through the data a second time with every frame black. An honest video benchmark falls to chance there, because the
questions alone do not give the answers away. Compare with the two blind baselines of the summary: constant_accuracy (the best single
answer to everything) and question_only_accuracy (the best answer to each question text; it says something only where questions repeat).

The checkpoint files hold pickled Python objects: evaluate only checkpoints you trust.
"""
EPILOG = "Exit status: 0 done, 1 something you gave does not fit, 2 wrong usage."


def configure(argv: list[str] | None, world_size: int) -> tuple[argparse.Namespace, Config]:
    """Own arguments, and the configuration of the checkpoint changed by the other flags. Raises ValueError for what does not fit."""
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a step_... folder of a run")
    parser.add_argument("--data", type=Path, required=True, nargs="+", metavar="DIR", help="folders written by tools/preprocess_video.py")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--blank_frames", action="store_true", help="measure with black frames too")
    arguments, flags = parser.parse_known_args(argv)
    for folder in arguments.data:
        if not (folder / "dataset.json").is_file():
            raise ValueError(f"--data {folder} holds no dataset.json; write it with tools/preprocess_video.py --output {folder}")
    if int(os.environ.get("RANK", "0")) == 0:  # which writes it
        check_output(arguments.output)
    config = evaluation_config(
        arguments.checkpoint,
        flags,
        prog=parser.prog,
        world_size=world_size,
        gpus_per_host=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
        evaluation=arguments.data,
    )
    return arguments, config


def check_output(path: Path) -> None:
    """Raises ValueError for a file that could not be written at the end, when everything has been asked."""
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; give the JSON file to write, like {path / 'answers.json'}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--output {path}: nothing can be written below {above}; choose another place")


def evaluate(config: Config, folders: list[Path], *, blank_frames: bool) -> dict[str, Any]:
    """The content of the output file; the same on every rank."""
    import torch.distributed as dist
    from tqdm import tqdm

    from megatron_longvila import platform
    from megatron_longvila.checkpoint.origin import check_tokens, describe_tokens
    from megatron_longvila.config_check import check
    from megatron_longvila.data.index import SampleIndex
    from megatron_longvila.data.loader import Loader, Place
    from megatron_longvila.data.shards import open_dataset
    from megatron_longvila.data.text import load_tokenizer
    from megatron_longvila.data.text_rows import TextDataset
    from megatron_longvila.evaluation.answers import predict_labels, score_answers, summarise
    from megatron_longvila.evaluation.model import load_model
    from megatron_longvila.parallel.groups import initialize_groups
    from megatron_longvila.training.loss import predict

    platform.init_distributed(config.parallel.timeout_s)
    groups = initialize_groups(check(config, dist.get_world_size()), timeout_s=config.parallel.timeout_s)
    model = load_model(config, groups)

    tokenizer, datasets = load_tokenizer(config.data.tokenizer), [open_dataset(folder) for folder in folders]
    changes = check_tokens(Path(config.checkpoint.load), describe_tokens(tokenizer, config))
    for dataset in datasets:
        if isinstance(dataset, TextDataset):
            raise ValueError(
                f"--data {dataset.path} holds rows of text, which have no questions; give folders of tools/preprocess_video.py"
            )
    index = SampleIndex(
        datasets, tokenizer, config.data, tokens_per_frame=config.model.tokens_per_frame, vocab_size=config.model.llm.vocab_size
    )
    result: dict[str, Any] = {"checkpoint": config.checkpoint.load, "data": [str(folder) for folder in folders]}
    result["differs_from_training"] = changes
    with tempfile.TemporaryDirectory(prefix="token-lengths-") as cache_dir:
        for name in ("shown", "blank") if blank_frames else ("shown",):
            place = Place.of(groups, sequence_parallel=config.parallel.sequence_parallel)
            loader = Loader(config, place, datasets, tokenizer, evaluation=True, cache_dir=Path(cache_dir))
            bar = tqdm(loader, total=loader.num_steps, desc=f"frames {name}", unit="step", disable=dist.get_rank() != 0)
            predictions = predict_labels(
                model,
                bar,
                groups,
                predict=lambda language_model, hidden, labels_T: predict(language_model, hidden, labels_T, config),
                global_batch_size=config.data.global_batch_size,
                blank_frames=name == "blank",
            )
            answers, skipped = score_answers(predictions, loader, index, tokenizer)
            unusable = list_unusable(index, loader.unusable)
            records = [asdict(answer) for answer in answers]
            result[name] = {"summary": asdict(summarise(answers)), "skipped": skipped, "unusable": unusable, "answers": records}
    is_first = dist.get_rank() == 0
    platform.shutdown_distributed()
    return result if is_first else {}


def list_unusable(index: Any, reasons: dict[int, str]) -> list[dict[str, str]]:
    """The samples that no row holds, and why; an id says which only together with its folder."""
    places = ((*index.locate(number), reason) for number, reason in sorted(reasons.items()))
    return [{"data": str(dataset.path), "sample_id": sample.id, "reason": reason} for dataset, sample, reason in places]


def main(argv: list[str] | None = None) -> int:
    try:
        arguments, config = configure(argv, int(os.environ.get("WORLD_SIZE", "1")))
        check_device(config)
        result = evaluate(config, arguments.data, blank_frames=arguments.blank_frames)
    except ValueError as error:
        refuse(error, int(os.environ.get("LOCAL_RANK", "0")))
    if result:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        for name in ("shown", "blank"):
            if name in result:
                print(describe(name, result[name]))
        print(f"written to {arguments.output}")
    return 0


def describe(name: str, part: dict[str, Any]) -> str:
    """One line for the console."""
    found = part["summary"]
    return (
        f"frames {name}: {found['num_correct']} of {found['num_questions']} answers right = {found['accuracy']:.3f} "
        f"(99% interval {found['low']:.3f} to {found['high']:.3f}); blind: {found['constant_accuracy']:.3f} with one answer, "
        f"{found['question_only_accuracy']:.3f} with one per question; {len(part['skipped']) + len(part['unusable'])} samples skipped"
    )


if __name__ == "__main__":
    sys.exit(main())
