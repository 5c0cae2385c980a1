"""The goals for attention and the multimodal front against measured rows: each is met, missed or not measured.

    python tools/benchmark_goals.py tools/benchmark_results/attention_4xh200.json tools/benchmark_results/mmsp_4xh200.json
    python tools/benchmark_goals.py runs/attention.json --strict      # exit status 1 unless every goal is met

FILE.json holds rows of benchmark_attention.py or benchmark_mmsp.py; how many ranks measured them stands in its twin FILE_machine.json.
The goals are stated for 4 ranks of one kind of GPU, so a line says so where it comes from another number. They are ratios within one run:
for each repeat the time of the best peer over ours, then the median of the repeats. "Ours" is the fastest mesh with its own settings (no
`tile...` or `parts...`) and the ring's transport that training takes, all_gather on one host and p2p across; the best peer and the best
ceiling are those with the smallest median. A goal counts as met within 1% of it, and should have three repeats; a line says when it has
fewer. A goal that several files, or several settings of the front, measure has a line for each.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("work", "scheme", "heads", "seq_len", "hosts", "repeat", "median_ms", "tflops_per_gpu", "peak_memory_gib")
MESH = r"ulysses\d+( ring\d+ all_gather)?"
OURS, OURS_ACROSS_HOSTS = rf"mmsp ({MESH}|reshard)", r"mmsp ulysses\d+( ring\d+ p2p)?"
CEILING, TE = "no communication.*", "TE .*"
WITHIN, REPEATS = 0.01, 3


@dataclass(frozen=True)
class Goal:
    """At least `least` times as good as the best scheme `against` (a pattern of whole names), or `least` itself if there is none.

    Attributes:
        column: what is compared; less is better but for the TFLOP/s that a goal without `against` takes.
        work, heads, seq_len: of the rows it is about; work is a pattern, heads and length None mean any.
        ranks: what it is stated for; only_ranks: other numbers of ranks do not measure it.
    """

    name: str
    least: float
    work: str
    heads: str | None
    seq_len: int | None
    against: str = ""
    hosts: int = 1
    column: str = "median_ms"
    ours: str = OURS
    ranks: int = 4
    only_ranks: bool = False

    @property
    def title(self) -> str:
        length = None if self.seq_len is None else f"{self.seq_len >> 10}K"
        hosts = "two hosts" if self.hosts == 2 else None
        return ", ".join(word for word in (self.name, hosts, self.heads and f"heads {self.heads}", length) if word)


@dataclass(frozen=True)
class Source:
    """The rows of one file and the number of ranks they are about; None if nothing says it."""

    name: str
    rows: list[dict]
    ranks: int | None


@dataclass(frozen=True)
class Reading:
    """What one file says about one goal: `value` is the median over `repeats`; `what` names the schemes and the file."""

    value: float
    repeats: int
    ranks: int | None
    what: str


def goals() -> list[Goal]:
    """All of them."""
    found, both = [], "forward+backward"
    for heads in ("32/8", "28/4"):
        for length, te, ceiling in ((32, 1.05, 0.88), (64, 1.02, 0.94), (128, 1.0, 0.97), (256, 1.0, 0.97), (512, 1.0, 0.97)):
            case = (both.replace("+", r"\+"), heads, length << 10)
            found.append(Goal("speed over the best TE mode", te, *case, TE))
            found.append(Goal("fraction of no communication", ceiling, *case, CEILING))
            found.append(Goal("peak memory of TE p2p over ours", 1.0, *case, "TE p2p", column="peak_memory_gib"))
        for length, te, ring in ((32, 1.10, 2.1), (128, 1.0, 1.85)):
            case = (both.replace("+", r"\+"), heads, length << 10)
            across = dict(hosts=2, ours=OURS_ACROSS_HOSTS)
            found.append(Goal("speed over TE a2a+p2p", te, *case, r"TE a2a\+p2p", **across))
            found.append(Goal("speed over ring-flash-attn zigzag", ring, *case, "ring-flash-attn zigzag", **across))
        packed = ("packed forward", heads, 128 << 10)
        found.append(Goal("packed forward, TFLOP/s per GPU", 400, *packed, column="tflops_per_gpu"))
        found.append(Goal("packed forward, speed over the best TE mode", 1.3, *packed, TE))
    front = ("front, .*, 256 frames", None, None)
    found.append(Goal("front of 256 frames, speed over replicated towers", 3.6, *front, "replicated towers", only_ranks=True))
    for heads, ranks in (("12/2", 4), ("28/4", 8)):
        share = dict(column="times_max_over_mean", ours=f"no communication, {MESH}", ranks=ranks, only_ranks=True)
        found.append(Goal(f"even work of {ranks} simulated ranks, mean over max", 1 / 1.01, r"forward\+backward", heads, None, **share))
    return found


def read(path: Path) -> Source:
    """The rows of `path`. OSError or ValueError, with the path in its message, if they cannot be read."""
    rows, facts_path = _load(path), path.with_name(f"{path.stem}_machine.json")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) >= set(COLUMNS) for row in rows):
        raise ValueError(f"{path} is no list of rows of benchmark_attention.py or benchmark_mmsp.py")
    facts = _load(facts_path) if facts_path.is_file() else {}
    return Source(path.name, rows, facts.get("simulated_ranks") or facts.get("ranks"))


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def readings(goal: Goal, source: Source) -> list[Reading]:
    """One for each case of the goal that the rows hold."""
    if goal.only_ranks and source.ranks != goal.ranks:
        return []
    cases = defaultdict(list)
    for row in source.rows:
        asked = goal.heads in (None, row["heads"]) and goal.seq_len in (None, row["seq_len"]) and goal.hosts == row["hosts"]
        if asked and re.fullmatch(goal.work, row["work"]):
            cases[row["work"], row["heads"], row["seq_len"]].append(row)
    found = []
    for (work, heads, seq_len), rows in cases.items():
        ours, values = _fastest(rows, goal.ours, goal.column)
        what = [ours]
        if goal.against:
            peer, of_peer = _fastest(rows, goal.against, goal.column)
            values = {repeat: of_peer[repeat] / values[repeat] for repeat in values.keys() & of_peer.keys()}
            what[0] = f"{ours} to {peer}"
        elif goal.column == "times_max_over_mean":
            values = {repeat: 1 / value for repeat, value in values.items()}
        if goal.seq_len is None:
            what += [work, f"heads {heads}", f"{seq_len} tokens"]
        if values:
            found.append(Reading(statistics.median(values.values()), len(values), source.ranks, ", ".join((*what, source.name))))
    return found


def _fastest(rows: list[dict], pattern: str, column: str) -> tuple[str, dict[int, float]]:
    """The scheme with the smallest median time of those whose whole name matches, and its `column` by repeat; ("", {}) if there is none."""
    times, values = defaultdict(list), defaultdict(dict)
    for row in rows:
        if re.fullmatch(pattern, row["scheme"]) and row.get(column) is not None:
            times[row["scheme"]].append(row["median_ms"])
            values[row["scheme"]][row["repeat"]] = row[column]
    best = min(times, key=lambda scheme: statistics.median(times[scheme]), default="")
    return best, values.get(best, {})


def verdict(goal: Goal, value: float) -> str:
    """`met`, `met within 1%` or `missed by x%`."""
    if value >= goal.least:
        return "met"
    short = 1 - value / goal.least
    return f"met within {WITHIN:.0%}" if short <= WITHIN else f"missed by {short:.1%}"


def report(sources: list[Source]) -> tuple[list[str], bool]:
    """(a line for each goal and file that measured it, whether all are met on the ranks they are stated for)."""
    lines, all_met = [], True
    for goal in goals():
        found = [reading for source in sources for reading in readings(goal, source)]
        target = f"goal {goal.least:.4g}"
        if not found:
            lines.append(f"{'not measured':15} {'':7} {target:10}  {goal.title}")
        for one in found:
            said, notes = verdict(goal, one.value), []
            if one.repeats < REPEATS:
                notes.append(f"only {one.repeats} of {REPEATS} repeats")
            if one.ranks != goal.ranks:
                notes.append(f"stated for {goal.ranks} ranks")
            notes = [f"{one.ranks or 'unknown'} ranks", *notes]
            lines.append(f"{said:15} {one.value:7.4g} {target:10}  {goal.title}  ({one.what}; {', '.join(notes)})")
            all_met &= said.startswith("met") and one.ranks == goal.ranks
        all_met &= bool(found)
    return lines, all_met


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 with --strict and a goal that is not met, 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="rows of benchmark_attention.py or benchmark_mmsp.py")
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless every line says met, on the ranks the goal is stated for")
    arguments = parser.parse_args(argv)
    try:
        sources = [read(path) for path in arguments.files]
    except (OSError, ValueError) as error:
        print(f"cannot read: {error}", file=sys.stderr)
        return 2
    lines, all_met = report(sources)
    print("\n".join(lines))
    return int(arguments.strict and not all_met)


if __name__ == "__main__":
    sys.exit(main())
