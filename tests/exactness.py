"""How far a backend's blocks are from exact attention: the whole ring on one device, and fp64 oracles for all rows or for a few.

Shapes: S rows of a padded pack, N query and K key/value heads, H head dim, M sampled rows or keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from megatron_longvila.attention import blocks, ring
from megatron_longvila.attention.backends import Backend
from megatron_longvila.kernels.choice import REFERENCE, Kernels
from megatron_longvila.parallel.plan import SequenceLayout, share_order

HEAD_DIM = 128
SCALE = 1 / math.sqrt(HEAD_DIM)
NAMES = ("out", "dq", "dk", "dv")


@dataclass
class Arrived:
    """A transfer that is over: what `PendingRows` is to the ring, without ranks."""

    rows: Tensor | None

    def wait(self) -> Tensor | None:
        return self.rows


def random_qkv(num_rows: int, heads: tuple[int, int], dtype=torch.bfloat16, device="cuda") -> tuple[Tensor, ...]:
    """q, k, v as views of one buffer, as the all-to-all delivers them, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(num_rows)
    packed = torch.randn(num_rows, heads[0] + 2 * heads[1], HEAD_DIM, generator=generator, dtype=dtype, device=device)
    grad_out = torch.randn(num_rows, heads[0], HEAD_DIM, generator=generator, dtype=dtype, device=device)
    return *packed.split((heads[0], heads[1], heads[1]), dim=1), grad_out


def ring_on_one_device(
    tensors: tuple[Tensor, ...], layout: SequenceLayout, backend: Backend, transport: str, kernels: Kernels = REFERENCE
) -> list[Tensor]:
    """[out, dq, dk, dv, lse] of the padded pack: every ring rank's part in turn, with transfers replaced by hand-overs in memory.

    Everything but the transfers is the code that trains: `ring.attend` and `ring.gradients`.
    """
    q, k, v, grad_out = tensors
    size, total = layout.ring_size, torch.float64 if q.dtype == torch.float64 else torch.float32
    out, dq = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    dk, dv = (torch.zeros(x.shape, dtype=total, device=q.device) for x in (k, v))
    lse = torch.empty(q.shape[:2], dtype=total, device=q.device)
    shares = [torch.from_numpy(share_order(layout, rank)).to(q.device) for rank in range(size)]
    for rank, rows in enumerate(shares):
        call = ring.RingCall(layout, rank, None, transport, backend, SCALE, kernels)
        own = (q, k, v) if size == 1 else (q[rows], k[rows], v[rows])

        def source(visit, rank=rank):
            """Rows of the pack that a transfer brings."""
            if transport == "all_gather":
                return torch.cat(shares) if blocks.fits_as_gathered(layout) else torch.arange(layout.total_rows, device=q.device)
            sender = (rank - visit.step) % size
            return blocks.take(shares[sender], blocks.sent_rows(layout, sender, rank))

        def send_kv(_k, _v, visits, call, source=source):
            return iter([torch.cat((k[source(visit)][:, visit.kv_heads], v[source(visit)][:, visit.kv_heads]), dim=1) for visit in visits])

        def send_dkv(part, visit, call, source=source):
            for sums, grad in zip((dk, dv), part.chunk(2, dim=1), strict=True):
                sums[:, visit.kv_heads].index_add_(0, source(visit), grad.to(total))
            return Arrived(None)

        with (
            mock.patch.object(ring, "_send_kv", send_kv),
            mock.patch.object(ring, "_send_dkv", send_dkv),
            mock.patch.object(ring, "_add_dkv", lambda *_: None),
        ):
            out[rows], lse[rows], kept = ring.attend(*own, call)
            merged = (out, lse) if size == 1 else (out[rows], lse[rows])
            dq[rows], own_dk, own_dv = ring.gradients(grad_out if size == 1 else grad_out[rows], (*own, *merged), kept, call)
        dk[rows] += own_dk
        dv[rows] += own_dv
    return [out, dq, dk.to(q.dtype), dv.to(q.dtype), lse]


def sampled_rows(num_rows: int, count: int = 64) -> list[int]:
    """`count` rows of a pack: the last, its middle's neighbours, and random ones; none among the first 128, whose dQ is nearly zero."""
    generator = torch.Generator().manual_seed(num_rows)
    fixed = [num_rows - 1, num_rows // 2, num_rows // 2 - 1]
    return fixed + torch.randint(min(128, num_rows // 2), num_rows, (count - len(fixed),), generator=generator).tolist()


def _sample_of(row: int, layout: SequenceLayout) -> slice:
    """Rows of the sample that a row belongs to."""
    start = 0
    for length in layout.sample_lengths:
        if row < start + length:
            return slice(start, start + length)
        start += length
    raise AssertionError((row, layout))


def exact_rows(tensors: tuple[Tensor, ...], layout: SequenceLayout, rows: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(out_NH, dq_NH, lse_N) of each row in fp64, from its definition: softmax over the keys of its sample up to itself."""
    q, k, v, grad_out = tensors
    groups = q.shape[1] // k.shape[1]
    for row in rows:
        keys = slice(_sample_of(row, layout).start, row + 1)
        columns = []
        for head in range(q.shape[1]):
            k_SH, v_SH = (x[keys, head // groups].double() for x in (k, v))
            scores_S = k_SH @ q[row, head].double() * SCALE
            lse = torch.logsumexp(scores_S, 0)
            probs_S = torch.exp(scores_S - lse)
            out_H, grad_H = probs_S @ v_SH, grad_out[row, head].double()
            dscores_S = probs_S * (v_SH @ grad_H - grad_H @ out_H) * SCALE
            columns.append((out_H, dscores_S @ k_SH, lse))
        yield tuple(torch.stack(column) for column in zip(*columns, strict=True))


def exact_keys(
    tensors: tuple[Tensor, ...], merged: tuple[Tensor, Tensor], layout: SequenceLayout, keys: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(dk_KH, dv_KH) of each key in fp64: sums over the rows of its sample from itself on, for the given (out, lse) of those rows.

    The rows' out and lse are taken as given, because all of them in fp64 would be the whole attention; `exact_rows` checks a sample.
    """
    q, k, v, grad_out = tensors
    out, lse = merged
    groups = q.shape[1] // k.shape[1]
    for key in keys:
        rows = slice(key, _sample_of(key, layout).stop)
        dk, dv = (torch.zeros(k.shape[1:], dtype=torch.float64, device=k.device) for _ in range(2))
        for head in range(q.shape[1]):
            q_SH, grad_SH, out_SH = (x[rows, head].double() for x in (q, grad_out, out))
            probs_S = torch.exp(q_SH @ k[key, head // groups].double() * SCALE - lse[rows, head].double())
            dscores_S = probs_S * (grad_SH @ v[key, head // groups].double() - (grad_SH * out_SH).sum(1)) * SCALE
            dk[head // groups] += dscores_S @ q_SH
            dv[head // groups] += probs_S @ grad_SH
        yield dk, dv


def sampled_errors(tensors: tuple[Tensor, ...], values: list[Tensor], layout: SequenceLayout, count: int = 64) -> dict[str, float]:
    """Largest relative error of a sampled row of out and dq, of a sampled key of dk and dv; largest absolute error of a row's lse.

    Relative to each row's own norm: the first rows are far larger than the last and would hide them in a common norm.
    """
    out, dq, dk, dv, lse = values
    worst = dict.fromkeys((*NAMES, "lse"), 0.0)

    def note(name: str, error: Tensor) -> None:
        worst[name] = max(worst[name], float("inf") if error.isnan() else error.item())

    rows = sampled_rows(layout.total_rows, count)
    for row, (right_out, right_dq, right_lse) in zip(rows, exact_rows(tensors, layout, rows), strict=True):
        note("out", (out[row].double() - right_out).norm() / right_out.norm())
        if row > _sample_of(row, layout).start:  # one key alone: dq is exactly zero
            note("dq", (dq[row].double() - right_dq).norm() / right_dq.norm())
        note("lse", (lse[row].double() - right_lse).abs().max())
    for key, (right_dk, right_dv) in zip(rows, exact_keys(tensors, (out, lse), layout, rows), strict=True):
        note("dv", (dv[key].double() - right_dv).norm() / right_dv.norm())
        if _sample_of(key, layout).stop - _sample_of(key, layout).start > 1:
            note("dk", (dk[key].double() - right_dk).norm() / right_dk.norm())
    return worst
