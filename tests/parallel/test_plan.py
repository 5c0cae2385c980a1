"""The plan is arithmetic: small cases by eye, then every property over many uneven rows."""

import itertools

import numpy as np
import pytest

from megatron_longvila.parallel.plan import RowSpec, owned_rows, pad_samples, plan_row, split_frames


def test_split_frames_covers_everything_evenly():
    for num_frames, cp_size in itertools.product(range(40), range(1, 9)):
        ranges = split_frames(num_frames, cp_size)
        assert [frame for owned in ranges for frame in owned] == list(range(num_frames))
        sizes = [len(owned) for owned in ranges]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_eight_rows_on_ring_two_by_ulysses_two():
    layout = pad_samples((8,), ulysses_size=2, ring_size=2)
    assert [owned.tolist() for owned in owned_rows(layout)] == [[0, 1], [6, 7], [2, 3], [4, 5]]


def test_two_samples_on_ring_two():
    layout = pad_samples((3, 5), ulysses_size=1, ring_size=2)
    assert layout.sample_lengths == (4, 8)
    assert [owned.tolist() for owned in owned_rows(layout)] == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]


def test_contiguous_without_ring():
    layout = pad_samples((3, 2), ulysses_size=4, ring_size=1)
    assert layout.sample_lengths == (3, 2, 3)
    assert [owned.tolist() for owned in owned_rows(layout)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


ROWS = [
    RowSpec((1,), (), 4),
    RowSpec((40,), (3, 8, 13, 18, 23, 28, 33), 4),
    RowSpec((17,), (1, 9), 4),
    RowSpec((11, 30, 7), (12, 18, 24), 4),
    RowSpec((5, 21), (7, 16), 9),
]


@pytest.mark.parametrize("ulysses_size, ring_size, row_multiple", list(itertools.product((1, 2, 4), (1, 2, 3, 4), (1, 2))))
@pytest.mark.parametrize("spec", ROWS)
def test_every_row_and_token_has_one_owner(spec, ulysses_size, ring_size, row_multiple):
    plans = plan_row(spec, ulysses_size=ulysses_size, ring_size=ring_size, row_multiple=row_multiple)
    layout = plans[0].layout
    assert len(plans) == ulysses_size * ring_size
    assert layout.local_rows * len(plans) == layout.total_rows and layout.local_rows % row_multiple == 0
    sources = np.concatenate([plan.row_source_T for plan in plans])
    assert sorted(sources[sources >= 0].tolist()) == list(range(sum(spec.sample_lengths)))
    assert all(len(plan.row_source_T) == len(plan.positions_T) == layout.local_rows for plan in plans)

    # Carry (frame, token) names through the exchange and see each land on the row that holds its placeholder.
    names = {start + token: (frame, token) for frame, start in enumerate(spec.frame_starts) for token in range(spec.tokens_per_frame)}
    sent = {}
    for rank, plan in enumerate(plans):
        tokens = [(frame, token) for frame in plan.frames for token in range(spec.tokens_per_frame)]
        leaving = [tokens[index] for index in plan.exchange.send_index]
        edges = np.cumsum((0, *plan.exchange.send_counts))
        sent.update({(rank, to): leaving[edges[to] : edges[to + 1]] for to in range(len(plans))})
    for rank, plan in enumerate(plans):
        received = [name for source in range(len(plans)) for name in sent[source, rank]]
        assert tuple(len(sent[source, rank]) for source in range(len(plans))) == plan.exchange.recv_counts
        landed = {int(plan.row_source_T[row]): name for row, name in zip(plan.exchange.recv_rows, received, strict=True)}
        assert landed == {row: names[row] for row in plan.row_source_T.tolist() if row in names}


@pytest.mark.parametrize("ring_size", [1, 2, 4])
def test_positions_restart_and_padding_comes_last(ring_size):
    plans = plan_row(RowSpec((11, 30, 7), (), 4), ulysses_size=2, ring_size=ring_size)
    padded = np.concatenate(owned_rows(plans[0].layout))
    positions = np.concatenate([plan.positions_T for plan in plans])[np.argsort(padded)]
    source = np.concatenate([plan.row_source_T for plan in plans])[np.argsort(padded)]
    start = 0
    for length in plans[0].layout.sample_lengths:
        assert positions[start : start + length].tolist() == list(range(length))
        is_real = source[start : start + length] >= 0
        assert not np.any(is_real[1:] & ~is_real[:-1])
        start += length


def test_frames_outside_the_row_are_refused():
    with pytest.raises(ValueError, match="row of 10 tokens"):
        plan_row(RowSpec((10,), (8,), 4), ulysses_size=1, ring_size=1)
    with pytest.raises(ValueError, match="without overlap"):
        plan_row(RowSpec((10,), (0, 2), 4), ulysses_size=1, ring_size=1)
    with pytest.raises(ValueError, match="at least one token"):
        plan_row(RowSpec((4, 0), (), 4), ulysses_size=1, ring_size=1)
