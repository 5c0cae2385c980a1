"""The cost of a mesh, term by term, and what follows from it."""

import pytest

from megatron_longvila.mesh_cost import Heads, Machine, Row, attention_cost, explain, rank_meshes

LLAMA, QWEN, SMALL = Heads(32, 8, 128), Heads(28, 4, 128), Heads(12, 2, 128)
HOST = Machine(gpus_per_host=8)


def chosen(heads, length, cp_size, machine=HOST, num_samples=1):
    first = rank_meshes(heads, Row(length, num_samples), cp_size, 1, machine)[0]
    return first.ulysses_size, first.ring_size


def test_the_kernel_needs_the_same_time_on_every_mesh():
    costs = rank_meshes(LLAMA, Row(65536), 8, 1, HOST)
    assert len(costs) == 4 and len({round(cost.kernel_s, 12) for cost in costs}) == 1
    # 4 * 32 heads * 128 * 65536**2 / 2 pairs, forward and 2.5 times that backward, on 8 GPUs of 550 TFLOP/s
    assert costs[0].kernel_s == pytest.approx(4 * 32 * 128 * 65536**2 / 2 * 3.5 / 8 / 550e12)


def test_all_to_all_counts_what_leaves_a_rank():
    machine = Machine(8, host_gb_per_s=1.0, latency_s=0.5)
    cost = attention_cost(LLAMA, Row(4096), 4, 1, 1, machine)
    # 1024 rows of 48 heads in and 32 out, 3/4 of them to others; four transfers, each with its latency
    assert cost.all_to_all_s == pytest.approx(2 * (1.0 + 1024 * (48 + 32) * 128 * 2 * 3 / 4 / 1e9))
    assert cost.ring_s == 0


def test_a_ring_inside_fast_links_is_hidden_but_for_contention():
    slow, fast = (attention_cost(LLAMA, Row(65536), 1, 4, 1, Machine(8, host_gb_per_s=speed)) for speed in (0.1, 1e6))
    assert slow.ring_s > slow.kernel_s > fast.ring_s


def test_ulysses_stays_inside_the_host_and_the_ring_crosses():
    slow_network = Machine(gpus_per_host=2, network_gb_per_s=3.8)
    assert chosen(LLAMA, 32768, 4, slow_network) == (2, 2)
    assert chosen(QWEN, 131072, 16, Machine(gpus_per_host=8)) == (4, 4)
    assert chosen(LLAMA, 131072, 16, Machine(gpus_per_host=8)) == (8, 2)


@pytest.mark.parametrize(("heads", "cp_size", "mesh"), [(LLAMA, 4, (4, 1)), (QWEN, 4, (4, 1)), (QWEN, 8, (4, 2)), (SMALL, 4, (2, 2))])
def test_long_sequences_take_the_largest_ulysses(heads, cp_size, mesh):
    for length in (128 << 10, 512 << 10, 1 << 20):
        assert chosen(heads, length, cp_size) == mesh


def test_a_short_sequence_avoids_the_latency_of_all_to_alls_and_a_pack_avoids_many_small_blocks():
    assert chosen(QWEN, 4096, 4) == (1, 4)
    assert chosen(QWEN, 4096, 4, num_samples=8) == (4, 1)


def test_the_explanation_names_every_mesh():
    costs = rank_meshes(QWEN, Row(131072), 8, 1, HOST)
    line = explain(costs, Row(131072), HOST)
    assert line.startswith("chose ulysses 4 x ring 2") and all(str(cost) in line for cost in costs)
    assert "no other mesh fits" in explain(costs[:1], Row(131072), HOST)
