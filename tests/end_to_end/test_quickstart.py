"""The quickstart's parts by themselves, and all of it with too few steps: it must say so. CI runs it as it is."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_data, quickstart = load_script("make_data"), load_script("quickstart")


@pytest.mark.parametrize("count", [12, 24, 144])
def test_answers_are_balanced_and_shapes_differ(count):
    scenes = make_data.draw_scenes(np.random.default_rng(count), count)
    for name, choices in (("first", make_data.COLOURS), ("second", make_data.COLOURS), ("ground", make_data.GROUNDS)):
        assert Counter(getattr(scene, name) for scene in scenes) == dict.fromkeys(choices, count // len(choices))
    assert all(scene.first != scene.second for scene in scenes)


def test_training_scenes_avoid_the_held_out_ones():
    rng = np.random.default_rng(0)
    heldout = make_data.draw_scenes(rng, 24)
    assert not set(heldout) & set(make_data.draw_scenes(rng, 144, excluded=heldout))


@pytest.mark.parametrize("count", [0, 20])
def test_a_number_of_videos_that_cannot_balance_is_refused(count):
    with pytest.raises(ValueError, match="multiple of 12"):
        make_data.draw_scenes(np.random.default_rng(0), count)


def test_pictures_show_the_scene():
    """The first colour and no second before the cut, the other way round after it, the ground throughout; both shapes move."""
    rng = np.random.default_rng(0)
    for scene in make_data.draw_scenes(rng, 12):
        frames = make_data.render(scene, rng)
        first, second = ((frames == make_data.COLOURS[colour]).all(-1) for colour in (scene.first, scene.second))
        half = make_data.FRAMES // 2
        assert first[: half - 1].any((1, 2)).all() and not first[half + 1 :].any()
        assert second[half + 1 :].any((1, 2)).all() and not second[: half - 1].any()
        assert (first[0] != first[half - 2]).any() and (second[half + 1] != second[-1]).any()
        assert (frames == make_data.GROUNDS[scene.ground]).all(-1).any((1, 2)).all()


def test_the_script_makes_videos_rows_and_whole_words(tmp_path):
    from megatron_longvila.data.text import load_tokenizer
    from megatron_longvila.data.video import probe

    counts = ["--train_videos", "24", "--heldout_videos", "12"]
    for folder in ("a", "b"):
        make_data.main(["--output_dir", str(tmp_path / folder), *counts])
    rows = {
        split: [json.loads(line) for line in (tmp_path / f"a/{split}.jsonl").read_text().splitlines()] for split in ("train", "heldout")
    }
    assert {split: len(rows[split]) for split in rows} == {"train": 24, "heldout": 12}
    answers = {
        split: {frozenset(turn["value"] for turn in row["conversations"] if turn["from"] == "gpt") for row in rows[split]} for split in rows
    }
    assert not answers["train"] & answers["heldout"]
    facts = probe(tmp_path / "a/videos" / rows["train"][0]["video"])
    assert (facts.codec, facts.num_frames, facts.width) == ("h264", make_data.FRAMES, make_data.SIDE)

    for name in ("train.jsonl", "heldout.jsonl", "tokenizer.model"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a/tokenizer.model")
    assert tokenizer.vocab_size <= 384  # of the tiny model
    for turns in (row["conversations"] for row in rows["heldout"]):
        assert all(len(tokenizer.encode(turn["value"])) == 2 for turn in turns if turn["from"] == "gpt")
    for name in make_data.SPECIALS[:2]:
        assert tokenizer.special_id(name) not in tokenizer.encode(f"say {name}")


SEEING = {"num_questions": 72, "question_only_accuracy": 0.17, "low": 0.5}
BLIND = {"low": 0.05}


@pytest.mark.parametrize(
    ("shown", "blank", "problem"),
    [
        ({}, {}, None),
        ({"num_questions": 59}, {}, "59 questions are fewer than 60"),
        ({"low": 0.17}, {}, "lower bound 0.170 is not above 0.170"),
        ({}, {"low": 0.18}, "black frames the 99% lower bound 0.180 is above 0.170"),
    ],
)
def test_the_gate(shown, blank, problem):
    problems = quickstart.judge(SEEING | shown, BLIND | blank)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.end_to_end
def test_too_few_steps_are_found_out(tmp_path):
    """All of the quickstart with 12 steps: stopped, resumed, evaluated, reported, and refused; a second start does nothing again."""
    config = (FOLDER / "train.yaml").read_text()
    for name, value in (("steps", 12), ("evaluation_interval", 0), ("warmup_steps", 10), ("interval", 1)):
        lines = [line for line in config.splitlines() if line.strip().startswith(f"{name}:")]
        assert len(lines) == 1, name
        config = config.replace(lines[0], f"{lines[0].split(':')[0]}: {value}")
    (tmp_path / "train.yaml").write_text(config)
    out = tmp_path / "out"
    command = [sys.executable, str(FOLDER / "quickstart.py"), "--output_dir", str(out), "--train_config", str(tmp_path / "train.yaml")]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment) for _ in range(2))
    assert first.returncode == 1 and "FAILED: the accuracy's 99% lower bound" in first.stderr, first.stdout + first.stderr
    assert second.returncode == 1 and second.stdout.count(": done before") == 5 and "$" not in second.stdout

    summary = json.loads((out / "summary.json").read_text())
    assert not summary["passed"] and summary["num_questions"] == 72
    stopped = summary["stopped_at_step"]
    assert (
        4 <= stopped < 12 and f"stopped by a signal after step {stopped}" in first.stdout and f"steps {stopped + 1} to 12" in first.stdout
    )
    steps = [json.loads(line)["step"] for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
    assert 0 < summary["memory_gib"] < 6
    for name, path in summary["files"].items():
        assert Path(path).exists(), name
    hashes = [
        {json.loads(line)["sha256"] for line in (out / f"data/{split}/media.jsonl").read_text().splitlines()}
        for split in ("train", "heldout")
    ]
    assert len(hashes[0]) == 144 and len(hashes[1]) == 24 and not hashes[0] & hashes[1]
