#!/usr/bin/env python3
"""Tokens per second of tools/preprocess_text.py, as a share of what the tokenizer library reaches alone on all processors."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

HELP = """
Tokens per second of tools/preprocess_text.py, as a share of what the tokenizer library reaches alone on all processors.

  python tools/benchmark_text.py --work /tmp/text --output tools/benchmark_results/text.json

Without --input and --tokenizers, both are made first and kept in --work: text from the files of the Python that runs this (source code,
notes, manuals; documents of at most 20,000 characters, shuffled), and two tokenizers trained on a part of it: `bpe`, byte-level with
the pieces of text split as GPT-2 does (tokenizers), and `sentencepiece`, BPE with byte fallback.

`library` has all texts in memory before the clock starts, and then gives them to the library's own parallel call, in batches: the faster of
`encode_batch` and `encode_batch_fast` for tokenizers, `encode(num_threads=all)` for SentencePiece. `preprocess_text` is the whole command
as a user runs it, from the start of Python over reading and parsing the JSONL to the rows and their hashes on the disk. Both take turns,
each in a process of its own, and of the rounds the least times count: other work on the machine only ever adds. They must give the same
number of tokens. Besides wall-clock seconds, processor seconds of all processes are compared, which a busy machine disturbs less.
--output is written anew after each round.
"""
EPILOG = "Exit status: 0 done, 1 something failed, the numbers of tokens differ, or a share is below --least_share, 2 wrong usage."
ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".html")
DOCUMENT_CHARACTERS, TRAINING_BYTES, BATCH = 20_000, 8 << 20, 1000
PACKAGES = ("tokenizers", "sentencepiece", "megatron-core", "numpy")


# ------------------------------------------------------------------------------------------------ what is read


def find_text(limit_bytes: int) -> Iterator[str]:
    """Texts of the running Python's library and packages, at most so many bytes of them."""
    total = 0
    for root in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            for start in range(0, len(text), DOCUMENT_CHARACTERS):
                document = text[start : start + DOCUMENT_CHARACTERS]
                if document.strip():
                    yield document
                    total += len(document.encode())
            if total > limit_bytes:
                return


def make_text(path: Path, limit_bytes: int) -> None:
    import random

    documents = list(find_text(limit_bytes))
    random.Random(0).shuffle(documents)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    os.replace(partial, path)


def read_text(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def training_text(path: Path) -> list[str]:
    documents, total = [], 0
    for document in read_text(path):
        documents.append(document)
        total += len(document.encode())
        if total > TRAINING_BYTES:
            break
    return documents


def make_bpe(folder: Path, documents: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer.save(str(folder / "tokenizer.json"))


def make_sentencepiece(folder: Path, documents: list[str]) -> None:
    import sentencepiece

    folder.mkdir()
    lines = (line for document in documents for line in document.splitlines() if line.strip())
    prefix = folder / "unfinished"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(prefix), model_type="bpe", vocab_size=16_000, byte_fallback=True, minloglevel=2
    )
    os.replace(f"{prefix}.model", folder / "tokenizer.model")


MAKERS = {"bpe": make_bpe, "sentencepiece": make_sentencepiece}


# ------------------------------------------------------------------------------------------------ what is timed


def time_library(tokenizer: Path, text: Path) -> dict:
    """One pass of the library over all texts, in this process."""
    documents = read_text(text)
    batches = [documents[start : start + BATCH] for start in range(0, len(documents), BATCH)]
    if (tokenizer / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # as text, for that is what a text that spells one means
        calls = {
            name: lambda batch, name=name: sum(len(one) for one in getattr(backend, name)(batch, add_special_tokens=False))
            for name in ("encode_batch", "encode_batch_fast")
        }
    else:
        import sentencepiece

        backend = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
        calls = {"encode": lambda batch: sum(map(len, backend.encode(batch, num_threads=os.cpu_count())))}
    found = []
    for name, call in calls.items():
        call(batches[0][:10])  # threads and tables are there before the clock starts
        wall, processor = time.perf_counter(), time.process_time()
        tokens = sum(map(call, batches))
        seconds = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
        found.append({"call": name, "tokens": tokens} | seconds)
    return min(found, key=lambda one: one["processor_s"])


def time_command(tokenizer: Path, text: Path, work: Path, num_workers: int) -> dict:
    """The whole command, into a folder that is not there yet."""
    output = work / "output"
    shutil.rmtree(output, ignore_errors=True)
    words = ["--input", text, "--tokenizer", tokenizer, "--output", output, "--context_length", "65536", "--num_workers", num_workers]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    adopt_orphans()
    start, before = time.perf_counter(), children_s()
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "preprocess_text.py", *map(str, words)], capture_output=True, text=True, env=environment
    )
    seconds = {"wall_s": time.perf_counter() - start, "processor_s": children_s() - before}
    if done.returncode:
        raise RuntimeError(f"preprocess_text failed: {done.stderr[-2000:]}")
    report = json.loads((output / "report.json").read_text())
    tokens = report["num_rows"] * report["row_length"] + report["dropped_tokens"] - report["accepted"]  # less the end tokens
    shutil.rmtree(output)
    return {"call": "preprocess_text", "tokens": tokens} | seconds


def adopt_orphans() -> None:
    """Processes that the command started and did not wait for become this one's children, so that their seconds are counted (Linux)."""
    set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot adopt the processes of the command")


def children_s() -> float:
    """Processor seconds of all processes that were started from here and have ended, after waiting for those that still end."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            return used.ru_utime + used.ru_stime


def run(arguments: argparse.Namespace) -> dict:
    arguments.work.mkdir(parents=True, exist_ok=True)
    text = arguments.input or arguments.work / f"text_{arguments.megabytes}.jsonl"
    if not text.exists():
        make_text(text, arguments.megabytes << 20)
    tokenizers = {path.name: path for path in arguments.tokenizers}
    for name, make in MAKERS.items() if not tokenizers else ():
        tokenizers[name] = arguments.work / name
        if not (tokenizers[name] / "tokenizer.json").exists() and not (tokenizers[name] / "tokenizer.model").exists():
            shutil.rmtree(tokenizers[name], ignore_errors=True)
            make(tokenizers[name], training_text(text))
    samples: dict[str, list[dict]] = {name: [] for name in tokenizers}
    loads = []
    for _ in range(arguments.repeats):
        loads.append(round(os.getloadavg()[0], 1))
        for name, path in tokenizers.items():
            samples[name].append(apart("library", path, text))
            samples[name].append(apart("command", path, text, arguments.work, arguments.num_workers))
        found = {
            "command": arguments.command,
            "processor": find_processor(),
            "cpus": os.cpu_count(),
            "load_at_each_round": loads,
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "text_bytes": text.stat().st_size,
            "num_workers": arguments.num_workers,
            "rows": [compare(name, found) for name, found in samples.items()],
        }
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return found


def apart(what: str, *arguments: object) -> dict:
    """`time_library` or `time_command` in a process of its own."""
    done = subprocess.run(list(map(str, [sys.executable, __file__, "--time", what, *arguments])), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"timing the {what} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, samples: list[dict]) -> dict:
    """The least times of all readings of one tokenizer."""
    tokens = {one["tokens"] for one in samples}
    if len(tokens) > 1:
        raise RuntimeError(f"{name}: the library and preprocess_text gave different numbers of tokens: {sorted(tokens)}")
    count = tokens.pop()
    rounds = sum(one["call"] == "preprocess_text" for one in samples)
    row = {"tokenizer": name, "tokens": count, "library_call": samples[0]["call"], "rounds": rounds}
    for kind in ("wall_s", "processor_s"):
        library = min(one[kind] for one in samples if one["call"] != "preprocess_text")
        command = min(one[kind] for one in samples if one["call"] == "preprocess_text")
        row |= {f"library_{kind}": round(library, 2), f"preprocess_text_{kind}": round(command, 2)}
        row[f"share_by_{kind}"] = round(library / command, 3)
    return row | {"library_tokens_per_s": round(count / row["library_wall_s"])}


def find_processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


# ------------------------------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == ["--time", "library"]:
        print(json.dumps(time_library(*map(Path, argv[2:]))))
        return 0
    if argv[:2] == ["--time", "command"]:
        print(json.dumps(time_command(*map(Path, argv[2:5]), int(argv[5]))))
        return 0
    arguments = parse(argv)
    try:
        found = run(arguments)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in found["rows"]:
        print(
            f"{row['tokenizer']}: {row['tokens']:,} tokens; library ({row['library_call']}) {row['library_wall_s']:g} s, preprocess_text "
            f"{row['preprocess_text_wall_s']:g} s: {row['share_by_wall_s']:.2f} of its tokens a second ({row['share_by_processor_s']:.2f} "
            "a second of processor)"
        )
    short = [row["tokenizer"] for row in found["rows"] if row["share_by_wall_s"] < arguments.least_share]
    if short:
        print(f"error: less than {arguments.least_share} of the library's tokens per second with {', '.join(short)}", file=sys.stderr)
    return 1 if short else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="where text, tokenizers and outputs are made")
    add("--output", type=Path, metavar="FILE", help="JSON file to write")
    add("--input", type=Path, metavar="FILE", help='a JSONL file of {"text": ...} instead of the text that is made')
    add("--tokenizers", type=Path, nargs="+", default=[], metavar="DIR", help="tokenizer folders instead of those that are made")
    add("--megabytes", type=int, default=256, metavar="N", help="of text to make [%(default)s]")
    add("--num_workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="of preprocess_text [%(default)s]")
    add("--repeats", type=int, default=3, metavar="N", help="rounds; the least times of them count [%(default)s]")
    add("--least_share", type=float, default=0.0, metavar="S", help="fail below this share [%(default)s: never]")
    return parser.parse_args(argv, argparse.Namespace(command=spell(argv)))


def spell(argv: list[str]) -> str:
    """The command as it was given; folders of this machine, which say nothing to others, as their last names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    return shlex.join(["python", "tools/benchmark_text.py", *words])


if __name__ == "__main__":
    sys.exit(main())
