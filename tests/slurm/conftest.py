"""One cluster and one set of videos for all Slurm tests; without Slurm they are skipped, which CI counts as a failure."""

from pathlib import Path

import pytest
from programs import write_question_videos
from slurm_cluster import missing_programs, running_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)} on this machine: sudo apt-get install slurm-wlm munge")
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Eight H.264 videos with one question each, preprocessed by the tool, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_question_videos(folder)
    return folder
