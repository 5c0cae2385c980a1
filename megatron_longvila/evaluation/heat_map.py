"""The picture of a needle test: length by depth, the colour is the accuracy, as in the figures of LongVA and LongVILA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ANNOTATED_CELLS = 400  # more numbers than this cannot be read
COLOURS = "RdYlGn"
MISSING = "0.85"


def draw_heat_maps(summaries: Sequence[dict[str, Any]], titles: Sequence[str], path: Path) -> None:
    """Draw one map per summary (see needle_results.summarise) side by side into an image file; cells that were not run are grey.

    Raises:
        ValueError: not as many titles as summaries, or none.
    """
    if not summaries or len(summaries) != len(titles):
        raise ValueError(f"{len(summaries)} summaries need as many titles, not {len(titles)}, and at least one")
    widths = [max(3.2, 0.55 * len(summary["lengths"]) + 1.2) for summary in summaries]
    rows = max(len(summary["depths"]) for summary in summaries)
    figure = Figure(figsize=(sum(widths) + 1.2, max(3.0, 0.42 * rows + 1.5)), dpi=150, layout="constrained")
    all_axes = figure.subplots(1, len(summaries), squeeze=False, width_ratios=widths)[0]
    for axes, summary, title in zip(all_axes, summaries, titles, strict=True):
        image = _draw(axes, summary, title)
    figure.colorbar(image, ax=all_axes, label="accuracy", ticks=[0, 0.25, 0.5, 0.75, 1], fraction=0.04, pad=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(axes: Axes, summary: dict[str, Any], title: str):
    """One map; returns the image, for the colour bar."""
    lengths, depths = summary["lengths"], summary["depths"]
    accuracy = np.full((len(depths), len(lengths)), np.nan)
    for cell in summary["cells"]:
        accuracy[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["accuracy"]
    axes.set_facecolor(MISSING)
    image = axes.imshow(accuracy, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=90 if len(lengths) > 10 else 0)
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths])
    axes.set_xlabel("tokens" if summary.get("mode") == "text" else "frames")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"{title}\n{summary['correct']} of {summary['trials']} = {100 * summary['needle_accuracy']:.1f}%", fontsize=10)
    axes.set_xticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(depths) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="minor", length=0)
    if accuracy.size <= ANNOTATED_CELLS:
        for (row, column), value in np.ndenumerate(accuracy):
            if not np.isnan(value):
                light = "white" if value < 0.15 or value > 0.85 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=light)
    return image
