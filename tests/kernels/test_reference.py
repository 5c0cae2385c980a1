"""The plain twins against autograd on all scores at once."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dense_attention import dense_gradients, relative_error
from megatron_longvila.kernels.reference import attention_backward, attention_forward, merge_blocks

FP64 = 1e-13  # a few hundred fp64 roundings


def _inputs(num_rows, num_keys, heads, dtype=torch.float64):
    torch.manual_seed(num_rows + num_keys)
    q, grad_out = torch.randn(2, num_rows, heads[0], 8, dtype=dtype)
    k, v = torch.randn(2, num_keys, heads[1], 8, dtype=dtype)
    return q, k, v, grad_out


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("max_scores", [1, 300, 1 << 24])  # one row at a time, uneven chunks, all rows
def test_causal_forward_and_backward(heads, max_scores):
    q, k, v, grad_out = _inputs(19, 19, heads)
    scale = 1 / math.sqrt(8)
    exact = dense_gradients(q, k, v, grad_out, (19,), scale)
    out, lse = attention_forward(q, k, v, causal=True, scale=scale, max_scores=max_scores)
    grads = attention_backward(grad_out, q, k, v, out, lse, causal=True, scale=scale, max_scores=max_scores)
    assert all(relative_error(value, right) < FP64 for value, right in zip((out, *grads), exact, strict=True))
    assert lse[0].allclose((q[0] * k[0].repeat_interleave(heads[0] // heads[1], 0)).sum(-1) * scale)  # the first row sees one key


def test_half_precision_is_computed_in_fp32():
    q, k, v, grad_out = _inputs(64, 64, (4, 2), torch.bfloat16)
    exact = dense_gradients(q, k, v, grad_out, (64,), 0.3)
    out, lse = attention_forward(q, k, v, causal=True, scale=0.3)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    # One rounding of the result: at most 2^-9 per value. Gradients also see the rounded output through delta.
    assert relative_error(out, exact[0]) < 2**-9
    grads = attention_backward(grad_out, q, k, v, out, lse, causal=True, scale=0.3)
    assert all(relative_error(value, right) < 2**-8 for value, right in zip(grads, exact[1:], strict=True))


def test_blocks_of_keys_merge_to_the_whole_in_any_order_and_their_gradients_add_up():
    q, k, v, grad_out = _inputs(11, 30, (6, 2))
    pieces = [slice(0, 7), slice(7, 8), slice(8, 30)]
    whole_out, whole_lse = attention_forward(q, k, v, causal=False, scale=0.4)
    whole_grads = attention_backward(grad_out, q, k, v, whole_out, whole_lse, causal=False, scale=0.4)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        blocks = [attention_forward(q, k[pieces[i]], v[pieces[i]], causal=False, scale=0.4) for i in order]
        out, lse = blocks[0]
        for block in blocks[1:]:
            out, lse = merge_blocks(out, lse, *block)
        assert relative_error(out, whole_out) < FP64 and relative_error(lse, whole_lse) < FP64
    parts = [attention_backward(grad_out, q, k[p], v[p], out, lse, causal=False, scale=0.4) for p in pieces]
    merged = (sum(part[0] for part in parts), torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts]))
    assert all(relative_error(value, right) < FP64 for value, right in zip(merged, whole_grads, strict=True))


def test_merge_survives_scores_that_overflow_exp():
    out, block_out = torch.zeros(2, 1, 4), torch.ones(2, 1, 4)
    lse, block_lse = torch.tensor([[-300.0], [300.0]]), torch.tensor([[300.0], [-300.0]])
    merged, merged_lse = merge_blocks(out, lse, block_out, block_lse)
    assert merged[:, 0, 0].tolist() == [1.0, 0.0] and merged_lse.flatten().tolist() == [300.0, 300.0]


def test_merge_with_a_side_that_saw_no_key():
    out, lse = merge_blocks(torch.zeros(1, 1, 2), torch.tensor([[float("-inf")]]), torch.ones(1, 1, 2), torch.tensor([[3.0]]))
    assert out.flatten().tolist() == [1.0, 1.0] and lse.item() == 3.0


class _LargestCopy(TorchDispatchMode):
    """Values of the largest fp32 tensor that is made meanwhile."""

    values = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.values = max(self.values, result.numel())
        return result


def test_few_keys_do_not_take_fp32_copies_of_all_queries():
    """What is left of a long row's keys may be one key, which cuDNN refuses: this twin computes it on the GPU then, for all its queries."""
    q, k, v, grad_out = _inputs(5000, 1, (4, 2), torch.bfloat16)
    with _LargestCopy() as largest:
        out, lse = attention_forward(q, k, v, causal=False, scale=0.3, max_scores=8192)
        dq, dk, dv = attention_backward(grad_out, q, k, v, out, lse, causal=False, scale=0.3, max_scores=8192)
    assert lse.numel() == 20_000 and largest.values == 20_000  # what is returned in fp32 is not a copy
    assert out.equal(v.repeat_interleave(2, 1).expand_as(q)) and dv.float().isfinite().all()
