"""Weights do not depend on the mesh: initialisation, slices, and the sharded names and offsets of distributed checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_longvila.config import Config
from oracle import tiny_config
from ranks import run_ranks

MESHES = {
    "one": {},
    "tp2": {"tp_size": 2},
    "pp2": {"pp_size": 2},
    "tp2_pp2": {"tp_size": 2, "pp_size": 2},
}


def make_model(config: Config, sizes: dict[str, int]):
    from megatron_longvila import platform
    from megatron_longvila.mesh import Mesh
    from megatron_longvila.models.longvila import build_model
    from megatron_longvila.parallel.groups import initialize_groups

    mesh = Mesh(dist.get_world_size(), **{"tp_size": 1, "pp_size": 1, "ulysses_size": 1, "ring_size": 1} | sizes)
    groups = initialize_groups(mesh, timeout_s=60)
    platform.seed(0, groups.pp.rank())
    return build_model(config, groups), groups


def make_config(tied: bool) -> Config:
    return tiny_config(tie_embeddings=tied, parallel={"pipeline_layers": [1, 3]} if tied else {})


def _initialized(rank: int, config: Config, sizes: dict, seed: int):
    from megatron_longvila.models.init import global_parameters, initialize_weights

    model, groups = make_model(config, sizes)
    assert all(torch.isnan(p).any() for n, p in model.named_parameters() if n.endswith("weight") and "norm" not in n)
    initialize_weights(model, config, seed)
    return groups.tp.rank(), {name: p.detach().clone() for name, p in global_parameters(model)}


def one_rank(config: Config, seed: int = 3) -> dict[str, torch.Tensor]:
    return run_ranks(_initialized, 1, config, {}, seed)[0][1]


def _is_slice_of(rank: int, config: Config, sizes: dict, full: dict):
    from megatron_longvila.models.init import global_parameters, initialize_weights, shard_for_rank

    model, groups = make_model(config, sizes)
    initialize_weights(model, config, 3)
    names = []
    for name, parameter in global_parameters(model):
        share = shard_for_rank(name, full[name], parameter, groups.tp.rank(), groups.tp.size())
        assert torch.equal(parameter, share), name
        names.append(name)
    return names


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mesh", ["tp2", "pp2", "tp2_pp2"])
def test_initialisation_does_not_depend_on_the_mesh(mesh, tied):
    config, sizes = make_config(tied), dict(MESHES[mesh])
    if tied and "pp_size" not in sizes:
        config = tiny_config(tie_embeddings=True)
    full = one_rank(tiny_config(tie_embeddings=tied))
    names = run_ranks(_is_slice_of, torch.Size(sizes.values()).numel(), config, sizes, full)
    assert set().union(*names) == set(full)


def test_initial_values():
    from megatron_longvila.checkpoint.hf import full_shapes

    config = tiny_config()
    full = one_rank(config)
    assert {name: tuple(tensor.shape) for name, tensor in full.items()} == full_shapes(config)
    assert all(not tensor.any() for name, tensor in full.items() if name.endswith("bias"))
    assert all((tensor == 1).all() for name, tensor in full.items() if "norm" in name and name.endswith("weight"))
    table = full["language_model.embedding.word_embeddings.weight"]
    assert table[:120].any() and not table[120:].any()
    std = config.model.init_std
    deviations = {
        "language_model.decoder.layers.0.mlp.linear_fc1.weight": std,
        "language_model.decoder.layers.3.mlp.linear_fc2.weight": std / 8**0.5,
        "vision_tower.encoder.layers.1.self_attention.linear_proj.weight": std / 4**0.5,
        "vision_tower.position_table": std,
        "projector.linear_fc2.weight": std,
    }
    for name, deviation in deviations.items():
        # The sample deviation of n normal values is off by about 1 / sqrt(2 n): five of those.
        assert abs(full[name].std() / deviation - 1) < 5 / (2 * full[name].numel()) ** 0.5, name
    weights = [tensor for name, tensor in full.items() if tensor.dim() > 1]
    assert len({tuple(tensor.flatten()[:4].tolist()) for tensor in weights}) == len(weights)
    other = one_rank(config, seed=4)
    assert not torch.equal(other["projector.linear_fc2.weight"], full["projector.linear_fc2.weight"])


def _sharded_state(rank: int, config: Config, sizes: dict, full: dict):
    """Every sharded tensor of this rank is the slice of the full tensor that its offsets claim; returns the names it covers."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    from megatron_longvila.models.init import initialize_weights, unfused_name

    model, groups = make_model(config, sizes)
    initialize_weights(model, config, 3)
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.dp_cp, "singleton_local_shards": False}
    names = set()
    for entry in model.sharded_state_dict(metadata=metadata).values():
        if isinstance(entry, ShardedObject):
            assert entry.data is None or entry.key.endswith("_extra_state")
            continue
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            assert isinstance(part, ShardedTensor)
            name = unfused_name(part.key)
            assert tuple(part.global_shape) == tuple(full[name].shape), name
            where = tuple(slice(start, start + size) for start, size in zip(part.global_offset, part.local_shape, strict=True))
            assert torch.equal(part.data, full[name][where]), name
            names.add(name)
    return names


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mesh", ["one", "tp2_pp2"])
def test_sharded_names_and_offsets(mesh, tied):
    sizes = MESHES[mesh]
    config = make_config(tied) if sizes else tiny_config(tie_embeddings=tied)
    full = one_rank(tiny_config(tie_embeddings=tied))
    names = run_ranks(_sharded_state, torch.Size(sizes.values()).numel(), config, sizes, full)
    assert set().union(*names) == set(full)


def test_adapters_do_not_depend_on_the_mesh():
    """A uniform within 1 / sqrt(inputs), as PEFT draws it, B zero; slices, sharded names, offsets and marks as for all weights."""
    from megatron_longvila.checkpoint.hf import full_shapes

    config = tiny_config(lora={"rank": 4})
    full = one_rank(config)
    base = one_rank(tiny_config())
    assert {name: tuple(tensor.shape) for name, tensor in full.items()} == full_shapes(config)
    assert all(torch.equal(full[name], tensor) for name, tensor in base.items())
    adapters = {name: tensor for name, tensor in full.items() if name not in base}
    assert len(adapters) == 4 * 4 * 2
    for name, tensor in adapters.items():
        if name.endswith(".B"):
            assert not tensor.any(), name
        else:
            bound = tensor.shape[1] ** -0.5
            assert 0.9 * bound < tensor.abs().max() <= bound and abs(tensor.mean()) < 5 * bound / (3 * tensor.numel()) ** 0.5, name
    for fn in (_is_slice_of, _sharded_state):
        names = run_ranks(fn, 4, config, {"tp_size": 2, "pp_size": 2}, full)
        assert set().union(*names) == set(full)
    assert run_ranks(_marks, 2, replace(config, parallel=replace(config.parallel, sequence_parallel=True))) == [full_shapes(config)] * 2


def _marks(rank: int, config: Config):
    from megatron_longvila.models.init import full_shape, global_parameters, mark_parameters

    model, groups = make_model(config, {"tp_size": 2})
    mark_parameters(model)
    for name, parameter in global_parameters(model):
        # A slice that is marked as whole (or the reverse) would enter the gradient norm twice (or half).
        assert parameter.tensor_model_parallel == (full_shape(parameter, 2) != tuple(parameter.shape)), name
    return {name: full_shape(parameter, 2) for name, parameter in global_parameters(model)}


def test_every_parameter_is_marked_as_whole_or_sharded():
    from megatron_longvila.checkpoint.hf import full_shapes

    config = tiny_config(parallel={"sequence_parallel": True})
    assert run_ranks(_marks, 2, config) == [full_shapes(config)] * 2


def test_gated_linear_is_sliced_half_by_half():
    from types import SimpleNamespace

    from megatron_longvila.models.init import shard_for_rank

    parameter = SimpleNamespace(shape=(4, 1), tensor_model_parallel=True, partition_dim=0, partition_stride=2)
    gate_up = torch.arange(8)[:, None]  # gate rows 0..3, up rows 4..7
    assert [shard_for_rank("fc1", gate_up, parameter, rank, 2).flatten().tolist() for rank in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    with pytest.raises(ValueError, match=r"fc1 has shape \(6, 1\), the model expects \(8, 1\)"):
        shard_for_rank("fc1", gate_up[:6], parameter, 0, 2)
