"""The benchmarks of reading videos and tokenising text: they check what they time, and compare with the right peer."""

import argparse
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
    first, second = again["command_of_each_round"]  # what was run, without folders of this machine
    assert first.endswith("--readers ours ours_listed ours_squares") and second.endswith("--threads 2 --readers ours")
    assert f"--work {tmp_path.name} --output out.json --duration_s 2" in first and str(tmp_path) not in first
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
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["command"].endswith("--tokenizers bpe --num_workers 1 --repeats 1 --output out.json --least_share 1000")
    (row,) = found["rows"]
    assert row["tokens"] > 65_536 and 0 < row["share_by_wall_s"] < 1000 and row["rounds"] == 1
    with pytest.raises(RuntimeError, match="different numbers of tokens"):
        tool.compare("bpe", [{"tokens": 1}, {"tokens": 2}])


@pytest.mark.parametrize("name", ["video_2cores", "text_bpe_2cores", "text_sentencepiece_2cores"])
def test_stored_results_are_as_the_tools_write_them(name):
    """Derived numbers follow from the readings beside them, and there is nothing the tool does not write."""
    found = json.loads((TOOLS / "benchmark_results" / f"{name}.json").read_text())
    if name == "video_2cores":
        tool = load_script(TOOLS / "benchmark_video.py")
        readings = {tuple(key): values for key, values in found["readings"]}
        facts = ("processor", "cpus", "frames", "of", "size", "versions")
        tool.circumstances = lambda *_: {fact: found[fact] for fact in facts}
        arguments = argparse.Namespace(num_frames=found["frames"])
        assert found == tool.describe(arguments, found["of"], readings, found["load_at_each_round"], found["command_of_each_round"]) | {
            "readings": found["readings"]
        }
        return
    keys = {"command", "processor", "cpus", "load_at_each_round", "python", "versions", "text_bytes", "num_workers", "rows"}
    (row,) = found["rows"]
    assert set(found) == keys and row["rounds"] == len(found["load_at_each_round"])
    assert f"--tokenizers {row['tokenizer']} " in found["command"]
    for kind in ("wall_s", "processor_s"):
        assert row[f"share_by_{kind}"] == pytest.approx(row[f"library_{kind}"] / row[f"preprocess_text_{kind}"], abs=1e-3)
