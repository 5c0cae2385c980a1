"""N ranks agree with one: loss and every gradient, on uneven rows, for every kind of mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from oracle import BATCHES, build, run_batch, teardown, tiny_config
from ranks import RankError, run_ranks

MESHES = {
    "tp2": ({"tp_size": 2}, {}),
    "pp2": ({"pp_size": 2}, {}),
    "dp2": ({}, {}),
    "ulysses2": ({"ulysses_size": 2}, {}),
    "ulysses4": ({"ulysses_size": 4}, {}),
    "ring2": ({"ring_size": 2}, {}),
    "ring2_p2p": ({"ring_size": 2}, {"parallel": {"ring_transport": "p2p"}}),
    "ring4": ({"ring_size": 4}, {}),
    "ring4_p2p": ({"ring_size": 4}, {"parallel": {"ring_transport": "p2p"}}),
    "ulysses2_ring2": ({"ulysses_size": 2, "ring_size": 2}, {}),
    "tp2_sp": ({"tp_size": 2}, {"parallel": {"sequence_parallel": True}}),
    "tp2_sp_ulysses2_recompute": (
        {"tp_size": 2, "ulysses_size": 2},
        {"parallel": {"sequence_parallel": True}, "training": {"recompute": "full", "recompute_vision": True}},
    ),
    "tp2_ring2": ({"tp_size": 2, "ring_size": 2}, {}),
    "pp2_ulysses2": ({"pp_size": 2, "ulysses_size": 2}, {"parallel": {"pipeline_layers": [1, 3]}}),
    "pp2_ring2_p2p": ({"pp_size": 2, "ring_size": 2}, {"parallel": {"ring_transport": "p2p"}, "training": {"recompute": "selective"}}),
    "dp2_ulysses2": ({"ulysses_size": 2}, {}),
    "tp2_pp2_sp": ({"tp_size": 2, "pp_size": 2}, {"parallel": {"sequence_parallel": True}}),
    "dp2_ulysses2_ring2": ({"ulysses_size": 2, "ring_size": 2}, {}),
    "ulysses4_ring2": ({"ulysses_size": 4, "ring_size": 2}, {}),
    "ulysses2_ring4_p2p": ({"ulysses_size": 2, "ring_size": 4}, {"parallel": {"ring_transport": "p2p"}}),
    "tp2_sp_ulysses2_ring2_recompute": (
        {"tp_size": 2, "ulysses_size": 2, "ring_size": 2},
        {"parallel": {"sequence_parallel": True}, "training": {"recompute": "full"}},
    ),
    "pp2_ulysses2_ring2": ({"pp_size": 2, "ulysses_size": 2, "ring_size": 2}, {"training": {"recompute": "full"}}),
    "tp2_pp2_dp2": ({"tp_size": 2, "pp_size": 2}, {}),
}
DP2 = {name for name in MESHES if "dp2" in name}
OVERLAP = {"ulysses4", "ulysses2_ring2", "dp2_ulysses2", "tp2_sp_ulysses2_recompute", "pp2_ulysses2"}


def world_size(name: str) -> int:
    sizes = MESHES[name][0].values()
    return int(torch.tensor([1, *sizes]).prod()) * (2 if name in DP2 else 1)


def random_state(config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Full weights under one-rank names, every parameter random (norms and biases too)."""
    from megatron_longvila.checkpoint.hf import full_shapes

    generator = torch.Generator().manual_seed(seed)
    return {
        name: ("norm" in name and name.endswith("weight")) + 0.1 * torch.randn(shape, generator=generator)
        for name, shape in full_shapes(config).items()
    }


def reference(config, state, trainable=("vision", "projector", "llm")) -> dict:
    """Loss and full gradients of every batch on one rank."""
    return run_ranks(_reference, 1, config, state, trainable)[0]


def _reference(rank, config, state, trainable):
    model, groups = build(config, {}, state, trainable=trainable)
    results = {}
    for name, batch in BATCHES.items():
        loss, count = run_batch(model, batch, config, groups)
        grads = {n.removeprefix("module."): p.main_grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results[name] = (loss, count, grads)
    return results


def check_gradients(model, groups, grads_ref: dict[str, torch.Tensor]) -> set[str]:
    """||g - g_ref|| <= 1e-5 ||g_ref|| + 1e-8 ||all reference gradients|| per stored parameter (over its tp shards); zeros stay zero.

    Returns the names of the parameters that train on this rank.
    """
    from megatron_longvila.models.init import global_parameters, shard_for_rank

    scale = torch.stack([grad.norm() for grad in grads_ref.values()]).norm()
    failures, seen = [], set()
    for name, parameter in global_parameters(model.module):
        if not parameter.requires_grad:
            continue
        seen.add(name)
        expected = shard_for_rank(name, grads_ref[name], parameter, groups.tp.rank(), groups.tp.size())
        got = parameter.main_grad
        squares = torch.stack([(got - expected).double().square().sum(), expected.double().square().sum(), got.abs().max().double()])
        dist.all_reduce(squares, group=groups.tp)
        error, norm, largest = squares[0].sqrt(), squares[1].sqrt(), squares[2]
        if error > 1e-5 * norm + 1e-8 * scale or (norm == 0 and largest != 0) or not torch.isfinite(error):
            failures.append(f"{name}: |g - g_ref| = {error:.3e}, |g_ref| = {norm:.3e}")
    assert not failures, "\n".join(failures)
    return seen


def assert_agreement(name, config, state, expected, trainable=("vision", "projector", "llm"), overlap=False) -> None:
    """Every batch on mesh `name` agrees with `expected`, and together the ranks compared every parameter that trains."""
    seen = run_ranks(_matches_one_rank, world_size(name), name, config, state, expected, trainable, overlap)
    assert set().union(*seen) == set(next(iter(expected.values()))[2])


def _matches_one_rank(rank, name, config, state, expected, trainable, overlap, breakage=None):
    sizes, _ = MESHES[name]
    if breakage == "detached_gather":
        import megatron_longvila.models.longvila as longvila

        longvila.exchange_rows = detached_exchange
    model, groups = build(config, sizes, state, overlap=overlap, trainable=trainable)
    for batch_name, batch in BATCHES.items():
        loss, count = run_batch(model, batch, config, groups, local_shift if breakage == "local_shift" else None)
        loss_ref, count_ref, grads_ref = expected[batch_name]
        assert count == count_ref, f"{batch_name}: {count} labelled tokens, one rank counts {count_ref}"
        assert abs(loss - loss_ref) <= 1e-5 * abs(loss_ref), f"{batch_name}: loss {loss} against {loss_ref}"
        try:
            seen = check_gradients(model, groups, grads_ref)
        except AssertionError as error:
            raise AssertionError(f"{batch_name} on {name}:\n{error}") from None
    teardown()
    return seen


class _DetachedGather(torch.autograd.Function):
    """What a reshard by an in-place collective does: right values, but a row that changes rank brings no gradient home."""

    @staticmethod
    def forward(ctx, x, send_counts, recv_counts, group):
        ctx.counts = send_counts, recv_counts, group.rank(), x.shape
        out = x.new_empty(sum(recv_counts), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(recv_counts), list(send_counts), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        send_counts, recv_counts, rank, shape = ctx.counts
        mine = grad.new_zeros(shape)
        mine.split(list(send_counts))[rank].copy_(grad.split(list(recv_counts))[rank])
        return mine, None, None, None


def detached_exchange(x, send_counts, recv_counts, group):
    return _DetachedGather.apply(x, send_counts, recv_counts, group)


def local_shift(row, labels_T, plan):
    """Labels shifted inside each rank's shard: the target of a shard's last row is lost, and a zigzag shard trains across its seam."""
    ids = torch.from_numpy(row.input_ids[plan.row_source_T.clip(min=0)])
    labelled_source = torch.from_numpy(row.labels) != -100
    shifted = torch.full_like(labels_T, -100)
    unshifted = torch.where(labelled_source[torch.from_numpy(plan.row_source_T - 1).clamp(min=0)], ids, -100)
    shifted[:-1] = unshifted[1:]
    return shifted


@pytest.fixture(scope="module")
def one_rank():
    config = tiny_config()
    state = random_state(config)
    return config, state, reference(config, state)


@pytest.mark.parametrize("name", MESHES)
def test_ranks_agree_with_one(name, one_rank):
    _, state, expected = one_rank
    config = tiny_config(**{key: dict(value) for key, value in MESHES[name][1].items()})
    assert_agreement(name, config, state, expected, overlap=name in OVERLAP)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("trainable", [("projector",), ("projector", "llm"), ("vision",)], ids="+".join)
def test_frozen_parts(trainable, overlap, one_rank):
    """Seven frames on four ranks, then two (ranks without a frame), then none: hooks fire and gradients stay right with parts frozen."""
    config, state, _ = one_rank
    assert_agreement("ulysses2_ring2", config, state, reference(config, state, trainable), trainable, overlap)


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_with_nothing_to_train(tied):
    """The last stage is frozen, its tied copy of the embedding too, and gradients still pass through it."""
    config, trainable = tiny_config(tie_embeddings=tied), ("projector",)
    state = random_state(config)
    assert_agreement("pp2", config, state, reference(config, state, trainable), trainable, overlap=True)


@pytest.mark.parametrize("mesh", ["tp2", "tp2_sp"])
def test_more_tp_ranks_than_key_value_heads(mesh):
    """Both tp ranks then compute the one key/value head, each for its own query heads."""

    def one_group(config):
        return replace(config, model=replace(config.model, llm=replace(config.model.llm, num_query_groups=1)))

    config = one_group(tiny_config())
    state = random_state(config)
    on_mesh = one_group(tiny_config(**{key: dict(value) for key, value in MESHES[mesh][1].items()}))
    assert_agreement(mesh, on_mesh, state, reference(config, state))


@pytest.mark.parametrize("mesh", ["tp2", "pp2", "ulysses2_ring2"])
@pytest.mark.parametrize("architecture, tied", [("llama", False), ("qwen2", True)])
def test_other_language_models(architecture, tied, mesh):
    config = tiny_config(architecture, tied)
    state = random_state(config, seed=1)
    assert_agreement(mesh, config, state, reference(config, state))


# The message of the check that must object, with numbers: the traceback around it shows the source of every check.
OBJECTIONS = {
    "detached_gather": r"AssertionError: \w+ on ulysses2_ring2:\n.*(vision_tower|projector)\.\S+: \|g - g_ref\| = \d",
    "local_shift": r"AssertionError: \w+: \d+ labelled tokens, one rank counts \d+",
}


@pytest.mark.parametrize("breakage", OBJECTIONS)
def test_the_oracle_rejects_a_wrong_step(breakage, one_rank):
    config, state, expected = one_rank
    with pytest.raises(RankError, match=OBJECTIONS[breakage]):
        run_ranks(_matches_one_rank, 4, "ulysses2_ring2", config, state, expected, ("vision", "projector", "llm"), False, breakage)
