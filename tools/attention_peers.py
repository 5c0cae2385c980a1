"""What tools/benchmark_attention.py compares: our attention on every mesh, and its peers, each behind the same call.

A scheme is built once per case and gives `step(inputs, backward)`, which runs one forward, and one backward if asked, and returns the
output and the gradients of q, k and v. A peer that this machine or this case cannot run raises NotAvailable with the reason.

Shapes: T rows of this rank, N query and K key/value heads, H head dim, P ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch
import torch.distributed as dist
from collective_pairs import gather_rows, heads_to_sequence, sequence_to_heads
from torch import Tensor

from megatron_longvila import platform
from megatron_longvila.attention import blocks, ring
from megatron_longvila.attention.attention_2d import attention_2d, packed_attention_2d
from megatron_longvila.attention.backends import Backend, get_backend
from megatron_longvila.attention.ulysses import num_parts
from megatron_longvila.kernels.choice import get_kernels
from megatron_longvila.mesh import Mesh, rank_groups
from megatron_longvila.parallel.plan import SequenceLayout


class NotAvailable(Exception):
    """A scheme cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One problem: a pack of samples (padded lengths) over all ranks of the job, which are on so many hosts."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    dtype: torch.dtype
    hosts: int = 1

    @property
    def total_rows(self) -> int:
        return sum(self.lengths)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    def flops(self, backward: bool, num_ranks: int) -> float:
        """Causal, per rank; backward is counted as 2.5 times forward."""
        pairs = sum(length * length for length in self.lengths) / 2
        return 4 * self.num_heads * self.head_dim * pairs * (3.5 if backward else 1) / num_ranks


@dataclass
class Inputs:
    """Rows of this rank: q_TNH, k_TKH, v_TKH and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor


Step = Callable[[Inputs, bool], list[Tensor]]


def make_inputs(case: Case, num_ranks: int | None = None) -> Inputs:
    """Random rows of this rank, the same for every scheme; one of `num_ranks`, by default those of the job."""
    generator = torch.Generator(platform.device()).manual_seed(dist.get_rank())
    rows = case.total_rows // (num_ranks or dist.get_world_size())
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    return Inputs(*(torch.randn(rows, n, case.head_dim, generator=generator, dtype=case.dtype, device=platform.device()) for n in heads))


def _autograd_step(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """A step from a differentiable function of q, k and v."""

    def step(inputs: Inputs, backward: bool) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        out = function(q, k, v)
        if backward:
            out.backward(inputs.grad_out.view_as(out))
        return [out, *(x.grad for x in (q, k, v) if backward)]

    return step


@cache
def _groups(ulysses_size: int, ring_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's (ulysses, ring) groups; every rank asks for the same meshes in the same order."""
    mesh, mine = Mesh(dist.get_world_size(), 1, 1, ulysses_size, ring_size), []
    for axis in ("ulysses", "ring"):
        groups = [(ranks, dist.new_group(ranks)) for ranks in rank_groups(mesh.axes, axis)]
        mine.append(next(group for ranks, group in groups if dist.get_rank() in ranks))
    return tuple(mine)


def _backend(name: str, tile: int | None) -> Backend:
    backend = get_backend(name)
    if tile is not None:
        backend.forward_tile = tile or None
    return backend


def _call(
    case: Case, rank: int, group: dist.ProcessGroup | None, layout: SequenceLayout, transport: str, backend: Backend
) -> ring.RingCall:
    kernels = get_kernels("auto", platform.device())
    return ring.RingCall(layout, rank, group, transport, backend, case.scale, kernels, crosses_hosts=case.hosts > 1)


def ours(
    case: Case, ulysses_size: int, ring_size: int, transport: str, tile: int | None, parts: int | None = None, backend: str = "auto"
) -> Step:
    """This repository's attention. `tile`: None takes the backend's own, 0 turns tiles off; `parts` of ulysses: None as it decides itself.

    With ulysses it starts where it does in the model, at the output of the projection: one kernel adds a bias, rotates and packs. Both
    change nothing here, but their work is done, and timed; a ring alone starts at queries, keys and values, like the peers.
    """
    ulysses, ring_group = _groups(ulysses_size, ring_size)
    layout = SequenceLayout(ring_size, ulysses_size, case.lengths)
    call = _call(case, dist.get_rank(ring_group), ring_group, layout, transport, _backend(backend, tile))
    if ulysses_size == 1:
        return _autograd_step(lambda q, k, v: attention_2d(q, k, v, call, None))
    parts = parts or num_parts(layout, case.num_heads, case.num_kv_heads)
    per_key, head_dim, device = case.num_heads // case.num_kv_heads, case.head_dim, platform.device()
    width = case.num_kv_heads * (per_key + 2) * head_dim
    table = torch.cat((torch.ones(layout.local_rows, head_dim // 2), torch.zeros(layout.local_rows, head_dim // 2)), dim=1).to(device)
    projected = []  # what the projection would give, made once from the inputs

    def step(inputs: Inputs, backward: bool) -> list[Tensor]:
        if not projected:
            groups = (inputs.q.unflatten(1, (-1, per_key)), inputs.k[:, :, None], inputs.v[:, :, None])
            projected.append(torch.cat(groups, dim=2).flatten(1))
        qkv, bias = projected[0].detach().requires_grad_(), projected[0].new_zeros(width).requires_grad_()
        sizes = case.num_kv_heads, ulysses_size, parts
        out = packed_attention_2d(call.kernels.pack_qkv(qkv, bias, table, *sizes), per_key, call, ulysses)
        if not backward:
            return [out]
        out.backward(inputs.grad_out)
        grads = qkv.grad.unflatten(1, (case.num_kv_heads, per_key + 2, head_dim))
        return [out, grads[:, :, :per_key], grads[:, :, per_key], grads[:, :, per_key + 1]]

    return step


class _Here:
    """A transfer that needs no time."""

    def __init__(self, rows: Tensor | None):
        self.rows = rows

    def wait(self) -> Tensor | None:
        return self.rows


def without_transfers(
    case: Case, ring_size: int, transport: str, tile: int | None, parts: int = 1, backend: str = "auto", *, rank: int, num_ranks: int
) -> Step:
    """Our block schedule on one rank's share of heads and rows, with nothing sent: what a rank would need if links were infinitely fast.

    Args:
        parts: the heads in so many parts, one after the other, as ulysses computes them.
        rank: whose share, of `num_ranks`; nothing is asked of the other ranks, so they need not exist.
    """
    ulysses_size = num_ranks // ring_size
    if case.num_heads % ulysses_size:
        raise NotAvailable(f"{case.num_heads} heads are not divisible by {ulysses_size}")
    layout = SequenceLayout(ring_size, 1, case.lengths)
    ring_rank = rank // ulysses_size
    call = _call(case, ring_rank, None, layout, transport, _backend(backend, tile))
    heads = (case.num_heads // ulysses_size // parts, max(1, case.num_kv_heads // ulysses_size // parts))
    generator = torch.Generator(platform.device()).manual_seed(rank)

    def random(num_rows: int, num_heads: int) -> Tensor:
        return torch.randn(num_rows, num_heads, case.head_dim, generator=generator, dtype=case.dtype, device=platform.device())

    tensors = [[random(layout.share_rows, n) for n in (heads[0], heads[1], heads[1], heads[0])] for _ in range(parts)]
    arrived = []
    for visit in ring.visits_of(call, heads[1]):
        sender = (ring_rank - visit.step) % ring_size
        num_rows = layout.total_rows if transport == "all_gather" else blocks.num_sent(layout, sender, ring_rank)
        arrived.append(random(num_rows, 2 * (visit.kv_heads.stop - visit.kv_heads.start)))

    def step(inputs: Inputs, backward: bool) -> list[Tensor]:
        with (
            mock.patch.object(ring, "_send_kv", lambda k, v, visits, call: iter(arrived)),
            mock.patch.object(ring, "_send_dkv", lambda dkv, visit, call: _Here(dkv)),
            mock.patch.object(ring, "_add_dkv", lambda *_: None),
        ):
            results = [(*qkv, *ring.attend(*qkv, call)) for *qkv, _ in tensors]
            outs = [out for *_, out, _, _ in results]
            if not backward:
                return outs
            pairs = zip(tensors, results, strict=True)
            return outs + [x for (*_, grad_out), (*saved, kept) in pairs for x in ring.gradients(grad_out, tuple(saved), kept, call)]

    return step


def three_all_to_alls(case: Case) -> Step:
    """Plain Ulysses: queries, keys and values each in an all-to-all of their own, the same kernel."""
    size = dist.get_world_size()
    if case.num_kv_heads % size:
        raise NotAvailable(f"{case.num_kv_heads} key/value heads are not divisible by {size}")
    ulysses, _ = _groups(size, 1)
    call = _call(case, 0, None, SequenceLayout(1, 1, case.lengths), "all_gather", get_backend("auto"))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return heads_to_sequence(attention_2d(*(sequence_to_heads(x, ulysses) for x in (q, k, v)), call, None), ulysses)

    return _autograd_step(attention)


def replicated(case: Case) -> Step:
    """Every rank gathers all rows, computes the whole attention and keeps its own rows."""
    rank, rows = dist.get_rank(), case.total_rows // dist.get_world_size()
    call = _call(case, 0, None, SequenceLayout(1, 1, case.lengths), "all_gather", get_backend("auto"))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_2d(*(gather_rows(x, dist.group.WORLD) for x in (q, k, v)), call, None)[rank * rows : (rank + 1) * rows]

    return _autograd_step(attention)


def transformer_engine(case: Case, comm_type: str) -> Step:
    """Transformer Engine's context parallelism; packs in its thd format."""
    try:
        import transformer_engine.pytorch as te
    except ImportError as error:
        raise NotAvailable(f"no Transformer Engine: {error}") from None
    size, ranks = dist.get_world_size(), list(range(dist.get_world_size()))
    ulysses_size = math.gcd(case.num_kv_heads, max(size // 2, 1))
    group = list(_groups(ulysses_size, size // ulysses_size)) if comm_type == "a2a+p2p" else dist.group.WORLD
    packed = len(case.lengths) > 1
    module = te.DotProductAttention(
        case.num_heads, case.head_dim, num_gqa_groups=case.num_kv_heads, attention_dropout=0.0, cp_group=group, cp_global_ranks=ranks,
        attn_mask_type="padding_causal" if packed else "causal", qkv_format="thd" if packed else "bshd",
        cp_stream=torch.cuda.Stream(), cp_comm_type=comm_type,
    )  # fmt: skip
    if not packed:
        return _autograd_step(lambda q, k, v: module(q[None], k[None], v[None]))
    starts = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=platform.device())
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    bounds = dict.fromkeys(names, starts) | dict.fromkeys(("max_seqlen_q", "max_seqlen_kv"), max(case.lengths))
    return _autograd_step(lambda q, k, v: module(q, k, v, **bounds))


def _to_bhsd(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def install_flash_attn() -> None:
    """The two private functions of flash-attn that ring-flash-attn and yunchang call, on the FlashAttention-2 that torch brings.

    Nothing happens where flash-attn itself is installed.
    """
    with contextlib.suppress(ImportError):
        import flash_attn  # noqa: F401

        return
    backend = get_backend("cpu" if platform.is_cpu() else "flash")

    def forward(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, **_):
        outs, lses = zip(*(backend.forward(*x, causal=causal, scale=softmax_scale) for x in zip(q, k, v, strict=True)), strict=True)
        return torch.stack(outs), torch.stack([lse.t() for lse in lses]), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p=0.0, softmax_scale=None, causal=False, window_size_left=-1,
        window_size_right=-1, *_, **__,
    ):  # fmt: skip
        for index in range(q.shape[0]):
            row = [x[index] for x in (dout, q, k, v, out)]
            grads = backend.backward(*row, softmax_lse[index].t(), causal=causal, scale=softmax_scale)
            for target, grad in zip((dq, dk, dv), grads, strict=True):
                target[index] = grad

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward, interface._flash_attn_backward = forward, backward
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward", "flash_attn_func", "flash_attn_varlen_func"):
        setattr(interface, name, None)  # imported by the peers, called only for what is not measured here
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface, package.__version__, package.flash_attn_func = interface, "2.8.3", None
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def ring_flash_attn(case: Case, variant: str) -> Step:
    """ring-flash-attn: `ring`, `zigzag` or `stripe`."""
    if len(case.lengths) > 1:
        raise NotAvailable("packs are not measured with ring-flash-attn")
    install_flash_attn()
    # Its adapters patch a version of transformers, which is not needed here.
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules.setdefault("ring_flash_attn.adapters", adapters)
    try:
        import ring_flash_attn as peer
    except ImportError as error:
        raise NotAvailable(f"no ring-flash-attn: {error}") from None
    names = {"ring": "ring_flash_attn_func", "zigzag": "zigzag_ring_flash_attn_func", "stripe": "stripe_flash_attn_func"}
    function = getattr(peer, names[variant])
    return _autograd_step(lambda q, k, v: function(q[None], k[None], v[None], causal=True))


def yunchang_usp(case: Case, ulysses_size: int, ring_size: int, kernel: str) -> Step:
    """yunchang's USP. On cuDNN (`kernel`) it has a forward without a ring only, and wants as many key/value heads as query heads."""
    if len(case.lengths) > 1:
        raise NotAvailable("yunchang takes no packs")
    install_flash_attn()
    try:
        import yunchang
        from yunchang.kernels import AttnType
    except ImportError as error:
        raise NotAvailable(f"no yunchang: {error}") from None
    from yunchang.globals import PROCESS_GROUP

    repeats = case.num_heads // case.num_kv_heads if kernel == "cudnn" else 1
    if case.num_kv_heads * repeats % ulysses_size:
        raise NotAvailable(f"{case.num_kv_heads} key/value heads are not divisible by {ulysses_size}")
    ulysses, ring_group = _groups(ulysses_size, ring_size)
    PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = ulysses, ring_group
    if kernel == "cudnn":
        module = yunchang.UlyssesAttention(ulysses, attn_type=AttnType.TORCH_CUDNN)
    else:
        module = yunchang.LongContextAttention(ring_impl_type="zigzag", attn_type=AttnType.FA)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k, v))
        return module(q[None], k[None], v[None], causal=True)

    return _autograd_step(attention)


def torch_context_parallel(case: Case, kernel: str, rotation: str) -> Step:
    """torch's context_parallel around scaled_dot_product_attention.

    `kernel` is FLASH_ATTENTION or CUDNN_ATTENTION; `rotation`, how keys and values travel in forward: `allgather` (torch's own choice) or
    `alltoall` (from rank to rank).
    """
    if platform.is_cpu():
        raise NotAvailable("torch's context_parallel has no operation for CPUs")
    if len(case.lengths) > 1:
        raise NotAvailable("torch's context_parallel takes no packs")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = init_device_mesh("cuda", (dist.get_world_size(),))

    def step(inputs: Inputs, backward: bool) -> list[Tensor]:
        q, k, v = (_to_bhsd(x[None]).detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        set_rotate_method(rotation)  # one choice for the whole process
        with sdpa_kernel(SDPBackend[kernel]), context_parallel(mesh):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if backward:
                out.backward(_to_bhsd(inputs.grad_out[None]))
        return [out, *(x.grad for x in (q, k, v) if backward)]

    return step


def our_meshes(world_size: int, num_kv_heads: int) -> list[tuple[int, int, str]]:
    """(ulysses, ring, transport) of every mesh of all ranks."""
    meshes = []
    for ulysses_size in (size for size in range(world_size, 0, -1) if world_size % size == 0 and num_kv_heads % size == 0):
        ring_size = world_size // ulysses_size
        meshes += [(ulysses_size, ring_size, transport) for transport in (ring.TRANSPORTS if ring_size > 1 else ("all_gather",))]
    return meshes
