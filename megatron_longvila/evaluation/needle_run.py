"""A needle test, cell by cell: make the questions of a cell, ask them, record what was said."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_longvila.config import Config
from megatron_longvila.data.text import Tokenizer
from megatron_longvila.evaluation.needle import Needle, place_frames, video_question
from megatron_longvila.evaluation.needle_grid import Cell, Grid, Trial, split_rows
from megatron_longvila.evaluation.needle_haystack import Haystack
from megatron_longvila.evaluation.needle_protocols import Examiner, Outcome, Protocol, Question
from megatron_longvila.evaluation.text_needle import TextHaystack, TextNeedle, text_question

JOINT_TOKENS = 2  # a passage may have this many tokens more together with its question than both have apart


@dataclass(frozen=True)
class NeedleTest:
    """Everything that decides a test but the model.

    Attributes:
        make_question: the question of a trial.
        max_tokens: most tokens of a trial of a given length, before any trial is made.
        row_tokens: trials share rows of this many tokens; a longer trial has a row of its own.
    """

    grid: Grid
    needles: Sequence[Needle | TextNeedle]
    make_question: Callable[[Trial], Question]
    max_tokens: Callable[[int], int]
    tokenizer: Tokenizer
    protocol: Protocol
    row_tokens: int

    def tokens_per_row(self, length: int) -> int:
        """Most tokens of a row of trials of `length`."""
        return max(self.row_tokens, self.max_tokens(length))

    def check_positions(self, max_position_embeddings: int) -> None:
        """Raises ValueError if a trial is longer than the model's positions."""
        for length in self.grid.lengths:
            tokens = self.max_tokens(length)
            if tokens > max_position_embeddings:
                raise ValueError(
                    f"--lengths {length} makes trials of {tokens} tokens, more than model.llm.max_position_embeddings="
                    f"{max_position_embeddings}; leave the length out, or, to see what the model does at positions it was not made for, "
                    f"add --model.llm.max_position_embeddings {tokens}"
                )

    def plan(self, dp_size: int) -> list[dict[str, int]]:
        """What each length costs: trials over all its cells, tokens of a trial, rows of a cell, tokens of all its trials."""
        table = []
        for length in self.grid.lengths:
            tokens, cells = self.max_tokens(length), [cell for cell in self.grid.cells if cell.length == length]
            rows = split_rows([tokens] * self.grid.trials_per_cell, self.tokens_per_row(length), dp_size)
            trials = len(cells) * self.grid.trials_per_cell
            table.append(
                {"length": length, "cells": len(cells), "trials": trials, "tokens": tokens, "rows": len(rows), "all": trials * tokens}
            )
        return table

    def batches(self, cells: Sequence[Cell], dp_size: int) -> list[list[Cell]]:
        """Neighbouring cells of one length that are asked at once, because together they still fit into one row per dp rank."""
        found: list[list[Cell]] = []
        for cell in cells:
            most = dp_size * self.tokens_per_row(cell.length) // (self.grid.trials_per_cell * self.max_tokens(cell.length))
            if found and found[-1][0].length == cell.length and len(found[-1]) < most:
                found[-1].append(cell)
            else:
                found.append([cell])
        return found

    def ask(self, cells: Sequence[Cell], examiner: Examiner) -> list[list[dict[str, Any]]]:
        """Ask cells of one length at once; the records of each, the same on every rank. Collective."""
        start = time.perf_counter()
        trials = [trial for cell in cells for trial in self.grid.trials(cell)]
        questions = [self.make_question(trial) for trial in trials]
        outcomes = examiner.ask(questions, self.protocol, tokens_per_row=self.tokens_per_row(cells[0].length))
        seconds = round((time.perf_counter() - start) / len(trials), 4)
        records = [self._record(*found) | {"seconds": seconds} for found in zip(trials, questions, outcomes, strict=True)]
        return [records[first : first + self.grid.trials_per_cell] for first in range(0, len(records), self.grid.trials_per_cell)]

    def _record(self, trial: Trial, question: Question, outcome: Outcome) -> dict[str, Any]:
        needle = self.needles[trial.needle]
        record = {"trial": trial.number, "needle": needle.id, "question": needle.question, "expected": needle.answer}
        for name, ids in outcome._asdict().items():
            if ids is not None:
                record[name] = {"predicted": self.tokenizer.decode(list(ids)), "correct": ids == question.answer_ids, "tokens": list(ids)}
        return record | {"num_tokens": len(question.encoded)}


def video_test(
    grid: Grid,
    needles: Sequence[Needle],
    haystack: Haystack,
    tokenizer: Tokenizer,
    config: Config,
    *,
    protocol: Protocol,
    row_tokens: int = 0,
) -> NeedleTest:
    """A test of pictures among frames; lengths are frames. Rows of `row_tokens`, by default those of training, hold the trials.

    Raises:
        ValueError: a question that cannot be encoded.
    """

    def make_question(trial: Trial) -> Question:
        needle = needles[trial.needle]
        return video_question(needle, place_frames(trial, needle, haystack, grid.trials_per_cell), tokenizer, config)

    with_one_frame = max(video_question(needle, (0,), tokenizer, config).max_tokens(protocol) for needle in needles)
    frame_tokens = config.model.tokens_per_frame + len(tokenizer.newline_ids)

    def max_tokens(length: int) -> int:
        return with_one_frame + (length - 1) * frame_tokens

    return NeedleTest(grid, needles, make_question, max_tokens, tokenizer, protocol, row_tokens or config.data.context_length)


def text_test(
    grid: Grid,
    needles: Sequence[TextNeedle],
    haystack: TextHaystack,
    tokenizer: Tokenizer,
    template: str | None,
    *,
    protocol: Protocol,
    row_tokens: int,
) -> NeedleTest:
    """A test of sentences in filler; lengths are tokens of the passage. `template` None asks without one. Raises as `video_test`."""

    def make_question(trial: Trial) -> Question:
        needle = needles[trial.needle]
        return text_question(needle, haystack.passage(trial, needle), tokenizer, template)

    around = max(text_question(needle, "", tokenizer, template).max_tokens(protocol) for needle in needles)

    def max_tokens(length: int) -> int:
        return length + around + JOINT_TOKENS

    return NeedleTest(grid, needles, make_question, max_tokens, tokenizer, protocol, row_tokens)
