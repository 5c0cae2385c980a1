"""Which queries of a ring share meet which keys: the blocks of ring.py, as slices, and the rows that ranks send each other.

Planned once for each layout, rank and device. Shapes: R ranks, S rows of a share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megatron_longvila.parallel.plan import SequenceLayout, share_order


@dataclass(frozen=True, eq=False)
class Block:
    """Queries `q` (rows of the share) that see every key of `k` (rows of some buffer), or the keys up to their own with `causal`.

    Attributes:
        lengths: rows of each sample in a causal block of several; a row then sees keys of its own sample alone.
    """

    q: slice
    k: slice
    causal: bool = False
    lengths: tuple[int, ...] = ()


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
            rows = slice(samples[0].start, samples[-1].stop)
            causal.append(Block(rows, rows, causal=True, lengths=tuple(one.stop - one.start for one in samples)))
            continue
        for rows in samples:
            edges = _edges(rows, tile)
            for start, stop in zip(edges, edges[1:], strict=False):
                causal.append(Block(slice(start, stop), slice(start, stop), causal=True))
                if stop < rows.stop:
                    rectangles.append(Block(slice(stop, rows.stop), slice(start, stop)))
    return (*causal, *rectangles)


@lru_cache(maxsize=64)
def sample_ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where samples of these lengths begin, and the last one ends. int32 [samples + 1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def gathered_blocks(layout: SequenceLayout, rank: int, tile: int | None = None) -> tuple[Block, ...]:
    """Rectangles against the other ranks' keys; `k` counts rows of the padded pack, where each rectangle's chunks are neighbours.

    Of the gathered shares, one after the other, where `fits_as_gathered`.
    """
    if fits_as_gathered(layout):
        share = slice(0, layout.share_rows)
        half = layout.share_rows // 2
        both = Block(slice(half, share.stop), slice(share.stop, 2 * share.stop)) if rank == 0 else Block(share, slice(0, half))
        return tuple(_cut([both], tile))
    blocks = []
    for rows, chunk in _samples(layout):
        start = rows.start * layout.ring_size
        if rank > 0:
            blocks.append(Block(rows, slice(start, start + rank * chunk)))
        if rank < layout.ring_size - 1:
            between = slice(start + (rank + 1) * chunk, start + (2 * layout.ring_size - 1 - rank) * chunk)
            blocks.append(Block(slice(rows.start + chunk, rows.stop), between))
    return tuple(_cut(blocks, tile))


@lru_cache(maxsize=256)
def visiting_blocks(layout: SequenceLayout, rank: int, source: int, tile: int | None = None) -> tuple[Block, ...]:
    """Rectangles against the rows that rank `source` sends to `rank`; `k` counts those rows."""
    blocks, start = [], 0
    for rows, chunk in _samples(layout):
        sent = chunk if source < rank else 2 * chunk
        queries = rows if source < rank else slice(rows.start + chunk, rows.stop)
        blocks.append(Block(queries, slice(start, start + sent)))
        start += sent
    return tuple(_cut(blocks, tile))


@lru_cache(maxsize=128)
def sent_rows(layout: SequenceLayout, source: int, reader: int, device: torch.device) -> slice | Tensor:
    """Rows of its share that rank `source` sends to `reader`: all, or the first chunk of every sample to the ranks after it."""
    if source > reader:
        return slice(0, layout.share_rows)
    rows = [np.arange(rows.start, rows.start + chunk) for rows, chunk in _samples(layout)]
    return slice(0, len(rows[0])) if len(rows) == 1 else torch.from_numpy(np.concatenate(rows)).to(device)


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


def _cut(blocks: list[Block], tile: int | None) -> list[Block]:
    """Rectangles with at most two tiles of keys each."""
    return [
        Block(block.q, slice(start, stop))
        for block in blocks
        for edges in [_edges(block.k, tile)]
        for start, stop in zip(edges, edges[1:], strict=False)
    ]


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
    return torch.from_numpy(np.concatenate([share_order(layout, rank) for rank in range(layout.ring_size)])).to(device)
