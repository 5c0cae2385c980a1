"""A disk that is too small for a checkpoint: said before or while it is written, with the sizes, and the earlier one stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_disk import small_disk

from megatron_longvila.config import CheckpointConfig, Config, OptimizerConfig, ParallelConfig, TrainingConfig
from ranks import RankError, run_ranks

WIDTH = 256  # a toy whose checkpoint is tensors, not headers


def make_config(**checkpoint) -> Config:
    return Config(
        parallel=ParallelConfig(overlap_grad_reduce=False),
        optimizer=OptimizerConfig(lr=0.01, warmup_steps=2),
        training=TrainingConfig(precision="fp32"),
        checkpoint=CheckpointConfig(**checkpoint),
    )


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    with small_disk(tmp_path / "disk", "24m") as folder:
        yield folder


def _save(rank: int, root: str, config: Config, sizes: dict, steps: tuple[int, ...], look_before: bool) -> tuple[int, int]:
    """Save after each step; returns what the last checkpoint was said to need and what it takes."""
    import toy_model

    from megatron_longvila.checkpoint import sharded

    toy_model.HIDDEN = WIDTH
    if not look_before:
        sharded.require_space = lambda *args: None
    toy = toy_model.build_toy(config, **sizes)
    checkpoints = sharded.Checkpoints(Path(root), config, toy.groups)
    for step in steps:
        toy.train_step()
        checkpoints.save(toy.state, step)
        checkpoints.wait()
    files = checkpoints.folder(steps[-1]).rglob("*")
    return checkpoints._writing.needed, sum(path.stat().st_size for path in files if path.is_file())


def _newest(rank: int, root: str) -> str:
    from toy_model import build_toy

    from megatron_longvila.checkpoint.sharded import Checkpoints

    return Checkpoints(Path(root), make_config(), build_toy(make_config()).groups).newest().name


@pytest.mark.parametrize("world_size,sizes", [(1, {}), (2, {}), (2, {"tp_size": 2}), (2, {"pp_size": 2})], ids=["one", "dp", "tp", "pp"])
def test_the_size_is_known_before(world_size: int, sizes: dict, tmp_path: Path) -> None:
    """Never less than what is written, and little more."""
    for needed, written in run_ranks(_save, world_size, str(tmp_path), make_config(), sizes, (1,), True):
        assert written <= needed <= 1.1 * written, (needed, written)


@pytest.mark.parametrize("look_before,async_save", [(True, False), (True, True), (False, False), (False, True)])
def test_the_old_checkpoint_stays(look_before: bool, async_save: bool, small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    with pytest.raises(RankError) as error:
        run_ranks(_save, 2, str(root), make_config(async_save=async_save), {}, (1, 2), look_before)
    message = next(line for line in reversed(str(error.value).splitlines()) if line.startswith("OSError: [Errno 28]"))
    assert "the checkpoint of step 2 needs 1" in message and f"MiB and {root} has " in message
    assert "the last checkpoint, step_0000001, is as it was; make room or lower checkpoint.keep_last" in message
    assert run_ranks(_newest, 1, str(root)) == ["step_0000001"]
    assert sorted(os.listdir(root)) == ["latest", "step_0000001"]  # the unfinished one has given its room back
