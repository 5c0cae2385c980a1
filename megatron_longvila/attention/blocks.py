"""Which queries of a ring share meet which keys: the blocks of ring.py, as slices, and the rows that ranks send each other.

Planned once for each layout, rank and device. Shapes: R ranks, S rows of a share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megatron_longvila import platform
from megatron_longvila.parallel.plan import SequenceLayout, share_order


@dataclass(frozen=True, eq=False)
class Scattered:
    """Rows that are no neighbours, in the order in which they are taken. int64 [rows]."""

    rows: np.ndarray


Rows = slice | Scattered


@dataclass(frozen=True, eq=False)
class Block:
    """Queries `q` (rows of the share) that see every key of `k` (rows of some buffer), or the keys up to their own with `causal`.

    Attributes:
        lengths, key_lengths: rows and keys of each sample in a block of several; a row then sees keys of its own sample alone.
    """

    q: Rows
    k: Rows
    causal: bool = False
    lengths: tuple[int, ...] = ()
    key_lengths: tuple[int, ...] = ()


def take(x: Tensor, rows: Rows) -> Tensor:
    """Rows of x: a view of neighbours, a copy of scattered ones."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, _index(rows, x.device))


def put(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Write rows of x."""
    if isinstance(rows, slice):
        x[rows].copy_(values)
    else:
        x.index_copy_(0, _index(rows, x.device), values)


def add(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Add to rows of x, which each occur once."""
    if isinstance(rows, slice):
        x[rows] += values
    else:
        x.index_add_(0, _index(rows, x.device), values.to(x.dtype))


@lru_cache(maxsize=64)  # a pack takes 30 on a ring of 16 whose keys travel point to point, more if long samples part it
def _index(rows: Scattered, device: torch.device) -> Tensor:
    return platform.upload(torch.from_numpy(rows.rows), device)


@lru_cache(maxsize=64)
def own_blocks(layout: SequenceLayout, tile: int | None = None, short: int = 0) -> tuple[Block, ...]:
    """Blocks of the share's own rows. The causal ones, which come first, together cover every row once.

    With `tile`, samples of more than two tiles are cut: causal squares of `tile` rows, and under each a rectangle of all later rows.
    Neighbours of at most `short` rows are one block.
    """
    causal, rectangles = [], []
    for is_short, run in itertools.groupby(_samples(layout), lambda sample: sample[0].stop - sample[0].start <= short):
        samples = [rows for rows, _ in run]
        if is_short and len(samples) > 1:
            causal.append(_joined([(rows, rows) for rows in samples], causal=True))
            continue
        for rows in samples:
            edges = _edges(rows, tile)
            for start, stop in zip(edges, edges[1:], strict=False):
                causal.append(Block(slice(start, stop), slice(start, stop), causal=True))
                if stop < rows.stop:
                    rectangles.append(Block(slice(stop, rows.stop), slice(start, stop)))
    return (*causal, *rectangles)


@lru_cache(maxsize=64)
def gathered_blocks(layout: SequenceLayout, rank: int, tile: int | None = None, short: int = 0) -> tuple[Block, ...]:
    """Rectangles against the other ranks' keys; `k` counts rows of the padded pack, where each rectangle's chunks are neighbours.

    Of the gathered shares, one after the other, where `fits_as_gathered`. `tile` and `short`: as in `own_blocks`.
    """
    if fits_as_gathered(layout):
        share = slice(0, layout.share_rows)
        half = layout.share_rows // 2
        both = (slice(half, share.stop), slice(share.stop, 2 * share.stop)) if rank == 0 else (share, slice(0, half))
        return tuple(_cut(*both, tile))
    rectangles = []
    for rows, chunk in _samples(layout):
        start = rows.start * layout.ring_size
        before = (rows, slice(start, start + rank * chunk))
        between = slice(start + (rank + 1) * chunk, start + (2 * layout.ring_size - 1 - rank) * chunk)
        after = (slice(rows.start + chunk, rows.stop), between)
        rectangles.append([before] * (rank > 0) + [after] * (rank < layout.ring_size - 1))
    # `short` is where the work of a causal square is small; here the same rows meet R - 1 times as many pairs.
    return _grouped(rectangles, layout, tile, math.isqrt(short**2 // max(1, layout.ring_size - 1)))


@lru_cache(maxsize=256)
def visiting_blocks(layout: SequenceLayout, rank: int, source: int, tile: int | None = None, short: int = 0) -> tuple[Block, ...]:
    """Rectangles against the rows that rank `source` sends to `rank`; `k` counts those rows. `tile` and `short`: as in `own_blocks`."""
    rectangles, start = [], 0
    for rows, chunk in _samples(layout):
        sent = chunk if source < rank else 2 * chunk
        queries = rows if source < rank else slice(rows.start + chunk, rows.stop)
        rectangles.append([(queries, slice(start, start + sent))])
        start += sent
    return _grouped(rectangles, layout, tile, short)


@lru_cache(maxsize=128)
def sent_rows(layout: SequenceLayout, source: int, reader: int) -> Rows:
    """Rows of its share that rank `source` sends to `reader`: all, or the first chunk of every sample to the ranks after it."""
    if source > reader:
        return slice(0, layout.share_rows)
    return _neighbours(tuple(slice(rows.start, rows.start + chunk) for rows, chunk in _samples(layout)))


def num_sent(layout: SequenceLayout, source: int, reader: int) -> int:
    """How many rows `sent_rows` names."""
    return layout.share_rows if source > reader else layout.share_rows // 2


def _samples(layout: SequenceLayout) -> Iterator[tuple[slice, int]]:
    """Each sample's rows in a share, and its chunk length."""
    start = 0
    for length in layout.share_sample_lengths:
        yield slice(start, start + length), length // 2
        start += length


def _edges(rows: slice, tile: int | None) -> list[int]:
    """Where to cut a run of rows into tiles: nowhere if it has at most two."""
    if tile is None or rows.stop - rows.start <= 2 * tile:
        return [rows.start, rows.stop]
    return [*range(rows.start, rows.stop, tile), rows.stop]


def _cut(q: slice, k: slice, tile: int | None) -> list[Block]:
    """A rectangle in pieces with at most two tiles of keys each."""
    edges = _edges(k, tile)
    return [Block(q, slice(start, stop)) for start, stop in zip(edges, edges[1:], strict=False)]


def _grouped(rectangles: list[list[tuple[slice, slice]]], layout: SequenceLayout, tile: int | None, short: int) -> tuple[Block, ...]:
    """Blocks of the (queries, keys) of each sample, as many for one as for another; those of short neighbours are one block."""
    blocks = []
    of_samples = zip(layout.share_sample_lengths, rectangles, strict=True)
    for is_short, run in itertools.groupby(of_samples, lambda sample: sample[0] <= short):
        for same in zip(*(of_sample for _, of_sample in run), strict=True):
            if is_short and len(same) > 1:
                blocks.append(_joined(same))
            else:
                blocks += [piece for q, k in same for piece in _cut(q, k, tile)]
    return tuple(blocks)


def _joined(parts: Iterable[tuple[slice, slice]], causal: bool = False) -> Block:
    """One block of the (queries, keys) of several samples."""
    queries, keys = zip(*parts, strict=True)
    sizes = [tuple(rows.stop - rows.start for rows in side) for side in (queries, keys)]
    return Block(_neighbours(queries), _neighbours(keys), causal, *sizes)


def _neighbours(parts: tuple[slice, ...]) -> Rows:
    """One slice, if each part begins where the one before ends."""
    if all(one.stop == other.start for one, other in itertools.pairwise(parts)):
        return slice(parts[0].start, parts[-1].stop)
    return Scattered(np.concatenate([np.arange(rows.start, rows.stop) for rows in parts]))


def fits_as_gathered(layout: SequenceLayout) -> bool:
    """Whether the rows that a rank looks at are neighbours among the gathered shares: both chunks of rank 1, or the first of rank 0."""
    return layout.ring_size == 2 and len(layout.sample_lengths) == 1


@lru_cache(maxsize=16)
def gathered_row(layout: SequenceLayout, device: torch.device) -> Tensor:
    """Where each row of the padded pack lies among the gathered shares. int64 [total_rows]."""
    return torch.argsort(pack_row(layout, device))


@lru_cache(maxsize=16)
def pack_row(layout: SequenceLayout, device: torch.device) -> Tensor:
    """Row of the padded pack of each gathered row; the inverse of `gathered_row`. int64 [total_rows]."""
    return platform.upload(torch.from_numpy(np.concatenate([share_order(layout, rank) for rank in range(layout.ring_size)])), device)
