"""The doctor as a Slurm step, without torchrun: it finds its ranks, and measures what lies between two nodes."""

from __future__ import annotations

import json
import sys

import pytest
from programs import ROOT
from slurm_cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("beside")]


def test_two_nodes(cluster: Cluster) -> None:
    words = [sys.executable, "-m", "megatron_longvila.doctor", "--disk_mib", "4", "--exchange_mib", "1", "--json"]
    step = ["srun", "--quiet", f"--partition={cluster.partition}", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"]
    step += ["--output=doctor.json", "--error=doctor.err"]
    said = cluster.run(*step, *words, check=False, timeout_s=400, PYTHONPATH=ROOT)
    text = (cluster.folder / "doctor.json").read_text()
    assert text, said + (cluster.folder / "doctor.err").read_text()
    found: dict[str, list[dict]] = {}
    for one in json.loads(text):
        found.setdefault(one["name"], []).append(one)
    assert [one["host"] for one in found["torch"]] == ["vn1", "vn2"]  # once a node, whatever its ranks
    assert [one["value"].split()[0] for one in found["clock offset"]] == ["vn1", "vn2"]
    assert all(one["status"] == "ok" and abs(float(one["value"].split()[1])) < 1 for one in found["clock offset"])  # one machine
    assert found["all-reduce"][0]["value"].startswith("4 ranks: 1 MiB in ") and "GB/s" in found["all-reduce"][0]["value"]
    assert "slowest vn1 - vn2" in found["host pairs"][0]["value"]
