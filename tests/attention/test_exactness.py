"""The helpers of the GPU's exactness tests, on a CPU: all ring ranks in one process against dense attention, and the sampled oracle."""

from unittest import mock

import pytest
import torch
from exactness import NAMES, SCALE, random_qkv, ring_on_one_device, sampled_errors
from programs import ROOT, load_script

from dense_attention import dense_gradients, relative_error
from megatron_longvila.attention.backends import ReferenceBackend
from megatron_longvila.attention.ring import TRANSPORTS
from megatron_longvila.parallel.plan import pad_samples
from ranks import run_ranks, warm_parent

PACK = (41, 1, 90)


class _Packing(ReferenceBackend):
    """The reference, asked for neighbours of up to `short` rows in one call, as a GPU's backends are."""

    def __init__(self, tile: int | None, short: int):
        self.forward_tile, self.short = tile, short
        self.packs = []

    def packed_rows(self, num_heads, head_dim):
        return self.short

    def forward_packed(self, q_TNH, k_SKH, v_SKH, lengths, key_lengths, *, causal, scale):
        self.packs.append((lengths, key_lengths, causal))
        return super().forward_packed(q_TNH, k_SKH, v_SKH, lengths, key_lengths, causal=causal, scale=scale)


def _reference(tile: int | None) -> ReferenceBackend:
    return _Packing(tile, 0)


@pytest.mark.parametrize(("ring_size", "tile"), [(1, None), (1, 16), (2, None), (4, 8)])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_ring_on_one_device_equals_dense_attention(ring_size, tile, transport):
    layout = pad_samples(PACK, ulysses_size=1, ring_size=ring_size)
    tensors = random_qkv(layout.total_rows, (4, 2), torch.float64, "cpu")
    values = ring_on_one_device(tensors, layout, _reference(tile), transport)
    exact = dense_gradients(*tensors, layout.sample_lengths, SCALE)
    for name, value, right in zip(NAMES, values, exact, strict=False):
        assert relative_error(value, right) < 1e-12, name
    assert max(sampled_errors(tensors, values, layout, count=24).values()) < 1e-12


def test_the_comparison_of_ranks_with_one_runs_and_sees_a_block_that_was_never_sent(capfd):
    warm_parent()
    tool = load_script(ROOT / "tests" / "gpu" / "attention_ranks_gpu.py")
    assert run_ranks(lambda rank: tool.main(["--repeats", "2"]), 2) == [0, 0]
    text = capfd.readouterr().out
    assert text.count("ok  ") == 11 and "ulysses2 parts4" in text and "ulysses1 ring2 p2p hosts" in text

    def broken(rank):
        start = tool.attention_2d.__globals__["start_exchange_blocks"]
        with mock.patch.dict(tool.attention_2d.__globals__, start_exchange_blocks=lambda x, *rest: start(torch.zeros_like(x), *rest)):
            return tool.main(["--repeats", "1"])

    assert run_ranks(broken, 2) == [5, 5]


@pytest.mark.parametrize(("ring_size", "short", "causal"), [(1, 50, {(41, 1)}), (1, 90, {PACK}), (4, 21, {(12, 2)}), (4, 8, set())])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_short_samples_in_one_call_equal_dense_attention(ring_size, short, causal, transport):
    layout = pad_samples(PACK, ulysses_size=1, ring_size=ring_size)
    tensors = random_qkv(layout.total_rows, (4, 2), torch.float64, "cpu")
    backend = _Packing(16, short)
    values = ring_on_one_device(tensors, layout, backend, transport)
    assert {lengths for lengths, _, is_causal in backend.packs if is_causal} == causal
    # Of a share's 12 and 2 rows, the chunks of 6 and 1: all rows with the chunks before, the later half with those between.
    before = {(6, 1)} if transport == "p2p" else {(6, 1), (12, 2), (18, 3)}
    between = {(12, 2)} if transport == "p2p" else {(12, 2), (24, 4), (36, 6)}
    rectangles = {((12, 2), keys, False) for keys in before} | {((6, 1), keys, False) for keys in between}
    assert {pack for pack in backend.packs if not pack[2]} == (rectangles if ring_size > 1 and causal else set())
    for name, value, right in zip(NAMES, values, dense_gradients(*tensors, layout.sample_lengths, SCALE), strict=False):
        assert relative_error(value, right) < 1e-12, name


@pytest.mark.parametrize(("index", "name"), list(enumerate((*NAMES, "lse"))))
def test_the_sampled_oracle_sees_one_wrong_row(index, name):
    layout = pad_samples(PACK, ulysses_size=1, ring_size=1)
    tensors = random_qkv(layout.total_rows, (4, 2), torch.float64, "cpu")
    values = ring_on_one_device(tensors, layout, _reference(None), "all_gather")
    values[index] = values[index].clone()
    values[index][layout.total_rows - 1] *= 1.01  # the last row is always looked at
    errors = sampled_errors(tensors, values, layout, count=24)
    assert errors[name] > 5e-3, errors
