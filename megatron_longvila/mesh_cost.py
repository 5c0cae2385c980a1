"""What 2D attention costs on each ulysses x ring mesh, from heads, length, GPUs per host and link speeds: plain numbers, no torch.

The model counts one layer's forward and backward on one rank:
  - the kernel's own time, the same on every mesh, since no head is padded and no key repeated;
  - the all-to-alls of the ulysses axis (queries, keys and values; output; and both again for gradients), whole: sending
    the heads in two parts saves memory, and on two GPUs no time; and the copies around them;
  - keys and values, and their gradients, on the ring axis, which the rank's own rows hide while they take longer;
  - what a ring adds to one call: a fixed time, more kernel calls, and passes over what is summed in fp32.

The constants are fitted to the `mmsp` rows of tools/benchmark_results/attention_2xh200.json (2 H200, 16K to 128K tokens): what a row takes
beyond the fastest one with no communication. tests/test_mesh_cost.py holds the model to those rows, within `Cost.error_s`. Attention
alone was not measured below 16K tokens, with a ring of more than two ranks, or between real hosts.

Shapes: U ulysses ranks, R ring ranks, S tokens, N query and K key/value heads of a tensor-parallel rank, H head dim. Times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2  # of a bf16 value
# One more kernel call: launch, and a last wave that leaves processors idle. With no communication, 128K tokens in 9 documents take 3.3 and
# 4.1 ms (28/4 and 32/8 heads) longer than their scores at full speed, over 18 calls.
SECONDS_PER_CALL = 2e-4
# How often a value that ulysses sends is read or written beside its transfer: bias and rotary, which the rows of a ring leave out and
# a model pays on every mesh, packing and unpacking. The rows of ulysses 2 at 32K and 128K give 6.5 to 12, the packs of 16K 2 and 11.
PACKING_PASSES = 8
# A ring, however short its row: what the rows of ring 2 at 32K take (2.3 and 3.1 ms) less the copies and calls below.
SECONDS_PER_RING = 1.2e-3
# About what attention/ring.py reads and writes, forward and backward, around fp32 sums: of output and dQ, for each of the rank's query
# elements; of dK and dV, for each of its key and value elements.
RING_QUERY_BYTES, RING_KEY_BYTES = 54, 40
# What the model may be wrong by. The kernel: a whole call and the same heads in two parts differ by 1.8% at 128K, repeats at 32K by 2%.
# The rest: the larger of a share and of a time, which is most of what a short row costs.
KERNEL_ERROR, REST_ERROR, REST_ERROR_S = 0.02, 0.3, 5e-4


@dataclass(frozen=True)
class Machine:
    """Assumed speeds; the defaults are about those of an H200: attention of 539 to 549 TFLOP/s in the rows without communication; links
    of a host as NCCL's all-to-all on 4 GPUs has them (64 MiB a rank in 0.25 ms, 1 GiB in 2.5); a network of 400 Gbit/s and five sixths of
    the memory's nominal speed, neither of them measured.

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
    attention_tflops: float = 545.0
    memory_tb_per_s: float = 4.0

    def holds(self, size: int) -> bool:
        """Whether every group of `size` neighbours, which begins at a multiple of it, stays on one host."""
        return self.gpus_per_host % size == 0


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
        return self.kernel_s + self.rest_s

    @property
    def error_s(self) -> float:
        """How far a measured row may be from `total_s`; `rest_error_s` of it beside the kernel."""
        return KERNEL_ERROR * self.kernel_s + self.rest_error_s

    @property
    def rest_s(self) -> float:
        """All but the kernel: what the mesh costs."""
        return self.all_to_all_s + self.ring_s

    @property
    def rest_error_s(self) -> float:
        return max(REST_ERROR * self.rest_s, REST_ERROR_S)

    def __str__(self) -> str:
        parts = f"kernel {self.kernel_s * 1e3:.2f}, all-to-all {self.all_to_all_s * 1e3:.2f}, ring {self.ring_s * 1e3:.2f}"
        return f"ulysses {self.ulysses_size} x ring {self.ring_size}: {self.total_s * 1e3:.2f} ms per layer ({parts})"


@dataclass(frozen=True)
class Row:
    """What one call computes: `length` tokens in `num_samples` samples of equal length.

    Each is counted as long enough for a call of its own; neighbours of some thousand rows share one, and make a ring cheaper than this.
    """

    length: int
    num_samples: int = 1


def attention_cost(heads: Heads, row: Row, ulysses_size: int, ring_size: int, tp_size: int, machine: Machine) -> Cost:
    """Cost of one row over ulysses_size x ring_size ranks."""
    cp_size, length = ulysses_size * ring_size, row.length
    kernel = 3.5 * 2 * length**2 / row.num_samples * heads.num_heads * heads.head_dim / cp_size / (machine.attention_tflops * 1e12)
    head_bytes = heads.head_dim * BYTES  # of one token
    all_to_all = ring = 0.0
    memory = machine.memory_tb_per_s * 1e12
    if ulysses_size > 1:
        speed = machine.host_gb_per_s if machine.holds(ulysses_size * tp_size) else machine.network_gb_per_s
        own = length / cp_size * head_bytes  # of one head
        for num_heads in (heads.num_heads + 2 * heads.num_kv_heads, heads.num_heads):
            leaving = num_heads * own * (ulysses_size - 1) / ulysses_size
            all_to_all += 2 * (machine.latency_s + leaving / (speed * 1e9) + PACKING_PASSES * num_heads * own / memory)
    if ring_size > 1:
        one_host = machine.holds(cp_size * tp_size)
        speed = machine.host_gb_per_s if one_host else machine.network_gb_per_s
        queries, keys = (length / ring_size * n / ulysses_size * heads.head_dim for n in (heads.num_heads, 2 * heads.num_kv_heads))
        transfer = (1 if one_host else ring_size - 1) * machine.latency_s + keys * BYTES * (ring_size - 1) / (speed * 1e9)
        # Inside a host all keys come at once and only the own rows hide them; across hosts they come one rank at a time.
        hidden_share = 1 / ring_size if one_host else (ring_size - 1) / ring_size
        for work in (kernel / 3.5, kernel * 2.5 / 3.5):
            ring += max(transfer - work * hidden_share, 0)
        blocks = min(ring_size, 3) if one_host else ring_size
        ring += SECONDS_PER_RING + 2 * (blocks - 1) * row.num_samples * SECONDS_PER_CALL
        ring += (queries * RING_QUERY_BYTES + keys * RING_KEY_BYTES) / memory
    return Cost(ulysses_size, ring_size, kernel, all_to_all, ring)


def rank_meshes(heads: Heads, row: Row, cp_size: int, tp_size: int, machine: Machine) -> list[Cost]:
    """Every legal mesh, the one to take first: ulysses divides cp and the key/value heads and stays, times tp, within one host.

    The largest ulysses that is legal comes first unless the cheapest mesh stays cheaper when the model is wrong about both, each by its
    `error_s` and in the largest's favour; the others follow by cost.
    """
    sizes = [
        size
        for size in range(1, cp_size + 1)
        if cp_size % size == 0 and heads.num_kv_heads % size == 0 and (size == 1 or machine.holds(size * tp_size))
    ]
    costs = [attention_cost(heads, row, size, cp_size // size, tp_size, machine) for size in sizes]
    largest, cheapest = costs[-1], min(costs, key=lambda cost: cost.total_s)
    first = cheapest if cheapest.total_s + cheapest.error_s < largest.total_s - largest.error_s else largest
    return [first, *sorted((cost for cost in costs if cost is not first), key=lambda cost: cost.total_s)]


def explain(costs: list[Cost], row: Row, machine: Machine) -> str:
    """One line that says what was chosen and what the other meshes would have cost."""
    links = f"{machine.gpus_per_host} GPUs per host, {machine.host_gb_per_s:g} and {machine.network_gb_per_s:g} GB/s inside and across"
    others = "; ".join(map(str, costs[1:])) or "no other mesh fits the heads"
    first, cheapest = costs[0], min(costs, key=lambda cost: cost.total_s)
    why = ""
    if cheapest is not first:
        gain, error = (1e3 * x for x in (first.total_s - cheapest.total_s, first.error_s + cheapest.error_s))
        why = f"; the largest ulysses stays: another is {gain:.2f} ms cheaper, by what may be wrong by {error:.2f}"
    return f"chose {first} for {row.num_samples} samples in {row.length} tokens, {links}{why}. Otherwise: {others}"
