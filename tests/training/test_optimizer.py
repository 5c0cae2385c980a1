"""Which parameters train, which decay, how the rate moves, and what an update does with the gradient's norm."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_longvila.config import Config, OptimizerConfig, ParallelConfig, TrainingConfig
from ranks import run_ranks


def make_config(**optimizer) -> Config:
    settings = {"lr": 0.01, "weight_decay": 0.1} | optimizer
    return Config(parallel=ParallelConfig(), optimizer=OptimizerConfig(**settings), training=TrainingConfig(precision="fp32"))


def _groups(rank: int) -> None:
    from toy_model import build_toy

    toy = build_toy(make_config())
    for group in toy.state.optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["wd_mult"] == 1.0 else 0.0)
    decayed = {name for name, parameter in toy.state.model.named_parameters() if parameter.dim() > 1}
    distributed = toy.state.optimizer.chained_optimizers[0]
    for name, parameter in toy.state.model.named_parameters():
        group, _ = distributed.model_param_group_index_map[parameter]
        assert toy.state.optimizer.param_groups[group]["wd_mult"] == (1.0 if name in decayed else 0.0)


def test_biases_do_not_decay() -> None:
    run_ranks(_groups, 1)


def test_freeze_names_the_rule() -> None:
    from megatron_longvila.training.optimizer import freeze

    model = torch.nn.ModuleDict({"vision_tower": torch.nn.Linear(2, 2), "projector": torch.nn.Linear(2, 2)})
    freeze(model, ["projector"])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["projector.weight", "projector.bias"]
    for wrong in ([], ["llm", "tower"]):
        with pytest.raises(ValueError, match="must name at least one of"):
            freeze(model, wrong)


def test_freeze_parts_of_the_decoder() -> None:
    """Names as Megatron's own layers and as Transformer Engine's, whose linears contain the norm before them."""
    from megatron_longvila.training.optimizer import freeze

    layer = "language_model.decoder.layers.0"
    norms = [
        f"{layer}.input_layernorm.weight",
        f"{layer}.mlp.linear_fc1.layer_norm_weight",
        "language_model.decoder.final_layernorm.weight",
    ]
    embeddings = ["language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"]
    adapters = [f"{layer}.self_attention.linear_qkv.lora.q.A", f"{layer}.self_attention.linear_proj.lora.o.B"]
    linears = [f"{layer}.self_attention.linear_qkv.bias", f"{layer}.mlp.linear_fc1.weight"]
    others = ["vision_tower.encoder.layers.0.input_layernorm.weight", "projector.norm.weight"]

    def trained(names: list[str], parts: list[str]) -> set[str]:
        parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
        freeze(SimpleNamespace(named_parameters=parameters.items), parts)
        return {name for name, parameter in parameters.items() if parameter.requires_grad}

    base = [*norms, *embeddings, *linears, *others]
    assert trained(base, ["llm"]) == {*norms, *embeddings, *linears}
    assert trained([*base, *adapters], ["lora"]) == {*adapters}
    assert trained([*base, *adapters], ["lora", "llm_norms"]) == {*adapters, *norms}
    assert trained([*base, *adapters], ["lora", "llm_embeddings", "projector"]) == {*adapters, *embeddings, "projector.norm.weight"}
    assert trained([*base, *adapters], ["lora", "llm"]) == {*adapters, *norms, *embeddings, *linears}
    with pytest.raises(ValueError, match="names lora, but model.lora.rank=0 builds no adapter"):
        trained(base, ["lora"])
    with pytest.raises(ValueError, match="leaves the adapters of model.lora.rank frozen.*tools/merge_lora.py"):
        trained([*base, *adapters], ["llm"])


def _rates(rank: int, config: Config) -> list[float]:
    from toy_model import build_toy

    toy = build_toy(config)
    rates = []
    for _ in range(10):
        rates.append(toy.state.optimizer.param_groups[0]["lr"])
        toy.state.scheduler.step(1)
    return rates


def test_schedules() -> None:
    (constant,) = run_ranks(_rates, 1, make_config(schedule="constant", warmup_steps=2))
    assert constant == [0.0, 0.005] + [0.01] * 8
    (cosine,) = run_ranks(_rates, 1, make_config(schedule="cosine", warmup_fraction=0.2, min_lr=0.001))
    wanted = [0.0, 0.005] + [0.001 + 0.009 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2 for step in range(2, 10)]
    assert cosine == pytest.approx(wanted, rel=1e-12)


def test_warmup_must_fit() -> None:
    from megatron_longvila.training.optimizer import warmup_steps

    assert warmup_steps(make_config(warmup_fraction=0.03), 100) == 3
    with pytest.raises(ValueError, match="warm-up of 5 steps must be shorter than the run of 5 steps"):
        warmup_steps(make_config(warmup_steps=5), 5)
    with pytest.raises(ValueError, match=r"the run of 1 steps; lower optimizer.warmup_fraction=0.03, 0 is no warm-up"):
        warmup_steps(make_config(warmup_fraction=0.03), 1)


def _clipped_update(rank: int, config: Config) -> tuple[float, float, float]:
    """(norm returned, norm of what the optimizer then used, largest change of a weight), one step with hand-made gradients."""
    from toy_model import build_toy

    from megatron_longvila.training.optimizer import step

    toy = build_toy(config, tp_size=2)
    toy.state.scheduler.step(1)
    before = {name: parameter.clone() for name, parameter in toy.state.model.named_parameters()}
    for parameter in toy.state.model.parameters():
        parameter.main_grad.fill_(2.0)
    norm = step(toy.state.optimizer)
    used = torch.zeros((), dtype=torch.float64)
    for name, parameter in toy.state.model.named_parameters():
        share = 1.0 if parameter.tensor_model_parallel else 0.5  # replicated parameters count once over the two tp ranks
        group, order = toy.state.optimizer.chained_optimizers[0].model_param_group_index_map[parameter]
        used += share * toy.state.optimizer.param_groups[group]["params"][order].grad.double().square().sum()
        before[name] -= parameter
    torch.distributed.all_reduce(used)
    return norm, used.sqrt().item(), max(change.abs().max().item() for change in before.values())


def test_clipping_and_its_norm() -> None:
    """The norm counts each weight of the model once, whatever tp; clipping scales to clip_grad."""
    # vision 8 -> 16, projector 16 -> 16, four layers 16 -> 32 -> 16, all with biases
    weights = (8 * 16 + 16) + (16 * 16 + 16) + 4 * (16 * 32 + 32 + 32 * 16 + 16)
    for clip, used in ((0.5, 0.5), (0.0, 2.0 * math.sqrt(weights))):
        for norm, found, change in run_ranks(_clipped_update, 2, make_config(clip_grad=clip)):
            assert norm == pytest.approx(2.0 * math.sqrt(weights), rel=1e-6)
            assert found == pytest.approx(used, rel=1e-5)
            assert change > 0


def _not_finite(rank: int) -> None:
    from toy_model import build_toy

    from megatron_longvila.training.optimizer import step

    toy = build_toy(make_config())
    toy.train_step()
    before = {name: parameter.clone() for name, parameter in toy.state.model.named_parameters()}
    moments = {id(key): value["exp_avg"].clone() for key, value in toy.state.optimizer.chained_optimizers[0].optimizer.state.items()}
    next(iter(toy.state.model.parameters())).main_grad.fill_(float("nan"))
    assert math.isnan(step(toy.state.optimizer))
    assert all(torch.equal(before[name], parameter) for name, parameter in toy.state.model.named_parameters())
    for key, value in toy.state.optimizer.chained_optimizers[0].optimizer.state.items():
        assert torch.equal(moments[id(key)], value["exp_avg"])


def test_not_finite_changes_nothing() -> None:
    run_ranks(_not_finite, 2)


def _settings_win(rank: int) -> tuple[float, float]:
    from toy_model import build_toy

    from megatron_longvila.training.optimizer import apply_settings

    config = make_config(schedule="constant")
    toy = build_toy(config)
    other = replace(config, optimizer=replace(config.optimizer, lr=0.002))
    toy.state.scheduler.max_lr = 0.002
    apply_settings(toy.state.optimizer, toy.state.scheduler, other)
    return toy.state.optimizer.param_groups[0]["lr"], toy.state.optimizer.param_groups[0]["max_lr"]


def test_configuration_wins_over_a_loaded_optimizer() -> None:
    assert run_ranks(_settings_win, 1) == [(0.002, 0.002)]
