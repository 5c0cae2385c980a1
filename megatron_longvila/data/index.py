"""The samples of all dataset folders as one numbered list: encoding by number, cached token lengths, and what decides the row order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_longvila.config import DataConfig
from megatron_longvila.data.batch import Row
from megatron_longvila.data.conversation import Encoded, check_template, encode
from megatron_longvila.data.mixture import PACKING_RULE, UNUSABLE
from megatron_longvila.data.shards import Dataset, Media, Sample
from megatron_longvila.data.text import Tokenizer
from megatron_longvila.data.text_rows import TextDataset, TextRow
from megatron_longvila.data.video import select_frames

CODE_VERSION = 1  # raise when templates or frame rules give other tokens than before
BLOCK_SAMPLES = 256  # one task of a measuring thread
BAR_BLOCKS = 80  # fewer are done before a bar would be read


class SampleIndex:
    """Samples of several datasets, numbered dataset after dataset.

    Args:
        datasets: opened folders.
        tokens_per_frame: visual tokens of a frame, without the newline.
        vocab_size: rows of the embedding table; a larger id is refused.

    Raises:
        ValueError: the tokenizer lacks a special token of `config.template`, there is no sample at all, or text rows were made for
            another tokenizer or longer rows.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset | TextDataset],
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        tokens_per_frame: int,
        vocab_size: int,
    ):
        for dataset in datasets:
            if isinstance(dataset, TextDataset):
                _check_text_rows(dataset, tokenizer, config, vocab_size)
        if any(not isinstance(dataset, TextDataset) for dataset in datasets):
            check_template(config.template, tokenizer)
        self._datasets, self._tokenizer, self._config = list(datasets), tokenizer, config
        self.tokens_per_frame, self.vocab_size = tokens_per_frame, vocab_size
        self._first = np.cumsum([0, *(len(dataset.samples) for dataset in self._datasets)])
        if not len(self):
            folders = ", ".join(str(dataset.path) for dataset in self._datasets)
            raise ValueError(f"{folders} holds no sample; the report.json in it says what preprocessing refused, and why")

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def newline_ids(self) -> tuple[int, ...]:
        """Text tokens that follow each frame."""
        return self._tokenizer.newline_ids

    @property
    def is_text(self) -> bool:
        """Whether all samples are text rows, whose lengths need no measuring."""
        return all(isinstance(dataset, TextDataset) for dataset in self._datasets)

    def locate(self, number: int) -> tuple[Dataset | TextDataset, Sample | TextRow]:
        """The folder that sample `number` comes from, and the sample as it was preprocessed."""
        place = self._place(number)
        dataset = self._datasets[place]
        return dataset, dataset.samples[number - int(self._first[place])]

    def line(self, number: int) -> int:
        """Line of sample `number` in the samples.jsonl of its folder, from 1."""
        return number - int(self._first[self._place(number)]) + 1

    def _place(self, number: int) -> int:
        return int(np.searchsorted(self._first, number, side="right")) - 1

    def selected_frames(self, media: Media) -> list[int]:
        """Frames of a medium that a sample shows, by the configured rule; an image has one."""
        return [0] if media.kind == "image" else select_frames(media.num_frames, media.duration_s, self._config.video)

    def encode(self, number: int) -> Encoded:
        """Tokens of sample `number`. Raises ValueError for what makes the sample unusable, SampleTooLong included."""
        return self._encode(number, self.tokens_per_frame, self._config.context_length)

    def _encode(self, number: int, tokens_per_frame: int, context_length: int | None) -> Encoded:
        dataset, sample = self.locate(number)
        if isinstance(dataset, TextDataset):
            return dataset.encode(self.line(number) - 1, self._config.text_attention)
        encoded = encode(
            sample.conversations,
            self._tokenizer,
            self._config.template,
            frames_per_medium=[len(self.selected_frames(dataset.media[sha256])) for sha256 in sample.media],
            tokens_per_frame=tokens_per_frame,
            context_length=context_length,
        )
        largest = encoded.input_ids_L.max()
        if largest >= self.vocab_size:
            raise ValueError(f"token id {largest} is outside model.llm.vocab_size={self.vocab_size}; the tokenizer and the model differ")
        return encoded

    def row(self, numbers: Sequence[int]) -> Row:
        """The row that packs samples `numbers` in that order; none make a padding row."""
        numbers = tuple(int(number) for number in numbers)
        ids = tuple(self.locate(number)[1].id for number in numbers)
        return Row(numbers, ids, tuple(map(self.encode, numbers)), self.tokens_per_frame)

    def components(self) -> dict[str, str]:
        """What decides rows and their order, by name; equal dictionaries mean equal rows for equal seeds."""
        config, video = self._config, self._config.video
        fps = "" if video.frame_rule == "uniform" else f" fps={video.fps}"
        text = any(isinstance(dataset, TextDataset) for dataset in self._datasets)
        return {
            "index": hashlib.sha256("\n".join(dataset.hash for dataset in self._datasets).encode()).hexdigest()[:16],
            "tokenizer": self._tokenizer.hash[:16],
            "template": f"{config.template} (version {CODE_VERSION})",
            "frames": f"{video.frame_rule} num_frames={video.num_frames}{fps} tokens_per_frame={self.tokens_per_frame}",
            "packing": f"context_length={config.context_length}, {PACKING_RULE}",
        } | ({"text_attention": config.text_attention} if text else {})

    def measure(self, numbers: Sequence[int], *, show_bar: bool = False) -> tuple[np.ndarray, dict[int, str]]:
        """Token lengths of samples `numbers` (UNUSABLE where encoding fails, int64) and the reasons of the failures.

        Threads share the work: both tokenizers release the interpreter while they encode.
        """

        def measure_one(number: int) -> tuple[int, str]:
            dataset = self._datasets[self._place(number)]
            if isinstance(dataset, TextDataset):
                return dataset.row_length, ""
            try:  # without visual tokens, which need no laying out to be counted
                encoded = self._encode(number, 0, None)
            except ValueError as error:
                return UNUSABLE, str(error)
            return len(encoded) + self.tokens_per_frame * len(encoded.frame_starts), ""

        def measure_block(block: Sequence[int]) -> list[tuple[int, str]]:
            return [measure_one(int(number)) for number in block]

        blocks = [numbers[start : start + BLOCK_SAMPLES] for start in range(0, len(numbers), BLOCK_SAMPLES)]
        with ThreadPoolExecutor(max(1, self._config.num_workers)) as pool:
            measured = [one for block in _bar(pool.map(measure_block, blocks), blocks, show_bar) for one in block]
        lengths = np.asarray([tokens for tokens, _ in measured], dtype=np.int64)
        return lengths, {int(number): reason for number, (_, reason) in zip(numbers, measured, strict=True) if reason}

    def too_long(self, lengths: np.ndarray) -> dict[int, str]:
        """Reasons for the samples that have more tokens than a row."""
        limit = self._config.context_length
        return {
            int(number): f"{lengths[number]} tokens, more than data.context_length={limit}; raise it, or lower data.video.num_frames"
            for number in np.flatnonzero(lengths > limit)
        }


class LengthCache:
    """Token lengths of an index on disk: in a dataset folder, else in `fallback`, under the hash of what decides them.

    `numbers` are the samples that are measured, ascending; None is all of them. The file holds lengths before any limit is applied, so that
    another context_length reads the same one.
    """

    def __init__(self, index: SampleIndex, folder: Path, fallback: Path | None = None, numbers: np.ndarray | None = None):
        components = {name: value for name, value in index.components().items() if name != "packing"}
        components["vocab_size"] = str(index.vocab_size)  # decides which samples are unusable
        if numbers is not None and len(numbers) < len(index):
            components["samples"] = hashlib.sha256(np.ascontiguousarray(numbers, dtype="<i8").tobytes()).hexdigest()
        digest = hashlib.sha256(json.dumps(components, sort_keys=True).encode()).hexdigest()[:16]
        self._paths = [Path(parent) / f"token_lengths-{digest}.json" for parent in (folder, fallback) if parent is not None]
        self._size = len(index)

    def read(self) -> tuple[np.ndarray, dict[int, str]] | None:
        """Lengths and reasons, or None if no file is there; a damaged file counts as none and is written anew."""
        for path in self._paths:
            try:
                record = json.loads(path.read_bytes())
                lengths = np.asarray(record["lengths"], dtype=np.int64)
                reasons = {int(number): reason for number, reason in record["unusable"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            if len(lengths) == self._size:
                return lengths, reasons
        return None

    def write(self, lengths: np.ndarray, reasons: dict[int, str]) -> Path | None:
        """Write beside the dataset, or where that cannot be written to the fallback; None if neither can (then every start measures)."""
        data = json.dumps({"lengths": lengths.tolist(), "unusable": reasons}).encode()
        for path in self._paths:
            with contextlib.suppress(OSError):
                if path != self._paths[0]:
                    path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
                partial.write_bytes(data)
                os.replace(partial, path)  # readers see the whole file or none
                return path
        return None


def _check_text_rows(dataset: TextDataset, tokenizer: Tokenizer, config: DataConfig, vocab_size: int) -> None:
    """Raises ValueError if the rows were not made for this configuration."""
    header, again = dataset.header, "or make rows of its own with tools/preprocess_text.py (another --output)"
    if header.tokenizer_hash != tokenizer.hash:
        raise ValueError(
            f"{dataset.path} was tokenised with {header.tokenizer} (sha256 {header.tokenizer_hash[:16]}), but data.tokenizer="
            f"{config.tokenizer!r} has sha256 {tokenizer.hash[:16]}: its ids mean other text; use the former, {again}"
        )
    if header.row_length > config.context_length:
        raise ValueError(
            f"{dataset.path} holds rows of {header.row_length} tokens, more than data.context_length={config.context_length}; "
            f"set --data.context_length {header.row_length}, {again.replace('of its own', f'of {config.context_length}')}"
        )
    if header.largest_id >= vocab_size:
        raise ValueError(
            f"{dataset.path} holds the token id {header.largest_id}, which is outside model.llm.vocab_size={vocab_size}; the tokenizer "
            "and the model differ"
        )


def _bar(results, blocks: list, show: bool):
    if not show or len(blocks) < BAR_BLOCKS:
        return results
    from tqdm import tqdm

    return tqdm(results, total=len(blocks), desc="token lengths", unit_scale=BLOCK_SAMPLES, unit=" samples", mininterval=1.0)
