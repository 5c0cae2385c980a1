"""The grid of a needle test: which needle hides where, decided by integers alone, so that every rank and every resumed run agrees.

A cell is a length and a depth; a trial is one question about one haystack of that length. Lengths count frames (or tokens of a text).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

LENGTHS_DRAW, PLACES_DRAW = 1, 2  # keep the random numbers of different purposes apart


@dataclass(frozen=True)
class Cell:
    """`depth` is a fraction: 0 is the start of the haystack, 1 its end. `control`: the needle is left out."""

    length: int
    depth: float
    control: bool = False

    @property
    def key(self) -> tuple[int, float, bool]:
        """What a record file knows it by."""
        return self.length, self.depth, self.control


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        number: of the trial in its cell, from 0; also decides where in the haystack's material it starts.
        needle: which needle of the file.
        seed: of everything else that is drawn for it; the same with and without the needle.
    """

    cell: Cell
    number: int
    needle: int
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Lengths by depths, `trials_per_cell` questions each.

    Raises:
        ValueError: no length or depth, one out of range or given twice, or fewer than two needles.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials_per_cell: int
    num_needles: int
    seed: int = 0
    control: bool = False

    def __post_init__(self):
        for name, values in (("lengths", self.lengths), ("depths", self.depths)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} {list(values)} must name at least one value, each once")
        if min(self.lengths) < 1:
            raise ValueError(f"--lengths {list(self.lengths)} must be at least 1: the needle itself counts")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"--depths {list(self.depths)} must lie between 0 (the start of the haystack) and 1 (its end)")
        if self.trials_per_cell < 1:
            raise ValueError(f"--trials_per_cell {self.trials_per_cell} must be at least 1")
        if self.num_needles < 2:
            raise ValueError(
                f"{self.num_needles} needle would be the right answer to every trial; give at least 2 with different answers (--needles)"
            )

    @property
    def cells(self) -> list[Cell]:
        """Shortest haystacks first; the control of a cell follows it."""
        controls = (False, True) if self.control else (False,)
        return [Cell(length, depth, control) for length, depth, control in product(self.lengths, self.depths, controls)]

    def trials(self, cell: Cell) -> list[Trial]:
        """The questions of a cell; they depend on the depths and on trials_per_cell, not on the other lengths, which may be added later.

        The needles of a length follow each other through the whole file, depth after depth, from a seeded place on; each further round
        through the file starts one needle later, so that no trial meets the same needle at every depth.
        """
        depth_index = self.depths.index(cell.depth)
        first = int(_draw(self.seed, LENGTHS_DRAW, cell.length).integers(self.num_needles))
        trials = []
        for number in range(self.trials_per_cell):
            place = depth_index * self.trials_per_cell + number
            needle = (first + place + place // self.num_needles) % self.num_needles
            trials.append(Trial(cell, number, needle, (self.seed, PLACES_DRAW, cell.length, depth_index, number)))
        return trials


def needle_place(length: int, depth: float) -> int:
    """Frame that the needle takes among `length`: 0 at depth 0, the last one at depth 1."""
    return round(depth * (length - 1))


def distractor_places(trial: Trial, count: int, needle_at: int) -> list[int]:
    """Seeded different places beside the needle's, in the order of the distractors; at most half of the other frames are taken."""
    length = trial.cell.length
    others = [place for place in range(length) if place != needle_at]
    return _draw(*trial.seed).permutation(others)[: min(count, (length - 1) // 2)].astype(int).tolist()


def split_rows(lengths: Sequence[int], tokens_per_row: int, dp_size: int) -> list[list[int]]:
    """Pack trials into rows of at most `tokens_per_row` tokens (a longer trial has a row of its own), spread over `dp_size` ranks.

    Returns:
        The numbers of the trials of each row. The rows are as even as can be, and their number is a multiple of dp_size where there are
        trials enough: a rank with one row less would only wait for the others.
    """
    fits = max(1, tokens_per_row // max(lengths))
    num_rows = math.ceil(len(lengths) / fits)
    num_rows = min(math.ceil(num_rows / dp_size) * dp_size, len(lengths))
    return [part.tolist() for part in np.array_split(np.arange(len(lengths)), num_rows)]


def _draw(*seed: int) -> np.random.Generator:
    return np.random.default_rng(list(seed))
