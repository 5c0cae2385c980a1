"""Adapters: N ranks agree with one, no adapter starves, frozen parts cost nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist
from test_oracle import check_gradients, random_state

from megatron_longvila import platform
from megatron_longvila.config import OptimizerConfig
from oracle import BATCHES, build, run_batch, teardown, tiny_config
from ranks import RankError, run_ranks

OPTIMIZER = OptimizerConfig(lr=0.02, schedule="constant")
LORA = {"rank": 4, "alpha": 6.0}
TRAINABLE = ("lora", "llm_norms")
MESHES = {
    "tp2_sp_recompute": (2, {"tp_size": 2}, {"parallel": {"sequence_parallel": True}, "training": {"recompute": "full"}}),
    "pp2_recompute": (2, {"pp_size": 2}, {"training": {"recompute": "full"}}),
    "ulysses2_ring2": (4, {"ulysses_size": 2, "ring_size": 2}, {}),
    "tp2_ring2": (4, {"tp_size": 2, "ring_size": 2}, {"training": {"recompute": "selective"}}),
}
CHOSEN = ("seven_frames", "no_frame", "text_with_video")


def make_config(optimizer=None, **overrides):
    extra = {"optimizer": optimizer} if optimizer else {}
    return tiny_config(lora=dict(LORA), **extra, **{key: dict(value) for key, value in overrides.items()})


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


def _fresh(config, sizes, trainable):
    """A freshly initialised model with everything a training run has, on this rank."""
    from toy_model import ToyLoader

    from megatron_longvila.checkpoint.sharded import TrainingState
    from megatron_longvila.mesh import Mesh
    from megatron_longvila.models.init import initialize_weights
    from megatron_longvila.models.longvila import build_model
    from megatron_longvila.parallel.groups import initialize_groups
    from megatron_longvila.training.optimizer import build_optimizer, build_scheduler, freeze, wrap_ddp

    mesh = Mesh(dist.get_world_size(), **{"tp_size": 1, "pp_size": 1, "ulysses_size": 1, "ring_size": 1} | sizes)
    groups = initialize_groups(mesh, timeout_s=60)
    platform.seed(0, groups.pp.rank())
    model = build_model(config, groups)
    initialize_weights(model, config, seed=5)
    freeze(model, list(trainable))
    wrapped = wrap_ddp(model, config)
    optimizer = build_optimizer(wrapped, config)
    return wrapped, groups, TrainingState(model, optimizer, build_scheduler(optimizer, config, 10), ToyLoader())


def _step(model, groups, state, config, batch):
    from megatron_longvila.training.optimizer import step

    state.optimizer.zero_grad()
    loss, _ = run_batch(model, batch, config, groups)
    step(state.optimizer)
    state.scheduler.step(1)
    return loss


def _starved(rank, config, sizes, let_in):
    """Adapter matrices of this rank with a gradient of exactly zero, in each of two steps."""
    from megatron_longvila.models.init import global_parameters
    from megatron_longvila.models.llm import LanguageModel
    from megatron_longvila.models.lora import is_adapter

    if not let_in:
        LanguageModel._with_gradient = lambda self, decoder_input: decoder_input
    model, groups, state = _fresh(config, sizes, TRAINABLE)
    found = []
    for name in ("seven_frames", "no_frame"):
        _step(model, groups, state, config, BATCHES[name])
        found.append({n for n, p in global_parameters(model.module) if is_adapter(n) and not p.main_grad.any()})
    return found


def test_no_adapter_starves_under_recompute():
    """Embeddings, tower and projector are frozen, so nothing that enters the first recomputed layer needs a gradient by itself."""
    config = make_config(optimizer=OPTIMIZER, parallel={"sequence_parallel": True}, training={"recompute": "full"})
    for first, second in run_ranks(_starved, 2, config, {"tp_size": 2}, True):
        assert len(first) == 16 and all(name.endswith(".A") for name in first)  # B is zero before the first update
        assert second == set()
    config = make_config(optimizer=OPTIMIZER, parallel={"overlap_grad_reduce": False}, training={"recompute": "full"})
    first, second = run_ranks(_starved, 1, config, {}, False)[0]
    assert len(second) == 32, "the trap is gone: nothing starves without the gradient that the model lets in"


def _graph(rank, config, state, trainable):
    """What of the vision side ran with a graph, for a row with frames and for one without."""
    model, groups = build(config, {}, state, trainable=trainable)
    outputs = []
    for part in (model.module.vision_tower, model.module.projector):
        part.register_forward_hook(lambda module, _, output: outputs.append((type(module).__name__, output.grad_fn is not None)))
    found = []
    for name in ("seven_frames", "no_frame"):
        outputs.clear()
        run_batch(model, BATCHES[name], config, groups)
        found.append(set(outputs))
    return found


@pytest.mark.parametrize("recompute_vision", [False, True])
@pytest.mark.parametrize(
    "trainable, with_frames, without_frames",
    [
        (TRAINABLE, {("SiglipTower", False), ("Projector", False)}, set()),
        (("projector", "lora"), {("SiglipTower", False), ("Projector", True)}, {("SiglipTower", False), ("Projector", True)}),
        (("vision", "lora"), {("SiglipTower", True), ("Projector", True)}, {("SiglipTower", True), ("Projector", True)}),
    ],
)
def test_frozen_parts_have_no_graph(trainable, with_frames, without_frames, recompute_vision, one_rank):
    config = make_config(training={"recompute_vision": recompute_vision})
    assert run_ranks(_graph, 1, config, one_rank[0], trainable)[0] == [with_frames, without_frames]


@pytest.mark.parametrize("trainable", [("projector", "lora"), ("lora",)], ids="+".join)
def test_gradients_beside_frozen_parts(trainable, one_rank):
    """Ranks without a frame, ranks with, and rows without any, with buckets reduced during backward."""
    state, _ = one_rank
    expected = run_ranks(_reference, 1, make_config(), state, trainable)[0]
    config = make_config(training={"recompute": "full", "recompute_vision": True})
    run_ranks(_agrees, 4, config, {"ulysses_size": 2, "ring_size": 2}, state, expected, trainable, True)


def _train(rank, root, config, sizes, steps, save_at=None):
    """Losses of the steps after the newest checkpoint of `root`."""
    from megatron_longvila.checkpoint.sharded import Checkpoints
    from megatron_longvila.training.optimizer import apply_settings

    model, groups, state = _fresh(config, sizes, TRAINABLE)
    checkpoints = Checkpoints(root, config, groups)
    newest = checkpoints.newest()
    done = checkpoints.resume(state, newest) if newest else 0
    apply_settings(state.optimizer, state.scheduler, config)
    losses = []
    for number in range(done, steps):
        losses.append(_step(model, groups, state, config, BATCHES[("seven_frames", "three_packed")[number % 2]]))
        if number + 1 == save_at:
            checkpoints.save(state, number + 1)
    return losses


def test_any_layout_continues(tmp_path):
    """Adapters, trained norms and their optimizer state, written on tp 2 x pp 2 and read on other meshes."""
    config = make_config(optimizer=OPTIMIZER, training={"trainable": list(TRAINABLE)})
    whole = run_ranks(_train, 4, tmp_path, config, {"tp_size": 2, "pp_size": 2}, 5, 3)[0]
    assert whole[-1] < whole[0]
    for world_size, sizes in ((1, {}), (2, {"tp_size": 2})):
        assert run_ranks(_train, world_size, tmp_path, config, sizes, 5)[0] == pytest.approx(whole[3:], rel=1e-5), sizes


def test_adapters_need_whole_heads():
    config = make_config(optimizer=OPTIMIZER)
    config = replace(config, model=replace(config.model, llm=replace(config.model.llm, num_query_groups=1)))
    with pytest.raises(RankError, match="num_query_groups=1 to be divisible by parallel.tp_size=2.*lower tp_size"):
        run_ranks(_starved, 2, config, {"tp_size": 2}, True)
