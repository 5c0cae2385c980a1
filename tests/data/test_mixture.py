"""The order of rows: a function of (lengths, context_length, seed) alone; every sample once per epoch; position arithmetic."""

from collections import Counter

import numpy as np
import pytest

from megatron_longvila.data.mixture import OPEN_ROWS, UNUSABLE, RowSchedule, check_same_data, pack, permute, step_rows

LENGTHS = np.random.default_rng(0).integers(1, 60, 97)
LENGTHS[[5, 50]] = UNUSABLE
CONTEXT = 64


def epoch_samples(schedule: RowSchedule, first: int, stop: int) -> Counter:
    return Counter(int(n) for row in range(first, stop) for n in schedule.row(row))


def test_permutation_is_of_seed_and_epoch_and_never_changes():
    assert sorted(permute(97, 1, 0)) == list(range(97))
    orders = {(seed, epoch): tuple(permute(97, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    # Written down once: another numpy must give the same rows, or a resumed run would mix two orders.
    assert permute(8, 1, 0).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    assert permute(8, 7, 3).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]


def test_rows_hold_whole_samples_and_fit():
    rows = pack(LENGTHS, permute(97, 0, 0), CONTEXT)
    assert all(0 < LENGTHS[rows.row(r)].sum() <= CONTEXT for r in range(len(rows)))
    assert sorted(rows.samples) == sorted(set(range(97)) - {5, 50})


def test_first_fit_by_hand():
    lengths = np.array([6, 5, 4, 5, 10, 1])
    rows = pack(lengths, np.arange(6), 10)
    assert [rows.row(r).tolist() for r in range(len(rows))] == [[0, 2], [1, 3], [4], [5]]


def test_window_is_bounded():
    """A row leaves the window once OPEN_ROWS younger ones are open, even if it has room."""
    lengths = np.array([6] * (OPEN_ROWS + 1) + [4])
    rows = pack(lengths, np.arange(len(lengths)), 10)
    assert rows.row(0).tolist() == [0] and rows.row(1).tolist() == [1, OPEN_ROWS + 1]


def test_too_long_sample_is_never_cut():
    with pytest.raises(ValueError, match="sample 1 has 11 tokens.*context_length=10"):
        pack(np.array([3, 11]), np.arange(2), 10)


def test_every_epoch_is_the_same_multiset_in_another_order():
    schedule = RowSchedule(LENGTHS, CONTEXT, seed=3, epochs=4)
    bounds, row = [0], 0
    while row < schedule.num_rows:
        if schedule.locate(row)[0] == len(bounds):
            bounds.append(row)
        row += 1
    bounds.append(schedule.num_rows)
    assert len(bounds) == 5
    usable = Counter(range(97)) - Counter([5, 50])
    orders = set()
    for first, stop in zip(bounds, bounds[1:], strict=False):
        assert epoch_samples(schedule, first, stop) == usable
        orders.add(tuple(int(n) for r in range(first, stop) for n in schedule.row(r)))
    assert len(orders) == 4


def test_rows_do_not_depend_on_who_asks_or_when():
    forward = RowSchedule(LENGTHS, CONTEXT, seed=3)
    expected = [forward.row(r).tolist() for r in range(120)]
    for start in (119, 60, 1):  # a resumed run asks for later rows first
        fresh = RowSchedule(LENGTHS, CONTEXT, seed=3)
        assert fresh.row(start).tolist() == expected[start]
        assert [fresh.row(r).tolist() for r in range(120)] == expected
    limited = RowSchedule(LENGTHS, CONTEXT, seed=3, epochs=2)
    assert [limited.row(r).tolist() for r in range(limited.num_rows)] == expected[: limited.num_rows]
    assert limited.row(limited.num_rows).size == 0 and limited.locate(limited.num_rows) == (2, 0)


def test_epoch_shorter_than_a_step():
    schedule = RowSchedule(np.array([3, 4]), 10, seed=0)
    assert [sorted(schedule.row(r).tolist()) for r in range(50)] == [[0, 1]] * 50
    assert schedule.locate(49) == (49, 0) and schedule.num_rows is None


def test_steps_cut_the_list_into_global_batches():
    for dp_size in (1, 2, 4, 8):
        rows = [list(step_rows(16, 8, rank, dp_size)) for rank in range(dp_size)]
        assert [row for group in zip(*rows, strict=True) for row in group] == list(range(16, 24))  # rank d takes rows d, d + dp, ...
    with pytest.raises(ValueError, match="global_batch_size=8 must be a multiple of dp_size=3"):
        step_rows(0, 8, 0, 3)


def test_evaluation_keeps_the_order_of_the_index():
    schedule = RowSchedule(np.array([6, 5, 4]), 10, seed=None, epochs=1)
    assert [schedule.row(r).tolist() for r in range(schedule.num_rows)] == [[0, 2], [1]]


def test_nothing_usable_is_refused():
    with pytest.raises(ValueError, match="none of the 2 samples"):
        RowSchedule(np.array([UNUSABLE, UNUSABLE]), 10, seed=0)


def test_other_data_is_refused_by_name():
    saved = {"index": "a", "tokenizer": "b", "packing": "c"}
    check_same_data(saved, dict(saved))
    with pytest.raises(ValueError, match="tokenizer: b in the checkpoint, x now") as error:
        check_same_data(saved, saved | {"tokenizer": "x"})
    assert "index" not in str(error.value)
    with pytest.raises(ValueError, match="seed: None in the checkpoint, 1 now"):
        check_same_data(saved, saved | {"seed": "1"})
