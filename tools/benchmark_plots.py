"""Pictures of the benchmarks' rows: bars of speed by length or frames, lines of the fraction of what no communication would allow."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from pathlib import Path

CEILING = "no communication"


def plot_attention(rows: list[dict], path: Path) -> list[Path]:
    """One picture per work and number of hosts, beside `path`; a panel per head count. Medians over repeats. Returns the files.

    Rows of simulated ranks, which are all ceilings, are drawn each by itself.
    """
    simulated = next((f", {row['simulated_ranks']} simulated ranks" for row in rows if "simulated_ranks" in row), "")
    rows = [{**row, "scheme": row["scheme"].removeprefix(f"{CEILING}, ")} for row in rows] if simulated else rows
    colors, written = scheme_colors(rows), []
    for work, hosts in sorted({(row["work"], row["hosts"]) for row in rows}):
        chosen = [row for row in rows if (row["work"], row["hosts"]) == (work, hosts)]
        panels = {
            f"{work}, heads {heads}{simulated}": [{**row, "place": row["seq_len"]} for row in chosen if row["heads"] == heads]
            for heads in sorted({row["heads"] for row in chosen}, reverse=True)
        }
        target = path.with_name(f"{path.stem}_{work.replace(' ', '_').replace('+', '_')}_hosts{hosts}.png")
        written.append(_picture(panels, colors, "tokens", "causal TFLOP/s per GPU", target))
    return written


def plot_front(rows: list[dict], path: Path) -> list[Path]:
    """One picture of tools/benchmark_mmsp.py's rows beside `path`; a panel per setting, bars by frames. Returns the files.

    ValueError for rows of attention.
    """
    panels = defaultdict(list)
    for row in rows:
        work = re.fullmatch(r"(front, .*), (\d+) frames", row["work"])
        if work is None:
            raise ValueError(f"{path} holds rows of {row['work']!r}, not of the front; tools/benchmark_attention.py --plot draws those")
        panels[f"{work[1]}, heads {row['heads']}"].append({**row, "place": int(work[2])})
    target = path.with_suffix(".png")
    return [_picture(panels, scheme_colors(rows), "frames", "TFLOP/s per GPU of the tower, each frame once", target)]


def scheme_colors(rows: list[dict]) -> dict[str, object]:
    """One colour for each scheme of a file, the same in all its panels; grey for the ceiling."""
    from matplotlib import colormaps

    names = _in_order({row["scheme"] for row in rows if not row["scheme"].startswith(CEILING)})
    strong = [color for index, color in enumerate(colormaps["tab10"].colors) if index != 7]  # which is grey
    palette = [*strong, *colormaps["tab20b"].colors]
    return {CEILING: "0.75"} | {name: palette[index % len(palette)] for index, name in enumerate(names)}


def bar_places(speed: dict[tuple[str, int], float], order: list[str]) -> tuple[dict[tuple[str, int], float], float]:
    """(centre of each bar, width): the bars of a length stand side by side around its whole number, none leaves a hole."""
    shown = {length: [scheme for scheme in order if (scheme, length) in speed] for length in sorted({length for _, length in speed})}
    width = 0.85 / max(map(len, shown.values()), default=1)
    places = {}
    for place, (length, schemes) in enumerate(shown.items()):
        for index, scheme in enumerate(schemes):
            places[scheme, length] = place + (index - (len(schemes) - 1) / 2) * width
    return places, width


def _in_order(schemes: set[str]) -> list[str]:
    """The ceiling, ours, peers."""
    return sorted(schemes, key=lambda scheme: (scheme != CEILING, not scheme.startswith("mmsp"), scheme))


def _median(rows: list[dict], column: str) -> dict[tuple[str, int], float]:
    """Median over repeats of a column, by (scheme, place); of the ceilings only the best of each place, under one name."""
    values = defaultdict(list)
    for row in rows:
        if row[column] is not None:
            values[row["scheme"], row["place"]].append(row[column])
    medians = {key: statistics.median(column) for key, column in values.items()}
    for place in {place for _, place in medians}:
        ceilings = [medians.pop(key) for key in list(medians) if key[0].startswith(CEILING) and key[1] == place]
        if ceilings:
            medians[CEILING, place] = max(ceilings)
    return medians


def _picture(panels: dict[str, list[dict]], colors: dict[str, object], xlabel: str, ylabel: str, target: Path) -> Path:
    """Two axes a panel: bars of TFLOP/s and lines of the fraction, by the rows' `place`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), 2, figsize=(16, 5 * len(panels)), squeeze=False, layout="constrained")
    for (bars, lines), (title, rows) in zip(axes, panels.items(), strict=True):
        _draw(bars, lines, rows, colors)
        bars.set(title=title, xlabel=xlabel, ylabel=ylabel)
        lines.set(title="fraction of no communication", xlabel=xlabel)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return target


def _draw(bars, lines, rows: list[dict], colors: dict[str, object]) -> None:
    speed, fraction = _median(rows, "tflops_per_gpu"), _median(rows, "fraction_of_no_communication")
    lengths, order = sorted({length for _, length in speed}), _in_order({scheme for scheme, _ in speed})
    places, width = bar_places(speed, order)
    for scheme in order:
        color, hatch = colors[scheme], "" if re.match(f"mmsp|{CEILING}|ulysses|one call", scheme) else "//"
        mine = [length for length in lengths if (scheme, length) in speed]
        heights = [speed[scheme, length] for length in mine]
        bars.bar([places[scheme, x] for x in mine], heights, width, label=scheme, color=color, hatch=hatch, edgecolor="white")
        shown = [length for length in mine if (scheme, length) in fraction]
        style = "-o" if scheme.startswith("mmsp") else "--."
        lines.plot([lengths.index(x) for x in shown], [fraction[scheme, x] for x in shown], style, color=color, label=scheme)
    for axis in (bars, lines):
        axis.set_xticks(range(len(lengths)), [f"{length >> 10}K" if length % 1024 == 0 else str(length) for length in lengths])
    bars.set_ylim(0, 1.5 * max(speed.values()))  # room for the legend
    bars.legend(fontsize=7, ncols=2)
    lines.grid(alpha=0.3)
