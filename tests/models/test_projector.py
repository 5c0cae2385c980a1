"""Each projector against a plain composition written from its formula, odd grids included, on one tp rank and on two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_longvila.config import PROJECTORS, Config, ProjectorConfig, TrainingConfig, VisionConfig
from oracle import tiny_config
from ranks import run_ranks

GRID, CHANNELS, HIDDEN = 5, 12, 64


def make_config(kind: str) -> Config:
    vision = VisionConfig(image_size=GRID * 4, patch_size=4, hidden_size=CHANNELS, ffn_hidden_size=8, num_layers=2, num_attention_heads=2)
    model = replace(tiny_config().model, vision=vision, projector=ProjectorConfig(kind))
    return Config(model=model, training=TrainingConfig(precision="fp32"))


def features() -> torch.Tensor:
    return torch.randn(3, GRID**2, CHANNELS, generator=torch.Generator().manual_seed(1))


def random_projector_state(config: Config) -> dict[str, torch.Tensor]:
    from megatron_longvila.checkpoint.hf import full_shapes

    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, shape in full_shapes(config).items() if name.startswith("projector.")}
    return {name: ("norm" in name and "weight" in name) + 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def cells(x_FPC: torch.Tensor, side: int) -> torch.Tensor:
    """Token by token and patch by patch, straight from the words: rows of patches, zeros outside the grid."""
    tokens = -(-GRID // side)
    zero = torch.zeros(x_FPC.shape[0], CHANNELS)
    out = []
    for row in range(tokens):
        for column in range(tokens):
            where = [(row * side + i, column * side + j) for i in range(side) for j in range(side)]
            out.append(torch.cat([x_FPC[:, r * GRID + c] if max(r, c) < GRID else zero for r, c in where], dim=-1))
    return torch.stack(out, dim=1)


def formula(kind: str, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The projector with VILA's names for its weights."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    if kind == "linear":
        return linear(x, "layers")
    if kind == "mlp2x_gelu":
        return linear(F.gelu(linear(x, "layers.0")), "layers.2")
    if kind == "mlp_downsample_3x3_fix":
        x = norm(F.gelu(linear(norm(cells(x, 3), "layers.1"), "layers.2")), "layers.4")
        return linear(F.gelu(linear(x, "layers.5")), "layers.7")
    return linear(F.gelu(linear(norm(cells(x, 2), "layers.1"), "layers.2")), "layers.4")


def run_projector(rank: int, config: Config, state: dict, expected: torch.Tensor, grads: dict, x_grad: torch.Tensor):
    """Output, every gradient and the input's gradient against the expected full ones, on any tp size."""
    from megatron_longvila.checkpoint.hf import load_full_state
    from megatron_longvila.mesh import Mesh
    from megatron_longvila.models.init import global_parameters, shard_for_rank
    from megatron_longvila.models.projector import Projector
    from megatron_longvila.parallel.groups import initialize_groups

    tp_size = dist.get_world_size()
    groups = initialize_groups(Mesh(tp_size, tp_size, 1, 1, 1), timeout_s=60)
    module = torch.nn.ModuleDict({"projector": Projector(config, groups)})
    load_full_state(module, state, config, groups)
    x = features().requires_grad_()
    out = module["projector"](x)
    assert out.shape == expected.shape
    assert (out - expected).norm() <= 1e-5 * expected.norm()
    out.square().sum().backward()
    assert (x.grad - x_grad).norm() <= 1e-5 * x_grad.norm()
    for name, parameter in global_parameters(module):
        share = shard_for_rank(name, grads[name], parameter, rank, tp_size)
        assert (parameter.grad - share).norm() <= 1e-5 * grads[name].norm(), name
    assert module["projector"](features()[:0]).shape == (0, *expected.shape[1:])
    return out.detach()


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("kind", PROJECTORS)
def test_projector_equals_its_formula(kind, tp_size):
    from megatron_longvila.checkpoint.hf import rules

    config = make_config(kind)
    state = random_projector_state(config)
    projector_rules = [rule for rule in rules(config) if rule.target in state]
    weights = {rule.sources[0].removeprefix("mm_projector."): state[rule.target].clone().requires_grad_() for rule in projector_rules}
    x = features().requires_grad_()
    expected = formula(kind, x, weights)
    expected.square().sum().backward()
    grads = {rule.target: weights[rule.sources[0].removeprefix("mm_projector.")].grad for rule in projector_rules}
    assert len(grads) == {"linear": 2, "mlp2x_gelu": 4, "mlp_downsample_3x3_fix": 10}.get(kind, 6)
    outputs = run_ranks(run_projector, tp_size, config, state, expected.detach(), grads, x.grad)
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert outputs[0].shape == (3, config.model.tokens_per_frame, HIDDEN)


def test_width_that_tp_does_not_divide_is_refused():
    config = make_config("mlp2x_gelu")
    config = replace(config, model=replace(config.model, llm=replace(config.model.llm, hidden_size=63)))
    with pytest.raises(Exception, match="ValueError: projector width 63 must be divisible by tp_size=2"):
        run_ranks(run_projector, 2, config, {}, None, {}, None)


def test_tokens_per_frame_of_the_published_sizes():
    for kind, image_size, tokens in [("mlp_downsample", 384, 196), ("mlp_downsample", 448, 256), ("mlp_downsample_3x3_fix", 448, 121)]:
        model = replace(tiny_config().model, vision=VisionConfig(image_size), projector=ProjectorConfig(kind))
        assert model.tokens_per_frame == tokens
