"""The model of a checkpoint, ready to be asked."""

from __future__ import annotations

from pathlib import Path

from megatron_longvila import platform
from megatron_longvila.checkpoint.sharded import load_weights
from megatron_longvila.config import Config
from megatron_longvila.models.init import mark_parameters
from megatron_longvila.models.longvila import LongVILA, build_model
from megatron_longvila.parallel.groups import Groups


def load_model(config: Config, groups: Groups) -> LongVILA:
    """This rank's pipeline stage with the weights of `checkpoint.load`. Collective; ValueError if that is no complete checkpoint."""
    platform.seed(config.training.seed, groups.pp.rank())
    model = build_model(config, groups)
    mark_parameters(model)
    load_weights(Path(config.checkpoint.load), model, groups)
    return model
