#!/usr/bin/env python3
"""Turn LLaVA-style rows and their videos and images into a dataset folder that LongVILA trains from."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_longvila.data.media import MediaLimits
from megatron_longvila.data.output import PreprocessError
from megatron_longvila.data.preprocess import Options, Report, preprocess

HELP = """
Turn LLaVA-style rows and their videos and images into a dataset folder that LongVILA trains from.

A worked example. rows.jsonl holds one JSON object a line (a JSON list is read too):

  {"id": "clip-1", "video": "clips/cat.mp4",
   "conversations": [{"from": "human", "value": "<video>\\nWhat does the cat do?"}, {"from": "gpt", "value": "It sleeps."}]}
  {"id": "pair-1", "images": ["a.jpg", "b.jpg"],
   "conversations": [{"from": "human", "value": "<image> <image>\\nSame place?"}, {"from": "gpt", "value": "No."}]}
  {"id": "frames-1", "video": "frames/0001", "fps": 2,        (a folder of pictures is a video when it has an fps)
   "conversations": [...]}
  {"id": "text-1", "conversations": [...]}                    (text alone is a sample too)

and the files lie below /data/media:

  python tools/preprocess_video.py --input rows.jsonl --media_root /data/media --output /data/longvila/train

Then train with `--data.train '["/data/longvila/train"]'`. Have a look first with --dry_run, which writes nothing.

Rows: each <video> or <image> mark in a human turn stands for the next file of its kind, so there must be as many marks as files.
Turns alternate human, gpt, ..., end with gpt, and may start with one system turn. Rows that do not fit, and files that do not open, are
counted and listed with their reason in OUTPUT/report.json; the rest goes in.

The command can be stopped or killed at any time: the same command goes on where it was, and does nothing once all is done. A medium is
stored once, by its sha256, however many rows show it.
"""
EPILOG = "Exit status: 0 done, 1 no row was accepted or the run failed, 2 wrong usage."


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    options = Options(
        input=arguments.input,
        media_root=arguments.media_root,
        output=arguments.output,
        store=arguments.store,
        num_workers=arguments.num_workers,
        shard_bytes=arguments.shard_mib << 20,
        timeout_s=arguments.timeout_s,
        limits=MediaLimits(arguments.max_pixels, arguments.max_frames, arguments.max_streams, arguments.max_bytes),
        dry_run=arguments.dry_run,
    )
    try:
        report = preprocess(options, _bar)
    except PreprocessError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or options.output}; once that is solved, the same command goes on")
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on where it was")
    _summarise(report, options)
    if not report.accepted:
        return _fail("no row was accepted" if report.rejected else f"--input {options.input} holds no row")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    limits = MediaLimits()

    def add(name: str, **settings) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, **settings)

    add("input", type=Path, required=True, metavar="ROWS", help="JSONL file, or a JSON file that holds one list")
    add("media_root", type=Path, required=True, metavar="DIR", help="folder that paths in the rows start from; no path may leave it")
    add("output", type=Path, required=True, metavar="DIR", help="folder of the dataset; made if missing, continued if started")
    add("store", choices=("tar", "reference"), default="tar", help="copy media into webdataset tars, or index them where they are [tar]")
    add("num_workers", type=_positive, default=min(8, os.cpu_count() or 1), metavar="N", help="processes that read media [%(default)s]")
    add("shard_mib", type=_positive, default=1024, metavar="MIB", help="largest tar, unless one medium is larger [%(default)s]")
    add("timeout_s", type=float, default=300.0, metavar="S", help="a file that takes longer to look at is refused [%(default)s]")
    add("max_pixels", type=_positive, default=limits.max_pixels, metavar="N", help="width x height of a frame or image [%(default)s]")
    add("max_frames", type=_positive, default=limits.max_frames, metavar="N", help="frames of a video [%(default)s]")
    add("max_streams", type=_positive, default=limits.max_streams, metavar="N", help="tracks of a video file [%(default)s]")
    add("max_bytes", type=_positive, default=limits.max_bytes, metavar="N", help="size of a media file [%(default)s]")
    add("dry_run", action="store_true", help="look at everything, print what would happen, write nothing")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _bar(iterable, total: int, unit: str):
    return tqdm(iterable, total=total, unit=unit, desc={"file": "looking at media", "shard": "writing shards"}[unit], disable=not total)


def _summarise(report: Report, options: Options) -> None:
    for row in report.rows[:10]:
        print(f"rejected {row['key']}: {row['reason']}")
    if report.rejected > 10:
        print(f"... and {report.rejected - 10} more rejected")
    print(f"{report.accepted} rows accepted, {report.rejected} rejected")
    print(f"{report.num_media} media, {report.duration_s / 3600:.2f} hours of video, {report.num_bytes / 2**20:.1f} MiB")
    if options.dry_run:
        print("dry run: nothing was written")
    elif report.changed:
        print(f"written to {options.output} ({report.num_shards} shards); all rejected rows are in {options.output / 'report.json'}")
    else:
        print(f"nothing to do: {options.output} is complete")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
