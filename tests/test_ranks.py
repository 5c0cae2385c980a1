"""The launcher itself: values in order, and whoever fails, dies or hangs is named at once."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from ranks import RankError, run_ranks


def share(rank: int, factor: int) -> tuple[float, torch.Tensor]:
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return total.item() * factor, torch.full((100_000,), float(rank))  # more than a pipe holds


def test_values_come_in_rank_order():
    values = run_ranks(share, 4, 2)
    assert [value for value, _ in values] == [20.0] * 4
    assert [tensor[0].item() for _, tensor in values] == [0.0, 1.0, 2.0, 3.0]


def test_closures_run():
    offset = 5
    assert run_ranks(lambda rank: rank + offset, 2) == [5, 6]


def one_raises(rank: int) -> None:
    if rank == 1:
        raise KeyError("broken on purpose")
    dist.barrier()


def test_the_failing_rank_is_named_and_the_rest_killed():
    start = time.monotonic()
    with pytest.raises(RankError, match="(?s)rank 1 of 3 failed.*one_raises.*KeyError: 'broken on purpose'"):
        run_ranks(one_raises, 3, timeout_s=60)
    assert time.monotonic() - start < 60


def one_is_killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_is_named_not_its_peers():
    with pytest.raises(RankError, match="rank 1 died with exit code -9"):
        run_ranks(one_is_killed, 3, timeout_s=60)


def one_hangs(rank: int) -> None:
    if rank == 0:
        time.sleep(60)
    dist.barrier()


def test_a_hang_shows_every_stack():
    with pytest.raises(RankError, match=r"(?s)ranks \[0, 1\] still ran after 2.0 s.*rank 0.*one_hangs.*rank 1.*barrier"):
        run_ranks(one_hangs, 2, timeout_s=2.0)


def test_values_must_pickle():
    with pytest.raises(RankError, match="(?s)rank 0 of 1 failed.*pickle"):
        run_ranks(lambda rank: lambda: rank, 1)
