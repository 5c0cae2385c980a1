"""Every group holds the ranks the mesh says, and the time limit reaches all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_longvila.mesh import Mesh, rank_groups
from ranks import run_ranks

AXES = {
    "tp": ("tp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "cp": ("ring", "ulysses"),
    "dp_cp": ("dp", "ring", "ulysses"),
    "ulysses": ("ulysses",),
    "ring": ("ring",),
    "replica": ("pp", "ring", "ulysses", "tp"),
}
MESHES = [Mesh(8, 2, 1, 2, 2), Mesh(8, 1, 2, 2, 2), Mesh(8, 2, 2, 1, 1), Mesh(8, 1, 1, 2, 1)]


def _groups(rank: int, mesh: Mesh) -> tuple[dict[str, list[int]], set[float]]:
    """(ranks of each of this rank's groups, time limits of everything that was made)."""
    from megatron_longvila.parallel.groups import initialize_groups

    before = set(dist.distributed_c10d._world.pg_map)
    groups = initialize_groups(mesh, timeout_s=90.5)
    made = set(dist.distributed_c10d._world.pg_map) - before
    assert {getattr(groups, name) for name in AXES} <= made | before
    limits = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in made}
    return {name: dist.get_process_group_ranks(getattr(groups, name)) for name in AXES}, limits


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ranks_and_time_limit_of_every_group(mesh):
    for rank, (members, limits) in enumerate(run_ranks(_groups, mesh.world_size, mesh)):
        assert limits == {90.5}
        for name, axes in AXES.items():
            expected = next(ranks for ranks in rank_groups(mesh.axes, *axes) if rank in ranks)
            assert members[name] == expected, name  # in order: the rank inside a group is a place on its axes


def test_another_world_is_refused():
    with pytest.raises(Exception, match="ValueError: the mesh has 2 ranks but torch.distributed has 1"):
        run_ranks(_groups, 1, Mesh(2, 1, 1, 2, 1))
