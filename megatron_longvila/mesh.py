"""Which meshes are legal, what `auto` means, and which ranks form a group: plain numbers, no torch.

Rank layout: tp (fastest), ulysses, ring, dp, pp (slowest); cp = ulysses (inner) x ring (outer), as in Megatron's `tp-cp-ep-dp-pp`.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass

from megatron_longvila.config import ParallelConfig
from megatron_longvila.mesh_cost import Heads, Machine, Row, explain, rank_meshes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mesh:
    """Sizes of a mesh that fits: `world_size` is a multiple of tp_size * pp_size * ulysses_size * ring_size, the rest is dp."""

    world_size: int
    tp_size: int
    pp_size: int
    ulysses_size: int
    ring_size: int

    def __post_init__(self) -> None:
        if min(self.world_size, self.tp_size, self.pp_size, self.ulysses_size, self.ring_size) < 1:
            raise ValueError(f"{self}: every size must be at least 1")
        if self.world_size % self._replica_size:
            raise ValueError(
                f"world_size={self.world_size} must be divisible by tp_size * pp_size * ulysses_size * ring_size = {self.tp_size} * "
                f"{self.pp_size} * {self.ulysses_size} * {self.ring_size} = {self._replica_size}; start a multiple of "
                f"{self._replica_size} ranks or lower one of the sizes"
            )

    @property
    def _replica_size(self) -> int:
        return self.tp_size * self.pp_size * self.cp_size

    @property
    def cp_size(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses_size * self.ring_size

    @property
    def dp_size(self) -> int:
        """Replicas that read different rows."""
        return self.world_size // self._replica_size

    @property
    def axes(self) -> dict[str, int]:
        """Mesh axes, outermost first, as `rank_groups` takes them."""
        return {"pp": self.pp_size, "dp": self.dp_size, "ring": self.ring_size, "ulysses": self.ulysses_size, "tp": self.tp_size}


def rank_groups(sizes: dict[str, int], *axes: str) -> list[list[int]]:
    """Ranks of every group along `axes`; `sizes` lists the mesh axes, outermost first.

    rank_groups({"dp": 1, "ring": 2, "ulysses": 2, "tp": 1}, "ring") == [[0, 2], [1, 3]]; the first axis of `axes` varies slowest.
    """
    strides = {name: math.prod(list(sizes.values())[i + 1 :]) for i, name in enumerate(sizes)}

    def offsets(names: list[str]) -> list[int]:
        steps = ([index * strides[name] for index in range(sizes[name])] for name in names)
        return [sum(offset) for offset in itertools.product(*steps)]

    inner = offsets(list(axes))
    return [[outer + offset for offset in inner] for outer in offsets([name for name in sizes if name not in axes])]


def auto_ulysses(cp_size: int, *, tp_size: int, heads: Heads, row: Row, machine: Machine) -> int:
    """The ulysses_size that `mesh_cost` puts first; the reason is logged where there was a choice.

    Whole groups of query heads travel, so KV is never repeated: Qwen2-7B (4 KV heads) on cp 8 is ulysses 4 x ring 2.
    """
    costs = rank_meshes(heads, row, cp_size, tp_size, machine)
    if len(costs) > 1:
        logger.info("mesh: %s", explain(costs, row, machine))
    return costs[0].ulysses_size


def resolve_mesh(
    parallel: ParallelConfig, *, world_size: int, num_kv_heads: int, num_heads: int, gpus_per_host: int, head_dim: int, row: Row
) -> Mesh:
    """The mesh `parallel` asks for, with `auto` filled in; `row` is what a layer's attention is expected to compute at once.

    Where ulysses_size and ring_size are both `auto`, they are chosen by cost (mesh_cost.py). An `auto` cp_size is the product of the axes
    that are given (1 for those that are not): data parallel unless asked otherwise.
    Raises ValueError with the numbers and the nearest legal meshes if the sizes do not fit each other, the heads or the world.
    """
    tp_size, pp_size = parallel.tp_size, parallel.pp_size
    ulysses_size, ring_size, cp_size = (None if x == "auto" else x for x in (parallel.ulysses_size, parallel.ring_size, parallel.cp_size))
    given = {"tp_size": tp_size, "pp_size": pp_size, "cp_size": cp_size, "ulysses_size": ulysses_size, "ring_size": ring_size}
    for name, size in given.items():
        if size is not None and size < 1:
            raise ValueError(f"parallel.{name}={size} must be at least 1")
    if cp_size is None:
        cp_size = (ulysses_size or 1) * (ring_size or 1)
    if ulysses_size is None:
        ulysses_size = max(1, cp_size // ring_size) if ring_size else None
    if ulysses_size is None:
        local = Heads(max(1, num_heads // tp_size), max(1, num_kv_heads // tp_size), head_dim)
        machine = Machine(min(gpus_per_host, world_size), parallel.host_gb_per_s, parallel.network_gb_per_s)
        ulysses_size = auto_ulysses(cp_size, tp_size=tp_size, heads=local, row=row, machine=machine)
    if ring_size is None:
        ring_size = max(1, cp_size // ulysses_size)

    problem = _problem(world_size, tp_size, pp_size, ulysses_size, ring_size, num_kv_heads=num_kv_heads, num_heads=num_heads)
    if ulysses_size * ring_size != cp_size:
        problem = (
            f"parallel.cp_size={cp_size} must equal ulysses_size * ring_size, which is {ulysses_size} * {ring_size} = "
            f"{ulysses_size * ring_size} here; set two of the three and leave the other `auto`"
        )
    if problem:
        asked = (tp_size, pp_size, ulysses_size, ring_size)
        raise ValueError(f"{problem}; {_nearest(asked, given['cp_size'], world_size, num_kv_heads=num_kv_heads, num_heads=num_heads)}")
    return Mesh(world_size, tp_size, pp_size, ulysses_size, ring_size)


def pipeline_layers(num_layers: int, pp_size: int, layers: list[int] | tuple[int, ...] = ()) -> list[int]:
    """Decoder layers of each pipeline stage: `layers` if given, else as even as possible with the smaller stages first.

    The first stage also runs the vision tower. Raises ValueError if the stages do not add up or one has no layer.
    """
    if pp_size > num_layers:
        raise ValueError(f"parallel.pp_size={pp_size} must not exceed model.llm.num_layers={num_layers}; lower pp_size")
    if not layers:
        base, extra = divmod(num_layers, pp_size)
        return [base + (stage >= pp_size - extra) for stage in range(pp_size)]
    if len(layers) != pp_size or sum(layers) != num_layers or min(layers) < 1:
        raise ValueError(
            f"parallel.pipeline_layers={list(layers)} must be pp_size={pp_size} positive numbers that add up to "
            f"model.llm.num_layers={num_layers} (they are {len(layers)} and add up to {sum(layers)}); leave it empty for "
            f"{pipeline_layers(num_layers, pp_size)}"
        )
    return list(layers)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _problem(
    world_size: int, tp_size: int, pp_size: int, ulysses_size: int, ring_size: int, *, num_kv_heads: int, num_heads: int
) -> str | None:
    """Why the mesh is impossible, or None."""
    if num_heads % tp_size:
        return f"model.llm.num_attention_heads={num_heads} must be divisible by parallel.tp_size={tp_size}"
    if num_kv_heads % tp_size and tp_size % num_kv_heads:
        return f"model.llm.num_query_groups={num_kv_heads} must divide or be divisible by parallel.tp_size={tp_size}"
    local_kv_heads = max(1, num_kv_heads // tp_size)
    if local_kv_heads % ulysses_size:
        return (
            f"parallel.ulysses_size={ulysses_size} must divide the KV heads of a tp rank, which are max(1, num_query_groups / tp_size) = "
            f"{num_kv_heads} / {tp_size} -> {local_kv_heads}; lower ulysses_size and raise ring_size"
        )
    replica = tp_size * pp_size * ulysses_size * ring_size
    if world_size % replica:
        return (
            f"world_size={world_size} must be divisible by tp_size * pp_size * ulysses_size * ring_size = "
            f"{tp_size} * {pp_size} * {ulysses_size} * {ring_size} = {replica}"
        )
    return None


def _nearest(asked: tuple[int, ...], cp_size: int | None, world_size: int, *, num_kv_heads: int, num_heads: int) -> str:
    """The three legal meshes whose sizes are the fewest doublings away from `asked`, those that keep a given cp_size first."""
    legal = []
    sizes = _divisors(world_size)
    for candidate in itertools.product(sizes, repeat=4):
        if math.prod(candidate) <= world_size and not _problem(world_size, *candidate, num_kv_heads=num_kv_heads, num_heads=num_heads):
            distance = sum(abs(math.log2(size / wanted)) for size, wanted in zip(candidate, asked, strict=True))
            keeps_cp = cp_size is None or candidate[2] * candidate[3] == cp_size
            legal.append((not keeps_cp, round(distance, 6), tuple(-size for size in candidate), candidate))
    names = ("tp_size", "pp_size", "ulysses_size", "ring_size")
    nearest = [" ".join(f"{name}={size}" for name, size in zip(names, mesh, strict=True)) for *_, mesh in sorted(legal)[:3]]
    return f"nearest meshes for {world_size} ranks: {'; '.join(nearest)}"
