"""The tower equals transformers' SigLIP at hidden_states[-2], also over tp 2; the position table resizes sanely."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_longvila.config import Config, ModelConfig, TrainingConfig, VisionConfig
from megatron_longvila.models.siglip import resize_position_table
from oracle import tiny_config
from ranks import run_ranks

# 5 x 5 patches with one pixel left over at the right and at the bottom, as 384 px and patches of 14 leave 6.
VISION = VisionConfig(image_size=31, patch_size=6, hidden_size=32, ffn_hidden_size=48, num_layers=4, num_attention_heads=4)
CONFIG = Config(model=replace(tiny_config().model, vision=VISION), training=TrainingConfig(precision="fp32"))


def pixels(num_frames: int) -> torch.Tensor:
    return torch.rand(num_frames, 3, 31, 31, generator=torch.Generator().manual_seed(1)) * 2 - 1


def output_weights() -> torch.Tensor:
    return torch.randn(25, 32, generator=torch.Generator().manual_seed(2))


def make_tower(config: Config, **sizes: int):
    """(module with the tower, groups) on this job's ranks."""
    from megatron_longvila import platform
    from megatron_longvila.mesh import Mesh
    from megatron_longvila.models.siglip import SiglipTower
    from megatron_longvila.parallel.groups import initialize_groups

    mesh = Mesh(dist.get_world_size(), **{"tp_size": 1, "pp_size": 1, "ulysses_size": 1, "ring_size": 1} | sizes)
    groups = initialize_groups(mesh, timeout_s=60)
    platform.seed(0, 0)
    return torch.nn.ModuleDict({"vision_tower": SiglipTower(config, groups)}), groups


def random_tower_state(config: Config) -> dict[str, torch.Tensor]:
    from megatron_longvila.checkpoint.hf import full_shapes

    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, shape in full_shapes(config).items() if name.startswith("vision_tower.")}
    return {name: ("norm" in name and "weight" in name) + 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def features_and_gradients(rank: int, state: dict, num_frames: int, tp_size: int):
    """(features, gradients by global name) of this rank; gradients of sum(features * output_weights)."""
    from megatron_longvila.checkpoint.hf import load_full_state
    from megatron_longvila.models.init import global_parameters

    module, groups = make_tower(CONFIG, tp_size=tp_size)
    load_full_state(module, state, CONFIG, groups)
    features = module["vision_tower"](pixels(num_frames))
    (features * output_weights()).sum().backward()
    return features.detach(), {name: p.grad for name, p in global_parameters(module)}


def hf_tower(state: dict):
    transformers = pytest.importorskip("transformers")
    from megatron_longvila.checkpoint.hf import rules

    tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=31, patch_size=6,
            layer_norm_eps=VISION.layernorm_epsilon,
        )
    ).float()  # fmt: skip
    names = {name.removeprefix("vision_model."): parameter for name, parameter in tower.named_parameters()}
    for rule in rules(CONFIG):
        if rule.target in state:
            for source, tensor in zip(rule.sources, rule.split(state[rule.target]), strict=True):
                names[source.removeprefix("vision_tower.vision_model.")].data.copy_(tensor)
    return tower, names


def test_features_and_gradients_equal_transformers():
    from megatron_longvila.checkpoint.hf import rules

    state = random_tower_state(CONFIG)
    features, grads = run_ranks(features_and_gradients, 1, state, 3, 1)[0]
    tower, names = hf_tower(state)
    expected = tower(pixels(3), output_hidden_states=True).hidden_states[-2]
    assert features.shape == expected.shape == (3, 25, 32)
    assert (features - expected).norm() <= 1e-5 * expected.norm()
    (expected * output_weights()).sum().backward()
    reached = set()
    for rule in rules(CONFIG):
        if rule.target in state:
            sources = [source.removeprefix("vision_tower.vision_model.") for source in rule.sources]
            expected_grad = rule.merge(*(names[source].grad for source in sources))
            assert (grads[rule.target] - expected_grad).norm() <= 1e-4 * expected_grad.norm(), rule.target
            reached.update(sources)
    assert {name for name, p in names.items() if p.grad is not None and p.grad.abs().max() > 0} == reached


def _matches_one_rank(rank: int, state: dict, features: torch.Tensor, grads: dict):
    from megatron_longvila.models.init import global_parameters, shard_for_rank

    got, got_grads = features_and_gradients(rank, state, 3, 2)
    assert (got - features).norm() <= 1e-5 * features.norm()
    module, _ = make_marked(state)
    for name, parameter in global_parameters(module):
        expected = shard_for_rank(name, grads[name], parameter, rank, 2)
        assert (got_grads[name] - expected).norm() <= 1e-5 * grads[name].norm(), name
    return sum(parameter.tensor_model_parallel for _, parameter in global_parameters(module))


def make_marked(state: dict):
    """A second tower of the same mesh, for its marks only."""
    from megatron_longvila.models.init import mark_parameters
    from megatron_longvila.parallel.groups import destroy_groups

    destroy_groups()
    module, groups = make_tower(CONFIG, tp_size=2)
    mark_parameters(module)
    return module, groups


def test_tp_equals_one_rank():
    state = random_tower_state(CONFIG)
    features, grads = run_ranks(features_and_gradients, 1, state, 3, 1)[0]
    sharded = run_ranks(_matches_one_rank, 2, state, features, grads)
    assert sharded == [3 * 6] * 2  # per layer: weights and biases of qkv and fc1, weights of proj and fc2


@pytest.mark.parametrize("change, message", [({"preprocess": "dynamic"}, "use resize"), ({"image_size": 5}, "at least patch_size=6")])
def test_refused(change, message):
    config = replace(CONFIG, model=replace(CONFIG.model, vision=replace(VISION, **change)))
    with pytest.raises(Exception, match=f"ValueError: model.vision.{next(iter(change))}.*{message}"):
        run_ranks(lambda rank: make_tower(config), 1)


def test_bad_select_layer_is_refused():
    config = replace(CONFIG, model=replace(CONFIG.model, vision=replace(VISION, select_layer=-5)))
    with pytest.raises(Exception, match="ValueError: model.vision.select_layer=-5 must name .* -4 to -1"):
        run_ranks(lambda rank: make_tower(config), 1)


@pytest.mark.parametrize("old, new", [(729, 1024), (1024, 729), (16, 31), (7, 1), (1, 4)])
def test_resized_table_is_linear_interpolation(old, new):
    table = torch.randn(old, 3, generator=torch.Generator().manual_seed(0))
    where = np.linspace(0, old - 1, new)
    expected = np.stack([np.interp(where, np.arange(old), column) for column in table.numpy().T], axis=1)
    np.testing.assert_allclose(resize_position_table(table, new).numpy(), expected, atol=3e-5 * np.abs(expected).max())


def test_resize_keeps_rows_it_hits_exactly():
    table = torch.randn(16, 4)
    assert torch.equal(resize_position_table(table, 16), table)
    # 31 positions over 16 rows: every second one is an old row, which must not become zero.
    assert torch.equal(resize_position_table(table, 31)[::2], table)
    assert resize_position_table(table.bfloat16(), 9).dtype == torch.bfloat16


def test_released_towers_have_the_published_sizes():
    assert ModelConfig().vision.built_layers == 26
    assert [replace(ModelConfig().vision, image_size=size).grid_size ** 2 for size in (384, 448)] == [729, 1024]
