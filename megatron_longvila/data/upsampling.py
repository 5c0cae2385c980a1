"""Which documents go into the rows, and how often: per-source length up-sampling.

Long documents are repeated until they make up a given share of each source's tokens, and short ones make room, so that every source keeps
its share of the whole. Source: Fu et al. 2024, "Data Engineering for Scaling Language Models to 128K Context", section 3 (there documents
above 4,096 tokens go from about 30% to about 70% of the tokens of SlimPajama).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_longvila.data.mixture import permute


@dataclass(frozen=True)
class Mixture:
    """What is drawn.

    Attributes:
        long_tokens: a document is long if it has more tokens than this.
        long_share: of each source's tokens that shall come from long documents, where they have less; never less than they have.
        max_copies: most times any document is drawn; where that is too little for `long_share`, short documents fill the rest.
        num_tokens: of all sources together; None for as many as there are.
    """

    long_tokens: int
    long_share: float
    max_copies: int
    num_tokens: int | None
    seed: int


@dataclass(frozen=True)
class SourceCounts:
    """One source before and after. Documents after count copies; shares are of tokens, between 0 and 1."""

    source: str
    documents_before: int
    documents_after: int
    tokens_before: int
    tokens_after: int
    share_before: float
    share_after: float
    long_share_before: float
    long_share_after: float
    most_copies: int


def draw(lengths: np.ndarray, source_of: np.ndarray, mixture: Mixture) -> np.ndarray:
    """Numbers of the drawn documents in the order of training, as often as each is drawn. int64.

    Of each source as many tokens are drawn as its share of the whole says, up to the rest of a document; all is a function of the seed.

    Args:
        lengths: tokens of each document.
        source_of: number of the source of each document.
    """
    total = int(lengths.sum(dtype=np.int64))
    scale = min(Fraction(1), Fraction(mixture.num_tokens, total)) if mixture.num_tokens is not None and total else Fraction(1)
    long_share = Fraction(str(mixture.long_share))  # exact: a budget of 1500.0000001 tokens would draw one document more
    chosen = [np.empty(0, np.int64)]
    for source in np.unique(source_of):
        members = np.flatnonzero(source_of == source)
        is_long = lengths[members] > mixture.long_tokens
        long, short = members[is_long], members[~is_long]
        num_all, num_long = (int(lengths[some].sum(dtype=np.int64)) for some in (members, long))
        budget = scale * num_all
        long_budget = min(max(long_share * budget, scale * num_long), mixture.max_copies * num_long)
        chosen.append(_fill(long, lengths, math.ceil(long_budget), mixture.seed, 1 + 2 * int(source)))
        chosen.append(_fill(short, lengths, math.ceil(budget - long_budget), mixture.seed, 2 + 2 * int(source)))
    drawn = np.concatenate(chosen)
    return drawn[permute(len(drawn), mixture.seed, 0)]


def _fill(documents: np.ndarray, lengths: np.ndarray, budget: int, seed: int, stream: int) -> np.ndarray:
    """All documents as often as they fit the budget as a whole, then the first ones of a seeded order until it is reached."""
    tokens = int(lengths[documents].sum(dtype=np.int64))
    if not tokens:
        return np.empty(0, np.int64)
    copies, rest = divmod(budget, tokens)
    order = documents[permute(len(documents), seed, stream)]
    reached = np.cumsum(lengths[order], dtype=np.int64)
    count = int(np.searchsorted(reached, rest)) + 1 if rest else 0
    return np.concatenate([np.repeat(documents, copies), order[:count]]).astype(np.int64)


def compare(lengths: np.ndarray, source_of: np.ndarray, sources: Sequence[str], drawn: np.ndarray, long_tokens: int) -> list[SourceCounts]:
    """The table of the report: every source, then "all"."""
    copies = np.bincount(drawn, minlength=len(lengths))
    tokens_before, tokens_after = lengths.astype(np.int64), lengths.astype(np.int64) * copies
    is_long = lengths > long_tokens
    rows = []
    for number, source in [*enumerate(sources), (None, "all")]:
        mine = np.ones(len(lengths), bool) if number is None else source_of == number
        before, after = int(tokens_before[mine].sum()), int(tokens_after[mine].sum())
        rows.append(
            SourceCounts(
                source,
                documents_before=int(mine.sum()),
                documents_after=int(copies[mine].sum()),
                tokens_before=before,
                tokens_after=after,
                share_before=before / max(1, int(tokens_before.sum())),
                share_after=after / max(1, int(tokens_after.sum())),
                long_share_before=int(tokens_before[mine & is_long].sum()) / max(1, before),
                long_share_after=int(tokens_after[mine & is_long].sum()) / max(1, after),
                most_copies=int(copies[mine].max(initial=0)),
            )
        )
    return rows


def format_table(rows: Sequence[SourceCounts], long_tokens: int) -> str:
    """The table as text for the console."""
    width = max(6, *(len(row.source) for row in rows))
    lines = [
        f"{'source':<{width}}  {'documents':>21}  {'tokens':>27}  {'share of tokens':>17}  {f'share > {long_tokens}':>17}  {'copies':>6}",
        f"{'':<{width}}  {'before':>10} {'after':>10}  {'before':>13} {'after':>13}"
        + f"  {'before':>8} {'after':>8}" * 2
        + f"  {'most':>6}",
    ]
    for row in rows:
        documents, tokens = f"{row.documents_before:>10,} {row.documents_after:>10,}", f"{row.tokens_before:>13,} {row.tokens_after:>13,}"
        share, long_share = (
            f"{row.share_before:>8.4f} {row.share_after:>8.4f}",
            f"{row.long_share_before:>8.4f} {row.long_share_after:>8.4f}",
        )
        lines.append(f"{row.source:<{width}}  {documents}  {tokens}  {share}  {long_share}  {row.most_copies:>6}")
    return "\n".join(lines)


def draw_histogram(path: str, lengths: np.ndarray, drawn: np.ndarray, *, long_tokens: int, row_length: int) -> None:
    """PNG at `path`: share of tokens by document length, before and after; needs at least one document."""
    from matplotlib.figure import Figure

    largest = max(int(lengths.max()), row_length, long_tokens)
    edges = np.concatenate([[0.5], 2 ** np.arange(0, np.log2(largest) + 1, 0.5)])
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, some, style in (("before", lengths, {"alpha": 0.5}), ("after", lengths[drawn], {"histtype": "step", "linewidth": 1.8})):
        some = some.astype(np.float64)
        axes.hist(some, bins=edges, weights=some / some.sum(), label=label, **style)
    axes.axvline(max(1, long_tokens), color="grey", linestyle=":", label=f"long: more than {long_tokens:,}")
    axes.axvline(row_length, color="black", linestyle="--", linewidth=1, label=f"row: {row_length:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(max(0.5, float(lengths.min()) / 2), largest * 2)
    axes.set(xlabel="tokens of a document", ylabel="share of all tokens")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
