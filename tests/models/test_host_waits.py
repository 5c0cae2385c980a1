"""The host runs ahead of the device: what a decoder layer and the embedding read back or send, counted on a CPU."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch
from host_waits import host_waits, waits_of

from megatron_longvila import platform
from megatron_longvila.config import RopeScaling
from megatron_longvila.kernels.choice import REFERENCE
from oracle import build, make_row, rank_batch, tiny_config
from ranks import run_ranks

ROW = make_row([[3, "5f", 9], [4, "1f", 2]], 1)
DYNAMIC = RopeScaling("dynamic", factor=4.0, original_max_position_embeddings=6)


def _model(scaling: RopeScaling | None = None):
    """(model of one decoder layer with fused attention, this rank's batch) on ulysses 2 x ring 2; weights are not set."""
    from megatron_longvila.models import llm
    from megatron_longvila.models.self_attention import FusedSelfAttention

    config = tiny_config()
    config = replace(config, model=replace(config.model, llm=replace(config.model.llm, num_layers=1, rope_scaling=scaling)))
    # The path of Triton's kernels, on their plain twins: the interpreter reads tensors itself.
    with mock.patch.object(llm, "get_kernels", lambda *_: replace(REFERENCE, name="triton")):
        model, groups = build(config, {"ulysses_size": 2, "ring_size": 2}, None)
    model = model.module
    assert isinstance(model.language_model.decoder.layers[0].self_attention, FusedSelfAttention)
    return model, rank_batch(ROW, groups.mesh, groups.cp.rank(), 1)


def test_the_counter_sees_reads_and_host_memory():
    with host_waits() as counts:
        torch.tensor([1.0]).sum().item()
        platform.upload(torch.ones(1), torch.device("cpu"))
    assert counts == {"host_tensors": 1, "reads": 1, "uploads": 1}


def test_a_decoder_layer_never_waits():
    """Forward and backward, norms, fused attention and MLP, with its rotary table; planning is done at the first sight of a layout."""

    def body(rank, scaling):
        from megatron_longvila.attention.core_attention import SequenceParams

        model, (_, _, positions_T, _, plan) = _model(scaling)

        def step():
            hidden_T1D = torch.randn(plan.layout.local_rows, 1, model.config.hidden_size, requires_grad=True)
            model.language_model(hidden_T1D, positions_T, SequenceParams(layout=plan.layout)).sum().backward()

        return waits_of(step)

    for first, later in run_ranks(body, 4, None):
        assert first == {"host_tensors": first["uploads"], "uploads": first["uploads"]} and later == {}
    for _, later in run_ranks(body, 4, DYNAMIC):
        assert later == {"uploads": 1}  # its frequencies depend on the row


def test_the_embedding_sends_two_maps_and_never_waits():
    def body(rank):
        model, (frames, input_ids_T, _, _, plan) = _model()
        return waits_of(lambda: model.embed(frames, input_ids_T, plan).sum().backward())

    assert run_ranks(body, 4) == [[{"host_tensors": 2, "uploads": 2}] * 2] * 4


def test_an_upload_to_a_gpu_is_pinned_and_does_not_block():
    values = mock.create_autospec(torch.Tensor, instance=True)
    assert platform.upload(values, torch.device("cuda", 0)) is values.pin_memory.return_value.to.return_value
    values.pin_memory.return_value.to.assert_called_once_with(torch.device("cuda", 0), non_blocking=True)
    values.to.assert_not_called()
