"""A tiny model's configuration, a haystack of numbers and needles for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_longvila.config import Config, DataConfig, LLMConfig, ModelConfig, ParallelConfig, TrainingConfig, VisionConfig


def make_config(tokenizer_path: Path | str, sizes=(1, 1, 1, 1)) -> Config:
    tp_size, pp_size, ulysses_size, ring_size = sizes
    return Config(
        model=ModelConfig(
            vision=VisionConfig(4, 2, 16, 24, 3, 2),
            llm=LLMConfig("qwen2", 32, 48, 4, 4, 2, 8, 420, 256, 10_000.0),
            init_std=0.5,  # an untrained model that says many different things
        ),
        parallel=ParallelConfig(
            tp_size=tp_size, pp_size=pp_size, ulysses_size=ulysses_size, ring_size=ring_size, sequence_parallel=tp_size > 1
        ),
        data=DataConfig(tokenizer=str(tokenizer_path), template="plain", context_length=64, global_batch_size=4),
        training=TrainingConfig(precision="fp32"),
    )


class Numbers:
    """A haystack whose frame n is n + 1 everywhere; `num_frames` of them, or endless."""

    def __init__(self, num_frames: int | None = None):
        self.num_frames = num_frames

    def read(self, numbers) -> np.ndarray:
        return np.stack([np.full((4, 4, 3), number % 200 + 1, np.uint8) for number in numbers])

    def describe(self) -> dict:
        return {"kind": "numbers"}


def make_needles(count: int, distractors: int = 0) -> list:
    from megatron_longvila.evaluation.needle import Needle

    colours = ("red", "blue", "green")
    pictures = tuple(Path(f"distractor{number}") for number in range(distractors))
    return [Needle(f"n{n}", "What colour is the square?", colours[n % 3], Path(f"needle{n}"), pictures) for n in range(count)]
