"""The order of training: rows of (seed, epoch), made from token lengths alone.

A row is one pack of whole samples and the unit of a micro-batch. Nothing about the layout enters: tp, pp, cp, dp and worker counts read the
same endless list of rows, epoch 0, epoch 1, ...; step s takes rows [sG, (s+1)G) of it and dp rank d the rows d, d+dp, ... of those.

An epoch is every sample of the index once or, with a `Mixture`, what that draws: a fixed number of draws from each of its parts. Draws are
shuffled and packed by the same code, so a mixture that draws every sample once gives the very rows of the plain list of datasets.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

OPEN_ROWS = 16  # rows a sample may still join; part of the packing rule, so a change of it changes the data hash
PACKING_RULE = f"first-fit over {OPEN_ROWS} open rows, permutation by philox keys, version 1"
UNUSABLE = -1  # length of a sample that cannot be used at all (too long, bad text)


@dataclass(frozen=True, eq=False)
class EpochRows:
    """The rows of one epoch: row r is samples[starts[r]:starts[r + 1]].

    Attributes:
        samples: sample numbers, row after row. int64.
        starts: num_rows + 1 offsets into `samples`. int64.
    """

    samples: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Sample numbers of row `index`."""
        return self.samples[self.starts[index] : self.starts[index + 1]]


def permute(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of (seed, epoch): samples sorted by raw 64-bit keys of a Philox counter, which unlike numpy's `permutation` never change
    between numpy versions (NEP 19 fixes the bit generators, not the distributions). int64 [num_samples]."""
    keys = np.random.Philox(key=[seed, epoch]).random_raw(num_samples)
    return np.argsort(keys, kind="stable")


@dataclass(frozen=True, eq=False)
class Part:
    """Samples that a mixture draws from together.

    A part has an endless list of draws: all its samples in the order of (seed, 0), then all of them in the order of (seed, 1), and so on.
    Epoch e takes draws [e * count, (e + 1) * count) of it. After E epochs every sample was drawn floor or ceil(E * count / size) times;
    where count is k * size, every epoch draws every sample exactly k times.

    Attributes:
        name: what people call it, in messages and in what a resumed run compares.
        numbers: sample numbers in the index, ascending. int64.
        count: draws of one epoch.
        seed: of the draws' order, which matters unless count is a multiple of the size; below 2**63.
        subset: `numbers` is not all there is under that name, so that a digest of them belongs to the description.
    """

    name: str
    numbers: np.ndarray
    count: int
    seed: int = 0
    subset: bool = False

    def draw(self, epoch: int) -> np.ndarray:
        """Sample numbers of one epoch, ascending, each as often as it was drawn. int64 [count]."""
        size = len(self.numbers)
        start, stop = epoch * self.count, (epoch + 1) * self.count
        times = np.zeros(size, dtype=np.int64)
        for cycle in range(start // size, -(-stop // size)):
            first, end = max(start - cycle * size, 0), min(stop - cycle * size, size)
            times[slice(None) if end - first == size else permute(size, self.seed, cycle)[first:end]] += 1
        return np.repeat(self.numbers, times)

    def describe(self) -> str:
        """What decides the draws, in words that say what differs when two descriptions do."""
        notes = [f"seed {self.seed}"] if self.count % len(self.numbers) else []
        if self.subset:
            notes.append("samples " + hashlib.sha256(np.ascontiguousarray(self.numbers, dtype="<i8").tobytes()).hexdigest()[:8])
        return f"{self.count} from the {len(self.numbers)} of {self.name}" + (f" ({', '.join(notes)})" if notes else "")


class Mixture:
    """What an epoch of several datasets draws, part after part."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def numbers(self) -> np.ndarray:
        """Every sample that some epoch draws, once, ascending."""
        return np.unique(np.concatenate([part.numbers for part in self.parts]))

    def draw(self, epoch: int) -> np.ndarray:
        """Sample numbers of one epoch before they are shuffled. int64."""
        return np.concatenate([part.draw(epoch) for part in self.parts])

    def describe(self) -> str:
        return "; ".join(part.describe() for part in self.parts)

    def is_every_sample_once(self, num_samples: int) -> bool:
        """Whether an epoch is what it would be without a mixture."""
        whole = all(part.count == len(part.numbers) for part in self.parts)
        return whole and len(self) == num_samples and np.array_equal(self.draw(0), np.arange(num_samples))


def apportion(quotas: Sequence[Fraction]) -> list[int]:
    """Whole numbers for exact quotas, by largest remainder: each within one of its quota, together their rounded sum. Whole quotas stay."""
    counts = [int(quota) for quota in quotas]
    missing = int(sum(quotas, Fraction(1, 2))) - sum(counts)
    by_remainder = sorted(range(len(quotas)), key=lambda place: (counts[place] - quotas[place], place))
    for place in by_remainder[:missing]:
        counts[place] += 1
    return counts


def pack(lengths: np.ndarray, order: np.ndarray, context_length: int) -> EpochRows:
    """Put samples, taken in `order`, into rows of at most `context_length` tokens.

    First fit in a bounded window: a sample joins the oldest of at most OPEN_ROWS open rows that has room for it, else it opens a new row;
    the oldest row is closed when there would be more. Rows come out in the order in which they were opened.

    Args:
        lengths: unpadded tokens of every sample; UNUSABLE ones are left out.

    Raises:
        ValueError: a sample longer than `context_length`.
    """
    open_rows: dict[int, int] = {}  # row -> room left; insertion order is age
    rows: list[list[int]] = []
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length == UNUSABLE:
            continue
        if not 0 < length <= context_length:
            raise ValueError(f"sample {sample} has {length} tokens, which do not fit a row of data.context_length={context_length}")
        row = next((r for r, room in open_rows.items() if room >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            open_rows[row] = context_length
            if len(open_rows) > OPEN_ROWS:
                del open_rows[next(iter(open_rows))]
        rows[row].append(sample)
        open_rows[row] -= length
        if open_rows[row] == 0:
            del open_rows[row]
    starts = np.cumsum([0, *map(len, rows)])
    return EpochRows(np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=int(starts[-1])), starts)


class RowSchedule:
    """The list of rows a run reads. Pure: rows are a function of (lengths, context_length, seed, mixture), whoever asks.

    Args:
        lengths: unpadded tokens of every sample, UNUSABLE where it cannot be used. int64.
        context_length: tokens of a row.
        seed: of the permutations; None keeps the samples in their order (evaluation).
        epochs: rows after these epochs do not exist; None for an endless list.
        mixture: what an epoch draws; None is every sample once.

    Raises:
        ValueError: no sample can be used.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        context_length: int,
        *,
        seed: int | None,
        epochs: int | None = None,
        mixture: Mixture | None = None,
    ):
        drawn = lengths if mixture is None else lengths[mixture.numbers]
        if not (drawn > 0).any():
            raise ValueError(f"none of the {len(drawn)} samples can be used; their reasons are in data_report.jsonl in the run directory")
        self._lengths, self._context_length, self._seed = lengths, context_length, seed
        self._num_epochs, self._mixture = epochs, mixture
        self._first_row = [0]  # of epoch 0, 1, ...: as many as were asked for so far
        self._recent: dict[int, EpochRows] = {}

    @property
    def num_rows(self) -> int | None:
        """Rows of all epochs, None if the list is endless."""
        if self._num_epochs is None:
            return None
        while len(self._first_row) <= self._num_epochs:
            self._epoch(len(self._first_row) - 1)
        return self._first_row[self._num_epochs]

    def locate(self, row: int) -> tuple[int, int]:
        """(epoch, row within the epoch) of a row of the list; one past the end gives (epochs, 0)."""
        epoch = 0
        while self._num_epochs is None or epoch < self._num_epochs:
            if len(self._first_row) <= epoch + 1:
                self._epoch(epoch)
            if row < self._first_row[epoch + 1]:
                return epoch, row - self._first_row[epoch]
            epoch += 1
        return epoch, row - self._first_row[epoch]

    def row(self, index: int) -> np.ndarray:
        """Sample numbers of row `index`; empty past the end of the last epoch (a padding row)."""
        if self.num_rows is not None and index >= self.num_rows:
            return np.empty(0, dtype=np.int64)
        epoch, local = self.locate(index)
        return self._epoch(epoch).row(local)

    def _epoch(self, epoch: int) -> EpochRows:
        if epoch not in self._recent:
            samples = np.arange(len(self._lengths)) if self._mixture is None else self._mixture.draw(epoch)
            order = samples if self._seed is None else samples[permute(len(samples), self._seed, epoch)]
            self._recent[epoch] = pack(self._lengths, order, self._context_length)
            if len(self._first_row) == epoch + 1:
                self._first_row.append(self._first_row[epoch] + len(self._recent[epoch]))
            while len(self._recent) > 2:  # a step may span two epochs
                del self._recent[next(iter(self._recent))]
        return self._recent[epoch]


def step_rows(position: int, global_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Rows of the list that dp rank reads in the step that starts at row `position`; ValueError unless dp_size divides the batch."""
    if global_batch_size % dp_size:
        raise ValueError(
            f"data.global_batch_size={global_batch_size} must be a multiple of dp_size={dp_size}; "
            f"the nearest is {-(-global_batch_size // dp_size) * dp_size}"
        )
    return range(position + dp_rank, position + global_batch_size, dp_size)


def check_same_data(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Refuse to continue on other data.

    Args:
        saved, current: what decides the order, by component name (index, tokenizer, template, frames, packing).

    Raises:
        ValueError: names each component that differs.
    """
    different = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if different:
        details = "; ".join(f"{name}: {saved.get(name)} in the checkpoint, {current.get(name)} now" for name in different)
        raise ValueError(
            f"the data position of the checkpoint belongs to other data ({details}); restore what differs, "
            "or start from the weights alone with checkpoint.load"
        )
