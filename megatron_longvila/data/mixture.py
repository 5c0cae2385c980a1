"""The order of training: rows of (seed, epoch), made from token lengths alone.

A row is one pack of whole samples and the unit of a micro-batch. Nothing about the layout enters: tp, pp, cp, dp and worker counts read the
same endless list of rows, epoch 0, epoch 1, ...; step s takes rows [sG, (s+1)G) of it and dp rank d the rows d, d+dp, ... of those.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

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
    """The list of rows a run reads. Pure: rows are a function of (lengths, context_length, seed), whoever asks.

    Args:
        lengths: unpadded tokens of every sample, UNUSABLE where it cannot be used. int64.
        context_length: tokens of a row.
        seed: of the permutations; None keeps the samples in their order (evaluation).
        epochs: rows after these epochs do not exist; None for an endless list.

    Raises:
        ValueError: no sample can be used.
    """

    def __init__(self, lengths: np.ndarray, context_length: int, *, seed: int | None, epochs: int | None = None):
        if not (lengths > 0).any():
            raise ValueError(f"none of the {len(lengths)} samples can be used; their reasons are in data_report.jsonl in the run directory")
        self._lengths, self._context_length, self._seed = lengths, context_length, seed
        self._num_epochs = epochs
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
            num_samples = len(self._lengths)
            order = np.arange(num_samples) if self._seed is None else permute(num_samples, self._seed, epoch)
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
