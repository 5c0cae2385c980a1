"""Datasets and mixtures by name: a YAML file, and the expressions that mix what it names.

    datasets:
      llava: data/llava                        # a dataset folder; relative paths start at the YAML file
      coyo:
        path: data/coyo
        subsets:                               # a fixed choice of samples, used as coyo@clean
          clean: {exclude: lists/coyo_bad.txt} # sample ids, one a line; include: FILE keeps only those
          tenth: {fraction: 0.1, seed: 3}      # drawn once by the seed; count: N draws N, first: N takes the first N
    mixtures:
      images: llava + 0.5*coyo@clean           # an expression
      short_sft:                               # or a mapping
        mix: images + 2*youcook2               # ... of an expression,
        weights: {images: 0.7, youcook2: 0.3}  # or (instead of mix) of the share of each part in an epoch
        size: 100000                           # draws of an epoch, before unusable samples are left out; parts keep their proportions
        limit: {stage3: 50000}                 # samples of an epoch, at most; by data.stage, or one number for every stage
        seed: 1                                # which samples a part is drawn from first, where it is not drawn whole

Expressions: NAME, NAME@SUBSET, NUMBER * ..., ... + ..., and parentheses. A weight counts how often an epoch shows each sample of what it
stands before: 2*b shows every sample twice, 0.5*b half of them, and the other half in the next epoch. Equal parts are added up (a + a is
2*a), nested mixtures multiply. Nothing is rounded on the way: the exact numbers of samples become whole at the end, together (see
`apportion` and `Part` in mixture.py for what an epoch is).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

_TOKEN = re.compile(r"\s*([\w.\-]+(?:@[\w.\-]+)?|[+*()])")
_NUMBER = re.compile(r"\d+(\.\d+)?|\.\d+")
_NAME = re.compile(r"[\w.\-]+")
_MAX_DEPTH = 50  # of parentheses


@dataclass(frozen=True)
class Term:
    """`weight` times a dataset or mixture."""

    weight: Fraction
    name: str
    subset: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}@{self.subset}" if self.subset else self.name


@dataclass(frozen=True)
class Subset:
    """A fixed choice among the samples of a dataset: first by id, then at most `first`, `count` or `fraction` of what is left."""

    include: Path | None = None
    exclude: Path | None = None
    first: int | None = None
    count: int | None = None
    fraction: Fraction | None = None
    seed: int = 0


@dataclass(frozen=True)
class Source:
    """A dataset folder and its named subsets."""

    path: Path
    subsets: Mapping[str, Subset] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A mixture as it is written down; with `shares` the weights are shares of an epoch, else repetitions of samples."""

    terms: tuple[Term, ...]
    shares: bool = False
    size: int | None = None
    limit: int | Mapping[str, int] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What a mixture comes down to: samples of one dataset (or a subset of it), drawn by one seed."""

    dataset: str
    subset: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.dataset}@{self.subset}" if self.subset else self.dataset


class Registry:
    """The datasets and mixtures of one YAML file."""

    def __init__(self, path: Path, datasets: Mapping[str, Source], mixtures: Mapping[str, Recipe]):
        self.path, self.datasets, self.mixtures = path, datasets, mixtures

    def resolve(self, expression: str, stage: str, size_of: Callable[[str, str], int]) -> dict[Wanted, Fraction]:
        """How many samples of what an epoch of `expression` shows, exact and in order of first mention.

        Args:
            stage: whose limits hold; "" for none.
            size_of: number of samples of a dataset and a subset of it ("" for the whole).

        Raises:
            ValueError: an unknown name or stage, a mixture inside itself, an empty dataset.
        """
        limits = [recipe.limit for recipe in self.mixtures.values() if isinstance(recipe.limit, Mapping)]
        stages = sorted({name for limit in limits for name in limit})
        if stage and stage not in stages:
            raise ValueError(f"data.stage={stage!r} is named by no limit in {self.path}; {_known(stage, stages)}, or leave it empty")
        resolver = _Resolver(self, stage, size_of)
        return resolver.sum(parse_expression(expression, f"data.mixture={expression!r}"), seed=0, inside=())


class _Resolver:
    def __init__(self, registry: Registry, stage: str, size_of: Callable[[str, str], int]):
        self.registry, self.stage, self.size_of = registry, stage, size_of
        self.known: dict[tuple[str, int], dict[Wanted, Fraction]] = {}  # mixtures by name and seed: each is worked out once

    def sum(self, terms: tuple[Term, ...], *, seed: int, inside: tuple[str, ...]) -> dict[Wanted, Fraction]:
        total: dict[Wanted, Fraction] = {}
        for term in terms:
            for wanted, samples in self.term(term, seed=seed, inside=inside).items():
                total[wanted] = total.get(wanted, Fraction(0)) + term.weight * samples
        return total

    def term(self, term: Term, *, seed: int, inside: tuple[str, ...]) -> dict[Wanted, Fraction]:
        """Samples of what a term names, taken once."""
        registry, where = self.registry, f"{self.registry.path}" + (f", mixture {inside[-1]}" if inside else "")
        if term.name in registry.datasets:
            subsets = registry.datasets[term.name].subsets
            if term.subset and term.subset not in subsets:
                raise ValueError(f"{where}: dataset {term.name} has no subset {term.subset!r}; {_known(term.subset, subsets)}")
            size = self.size_of(term.name, term.subset)
            if not size:
                raise ValueError(f"{where}: {term.label} holds no sample; leave it out")
            return {Wanted(term.name, term.subset, seed): Fraction(size)}
        if term.name not in registry.mixtures:
            raise ValueError(f"{where}: there is no {term.name!r}; {_known(term.name, [*registry.datasets, *registry.mixtures])}")
        if term.subset:
            raise ValueError(f"{where}: {term.label}: subsets belong to datasets, and {term.name} is a mixture; use the subset inside it")
        if term.name in inside:
            raise ValueError(f"{where}: a mixture holds itself: {' > '.join([*inside, term.name])}")
        if (term.name, seed) not in self.known:
            self.known[term.name, seed] = self.recipe(registry.mixtures[term.name], seed=seed, inside=(*inside, term.name))
        return self.known[term.name, seed]

    def recipe(self, recipe: Recipe, *, seed: int, inside: tuple[str, ...]) -> dict[Wanted, Fraction]:
        seed = seed if recipe.seed is None else recipe.seed
        if recipe.shares:
            whole = [self.term(term, seed=seed, inside=inside) for term in recipe.terms]
            size = recipe.size or sum(sum(one.values()) for one in whole)
            shares = sum(term.weight for term in recipe.terms)
            samples: dict[Wanted, Fraction] = {}
            for term, one in zip(recipe.terms, whole, strict=True):
                scale = size * term.weight / shares / sum(one.values())
                for wanted, count in one.items():
                    samples[wanted] = samples.get(wanted, Fraction(0)) + scale * count
        else:
            samples = self.sum(recipe.terms, seed=seed, inside=inside)
            if recipe.size:
                samples = _scale(samples, recipe.size)
        limit = self.limit(recipe, inside[-1])
        return _scale(samples, limit) if limit is not None and sum(samples.values()) > limit else samples

    def limit(self, recipe: Recipe, name: str) -> int | None:
        """Samples of an epoch at most; a stage that a mapping does not name has no limit."""
        if not isinstance(recipe.limit, Mapping):
            return recipe.limit
        if not self.stage:
            stages = ", ".join(recipe.limit)
            raise ValueError(f"{self.registry.path}: mixture {name} has limits for {stages}, but data.stage is empty; set --data.stage")
        return recipe.limit.get(self.stage)


def _scale(samples: dict[Wanted, Fraction], total: int) -> dict[Wanted, Fraction]:
    factor = total / sum(samples.values(), Fraction(0))
    return {wanted: count * factor for wanted, count in samples.items()}


# ------------------------------------------------------------------------------------------------ expressions


def parse_expression(text: str, where: str) -> tuple[Term, ...]:
    """The terms of an expression with parentheses multiplied out. Raises ValueError that begins with `where` and shows the place."""
    return _Parser(text, where).parse()


class _Parser:
    """sum := product ("+" product)*, product := factor ("*" factor)*, factor := NUMBER | NAME[@SUBSET] | "(" sum ")"."""

    def __init__(self, text: str, where: str):
        self._text, self._where, self._place, self._depth = text, where, 0, 0
        self._token = self._next()

    def parse(self) -> tuple[Term, ...]:
        terms = self._sum()
        if self._token:
            raise self._error("+, * or the end")
        return terms

    def _next(self) -> str:
        rest = self._text[self._place :]
        match = _TOKEN.match(rest)
        if match is None:
            if rest.strip():
                raise ValueError(f"{self._where}: {rest.strip()[0]!r} means nothing; expressions are made of names, numbers, + * @ ( )")
            return ""
        self._place += match.end()
        return match[1]

    def _take(self) -> str:
        token, self._token = self._token, self._next()
        return token

    def _error(self, expected: str) -> ValueError:
        found = f"{self._token!r} before {self._text[self._place :]!r}" if self._token else "its end"
        return ValueError(f"{self._where}: expected {expected}, found {found}; an example is a + 2*(b + 0.5*c@subset)")

    def _sum(self) -> tuple[Term, ...]:
        terms = self._product()
        while self._token == "+":
            self._take()
            terms += self._product()
        return terms

    def _product(self) -> tuple[Term, ...]:
        weight, terms = Fraction(1), None
        while True:
            factor = self._factor()
            if isinstance(factor, Fraction):
                weight *= factor
            elif terms is None:
                terms = factor
            else:
                raise ValueError(f"{self._where}: {terms[-1].label} * {factor[0].label}: only a number can be multiplied with a name")
            if self._token != "*":
                break
            self._take()
        if terms is None:
            raise ValueError(f"{self._where}: the number {float(weight):g} stands without a name to multiply")
        if weight <= 0:
            raise ValueError(f"{self._where}: the weight of {terms[0].label} must be above 0; leave out what is not wanted")
        return tuple(Term(weight * term.weight, term.name, term.subset) for term in terms)

    def _factor(self) -> tuple[Term, ...] | Fraction:
        if self._token == "(":
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise ValueError(f"{self._where}: more than {_MAX_DEPTH} parentheses inside each other")
            self._take()
            terms = self._sum()
            if self._token != ")":
                raise self._error(")")
            self._depth -= 1
            self._take()
            return terms
        if self._token in ("", "+", "*", ")"):
            raise self._error("a name, a number or (")
        token = self._take()
        if _NUMBER.fullmatch(token):
            return Fraction(token)
        name, _, subset = token.partition("@")
        return (Term(Fraction(1), name, subset),)


# ------------------------------------------------------------------------------------------------ the file


class _StrictLoader(yaml.SafeLoader):
    """A key that stands twice is a mistake, not a second opinion."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = [key for place, key in enumerate(keys) if key in keys[:place]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_registry(path: str | Path) -> Registry:
    """Read a registry. Raises ValueError for a file that cannot be read, unknown keys, wrong values, bad expressions."""
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"data.registry={str(path)!r} cannot be read: {error}") from None
    raw = _mapping(raw, str(path), "datasets mixtures")
    datasets, mixtures = (raw.get(kind) or {} for kind in ("datasets", "mixtures"))
    for kind, named in (("datasets", datasets), ("mixtures", mixtures)):
        if not isinstance(named, Mapping):
            raise ValueError(f"{path}: {kind} must map names to what they are")
        for name in named:
            if not isinstance(name, str) or not _NAME.fullmatch(name) or _NUMBER.fullmatch(name):
                raise ValueError(f"{path}: the name {name!r} in {kind} must be letters, digits, . - and _, and not a number")
    both = sorted(datasets.keys() & mixtures.keys())
    if both:
        raise ValueError(f"{path}: {both[0]!r} is a dataset and a mixture; give one of them another name")
    return Registry(
        path,
        {name: _source(value, f"{path}, dataset {name}", path.parent) for name, value in datasets.items()},
        {name: _recipe(value, f"{path}, mixture {name}") for name, value in mixtures.items()},
    )


def _source(value: Any, where: str, root: Path) -> Source:
    if isinstance(value, str):
        value = {"path": value}
    value = _mapping(value, where, "path subsets")
    if not isinstance(value.get("path"), str) or not value["path"]:
        raise ValueError(f"{where}: path must be a dataset folder")
    subsets = {}
    for name, raw in (value.get("subsets") or {}).items():
        here = f"{where}, subset {name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{here}: the name must be letters, digits, . - and _")
        raw = _mapping(raw, here, "include exclude first count fraction seed")
        chosen = [key for key in ("first", "count", "fraction") if key in raw]
        if len(chosen) > 1:
            raise ValueError(f"{here}: {' and '.join(chosen)} exclude each other; keep one")
        if not raw.keys() - {"seed"}:
            raise ValueError(f"{here} is the whole dataset; give include, exclude, first, count or fraction")
        files = {key: root / _text(raw[key], f"{here}: {key}") for key in ("include", "exclude") if key in raw}
        counts = {key: _whole(raw[key], f"{here}: {key}") for key in ("first", "count") if key in raw}
        fraction = _number(raw["fraction"], f"{here}: fraction") if "fraction" in raw else None
        if fraction is not None and fraction > 1:
            raise ValueError(f"{here}: fraction={raw['fraction']} must be at most 1; repeat samples with a weight in a mixture")
        subsets[name] = Subset(**files, **counts, fraction=fraction, seed=_whole(raw.get("seed", 0), f"{here}: seed", least=0))
    return Source(root / value["path"], subsets)


def _recipe(value: Any, where: str) -> Recipe:
    if isinstance(value, str):
        value = {"mix": value}
    value = _mapping(value, where, "mix weights size limit seed")
    if ("mix" in value) == ("weights" in value):
        raise ValueError(f"{where} must have either mix (an expression) or weights (a share for each part)")
    if "mix" in value:
        terms = parse_expression(_text(value["mix"], f"{where}: mix"), where)
    else:
        weights = value["weights"]
        if not isinstance(weights, Mapping) or not weights:
            raise ValueError(f"{where}: weights must map names to numbers")
        terms = ()
        for label, weight in weights.items():
            (term, *more) = parse_expression(str(label), f"{where}, weights")
            if more or term.weight != 1:
                raise ValueError(f"{where}: {label!r} in weights must be a name; write an expression as a mixture of its own")
            terms += (Term(_number(weight, f"{where}: the weight of {label}"), term.name, term.subset),)
    limit = value.get("limit")
    if isinstance(limit, Mapping):
        limit = {str(stage): _whole(number, f"{where}: the limit of {stage}") for stage, number in limit.items()}
    elif limit is not None:
        limit = _whole(limit, f"{where}: limit")
    size = _whole(value["size"], f"{where}: size") if "size" in value else None
    seed = _whole(value["seed"], f"{where}: seed", least=0) if "seed" in value else None
    return Recipe(terms, "weights" in value, size, limit, seed)


def _mapping(value: Any, where: str, known: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping with {', '.join(known.split())}, not {value!r}")
    for key in value:
        if key not in known.split():
            raise ValueError(f"{where}: unknown key {key!r}; {_known(str(key), known.split())}")
    return value


def _known(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"known are {', '.join(names) or 'none'}" + (f"; {near[0]}?" if near else "")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be a text, not {value!r}")
    return value


def _whole(value: Any, what: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"{what} must be a whole number of at least {least}, not {value!r}")
    return value


def _number(value: Any, what: str) -> Fraction:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return Fraction(str(value))  # 0.1 is one tenth, not the float next to it
    raise ValueError(f"{what} must be a number above 0, not {value!r}")
