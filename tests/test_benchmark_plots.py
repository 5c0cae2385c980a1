"""Pictures of benchmark rows: a scheme keeps its colour, and bars stand without holes."""

import json

import pytest
from programs import ROOT, load_script


def _plots():
    return load_script(ROOT / "tools" / "benchmark_plots.py")


def _row(scheme, seq_len=32768, heads="32/8", **more):
    common = {"work": "forward+backward", "hosts": 1, "tflops_per_gpu": 500.0, "fraction_of_no_communication": 0.9, "repeat": 0}
    return common | {"scheme": scheme, "seq_len": seq_len, "heads": heads} | more


def test_every_scheme_has_a_colour_of_its_own():
    names = [f"mmsp {i}" for i in range(9)] + [f"TE {i}" for i in range(12)]
    colors = _plots().scheme_colors([_row(name) for name in (*names, "no communication, one call", "no communication, ulysses2")])
    assert set(colors) == {*names, "no communication"} and len(set(colors.values())) == len(colors)


def test_a_scheme_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    """Where a panel lacks some schemes, the others keep their colours."""
    plots, drawn = _plots(), []
    draw = plots._draw

    def recorded(bars, lines, rows, colors):
        draw(bars, lines, rows, colors)
        drawn.append({container.get_label(): container.patches[0].get_facecolor() for container in bars.containers})

    monkeypatch.setattr(plots, "_draw", recorded)
    rows = [_row(name) for name in ("mmsp ulysses4", "mmsp ulysses1 ring4 p2p", "TE a2a", "TE p2p")]
    rows += [_row("TE p2p", heads="28/4"), _row("TE p2p", work="packed forward"), _row("TE a2a", work="packed forward")]
    files = plots.plot_attention(rows, tmp_path / "rows.json")
    assert [file.name for file in files] == ["rows_forward_backward_hosts1.png", "rows_packed_forward_hosts1.png"]
    assert [len(panel) for panel in drawn] == [4, 1, 2]
    plots.plot_attention(
        [{**_row(f"no communication, {name}"), "simulated_ranks": 8} for name in ("one call", "ulysses8")], tmp_path / "share.json"
    )
    assert set(drawn.pop()) == {"one call", "ulysses8"}
    assert len({panel["TE p2p"] for panel in drawn}) == 1 and drawn[0]["TE a2a"] == drawn[2]["TE a2a"] != drawn[0]["TE p2p"]


def test_bars_of_a_length_stand_side_by_side_around_its_tick():
    speed = dict.fromkeys([("a", 32), ("b", 32), ("c", 32), ("a", 64), ("c", 64)], 1.0)
    places, width = _plots().bar_places(speed, ["a", "b", "c"])
    assert abs(width - 0.85 / 3) < 1e-12
    assert [round(places[key] / width, 6) for key in (("a", 32), ("b", 32), ("c", 32))] == [-1, 0, 1]
    assert [round((places[key] - 1) / width, 6) for key in (("a", 64), ("c", 64))] == [-0.5, 0.5]


def test_the_front_is_drawn_by_frames(tmp_path):
    rows = [
        _row(scheme, work=f"front, micro-batch 16, {setting}, {frames} frames")
        for scheme in ("no communication", "mmsp reshard", "replicated towers")
        for setting in ("recompute", "no recompute")
        for frames in (64, 256)
    ]
    path = tmp_path / "mmsp.json"
    path.write_text(json.dumps(rows))
    load_script(ROOT / "tools" / "benchmark_mmsp.py").main(["--output", str(path), "--plot"])
    assert (tmp_path / "mmsp.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="not of the front; tools/benchmark_attention.py --plot draws those"):
        _plots().plot_front([_row("TE p2p")], path)
