"""Text files, a tokenizer of whole words, and folders of text rows, for the tests of text data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import zstandard
from tiny_tokenizers import write_sentencepiece

from megatron_longvila.data.preprocess_text import Options


def write_words(path: Path) -> Path:
    """A tokenizer that makes one token of every word, also of one that it does not know."""
    return write_sentencepiece(path, model_type="word", byte_fallback=False, vocab_size=200, user_defined_symbols=["\n", "<|im_end|>"])


def text(number: int, num_words: int) -> str:
    """A document that no other number has, of words the tokenizer knows."""
    names = ["colour", "is", "the", "shape", "moves", "to", "blue", "circle"]
    return " ".join(names[(number // 8**place if place < 4 else number * place) % 8] for place in range(num_words))


def pack_lines(records: list, suffix: str = ".jsonl") -> bytes:
    """A JSONL file's bytes; a record may be the bytes of a line."""
    data = b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in records)
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix.removeprefix(".jsonl")](data)


def write_file(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def options(inputs: list[Path], tokenizer: Path, output: Path, **settings) -> Options:
    settings = {"context_length": 8, "num_workers": 1} | settings
    return Options(inputs=tuple(inputs), tokenizer=tokenizer, output=output, **settings)
