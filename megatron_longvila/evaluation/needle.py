"""V-NIAH: a picture hidden among the frames of a long video, and a question only that picture answers.

After the visual needle test of LongVA and LongVILA: https://arxiv.org/abs/2406.16852, https://arxiv.org/abs/2408.10188.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longvila.config import Config
from megatron_longvila.data.conversation import encode
from megatron_longvila.data.media import MediaError, resolve_below
from megatron_longvila.data.text import Tokenizer
from megatron_longvila.evaluation.needle_grid import Trial, distractor_places, needle_place
from megatron_longvila.evaluation.needle_haystack import FrameKey, Haystack
from megatron_longvila.evaluation.needle_protocols import Question

ENDLESS_STEP = 64  # frames between the starts of two trials where the material has no end


@dataclass(frozen=True)
class Needle:
    """A picture and what is asked about it; `distractors` are pictures that look like an answer and are none."""

    id: str
    question: str
    answer: str
    image: Path
    distractors: tuple[Path, ...] = ()


def read_needles(path: Path) -> list[Needle]:
    """Needles of a JSONL file: {"id", "image", "question", "answer", "distractors": [optional]}; pictures relative to the file.

    Raises:
        ValueError: the file or a picture is missing, or a line is not such an object.
    """
    needles = []
    for where, record in needle_records(path, ("id", "image", "question", "answer")):
        distractors = record.get("distractors", [])
        if not isinstance(distractors, list) or not all(isinstance(one, str) and one for one in distractors):
            raise ValueError(f"{where}: `distractors` must be a list of picture paths, not {distractors!r}")
        try:
            image, *others = [resolve_below(path.parent, one) for one in (record["image"], *distractors)]
        except MediaError as error:
            raise ValueError(f"{where}: {error}") from None
        needles.append(Needle(record["id"], record["question"], record["answer"], image, tuple(others)))
    return needles


def needle_records(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line of a needle file, with non-empty texts in all `fields` and no id twice. ValueError otherwise."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--needles {path} cannot be read: {error}") from None
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        where = f"--needles {path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        wrong = [
            name for name in fields if not isinstance(record, dict) or not isinstance(record.get(name), str) or not record[name].strip()
        ]
        if wrong:
            raise ValueError(f"{where}: {', '.join(wrong)} must be a text; a line is an object with {', '.join(fields)}")
        if record["id"] in seen:
            raise ValueError(f"{where}: id {record['id']!r} was given before; each needle needs its own")
        seen.add(record["id"])
        yield where, record


def place_frames(trial: Trial, needle: Needle, haystack: Haystack, trials_per_cell: int) -> tuple[FrameKey, ...]:
    """Key of each frame of a trial: haystack frames in order, the needle at its depth, distractors at seeded other places.

    The trials of a cell start at evenly spread frames of the material, the first one at its beginning, so that they differ and yet share
    most frames of a long haystack. In the control the frame at the needle's place is the haystack's own.
    """
    length = trial.cell.length
    start = trial.number * (haystack.num_frames // trials_per_cell if haystack.num_frames else ENDLESS_STEP)
    # A frame has one key however often it is shown, so that whoever keeps what was made of it finds it again.
    frames: list[FrameKey] = [number % haystack.num_frames if haystack.num_frames else number for number in range(start, start + length)]
    needle_at = needle_place(length, trial.cell.depth)
    for place, picture in zip(distractor_places(trial, len(needle.distractors), needle_at), needle.distractors, strict=False):
        frames[place] = picture
    if not trial.cell.control:
        frames[needle_at] = needle.image
    return tuple(frames)


def video_question(needle: Needle, frames: tuple[FrameKey, ...], tokenizer: Tokenizer, config: Config) -> Question:
    """The question as a training sample would ask it: one video of `frames`, then the text. ValueError if it cannot be encoded."""
    turns = [{"from": "human", "value": f"<video>\n{needle.question}"}, {"from": "gpt", "value": needle.answer}]
    sizes = {"frames_per_medium": [len(frames)], "tokens_per_frame": config.model.tokens_per_frame}
    return Question(encode(turns, tokenizer, config.data.template, **sizes), frames)
