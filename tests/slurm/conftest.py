"""One cluster and one set of videos for all Slurm tests; without Slurm they are skipped, which CI counts as a failure."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing_programs, running_cluster

pytest.register_assert_rewrite("slurm_beside")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)} on this machine: sudo apt-get install slurm-wlm munge")
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def beside(request, cluster: Cluster, question_videos: Path, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """What the tests of these names ask for, if they are among those to run: it takes long and mostly waits, so it runs beside the others.

    Two threads, each with a pair of nodes of its own; what one of them has to do comes one after the other.
    """
    import slurm_beside as scenarios

    lanes = [
        {"test_the_chain_with_a_preemption_in_stage_3": scenarios.run_chain},
        {"test_lost_ranks_are_restarted_inside_the_allocation": scenarios.lose_ranks, "test_a_lost_node": scenarios.lose_nodes},
    ]
    asked, futures = {item.name for item in request.session.items}, {}
    pools = [ThreadPoolExecutor(1) for _ in lanes]
    for number, (pool, lane) in enumerate(zip(pools, lanes, strict=True), 1):
        for name in filter(asked.__contains__, lane):
            futures[name] = pool.submit(lane[name], cluster.pair(number), question_videos, tmp_path_factory.mktemp(name))
    yield futures
    for pool in pools:
        pool.shutdown(cancel_futures=True)
