"""From a mesh to process groups: Megatron's own, and MM-SP's ulysses and ring axes inside its context-parallel group.

Ranks are laid out tp (fastest), ulysses, ring, dp, pp (slowest): Megatron's order `tp-cp-ep-dp-pp` with cp = ulysses x ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_longvila.mesh import Mesh, rank_groups
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core import parallel_state  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


@dataclass(frozen=True, eq=False)
class Groups:
    """The process groups of this rank; handed down as arguments, never looked up.

    Attributes:
        dp_cp: ranks that hold the same parameters (gradients are summed over it).
        ulysses: inner cp axis, neighbouring cp ranks.
        ring: outer cp axis.
        replica: tp x cp x pp, the ranks that work on the same row.
        pg: Megatron's collection, for its own modules.
    """

    mesh: Mesh
    tp: ProcessGroup
    pp: ProcessGroup
    dp: ProcessGroup
    cp: ProcessGroup
    dp_cp: ProcessGroup
    ulysses: ProcessGroup
    ring: ProcessGroup
    replica: ProcessGroup
    pg: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        """This rank holds the vision tower, the projector and the embedding."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank holds the output layer."""
        return self.pp.rank() == self.pp.size() - 1


def initialize_groups(mesh: Mesh, *, timeout_s: float = 600.0) -> Groups:
    """Build every group of `mesh`; torch.distributed must be initialised with mesh.world_size ranks.

    Args:
        timeout_s: limit of any collective of any group, the gloo twins of the data-parallel groups included.

    Raises:
        ValueError: the world has another size than the mesh.
    """
    if dist.get_world_size() != mesh.world_size:
        raise ValueError(
            f"the mesh has {mesh.world_size} ranks but torch.distributed has {dist.get_world_size()}; "
            "start as many processes as the mesh needs"
        )
    # The library speaks of whole minutes but hands the number to timedelta, which takes fractions.
    # The gloo twins of the data-parallel groups carry the optimizer's checkpoint.
    parallel_state.initialize_model_parallel(
        mesh.tp_size,
        mesh.pp_size,
        context_parallel_size=mesh.cp_size,
        hierarchical_context_parallel_sizes=[mesh.ulysses_size, mesh.ring_size],
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=True,
        order="tp-cp-ep-dp-pp",
    )
    # The one group that the library makes without the limit. Nobody uses it, but all ranks meet when it connects.
    parallel_state.update_pg_timeout(timedelta(seconds=timeout_s), parallel_state.get_expert_data_parallel_group_gloo())
    ulysses, ring = parallel_state.get_hierarchical_context_parallel_groups()
    replica = None
    for ranks in rank_groups(mesh.axes, "pp", "ring", "ulysses", "tp"):
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s), group_desc="REPLICA")
        if dist.get_rank() in ranks:
            replica = group
    pg = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(mesh, pg.tp, pg.pp, pg.dp, pg.cp, pg.dp_cp, ulysses, ring, replica, pg)


def destroy_groups() -> None:
    """Forget Megatron's groups, so that another mesh can be initialised in the same process."""
    parallel_state.destroy_model_parallel()
