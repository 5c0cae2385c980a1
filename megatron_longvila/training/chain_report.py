"""What a chain of stages did: summary.json, and summary.html, one page with everything in it. Imports no torch."""

from __future__ import annotations

import html
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_longvila.training.chain import Chain, Planned, first_open
from megatron_longvila.training.metrics import read_lines, write_json

PANELS_PER_ROW = 3
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1180px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; margin-bottom: 0.2em; } h2 { font-size: 1.1em; margin: 2em 0 0.6em; }
p.lead { color: #52606d; margin-top: 0; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9em; }
th, td { padding: 0.35em 0.75em; text-align: right; border-bottom: 1px solid #e3e8ee; white-space: nowrap; }
th { color: #52606d; font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr.total td { font-weight: 600; border-top: 2px solid #9aa5b1; border-bottom: none; }
.finished { color: #0b7a4b; } .interrupted, .started { color: #b45309; } .failed { color: #b42318; } .pending { color: #7b8794; }
svg { max-width: 100%; height: auto; } a { color: #1f5fbf; } code { font-size: 0.92em; overflow-wrap: anywhere; }
"""


def summarise_chain(chain: Chain, planned: Sequence[Planned], failed: str | None = None) -> dict[str, Any]:
    """The content of summary.json: every stage's numbers in order, and totals over those that are finished.

    Args:
        failed: the stage whose program has just failed.
    """
    done = first_open(planned)
    statuses = ["finished" if place < done else "failed" if one.stage.name == failed else one.status() for place, one in enumerate(planned)]
    stages = [_summarise_stage(one, status) for one, status in zip(planned, statuses, strict=True)]
    sums = {
        name: sum(stage[name] or 0 for stage in stages) for name in ("steps", "tokens", "labelled_tokens", "frames", "wall_s", "seconds")
    }
    result = planned[-1].result
    return {
        "chain": chain.name,
        "finished": all(stage["status"] == "finished" for stage in stages),
        "stages": stages,
        "total": {name: round(value, 1) for name, value in sums.items()},
        "checkpoint": str(result) if result else None,
    }


def _summarise_stage(one: Planned, status: str) -> dict[str, Any]:
    config, found = one.config, one.summary or {}
    lines = [line for line in read_lines(one.folder / "metrics.jsonl") if line["loss"] is not None]
    attempts = one.record.get("attempts", [])
    parameters = json.loads((one.folder / "parameters.json").read_text()) if (one.folder / "parameters.json").is_file() else None
    return {
        "name": one.stage.name,
        "status": status,
        "trainable": config.training.trainable,
        "lora_rank": config.model.lora.rank,
        "context_length": config.data.context_length,
        "rotary_base": config.model.llm.rotary_base,
        "num_frames": config.data.video.num_frames,
        "lr": config.optimizer.lr,
        "global_batch_size": config.data.global_batch_size,
        "parameters": parameters,
        **{name: found.get(name) for name in ("steps", "tokens", "labelled_tokens", "frames", "wall_s", "memory_gib", "num_ranks")},
        "first_loss": lines[0]["loss"] if lines else None,
        "final_loss": found.get("loss"),
        "evaluation_loss": found.get("evaluation_loss"),
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 1),
        "attempts": len(attempts),
        "input": found.get("input"),
        "rounded": found.get("rounded"),
        "folder": str(one.folder),
        "checkpoint": str(one.result) if one.result else None,
    }


def write_report(chain: Chain, planned: Sequence[Planned], output_dir: Path, failed: str | None = None) -> dict[str, Any]:
    """Write summary.json and summary.html to `output_dir` and return the summary."""
    summary = summarise_chain(chain, planned, failed)
    write_json(output_dir / "summary.json", summary)
    (output_dir / "summary.html").write_text(make_page(summary, output_dir), encoding="utf-8")
    return summary


def make_page(summary: dict[str, Any], output_dir: Path) -> str:
    """One HTML page that needs no other file; its links are relative to `output_dir`."""
    stages, total = summary["stages"], summary["total"]
    done = sum(stage["status"] == "finished" for stage in stages)
    lead = f"{done} of {len(stages)} stages finished: {total['tokens']:,} tokens, {total['frames']:,} frames, {_duration(total['wall_s'])}"
    checkpoint = f"<p>Final checkpoint: <code>{html.escape(summary['checkpoint'])}</code></p>" if summary["checkpoint"] else ""
    title = html.escape(summary["chain"])
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>',
            f"<h1>{title}</h1><p class='lead'>{lead} of training.</p>{checkpoint}",
            "<h2>Loss per labelled token (nats)</h2>",
            draw_losses(stages),
            "<h2>What was trained, on what</h2>",
            _table(SETTINGS, stages, output_dir),
            "<h2>What it took</h2>",
            _table(COSTS, [*stages, {"name": "total", "status": "total"} | total], output_dir),
            "<p>Frames and tokens are those the model saw, repeats included. Training time is that of the steps that count, with their "
            "evaluations and checkpoints; elapsed time also has program starts, merging and steps that a kill undid in it.</p>",
            "</body></html>\n",
        ]
    )


def draw_losses(stages: Sequence[dict[str, Any]]) -> str:
    """The loss curves of all stages that have begun, a panel each, as an SVG element; a sentence if there is none."""
    from matplotlib.figure import Figure

    begun = [stage for stage in stages if stage["first_loss"] is not None]
    if not begun:
        return "<p>No stage has begun.</p>"
    columns = min(PANELS_PER_ROW, len(begun))
    rows = -(-len(begun) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, stage in zip(panels, begun, strict=False):
        for name, style in (("metrics.jsonl", {"color": "#1f5fbf", "label": "training"}), ("evaluation.jsonl", {"color": "#d97706"})):
            points = [(line["step"], line["loss"]) for line in read_lines(Path(stage["folder"], name)) if line["loss"] is not None]
            if points:
                marker = "." if len(points) < 30 else None
                panel.plot(*zip(*points, strict=True), linewidth=1.2, marker=marker, **{"label": "held out"} | style)
        panel.set_title(stage["name"], loc="left", fontsize=10, fontweight="bold")
        panel.set_xlabel("step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(begun) :]:
        panel.axis("off")
    panels[0].legend(fontsize=8, frameon=False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", stream.getvalue(), flags=re.DOTALL)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _parameters(stage: dict[str, Any], kind: str) -> str:
    return f"{stage['parameters']['total'][kind]:,}" if stage.get("parameters") else ""


def _rounded(stage: dict[str, Any]) -> str:
    found = stage["rounded"]
    return f"{found['tensors']:,} ({found['frozen']:,} frozen)" if found else ""


def _with_rank(part: str, rank: int) -> str:
    return f"lora (rank {rank})" if part == "lora" else part


# Heading, and the cell of a stage.
SETTINGS = (
    ("status", lambda stage: f"<span class='{stage['status']}'>{stage['status']}</span>"),
    ("trains", lambda stage: html.escape(", ".join(_with_rank(part, stage["lora_rank"]) for part in stage["trainable"]))),
    ("trained parameters", lambda stage: _parameters(stage, "trained")),
    ("frozen parameters", lambda stage: _parameters(stage, "frozen")),
    ("tensors rounded when loaded", _rounded),
    ("context (tokens)", lambda stage: _number(stage["context_length"])),
    ("RoPE base", lambda stage: f"{stage['rotary_base']:,.0f}"),
    ("frames of a video, at most", lambda stage: _number(stage["num_frames"])),
    ("rows of a step", lambda stage: _number(stage["global_batch_size"])),
    ("learning rate", lambda stage: _number(stage["lr"])),
    ("first loss", lambda stage: _number(stage["first_loss"])),
    ("last loss", lambda stage: _number(stage["final_loss"])),
    ("held-out loss", lambda stage: _number(stage["evaluation_loss"])),
)
COSTS = (
    ("steps", lambda stage: _number(stage["steps"])),
    ("tokens", lambda stage: _number(stage["tokens"])),
    ("labelled tokens", lambda stage: _number(stage["labelled_tokens"])),
    ("frames", lambda stage: _number(stage["frames"])),
    ("training time", lambda stage: _duration(stage["wall_s"])),
    ("elapsed time", lambda stage: _duration(stage["seconds"])),
    ("program starts", lambda stage: _number(stage.get("attempts"))),
    ("ranks", lambda stage: _number(stage.get("num_ranks"))),
    ("most memory of a rank (GiB)", lambda stage: _number(stage.get("memory_gib"))),
    ("files", lambda stage: stage.get("files", "")),
)


def _table(columns: Sequence[tuple[str, Any]], stages: Sequence[dict[str, Any]], output_dir: Path) -> str:
    """An HTML table with a row per stage."""
    rows = []
    for stage in stages:
        cells = [f"<td>{html.escape(stage['name'])}</td>"]
        with_files = stage | {"files": _links(stage, output_dir)}
        cells += [f"<td{' class=text' if name in ('status', 'trains', 'files') else ''}>{cell(with_files)}</td>" for name, cell in columns]
        rows.append(f"<tr{' class=total' if stage['status'] == 'total' else ''}>{''.join(cells)}</tr>")
    heads = "".join(f"<th{' class=text' if name in ('status', 'trains', 'files') else ''}>{name}</th>" for name, _ in columns)
    return f"<div class='wide'><table><tr><th>stage</th>{heads}</tr>{''.join(rows)}</table></div>"


def _links(stage: dict[str, Any], output_dir: Path) -> str:
    """Links to what a stage wrote."""
    if "folder" not in stage:
        return ""
    folder = Path(stage["folder"])
    found = [folder / name for name in ("config.yaml", "metrics.jsonl", "loss.png", "data_report.jsonl") if (folder / name).exists()]
    found += [Path(stage["checkpoint"])] if stage["checkpoint"] else []
    return " ".join(f"<a href='{html.escape(os.path.relpath(path, output_dir))}'>{html.escape(path.stem)}</a>" for path in found)
