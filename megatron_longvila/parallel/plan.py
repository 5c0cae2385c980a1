"""The MM-SP plan: who decodes, encodes and owns what, as integers computed on the CPU from lengths alone.

A row is one pack: samples one after the other. Image sharding gives each cp rank a run of the row's frames; token sharding gives each cp
rank an equal share of the padded rows; the exchange moves each visual token from the rank that encoded it to the owner of its position.

Shapes: T rows of one cp rank after padding.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

IGNORE_INDEX = -100
PLACEHOLDER_ID = -1


@dataclass(frozen=True)
class RowSpec:
    """What is known of a row before anything is decoded.

    Attributes:
        sample_lengths: tokens of each sample, visual tokens included, without padding.
        frame_starts: index into the unpadded row of each frame's first visual token, in increasing order.
        tokens_per_frame: visual tokens of one frame; they are consecutive.
    """

    sample_lengths: tuple[int, ...]
    frame_starts: tuple[int, ...]
    tokens_per_frame: int


@dataclass(frozen=True)
class SequenceLayout:
    """How a padded row lies on the ulysses x ring mesh; the same value on every rank of a cp group.

    Attributes:
        sample_lengths: padded length of each sample, the padding sample that may end the pack included.
            With ring_size > 1 each is a multiple of 2 * ring_size.
        longest_sample: tokens of the longest sample without its padding, the same on every mesh; 0 means that no sample is padded.
    """

    ring_size: int
    ulysses_size: int
    sample_lengths: tuple[int, ...]
    longest_sample: int = 0

    @property
    def total_rows(self) -> int:
        """Rows of the whole padded pack."""
        return sum(self.sample_lengths)

    @property
    def share_rows(self) -> int:
        """Rows of one ring rank (what attention sees after the all-to-all over heads)."""
        return self.total_rows // self.ring_size

    @property
    def local_rows(self) -> int:
        """Rows of one cp rank."""
        return self.share_rows // self.ulysses_size

    @property
    def share_sample_lengths(self) -> tuple[int, ...]:
        """Rows of each sample inside one ring share."""
        return tuple(length // self.ring_size for length in self.sample_lengths)


@dataclass(frozen=True, eq=False)
class RowExchange:
    """One cp rank's part of the all-to-all-v from encoder owner to token owner.

    Attributes:
        send_index: which of this rank's visual tokens (frame after frame) leave, grouped by destination rank. int64 [sum(send_counts)].
        send_counts: rows for each destination rank.
        recv_counts: rows from each source rank.
        recv_rows: local row of each received token, in the order received. int64 [sum(recv_counts)].
    """

    send_index: np.ndarray
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    recv_rows: np.ndarray


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one cp rank does for one row.

    Attributes:
        frames: the row's frames (numbered over the row) that this rank decodes and encodes.
        row_frames: frames of the whole row, the same on every rank.
        row_source_T: index into the unpadded row of each local row, -1 for padding. int64.
        positions_T: rotary position of each local row; restarts at 0 in each sample and runs on through its padding. int64.
    """

    layout: SequenceLayout
    frames: range
    row_frames: int
    row_source_T: np.ndarray
    positions_T: np.ndarray
    exchange: RowExchange

    @cached_property
    def is_padding_T(self) -> np.ndarray:
        """True where a local row is padding. bool."""
        return self.row_source_T < 0


def split_frames(num_frames: int, cp_size: int) -> list[range]:
    """Contiguous frame range of each cp rank; lengths differ by at most one, the first ranks take the longer ones."""
    base, extra = divmod(num_frames, cp_size)
    starts = [rank * base + min(rank, extra) for rank in range(cp_size + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def pad_samples(sample_lengths: tuple[int, ...], *, ulysses_size: int, ring_size: int, row_multiple: int = 1) -> SequenceLayout:
    """Padded lengths: each sample to a multiple of 2 * ring_size (ring_size > 1), then one padding sample so that the pack divides evenly.

    Args:
        row_multiple: rows of a cp rank must divide by this: tp_size with sequence_parallel, else 1.

    Raises:
        ValueError: a sample without tokens.
    """
    if not sample_lengths or min(sample_lengths) < 1:
        raise ValueError(f"sample_lengths={sample_lengths}: a row needs at least one sample and every sample at least one token")
    shards = ulysses_size * row_multiple
    unit, pack_unit = (2 * ring_size, ring_size * math.lcm(2, shards)) if ring_size > 1 else (1, shards)
    lengths = [-(-length // unit) * unit for length in sample_lengths]
    tail = -sum(lengths) % pack_unit
    return SequenceLayout(ring_size, ulysses_size, tuple(lengths + [tail] if tail else lengths), max(sample_lengths))


def share_order(layout: SequenceLayout, ring_rank: int) -> np.ndarray:
    """Padded-row index of every row of one ring share: sample after sample, chunk r then chunk 2R-1-r. int64 [share_rows]."""
    if layout.ring_size == 1:
        return np.arange(layout.total_rows)
    pieces, start = [], 0
    for length in layout.sample_lengths:
        chunk = length // (2 * layout.ring_size)
        for index in (ring_rank, 2 * layout.ring_size - 1 - ring_rank):
            pieces.append(np.arange(start + index * chunk, start + (index + 1) * chunk))
        start += length
    return np.concatenate(pieces)


def owned_rows(layout: SequenceLayout) -> list[np.ndarray]:
    """Padded-row index of every local row, for each cp rank (= ring_rank * ulysses_size + ulysses_rank). int64 [local_rows] each."""
    return [piece for ring_rank in range(layout.ring_size) for piece in np.split(share_order(layout, ring_rank), layout.ulysses_size)]


def plan_row(spec: RowSpec, *, ulysses_size: int, ring_size: int, row_multiple: int = 1) -> list[RankPlan]:
    """Plan of every cp rank for one row.

    Args:
        row_multiple: tp_size with sequence_parallel, else 1.

    Returns:
        One RankPlan per cp rank; over all ranks every unpadded row has exactly one owner and every visual token travels exactly once.

    Raises:
        ValueError: a frame that does not lie wholly inside the row, or overlaps the one before.
    """
    total = sum(spec.sample_lengths)
    ends = [start + spec.tokens_per_frame for start in spec.frame_starts]
    if any(later < end for end, later in zip(ends, (*spec.frame_starts[1:], total), strict=False)) or min(spec.frame_starts, default=0) < 0:
        raise ValueError(
            f"frame_starts={spec.frame_starts} with {spec.tokens_per_frame} tokens per frame must increase without overlap "
            f"inside a row of {total} tokens"
        )
    layout = pad_samples(spec.sample_lengths, ulysses_size=ulysses_size, ring_size=ring_size, row_multiple=row_multiple)

    # Padded row -> unpadded row (or -1) and rotary position.
    source = np.full(layout.total_rows, -1, dtype=np.int64)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in layout.sample_lengths])
    padded_of_source = np.empty(total, dtype=np.int64)
    padded_start = unpadded_start = 0
    for index, padded_length in enumerate(layout.sample_lengths):
        length = spec.sample_lengths[index] if index < len(spec.sample_lengths) else 0
        unpadded = np.arange(unpadded_start, unpadded_start + length)
        source[padded_start : padded_start + length] = unpadded
        padded_of_source[unpadded] = np.arange(padded_start, padded_start + length)
        padded_start, unpadded_start = padded_start + padded_length, unpadded_start + length

    rows = owned_rows(layout)
    frames = split_frames(len(spec.frame_starts), len(rows))
    exchanges = _plan_exchange(spec, layout, rows, frames, padded_of_source)
    num_frames = len(spec.frame_starts)
    return [
        RankPlan(layout, frames[rank], num_frames, source[rows[rank]], positions[rows[rank]], exchanges[rank]) for rank in range(len(rows))
    ]


def _plan_exchange(
    spec: RowSpec, layout: SequenceLayout, rows: list[np.ndarray], frames: list[range], padded_of_source: np.ndarray
) -> list[RowExchange]:
    """Group every visual token by (encoder rank, owner rank); both sides list them in the order of the encoder's tokens."""
    cp_size = len(rows)
    owner = np.empty(layout.total_rows, dtype=np.int64)
    local_row = np.empty(layout.total_rows, dtype=np.int64)
    for rank, owned in enumerate(rows):
        owner[owned], local_row[owned] = rank, np.arange(len(owned))

    starts = np.asarray(spec.frame_starts, dtype=np.int64)
    send_index, counts, sent_rows = [], np.zeros((cp_size, cp_size), dtype=np.int64), {}
    for source_rank, owned_frames in enumerate(frames):
        token_rows = padded_of_source[(starts[owned_frames.start : owned_frames.stop, None] + np.arange(spec.tokens_per_frame)).reshape(-1)]
        by_owner = np.argsort(owner[token_rows], kind="stable")
        send_index.append(by_owner)
        counts[source_rank] = np.bincount(owner[token_rows], minlength=cp_size)
        pieces = np.split(local_row[token_rows[by_owner]], np.cumsum(counts[source_rank])[:-1])
        sent_rows.update({(source_rank, owner_rank): piece for owner_rank, piece in enumerate(pieces)})
    return [
        RowExchange(
            send_index[rank],
            tuple(counts[rank].tolist()),
            tuple(counts[:, rank].tolist()),
            np.concatenate([sent_rows[source_rank, rank] for source_rank in range(cp_size)]),
        )
        for rank in range(cp_size)
    ]
