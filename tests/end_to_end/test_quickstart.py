"""The quickstart's parts by themselves, and all of it with too few steps: it must say so. CI runs it as it is."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from programs import load_script

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"
COUNTS = {
    "images": 40,
    "albums": 20,
    "short_videos": 24,
    "long_videos": 12,
    "stories": 40,
    "short_passages": 12,
    "middle_passages": 12,
    "long_passages": 12,
}


make_data, quickstart = (load_script(FOLDER / f"{name}.py") for name in ("make_data", "quickstart"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data.main(["--output_dir", str(folder), *(f"--{name}={count}" for name, count in COUNTS.items()), "--needles=64"])
    return folder


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_training_row_shows_a_held_out_card(world):
    """By the cards that the written rows name, each by border, ink and sign."""
    held_out = {"".join(card) for card in make_data.HELD_OUT}
    needles = {card for row in read_rows(world / "needles/needles.jsonl") for card in row["cards"]}
    assert len(make_data.CARDS) == 1024 and needles == held_out and len(held_out) == 64
    shown = {card for name in ("images", "albums", "short", "long") for row in read_rows(world / f"{name}.jsonl") for card in row["cards"]}
    assert len(shown) > 50 and not shown & held_out
    pairs = {(card.colour, card.sign) for cards in make_data.TRAINED.values() for card in cards}
    assert len(pairs) == 8 * 16  # every border with every sign, in another ink


def test_the_same_arguments_write_the_same_rows(world, tmp_path):
    make_data.main(["--output_dir", str(tmp_path), *(f"--{name}={count}" for name, count in COUNTS.items()), "--needles=64"])
    names = [path.relative_to(world) for path in world.rglob("*") if path.suffix in (".jsonl", ".txt", ".model", ".png", ".jpg")]
    assert len(names) > 200
    assert all((world / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_every_word_is_one_piece_and_texts_have_their_length(world):
    from megatron_longvila.data.text import load_tokenizer

    tokenizer = load_tokenizer(world / "tokenizer.model")
    for name, length in (("short", make_data.SHORT), ("middle", make_data.MIDDLE), ("long", make_data.LONG)):
        texts = [row["text"] for row in read_rows(world / f"passages-{name}.jsonl")]
        assert {len(tokenizer.encode(text)) + 1 for text in texts} == {length}  # and the token that ends it
    for row in read_rows(world / "short.jsonl"):
        for turn in row["conversations"]:
            words = turn["value"].replace("<video>\n", "").replace("<image>\n", "").replace("\n", " \n ").split(" ")
            assert len(tokenizer.encode(turn["value"].replace("<video>\n", "").replace("<image>\n", ""))) == len([w for w in words if w])


def test_a_guess_among_eight_words(tmp_path):
    """As many needles as the quickstart has: each of the eight words of each kind is asked for."""
    assert {len(words) for words in make_data.FACTS.values()} == {8}
    make_data.World(tmp_path, 0).write_text_needles(192)
    assert quickstart.share_of_guesses(tmp_path / "text_needles.jsonl") == pytest.approx(0.125)


def test_guesses_are_weighed_by_how_often_a_question_is_asked(tmp_path):
    """Three rows ask for one of two words, the fourth for the only one."""
    asked = [("what ?", "a"), ("what ?", "b"), ("what ?", "b"), ("where ?", "c")]
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in asked]
    (tmp_path / "needles.jsonl").write_text("\n".join(lines))
    assert quickstart.share_of_guesses(tmp_path / "needles.jsonl") == (3 * 0.5 + 1) / 4


def test_videos_show_their_cards(world):
    """As many white card faces as cards, at one frame a second, between frames of scenes."""
    from megatron_longvila.data.video import decode_frames, probe

    for row in read_rows(world / "long.jsonl"):
        path = world / "media" / row["video"]
        facts = probe(path)
        assert (facts.codec, facts.width, facts.duration_s) == ("h264", make_data.SIDE, facts.num_frames)
        frames, status = decode_frames(
            path, list(range(facts.num_frames)), image_size=make_data.SIDE, preprocess="resize", fast_resize=False, timeout_s=30
        )
        inner = slice(make_data.BORDER + 2, make_data.BORDER + 6)
        faces = (frames[:, inner, inner] > 200).all((1, 2, 3)).sum()
        assert not status.any() and faces == len(row["cards"]) == len(row["conversations"]) // 2


def test_scenes_move_and_come_back():
    rng = np.random.default_rng(0)
    frames = make_data.draw_scene(make_data.Scene("red", "circle", "left", "grey"), 15, rng)
    red = (frames == make_data.COLOURS["red"]).all(-1)
    assert red.any((1, 2)).all() and (red[0] != red[1]).any() and (red[0] == red[14]).all()  # 14 steps of 4 pixels are one side


AFTER = {"trials": 125, "needle_accuracy": 0.97, "no_needle_accuracy": 0.05, "chance_given_question": 0.2}
TEXT = [{"lengths": [60, 480], "accuracy_by_length": {"60": 0.9, "480": accuracy}} for accuracy in (0.1, 0.8)]


@pytest.mark.parametrize(
    ("after", "text", "problem"),
    [
        ({}, TEXT, None),
        ({"trials": 99}, TEXT, "99 trials are fewer than 100"),
        ({"needle_accuracy": 0.949}, TEXT, "0.949 of the trials, below 0.95"),
        ({"no_needle_accuracy": 0.21}, TEXT, "without the needle 0.210 are right, above the 0.200"),
        ({}, TEXT[::-1], "the text needle at 480 tokens went from 0.800 to 0.100"),
        ({}, [TEXT[1], TEXT[1]], "the text needle at 480 tokens went from 0.800 to 0.800"),
    ],
)
def test_the_gate(after, text, problem):
    problems = quickstart.judge(AFTER | after, *text)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.end_to_end
def test_too_few_steps_are_found_out(tmp_path):
    """The stages from 3 on with six steps each: stopped, resumed, asked, reported, and refused; a second start does nothing again."""
    chain = yaml.safe_load((FOLDER / "chain.yaml").read_text())
    stages = [stage for stage in chain["stages"] if stage["name"] in ("short_sft", "context_extension", "long_sft")]
    for stage in stages:
        settings = yaml.safe_load((FOLDER / stage["config"][-1]).read_text())
        settings["training"]["steps"] = 6
        (tmp_path / stage["config"][-1]).parent.mkdir(exist_ok=True)
        (tmp_path / stage["config"][-1]).write_text(yaml.safe_dump(settings))
    chain |= {"base": [str(FOLDER / "model.yaml")], "stages": stages}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    out = tmp_path / "out"
    command = [sys.executable, str(FOLDER / "quickstart.py"), "--output_dir", str(out), "--chain", str(tmp_path / "chain.yaml")]
    command += ["--trials_per_cell", "1", "--data", *(f"{name}={count}" for name, count in COUNTS.items()), "needles=64"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment) for _ in range(2))
    assert first.returncode == 1 and "FAILED: after stage 5 the needle is found in" in first.stderr, first.stdout + first.stderr
    assert second.returncode == 1 and second.stdout.count(": done before") == 9 and "$" not in second.stdout

    summary = json.loads((out / "summary.json").read_text())
    assert not summary["passed"] and summary["needle_trials"] == 25 and [stage["steps"] for stage in summary["stages"]] == [6, 6, 6]
    assert f"resumed it.\n\n{'stage':<20}" in first.stdout and summary["stopped"].startswith("short_sft after step ")
    assert 0 < summary["memory_gib"] < 8
    for name, path in summary["files"].items():
        assert Path(path).exists(), name
    check_needle_numbers(summary, out)


def check_needle_numbers(summary: dict, out: Path) -> None:
    """Each number is the one of its needle test, and what that test's trials say."""
    names = ("video-short_sft", "video-long_sft", "text-context_extension")
    before, after, text = (recount(out / "needle" / name) for name in names)
    assert summary["needle_accuracy_stage3"] == before["needle_accuracy"]
    assert summary["needle_accuracy_stage5"] == after["needle_accuracy"]
    assert summary["needle_trials"] == after["trials"] == before["trials"]
    assert summary["needle_chance"] == after["chance_given_question"]
    assert summary["text_needle_chance"] == text["chance_given_question"] >= 1 / 8  # no question has more than eight answers


def recount(folder: Path) -> dict:
    """summary.json of a needle test, after its trials were counted again."""
    summary = json.loads((folder / "summary.json").read_text())
    trials = [trial for trial in read_rows(folder / "trials.jsonl") if not trial["control"]]
    expected = defaultdict(Counter)
    for trial in trials:
        expected[trial["question"]][trial["expected"]] += 1
    assert summary["trials"] == len(trials)
    assert summary["needle_accuracy"] == pytest.approx(sum(trial["teacher_forcing"]["correct"] for trial in trials) / len(trials))
    assert summary["chance_given_question"] == pytest.approx(sum(max(answers.values()) for answers in expected.values()) / len(trials))
    return summary
