"""An untrained model small enough for four ranks on two cores, on any mesh: its configuration, and its part on a rank."""

from __future__ import annotations

from pathlib import Path

from megatron_longvila.config import Config, DataConfig, LLMConfig, ModelConfig, ParallelConfig, TrainingConfig, VisionConfig


def make_config(tokenizer_path: Path | str, sizes=(1, 1, 1, 1)) -> Config:
    tp_size, pp_size, ulysses_size, ring_size = sizes
    return Config(
        model=ModelConfig(
            vision=VisionConfig(4, 2, 16, 24, 3, 2),
            llm=LLMConfig("qwen2", 32, 48, 4, 4, 2, 8, 420, 256, 10_000.0),
            init_std=0.5,  # an untrained model that says many different things
        ),
        parallel=ParallelConfig(
            tp_size=tp_size, pp_size=pp_size, ulysses_size=ulysses_size, ring_size=ring_size, sequence_parallel=tp_size > 1
        ),
        data=DataConfig(tokenizer=str(tokenizer_path), template="plain", context_length=64, global_batch_size=4),
        training=TrainingConfig(precision="fp32"),
    )


def build(config: Config, world_size: int):
    from megatron_longvila import platform
    from megatron_longvila.config_check import check
    from megatron_longvila.models.init import initialize_weights
    from megatron_longvila.models.longvila import build_model
    from megatron_longvila.parallel.groups import initialize_groups

    groups = initialize_groups(check(config, world_size), timeout_s=60)
    platform.seed(0, groups.pp.rank())
    model = build_model(config, groups)
    initialize_weights(model, config, seed=1)
    return model, groups
