"""The benchmarks of reading videos and tokenising text: they check what they time, and compare with the right peer."""

import json
from pathlib import Path

import pytest
from programs import load_script
from tiny_tokenizers import write_bpe

TOOLS = Path(__file__).parents[1] / "tools"


def test_videos_are_read_and_checked(tmp_path, capsys):
    tool = load_script(TOOLS / "benchmark_video.py")
    words = ["--work", str(tmp_path), "--output", str(tmp_path / "out.json"), "--duration_s", "2", "--num_frames", "7", "--repeats", "1"]
    assert tool.main([*words, "--videos", "prepared", "--threads", "2", "--readers", "ours", "ours_listed", "ours_squares"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    rows = {row["reader"]: row for row in found["rows"]}
    assert rows["ours"]["exact"] == rows["ours_listed"]["exact"] == 7 and found["fastest_exact_peer"] == []
    assert "7 of 7 exact" in capsys.readouterr().out
    assert tool.main([*words, "--videos", "prepared", "--threads", "2", "--readers", "ours"]) == 0  # a further round
    again = json.loads((tmp_path / "out.json").read_text())
    assert [row["rounds"] for row in again["rows"]] == [2, 1, 1] and len(again["load_at_each_round"]) == 2
    assert again["rows"][0]["processor_s"] <= rows["ours"]["processor_s"]
    assert tool.main([*words, "--videos", "prepared", "--num_frames", "5"]) == 1 and "give another --output" in capsys.readouterr().err


def test_only_exact_peers_are_compared():
    def row(reader: str, seconds: float, exact: int | None = 9) -> dict:
        known = {"video": "web", "threads": 1, "reader": reader}
        return known | ({"missing": "no such package"} if exact is None else {"wall_s": seconds, "processor_s": seconds, "exact": exact})

    tool = load_script(TOOLS / "benchmark_video.py")
    rows = [row("ours", 4), row("ours_listed", 1), row("opencv", 2, exact=8), row("decord", 1, exact=None), row("torchcodec", 6)]
    expected = {"video": "web", "threads": 1, "peer": "torchcodec", "wall_s_ratio": 1.5, "processor_s_ratio": 1.5}
    assert tool.compare(rows, 9) == [expected]


def test_text_is_tokenised_alike(tmp_path, capsys):
    tool = load_script(TOOLS / "benchmark_text.py")
    lines = [{"text": f"Which shape moves to the left? A blue circle, number {number}.\n" * 9} for number in range(400)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "--work",
        tmp_path / "work",
        "--input",
        tmp_path / "text.jsonl",
        "--tokenizers",
        write_bpe(tmp_path / "bpe"),
        "--num_workers",
        1,
    ]
    words += ["--repeats", 1, "--output", tmp_path / "out.json", "--least_share", 1000]
    assert tool.main(list(map(str, words))) == 1 and "less than 1000" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["tokens"] > 65_536 and 0 < row["share_by_wall_s"] < 1000
    with pytest.raises(RuntimeError, match="different numbers of tokens"):
        tool.compare("bpe", [{"tokens": 1}, {"tokens": 2}])
