"""Drawn rows, heads and meshes: N ranks agree with one where nobody chose the case.

LONGVILA_ORACLE_SEEDS=A:B runs other seeds than the few below; a case takes some 4 s on two cores.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from math import prod

import pytest
from test_oracle import check_gradients, random_state

from megatron_longvila.config import Config
from oracle import SyntheticRow, build, make_row, run_batch, teardown, tiny_config
from ranks import run_ranks

SEEDS = range(*map(int, os.environ.get("LONGVILA_ORACLE_SEEDS", "8:12").split(":")))
MAX_RANKS = 8
MAX_TOKENS = 250  # of a row; the tiny model knows 256 positions
EVERYTHING = ("vision", "projector", "llm")
PARTS = [EVERYTHING, ("projector",), ("projector", "llm"), ("llm",), ("vision", "projector")]


@dataclass(frozen=True)
class Case:
    """One drawn case; `sizes` and `dp_size` are of the mesh, `one` and `many` the configurations of one rank and of the mesh."""

    batches: list[list[SyntheticRow]]
    sizes: dict[str, int]
    dp_size: int
    one: Config
    many: Config
    trainable: tuple[str, ...]
    overlap: bool


def draw_row(rng: random.Random, labelled: bool) -> SyntheticRow:
    """Up to six samples: texts and clips of any length in any order, some that end in a frame, some of frames alone."""
    while True:
        samples = []
        for _ in range(rng.choice([1, 1, 2, 3, 6])):
            segments = [rng.choice([rng.randint(1, 14), f"{rng.choice([1, 1, 2, 3, 5, 9])}f"]) for _ in range(rng.randint(1, 3))]
            samples.append(segments + [rng.randint(2, 18)] * (rng.random() < 0.8))
        row = make_row(samples, rng.randrange(1 << 30), labelled)
        if sum(row.spec.sample_lengths) <= MAX_TOKENS and (not labelled or (row.labels >= 0).any()):
            return row


def draw_case(seed: int) -> Case:
    """A legal case: key/value heads are a multiple of tp x ulysses."""
    rng = random.Random(seed)
    while True:
        choices = {"tp_size": [1, 1, 2], "pp_size": [1, 1, 2], "ulysses_size": [1, 1, 2, 4], "ring_size": [1, 1, 2, 3, 4, 5]}
        sizes = {name: rng.choice(values) for name, values in choices.items()}
        dp_size, kv_heads = rng.choice([1, 1, 2]), rng.choice([1, 2, 4, 8])
        if 1 < dp_size * prod(sizes.values()) <= MAX_RANKS and kv_heads % (sizes["tp_size"] * sizes["ulysses_size"]) == 0:
            break
    parallel = {"ring_transport": rng.choice(["all_gather", "p2p"]), "sequence_parallel": sizes["tp_size"] > 1 and rng.random() < 0.5}
    training = {"recompute": rng.choice(["none", "full", "selective"]), "recompute_vision": rng.random() < 0.3}
    architecture, tied, per_group = rng.choice(["qwen2", "llama"]), rng.random() < 0.3, rng.randint(1, 3)
    frames_per_micro_batch, loss_chunk_rows = rng.choice([1, 2, 3, 7]), rng.choice([1, 5, 1000])

    def make(**overrides) -> Config:
        config = tiny_config(architecture, tied, **overrides)
        llm = replace(config.model.llm, num_query_groups=kv_heads, num_attention_heads=kv_heads * per_group)
        vision = replace(config.model.vision, frames_per_micro_batch=frames_per_micro_batch)
        training = replace(config.training, loss_chunk_rows=loss_chunk_rows)
        return replace(config, model=replace(config.model, llm=llm, vision=vision), training=training)

    # Two rows each, the second at times without a label: dp 2 splits them, every other mesh accumulates them.
    batches = [[draw_row(rng, True), draw_row(rng, rng.random() < 0.7)] for _ in range(3)]
    trainable = EVERYTHING if rng.random() < 0.4 else rng.choice(PARTS)
    return Case(batches, sizes, dp_size, make(), make(parallel=parallel, training=training), trainable, rng.random() < 0.4)


def _run(rank: int, case: Case, state, expected) -> list:
    """On one rank (`expected` None): loss, count and gradients of every batch. On the mesh: the parameters that agreed."""
    sizes, config = ({}, case.one) if expected is None else (case.sizes, case.many)
    model, groups = build(config, sizes, state, overlap=case.overlap and expected is not None, trainable=case.trainable)
    found = []
    for number, batch in enumerate(case.batches):
        loss, count = run_batch(model, batch, config, groups)
        if expected is None:
            grads = {name.removeprefix("module."): p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            found.append((loss, count, grads))
        else:
            loss_ref, count_ref, grads_ref = expected[number]
            assert count == count_ref and abs(loss - loss_ref) <= 1e-5 * abs(loss_ref), (number, loss, loss_ref, count, count_ref)
            found.append(check_gradients(model, groups, grads_ref))
    teardown()
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_agree_with_one(seed):
    case = draw_case(seed)
    state = random_state(case.one, seed)
    expected = run_ranks(_run, 1, case, state, None)[0]
    seen = run_ranks(_run, case.dp_size * prod(case.sizes.values()), case, state, expected)
    assert set().union(*(one[0] for one in seen)) == set(expected[0][2])
