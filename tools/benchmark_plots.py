"""Pictures of the benchmarks' rows: bars of speed by length, lines of the fraction of what no communication would allow."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

CEILING = "no communication"


def plot_attention(rows: list[dict], path: Path) -> list[Path]:
    """One picture per work and number of hosts, beside `path`; a panel per head count. Medians over repeats. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for work, hosts in sorted({(row["work"], row["hosts"]) for row in rows}):
        chosen = [row for row in rows if (row["work"], row["hosts"]) == (work, hosts)]
        heads = sorted({row["heads"] for row in chosen}, reverse=True)
        figure, axes = pyplot.subplots(len(heads), 2, figsize=(16, 5 * len(heads)), squeeze=False, layout="constrained")
        for (bars, lines), name in zip(axes, heads, strict=True):
            _draw(bars, lines, [row for row in chosen if row["heads"] == name], f"{work}, heads {name}")
        target = path.with_name(f"{path.stem}_{work.replace(' ', '_').replace('+', '_')}_hosts{hosts}.png")
        figure.savefig(target, dpi=110)
        pyplot.close(figure)
        written.append(target)
    return written


def _median(rows: list[dict], column: str) -> dict[tuple[str, int], float]:
    """Median over repeats of a column, by (scheme, length); of the ceilings only the best of each length, under one name."""
    values = defaultdict(list)
    for row in rows:
        if row[column] is not None:
            values[row["scheme"], row["seq_len"]].append(row[column])
    medians = {key: statistics.median(column) for key, column in values.items()}
    for length in {length for _, length in medians}:
        ceilings = [medians.pop(key) for key in list(medians) if key[0].startswith(CEILING) and key[1] == length]
        if ceilings:
            medians[CEILING, length] = max(ceilings)
    return medians


def _draw(bars, lines, rows: list[dict], title: str) -> None:
    speed, fraction = _median(rows, "tflops_per_gpu"), _median(rows, "fraction_of_no_communication")
    lengths = sorted({length for _, length in speed})
    order = sorted({scheme for scheme, _ in speed}, key=lambda scheme: (scheme != CEILING, not scheme.startswith("mmsp"), scheme))
    width = 0.85 / max(len(order), 1)
    for index, scheme in enumerate(order):
        color = "0.75" if scheme == CEILING else f"C{index % 10}"
        hatch = "" if scheme.startswith(("mmsp", CEILING)) else "//"
        places = [place for place, length in enumerate(lengths) if (scheme, length) in speed]
        heights = [speed[scheme, lengths[place]] for place in places]
        bars.bar([place + index * width for place in places], heights, width, label=scheme, color=color, hatch=hatch, edgecolor="white")
        shown = [length for length in lengths if (scheme, length) in fraction]
        style = "-o" if scheme.startswith("mmsp") else "--."
        lines.plot(shown, [fraction[scheme, length] for length in shown], style, color=color, label=scheme)
    labels = [f"{length >> 10}K" if length >= 1024 else str(length) for length in lengths]
    bars.set_xticks([place + 0.42 for place in range(len(lengths))], labels)
    bars.set(title=title, xlabel="tokens", ylabel="causal TFLOP/s per GPU")
    lines.set(title="fraction of no communication", xlabel="tokens", xscale="log")
    lines.set_xticks(lengths, labels)
    lines.minorticks_off()
    bars.set_ylim(0, 1.5 * max(speed.values()))  # room for the legend
    bars.legend(fontsize=7, ncols=2)
    lines.grid(alpha=0.3)
