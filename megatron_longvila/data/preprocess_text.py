"""Text files to rows of exactly the context length (see text_rows.py for what is in the folder).

Two passes: tokenise (worker processes, one part per piece of input, finished parts are kept), then draw the documents and cut the rows
(under temporary names, dataset.json last). What is written depends on the input and the settings alone, not on the number of workers or
on earlier interrupted runs.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_longvila.data.documents import Piece, list_pieces
from megatron_longvila.data.output import PreprocessError, output_folder, write_atomically
from megatron_longvila.data.shards import canonical_json
from megatron_longvila.data.text import Tokenizer, load_tokenizer
from megatron_longvila.data.text_rows import VERSION, Header, cut_rows, hash_file, rows_hash, write_rows
from megatron_longvila.data.tokens import MAX_LISTED, Documents, PartFacts, TokenTask, read_facts, tokenise
from megatron_longvila.data.upsampling import Mixture, SourceCounts, compare, draw, draw_histogram
from megatron_longvila.data.workers import Killed, run_tasks

END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")  # tried in this order where a tokenizer declares no end-of-sequence token
Progress = Callable[[Iterable, int, str, Callable[[object], int]], Iterable]
"""Wraps an iterable to show progress: (iterable, total, what is counted, how much of it an item is)."""


@dataclass(frozen=True)
class Options:
    """What a run does.

    Attributes:
        context_length: tokens of a row.
        end_of_document: special token after each document; `auto` chooses, "" is none.
        long_share: see Mixture; 0 leaves lengths as they are.
        long_fraction: documents of more than this fraction of context_length are long, unless
        long_tokens: says from where on they are.
        num_rows: rows to write, fewer than there are; 0 for all.
        share: (place, count): only the input files number place, place + count, ...
        documents: folder of the tokenised input; None for `documents` below the output. Runs that share it tokenise once.
    """

    inputs: tuple[Path, ...]
    tokenizer: Path
    output: Path
    context_length: int
    end_of_document: str = "auto"
    text_field: str = "text"
    source_field: str = "meta.redpajama_set_name"
    long_share: float = 0.0
    long_fraction: float = 0.5
    long_tokens: int = 0
    max_copies: int = 10
    num_rows: int = 0
    seed: int = 0
    num_workers: int = 4
    share: tuple[int, int] = (0, 1)
    documents: Path | None = None

    @property
    def mixture(self) -> Mixture:
        long_tokens = self.long_tokens or int(self.long_fraction * self.context_length)
        num_tokens = self.num_rows * self.context_length or None
        return Mixture(long_tokens, self.long_share, self.max_copies, num_tokens, self.seed)


@dataclass(frozen=True)
class Report:
    """What became of the input: report.json, and whether anything had to be written.

    Attributes:
        rejected_kinds: how many documents were refused for what; `rows` names at most MAX_LISTED of them.
        ignored_files: files in input folders that are of no known format.
        num_pieces: documents and parts of documents in all rows.
        dropped_tokens: drawn, but not in a row: of the last, short row, and past `num_rows` if that was limited.
    """

    accepted: int
    rejected: int
    rejected_kinds: dict[str, int]
    rows: list[dict]
    ignored_files: int
    row_length: int
    long_tokens: int
    end_of_document: str
    num_rows: int = 0
    num_pieces: int = 0
    dropped_tokens: int = 0
    sources: list[SourceCounts] = field(default_factory=list)
    changed: bool = True


def preprocess_text(options: Options, progress: Progress = lambda iterable, *_: iterable) -> Report:
    """Run both passes. Raises PreprocessError for what a user can mend; OSError where the disk is full or fails."""
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        end_name, end_id = find_end(options.end_of_document, tokenizer)
        pieces, ignored = list_pieces(options.inputs, share=options.share)
    except ValueError as error:
        raise PreprocessError(str(error)) from None
    with ExitStack() as locks:
        folder = options.documents or options.output / "documents"
        if folder.resolve() == options.output.resolve():
            raise PreprocessError(f"--documents {folder} is --output itself; give another folder, or leave it out")
        locks.enter_context(output_folder(options.output, "text"))
        locks.enter_context(output_folder(folder, "text"))
        tasks = [_task(piece, folder, options, tokenizer, end_id) for piece in pieces]
        made_from = _signature(tasks, options)
        finished = _finished(options.output, made_from)
        if finished is not None:
            return finished
        (options.output / "dataset.json").unlink(missing_ok=True)  # from here on the old one may name rows that are no longer there
        parts = _tokenise(tasks, options, progress)
        documents = Documents(folder, [task.key for task in tasks], parts)
        kinds = sum((Counter(part.refused_kinds) for part in parts), Counter())
        report = Report(
            accepted=len(documents),
            rejected=kinds.total(),
            rejected_kinds=dict(kinds.most_common()),
            rows=_rejected_rows(parts, pieces),
            ignored_files=ignored,
            row_length=options.context_length,
            long_tokens=options.mixture.long_tokens,
            end_of_document=end_name,
        )
        header = Header(
            version=VERSION,
            row_length=options.context_length,
            tokenizer=str(options.tokenizer),
            tokenizer_hash=tokenizer.hash,
            end_of_document=end_name,
            end_id=end_id,
            largest_id=max(part.largest_id for part in parts),
            settings=asdict(options.mixture),
            made_from=made_from,
        )
        report = _write(options, documents, report, header, progress)
        if options.documents is None:
            _remove_stale(folder, {task.key for task in tasks})
    return report


def find_end(name: str, tokenizer: Tokenizer) -> tuple[str, int | None]:
    """Name and id of the end-of-document token. `auto` is the tokenizer's end of sequence, else the first of END_TOKENS that it has.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if name in ("", "none"):
        return "", None
    if name != "auto":
        found = tokenizer.find_special(name)
        if found is None:
            raise ValueError(f"--end_of_document {name!r} is no special token of the tokenizer; name one that it has, or '' for none")
        return name, found
    if tokenizer.eos_id is not None:
        return "eos", tokenizer.eos_id
    for candidate in END_TOKENS:
        if (found := tokenizer.find_special(candidate)) is not None:
            return candidate, found
    raise ValueError(
        f"the tokenizer declares no end-of-sequence token and has none of {', '.join(END_TOKENS)}; name a special token with "
        "--end_of_document TOKEN, or '' for none"
    )


# ------------------------------------------------------------------------------------------------ pass 1: tokens


def _task(piece: Piece, folder: Path, options: Options, tokenizer: Tokenizer, end_id: int | None) -> TokenTask:
    return TokenTask(
        piece, str(folder), str(options.tokenizer), tokenizer.hash, end_id, text_field=options.text_field, source_field=options.source_field
    )


def _signature(tasks: list[TokenTask], options: Options) -> str:
    """Of everything that decides the rows."""
    decides = [VERSION, [task.key for task in tasks], options.context_length, asdict(options.mixture)]
    return hashlib.sha256(canonical_json(decides).encode()).hexdigest()


def _tokenise(tasks: list[TokenTask], options: Options, progress: Progress) -> list[PartFacts]:
    """Facts of every part, after making those that are missing."""
    found = {task.key: read_facts(Path(task.folder), task.key) for task in tasks}
    todo = [task for task in tasks if found[task.key] is None]
    if min(options.num_workers, len(todo)) > 1:
        answers = run_tasks(tokenise, todo, num_workers=options.num_workers)
    else:
        answers = ((task, tokenise(task)) for task in todo)
    total = sum(task.piece.stop - task.piece.start for task in todo)
    for task, answer in progress(answers, total, "B", lambda item: item[0].piece.stop - item[0].piece.start):
        if isinstance(answer, Killed):
            raise PreprocessError(
                f"{task.piece.label}: a worker process {answer.reason}; with less memory in use, the same command goes on"
            )
        if not answer:
            raise PreprocessError(f"{task.piece.label} changed while it was read; when it is complete, the same command goes on")
        found[task.key] = read_facts(Path(task.folder), task.key)
    assert all(found.values()), "a part that was just written cannot be read"
    return [found[task.key] for task in tasks]


def _remove_stale(folder: Path, keys: set[str]) -> None:
    """Parts and unfinished files of other inputs or settings."""
    for path in folder.iterdir():
        if path.suffix in (".bin", ".idx", ".json", ".tmp") and path.stem not in keys:
            path.unlink()


# ------------------------------------------------------------------------------------------------ pass 2: rows


def _write(options: Options, documents: Documents, report: Report, header: Header, progress: Progress) -> Report:
    """Draw, cut, and write all files; `report` and `header` come with what is known before, and the report goes out complete.

    Too little text for one row is reported and leaves no dataset.
    """
    mixture, row_length, output = options.mixture, options.context_length, options.output
    drawn = draw(documents.lengths, documents.source_of, mixture)
    num_tokens = int(documents.lengths[drawn].sum(dtype=np.int64))
    num_rows = min(num_tokens // row_length, options.num_rows or num_tokens)
    report = replace(
        report,
        num_rows=num_rows,
        dropped_tokens=num_tokens - num_rows * row_length,
        sources=compare(documents.lengths, documents.source_of, documents.sources, drawn, mixture.long_tokens),
    )
    if not num_rows:
        _write_report(output, report)
        return report
    stream = map(documents.read, drawn.tolist())
    rows = islice(cut_rows(stream, row_length), num_rows)
    written, num_pieces, files = write_rows(output, progress(rows, num_rows, "row", lambda row: 1), documents.dtype)
    assert written == num_rows, f"{written} rows of {num_rows}"
    report = replace(report, num_pieces=num_pieces)
    _write_report(output, report)
    picture = str(output / "document_lengths.png")
    draw_histogram(picture, documents.lengths, drawn, long_tokens=mixture.long_tokens, row_length=row_length)
    index_hash, content = hash_file(output / "rows.idx"), rows_hash(output, header.tokenizer_hash, row_length)
    header = replace(header, num_rows=num_rows, num_pieces=num_pieces, files=files, index_hash=index_hash, hash=content)
    write_atomically(output / "dataset.json", json.dumps({"kind": "text", **asdict(header)}, indent=1).encode() + b"\n")
    return report


def _rejected_rows(parts: list[PartFacts], pieces: list[Piece]) -> list[dict]:
    """{"key": file:line, "reason"} of the rejected documents; at most MAX_LISTED of all."""
    rows, lines_before = [], 0
    for part, piece in zip(parts, pieces, strict=True):
        if piece.start == 0:
            lines_before = 0
        for line, kind, detail in part.refused[: MAX_LISTED - len(rows)]:
            key = f"{piece.label}:{lines_before + line}" if line else piece.label
            rows.append({"key": key, "reason": f"{kind}: {detail}" if detail else kind})
        lines_before += part.num_lines
    return rows


def _write_report(output: Path, report: Report) -> None:
    record = asdict(report)
    del record["changed"]
    write_atomically(output / "report.json", json.dumps(record, indent=1).encode() + b"\n")


def _finished(output: Path, made_from: str) -> Report | None:
    """The report of an earlier run with the same input and settings, if its rows are still there."""
    try:
        header = json.loads((output / "dataset.json").read_bytes())
        record = json.loads((output / "report.json").read_bytes())
        whole = header["made_from"] == made_from and all((output / name).stat().st_size == size for name, size in header["files"].items())
        sources = [SourceCounts(**row) for row in record.pop("sources")]
        return Report(**record, sources=sources, changed=False) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
