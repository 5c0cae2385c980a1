"""The whole model on Triton's kernels, in the interpreter and on several meshes, against one rank on plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_oracle import check_gradients, random_state

from megatron_longvila.attention import ulysses
from megatron_longvila.config import Config
from oracle import build, make_row, run_batch, teardown, tiny_config
from ranks import run_ranks

BATCH = [make_row([[2, "2f", 6], [1, "1f", 3]], 1)]  # small, for the interpreter; two packed samples, ranks without a frame
MESHES = {
    "one_recompute": (1, {}, {"training": {"recompute": "selective"}}),
    "tp2_sp_ulysses2_recompute": (
        4,
        {"tp_size": 2, "ulysses_size": 2},
        {"parallel": {"sequence_parallel": True}, "training": {"recompute": "full", "recompute_vision": True}},
    ),
    "ulysses2_parts": (2, {"ulysses_size": 2}, {"training": {"recompute": "selective"}}),
    "ulysses2_ring2": (4, {"ulysses_size": 2, "ring_size": 2}, {"training": {"recompute": "selective"}}),
}


def make_config(kernels: str, architecture: str, overrides: dict) -> Config:
    config = tiny_config(architecture, **{key: dict(value) for key, value in overrides.items()})
    return replace(config, model=replace(config.model, kernels=kernels, llm=replace(config.model.llm, num_layers=2)))


def _reference(rank, config, state):
    model, groups = build(config, {}, state)
    loss, count = run_batch(model, BATCH, config, groups)
    return loss, count, {name.removeprefix("module."): parameter.main_grad.clone() for name, parameter in model.named_parameters()}


def _matches(rank, config, sizes, state, expected):
    ulysses.PART_WORK = 0  # heads travel in parts, small as they are, wherever a rank has several groups of them
    model, groups = build(config, sizes, state)
    loss_ref, count_ref, grads_ref = expected
    loss, count = run_batch(model, BATCH, config, groups)
    assert count == count_ref and abs(loss - loss_ref) <= 1e-5 * abs(loss_ref), (loss, loss_ref)
    seen = check_gradients(model, groups, grads_ref)
    teardown()
    return seen


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("one_recompute", "llama"), ("tp2_sp_ulysses2_recompute", "qwen2"), ("ulysses2_parts", "qwen2"), ("ulysses2_ring2", "qwen2")],
)
def test_triton_kernels_agree_with_plain_pytorch(name, architecture):
    """Qwen2 has biases before the rotation, Llama has none."""
    world_size, sizes, overrides = MESHES[name]
    state = random_state(make_config("reference", architecture, {}))
    expected = run_ranks(_reference, 1, make_config("reference", architecture, {}), state)[0]
    seen = run_ranks(_matches, world_size, make_config("triton", architecture, overrides), sizes, state, expected)
    assert set().union(*seen) == set(expected[2])


def test_tp_ranks_that_share_a_key_value_head_keep_megatrons_attention():
    """Its projection is cut inside a group of heads, which the fused kernel does not do; everything else runs on the kernels."""

    def one_group(kernels: str) -> Config:
        config = make_config(kernels, "qwen2", {})
        return replace(config, model=replace(config.model, llm=replace(config.model.llm, num_query_groups=1)))

    state = random_state(one_group("reference"))
    expected = run_ranks(_reference, 1, one_group("reference"), state)[0]
    run_ranks(_matches, 2, one_group("triton"), {"tp_size": 2}, state, expected)
