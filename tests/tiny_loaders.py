"""Loaders over datasets in memory, and what they hand out."""

import torch
from tiny_datasets import SHAPES, TinyDataset, tiny_config

from megatron_longvila.data.loader import Loader, Place


def make(tokenizer, place=None, dataset=None, *, loader=None, **data) -> Loader:
    return Loader(tiny_config(**data), place or Place(), [dataset or TinyDataset(SHAPES)], tokenizer, **(loader or {}))


def steps_of(loader: Loader, count: int | None = None) -> list:
    iterator, steps = iter(loader), []
    for step in iterator:
        steps.append(step)
        if count is not None and len(steps) == count:
            break
    iterator.close()
    return steps


def ids_of(steps) -> list[list[str]]:
    return [[i for batch in step for i in batch.sample_ids] for step in steps]


def places(dp_size=1, ulysses_size=1, ring_size=1) -> list[list[Place]]:
    """Places by dp rank and cp rank."""
    return [
        [
            Place(dp_rank=d, dp_size=dp_size, cp_rank=c, ulysses_size=ulysses_size, ring_size=ring_size)
            for c in range(ulysses_size * ring_size)
        ]
        for d in range(dp_size)
    ]


def same(left, right) -> bool:
    fields = ("frames", "input_ids_T", "labels_T", "positions_T")
    return (left.sample_ids, left.skipped) == (right.sample_ids, right.skipped) and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in fields
    )
