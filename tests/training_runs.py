"""Runs of the step loop on the tiny model, on ranks that are forked by the tests, and what they wrote."""

import json
from pathlib import Path

import torch.distributed as dist

from megatron_longvila import config_check
from megatron_longvila.config import Config

# Videos, images, several media, text alone; 6 is broken in the tests of bad samples.
SHAPES = [[3], [9], [], [0], [6, 0], [2], [4], [], [1], [0, 0], [12], [5], [7], [], [2], [3]]


def run_training(rank: int, config: Config, before_step=None) -> None:
    """What train() does, on ranks that have joined already; `before_step(rank, number)` may do harm."""
    from megatron_longvila.training import loop

    if before_step is not None:
        real = loop.train_step

        def train_step(run, batch, number, stop_requested):
            before_step(rank, number, run)
            return real(run, batch, number, stop_requested)

        loop.train_step = train_step
    world_size = dist.get_world_size()
    config = config_check.resolve(config, world_size=world_size, gpus_per_host=world_size)
    with loop.StopSignal() as stop:
        loop.fit(loop.build_run(config), stop)


def read(config: Config, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(config.output_dir) / name).read_text().splitlines()]


def summary(config: Config) -> dict:
    return json.loads((Path(config.output_dir) / "run_summary.json").read_text())


def losses(config: Config) -> list[float]:
    return [line["loss"] for line in read(config)]
