"""tools/benchmark_kernels.py at toy size: every kernel and every implementation that a CPU has gets a row."""

import json
import sys

import pytest
from programs import ROOT, load_script

from ranks import run_ranks


def _run(rank: int, output, kernels: list[str]) -> list[str]:
    from megatron_longvila.mesh import Mesh
    from megatron_longvila.parallel.groups import initialize_groups

    tool = load_script(ROOT / "tools" / "benchmark_kernels.py")
    initialize_groups(Mesh(1, 1, 1, 1, 1), timeout_s=60)
    flags = ["--rows", "4", "--ffn_hidden_size", "8", "--loss_rows", "2", "--iterations", "1", "--warm_up", "0"]
    if "broken" in kernels:  # a peer that does not run here
        kernels.remove("broken")
        sys.modules[tool.Works.__module__]._megatron_pack = lambda *_: 1 / 0
    return tool.run_all(tool.parse(["--output", str(output), "--kernels", *kernels, *flags]))


def test_rows_of_all_implementations(tmp_path):
    kernels = ["pack_qkv", "swap_into", "merge_into", "take_rows", "place_rows", "rms_norm", "layer_norm", "swiglu", "cross_entropy"]
    assert run_ranks(_run, 1, tmp_path / "rows.json", kernels) == [[]]
    results = json.loads((tmp_path / "rows.json").read_text())
    assert {row["kernel"] for row in results["rows"]} == set(kernels) and results["device"] == "cpu"
    found = {row["implementation"] for row in results["rows"] if row["kernel"] == "cross_entropy"}
    assert found == {"triton", "plain twin", "Megatron-Core"}
    for row in results["rows"]:
        assert row["forward_ms"] > 0 and row["forward_gb_per_s"] > 0
        assert (row["backward_ms"] is None) == (row["kernel"] in ("merge_into", "swap_into"))


def test_sweep(tmp_path):
    assert run_ranks(_run, 1, tmp_path / "rows.json", ["merge_into", "--sweep"]) == [[]]
    names = [row["implementation"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert names == ["triton PAIRS=4", "triton PAIRS=8", "triton PAIRS=16"]


def test_a_peer_that_does_not_run_is_reported_and_costs_nothing_else(tmp_path):
    failed = run_ranks(_run, 1, tmp_path / "rows.json", ["broken", "pack_qkv"])[0]
    assert failed == ["pack_qkv, Megatron-Core: ZeroDivisionError: division by zero"]
    results = json.loads((tmp_path / "rows.json").read_text())
    assert [row["implementation"] for row in results["rows"]] == ["triton", "plain twin"] and results["failed"] == failed


def test_unknown_kernels_are_refused(tmp_path):
    tool = load_script(ROOT / "tools" / "benchmark_kernels.py")
    with pytest.raises(ValueError, match=r"--kernels \['softmax'\]: choose from"):
        tool.run_all(tool.parse(["--output", str(tmp_path / "rows.json"), "--kernels", "softmax"]))
