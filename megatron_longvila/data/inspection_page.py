"""The page of tools/inspect_dataset.py: one HTML file that opens offline and runs nothing.

All text of a dataset goes through `escape`, pictures are data URIs, there is no script, and the page's own policy forbids loading anything.
"""

from __future__ import annotations

import base64
import html
import unicodedata
from collections.abc import Iterable, Iterator

from megatron_longvila.data.inspection import Summary
from megatron_longvila.data.inspection_views import FrameView, RankView, SampleView, TokenView
from megatron_longvila.mesh import Mesh

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_VISIBLE = {"\n": "\u21b5\n", "\t": "\u21e5", "\r": "\u240d"}  # what moves the pen is drawn
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 24px; color: #1c2127; background: #fff; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 32px 0 8px; } h3 { font-size: 14px; margin: 18px 0 6px; }
section { border-top: 1px solid #d8dde3; margin-top: 28px; padding-top: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 2px 12px 2px 0; text-align: left; vertical-align: top; }
th { font-weight: 600; color: #59636e; } td.number { text-align: right; }
.muted { color: #59636e; } .problem { background: #fff0ee; border-left: 4px solid #c8321f; padding: 6px 10px; margin: 8px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 8px 36px; }
.bar { background: #4078c0; height: 11px; display: inline-block; min-width: 1px; vertical-align: middle; margin-right: 6px; }
.sheet { display: flex; flex-wrap: wrap; gap: 6px; } figure { margin: 0; width: 144px; border-top: 5px solid; }
figure img { display: block; width: 144px; height: 144px; object-fit: contain; background: #eef1f4; }
figure.bad img { outline: 3px solid #c8321f; outline-offset: -3px; } .lost { width: 144px; height: 144px; background: #eef1f4; }
figcaption { font-size: 12px; font-variant-numeric: tabular-nums; color: #38414a; padding: 1px 2px 4px; }
.tokens { font: 13px/2 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { background: #eceff2; border-radius: 3px; padding: 2px 0; box-shadow: inset -1px 0 #fff; }
.y { background: #b6e3b4; } .s { color: #7a3fb0; font-weight: 600; }
.f { color: #fff; border-radius: 3px; padding: 0 6px; display: inline-block; line-height: 1.5; }
.turns dt { font-weight: 600; } .turns dd { margin: 0 0 6px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.key > span { margin-right: 18px; }
"""


def escape(text: object) -> str:
    """Text as it may stand anywhere in the page. Controls and direction marks, which could hide or reorder what follows, become visible."""
    shown = []
    for character in str(text):
        kind = unicodedata.category(character)
        if character in _VISIBLE:
            shown.append(_VISIBLE[character])
        elif kind in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            shown.append(f"\u27e8U+{ord(character):04X}\u27e9")
        else:
            shown.append(html.escape(character))
    return "".join(shown)


def render(title: str, facts: dict[str, str], summary: Summary, mesh: Mesh, views: Iterable[SampleView]) -> Iterator[str]:
    """The page in pieces, to be written as UTF-8.

    Args:
        facts: what was looked at and how, shown on top.
        mesh: of the plans.
    """
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">'
    yield f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
    yield f"<h1>{escape(title)}</h1>\n{_table(facts.items())}"
    yield f"<h2>Counts</h2>{_table((name, _number(value)) for name, value in summary.counts.items())}\n"
    yield f'<h2>Distributions</h2><div class="charts">{"".join(map(_chart, summary.histograms.items()))}</div>\n'
    yield _broken(summary)
    yield "<h2>Samples</h2>" + _key(mesh)
    for view in views:
        yield _sample(view, mesh)
    yield "</body></html>\n"


def _broken(summary: Summary) -> str:
    if not summary.broken:
        return "<h2>Broken samples</h2><p>None was found.</p>\n"
    rows = [
        f"<tr><td>{escape(one.id)}</td><td>{escape(one.dataset)} line {one.line}</td><td>{escape(one.reason)}</td></tr>"
        for one in summary.broken[:1000]
    ]
    more = f"<p>... and {len(summary.broken) - 1000} more, all in broken.jsonl.</p>" if len(summary.broken) > 1000 else ""
    head = "<tr><th>sample</th><th>where</th><th>why</th></tr>"
    return f"<h2>Broken samples ({len(summary.broken)})</h2><table>{head}{''.join(rows)}</table>{more}\n"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows) + "</table>"


def _number(value: float | int) -> str:
    return f"{value:,}"


def _chart(item: tuple[str, list[tuple[int, int, int]]]) -> str:
    name, bins = item
    most = max((count for _, _, count in bins), default=1) or 1
    rows = []
    for low, high, count in bins:
        label = f"{low:,} to {high:,}" if low else "below 1"
        bar = f'<span class="bar" style="width:{120 * count / most:.0f}px"></span>' if count else ""
        rows.append(f'<tr><td class="number muted">{label}</td><td>{bar}{count:,}</td></tr>')
    return f"<div><h3>{escape(name)}</h3><table>{''.join(rows) or '<tr><td>none</td></tr>'}</table></div>"


def _key(mesh: Mesh) -> str:
    colours = [_colour(rank, mesh.cp_size) for rank in range(mesh.cp_size)]
    ranks = "".join(f'<span><span class="f" style="background:{one}">cp rank {rank}</span></span>' for rank, one in enumerate(colours))
    return (
        '<p class="key"><span><span class="t y">trained</span> the model learns to predict it</span>'
        '<span><span class="t">read</span> no label</span><span><span class="t s">special</span> no text makes it</span></p>'
        f'<p class="key">Frames and their visual tokens by the rank that decodes and encodes them: {ranks}</p>'
    )


def _colour(rank: int, cp_size: int) -> str:
    """Far apart for neighbours, dark enough for white text."""
    return f"hsl({round(210 + rank * 360 * (0.382 if cp_size > 6 else 1 / cp_size)) % 360} 55% 38%)"


def _sample(view: SampleView, mesh: Mesh) -> str:
    parts = [f'<section><h2>{escape(view.id)}</h2><p class="muted">{escape(view.dataset)} line {view.line}']
    if view.row >= 0:
        shared = "alone" if view.row_samples == 1 else f"sample {view.place + 1} of {view.row_samples}"
        parts.append(f", row {view.row:,} of the first epoch, {shared}")
    parts.append("</p>\n")
    if view.problem:
        parts.append(f'<p class="problem">{escape(view.problem)}</p>\n')
    parts.append(_turns(view) + _media(view))
    if view.frames:
        sheet = "".join(_frame(number, frame, mesh) for number, frame in enumerate(view.frames))
        parts.append(f'<h3>{len(view.frames)} frames, as the vision tower gets them</h3><div class="sheet">{sheet}</div>\n')
    if view.tokens:
        parts.append(_tokens(view, mesh) + _plan(view.ranks, mesh))
    return "".join(parts) + "</section>\n"


def _turns(view: SampleView) -> str:
    turns = "".join(f"<dt>{escape(turn.get('from'))}</dt><dd>{escape(turn.get('value'))}</dd>" for turn in view.conversations)
    return f'<h3>Dialogue</h3><dl class="turns">{turns}</dl>\n' if turns else ""


def _media(view: SampleView) -> str:
    if not view.media:
        return ""
    rows = []
    for number, media in enumerate(view.media):
        turned = f", turned by {media.rotation} degrees" if media.rotation else ""
        length = "" if media.kind == "image" else f"{media.num_frames:,} frames, {media.duration_s:.2f} s, {media.fps:.3f} per second"
        cells = (f"{number}", media.kind, f"{media.width} x {media.height}{turned}", length, media.codec, media.path or media.sha256[:16])
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<h3>Media</h3><table>{''.join(rows)}</table>\n"


def _frame(number: int, frame: FrameView, mesh: Mesh) -> str:
    data = base64.b64encode(frame.jpeg).decode()
    picture = f'<img alt="" src="data:image/jpeg;base64,{data}">' if frame.jpeg else '<div class="lost"></div>'
    time = "" if frame.time_s is None else f" \u00b7 {clock(frame.time_s)}"
    note = "" if not frame.is_replaced else " \u00b7 replaced"
    bad = ' class="bad"' if frame.is_replaced or not frame.jpeg else ""
    return (
        f'<figure{bad} style="border-color:{_colour(frame.cp_rank, mesh.cp_size)}">{picture}'
        f"<figcaption>{number}{time}<br>file {frame.medium}, frame {frame.index}{note}</figcaption></figure>"
    )


def clock(seconds: float) -> str:
    """h:mm:ss.mmm, hours only where there are any."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{rest // 1000:02d}.{rest % 1000:03d}"


def _tokens(view: SampleView, mesh: Mesh) -> str:
    trained = sum(token.is_trained for token in view.tokens)
    total = sum(token.count for token in view.tokens)
    is_frame = [token.token_id < 0 for token in view.tokens] + [False]
    between = [number and is_frame[number - 1] and is_frame[number + 1] for number in range(len(view.tokens))]  # frames go on in one line
    body = "".join(_token(token, view.frames, mesh, breaks=not one) for token, one in zip(view.tokens, between, strict=True))
    ids = " ".join(f"{token.token_id}" if token.token_id >= 0 else f"[frame {token.text}]" for token in view.tokens)
    return (
        f'<h3>{total:,} tokens, {trained:,} of them trained</h3><div class="tokens">{body}</div>\n'
        f'<details><summary class="muted">as ids</summary><div class="tokens">{ids}</div></details>\n'
    )


def _token(token: TokenView, frames: tuple[FrameView, ...], mesh: Mesh, *, breaks: bool) -> str:
    where = f"position {token.position}"
    if token.count > 1 or token.token_id < 0:
        frame = frames[int(token.text)]
        time = "" if frame.time_s is None else f" {clock(frame.time_s)}"
        hover = f"positions {token.position} to {token.position + token.count - 1}, encoded by cp rank {frame.cp_rank}"
        colour = _colour(frame.cp_rank, mesh.cp_size)
        return f'<span class="f" style="background:{colour}" title="{hover}">frame {token.text}{time} \u00d7{token.count}</span>'
    classes = "t" + " y" * token.is_trained + " s" * token.is_special
    text = (escape(token.text) if breaks else escape(token.text).replace("\n", "")) or "\u2205"
    return f'<span class="{classes}" title="{where}, id {token.token_id}">{text}</span>'


def _plan(ranks: tuple[RankView, ...], mesh: Mesh) -> str:
    tensor = f" (tp rank 0 of the {mesh.tp_size} decodes and sends to the others)" if mesh.tp_size > 1 else ""
    head = "".join(
        f"<th>{name}</th>"
        for name in ("cp rank", "ulysses, ring", "decodes and encodes", "owns tokens", "sends, receives visual tokens", "rows")
    )
    rows = []
    for one in ranks:
        colour = f'<span class="f" style="background:{_colour(one.cp_rank, mesh.cp_size)}">{one.cp_rank}</span>'
        frames = "none" if not one.encodes else _span(one.encodes, "frame")
        owns = ", ".join(f"{piece.start}\u2013{piece.stop - 1}" if len(piece) > 1 else f"{piece.start}" for piece in one.owns) or "none"
        padding = f", {one.padding:,} empty" if one.padding else ""
        cells = (colour, f"{one.ulysses_rank}, {one.ring_rank}", frames, owns, f"{one.sends:,}, {one.receives:,}", f"{one.rows:,}{padding}")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    title = f"Plan on tp {mesh.tp_size} x pp {mesh.pp_size} x ulysses {mesh.ulysses_size} x ring {mesh.ring_size}{tensor}"
    note = '<p class="muted">What is sent, received and held counts the whole row; frames and owned positions are of this sample.</p>'
    return f"<h3>{title}</h3><table><tr>{head}</tr>{''.join(rows)}</table>{note}\n"


def _span(numbers: range, name: str) -> str:
    return f"{name} {numbers.start}" if len(numbers) == 1 else f"{name}s {numbers.start}\u2013{numbers.stop - 1}"
