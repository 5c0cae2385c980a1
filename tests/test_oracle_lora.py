"""Adapters: N ranks agree with one, no adapter starves, frozen parts cost nothing."""

from __future__ import annotations

import pytest
from test_oracle import check_gradients, random_state

from oracle import BATCHES, build, run_batch, teardown, tiny_config
from ranks import run_ranks

LORA = {"rank": 4, "alpha": 6.0}
TRAINABLE = ("lora", "llm_norms")
MESHES = {
    "tp2_sp_recompute": (2, {"tp_size": 2}, {"parallel": {"sequence_parallel": True}, "training": {"recompute": "full"}}),
    "pp2_recompute": (2, {"pp_size": 2}, {"training": {"recompute": "full"}}),
    "ulysses2_ring2": (4, {"ulysses_size": 2, "ring_size": 2}, {}),
    "tp2_ring2": (4, {"tp_size": 2, "ring_size": 2}, {"training": {"recompute": "selective"}}),
}
CHOSEN = ("seven_frames", "no_frame", "text_with_video")


def make_config(lora=LORA, **overrides):
    return tiny_config(lora=dict(lora), **{key: dict(value) for key, value in overrides.items()})


def _reference(rank, config, state, trainable):
    model, groups = build(config, {}, state, trainable=trainable)
    results = {}
    for name in CHOSEN:
        loss, count = run_batch(model, BATCHES[name], config, groups)
        grads = {n.removeprefix("module."): p.main_grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results[name] = loss, count, grads
    return results


def _agrees(rank, config, sizes, state, expected, trainable, overlap):
    from megatron_longvila.training.optimizer import is_trainable

    model, groups = build(config, sizes, state, overlap=overlap, trainable=trainable)
    buffered = {parameter for buffer in model.buffers for parameter in buffer.params}
    assert buffered == {p for n, p in model.module.named_parameters() if is_trainable(n, trainable)}  # no gradient buffer for the base
    for name in CHOSEN:
        loss, count = run_batch(model, BATCHES[name], config, groups)
        loss_ref, count_ref, grads_ref = expected[name]
        assert count == count_ref and abs(loss - loss_ref) <= 1e-5 * abs(loss_ref), name
        seen = check_gradients(model, groups, grads_ref)
    teardown()
    return seen


@pytest.fixture(scope="module")
def one_rank():
    config = make_config()
    state = random_state(config)
    return state, run_ranks(_reference, 1, config, state, TRAINABLE)[0]


@pytest.mark.parametrize("name", MESHES)
def test_ranks_agree_with_one(name, one_rank):
    state, expected = one_rank
    assert all(grad.any() for _, _, grads in expected.values() for grad in grads.values())
    world_size, sizes, overrides = MESHES[name]
    seen = run_ranks(_agrees, world_size, make_config(**overrides), sizes, state, expected, TRAINABLE, "ring" in name)
    assert set().union(*seen) == set(expected[CHOSEN[0]][2])
