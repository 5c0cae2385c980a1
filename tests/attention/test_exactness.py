"""The helpers of the GPU's exactness tests, on a CPU: all ring ranks in one process against dense attention, and the sampled oracle."""

import pytest
import torch
from exactness import NAMES, SCALE, random_qkv, ring_on_one_device, sampled_errors

from dense_attention import dense_gradients, relative_error
from megatron_longvila.attention.backends import ReferenceBackend
from megatron_longvila.attention.ring import TRANSPORTS
from megatron_longvila.parallel.plan import pad_samples

PACK = (41, 1, 90)


def _reference(tile: int | None) -> ReferenceBackend:
    backend = ReferenceBackend()
    backend.forward_tile = tile
    return backend


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


@pytest.mark.parametrize(("index", "name"), list(enumerate((*NAMES, "lse"))))
def test_the_sampled_oracle_sees_one_wrong_row(index, name):
    layout = pad_samples(PACK, ulysses_size=1, ring_size=1)
    tensors = random_qkv(layout.total_rows, (4, 2), torch.float64, "cpu")
    values = ring_on_one_device(tensors, layout, _reference(None), "all_gather")
    values[index] = values[index].clone()
    values[index][layout.total_rows - 1] *= 1.01  # the last row is always looked at
    errors = sampled_errors(tensors, values, layout, count=24)
    assert errors[name] > 5e-3, errors
