"""The text needle: a sentence hidden in filler sentences, and a question only that sentence answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longvila.data.conversation import Encoded, encode
from megatron_longvila.data.text import Tokenizer
from megatron_longvila.evaluation.needle import needle_records
from megatron_longvila.evaluation.needle_grid import Trial
from megatron_longvila.evaluation.needle_protocols import Question
from megatron_longvila.parallel.plan import IGNORE_INDEX


@dataclass(frozen=True)
class TextNeedle:
    """Sentences and what is asked about them; `distractors` are sentences that look like an answer and are none."""

    id: str
    question: str
    answer: str
    facts: str
    distractors: tuple[str, ...] = ()


def read_text_needles(path: Path) -> list[TextNeedle]:
    """Needles of a JSONL file: {"id", "facts", "question", "answer", "distractors": [optional]}. ValueError names a line that is none."""
    needles = []
    for where, record in needle_records(path, ("id", "facts", "question", "answer")):
        distractors = record.get("distractors", [])
        if not isinstance(distractors, list) or not all(isinstance(one, str) and one.strip() for one in distractors):
            raise ValueError(f"{where}: `distractors` must be a list of sentences, not {distractors!r}")
        needles.append(TextNeedle(record["id"], record["question"], record["answer"], record["facts"], tuple(distractors)))
    return needles


class TextHaystack:
    """Filler sentences, one a line of a file; each trial takes them in its own seeded order, over and over until the passage is full.

    Attributes:
        num_tokens: of all sentences; a longer passage repeats some.

    Raises:
        ValueError: the file cannot be read or holds no sentence.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--haystack {path} cannot be read as text: {error}") from None
        self._sentences = [line.strip() for line in text.splitlines() if line.strip()]
        if not self._sentences:
            raise ValueError(f"--haystack {path} holds no sentence; give a text file with one filler sentence a line")
        self._tokenizer, self._name, self._hash = tokenizer, path.name, hashlib.sha256(text.encode()).hexdigest()[:16]
        self._sizes = np.asarray([len(tokenizer.encode(sentence)) for sentence in self._sentences])
        self.num_tokens = int(self._sizes.sum())

    def describe(self) -> dict[str, Any]:
        """What decides the passages, as JSON values."""
        return {"kind": "text", "file": self._name, "sentences": len(self._sentences), "tokens": self.num_tokens, "hash": self._hash}

    def passage(self, trial: Trial, needle: TextNeedle) -> str:
        """At most `trial.cell.length` tokens of whole sentences, as many as fit, with the facts at the sentence end next to the depth.

        Distractors stand before filler sentences at seeded places. In the control the facts are left out and filler takes their room.

        Raises:
            ValueError: the facts alone are longer than that.
        """
        length, draw = trial.cell.length, np.random.default_rng(list(trial.seed))
        order = draw.permutation(len(self._sentences))
        places = draw.random(len(needle.distractors))
        inserted = list(zip(places, needle.distractors, strict=True)) + [(trial.cell.depth, needle.facts)] * (not trial.cell.control)
        room = length - sum(len(self._tokenizer.encode(text)) for _, text in inserted)
        if room < 0:
            raise ValueError(
                f"--lengths {length}: needle {needle.id!r} and its distractors alone take {length - room} tokens; ask for longer texts"
            )
        sizes = np.concatenate([[0], np.cumsum(np.resize(self._sizes[order], room // max(1, int(self._sizes.min())) + 1))])
        # Sentences joined by spaces can have a token more or less than apart, so the count is only a start.
        count = int(np.searchsorted(sizes, room, side="right")) - 1
        while count and len(self._tokenizer.encode(self._join(order, sizes, count, inserted))) > length:
            count -= 1
        while count + 1 < len(sizes) and len(self._tokenizer.encode(self._join(order, sizes, count + 1, inserted))) <= length:
            count += 1
        return self._join(order, sizes, count, inserted)

    def _join(self, order: np.ndarray, sizes: np.ndarray, count: int, inserted: list[tuple[float, str]]) -> str:
        """`count` sentences with texts inserted at depths (fractions of the filler's tokens), at the nearest end of a sentence."""
        parts: list[list[str]] = [[] for _ in range(count + 1)]
        for depth, text in inserted:
            parts[int(np.abs(sizes[: count + 1] - depth * sizes[count]).argmin())].append(text)
        words = [word for number in range(count) for word in (*parts[number], self._sentences[order[number % len(order)]])]
        return " ".join([*words, *parts[count]])


def text_question(needle: TextNeedle, passage: str, tokenizer: Tokenizer, template: str | None) -> Question:
    """The passage and the question with its answer.

    Args:
        template: a chat template: the passage, a new line and the question are the user's turn. None: plain text, the three joined by
            spaces and ended by the end-of-sequence token, as tools/preprocess_text.py ends a document, for a model that knows no chat.

    Raises:
        ValueError: it cannot be encoded.
    """
    if template is not None:
        turns = [{"from": "human", "value": f"{passage}\n{needle.question}"}, {"from": "gpt", "value": needle.answer}]
        return Question(encode(turns, tokenizer, template, frames_per_medium=(), tokens_per_frame=1))
    if tokenizer.eos_id is None:
        raise ValueError("--plain_text ends answers with the end-of-sequence token, and the tokenizer declares none; ask without it")
    prompt = f"{passage} {needle.question}"
    prompt_ids, whole_ids = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {needle.answer}")
    if whole_ids[: len(prompt_ids)] != prompt_ids or len(whole_ids) == len(prompt_ids):
        raise ValueError(
            f"needle {needle.id!r}: the tokenizer joins the end of the question and the start of the answer into one token; "
            "end the question with a mark (--plain_text continues it with a space and the answer)"
        )
    input_ids_L = np.asarray([*whole_ids, tokenizer.eos_id], dtype=np.int64)
    labels_L = np.full(len(input_ids_L), IGNORE_INDEX)
    num_trained = len(whole_ids) - len(prompt_ids) + 1
    labels_L[-1 - num_trained : -1] = input_ids_L[-num_trained:]
    return Question(Encoded(input_ids_L, labels_L, (), ()))
