"""A haystack of numbers, and needles for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np


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
