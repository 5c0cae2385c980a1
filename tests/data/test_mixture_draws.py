"""Mixtures inside the row order: what an epoch draws, exactly, and that runs without a mixture read the rows they always read."""

import hashlib
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megatron_longvila.data.mixture import UNUSABLE, Mixture, Part, RowSchedule, apportion

LENGTHS = (np.random.Philox(key=[5, 9]).random_raw(500) % 60).astype(np.int64) + 1
LENGTHS[[5, 50]] = UNUSABLE


def rows(schedule: RowSchedule) -> list[list[int]]:
    return [schedule.row(row).tolist() for row in range(schedule.num_rows)]


def digest(schedule: RowSchedule) -> str:
    return hashlib.sha256(repr(rows(schedule)).encode()).hexdigest()[:16]


# Written down before mixtures existed: a run that was started then goes on with the same rows.
@pytest.mark.parametrize(
    ("seed", "epochs", "num_rows", "expected"),
    [(0, 3, 762, "3bfdbb3cd36e1538"), (7, 3, 758, "6dfbad453ccb6f00"), (None, 1, 256, "e6ef1fa261818a46")],
)
def test_rows_without_a_mixture_are_those_of_earlier_versions(seed, epochs, num_rows, expected):
    schedule = RowSchedule(LENGTHS, 64, seed=seed, epochs=epochs)
    assert (schedule.num_rows, digest(schedule)) == (num_rows, expected)
    whole = Mixture([Part("a", np.arange(200), 200), Part("b", np.arange(200, 500), 300, seed=9)])
    assert whole.is_every_sample_once(500)
    assert digest(RowSchedule(LENGTHS, 64, seed=seed, epochs=epochs, mixture=whole)) == expected


@pytest.mark.parametrize(("size", "count"), [(10, 10), (10, 30), (10, 4), (10, 25), (7, 3), (1, 5), (13, 1)])
def test_draws_are_even_over_any_number_of_epochs(size, count):
    part = Part("a", np.arange(100, 100 + size), count, seed=3)
    drawn: Counter = Counter()
    for epoch in range(3 * size):
        numbers = part.draw(epoch).tolist()
        assert len(numbers) == count and numbers == sorted(numbers)
        drawn.update(numbers)
        total = (epoch + 1) * count
        expected = {total // size, -(-total // size)}
        assert {drawn[number] for number in part.numbers.tolist()} <= expected
        if count % size == 0:
            assert set(drawn.values()) == {(epoch + 1) * count // size}


def test_draws_depend_on_seed_and_epoch_alone():
    part = Part("a", np.arange(20), 7, seed=1)
    assert part.draw(5).tolist() == Part("other", np.arange(20), 7, seed=1).draw(5).tolist()
    assert len({tuple(part.draw(epoch)) for epoch in range(10)}) > 1
    assert part.draw(0).tolist() != Part("a", np.arange(20), 7, seed=2).draw(0).tolist()
    # Written down once, as for `permute`.
    assert part.draw(0).tolist() == [2, 3, 5, 7, 9, 10, 14] and part.draw(2).tolist() == [1, 4, 6, 11, 14, 18, 19]


def test_schedule_shows_what_the_mixture_draws():
    mixture = Mixture([Part("a", np.arange(0, 100), 200), Part("b", np.arange(100, 300), 50, seed=4)])
    schedule = RowSchedule(LENGTHS, 64, seed=3, epochs=8, mixture=mixture)
    epochs: dict[int, Counter] = {}
    for row, numbers in enumerate(rows(schedule)):
        assert 0 < LENGTHS[numbers].sum() <= 64
        epochs.setdefault(schedule.locate(row)[0], Counter()).update(numbers)
    usable = set(range(500)) - {5, 50}
    assert len(epochs) == 8
    for epoch, seen in epochs.items():
        assert seen == Counter(number for number in mixture.draw(epoch).tolist() if number in usable)
        assert all(seen[number] == 2 for number in range(100) if number in usable)
        assert sum(count for number, count in seen.items() if number >= 100) == 50
    later = sum((epochs[epoch] for epoch in range(4)), Counter())
    assert all(later[number] == 1 for number in range(100, 300))  # a quarter in each of four epochs
    forward = rows(schedule)
    fresh = RowSchedule(LENGTHS, 64, seed=3, epochs=8, mixture=mixture)
    assert fresh.row(len(forward) - 1).tolist() == forward[-1] and rows(fresh) == forward


def test_a_mixture_of_unusable_samples_is_refused():
    with pytest.raises(ValueError, match="none of the 2 samples"):
        RowSchedule(LENGTHS, 64, seed=0, mixture=Mixture([Part("a", np.array([5, 50]), 2)]))


@pytest.mark.parametrize(
    ("quotas", "counts"),
    [
        ([3, 4], [3, 4]),
        ([Fraction(7, 2), Fraction(7, 2)], [4, 3]),
        ([Fraction(10, 3)] * 3, [4, 3, 3]),
        ([Fraction(1, 2)], [1]),
        ([Fraction(1, 3), Fraction(2, 3), 5], [0, 1, 5]),
    ],
)
def test_apportion_by_hand(quotas, counts):
    assert apportion(quotas) == counts


def test_apportion_is_exact_for_random_quotas():
    random = np.random.default_rng(0)
    for _ in range(200):
        quotas = [Fraction(int(a), int(b)) for a, b in zip(random.integers(0, 1000, 9), random.integers(1, 50, 9), strict=True)]
        counts = apportion(quotas)
        assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))
        assert abs(sum(counts) - sum(quotas)) <= Fraction(1, 2)
        assert all(count == quota for count, quota in zip(counts, quotas, strict=True) if quota.denominator == 1)


def test_description_tells_what_decides_the_draws():
    base = Part("a", np.arange(10), 5, seed=1)
    same = Part("a", np.arange(10), 5, seed=1)
    assert base.describe() == same.describe()
    others = [Part("a", np.arange(10), 6, 1), Part("a", np.arange(10), 5, 2), Part("a", np.arange(11), 5, 1)]
    subsets = [Part("a@b", np.arange(10), 5, 1, True), Part("a@b", np.arange(1, 11), 5, 1, True)]
    assert len({part.describe() for part in [base, *others, *subsets]}) == 6
    assert Part("a", np.arange(10), 20, 1).describe() == Part("a", np.arange(10), 20, 2).describe()  # drawn whole: no seed matters
