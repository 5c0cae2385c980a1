"""Every rank computes and sends the same, no head is padded and no key or value repeated: what kernels and transfers were given."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_attention import HEAD_DIM, core_attention, global_tensors, run_step

from megatron_longvila.attention.backends import ReferenceBackend
from megatron_longvila.attention.ring import TRANSPORTS
from megatron_longvila.mesh import Mesh
from megatron_longvila.parallel import collectives
from megatron_longvila.parallel.plan import owned_rows, pad_samples
from ranks import run_ranks

LENGTHS = (50, 3, 21, 1)  # padded to chunks, and a padding sample
ITEM_SIZE = 4  # fp32


class CountingBackend(ReferenceBackend):
    """Notes what every call is given: (backward, rows, keys, query heads, key/value heads, causal)."""

    def __init__(self):
        self.calls = []

    def _note(self, backward, q, k, v, causal):
        assert k.shape == v.shape
        self.calls.append((backward, q.shape[0], k.shape[0], q.shape[1], k.shape[1], causal))

    def forward(self, q_TNH, k_SKH, v_SKH, *, causal, scale):
        self._note(False, q_TNH, k_SKH, v_SKH, causal)
        return super().forward(q_TNH, k_SKH, v_SKH, causal=causal, scale=scale)

    def backward(self, grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, *, causal, scale):
        self._note(True, q_TNH, k_SKH, v_SKH, causal)
        return super().backward(grad_out_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, causal=causal, scale=scale)


def _scores(calls, backward):
    """Scores of all query heads in the forward or the backward calls."""
    mine = [call[1:] for call in calls if call[0] == backward]
    return sum(heads * (rows * (rows + 1) // 2 if causal else rows * keys) for rows, keys, heads, _, causal in mine)


def _count(rank, mesh, heads, transport):
    """(calls of the backend, bytes given to transfers on each axis) of one forward and backward."""
    from megatron_longvila.parallel.groups import initialize_groups

    groups = initialize_groups(mesh)
    layout = pad_samples(LENGTHS, ulysses_size=mesh.ulysses_size, ring_size=mesh.ring_size)
    attention = core_attention(groups, heads, torch.float32, transport)
    attention.backend = CountingBackend()
    sent = {"ulysses": 0, "ring": 0}
    all_to_all, gather, exchange = dist.all_to_all_single, collectives._all_gather, dist.batch_isend_irecv

    def note(tensor, group):
        sent["ulysses" if group is groups.ulysses else "ring"] += tensor.nbytes

    def noted_collective(function):
        return lambda out, x, *others, group, **settings: (note(x, group), function(out, x, *others, group=group, **settings))[1]

    def noted_exchange(operations):
        for operation in operations:
            if operation.op is dist.isend:
                note(operation.tensor, operation.group)
        return exchange(operations)

    rows = torch.from_numpy(owned_rows(layout)[rank])
    with (
        mock.patch.object(dist, "all_to_all_single", noted_collective(all_to_all)),
        mock.patch.object(collectives, "_all_gather", noted_collective(gather)),
        mock.patch.object(dist, "batch_isend_irecv", noted_exchange),
    ):
        run_step(attention, layout, [x[rows] for x in global_tensors(layout, heads, torch.float32)])
    return attention.backend.calls, sent


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("heads", "ulysses_size", "ring_size"), [((12, 2), 2, 2), ((28, 4), 4, 2), ((28, 4), 2, 4)], ids=str)
def test_every_rank_computes_and_sends_the_same(heads, ulysses_size, ring_size, transport):
    mesh = Mesh(ulysses_size * ring_size, 1, 1, ulysses_size, ring_size)
    layout = pad_samples(LENGTHS, ulysses_size=ulysses_size, ring_size=ring_size)
    calls, sent = zip(*run_ranks(_count, mesh.world_size, mesh, heads, transport), strict=True)

    for backward in (False, True):
        work = [_scores(of_rank, backward) for of_rank in calls]
        assert max(work) / (sum(work) / len(work)) <= 1.01, work
        # Each score of each query head once: the triangle of every sample, padded as the layout says and no further.
        assert sum(work) == heads[0] * sum(length * (length + 1) // 2 for length in layout.sample_lengths)

    for start in range(0, mesh.world_size, ulysses_size):  # the ranks of one ulysses group: together they have every head once
        seen = [{call[3:5] for call in of_rank} for of_rank in calls[start : start + ulysses_size]]
        assert all(len(shapes) == 1 for shapes in seen), seen
        assert tuple(map(sum, zip(*(shapes.pop() for shapes in seen), strict=True))) == heads

    assert all(of_rank == sent[0] for of_rank in sent), sent
    # Queries, keys, values and the output there, their gradients back: every row with its own heads, no more.
    assert sent[0]["ulysses"] == 2 * (2 * heads[0] + 2 * heads[1]) * layout.local_rows * HEAD_DIM * ITEM_SIZE
    # A rank gathers all keys and values and returns their gradients; or others see both of its chunks or the first, as their place is.
    chunks = 2 * (1 + ring_size) if transport == "all_gather" else 3 * (ring_size - 1)
    assert sent[0]["ring"] == chunks * layout.share_rows // 2 * 2 * heads[1] // ulysses_size * HEAD_DIM * ITEM_SIZE
