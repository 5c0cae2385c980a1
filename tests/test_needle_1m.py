"""The million-token example: its chain passes the checks on 1, 2 and 4 GPUs, its model is as small as it says, its world keeps its word."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from programs import load_script

from megatron_longvila.checkpoint.hf import full_shapes
from megatron_longvila.config_check import check
from megatron_longvila.config_io import parse
from megatron_longvila.data.video import probe
from megatron_longvila.training.chain import read_chain

EXAMPLE = Path(__file__).parents[1] / "examples/needle_1m"


@pytest.fixture(scope="module")
def program():
    return load_script(EXAMPLE / "run.py")


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_stage_passes_the_checks(program, num_ranks):
    stages = read_chain(EXAMPLE / "chain.yaml").stages
    assert {stage.name for stage in stages} == set(program.DATA)
    for stage in stages:
        spread = ["--parallel.cp_size", str(num_ranks)] if stage.name in program.MM_SP else []
        config = parse([*stage.argv, *spread])
        mesh = check(config, num_ranks)
        assert mesh.cp_size == (num_ranks if stage.name in program.MM_SP else 1)
        assert config.model.tokens_per_frame == 196
        if stage.name in program.MM_SP:
            assert config.model.llm.rotary_base == 3_580_165_449  # the public recipe's for a million tokens


def test_the_model_is_small():
    """Every stored tensor once (the embedding is also the output layer), with the adapters where a stage has any."""
    config = parse(["--config", str(EXAMPLE / "model.yaml")])
    assert config.model.llm.tie_embeddings
    assert sum(map(math.prod, full_shapes(config).values())) == 14_006_016
    for stage in read_chain(EXAMPLE / "chain.yaml").stages:
        assert sum(map(math.prod, full_shapes(parse(stage.argv)).values())) <= 15_000_000, stage.name


def test_longest_rows_hold_the_longest_videos(program):
    for stage in read_chain(EXAMPLE / "chain.yaml").stages:
        config = parse(stage.argv)
        assert config.data.context_length <= config.model.llm.max_position_embeddings
        if stage.name.startswith("long_sft"):
            assert config.data.video.num_frames * 196 < config.data.context_length
    longest = max(int(length) for length in program.LENGTHS.split(","))
    assert 1_000_000 < longest * 196 < config.model.llm.max_position_embeddings


def test_world(tmp_path):
    world = load_script(EXAMPLE / "make_world.py")
    counts = {"images": 8, "stories": 4, "short": 3, "long_512": 1, "long_1536": 1, "long_6000": 1, "needles": 4, "haystack_frames": 9}
    words = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    world.main(["--output_dir", str(tmp_path), "--scale", "2", "--passages", "0.004", *words])
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")}
    assert {name: len(rows[name]) for name in ("images", "stories", "short", "long-512")} == {
        "images": 8, "stories": 4, "short": 3, "long-512": 1,
    }  # fmt: skip
    assert sorted(rows) == sorted(
        [*world.VIDEOS, "images", "albums", "quizzes", "stories", "notes", *(f"passages-{length}" for length in world.PASSAGES)]
    )
    for quiz in rows["quizzes"]:
        asked = [turn["value"].split()[-2] for turn in quiz["conversations"] if turn["from"] == "human"]
        assert 1 < len(set(asked)) == len(asked) == len(quiz["images"])  # one card of a colour, each asked for once
    for note in rows["notes"]:  # what is answered stands in the text
        text, *turns = [turn["value"] for turn in note["conversations"]]
        asked = [question.split()[-2] for question in (text, *turns[1::2])]
        assert turns[::2] == [f"{colour} {text.split(f'the {colour} card says ')[1].split()[0]} ." for colour in asked]
    facts = probe(tmp_path / "media" / rows["long-6000"][0]["video"])
    assert 1500 <= facts.num_frames <= 6000 and (facts.width, facts.height) == (112, 112)
    assert probe(tmp_path / "needles/haystack.mp4").num_frames == 9
    needles = [json.loads(line) for line in (tmp_path / "needles/needles.jsonl").read_text().splitlines()]
    hidden = {card for needle in needles for card in needle["cards"]}
    trained = {card for some in rows.values() for row in some for card in row.get("cards", [])}
    assert len(needles) == 4 and trained and not hidden & trained
