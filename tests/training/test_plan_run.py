"""The bytes a plan names against the models, gradient buffers and optimizers that ranks really build."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_model import make_config

from megatron_longvila.config import Config, LoraConfig
from megatron_longvila.config_check import check
from megatron_longvila.training.plan_run import describe_run, stage_bytes
from ranks import run_ranks


def configs() -> dict[str, tuple[Config, int]]:
    """Configurations and how many ranks they are built on."""
    qwen, split = make_config("none"), make_config("none", (2, 2, 1, 1))

    def model(config: Config, **parts: object) -> Config:
        return replace(config, model=replace(config.model, **parts))

    def train(config: Config, *parts: str) -> Config:
        return replace(config, training=replace(config.training, trainable=list(parts)))

    llama = model(qwen, llm=replace(qwen.model.llm, architecture="llama", tie_embeddings=True, num_layers=3))
    adapted = model(split, lora=LoraConfig(rank=3, targets=["q", "v", "o"]))
    wide = model(qwen, projector=replace(qwen.model.projector, type="mlp_downsample_3x3_fix"))
    plain = model(split, projector=replace(qwen.model.projector, type="linear"))
    return {
        "qwen": (qwen, 1),
        "llama, tied": (train(llama, "projector", "llm"), 1),
        "3 x 3 projector, dp 2": (train(wide, "vision", "projector"), 2),
        "tp 2, pp 2, adapters": (train(adapted, "lora", "llm_norms"), 4),
        "tp 2, pp 2, linear projector, tied": (
            train(model(plain, llm=replace(plain.model.llm, tie_embeddings=True)), "llm_embeddings", "projector"), 4,
        ),
        "bf16, dp 2": (replace(qwen, training=replace(qwen.training, precision="bf16")), 2),
    }  # fmt: skip


def measure(rank: int, config: Config, world_size: int) -> tuple[int, dict[str, int]]:
    from tiny_model import build

    from megatron_longvila.training.optimizer import build_optimizer, freeze, wrap_ddp

    model, groups = build(config, world_size)
    freeze(model, config.training.trainable)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    wrapped = wrap_ddp(model, config)
    optimizer = build_optimizer(wrapped, config)
    found = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in trained),
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "gradients": sum(parameter.main_grad.numel() * parameter.main_grad.element_size() for parameter in trained),
        "share": sum(one.numel() for group in optimizer.param_groups for one in group["params"]),
    }
    return groups.pp.rank(), found


@pytest.mark.parametrize("name", list(configs()))
def test_counts_are_those_of_real_models(name: str) -> None:
    config, world_size = configs()[name]
    mesh = check(config, world_size)
    measured = run_ranks(measure, world_size, config, world_size)
    for stage, found in measured:
        plan = stage_bytes(config, mesh, stage)
        assert (plan.parameters, plan.trained) == (found["parameters"], found["trained"])
        assert (plan.weights, plan.gradients) == (found["weights"], found["gradients"])
    per_value = 12 if config.training.precision == "bf16" else 8
    for stage in range(mesh.pp_size):  # the shares of the dp x cp ranks of a stage (and its tp ranks) add up to what it trains
        plan = stage_bytes(config, mesh, stage)
        shares = sum(found["share"] for at, found in measured if at == stage)
        assert shares == plan.trained * mesh.tp_size
        assert plan.optimizer == -(-plan.trained // (mesh.dp_size * mesh.cp_size)) * per_value


def test_the_plan_of_a_real_model_by_hand() -> None:
    """Qwen2-7B with so400m's 26 layers, everything trained in bf16 on 16 GPUs."""
    config = replace(Config(), data=replace(Config().data, context_length=32768, global_batch_size=4))
    config = replace(config, parallel=replace(config.parallel, ulysses_size=4, ring_size=2))
    text = describe_run(config, check(config, 16), num_nodes=2)
    llm = 28 * (3584 * (3584 + 1024) + 4608 + 3584**2 + 3 * 3584 * 18944 + 2 * 3584) + 3584 + 2 * 151680 * 3584
    tower = 26 * (4 * 1152**2 + 2 * 1152 * 4304 + 4 * 1152 + 4304 + 1152 + 4 * 1152) + (588 + 1) * 1152 + 729 * 1152
    projector = 2 * 4608 + 4608 * 3584 + 3584 + 3584**2 + 3584
    count = llm + tower + projector
    assert f"{count:,}" in text and f"{count * 12 / 16 / 2**30:.2f} GiB" in text and f"{count * 4 / 2**30:.2f} GiB" in text
    assert "16 ranks = 2 nodes x 8: tp 1 x ulysses 4 x ring 2 x dp 2 x pp 1" in text
    assert "saves  only at the end and on a signal (checkpoint.save_interval=0): a rank that is lost loses the whole run so far" in text
    every = replace(config, checkpoint=replace(config.checkpoint, save_interval=50, keep_last=3, save_at_end=False))
    assert "saves  every 50 steps, on a signal; the last 3 are kept" in describe_run(every, check(every, 16), num_nodes=2)
    assert "4 rows a step = dp 2 x 2 micro-batches of one row; up to 32,768 tokens a row, 4,096 on each of cp 8 ranks" in text
