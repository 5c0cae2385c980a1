"""What a needle test found: a record per trial, kept cell by cell so that a stopped test goes on, and the summary made from them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_longvila.checkpoint.sharded import write_text
from megatron_longvila.evaluation.answers import wilson_interval
from megatron_longvila.evaluation.needle_grid import Cell

RECORDS, SETTINGS = "trials.jsonl", "settings.json"
PROTOCOLS = ("teacher_forcing", "greedy")


class Records:
    """The trials of a result folder. A cell is written when all its trials are done, in one step: a kill loses no finished cell.

    Args:
        settings: everything that decides what a trial asks and what the model says, as JSON values.
        restart: throw earlier trials away.

    Attributes:
        hash: of the settings; each record carries it.
        trials: all records, in the order they were added.

    Raises:
        ValueError: the folder holds trials of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, restart: bool = False):
        self._path = folder / RECORDS
        self.hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.trials: list[dict[str, Any]] = []
        if self._path.exists() and not restart:
            self.trials = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
            if any(trial["settings"] != self.hash for trial in self.trials):
                raise ValueError(
                    f"--output {folder} holds trials of another test ({_difference(folder / SETTINGS, settings)}); give another --output, "
                    "or --restart to throw those trials away"
                )
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        write_text(folder / SETTINGS, json.dumps({"hash": self.hash, **settings}, indent=1) + "\n")

    @property
    def done(self) -> set[tuple[int, float, bool]]:
        """Keys of the finished cells."""
        return {_cell(trial).key for trial in self.trials}

    def add(self, cell: Cell, trials: Iterable[dict[str, Any]]) -> None:
        """Add all trials of a cell and put them on disk."""
        place = {"settings": self.hash, "length": cell.length, "depth": cell.depth, "control": cell.control}
        self.trials += [place | trial for trial in trials]
        self._write()

    def _write(self) -> None:
        write_text(self._path, "".join(json.dumps(trial, ensure_ascii=False) + "\n" for trial in self.trials))


def _difference(path: Path, settings: dict[str, Any]) -> str:
    """Which settings differ from the recorded ones."""
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError):
        return f"{path.name} is missing or damaged"
    names = [name for name in settings if json.loads(json.dumps(settings[name])) != earlier.get(name)]
    return f"{', '.join(names) or 'its version'} changed"


def _cell(trial: dict[str, Any]) -> Cell:
    return Cell(trial["length"], trial["depth"], trial["control"])


def is_correct(trial: dict[str, Any]) -> bool:
    """Whether the answer is right, by teacher forcing where that was run."""
    return next(trial[name]["correct"] for name in PROTOCOLS if name in trial)


def disagrees(trial: dict[str, Any]) -> bool:
    """Whether the two protocols give different verdicts."""
    return len({trial[name]["correct"] for name in PROTOCOLS if name in trial}) > 1


def summarise(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies of all trials with a needle, by cell and by length, beside what an answer that never looks would reach.

    Returns:
        needle_accuracy, with `low` and `high` of Wilson's 99% interval; trials; chance: the share that the best constant answer gets
        right; chance_given_question: that of the best answer to each question text (it says something only where questions repeat);
        no_needle_accuracy: of the control, None if it was not run; disagreements: trials, control included, on which the protocols
        differ; lengths, depths, accuracy_by_length; cells: {length, depth, trials, accuracy, teacher_forcing, greedy, no_needle,
        disagreements}, None where a protocol or the control was not run; seconds: spent on all trials.

    Raises:
        ValueError: there is no trial with a needle.
    """
    asked = [trial for trial in trials if not trial["control"]]
    control = [trial for trial in trials if trial["control"]]
    if not asked:
        raise ValueError("no trial with a needle was run")
    correct = sum(map(is_correct, asked))
    low, high = wilson_interval(correct, len(asked))
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for trial in asked:
        by_question[trial["question"]][trial["expected"]] += 1
    by_length: dict[int, list[dict]] = defaultdict(list)
    for trial in sorted(asked, key=lambda trial: trial["length"]):
        by_length[trial["length"]].append(trial)
    return {
        "needle_accuracy": correct / len(asked),
        "low": low,
        "high": high,
        "trials": len(asked),
        "correct": correct,
        "chance": Counter(trial["expected"] for trial in asked).most_common(1)[0][1] / len(asked),
        "chance_given_question": sum(counts.most_common(1)[0][1] for counts in by_question.values()) / len(asked),
        "no_needle_accuracy": _accuracy(control),
        "no_needle_trials": len(control),
        "disagreements": sum(map(disagrees, trials)),
        "lengths": list(by_length),
        "depths": sorted({trial["depth"] for trial in asked}),
        "accuracy_by_length": {str(length): _accuracy(part) for length, part in by_length.items()},
        "cells": _cells(asked, control),
        "seconds": round(sum(trial["seconds"] for trial in trials), 3),
    }


def _cells(asked: list[dict], control: list[dict]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, float], list[dict]] = defaultdict(list)
    for trial in asked:
        groups[trial["length"], trial["depth"]].append(trial)
    cells = []
    for (length, depth), part in sorted(groups.items()):
        beside = [trial for trial in control if (trial["length"], trial["depth"]) == (length, depth)]
        cells.append(
            {
                "length": length,
                "depth": depth,
                "trials": len(part),
                "accuracy": _accuracy(part),
                **{name: _accuracy([trial for trial in part if name in trial], name) for name in PROTOCOLS},
                "no_needle": _accuracy(beside),
                "disagreements": sum(map(disagrees, part + beside)),
            }
        )
    return cells


def _accuracy(trials: Sequence[dict], protocol: str | None = None) -> float | None:
    if not trials:
        return None
    return sum(trial[protocol]["correct"] if protocol else is_correct(trial) for trial in trials) / len(trials)


def cells_csv(summary: dict[str, Any]) -> str:
    """The cells of a summary as a table; empty where something was not run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(summary["cells"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary["cells"])
    return text.getvalue()
