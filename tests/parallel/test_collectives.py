"""Collectives, the package's and those of tools/: by eye on eight integers, and each operation against its adjoint."""

import torch
import torch.distributed as dist
from programs import ROOT, load_script

from megatron_longvila.parallel import collectives
from ranks import run_ranks

pairs = load_script(ROOT / "tools" / "collective_pairs.py")


def test_sequence_to_heads_on_eight_integers():
    # Two ranks, two rows each, two heads: row t of head n holds 2 t + n.
    def body(rank):
        x_TNH = torch.tensor([[0, 1], [2, 3]] if rank == 0 else [[4, 5], [6, 7]]).unsqueeze(-1)
        by_heads = pairs.sequence_to_heads(x_TNH, dist.group.WORLD)
        back = pairs.heads_to_sequence(by_heads, dist.group.WORLD)
        return by_heads.flatten(1).tolist(), back.equal(x_TNH)

    assert run_ranks(body, 2) == [([[0], [2], [4], [6]], True), ([[1], [3], [5], [7]], True)]


def test_exchange_rows_on_eight_integers():
    counts = [[1, 0, 2], [0, 0, 0], [3, 2, 0]]  # counts[i][j]: rows from rank i to rank j; rank 1 sends nothing

    def body(rank):
        rows = torch.tensor([[10, 20, 21], [], [70, 71, 72, 80, 81]][rank], dtype=torch.int64)
        return collectives.exchange_rows(rows, counts[rank], [row[rank] for row in counts], dist.group.WORLD).tolist()

    assert run_ranks(body, 3) == [[10, 70, 71, 72], [80, 81], [20, 21]]


def test_gather_and_reduce_scatter_on_four_integers():
    def body(rank):
        gathered = pairs.gather_rows(torch.tensor([rank, 10 + rank]), dist.group.WORLD)
        return gathered.tolist(), pairs.reduce_scatter_rows(gathered * (rank + 1), dist.group.WORLD).tolist()

    assert run_ranks(body, 2) == [([0, 10, 1, 11], [0, 30]), ([0, 10, 1, 11], [3, 33])]


def test_ring_send_recv_keeps_transfers_apart_by_tag():
    def body(rank):
        first = collectives.ring_send_recv(torch.full((2,), float(rank)), dist.group.WORLD, tag=1)
        second = collectives.ring_send_recv(torch.full((3,), 10.0 + rank, dtype=torch.float64), dist.group.WORLD, tag=2)
        return second.wait().tolist(), first.wait().tolist()

    assert run_ranks(body, 3) == [([10.0 + prev] * 3, [float(prev)] * 2) for prev in (2, 0, 1)]


def _check_adjoint(operation, x, seed):
    """<y, A x> summed over ranks equals <A' y, x>: the definition of a right gradient of a linear map, across ranks."""
    x = x.requires_grad_()
    out = operation(x)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(out.shape, dtype=out.dtype, generator=generator).requires_grad_()
    (grad,) = torch.autograd.grad(out, x, y, create_graph=True)
    sides = torch.stack([(y * out).sum(), (grad * x).sum()]).detach()
    dist.all_reduce(sides)
    assert torch.allclose(sides[0], sides[1], rtol=1e-12), sides
    # The adjoint of the adjoint is the operation itself.
    (again,) = torch.autograd.grad(grad, y, x.detach())
    assert torch.allclose(again, out.detach(), rtol=1e-12, atol=1e-12)


def test_every_collective_against_its_adjoint():
    uneven = [[2, 0, 5], [0, 0, 0], [1, 4, 3]]
    no_row = [[0] * 3] * 3

    def body(rank):
        world = dist.group.WORLD

        def random(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))

        for counts in (uneven, no_row):
            send, recv = counts[rank], [row[rank] for row in counts]
            _check_adjoint(lambda x, send=send, recv=recv: collectives.exchange_rows(x, send, recv, world), random(sum(send), 3), rank)
        for num_rows in (4, 0):
            _check_adjoint(lambda x: pairs.sequence_to_heads(x, world), random(num_rows, 6, 2), rank)
            _check_adjoint(lambda x: pairs.heads_to_sequence(x, world), random(3 * num_rows, 2, 5), rank)
            _check_adjoint(lambda x: pairs.gather_rows(x, world), random(num_rows, 2), rank)
            _check_adjoint(lambda x: pairs.reduce_scatter_rows(x, world), random(3 * num_rows, 2), rank)

    run_ranks(body, 3)


def test_a_rank_without_rows_takes_part_in_backward():
    """Rank 1 encodes nothing and receives rows; rank 0 sends all it has and receives nothing. Both must reach the backward exchange."""

    def body(rank):
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        features = torch.ones(2 if rank == 0 else 0, 3, dtype=torch.float64) * weight
        received = collectives.exchange_rows(features, [0, 2] if rank == 0 else [0, 0], [0, 0] if rank == 0 else [2, 0], dist.group.WORLD)
        hidden = torch.zeros(4, 3, dtype=torch.float64).index_copy(0, torch.arange(len(received)), received)
        (hidden.sum() * 5).backward()
        return weight.grad.tolist()

    assert run_ranks(body, 2) == [[10.0] * 3, [0.0] * 3]


def test_one_rank_moves_nothing():
    def body(rank):
        x = torch.arange(6.0).view(3, 2)
        world = dist.group.WORLD
        results = (
            collectives.exchange_rows(x, [3], [3], world),
            pairs.gather_rows(x, world),
            pairs.reduce_scatter_rows(x, world),
        )
        return all(result is x for result in results)

    assert run_ranks(body, 1) == [True]
