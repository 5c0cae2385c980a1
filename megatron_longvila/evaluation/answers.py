"""Exact match of whole answers, teacher forced, on any mesh, and what a model that cannot see would reach.

An answer counts when the most likely token is the right one at every position of it, the token that ends it included, each time given the
right tokens before it. Free greedy decoding gives the same verdict on correct answers: it leaves the right path at the first wrong token.

Shapes: L tokens of a sample or of a row, without padding; T rows of one rank.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longvila.data.batch import MicroBatch
from megatron_longvila.data.conversation import MARKS
from megatron_longvila.data.index import SampleIndex
from megatron_longvila.data.loader import Loader
from megatron_longvila.data.mixture import step_rows
from megatron_longvila.data.text import Tokenizer
from megatron_longvila.models.longvila import LongVILA
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.parallel.plan import IGNORE_INDEX
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

Z_99 = 2.5758293035489004  # half of a two-sided 99% interval of a normal distribution, in standard deviations

Predict = Callable[[torch.nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Answer:
    """One question of a sample and what the model says to it.

    Attributes:
        turn: number of the question in its sample, from 0.
        expected, predicted: text without the token that ends an answer.
        correct: every token agrees, that one too.
    """

    sample_id: str
    turn: int
    question: str
    expected: str
    predicted: str
    correct: bool


class Prediction(NamedTuple):
    """The most likely tokens at some labelled positions of a row. `positions` (int64) index the unpadded row; `tokens` are int64."""

    row: int
    positions: np.ndarray
    tokens: np.ndarray


@torch.no_grad()
def predict_labels(
    model: LongVILA,
    batches: Iterable[list[MicroBatch]],
    groups: Groups,
    *,
    predict: Predict,
    global_batch_size: int,
    blank_frames: bool = False,
) -> list[Prediction]:
    """The most likely token at every labelled position of every row. Collective; all ranks return the same list.

    Args:
        model: this rank's pipeline stage, weights loaded, not wrapped.
        batches: steps of an evaluation `Loader`, perhaps with a progress bar around it.
        predict: `(language model of the last stage, hidden states, labels_T) -> token ids at the labelled rows` (training.loss.predict).
        global_batch_size: of the loader's configuration: rows of a step over all dp ranks.
        blank_frames: make every frame black, to see what the text alone gives away.
    """
    model.eval()
    found: list[Prediction] = []
    position = 0
    for batch in batches:
        if blank_frames:
            for one in batch:
                one.frames.zero_()
        predicted = predict_batch(model, batch, predict=predict)
        rows = step_rows(position, global_batch_size, groups.dp.rank(), groups.dp.size())
        position += global_batch_size
        if groups.is_last_stage and groups.tp.rank() == 0:  # the tp ranks of the last stage all know the same
            for row, one, tokens in zip(rows, batch, predicted, strict=True):
                labelled = (one.labels_T != IGNORE_INDEX).cpu().numpy()
                found.append(Prediction(row, one.plan.row_source_T[labelled], tokens.cpu().numpy()))
    shares: list[list[Prediction]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, found)
    return [prediction for share in shares for prediction in share]


@torch.no_grad()
def predict_batch(
    model: LongVILA, batch: Sequence[MicroBatch], *, predict: Predict, visual: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """The most likely token at every labelled position of this rank's rows. Collective over the ranks that share the rows.

    Args:
        visual: visual tokens of each micro-batch where they were encoded before (LongVILA.encode_frames).

    Returns:
        int64 tokens of each micro-batch on the last pipeline stage, nothing on the others.
    """
    visual = visual or [None] * len(batch)

    def forward_step(micro_batches: Iterator[tuple[MicroBatch, Tensor | None]], stage: LongVILA):
        one, visual_VD = next(micro_batches)
        hidden = stage(one.frames, one.input_ids_T, one.positions_T, one.plan, visual_VD)
        return hidden, lambda output, non_loss_data: predict(stage.language_model, output, one.labels_T)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(zip(batch, visual, strict=True)),
        model=model,
        num_microbatches=len(batch),
        seq_length=1,  # not used: the stages tell each other the real lengths
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def score_answers(
    predictions: Sequence[Prediction], loader: Loader, index: SampleIndex, tokenizer: Tokenizer
) -> tuple[list[Answer], list[str]]:
    """Put the predictions of all ranks together again, sample by sample.

    Returns:
        (answers in the order of the index, ids of the samples whose media could not be read).
    """
    by_row: dict[int, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_row[prediction.row].append(prediction)
    answers: dict[int, list[Answer]] = {}  # rows are packed: their samples are not in the order of the index
    skipped: dict[int, str] = {}
    for row in range(loader.num_rows):
        numbers = loader.schedule.row(row).tolist()
        encoded = [index.encode(number) for number in numbers]
        starts = np.cumsum([0, *map(len, encoded)])
        tokens_L = np.full(starts[-1], IGNORE_INDEX)
        for prediction in by_row[row]:
            assert (tokens_L[prediction.positions] == IGNORE_INDEX).all(), f"row {row} has two predictions for one position"
            tokens_L[prediction.positions] = prediction.tokens
        for number, start, sample in zip(numbers, starts, encoded, strict=False):
            source = index.locate(number)[1]
            sample_tokens_L = tokens_L[start : start + len(sample)]
            if (sample_tokens_L == IGNORE_INDEX).all():
                skipped[number] = source.id
            else:
                answers[number] = _compare(source.id, source.conversations, sample.labels_L, sample_tokens_L, tokenizer)
    return [answer for number in sorted(answers) for answer in answers[number]], [skipped[number] for number in sorted(skipped)]


def _compare(
    sample_id: str, conversations: Sequence[dict], labels_L: np.ndarray, tokens_L: np.ndarray, tokenizer: Tokenizer
) -> list[Answer]:
    """The answers of one sample: its runs of labelled positions, one per gpt turn."""
    assert ((labels_L == IGNORE_INDEX) == (tokens_L == IGNORE_INDEX)).all(), f"sample {sample_id}: a labelled position was not predicted"
    edges = np.flatnonzero(np.diff(np.concatenate(([False], labels_L != IGNORE_INDEX, [False]))))
    questions = [conversations[place - 1]["value"] for place, turn in enumerate(conversations) if turn["from"] == "gpt"]
    answers = []
    for turn, (question, start, stop) in enumerate(zip(questions, edges[::2], edges[1::2], strict=True)):
        expected, predicted = labels_L[start:stop].tolist(), tokens_L[start:stop].tolist()
        text = MARKS.sub("", question).strip()
        answers.append(Answer(sample_id, turn, text, tokenizer.decode(expected), tokenizer.decode(predicted), expected == predicted))
    return answers


@dataclass(frozen=True)
class Summary:
    """What the answers amount to.

    Attributes:
        low, high: Wilson's 99% confidence interval of the accuracy.
        constant_accuracy: of the best single answer to everything.
        question_only_accuracy: of the best answer to each question, known by its text alone. Says something where questions repeat.
    """

    num_questions: int
    num_correct: int
    accuracy: float
    low: float
    high: float
    constant_accuracy: float
    question_only_accuracy: float


def summarise(answers: Sequence[Answer]) -> Summary:
    """Raises ValueError if there is no answer."""
    if not answers:
        raise ValueError("there is no answer to score: no sample of the dataset could be used")
    total, correct = len(answers), sum(answer.correct for answer in answers)
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        by_question[answer.question][answer.expected] += 1
    constant = Counter(answer.expected for answer in answers).most_common(1)[0][1]
    question_only = sum(counts.most_common(1)[0][1] for counts in by_question.values())
    low, high = wilson_interval(correct, total)
    return Summary(total, correct, correct / total, low, high, constant / total, question_only / total)


def wilson_interval(successes: int, trials: int, z: float = Z_99) -> tuple[float, float]:
    """Confidence interval of a success rate; `z` standard deviations on both sides. Source: Wilson 1927."""
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))  # at 0 and 1 rounding could pass the rate itself
