"""tools/benchmark_tower.py at toy size: every tower that runs here gives a row, once, and a peer that does not is named."""

import json
import sys

from programs import ROOT, load_script

from ranks import run_ranks, warm_parent


def test_rows_are_measured_once(tmp_path):
    warm_parent()
    tool = load_script(ROOT / "tools" / "benchmark_tower.py")
    path = tmp_path / "rows.json"
    flags = [
        "--output",
        str(path),
        "--config",
        str(ROOT / "examples/models/tiny.yaml"),
        "--frames",
        "2",
        "--iterations",
        "1",
        "--warm_up",
        "1",
    ]
    run_ranks(lambda rank: tool.main(flags), 1)
    rows = json.loads(path.read_text())
    names = ["ours", "ours, plain kernels", "transformers"]
    assert [(row["scheme"], row["work"]) for row in rows] == [(n, w) for n in names for w in ("tower forward", "tower forward+backward")]
    assert all(row["seq_len"] == 2 * 16 and row["frames_per_s"] > 0 for row in rows)
    run_ranks(lambda rank: tool.main(flags), 1)
    assert json.loads(path.read_text()) == rows


def test_a_missing_peer_is_named(tmp_path, monkeypatch):
    warm_parent()
    tool = load_script(ROOT / "tools" / "benchmark_tower.py")
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises ImportError
    flags = ["--output", str(tmp_path / "rows.json"), "--config", str(ROOT / "examples/models/tiny.yaml"), "--schemes", "transformers"]
    run_ranks(lambda rank: tool.main(flags), 1)
    assert json.loads((tmp_path / "rows.json").read_text()) == []
    assert "ModuleNotFoundError" in json.loads((tmp_path / "rows_machine.json").read_text())["left_out"]["transformers"]
