"""Two ways to ask a model a question with one right answer, on any mesh: teacher forcing and free greedy decoding.

Teacher forcing (the paper's protocol) gives the model the right answer and asks at each of its positions, the end token's included, for
the most likely next token. Greedy decoding appends the model's own token until it ends the answer. Both stay on the same path until the
first wrong token, so they give the same verdict; they share the frames' visual tokens and nothing else.

There is no key-value cache: each greedy step is a whole forward pass over the row, the sequence sharded as in training.
Shapes: L tokens of a question, V visual tokens of this rank's frames, T rows of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longvila import platform
from megatron_longvila.config import Config
from megatron_longvila.data.batch import MicroBatch, Row, build_micro_batch
from megatron_longvila.data.conversation import Encoded
from megatron_longvila.data.loader import Place
from megatron_longvila.evaluation.answers import Predict, predict_batch
from megatron_longvila.evaluation.needle_grid import split_rows
from megatron_longvila.evaluation.needle_haystack import FrameKey
from megatron_longvila.models.longvila import LongVILA
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.parallel.plan import IGNORE_INDEX, RankPlan, RowSpec, plan_row

EXTRA_TOKENS = 1  # greedy decoding may go on past the length of the right answer: enough to see that it does not end
TOKENS_AT_ONCE = 1 << 20  # of rows whose visual tokens are held at a time; one row may have more
KEPT_BYTES = 4 << 30  # of the visual tokens of haystack frames that a rank keeps: 10,000 frames of 196 tokens of 1,024 bf16

Protocol = Literal["both", "teacher_forcing", "greedy"]


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt with its right answer.

    Attributes:
        encoded: labelled at the answer's tokens and the token that ends it; one answer only.
        frames: key of each frame, in the order of `encoded.frame_starts`.
    """

    encoded: Encoded
    frames: tuple[FrameKey, ...] = ()

    @cached_property
    def answer_at(self) -> int:
        """Position whose prediction is the answer's first token; the prompt ends with it."""
        return int(np.flatnonzero(self.encoded.labels_L != IGNORE_INDEX)[0])

    @cached_property
    def answer_ids(self) -> tuple[int, ...]:
        """The right answer, the end token included."""
        labels_L = self.encoded.labels_L
        return tuple(labels_L[labels_L != IGNORE_INDEX].tolist())

    def max_tokens(self, protocol: Protocol) -> int:
        """Most tokens it takes under `protocol`."""
        free = 0 if protocol == "teacher_forcing" else self.answer_at + len(self.answer_ids) + EXTRA_TOKENS
        return max(len(self.encoded), free)

    def continued(self, said: Sequence[int], *, is_open: bool) -> Encoded:
        """The prompt and what was said so far; while it is open, the last position asks for the next token."""
        encoded = self.encoded
        input_ids_L = np.concatenate([encoded.input_ids_L[: self.answer_at + 1], np.asarray(said, dtype=np.int64)])
        labels_L = np.full(len(input_ids_L), IGNORE_INDEX)
        if is_open:
            labels_L[-1] = 0  # any label: it marks the position
        return Encoded(input_ids_L, labels_L, encoded.frame_starts, encoded.frame_sources)


class Outcome(NamedTuple):
    """Token ids that the model gave under each protocol, the end token included if it came; None where the protocol was not run."""

    teacher_forcing: tuple[int, ...] | None
    greedy: tuple[int, ...] | None


class VisualTokens:
    """Visual tokens of frames by key. Those of haystack frames are kept, up to KEPT_BYTES in all, because the trials of a long haystack
    share most of their frames; what came first stays, since trials read their frames in order and would push out each other's.

    Args:
        encode: `keys -> [F, tokens_per_frame, D]`; asked only for frames that are not kept.
    """

    def __init__(self, encode: Callable[[list[FrameKey]], Tensor]):
        self._encode = encode
        self._kept: dict[int, Tensor] = {}

    def read(self, keys: Sequence[FrameKey]) -> Tensor:
        """Visual tokens [F * tokens_per_frame, D] of at least one frame."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        found: dict[FrameKey, Tensor] = dict(self._kept)
        if missing:
            found.update(zip(missing, self._encode(missing), strict=True))
        for key in missing:
            if isinstance(key, int) and len(self._kept) < KEPT_BYTES // found[key].nbytes:
                self._kept[key] = found[key].clone()  # not a view, which would keep the tensor of all frames
        return torch.cat([found[key] for key in keys])


class Examiner:
    """Asks questions of one model. Methods are collective over all ranks.

    Args:
        model: this rank's pipeline stage, weights loaded, not wrapped.
        predict: `(language model of the last stage, hidden states, labels_T) -> token ids at the labelled rows` (training.loss.predict).
        read_frames: uint8 [F, S, S, 3] of frame keys; called with this rank's frames only.
    """

    def __init__(
        self, model: LongVILA, groups: Groups, config: Config, *, predict: Predict, read_frames: Callable[[list[FrameKey]], np.ndarray]
    ):
        self._model, self._groups, self._predict, self._read_frames = model, groups, predict, read_frames
        self._place = Place.of(groups, sequence_parallel=config.parallel.sequence_parallel)
        self._tokens_per_frame, self._image_size = config.model.tokens_per_frame, config.model.vision.image_size
        self._visual = VisualTokens(self._encode_pixels)
        model.eval()

    def ask(self, questions: Sequence[Question], protocol: Protocol, *, tokens_per_row: int) -> list[Outcome]:
        """What the model says to each question; the same list on every rank.

        Several questions share a row of at most `tokens_per_row` tokens, each attended by itself; the rows are spread over dp.
        """
        rows = split_rows([question.max_tokens(protocol) for question in questions], tokens_per_row, self._place.dp_size)
        numbers = rows[self._place.dp_rank :: self._place.dp_size]
        found: dict[int, Outcome] = {}
        at_once = max(self._groups.mesh.pp_size, TOKENS_AT_ONCE // tokens_per_row)
        for first in range(0, len(numbers), at_once):
            part = numbers[first : first + at_once]
            outcomes = self._ask_rows([[questions[number] for number in row] for row in part], protocol)
            found.update(zip((number for row in part for number in row), outcomes, strict=True))
        shares: list[dict[int, Outcome]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, found)
        joined = {number: outcome for share in shares for number, outcome in share.items()}
        return [joined[number] for number in range(len(questions))]

    def _ask_rows(self, rows: list[list[Question]], protocol: Protocol) -> list[Outcome]:
        """What the model says to the questions of this rank's rows, row after row."""
        visual = [self._encode_frames(row) for row in rows]
        nothing = [[None] * len(row) for row in rows]
        forced = self._force(rows, visual) if protocol != "greedy" else nothing
        free = self._decode(rows, visual) if protocol != "teacher_forcing" else nothing
        return [Outcome(*pair) for pairs in zip(forced, free, strict=True) for pair in zip(*pairs, strict=True)]

    def _force(self, rows: list[list[Question]], visual: list[Tensor | None]) -> list[list[tuple[int, ...]]]:
        """Predicted ids at the answer's positions of each question of each row."""
        tokens = self._next_tokens([[question.encoded for question in row] for row in rows], visual)
        return [
            [tuple(part.tolist()) for part in np.split(found, np.cumsum([len(question.answer_ids) for question in row])[:-1])]
            for row, found in zip(rows, tokens, strict=True)
        ]

    def _decode(self, rows: list[list[Question]], visual: list[Tensor | None]) -> list[list[tuple[int, ...]]]:
        """Ids that the model says to each question of each row.

        A question that has ended stays in its row, so that the frames of the row, and which rank encoded them, stay the same.
        """
        said: list[list[list[int]]] = [[[] for _ in row] for row in rows]

        def is_open(question: Question, ids: list[int]) -> bool:
            return not (ids and ids[-1] == question.answer_ids[-1]) and len(ids) < len(question.answer_ids) + EXTRA_TOKENS

        while True:
            opened = [[is_open(*pair) for pair in zip(*pairs, strict=True)] for pairs in zip(rows, said, strict=True)]
            active = [number for number, flags in enumerate(opened) if any(flags)]
            if not active:
                return [[tuple(ids) for ids in row] for row in said]
            encoded = [
                [question.continued(ids, is_open=flag) for question, ids, flag in zip(rows[n], said[n], opened[n], strict=True)]
                for n in active
            ]
            for n, tokens in zip(active, self._next_tokens(encoded, [visual[n] for n in active]), strict=True):
                waiting = [ids for ids, flag in zip(said[n], opened[n], strict=True) if flag]
                for ids, token in zip(waiting, tokens.tolist(), strict=True):
                    ids.append(token)

    def _next_tokens(self, rows: list[list[Encoded]], visual: list[Tensor | None]) -> list[np.ndarray]:
        """The most likely token (int64) at each labelled position of each row, in order, on every rank that shares the rows."""
        packs = [self._pack(samples) for samples in rows]
        no_frames = torch.zeros(0, self._image_size, self._image_size, 3, dtype=torch.uint8, device=platform.device())
        batch: list[MicroBatch] = [build_micro_batch(pack, self._plan(pack), no_frames) for pack in packs]
        predicted = predict_batch(self._model, batch, predict=self._predict, visual=visual)
        asked = [np.flatnonzero(pack.labels_L() != IGNORE_INDEX) for pack in packs]
        found = [np.full(len(positions), -1) for positions in asked]
        if self._groups.is_last_stage:
            for positions, one, tokens, target in zip(asked, batch, predicted, found, strict=True):
                own = one.plan.row_source_T[(one.labels_T != IGNORE_INDEX).cpu().numpy()]
                target[np.searchsorted(positions, own)] = tokens.cpu().numpy()
        joint = torch.from_numpy(np.concatenate(found)).to(platform.device())
        dist.all_reduce(joint, op=dist.ReduceOp.MAX, group=self._groups.replica)
        assert bool((joint >= 0).all()), "a labelled position was predicted by no rank"
        return np.split(joint.cpu().numpy(), np.cumsum([len(positions) for positions in asked])[:-1])

    @torch.no_grad()
    def _encode_frames(self, row: list[Question]) -> Tensor | None:
        """Visual tokens [V, D] of this rank's frames of the row, on the first pipeline stage."""
        place = self._place
        if not place.holds_frames:
            return None
        owned = self._plan(self._pack([question.encoded for question in row])).frames
        keys = [key for question in row for key in question.frames][owned.start : owned.stop]
        return self._visual.read(keys) if keys else self._encode_pixels([]).flatten(0, 1)

    def _encode_pixels(self, keys: list[FrameKey]) -> Tensor:
        """Visual tokens [F, tokens_per_frame, D] of frames. Collective over tp."""
        place = self._place
        shape = (len(keys), self._image_size, self._image_size, 3)
        frames = torch.from_numpy(self._read_frames(keys)) if place.decodes and keys else torch.empty(shape, dtype=torch.uint8)
        frames = frames.to(platform.device())
        if place.tp.size() > 1 and keys:
            dist.broadcast(frames, group=place.tp, group_src=0)
        return self._model.encode_frames(frames).unflatten(0, (len(keys), self._tokens_per_frame))

    def _pack(self, samples: Sequence[Encoded]) -> Row:
        numbers = tuple(range(len(samples)))
        return Row(numbers, tuple(map(str, numbers)), tuple(samples), self._tokens_per_frame)

    def _plan(self, pack: Row) -> RankPlan:
        place = self._place
        return _plan_rows(pack.spec, place.ulysses_size, place.ring_size, place.row_multiple)[place.cp_rank]


@lru_cache(maxsize=4)
def _plan_rows(spec: RowSpec, ulysses_size: int, ring_size: int, row_multiple: int) -> list[RankPlan]:
    """Planning a million tokens takes half a second, and most trials of a length have the same plan."""
    return plan_row(spec, ulysses_size=ulysses_size, ring_size=ring_size, row_multiple=row_multiple)
