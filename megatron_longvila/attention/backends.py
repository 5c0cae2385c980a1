"""Attention of one block of queries on one block of keys: cuDNN, FlashAttention and its CPU kernel through private aten operations, and the
fp32 reference.

Shapes: T query rows, S key rows, N query heads, K key/value heads (K divides N; query head n uses key/value head n // (N/K)), H head dim.
Tensors may be strided views as long as the last dimension is contiguous.

The aten operations are private and may change with any torch release: an unknown schema is refused when a backend is built (schemas.py).
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from megatron_longvila import platform
from megatron_longvila.attention.schemas import check_schemas
from megatron_longvila.kernels import reference

PACKED_WORK = 1 << 34
"""rows^2 x query heads x head dim of a sample up to which FlashAttention on a whole pack beats a call of cuDNN for each sample: 2,048 rows
of 32 heads of 128. See `benchmark_attention --work packed`."""

MAX_BACKWARD_VALUES = 2**31
"""Most values of the output (rows x query heads x head dim) in one backward call of cuDNN. With more, 9.19 gives a wrong dQ (by 40 times
its size at a million rows of 32 heads of 128) and dK without a word, and a right dV, as a 32-bit count in its sums of grad_out * out would.
The measurements: tools/benchmark_results/gpu_attention_tests_h200.txt."""


class Backend(Protocol):
    """One way to compute attention. `causal` means that row t sees keys 0..t and needs T == S.

    Attributes:
        forward_tile: keys per block beyond which the forward of longer blocks is faster in pieces; None: never.
    """

    name: str
    forward_tile: int | None

    def check(self, *, head_dim: int, dtype: torch.dtype) -> None:
        """Raise a ValueError with the way out if this backend cannot compute such heads."""

    def forward(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Returns (out_TNH in the dtype of q, lse_TN fp32, natural logarithm, scale included)."""

    def backward(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, *, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dq_TNH, dk_SKH, dv_SKH) in the dtype of q.

        `out` and `lse` are those over all keys of each row, merged over every block, not of this block alone: then the gradients of
        the blocks add up to the exact ones.
        """

    def packed_rows(self, num_heads: int, head_dim: int) -> int:
        """Rows of the longest sample that is faster in one call together with its neighbours than in a call of its own; 0: none."""

    def forward_packed(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, lengths, key_lengths, *, causal: bool, scale: float):
        """`forward` of several samples, one after the other, with so many rows and keys each (tuples of int)."""

    def backward_packed(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, lengths, key_lengths, *, causal: bool, scale: float):
        """`backward` of the same."""


class _OneByOne:
    """Samples of a pack in calls of their own: the plain twin of packed calls."""

    def packed_rows(self, num_heads: int, head_dim: int) -> int:
        """Never: there is nothing to gain."""
        return 0

    def forward_packed(self, q_TNH, k_SKH, v_SKH, lengths, key_lengths, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward_packed`."""
        samples = zip(q_TNH.split(lengths), *(x.split(key_lengths) for x in (k_SKH, v_SKH)), strict=True)
        outs, lses = zip(*(self.forward(*sample, causal=causal, scale=scale) for sample in samples), strict=True)
        return torch.cat(outs), torch.cat(lses)

    def backward_packed(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, lengths, key_lengths, *, causal: bool, scale: float):
        """See `Backend.backward_packed`."""
        sizes = lengths, lengths, key_lengths, key_lengths, lengths, lengths
        samples = zip(*map(Tensor.split, (grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN), sizes), strict=True)
        grads = [self.backward(*sample, causal=causal, scale=scale) for sample in samples]
        return tuple(torch.cat(parts) for parts in zip(*grads, strict=True))


class ReferenceBackend(_OneByOne):
    """Plain matrix products in fp32 (fp64 for fp64 inputs), any device, dtype and head dim; the LSE has the dtype of the products."""

    name = "reference"
    forward_tile = None

    def check(self, *, head_dim: int, dtype: torch.dtype) -> None:
        """Everything is possible."""

    def forward(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        return reference.attention_forward(q_TNH, k_SKH, v_SKH, causal=causal, scale=scale)

    def backward(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, *, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        return reference.attention_backward(grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, causal=causal, scale=scale)


class CpuBackend(_OneByOne):
    """Torch's FlashAttention for CPUs: no matrix of scores, and a few fused calls in place of the reference's many. fp32, fp64 and bf16."""

    name = "cpu"
    forward_tile = None

    def __init__(self):
        """Raises ValueError where the job runs on a GPU, RuntimeError where an operation's schema is unknown."""
        if not platform.is_cpu():
            raise ValueError("attention backend 'cpu' is for jobs without a GPU; set model.attention_backend to 'auto'")
        operation = "_scaled_dot_product_flash_attention_for_cpu"
        check_schemas(operation, f"{operation}_backward")

    def check(self, *, head_dim: int, dtype: torch.dtype) -> None:
        """Every head dim; fp32, fp64 or bf16."""
        if dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"attention backend 'cpu' computes in float32, float64 or bfloat16, not {dtype}; set model.attention_backend to 'reference'"
            )

    def forward(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        k_SNH, v_SNH = (_repeat_kv(x, q_TNH.shape[1]) for x in (k_SKH, v_SKH))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _to_aten(q_TNH), _to_aten(k_SNH), _to_aten(v_SNH), 0.0, causal, scale=scale
        )
        return _from_aten(out), lse.squeeze(0).t()

    def backward(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, *, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        k_SNH, v_SNH = (_repeat_kv(x, q_TNH.shape[1]) for x in (k_SKH, v_SKH))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_to_aten(x) for x in (grad_out_TNH, q_TNH, k_SNH, v_SNH, out_TNH)),
            lse_TN.contiguous().t()[None],  # the kernel's own layout: rows outside, heads inside
            0.0,  # dropout
            causal,
            scale=scale,
        )
        dk_SKH, dv_SKH = (_from_aten(x).unflatten(1, (k_SKH.shape[1], -1)).sum(2) for x in (dk, dv))
        return _from_aten(dq), dk_SKH, dv_SKH


class _AtenBackend:
    """What both GPU backends share: construction checks, the layout [1, N, T, H] (a view: only the strides change), and row counts.

    Blocks are filled up to a multiple of `row_multiple` rows. Queries that are added have a zero gradient and so give none; keys are added
    to causal blocks only, where no row that counts sees them.
    """

    name: str
    forward_tile: int | None = None
    row_multiple = 1
    max_head_dim: int
    other: str  # the backend to suggest

    def __init__(self):
        """Raises ValueError without a GPU, RuntimeError where an operation's schema is unknown."""
        if platform.is_cpu():
            raise ValueError(
                f"attention backend {self.name!r} needs an NVIDIA GPU and there is none; "
                f"set model.attention_backend to 'reference' or 'auto'"
            )
        operation = f"_scaled_dot_product_{self.name}_attention"
        check_schemas(operation, f"{operation}_backward", "_flash_attention_forward", "_flash_attention_backward")

    def check(self, *, head_dim: int, dtype: torch.dtype) -> None:
        """bf16 or fp16, head dim a multiple of 8 up to `max_head_dim`."""
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"attention backend {self.name!r} computes in bfloat16 or float16, not {dtype}; train in bf16 or set "
                f"model.attention_backend to 'reference'"
            )
        if head_dim % 8 or head_dim > self.max_head_dim:
            raise ValueError(
                f"head_dim={head_dim} does not fit attention backend {self.name!r}: it must be a multiple of 8 and at most "
                f"{self.max_head_dim}; set model.attention_backend to {self.other}"
            )

    def forward(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        num_rows = q_TNH.shape[0]
        q_TNH, k_SKH, v_SKH = self._filled((q_TNH,), (k_SKH, v_SKH), causal)
        out_TNH, lse_TN = self._forward(q_TNH, k_SKH, v_SKH, causal, scale)
        return out_TNH[:num_rows], lse_TN[:num_rows]

    def backward(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, *, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        num_rows, num_keys = q_TNH.shape[0], k_SKH.shape[0]
        by_row = grad_out_TNH, q_TNH, out_TNH, lse_TN
        grad_out_TNH, q_TNH, out_TNH, lse_TN, k_SKH, v_SKH = self._filled(by_row, (k_SKH, v_SKH), causal)
        dq, dk, dv = self._backward(grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, causal, scale)
        return dq[:num_rows], dk[:num_keys], dv[:num_keys]

    def forward_packed(self, q_TNH, k_SKH, v_SKH, lengths, key_lengths, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """FlashAttention-2, whatever the backend: it takes samples of any length in one call. See `Backend.forward_packed`."""
        out_TNH, lse_NT, *_ = torch.ops.aten._flash_attention_forward(
            q_TNH, k_SKH, v_SKH, *_ends(lengths, key_lengths, q_TNH.device), 0.0, causal, False, scale=scale
        )
        assert lse_NT.shape == (q_TNH.shape[1], q_TNH.shape[0]), lse_NT.shape
        return out_TNH, lse_NT.t()

    def backward_packed(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, lengths, key_lengths, *, causal: bool, scale: float):
        """See `Backend.backward_packed`."""
        unused = torch.empty(2, dtype=torch.uint64, device=q_TNH.device)  # random state of the dropout that is never applied
        tensors = grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN.t().contiguous()
        ends = _ends(lengths, key_lengths, q_TNH.device)
        return torch.ops.aten._flash_attention_backward(*tensors, *ends, 0.0, causal, unused, unused, scale=scale)

    def packed_rows(self, num_heads: int, head_dim: int) -> int:
        """Where the time of the slower kernel outgrows what each call of the faster one costs before it computes."""
        return math.isqrt(PACKED_WORK // (num_heads * head_dim))

    def _filled(self, by_row: tuple[Tensor, ...], by_key: tuple[Tensor, ...], causal: bool) -> list[Tensor]:
        """The tensors with zeros behind their rows, and behind their keys where the block is causal."""
        missing = -by_row[0].shape[0] % self.row_multiple
        grow = (*by_row, *by_key) if causal else by_row
        filled = [torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) for x in grow] if missing else list(grow)
        return filled if causal else [*filled, *by_key]


class CudnnBackend(_AtenBackend):
    """cuDNN's fused attention. 1.7x FlashAttention-2 on Hopper (600 against 345 TFLOP/s forward at 32K tokens).

    cuDNN refuses a single key: such a block (a chunk of one token, or what is left of long keys in tiles) is computed by the reference. It
    plans for every new shape, which costs more than a small block itself: row counts are rounded up, so that few shapes ever occur. Its
    backward is wrong beyond `MAX_BACKWARD_VALUES`: larger blocks take a call for each group of heads, and if one key/value head's query
    heads are too much, ValueError is raised.
    """

    name, max_head_dim, other = "cudnn", 128, "'flash' (head dims up to 256) or 'reference'"
    row_multiple = 256
    forward_tile = 32768  # its forward, not its backward, slows down where the keys of a block outgrow the cache

    def _forward(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        if k_SKH.shape[0] == 1:
            return reference.attention_forward(q_TNH, k_SKH, v_SKH, causal=causal, scale=scale)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            _to_aten(q_TNH), _to_aten(k_SKH), _to_aten(v_SKH), None, True, 0.0, causal, False, scale=scale
        )
        return _from_aten(out), lse.reshape(q_TNH.shape[1], q_TNH.shape[0]).t()

    def _backward(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        if k_SKH.shape[0] == 1:
            return reference.attention_backward(grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, causal=causal, scale=scale)
        tensors, groups = (grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN), num_backward_calls(q_TNH, k_SKH.shape[1])
        if groups == 1:
            return self._backward_call(*tensors, causal, scale)
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TNH, k_SKH, v_SKH))
        for group in zip(*(x.chunk(groups, dim=1) for x in (*grads, *tensors)), strict=True):
            for target, grad in zip(group[:3], self._backward_call(*group[3:], causal, scale), strict=True):
                target.copy_(grad)
        return grads

    def _backward_call(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, causal: bool, scale: float):
        unused = torch.empty((), dtype=torch.int64, device=q_TNH.device)  # random state of the dropout that is never applied
        # Without gaps: views that reach over more than MAX_BACKWARD_VALUES are as wrong as tensors of that size, and torch keeps plans by
        # the strides of q, k and v alone (MHAParams in its cudnn/MHA.cpp): an output with other strides than an earlier call's is misread.
        grad_out_TNH, out_TNH = grad_out_TNH.contiguous(), out_TNH.contiguous()
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(_to_aten(x) for x in (grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH)),
            lse_TN.t().contiguous()[None, :, :, None],
            unused,
            unused,
            None,  # bias
            None,  # cumulative lengths: one dense block
            None,
            q_TNH.shape[0],
            k_SKH.shape[0],
            0.0,  # dropout
            causal,
            scale=scale,
        )
        return tuple(_from_aten(grad) for grad in grads)


def num_backward_calls(q_TNH: Tensor, num_kv_heads: int) -> int:
    """Groups of key/value heads, of one size, that cuDNN's backward takes one after the other; see `MAX_BACKWARD_VALUES`.

    Raises:
        ValueError: the query heads of one key/value head are too much already.
    """
    of_one_kv_head = q_TNH.numel() // num_kv_heads
    if of_one_kv_head > MAX_BACKWARD_VALUES:
        raise ValueError(
            f"attention backend 'cudnn' counts at most {MAX_BACKWARD_VALUES} values in backward, but one key/value head has "
            f"{of_one_kv_head} (rows x its query heads x head dim); raise parallel.ring_size or set model.attention_backend to 'flash'"
        )
    fits = MAX_BACKWARD_VALUES // of_one_kv_head
    return next(groups for groups in range(1, num_kv_heads + 1) if num_kv_heads % groups == 0 and num_kv_heads // groups <= fits)


class FlashBackend(_AtenBackend):
    """FlashAttention-2 as bundled with torch."""

    name, max_head_dim, other = "flash", 256, "'reference'"

    def _forward(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            _to_aten(q_TNH), _to_aten(k_SKH), _to_aten(v_SKH), 0.0, causal, False, scale=scale
        )
        return _from_aten(out), lse.squeeze(0).t()

    def _backward(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.empty(2, dtype=torch.uint64, device=q_TNH.device)  # random state of the dropout that is never applied
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(_to_aten(x) for x in (grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH)),
            lse_TN.t().contiguous()[None],
            None,  # cumulative lengths: one dense block
            None,
            q_TNH.shape[0],
            k_SKH.shape[0],
            0.0,  # dropout
            causal,
            unused,
            unused,
            scale=scale,
        )
        return tuple(_from_aten(grad) for grad in grads)


BACKENDS: dict[str, type] = {backend.name: backend for backend in (ReferenceBackend, CpuBackend, CudnnBackend, FlashBackend)}


def get_backend(name: str) -> Backend:
    """Build the backend of that name; `auto` is cuDNN on a GPU and torch's own kernel on a CPU.

    Raises:
        ValueError: an unknown name, a GPU backend on a machine without a GPU, or the CPU's on one with a GPU.
        RuntimeError: this torch release changed one of the private operations.
    """
    if name == "auto":
        name = "cpu" if platform.is_cpu() else "cudnn"
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; choose one of {sorted(BACKENDS)} or 'auto'")
    return BACKENDS[name]()


@lru_cache(maxsize=64)
def _ends(lengths: tuple[int, ...], key_lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where samples begin, and the last one ends, among rows and among keys, int32 [samples + 1] each; the most rows and keys of one."""
    ends = [torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32) for sizes in (lengths, key_lengths)]
    return *(platform.upload(x, device) for x in ends), max(lengths), max(key_lengths)


def _repeat_kv(x_SKH: Tensor, num_heads: int) -> Tensor:
    """[S, K, H] -> [S, N, H]: the CPU kernel's backward gives one gradient per query head."""
    group = num_heads // x_SKH.shape[1]
    return x_SKH if group == 1 else x_SKH.repeat_interleave(group, dim=1)


def _to_aten(x_TNH: Tensor) -> Tensor:
    """[T, N, H] -> [1, N, T, H], a view."""
    return x_TNH.transpose(0, 1).unsqueeze(0)


def _from_aten(x_1NTH: Tensor) -> Tensor:
    """[1, N, T, H] -> [T, N, H], a view."""
    return x_1NTH.squeeze(0).transpose(0, 1)
