"""The five stages as Slurm jobs, from raw rows to the needle test, with a preemption in stage 3: the outcome is the same as without."""

from concurrent.futures import Future

import pytest

pytestmark = pytest.mark.slurm


def test_the_chain_with_a_preemption_in_stage_3(beside: dict[str, Future]) -> None:
    beside["test_the_chain_with_a_preemption_in_stage_3"].result()
