"""Numbers and pictures of the set: domains, question types, durations, lengths, and what it cost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from megatron_longvila.data.long_video.prompts import DOMAINS, QUESTION_TYPES
from megatron_longvila.data.long_video.records import read_report, read_stage
from megatron_longvila.data.output import write_atomically
from megatron_longvila.data.text import load_tokenizer

_MINUTE_EDGES = (0, 1, 2, 3, 5, 10, 20, 30, 60, 120, 240)


def statistics(work: Path, tokenizer_path: Path | None) -> dict:
    """WORK/stats.json and WORK/stats.png over what `export` wrote. Tokens are counted with a tokenizer, words without.

    Raises:
        WorkError: `export` has not run. ValueError: no tokenizer is there.
    """
    count = _counter(tokenizer_path)
    num_rows, used, spans_s, types = 0, set(), [], Counter()
    texts: dict[str, list[int]] = {"human": [], "gpt": []}
    for row in read_stage(work, "export"):
        num_rows += 1
        used.add(row["video"])
        for one in row["evidence"]:
            types[one["type"]] += 1
            spans_s.append(one["end_s"] - one["start_s"])
        for turn in row["conversations"]:
            texts[turn["from"]].append(count(turn["value"].removeprefix("<video>\n")))
    durations, num_clips = [], 0
    for video in read_stage(work, "segment"):
        if video["video"] in used:
            durations.append(video["duration_s"])
            num_clips += len(video["clips"])
    domains = Counter(record["domain"] for record in read_stage(work, "summarize") if record["video"] in used)
    report = {
        "rows": num_rows,
        "videos": len(durations),
        "hours": round(sum(durations) / 3600, 4),
        "clips": num_clips,
        "domains": {name: domains[name] for name in DOMAINS},
        "question_types": {name: types[name] for name in QUESTION_TYPES},
        "duration_s": _spread(durations),
        "minutes": _histogram([duration / 60 for duration in durations]),
        "span_s": _spread(spans_s),
        "unit": "tokens" if tokenizer_path else "words",
        "question_length": _spread(texts["human"]),
        "answer_length": _spread(texts["gpt"]),
        "stages": {stage: _spent(work, stage) for stage in ("caption", "summarize", "qa")},
    }
    write_atomically(work / "stats.json", json.dumps(report, indent=1).encode() + b"\n")
    _draw(report, work / "stats.png")
    return report


def _counter(tokenizer_path: Path | None):
    if tokenizer_path is None:
        return lambda text: len(text.split())
    tokenizer = load_tokenizer(tokenizer_path)
    return lambda text: len(tokenizer.encode(text))


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"count": 0}
    low, middle, high = np.percentile(values, (5, 50, 95))
    spread = {"min": min(values), "p5": low, "median": middle, "p95": high, "max": max(values), "sum": sum(values)}
    return {"count": len(values), **{name: round(float(value), 3) for name, value in spread.items()}}


def _histogram(minutes: list[float]) -> dict[str, int]:
    names = [f"{low}-{high}" for low, high in zip(_MINUTE_EDGES, _MINUTE_EDGES[1:], strict=False)] + [f"{_MINUTE_EDGES[-1]}+"]
    places = np.searchsorted(_MINUTE_EDGES, minutes, side="right") - 1
    return {name: int((places == number).sum()) for number, name in enumerate(names)}


def _spent(work: Path, stage: str) -> dict:
    report = read_report(work, stage)
    return {name: report[name] for name in ("model", "records", "rejected", "usage", "dollars", "faults")}


def _draw(report: dict, path: Path) -> None:
    """The set at a glance: domains and question types as rings, durations and answer types as bars."""
    from matplotlib.figure import Figure  # slow to import, and only this needs it

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, name, title in ((axes[0], "domains", f"{report['videos']} videos"), (axes[1], "question_types", "questions")):
        shares = {label: number for label, number in report[name].items() if number}
        if shares:
            labels = [f"{label} ({number})" for label, number in shares.items()]
            axis.pie(list(shares.values()), labels=labels, wedgeprops={"width": 0.4}, textprops={"fontsize": 8}, startangle=90)
        axis.set_title(title if name == "domains" else f"{sum(shares.values())} {title}")
    axes[2].bar(list(report["minutes"]), list(report["minutes"].values()))
    axes[2].set(title=f"{report['hours']:.2f} hours", xlabel="minutes", ylabel="videos")
    axes[2].tick_params(axis="x", rotation=45)
    figure.savefig(path, dpi=120, metadata={"Software": None})
