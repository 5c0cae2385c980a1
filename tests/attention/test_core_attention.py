"""CoreAttention on N gloo ranks against all scores at once on one: output and every gradient, in fp64 and fp32."""

import contextlib
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_attention import HEAD_DIM, core_attention, global_tensors, run_step
from host_waits import waits_of

from dense_attention import dense_gradients, relative_error
from megatron_longvila import platform
from megatron_longvila.attention import ring, ulysses
from megatron_longvila.attention.backends import get_backend
from megatron_longvila.attention.ring import TRANSPORTS
from megatron_longvila.mesh import Mesh
from megatron_longvila.parallel.plan import owned_rows, pad_samples
from ranks import run_ranks, warm_parent

MESHES = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 2)]  # ulysses x ring
PACKS = {"one sample": (50,), "three uneven samples": (21, 1, 38), "padding sample": (16, 3)}
HEADS = [(8, 4), (4, 4), (28, 4), (12, 2)]
PARTED_HEADS = [(8, 4), (28, 4), (16, 8), (24, 12)]
# Sums of at most 64 products in fp64 and fp32; a wrong block, scale or merge is off by more than 1e-2.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


def _compare_everything(rank, mesh, part_work=ulysses.PART_WORK, all_heads=HEADS):
    ulysses.PART_WORK, ulysses.MAX_PARTS = part_work, 4
    from megatron_longvila.parallel.groups import initialize_groups

    groups = initialize_groups(mesh)
    transports = [("all_gather", False)]
    if mesh.ring_size > 1:
        transports += [("p2p", False), ("p2p", True)]
    worst = {}
    for pack, lengths in PACKS.items():
        layout = pad_samples(lengths, ulysses_size=mesh.ulysses_size, ring_size=mesh.ring_size)
        rows = torch.from_numpy(owned_rows(layout)[dist.get_rank(groups.cp)])
        for heads in (heads for heads in all_heads if heads[1] % mesh.ulysses_size == 0):
            exact = dense_gradients(*global_tensors(layout, heads, torch.float64), layout.sample_lengths, 1 / math.sqrt(HEAD_DIM))
            for transport in transports:
                for dtype, tolerance in TOLERANCES.items():
                    attention = core_attention(groups, heads, dtype, *transport)
                    attention.backend.forward_tile = 4 if heads == (28, 4) else None  # long samples in pieces
                    values = run_step(attention, layout, [x[rows] for x in global_tensors(layout, heads, dtype)])
                    for name, value, right in zip(("out", "dq", "dk", "dv"), values, exact, strict=True):
                        error = relative_error(value, right[rows])
                        assert error <= tolerance, f"{name} off by {error:.1e}: {pack}, heads {heads}, {transport}, {dtype}"
                        worst[dtype] = max(worst.get(dtype, 0.0), error)
    return worst


@pytest.mark.parametrize(("ulysses_size", "ring_size"), MESHES)
def test_every_mesh_agrees_with_one_rank(ulysses_size, ring_size):
    mesh = Mesh(ulysses_size * ring_size, 1, 1, ulysses_size, ring_size)
    worst = run_ranks(_compare_everything, mesh.world_size, mesh)
    # The two dtypes really differ: fp32 must be visibly worse than fp64, or the test compares a value with itself.
    assert all(errors[torch.float32] > 1e-9 > errors[torch.float64] for errors in worst)


@pytest.mark.parametrize("ulysses_size", [2, 4])
def test_heads_in_parts_agree_with_one_rank(ulysses_size):
    layout = pad_samples(PACKS["one sample"], ulysses_size=ulysses_size, ring_size=1)
    with mock.patch.object(ulysses, "PART_WORK", 0), mock.patch.object(ulysses, "MAX_PARTS", 4):
        parts = [ulysses.num_parts(layout, *heads) for heads in PARTED_HEADS]
    assert parts == {2: [2, 2, 4, 3], 4: [1, 1, 2, 3]}[ulysses_size]
    run_ranks(_compare_everything, ulysses_size, Mesh(ulysses_size, 1, 1, ulysses_size, 1), 0, PARTED_HEADS)


def test_one_part_travels_while_another_is_computed():
    """The order in which transfers are started and kernels are launched, in forward and backward."""
    log = []

    class Logging(type(get_backend("reference"))):
        def forward(self, *tensors, **settings):
            log.append("compute")
            return super().forward(*tensors, **settings)

        def backward(self, *tensors, **settings):
            log.append("compute")
            return super().backward(*tensors, **settings)

    def body(rank):
        from megatron_longvila.attention import attention_2d
        from megatron_longvila.parallel.groups import initialize_groups

        groups = initialize_groups(Mesh(2, 1, 1, 2, 1))
        start = attention_2d.start_exchange_blocks
        layout = pad_samples((50,), ulysses_size=2, ring_size=1)
        attention = core_attention(groups, (8, 4), torch.float32)
        attention.backend = Logging()
        with (
            mock.patch.object(ulysses, "PART_WORK", 0),
            mock.patch.object(attention_2d, "start_exchange_blocks", lambda *inputs: (log.append("send"), start(*inputs))[1]),
        ):
            run_step(attention, layout, [x[rank * 25 : rank * 25 + 25] for x in global_tensors(layout, (8, 4), torch.float32)])
        return log

    step = ["send", "send", "compute", "send", "compute", "send"]
    assert run_ranks(body, 2) == [step + step] * 2


@pytest.mark.parametrize(("transport", "crosses_hosts"), [("all_gather", False), ("p2p", False), ("p2p", True)])
def test_a_ring_sends_before_it_computes_what_hides_the_transfer(transport, crosses_hosts):
    """All keys and values leave before the own rows are computed, and gradients of what one transfer brought before those of the next."""

    class Logging(type(get_backend("reference"))):
        def __init__(self, log):
            self.log = log

        def forward(self, *tensors, causal, **settings):
            self.log.append("own" if causal else "visit")
            return super().forward(*tensors, causal=causal, **settings)

        def backward(self, *tensors, causal, **settings):
            self.log.append("own" if causal else "visit")
            return super().backward(*tensors, causal=causal, **settings)

    def body(rank):
        from megatron_longvila.parallel.collectives import PendingRows
        from megatron_longvila.parallel.groups import initialize_groups

        groups, log = initialize_groups(Mesh(4, 1, 1, 1, 4)), []
        layout = pad_samples((48,), ulysses_size=1, ring_size=4)
        attention = core_attention(groups, (8, 4), torch.float32, transport, crosses_hosts)
        attention.backend = Logging(log)
        wait = PendingRows.wait

        def logged(start):
            return lambda *inputs, **settings: (log.append("send"), start(*inputs, **settings))[1]

        with contextlib.ExitStack() as patches:
            for name in ("start_gather_rows", "start_exchange_blocks", "ring_send_recv"):
                patches.enter_context(mock.patch.object(ring, name, logged(getattr(ring, name))))
            patches.enter_context(mock.patch.object(PendingRows, "wait", lambda self: (log.append("wait"), wait(self))[1]))
            rows = torch.from_numpy(owned_rows(layout)[rank])
            run_step(attention, layout, [x[rows] for x in global_tensors(layout, (8, 4), torch.float32)])
        return log

    num_transfers = {"all_gather": 1, "p2p": 12 if crosses_hosts else 3}[transport]
    for rank, log in enumerate(run_ranks(body, 4)):
        # Gathered keys are two rectangles for a rank with others on both sides; what one rank sends is one.
        visits = ["visit"] * (2 if transport == "all_gather" and rank in (1, 2) else 1)
        forward = ["send"] * num_transfers + ["own"] + ["wait", *visits] * num_transfers
        backward = [*visits, "send"] * num_transfers + ["own"] + ["wait"] * num_transfers
        assert log == forward + backward, f"rank {rank}"


def test_parts_pay_only_where_each_keeps_a_gpu_busy():
    def parts(lengths, heads, ulysses_size, ring_size=1):
        return ulysses.num_parts(pad_samples(lengths, ulysses_size=ulysses_size, ring_size=ring_size), *heads)

    long = (1 << 20,)
    assert parts(long, (32, 8), 2) == 2 and parts(long, (28, 4), 2) == 2 and parts(long, (64, 12), 4) == 1
    assert parts(long, (28, 4), 4) == 1  # one key/value head cannot be cut
    assert parts(long, (32, 8), 1) == 1 and parts(long, (32, 8), 2, ring_size=2) == 1
    assert parts((4096,), (32, 8), 2) == 1 and parts((4096,) * 64, (32, 8), 2) == 1
    assert parts((33335,), (32, 8), 2) == 2  # whose padding is a sample of one row


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_selective_recompute_gives_the_same_bits(transport):
    """Megatron's recompute of core_attn runs the module again in backward: same collectives, same order, same values."""

    def body(rank):
        from megatron.core import tensor_parallel

        from megatron_longvila.parallel.groups import initialize_groups

        groups = initialize_groups(Mesh(4, 1, 1, 2, 2))
        platform.seed(1, 0)
        layout = pad_samples((21, 1, 38), ulysses_size=2, ring_size=2)
        rows = torch.from_numpy(owned_rows(layout)[rank])
        tensors = [x[rows] for x in global_tensors(layout, (8, 4), torch.float32)]
        attention = core_attention(groups, (8, 4), torch.float32, transport)
        plain = run_step(attention, layout, tensors)
        recomputed = run_step(attention, layout, tensors, call=lambda forward, *qkv: tensor_parallel.checkpoint(forward, False, *qkv))
        return [a.equal(b) for a, b in zip(plain, recomputed, strict=True)]

    assert run_ranks(body, 4) == [[True] * 4] * 4


def test_a_layout_is_planned_once_for_all_layers():
    """Nothing is recomputed per layer: the second call finds every list of blocks in the cache."""
    from megatron_longvila.attention import blocks

    def body(rank):
        from megatron_longvila.parallel.groups import initialize_groups

        groups = initialize_groups(Mesh(2, 1, 1, 1, 2))
        layout = pad_samples((21, 1, 38), ulysses_size=1, ring_size=2)
        rows = torch.from_numpy(owned_rows(layout)[rank])
        tensors = [x[rows] for x in global_tensors(layout, (4, 4), torch.float32)]
        cached = (blocks.own_blocks, blocks.gathered_blocks, blocks.gathered_row, blocks.pack_row)
        misses = []
        for _ in range(2):
            run_step(core_attention(groups, (4, 4), torch.float32), layout, tensors)
            misses.append([function.cache_info().misses for function in cached])
        return misses[0] == misses[1] and all(misses[0])

    assert run_ranks(body, 2) == [True, True]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_layer_waits_for_the_device(transport):
    """Nothing is read back; maps are sent at the first sight of a layout, without waiting. Waits inside operations: tests/gpu."""

    def body(rank):
        from megatron_longvila.parallel.groups import initialize_groups

        groups = initialize_groups(Mesh(4, 1, 1, 2, 2))
        layout = pad_samples((21, 1, 38), ulysses_size=2, ring_size=2)
        rows = torch.from_numpy(owned_rows(layout)[rank])
        tensors = [x[rows] for x in global_tensors(layout, (8, 4), torch.float32)]
        attention = core_attention(groups, (8, 4), torch.float32, transport)
        return waits_of(lambda: run_step(attention, layout, tensors))

    counts = run_ranks(body, 4)
    for first, later in counts:
        assert first.get("host_tensors") == first.get("uploads") and "reads" not in first and later == {}, counts
    assert any(first for first, _ in counts)


@pytest.mark.parametrize(
    ("heads", "changes", "transport", "words"),
    [
        ((8, 2), {}, "all_gather", "num_query_groups=2 must be divisible by ulysses_size \\* tp_size = 4 \\* 1; lower"),
        ((8, 4), {"attention_dropout": 0.1}, "all_gather", "attention_dropout=0.1"),
        ((8, 4), {"window_size": (64, 0)}, "all_gather", "window_size"),
        ((8, 4), {}, "carrier_pigeon", "carrier_pigeon.*all_gather.*p2p"),
    ],
)
def test_what_it_cannot_compute_is_refused(heads, changes, transport, words):
    warm_parent()

    class FourUlyssesRanks:  # only the sizes are read before the refusal
        mesh = Mesh(4, 1, 1, 4, 1)
        ring = ulysses = None

    with pytest.raises(ValueError, match=words):
        core_attention(FourUlyssesRanks, heads, torch.float32, transport, **changes)
