"""The host never waits for the GPU in a decoder layer or in the embedding: torch raises where it would. One GPU, Triton's kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from host_waits import later_step_never_waits

from megatron_longvila import platform
from megatron_longvila.attention.core_attention import SequenceParams
from oracle import build, make_row, rank_batch, teardown, tiny_config

from megatron.core.optimizer import clip_grads  # isort: skip

pytestmark = pytest.mark.gpu

ROW = make_row([[300, "5f", 9], [4, "1f", 700], [33]], 1)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    platform.init_distributed(timeout_s=60)
    yield
    platform.shutdown_distributed()


@pytest.fixture(params=["cudnn", "flash"])
def model_and_batch(request):
    """One decoder layer in bf16 behind the whole front, and a row of three samples on this rank."""
    config = tiny_config()
    llm = replace(config.model.llm, num_layers=1, head_dim=64)
    model = replace(config.model, kernels="triton", attention_backend=request.param, llm=llm)
    config = replace(config, model=model, training=replace(config.training, precision="bf16"))
    wrapped, groups = build(config, {}, None)
    yield wrapped.module, rank_batch(ROW, groups.mesh, 0, 1)
    teardown()


def test_the_mode_sees_a_pageable_copy():
    with pytest.raises(RuntimeError, match="synchroniz"):
        later_step_never_waits(lambda: torch.ones(4).to(platform.device()))


def test_a_decoder_layer(model_and_batch):
    model, (_, _, positions_T, _, plan) = model_and_batch
    hidden_T1D = torch.randn(plan.layout.local_rows, 1, model.config.hidden_size, device=platform.device(), dtype=torch.bfloat16)
    hidden_T1D.requires_grad_()
    params = SequenceParams(layout=plan.layout)
    later_step_never_waits(lambda: model.language_model(hidden_T1D, positions_T, params).sum().backward())


def test_the_embedding(model_and_batch):
    """Tower, projector, both row maps and the lookup, forward and backward."""
    model, (frames, input_ids_T, _, _, plan) = model_and_batch
    later_step_never_waits(lambda: model.embed(frames, input_ids_T, plan).sum().backward())


def test_the_norm_of_the_gradients():
    """Up to its one number, which the loop reads."""
    grads = [torch.randn(size, device=platform.device()) for size in (1 << 20, 7, 1)]
    later_step_never_waits(lambda: clip_grads.l2_norm_impl(0, None, [grads], False))


def test_an_upload_arrives():
    """Also of nothing, which a rank without frames sends."""
    for values in (torch.arange(1 << 20), torch.empty(0, dtype=torch.int64)):
        sent = platform.upload(values, platform.device())
        assert sent.device == platform.device() and sent.cpu().equal(values)
