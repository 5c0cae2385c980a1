"""A conversation and its media as token ids, labels and frame positions; nothing is decoded, the length is known from the index alone.

A template turns the conversation into segments (text, special token, medium); each segment is encoded by itself and knows whether it is
trained on, so ids and labels are aligned by construction and nothing is ever searched for in the ids. Trained are the answers and the token
that ends each answer, nothing else.

Shapes: L tokens of one sample, visual tokens included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from megatron_longvila.data.text import Tokenizer
from megatron_longvila.parallel.plan import IGNORE_INDEX, PLACEHOLDER_ID

MARKS = re.compile("<image>|<video>")
CHATML_SYSTEM = "You are a helpful assistant."  # Qwen2's chat template


class SampleTooLong(ValueError):
    """A sample has more tokens than a row may hold; it is skipped and counted, never cut."""


class Turn(NamedTuple):
    """One turn; `role` is system, user or assistant."""

    role: str
    text: str


class Segment(NamedTuple):
    """A piece of the sequence.

    kind `text` and `marked` hold text (marks expand in `marked` only), `special` the name of a special token, `medium` the number of a
    medium; `newline`, `bos` and `eos` are the tokenizer's own and have no common name.
    """

    kind: Literal["text", "marked", "special", "newline", "bos", "eos", "medium"]
    value: str | int = ""
    trained: bool = False


@dataclass(frozen=True, eq=False)
class Encoded:
    """One sample, ready for a row.

    Attributes:
        input_ids_L: int64; PLACEHOLDER_ID at every visual token.
        labels_L: int64; the token after position i where that one is trained, else IGNORE_INDEX (always at the last position).
        frame_starts: index of the first visual token of each frame, in increasing order.
        frame_sources: (medium of the sample, frame of that medium) of each frame.
        piece_lengths: tokens of the pieces that are attended and numbered each by itself; empty for a sample that is one piece.
    """

    input_ids_L: np.ndarray
    labels_L: np.ndarray
    frame_starts: tuple[int, ...]
    frame_sources: tuple[tuple[int, int], ...]
    piece_lengths: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids_L)


def encode(
    conversations: Sequence[dict],
    tokenizer: Tokenizer,
    template: str,
    *,
    frames_per_medium: Sequence[int],
    tokens_per_frame: int,
    context_length: int | None = None,
    answer_next: bool = False,
) -> Encoded:
    """Encode one sample.

    Args:
        conversations: LLaVA turns, {"from": "system" | "human" | "gpt", "value": text}.
        template: a name of TEMPLATES.
        frames_per_medium: frames of each medium, in the order of the marks in human turns; empty makes every mark plain text.
        tokens_per_frame: visual tokens of a frame; each frame is followed by the tokenizer's newline tokens.
        context_length: most tokens a sample may have.
        answer_next: end with the opening of an assistant turn, for generation.

    Raises:
        SampleTooLong: more than `context_length` tokens.
        ValueError: unknown template or turn, marks that do not match the media, a special token the tokenizer lacks.
    """
    segments = find_template(template)(read_turns(conversations), answer_next)
    if frames_per_medium:
        segments = list(_expand_marks(segments, len(frames_per_medium)))
    frame_ids = [PLACEHOLDER_ID] * tokens_per_frame + list(tokenizer.newline_ids)
    _check_length(len(frame_ids) * sum(frames_per_medium), context_length)  # before gigabytes of placeholders are made

    ids: list[int] = []
    trained: list[bool] = []
    starts: list[int] = []
    sources: list[tuple[int, int]] = []
    for segment in _join_text(segments):
        if segment.kind == "medium":
            for frame in range(frames_per_medium[segment.value]):
                starts.append(len(ids))
                sources.append((segment.value, frame))
                ids += frame_ids
        else:
            ids += _segment_ids(segment, tokenizer)
        trained += [segment.trained] * (len(ids) - len(trained))
    _check_length(len(ids), context_length)
    if not ids:
        raise ValueError("the sample has no tokens")

    input_ids_L = np.asarray(ids, dtype=np.int64)
    labels_L = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    labels_L[:-1] = np.where(np.asarray(trained[1:], dtype=bool), input_ids_L[1:], IGNORE_INDEX)
    return Encoded(input_ids_L, labels_L, tuple(starts), tuple(sources))


def read_turns(conversations: Sequence[dict]) -> list[Turn]:
    """Turns of a LLaVA conversation; ValueError for an unknown speaker, a value that is not text, or a system turn that is not first."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    turns = []
    for index, turn in enumerate(conversations):
        speaker, value = turn.get("from"), turn.get("value")
        if speaker not in roles or not isinstance(value, str):
            raise ValueError(
                f"turn {index} must be {{'from': one of {sorted(roles)}, 'value': text}}, "
                f"not from={speaker!r}, value={type(value).__name__}"
            )
        if speaker == "system" and index > 0:
            raise ValueError(f"turn {index} is a system turn; only the first may be")
        turns.append(Turn(roles[speaker], value))
    return turns


def find_template(name: str) -> Template:
    """The template called `name`; ValueError with the known names otherwise."""
    if name not in TEMPLATES:
        raise ValueError(f"data.template={name!r} is unknown; known templates are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def check_template(name: str, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that lacks a special token of the template, before any data is read (ValueError)."""
    for segment in find_template(name)([Turn("system", ""), Turn("user", ""), Turn("assistant", "")], False):
        _segment_ids(segment, tokenizer)


def _chatml(turns: list[Turn], answer_next: bool) -> list[Segment]:
    """<|im_start|>role newline text <|im_end|> newline. Source: chat template of Qwen2."""
    if not turns or turns[0].role != "system":
        turns = [Turn("system", CHATML_SYSTEM), *turns]
    segments = []
    for turn in turns:
        segments += [Segment("special", "<|im_start|>"), Segment("text", f"{turn.role}\n"), _content(turn)]
        segments += [Segment("special", "<|im_end|>", turn.role == "assistant"), Segment("text", "\n")]
    return segments + ([Segment("special", "<|im_start|>"), Segment("text", "assistant\n")] if answer_next else [])


def _llama3(turns: list[Turn], answer_next: bool) -> list[Segment]:
    """<|begin_of_text|>, then per turn a header and the trimmed text, ended by <|eot_id|>. Source: chat template of Llama-3-Instruct."""

    def header(role: str) -> list[Segment]:
        return [
            Segment("special", "<|start_header_id|>"),
            Segment("text", role),
            Segment("special", "<|end_header_id|>"),
            Segment("text", "\n\n"),
        ]

    segments = [Segment("special", "<|begin_of_text|>")]
    for turn in turns:
        content = _content(Turn(turn.role, turn.text.strip()))
        segments += [*header(turn.role), content, Segment("special", "<|eot_id|>", turn.role == "assistant")]
    return segments + (header("assistant") if answer_next else [])


def _plain(turns: list[Turn], answer_next: bool) -> list[Segment]:
    """The turns' texts with a newline between them; each answer ends with the end-of-sequence token. Needs no chat tokens."""
    segments = [Segment("bos")]
    for index, turn in enumerate(turns):
        segments += [Segment("newline")] * (index > 0) + [_content(turn)] + [Segment("eos", trained=True)] * (turn.role == "assistant")
    return segments + [Segment("newline")] * (answer_next and bool(turns))


Template = Callable[[list[Turn], bool], list[Segment]]
TEMPLATES: dict[str, Template] = {"chatml": _chatml, "llama3": _llama3, "plain": _plain}


def _content(turn: Turn) -> Segment:
    """Only a user's marks stand for media; only an assistant's text is trained."""
    return Segment("marked" if turn.role == "user" else "text", turn.text, turn.role == "assistant")


def _segment_ids(segment: Segment, tokenizer: Tokenizer) -> list[int]:
    if segment.kind == "special":
        return [tokenizer.special_id(segment.value)]
    if segment.kind == "newline":
        return list(tokenizer.newline_ids)
    if segment.kind == "bos":
        return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if segment.kind == "eos":
        if tokenizer.eos_id is None:
            raise ValueError("the tokenizer declares no end-of-sequence token, which ends each answer of data.template='plain'")
        return [tokenizer.eos_id]
    return tokenizer.encode(segment.value)


def _check_length(num_tokens: int, context_length: int | None) -> None:
    if context_length is not None and num_tokens > context_length:
        raise SampleTooLong(
            f"{num_tokens} tokens or more, but data.context_length={context_length}; raise it, or lower data.video.num_frames"
        )


def _expand_marks(segments: list[Segment], num_media: int) -> Iterator[Segment]:
    """Cut marked text at its marks; the n-th mark of the sample becomes medium n."""
    found = 0
    for segment in segments:
        if segment.kind != "marked":
            yield segment
            continue
        position = 0
        for mark in MARKS.finditer(segment.value):
            yield Segment("text", segment.value[position : mark.start()])
            yield Segment("medium", found)
            found, position = found + 1, mark.end()
        yield Segment("text", segment.value[position:])
    if found != num_media:
        raise ValueError(f"{found} <image> or <video> marks in the human turns, but {num_media} media")


def _join_text(segments: list[Segment]) -> Iterator[Segment]:
    """Drop empty text and join neighbours that are not trained: "user\\n" and the question are tokenised as one string, as the text of a
    chat template is. An answer is always encoded alone, because generation starts from its header alone."""
    pending = ""
    for segment in segments:
        is_text = segment.kind in ("text", "marked")
        if is_text and not segment.trained:
            pending += segment.value
            continue
        if pending:
            yield Segment("text", pending)
            pending = ""
        if not is_text or segment.value:
            yield segment
    if pending:
        yield Segment("text", pending)
