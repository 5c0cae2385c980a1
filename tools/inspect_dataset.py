#!/usr/bin/env python3
"""Show what is in a dataset: counts, histograms, broken samples, and samples as training would see them, on one HTML page."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_longvila import config_io
from megatron_longvila.config import Config, ParallelConfig
from megatron_longvila.mesh import Mesh

HELP = """
Show what is in a dataset: counts, histograms, broken samples, and samples as training would see them, on one HTML page.

Give it the configuration you would train with; nothing is trained and no GPU is used:

  python tools/inspect_dataset.py --output look --config examples/models/qwen2_7b_siglip_448.yaml \\
      --config examples/stages/stage5_256_frames.yaml --data.train '[data/long_sft]' --data.tokenizer /models/qwen2

look/index.html opens in any browser, offline: for each sample shown, its frames with their time stamps, every token with those that
are trained in green, and the plan: which rank would decode and encode which frames and own which tokens, in the row that the first epoch
puts the sample in. look/summary.json has the counts and histograms, look/broken.jsonl the samples that training would
leave out or mute, and why.

With data.mixture, counts of samples and the broken ones are those of all that any epoch may draw; what is said of an epoch, and the rows
on the page, are those of the first.

--check says how closely media are looked at: `none`, `files` (there, and of the right size; the default) or `decode` (every selected
frame, in processes that are killed when a file takes longer than data.video.timeout_s).
"""
EPILOG = "Exit status: 0 done, 1 something you gave does not fit, 2 wrong usage, 3 done and broken samples were found."
BROKEN = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write; made if missing, its files are replaced"
    )
    parser.add_argument("--num_samples", type=int, default=20, metavar="N", help="samples on the page, spread evenly over the dataset [20]")
    parser.add_argument("--ids", nargs="+", default=[], metavar="ID", help="show these samples instead")
    parser.add_argument("--check", choices=("none", "files", "decode"), default="files", help="how media are checked [files]")
    parser.add_argument("--num_workers", type=int, default=2, metavar="N", help="processes that decode [2]")
    arguments, flags = parser.parse_known_args(argv)
    try:
        if arguments.num_samples < 0 or arguments.num_workers < 1:
            raise ValueError(
                f"--num_samples {arguments.num_samples} must be at least 0 and --num_workers {arguments.num_workers} at least 1"
            )
        config = config_io.parse(flags, prog=parser.prog)
        num_broken = inspect(config, arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return BROKEN if num_broken else 0


def find_mesh(config: Config) -> Mesh:
    """The smallest mesh of the configuration: one data-parallel replica. Raises ValueError for an impossible one."""
    from megatron_longvila.config_check import check

    parallel: ParallelConfig = config.parallel
    given = [size for size in (parallel.ulysses_size, parallel.ring_size) if size != "auto"]
    cp_size = parallel.cp_size if parallel.cp_size != "auto" else 1
    for size in given if parallel.cp_size == "auto" else []:
        cp_size *= size
    return check(config, parallel.tp_size * parallel.pp_size * cp_size)


def inspect(config: Config, arguments: argparse.Namespace) -> int:
    """Write the three files; returns the number of broken samples."""
    import numpy as np

    from megatron_longvila.config_check import check_inputs
    from megatron_longvila.data.index import SampleIndex
    from megatron_longvila.data.inspection import find_broken_media, summarise
    from megatron_longvila.data.inspection_page import render
    from megatron_longvila.data.inspection_views import SampleViewer
    from megatron_longvila.data.mixture import UNUSABLE, RowSchedule
    from megatron_longvila.data.text import load_tokenizer
    from megatron_longvila.data.training_data import open_training_data

    mesh = find_mesh(config)
    check_inputs(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    datasets, mixture = open_training_data(config.data)
    index = SampleIndex(
        datasets, tokenizer, config.data, tokens_per_frame=config.model.tokens_per_frame, vocab_size=config.model.llm.vocab_size
    )
    everything = np.arange(len(index)) if mixture is None else mixture.numbers  # an epoch of a mixture may hold a part of it
    drawn = everything if mixture is None else mixture.draw(0)
    numbers = everything.tolist()
    chosen = choose(index, numbers if arguments.ids else np.unique(drawn).tolist(), arguments.ids, arguments.num_samples)
    lengths = np.full(len(index), UNUSABLE)
    lengths[numbers], reasons = index.measure(numbers, show_bar=True)
    too_long = index.too_long(lengths)
    lengths[list(too_long)] = UNUSABLE
    reasons |= too_long
    length = config.data.context_length
    usable = (lengths > 0).any()
    schedule = RowSchedule(lengths, length, seed=config.training.seed, epochs=1, mixture=mixture) if usable else None
    summary = summarise(index, everything, drawn, lengths, reasons, num_rows=schedule.num_rows if schedule else 0, context_length=length)
    if arguments.check != "none":
        decode = arguments.check == "decode"
        found = find_broken_media(index, numbers, config, decode=decode, num_workers=arguments.num_workers, progress=_bar)
        summary = summary.with_broken(found)

    arguments.output.mkdir(parents=True, exist_ok=True)
    _write(arguments.output / "broken.jsonl", "".join(json.dumps(asdict(one)) + "\n" for one in summary.broken))
    record = {"counts": summary.counts, "histograms": summary.histograms, "broken": len(summary.broken), "rows": index.components()}
    _write(arguments.output / "summary.json", json.dumps(record, indent=1) + "\n")
    viewer = SampleViewer(index, tokenizer, config, mesh, reasons, schedule, num_workers=arguments.num_workers)
    names = {"datasets": ", ".join(str(dataset.path) for dataset in datasets), "tokenizer": config.data.tokenizer}
    drawing = {} if mixture is None else {"mixture": f"{config.data.mixture}: {mixture.describe()}"}
    facts = {**names, **drawing, **{name: value for name, value in index.components().items() if name != "tokenizer"}}
    with open(arguments.output / "index.html", "w", encoding="utf-8") as file:
        file.writelines(render("Dataset", facts, summary, mesh, _bar(viewer.views(chosen), len(chosen), "sample")))
    _report(summary, arguments.output)
    return len(summary.broken)


def choose(index, numbers: list[int], ids: list[str], num_samples: int) -> list[int]:
    """Those of the samples `numbers` to show. Raises ValueError for an id that none of them has."""
    if not ids:
        count = min(num_samples, len(numbers))
        return [numbers[place * len(numbers) // count] for place in range(count)]
    places: dict[str, int] = {}
    for number in numbers:
        places.setdefault(index.locate(number)[1].id, number)
    missing = [name for name in ids if name not in places]
    if missing:
        raise ValueError(f"--ids {missing[0]!r}: none of the {len(numbers)} samples has this id; the first one's is {next(iter(places))!r}")
    return [places[name] for name in ids]


def _bar(iterable, total: int, unit: str):
    from tqdm import tqdm

    return tqdm(iterable, total=total, unit=unit, desc={"medium": "checking media", "sample": "drawing samples"}[unit], disable=not total)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _report(summary, output: Path) -> None:
    for name, value in summary.counts.items():
        print(f"{name}: {value:,}")
    for name, bins in summary.histograms.items():
        print(f"{name}: " + (", ".join(f"[{low}, {high}) {count}" for low, high, count in bins if count) or "none"))
    for one in summary.broken[:10]:
        print(f"broken: {one.id}: {one.reason}")
    if len(summary.broken) > 10:
        print(f"... and {len(summary.broken) - 10} more in {output / 'broken.jsonl'}")
    print(f"{len(summary.broken)} broken samples; the page is {output / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
