#!/usr/bin/env python3
"""Turn a published annotation file into rows for tools/preprocess_video.py, or documents for tools/preprocess_text.py."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from megatron_longvila.data.importers.catalogue import IMPORTERS
from megatron_longvila.data.importers.records import Record
from megatron_longvila.data.importers.rows import Settings
from megatron_longvila.data.importers.run import Options, Report, run_import
from megatron_longvila.data.output import PreprocessError

HELP = """
Turn a published annotation file into rows for tools/preprocess_video.py, or documents for tools/preprocess_text.py.

  python tools/import_dataset.py llava --input llava_v1_5_mix665k.json --media_root /data/llava --output rows/llava.jsonl
  python tools/preprocess_video.py --input rows/llava.jsonl --media_root /data/llava --output data/llava

  python tools/import_dataset.py NAME --help      shows the schema that an importer reads

Pictures and videos are looked for below --media_root; no name may lead out of it, and nothing is ever fetched. Records whose media are not
there are counted and listed, with all others that give no row, in OUTPUT.rejected.jsonl; OUTPUT.report.json has the counts. Every row is
checked as preprocess_video checks it. A row that says and shows the same as an earlier one of the same id is dropped; a different one under
an id that is taken is called ID-2, ID-3, ... and keeps the first id as `origin`.

The command can be stopped or killed at any time: the same command goes on where it was, and does nothing once all is done. (Where media
were missing it looks again.) Files are read one record at a time, whatever their size; only digests of ids and rows stay
in memory, about 180 bytes a row.
"""
EPILOG = "Exit status: 0 done, 1 no row was written or the run failed, 2 wrong usage."


def main(argv: list[str] | None = None) -> int:
    arguments = vars(_parser().parse_args(argv))
    name, inputs, output = arguments.pop("name"), tuple(arguments.pop("input")), arguments.pop("output")
    media_root = arguments.pop("media_root", None)
    options = Options(name, inputs, output, media_root, Settings(**arguments))
    try:
        report = run_import(options, _bar)
    except PreprocessError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or output}; once that is solved, the same command goes on")
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on where it was")
    _summarise(report, options)
    return 0 if report.rows else _fail("no row was written" if report.records else f"{', '.join(map(str, inputs))} holds no record")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    flags = {
        "fps": {"type": _positive_float, "metavar": "F", "help": "rate at which folders of frames were taken [such folders are rejected]"},
        "caption": {"metavar": "FIELD", "help": "field or column with the caption"},
        "split": {"metavar": "NAME", "help": "set to read, or all [training]"},
        "clips": {"action": "store_true", "help": "one row for each clip of a video, not one for the whole video"},
        "answers": {"type": Path, "metavar": "FILE", "help": "answers by question_id, where they stand apart from the questions"},
        "sources": {
            "type": _names,
            "metavar": "A,B",
            "help": "only documents of these sources (RedPajamaBook,RedPajamaArXiv) [all]",
        },
    }
    for name, importer in IMPORTERS.items():
        schema = inspect.getdoc(importer.convert)
        one = names.add_parser(
            name, help=schema.split("\n")[0], description=schema, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        one.add_argument("--input", type=Path, required=True, nargs="+", metavar="FILE", help="annotation files, in this order")
        one.add_argument("--output", type=Path, required=True, metavar="ROWS", help="JSONL file of the rows; made or continued")
        if not importer.is_text:
            one.add_argument(*_spellings("media_root"), type=Path, required=True, metavar="DIR", help="folder of the pictures or videos")
            one.add_argument("--search", action="store_true", help="look for media by name in all sub-folders as well")
        for flag in importer.flags:
            one.add_argument(*_spellings(flag), default=getattr(Settings(), flag), **flags[flag])
    return parser


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _bar(records: Iterable[Record], total: int) -> Iterator[Record]:
    """A bar over the bytes read, with rate and time left."""
    with tqdm(total=total, unit="B", unit_scale=True, desc="importing", mininterval=0.5) as bar:
        for record in records:
            yield record
            if record.done - bar.n > 1 << 16:
                bar.update(record.done - bar.n)
        bar.update(total - bar.n)


def _summarise(report: Report, options: Options) -> None:
    renamed = f" ({report.renamed:,} under a new id)" if report.renamed else ""
    unwanted = f", {report.unwanted:,} of other splits or sources passed over" if report.unwanted else ""
    print(f"{report.records:,} records: {report.rows:,} rows{renamed}, {sum(report.rejected.values()):,} rejected{unwanted}")
    for kind, count in sorted(report.rejected.items()):
        print(f"  {count:,} {kind}")
    if report.rejected:
        print(f"each with its reason in {options.output}.rejected.jsonl")
    if not report.changed:
        print(f"nothing to do: {options.output} is complete")
    elif report.rows:
        tool = "preprocess_text.py" if IMPORTERS[options.name].is_text else f"preprocess_video.py --media_root {options.media_root}"
        print(f"written to {options.output}; next: python tools/{tool} --input {options.output} ...")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
