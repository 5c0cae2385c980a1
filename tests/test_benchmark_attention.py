"""tools/benchmark_attention.py at toy size on gloo ranks: every scheme that a CPU can run, rows as documented, resumed, drawn."""

import json

import torch
import torch.distributed as dist
from programs import ROOT, load_script

from ranks import run_ranks, warm_parent

FLAGS = ["--heads", "4/2", "--head_dim", "8", "--iterations", "1", "--warm_up", "0", "--tiles", "8", "--parts", "1"]
COLUMNS = {"work", "scheme", "heads", "seq_len", "hosts", "median_ms", "tflops_per_gpu", "peak_memory_gib", "fraction_of_no_communication"}


def _run(path, *flags):
    """Run the tool on two ranks; returns its rows."""
    warm_parent()
    tool = load_script(ROOT / "tools" / "benchmark_attention.py")
    run_ranks(lambda rank: tool.main(["--output", str(path), *FLAGS, *flags]), 2)
    return json.loads(path.read_text())


def test_rows_are_measured_once_and_drawn(tmp_path):
    path = tmp_path / "rows.json"
    flags = ["--lengths", "64", "--work", "forward+backward", "packed forward", "--shortest_document", "4", "--longest_document", "40"]
    rows = _run(path, *flags)
    assert all(set(row) >= COLUMNS and row["median_ms"] > 0 and row["peak_memory_gib"] is None for row in rows)
    schemes = {row["scheme"] for row in rows if row["work"] == "forward+backward"}
    ours = {
        "ulysses2",
        "ulysses2 tile8",
        "ulysses2 parts1",
        *(f"ulysses1 ring2 {x}{tile}" for x in ("all_gather", "p2p") for tile in ("", " tile8")),
    }
    assert {name.removeprefix("mmsp ") for name in schemes if name.startswith("mmsp ")} == ours
    assert {"no communication, one call", "no communication, ulysses2 parts1", "three all-to-alls", "replicated"} <= schemes
    for work in {row["work"] for row in rows}:
        same = [row for row in rows if row["work"] == work]
        ceiling = min(row["median_ms"] for row in same if row["scheme"].startswith("no communication"))
        assert all(abs(row["fraction_of_no_communication"] - ceiling / row["median_ms"]) < 1e-3 for row in same)
    facts = json.loads((tmp_path / "rows_machine.json").read_text())
    assert facts["ranks"] == 2 and facts["versions"]["torch"] == torch.__version__ and len(facts["commands"]) == 1
    assert any("TE p2p" in name for name in facts["left_out"])

    path.write_text(json.dumps(rows[1:]))
    again = _run(path, *flags)
    assert [row["median_ms"] for row in again[:-1]] == [row["median_ms"] for row in rows[1:]]
    assert again[-1]["scheme"] == rows[0]["scheme"]

    load_script(ROOT / "tools" / "benchmark_attention.py").main(["--output", str(path), "--plot"])
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["rows_forward_backward_hosts1.png", "rows_packed_forward_hosts1.png"]


def test_a_time_limit_ends_a_run_between_two_schemes(tmp_path):
    assert _run(tmp_path / "rows.json", "--lengths", "64", "--time_limit_s", "0") == []


def test_the_schemes_compute_the_same_attention():
    """Every scheme of ours and every peer that runs here gives the gradients of one rank's whole attention."""
    warm_parent()
    peers = load_script(ROOT / "tools" / "attention_peers.py")
    from megatron_longvila.parallel.plan import SequenceLayout, owned_rows

    case = peers.Case(8, 4, 8, (48, 16), torch.float64)

    def body(rank):
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(64, n, 8, dtype=torch.float64, generator=generator) for n in (8, 4, 4, 8)]
        results = {}
        builders = {
            "ulysses": (2, 1, lambda: peers.ours(case, 2, 1, "all_gather", None)),
            "parts": (2, 1, lambda: peers.ours(case, 2, 1, "all_gather", None, 2)),
            "tiles": (2, 1, lambda: peers.ours(case, 2, 1, "all_gather", 8)),
            "ring": (1, 2, lambda: peers.ours(case, 1, 2, "p2p", None)),
            "three": (2, 1, lambda: peers.three_all_to_alls(case)),
            "replicated": (2, 1, lambda: peers.replicated(case)),
        }
        for name, (ulysses, ring, build) in builders.items():
            rows = torch.from_numpy(owned_rows(SequenceLayout(ring, ulysses, case.lengths))[rank])
            inputs = peers.Inputs(*(x[rows] for x in whole))
            results[name] = [torch.zeros_like(whole[index]) for index in (0, 0, 1, 2)]
            for total, part in zip(results[name], build()(inputs, True), strict=True):
                total[rows] = part.detach().reshape(len(rows), *total.shape[1:])
                dist.all_reduce(total)
        errors = {}
        for name, values in results.items():
            errors[name] = max((a - b).abs().max().item() for a, b in zip(results["three"], values, strict=True))
        return errors

    for errors in run_ranks(body, 2):
        assert all(error < 1e-12 for error in errors.values()), errors


def test_a_wrong_choice_of_mesh_is_seen():
    warm_parent()
    tool = load_script(ROOT / "tools" / "benchmark_attention.py")

    def rows(ulysses_ms, ring_ms):
        common = {"work": "forward+backward", "heads": "28/4", "seq_len": 131072, "hosts": 1}
        names = {"mmsp ulysses4": ulysses_ms, "mmsp ulysses1 ring4 p2p": ring_ms, "mmsp ulysses1 ring4 all_gather": 300.0, "TE p2p": 1.0}
        return [{**common, "scheme": scheme, "median_ms": ms} for scheme, ms in names.items()]

    (right,) = tool.check_meshes(rows(200.0, 210.0), 4, 128)
    assert (right["taken"], right["best"], right["ratio"]) == ("ulysses4", "mmsp ulysses4", 1.0)
    (wrong,) = tool.check_meshes(rows(231.0, 210.0), 4, 128)
    assert (wrong["best"], wrong["ratio"]) == ("mmsp ulysses1 ring4 p2p", 1.1)
