"""Every mesh gives the same answers, and teacher forcing and greedy decoding the same verdicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_model import build, make_config
from tiny_needles import Numbers, make_needles
from tiny_tokenizers import write_sentencepiece

from megatron_longvila.config import Config
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.evaluation.needle_grid import Cell, Trial
from ranks import run_ranks

MESHES = {  # tp, pp, ulysses, ring; on 4 ranks the rest is dp
    "ulysses2_ring2": (1, 1, 2, 2),
    "pp2_dp2": (1, 2, 1, 1),
    "tp2_dp2": (2, 1, 1, 1),
}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tiny.model")


def make_questions(config: Config, lengths: tuple[int, ...]) -> list:
    """One trial of each length, frames at different depths of an endless haystack."""
    from megatron_longvila.evaluation.needle import place_frames, video_question

    tokenizer, needles = load_tokenizer(config.data.tokenizer), make_needles(len(lengths), distractors=1)
    trials = [Trial(Cell(length, (n % 6) / 5), n, n, (0, n)) for n, length in enumerate(lengths)]
    return [
        video_question(needles[trial.needle], place_frames(trial, needles[trial.needle], Numbers(), 1), tokenizer, config)
        for trial in trials
    ]


def answered(question, ids: tuple[int, ...]):
    """The question with `ids` as its right answer."""
    from megatron_longvila.data.conversation import Encoded
    from megatron_longvila.evaluation.needle_protocols import Question
    from megatron_longvila.parallel.plan import IGNORE_INDEX

    encoded, at = question.encoded, question.answer_at
    input_ids_L = np.concatenate([encoded.input_ids_L[: at + 1], np.asarray(ids)])
    labels_L = np.full(len(input_ids_L), IGNORE_INDEX)
    labels_L[at : at + len(ids)] = ids
    return Question(Encoded(input_ids_L, labels_L, encoded.frame_starts, encoded.frame_sources), question.frames)


def until_repeated(ids: tuple[int, ...]) -> tuple[int, ...]:
    """The longest start of `ids` whose last token, which ends the answer, comes only once."""
    return next(ids[:stop] for stop in range(len(ids), 0, -1) if ids[stop - 1] not in ids[: stop - 1])


class Reader:
    """Frames by key: the haystack's, or a picture that only its name decides; remembers what it was asked for."""

    def __init__(self):
        self.asked: list = []

    def __call__(self, keys) -> np.ndarray:
        self.asked += keys
        pictures = [
            Numbers().read([key])[0] if isinstance(key, int) else np.full((4, 4, 3), len(key.name) * 7 + ord(key.name[-1])) for key in keys
        ]
        return np.stack(pictures).astype(np.uint8)  # fmt: skip


LENGTHS = (1, 9, 4, 4, 7, 2, 12)


def _examine(rank: int, config: Config, world_size: int, answers) -> dict:
    """What the model says to questions with the usual answers, and, given `answers`, to questions that these are right for."""
    from megatron_longvila.evaluation.needle_protocols import Examiner
    from megatron_longvila.parallel.groups import destroy_groups
    from megatron_longvila.training.loss import predict

    model, groups = build(config, world_size)
    reader = Reader()
    examiner = Examiner(
        model,
        groups,
        config,
        predict=lambda language_model, hidden, labels_T: predict(language_model, hidden, labels_T, config),
        read_frames=reader,
    )
    questions = make_questions(config, LENGTHS)
    found = {tokens: examiner.ask(questions, "both", tokens_per_row=tokens) for tokens in ((1, 64) if world_size == 1 else (64,))}
    asked = list(reader.asked)
    if answers is None:
        answers = [until_repeated(outcome.greedy) for outcome in found[64]]
    known = [answered(question, ids) for question, ids in zip(questions, answers, strict=True)]
    found["right"] = examiner.ask(known, "both", tokens_per_row=64)
    wrong = [answered(question, (*ids[:-1], (ids[-1] + 1) % 420)) for question, ids in zip(questions, answers, strict=True)]
    found["wrong"] = examiner.ask(wrong, "both", tokens_per_row=64)
    if world_size == 1:
        found["forced"] = examiner.ask(questions[:2], "teacher_forcing", tokens_per_row=64)
        found["greedy"] = examiner.ask(questions[:2], "greedy", tokens_per_row=64)
    destroy_groups()
    return {"found": found, "answers": answers, "asked": asked}


@pytest.fixture(scope="module")
def alone(tokenizer_path) -> dict:
    return run_ranks(_examine, 1, make_config(tokenizer_path), 1, None, timeout_s=60)[0]


def test_both_protocols_agree(alone, tokenizer_path):
    questions = make_questions(make_config(tokenizer_path), LENGTHS)
    for question, outcome in zip(questions, alone["found"][64], strict=True):
        forced, greedy, right = outcome.teacher_forcing, outcome.greedy, question.answer_ids
        assert len(forced) == len(right) and len(greedy) <= len(right) + 1
        agreed = next((n for n, token in enumerate(forced) if token != right[n]), len(right) - 1) + 1
        assert forced[:agreed] == greedy[:agreed]  # the same path up to the first wrong token
        assert (forced == right) == (greedy == right)
    assert not any(outcome.greedy == question.answer_ids for question, outcome in zip(questions, alone["found"][64], strict=True))
    assert len({outcome.greedy for outcome in alone["found"][64]}) > 3
    for ids, right, wrong in zip(alone["answers"], alone["found"]["right"], alone["found"]["wrong"], strict=True):
        assert right.teacher_forcing == right.greedy == ids
        assert wrong.teacher_forcing == ids and wrong.greedy[: len(ids)] == ids  # one token is wrong, and only that one
    assert max(len(ids) for ids in alone["answers"]) > 1

    assert [one.teacher_forcing for one in alone["found"]["forced"]] == [one.teacher_forcing for one in alone["found"][64][:2]]
    assert [one.greedy for one in alone["found"]["greedy"]] == [one.greedy for one in alone["found"][64][:2]]
    assert alone["found"]["forced"][0].greedy is None and alone["found"]["greedy"][0].teacher_forcing is None


def test_packing_changes_nothing(alone):
    assert alone["found"][1] == alone["found"][64]


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_says_the_same(name, alone, tokenizer_path):
    ranks = run_ranks(_examine, 4, make_config(tokenizer_path, MESHES[name]), 4, alone["answers"], timeout_s=100)
    for one in ranks:
        for what in (64, "right", "wrong"):
            assert one["found"][what] == alone["found"][what], what
    # Frames are read by the ranks that own them, on the first pipeline stage, by the first tp rank; haystack frames once by each.
    frames = [key for question in make_questions(make_config(tokenizer_path), LENGTHS) for key in question.frames]
    read = [key for one in ranks for key in one["asked"]]
    assert set(read) == set(frames) and len(read) <= len(frames)
    for one in ranks:
        numbers = [key for key in one["asked"] if isinstance(key, int)]
        assert len(numbers) == len(set(numbers))
    assert sum(bool(one["asked"]) for one in ranks) == (4 if name == "ulysses2_ring2" else 2)
