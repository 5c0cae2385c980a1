"""A save that takes longer than any other collective may."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_longvila.config import Config, OptimizerConfig, ParallelConfig, TrainingConfig
from ranks import run_ranks

TIMEOUT_S, SLOW_S = 1.0, 4.0


def _save_slowly(rank: int, root: str) -> list[float]:
    """Rank 0 takes long to complete the checkpoint; returns the limits of collectives that the save set."""
    from toy_model import build_toy

    from megatron_longvila import platform
    from megatron_longvila.checkpoint import sharded

    config = Config(
        parallel=ParallelConfig(overlap_grad_reduce=False, timeout_s=TIMEOUT_S),
        optimizer=OptimizerConfig(lr=0.01, warmup_steps=2),
        training=TrainingConfig(precision="fp32"),
    )
    real = sharded.mark_complete
    sharded.mark_complete = lambda folder: (time.sleep(SLOW_S), real(folder))
    toy = build_toy(config)
    toy.train_step()
    limits, limit = [], platform.limit_collectives
    platform.limit_collectives = lambda timeout_s: (limits.append(timeout_s), limit(timeout_s))
    limit(TIMEOUT_S)
    sharded.Checkpoints(Path(root), config, toy.groups).save(toy.state, 1)
    limit(60.0)  # as the fixture that waits for this rank expects
    return limits


def test_a_save_may_take_longer_than_another_collective(tmp_path: Path) -> None:
    for limits in run_ranks(_save_slowly, 2, str(tmp_path)):
        assert max(limits) > SLOW_S and limits[-1] == TIMEOUT_S
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_0000001"]
