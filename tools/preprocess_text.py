#!/usr/bin/env python3
"""Turn text files into a dataset folder of rows of exactly the context length, for context extension."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_longvila.data.preprocess_text import Options, Report

HELP = """
Turn text files into a dataset folder of rows of exactly the context length, for context extension.

A worked example, SlimPajama's layout (train/chunk1/example_0.jsonl.zst, ...), rows of 65,536 tokens, Fu et al.'s length up-sampling:

  python tools/preprocess_text.py --input SlimPajama-627B/train --tokenizer Qwen2-7B --output /data/text/65k \\
      --context_length 65536 --long_share 0.7 --long_tokens 4096 --num_rows 3000 --documents /data/text/tokens

Then train with `--data.train '["/data/text/65k"]' --data.context_length 65536`. Rows of 262,144 tokens from the same --documents are made
without tokenising again.

Input: JSONL files, one {"text": ..., "meta": {"redpajama_set_name": ...}} a line, or .txt files, each one document; both also as .gz or
.zst; folders are searched through. A document belongs to the source that its line names (--source_field), else to the --input it was
found under. Lines that hold no text are counted and listed with their reason in OUTPUT/report.json; the rest goes in.

Rows: the documents, each ended by one token (--end_of_document), are shuffled with --seed, put one after the other, and cut every
--context_length tokens. A document goes on in the next row where one ends; what is left at the end, less than a row, is counted in the
report. Rows know where their documents begin: `--data.text_attention row` attends a row as a whole, `document` every document in it.

Length up-sampling (Fu et al. 2024): with --long_share S, the documents of more than --long_tokens tokens are repeated until they make up
the share S of each source's tokens, and as many tokens of its short documents are left out: every source keeps its share of the whole.
report.json has the table, document_lengths.png the histogram.

The command can be stopped or killed at any time: the same command goes on where it was, and does nothing once all is done.
"""
EPILOG = "Exit status: 0 done, 1 there was no row to write or the run failed, 2 wrong usage."


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)

    from megatron_longvila.data.preprocess_text import Options, PreprocessError, preprocess_text

    given = vars(arguments)
    options = Options(inputs=tuple(given.pop("input")), **given)
    try:
        report = preprocess_text(options, _bar)
    except PreprocessError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or options.output}; once that is solved, the same command goes on")
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on where it was")
    _summarise(report, options)
    if not report.num_rows:
        return _fail(f"{report.dropped_tokens} tokens are less than one row of --context_length {report.row_length}; give more text")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **settings) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, **settings)

    add("input", type=Path, required=True, nargs="+", metavar="PATH", help="files, or folders of them")
    add("tokenizer", type=Path, required=True, metavar="PATH", help="SentencePiece .model file or Hugging Face tokenizer folder")
    add("output", type=Path, required=True, metavar="DIR", help="folder of the dataset; made if missing, continued if started")
    add(
        "share",
        type=_file_share,
        default=(0, 1),
        metavar="I/N",
        help="only every N-th input file, from number I (0, 1, ...) on: for an array of jobs",
    )
    add("context_length", type=_count(2), required=True, metavar="N", help="tokens of a row")
    add(
        "end_of_document",
        default="auto",
        metavar="TOKEN",
        help="special token after each document; '' or none for none; auto is the tokenizer's end of sequence, else <|im_end|>, "
        "<|eot_id|> or <|endoftext|> [auto]",
    )
    add("text_field", default="text", metavar="NAME", help="where a JSON line has its text; dots step into objects [%(default)s]")
    add("source_field", default="meta.redpajama_set_name", metavar="NAME", help="where it names its source [%(default)s]")
    add("long_share", type=_share, default=0.0, metavar="S", help="share of each source's tokens from long documents, at least [0: as is]")
    add("long_tokens", type=_count(1), default=0, metavar="N", help="documents of more tokens are long [--long_fraction of a row]")
    add("long_fraction", type=_fraction, default=0.5, metavar="F", help="the same as a fraction of --context_length [%(default)s]")
    add("max_copies", type=_count(1), default=10, metavar="N", help="most times a document is repeated, whatever the share [%(default)s]")
    add("num_rows", type=_count(1), default=0, metavar="N", help="stop after so many rows, drawn from all of the input [all]")
    add("seed", type=_count(0), default=0, metavar="N", help="of the shuffle and of which documents are repeated [%(default)s]")
    add("documents", type=Path, metavar="DIR", help="folder of tokenised documents, to share between outputs [OUTPUT/documents]")
    add("num_workers", type=_count(1), default=min(8, os.cpu_count() or 1), metavar="N", help="tokenising processes [%(default)s]")
    return parser


def _count(least: int):
    def count(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return count


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def _file_share(text: str) -> tuple[int, int]:
    place, _, count = text.partition("/")
    if not (place.isdecimal() and count.isdecimal() and int(place) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N - 1")
    return int(place), int(count)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} must be 0 or more")
    return value


def _bar(iterable, total: int, unit: str, amount):
    """A bar with rate and time left; items count for `amount(item)` units."""
    from tqdm import tqdm

    what = {"B": "tokenising", "row": "writing rows"}[unit]
    with tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=what, disable=not total) as bar:
        for item in iterable:
            yield item
            bar.update(amount(item))


def _summarise(report: Report, options: Options) -> None:
    from megatron_longvila.data.upsampling import format_table

    for row in report.rows[:10]:
        print(f"rejected {row['key']}: {row['reason']}")
    if report.rejected > 10:
        print(f"... and {report.rejected - 10} more rejected")
    ignored = f"; {report.ignored_files} files of other formats passed over" if report.ignored_files else ""
    print(f"{report.accepted:,} documents accepted, {report.rejected:,} rejected{ignored}")
    print(format_table(report.sources, report.long_tokens))
    missed = [row.source for row in report.sources[:-1] if row.tokens_after and row.long_share_after < options.long_share - 0.005]
    if missed:
        why = f"their long documents would have to be repeated more than --max_copies {options.max_copies} times, or there is none"
        print(f"--long_share {options.long_share} is not reached by {', '.join(missed)}: {why}")
    end = f"documents end with {report.end_of_document}" if report.end_of_document else "no token between documents"
    print(
        f"{report.num_rows:,} rows of {report.row_length:,} tokens ({report.num_pieces:,} pieces of documents; {end}); "
        f"{report.dropped_tokens:,} tokens drawn but in no row"
    )
    if report.num_rows < options.num_rows:
        print(f"fewer rows than --num_rows {options.num_rows}: there is no more text")
    if not report.changed:
        print(f"nothing to do: {options.output} is complete")
    elif report.num_rows:
        print(f"written to {options.output}; see report.json and document_lengths.png in it")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
