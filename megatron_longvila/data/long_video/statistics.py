"""Numbers and pictures of the set: domains, question types, durations, lengths, and what it cost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from megatron_longvila.data.long_video.prompts import DOMAINS, QUESTION_TYPES
from megatron_longvila.data.long_video.records import read_report, read_stage
from megatron_longvila.data.output import Progress, write_atomically
from megatron_longvila.data.text import load_tokenizer

_MINUTE_EDGES = (0, 1, 2, 3, 5, 10, 20, 30, 60, 120, 240)
_LENGTH_EDGES = (0, 3, 6, 12, 25, 50, 100, 200, 400)


def statistics(work: Path, tokenizer_path: Path | None, progress: Progress) -> dict:
    """WORK/stats.json and WORK/stats.png over what `export` wrote. Tokens are counted with a tokenizer, words without.

    Raises:
        WorkError: `export` has not run. ValueError: no tokenizer is there.
    """
    count = _counter(tokenizer_path)
    num_rows, used, spans_s, types = 0, set(), [], Counter()
    texts: dict[str, list[int]] = {"human": [], "gpt": []}
    for row in progress(read_stage(work, "export"), read_report(work, "export")["rows"], "stats"):
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
        "minutes": _histogram([duration / 60 for duration in durations], _MINUTE_EDGES),
        "span_s": _spread(spans_s),
        "unit": "tokens" if tokenizer_path else "words",
        "question_length": _spread(texts["human"]),
        "answer_length": _spread(texts["gpt"]),
        "question_lengths": _histogram(texts["human"], _LENGTH_EDGES),
        "answer_lengths": _histogram(texts["gpt"], _LENGTH_EDGES),
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


def _histogram(values: list[float], edges: tuple[int, ...]) -> dict[str, int]:
    """Counts by "low-high", low counts and high does not; the last one is open."""
    names = [f"{low}-{high}" for low, high in zip(edges, edges[1:], strict=False)] + [f"{edges[-1]}+"]
    places = np.searchsorted(edges, values, side="right") - 1
    return {name: int((places == number).sum()) for number, name in enumerate(names)}


def _spent(work: Path, stage: str) -> dict:
    report = read_report(work, stage)
    return {name: report[name] for name in ("model", "records", "rejected", "usage", "dollars", "faults")}


def _draw(report: dict, path: Path) -> None:
    """The set at a glance: domains and question types as rings, durations and lengths of texts as bars."""
    from matplotlib.figure import Figure  # slow to import, and only this needs it

    figure = Figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1)  # on their own, or the legends above would narrow the bars below
    (domains, types), (minutes, lengths) = above.subplots(1, 2), below.subplots(1, 2)
    _draw_ring(domains, report["domains"], f"{report['videos']} videos by domain")
    _draw_ring(types, report["question_types"], f"{sum(report['question_types'].values())} questions by type")
    minutes.bar(list(report["minutes"]), list(report["minutes"].values()), color="tab:blue")
    minutes.set(title=f"{report['hours']:.2f} hours in {report['clips']} clips", xlabel="minutes of a video", ylabel="videos")
    places = np.arange(len(report["answer_lengths"]))
    for shift, name in ((-0.2, "question_lengths"), (0.2, "answer_lengths")):
        lengths.bar(places + shift, list(report[name].values()), 0.4, label=name.removesuffix("_lengths") + "s")
    total = report["question_length"]["sum"] + report["answer_length"]["sum"]
    lengths.set(title=f"{total:.0f} {report['unit']} in {report['rows']} rows", xlabel=f"{report['unit']} of a text", ylabel="texts")
    lengths.set_xticks(places, list(report["answer_lengths"]))
    lengths.legend()
    for axis in (minutes, lengths):
        axis.tick_params(axis="x", rotation=30)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.2, metadata={"Software": None})


def _draw_ring(axis, counts: dict[str, int], title: str) -> None:
    """Shares that are not zero, clockwise from above; the legend names them, since labels of small shares would overlap."""
    from matplotlib import colormaps

    total = max(1, sum(counts.values()))
    shown = {name: (count, colormaps["tab20"](2 * place % 19)) for place, (name, count) in enumerate(counts.items()) if count}
    shares, colours = [count for count, _ in shown.values()], [colour for _, colour in shown.values()]
    style = {"width": 0.4, "edgecolor": "white"}
    wedges = axis.pie(shares, colors=colours, wedgeprops=style, startangle=90, counterclock=False)[0] if shown else []
    labels = [f"{name}: {count} ({count / total:.1%})" for name, (count, _) in shown.items()]
    axis.legend(wedges, labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    axis.set_title(title)
