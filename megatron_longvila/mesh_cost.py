"""What 2D attention costs on each ulysses x ring mesh, from heads, length, GPUs per host and link speeds: plain numbers, no torch.

The model counts one layer's forward and backward on one rank:
  - the kernel's own time, the same on every mesh, since no head is padded and no key repeated;
  - the all-to-alls of the ulysses axis (queries, keys and values; output; and both again for gradients), whole: sending
    the heads in two parts saves memory, and on two GPUs no time;
  - keys and values, and their gradients, on the ring axis, which the rank's own rows hide while they take longer;
  - what a ring adds to one call: more kernel calls, and passes over outputs and gradients that are summed in fp32.

Shapes: U ulysses ranks, R ring ranks, S tokens, N query and K key/value heads of a tensor-parallel rank, H head dim. Times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2  # of a bf16 value
SECONDS_PER_CALL = 40e-6  # one more kernel call: launch, and a last wave that leaves processors idle
CONTENTION = 0.3  # of a hidden transfer's time: its kernels take processors from attention
# A mesh with fewer ulysses ranks is taken only if it is cheaper by more than the model is exact.
MARGIN = 0.05


@dataclass(frozen=True)
class Machine:
    """Assumed speeds; the defaults are about those of an H200.

    Attributes:
        host_gb_per_s, network_gb_per_s: what one GPU sends to others on its host, and across hosts, in 10**9 bytes per second.
        latency_s: of one collective, however small.
        attention_tflops: of one GPU's attention kernel, causal, forward and backward together.
        memory_tb_per_s: of a GPU's own memory.
    """

    gpus_per_host: int
    host_gb_per_s: float = 320.0
    network_gb_per_s: float = 45.0
    latency_s: float = 1e-4
    attention_tflops: float = 550.0
    memory_tb_per_s: float = 4.0


@dataclass(frozen=True)
class Heads:
    """Heads of one tensor-parallel rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Cost:
    """Of one layer, forward and backward."""

    ulysses_size: int
    ring_size: int
    kernel_s: float
    all_to_all_s: float
    ring_s: float

    @property
    def total_s(self) -> float:
        return self.kernel_s + self.all_to_all_s + self.ring_s

    def __str__(self) -> str:
        parts = f"kernel {self.kernel_s * 1e3:.2f}, all-to-all {self.all_to_all_s * 1e3:.2f}, ring {self.ring_s * 1e3:.2f}"
        return f"ulysses {self.ulysses_size} x ring {self.ring_size}: {self.total_s * 1e3:.2f} ms per layer ({parts})"


@dataclass(frozen=True)
class Row:
    """What one call computes: `length` tokens in `num_samples` samples of equal length."""

    length: int
    num_samples: int = 1


def attention_cost(heads: Heads, row: Row, ulysses_size: int, ring_size: int, tp_size: int, machine: Machine) -> Cost:
    """Cost of one row over ulysses_size x ring_size ranks."""
    cp_size, length = ulysses_size * ring_size, row.length
    kernel = 3.5 * 2 * length**2 / row.num_samples * heads.num_heads * heads.head_dim / cp_size / (machine.attention_tflops * 1e12)
    head_bytes = heads.head_dim * BYTES  # of one token
    all_to_all = ring = 0.0
    if ulysses_size > 1:
        speed = machine.host_gb_per_s if ulysses_size * tp_size <= machine.gpus_per_host else machine.network_gb_per_s
        leaving = length / cp_size * head_bytes * (ulysses_size - 1) / ulysses_size
        for num_heads in (heads.num_heads + 2 * heads.num_kv_heads, heads.num_heads):
            all_to_all += 2 * (machine.latency_s + num_heads * leaving / (speed * 1e9))
    if ring_size > 1:
        one_host = cp_size * tp_size <= machine.gpus_per_host
        speed = machine.host_gb_per_s if one_host else machine.network_gb_per_s
        kv_bytes = length / ring_size * 2 * heads.num_kv_heads / ulysses_size * head_bytes * (ring_size - 1)
        transfer = (1 if one_host else ring_size - 1) * machine.latency_s + kv_bytes / (speed * 1e9)
        # Inside a host all keys come at once and only the own rows hide them; across hosts they come one rank at a time.
        hidden_share = 1 / ring_size if one_host else (ring_size - 1) / ring_size
        for work in (kernel / 3.5, kernel * 2.5 / 3.5):
            ring += max(transfer - work * hidden_share, CONTENTION * transfer)
        blocks = 3 if one_host else ring_size
        summed = length / ring_size * heads.num_heads / ulysses_size * heads.head_dim
        ring += 2 * (blocks - 1) * row.num_samples * SECONDS_PER_CALL + summed * 54 / (
            machine.memory_tb_per_s * 1e12
        )  # 54 bytes: fp32 sums of out and dq
    return Cost(ulysses_size, ring_size, kernel, all_to_all, ring)


def rank_meshes(heads: Heads, row: Row, cp_size: int, tp_size: int, machine: Machine) -> list[Cost]:
    """Every legal mesh, the one to take first: ulysses divides cp and the key/value heads and stays, times tp, within one host.

    The largest ulysses that is legal comes first unless another mesh is cheaper by more than `MARGIN`; the others follow by cost.
    """
    sizes = [
        size
        for size in range(1, cp_size + 1)
        if cp_size % size == 0 and heads.num_kv_heads % size == 0 and (size == 1 or size * tp_size <= machine.gpus_per_host)
    ]
    costs = [attention_cost(heads, row, size, cp_size // size, tp_size, machine) for size in sizes]
    largest, cheapest = costs[-1], min(costs, key=lambda cost: cost.total_s)
    first = cheapest if cheapest.total_s < (1 - MARGIN) * largest.total_s else largest
    return [first, *sorted((cost for cost in costs if cost is not first), key=lambda cost: cost.total_s)]


def explain(costs: list[Cost], row: Row, machine: Machine) -> str:
    """One line that says what was chosen and what the other meshes would have cost."""
    links = f"{machine.gpus_per_host} GPUs per host, {machine.host_gb_per_s:g} and {machine.network_gb_per_s:g} GB/s inside and across"
    others = "; ".join(map(str, costs[1:])) or "no other mesh fits the heads"
    return f"chose {costs[0]} for {row.num_samples} samples in {row.length} tokens, {links}. Otherwise: {others}"
