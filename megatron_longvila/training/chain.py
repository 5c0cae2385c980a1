"""A chain of training stages: its file, its checks before anything starts, and what is done of it on disk. Imports no torch.

A chain file is YAML (paths in it are relative to it, and `name` of the chain defaults to the file's):

    name: five stages
    base: [../models/tiny.yaml]          # configuration files of every stage
    tokenizer: data/tokenizer.model      # data.tokenizer of every stage
    flags: {training.seed: 1}            # fields of every stage
    stages:
      - name: alignment
        config: [alignment.yaml]         # laid over the base
        flags: {data.train: [data/images]}
      - name: extension
        config: [extension.yaml]
        merge_lora: true                 # default: whether the stage has adapters

Later wins: base, config, flags of the chain, flags of the stage, flags of the command line. Each stage runs in DIR/stages/NAME and begins
with the weights of the one before.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_longvila.checkpoint.origin import COMPLETE, hash_mark
from megatron_longvila.config import Config
from megatron_longvila.config_check import check_inputs, resolve
from megatron_longvila.config_io import name_fields, parse, refuse_repeated_keys, to_dict
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.data.training_data import check_mixture, open_training_data
from megatron_longvila.pulse import MARKER

RECORD = "stage.json"
SUMMARY = "run_summary.json"
PATH_FIELDS = ("data.train", "data.registry", "data.evaluation", "data.tokenizer")
OWN_FIELDS = ("output_dir", "checkpoint.load")
# What a finished stage may have been trained without: its weights are the same to rounding, or do not depend on it at all.
NEUTRAL = re.compile(
    r"output_dir|parallel\..*|logging\..*|checkpoint\.(?!load_parts).*|data\.(num_workers|evaluation|train|mixture|registry|stage|tokenizer"
    r"|video\.timeout_s)"
    r"|training\.(check_trainable|may_see_no_gradient|recompute|recompute_vision|loss_chunk_rows|evaluation_interval|evaluation_rows)"
    r"|model\.(layers|attention_backend|kernels|vision\.frames_per_micro_batch)"
)
# What must be the same in two stages for the weights of one to fit the other.
STRUCTURAL = re.compile(
    r"model\.vision\.(image_size|patch_size|hidden_size|ffn_hidden_size|num_layers|num_attention_heads|select_layer)|model\.projector\..*"
    r"|model\.llm\.(architecture|hidden_size|ffn_hidden_size|num_layers|num_attention_heads|num_query_groups|head_dim|vocab_size"
    r"|tie_embeddings)"
)


@dataclass(frozen=True)
class Stage:
    """One stage of a chain file.

    Attributes:
        argv: what its training command gets, without output_dir and checkpoint.load.
        merge_lora: whether its adapters are merged afterwards; None means if it has any.
    """

    name: str
    argv: tuple[str, ...]
    merge_lora: bool | None


@dataclass(frozen=True)
class Chain:
    """A chain file with the command line's fields."""

    name: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Planned:
    """A stage that passed the checks.

    Attributes:
        folder: its run directory.
        config: its configuration on the chain's ranks; checkpoint.load is empty unless the stage is the first.
        merges: whether its adapters are merged afterwards.
        facts: what its result depends on, flat; `input` is the digest of the stage before.
    """

    stage: Stage
    folder: Path
    config: Config
    merges: bool
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of the facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def summary(self) -> dict[str, Any] | None:
        """What training wrote at its end; None before."""
        return _read_json(self.folder / SUMMARY)

    @property
    def trained(self) -> Path | None:
        """The checkpoint of the last step; None before the stage has passed its checks at the end, or if the checkpoint is gone."""
        found = self.summary
        checkpoint = self.folder / found["checkpoint"] if found and found["checkpoint"] else None
        return checkpoint if checkpoint and (checkpoint / COMPLETE).is_file() else None

    @property
    def merged(self) -> Path:
        """Where its merged weights go."""
        return self.folder / "merged"

    @property
    def result(self) -> Path | None:
        """The checkpoint the next stage begins with; None as long as the stage is not finished."""
        if not self.merges:
            return self.trained
        return self.merged if self.trained and (self.merged / COMPLETE).is_file() else None

    @property
    def record(self) -> dict[str, Any]:
        """stage.json: the facts it was started with and its attempts; empty before the first."""
        return _read_json(self.folder / RECORD) or {}

    def status(self) -> str:
        """finished, interrupted (by a signal), started or pending."""
        if self.result:
            return "finished"
        if not self.record:
            return "pending"
        return "interrupted" if (self.folder / MARKER).exists() else "started"


def read_chain(path: Path, overrides: Sequence[str] = ()) -> Chain:
    """Read a chain file; `overrides` are --FIELD VALUE for every stage, or --stages.NAME.FIELD VALUE for one.

    Raises:
        ValueError: no such file, not YAML, unknown or missing keys, values of another kind, names that repeat, an override of an unknown
            stage.
    """
    try:
        text = path.read_text()
        refuse_repeated_keys(yaml.compose(text), f"{path}")
        raw = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--chain {path} cannot be read: {error}") from None
    _check_keys(raw, f"{path}", required=("stages",), optional=("name", "base", "tokenizer", "flags"))
    if not isinstance(raw["stages"], list) or not raw["stages"]:
        raise ValueError(f"{path}: stages must be a list with at least one stage")
    names = []
    for number, stage in enumerate(raw["stages"], 1):
        _check_keys(stage, f"{path}, stage {number}", required=("name",), optional=("config", "flags", "merge_lora"))
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(stage["name"])):
            raise ValueError(f"{path}: stage name {stage['name']!r} must be letters, digits, - and _: it names a folder")
        names.append(str(stage["name"]))
    _check_kinds(raw, path)
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: stage names {names} must differ: each names a folder")
    common, own = _split_overrides(overrides, names)
    shared = dict(raw.get("flags") or {}) | ({"data.tokenizer": raw["tokenizer"]} if raw.get("tokenizer") else {})
    stages = []
    for name, stage in zip(names, raw["stages"], strict=True):
        files = [path.parent / file for file in (raw.get("base") or []) + (stage.get("config") or [])]
        words = [word for file in files for word in ("--config", str(file))]
        words += _flags(shared, path) + _flags(stage.get("flags") or {}, path)
        stages.append(Stage(name, (*words, *common, *own[name]), stage.get("merge_lora")))
    return Chain(str(raw.get("name") or path.stem), tuple(stages))


def plan_chain(
    chain: Chain, output_dir: Path, start: Path | None, *, num_ranks: int, ranks_per_host: int, restart_from: str | None = None
) -> list[Planned]:
    """Check every stage as its training command will, and that the weights of each fit the next.

    What a finished stage was trained from may be gone: its record says what it was.

    Args:
        start: checkpoint the first stage begins with; None leaves it to the first stage's configuration.
        restart_from: the stage from which on nothing counts as finished.

    Raises:
        ValueError: names the stage, the value, the rule and the way out.
    """
    planned: list[Planned] = []
    for stage in chain.stages:
        with _about(stage):
            config = parse(stage.argv)
            if config.checkpoint.load and (planned or start):
                raise ValueError("checkpoint.load is what the stage before wrote (--from_checkpoint for the first); leave it out")
            if not config.checkpoint.save_at_end:
                raise ValueError("checkpoint.save_at_end=false leaves nothing for the next stage; leave it out")
            config = replace(config, output_dir=str(output_dir / "stages" / stage.name))
            if start and not planned:
                config = replace(config, checkpoint=replace(config.checkpoint, load=str(start)))
            config = resolve(config, world_size=num_ranks, gpus_per_host=ranks_per_host)
            merges = config.model.lora.rank > 0 if stage.merge_lora is None else stage.merge_lora
            _check_merge(stage, config, merges, is_last=stage is chain.stages[-1])
            if planned:
                _check_fit(planned[-1], config)
            planned.append(Planned(stage, Path(config.output_dir), config, merges, facts={}))
    done = first_open(planned[: find_stage(planned, restart_from)] if restart_from else planned)
    mark = "fresh weights"
    for place, one in enumerate(planned):
        with _about(one.stage):
            recorded = one.record.get("facts", {}) if place < done else {}
            if not recorded:
                _check_inputs(one.config)
            if one.config.checkpoint.load:
                mark = hash_mark(Path(one.config.checkpoint.load)) or recorded["input"]
            planned[place] = one = replace(one, facts=_facts(one.config, mark, recorded))
        mark = one.digest
    return planned


@contextmanager
def _about(stage: Stage) -> Iterator[None]:
    """Whatever is refused inside names the stage."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from None


def check_finished(planned: Sequence[Planned]) -> list[str]:
    """Compare what stages on disk were started with and what they would be started with now.

    Returns:
        One sentence for each unfinished stage that goes on with changed fields.

    Raises:
        ValueError: a finished stage, or the input or data of a started one, has changed.
    """
    changes = []
    for one in planned:
        before = one.record.get("facts")
        if before is None or before == one.facts:
            continue
        differing = [name for name in before.keys() | one.facts.keys() if before.get(name) != one.facts.get(name)]
        said = ", ".join(f"{name} was {before.get(name)!r} and is {one.facts.get(name)!r}" for name in sorted(differing))
        if one.status() == "finished" or {"input", "data", "tokenizer"} & set(differing):
            raise ValueError(
                f"stage {one.stage.name} in {one.folder} was trained from something else than the chain says now: {said}; undo the change, "
                f"or --restart_from {one.stage.name} to train it and all that follow again, or take another --output_dir"
            )
        changes.append(f"stage {one.stage.name} goes on with other fields than it began with: {said}")
    return changes


def first_open(planned: Sequence[Planned]) -> int:
    """Place of the first stage that is still needed: all before a finished one are done, also where their weights were removed since."""
    return max((place for place, one in enumerate(planned, 1) if one.result), default=0)


def find_stage(planned: Sequence[Planned], name: str) -> int:
    """Place of the stage that --restart_from names. Raises ValueError if there is none."""
    names = [one.stage.name for one in planned]
    if name not in names:
        raise ValueError(f"--restart_from {name} must be one of the chain's stages {', '.join(names)}")
    return names.index(name)


def restart_from(planned: Sequence[Planned], name: str) -> None:
    """Remove the folders of a stage and of all that follow. Raises ValueError for an unknown name."""
    for one in planned[find_stage(planned, name) :]:
        if one.record:
            shutil.rmtree(one.folder)


def training_words(one: Planned, load: str) -> list[str]:
    """Arguments of a stage's training command; `load` is the checkpoint it begins with, empty for fresh weights."""
    return [*one.stage.argv, "--output_dir", str(one.folder), *(["--checkpoint.load", load] if load else [])]


def _check_keys(raw: Any, where: str, *, required: Sequence[str], optional: Sequence[str]) -> None:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a mapping with {', '.join(required)} and perhaps {', '.join(optional)}, not {raw!r}")
    for key in raw:
        if key not in (*required, *optional):
            near = difflib.get_close_matches(str(key), (*required, *optional), n=1)
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join((*required, *optional))}" + f"; {near[0]}?" * bool(near))
    missing = [key for key in required if key not in raw]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} is missing")


def _check_kinds(raw: Mapping[str, Any], path: Path) -> None:
    """Values of the chain and of its stages, which are known to be mappings with known keys."""
    kinds = {"base": (list, "a list of files"), "config": (list, "a list of files"), "flags": (dict, "a mapping of fields to values")}
    kinds["merge_lora"] = (bool, "true or false")
    for where, part in [(f"{path}", raw), *((f"{path}, stage {stage['name']}", stage) for stage in raw["stages"])]:
        for key, (kind, said) in kinds.items():
            found = part.get(key)
            named = all(isinstance(one, str) for one in found) if isinstance(found, list) else True
            if found is not None and not (isinstance(found, kind) and named):
                raise ValueError(f"{where}: {key} must be {said}, not {part[key]!r}")


def _flags(fields: Mapping[str, Any], path: Path) -> list[str]:
    """Fields of a chain file as words of a command line; paths become absolute."""
    words = []
    for name, value in name_fields(fields):
        if name in OWN_FIELDS:
            raise ValueError(f"{path}: {name} is set by the chain itself (--output_dir, --from_checkpoint); leave it out")
        if name == "config":
            raise ValueError(f"{path}: config is a key of its own beside flags; write config: [{value}] there, or name it in base")
        if name in PATH_FIELDS:
            if not all(isinstance(one, str) for one in (value if isinstance(value, list) else [value])):
                raise ValueError(f"{path}: {name} must be a path, or a list of them, not {value!r}")
            resolve_one: Callable[[str], str] = lambda one: str((path.parent / one).absolute())  # noqa: E731
            value = [resolve_one(one) for one in value] if isinstance(value, list) else resolve_one(value)
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def _split_overrides(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of every stage, and of each one."""
    common: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    target = common
    for word in words:
        if word.startswith("--"):
            found = re.match(r"--stages\.([A-Za-z0-9_-]+)\.(.*)", word)
            if found and found[1] not in own:
                raise ValueError(f"{word}: the chain has no stage {found[1]!r}, only {', '.join(names)}")
            target, word = (own[found[1]], f"--{found[2]}") if found else (common, word)
            field = word[2:].partition("=")[0]
            if field in OWN_FIELDS or field == "config":
                raise ValueError(f"--{field} is set by the chain itself; see --from_checkpoint and the chain file")
        target.append(word)
    return common, own


def _check_merge(stage: Stage, config: Config, merges: bool, *, is_last: bool) -> None:
    if merges and not config.model.lora.rank:
        raise ValueError("merge_lora is true and model.lora.rank=0 has no adapters to merge; leave merge_lora out")
    if config.model.lora.rank and not merges and not is_last:
        raise ValueError(f"model.lora.rank={config.model.lora.rank} and merge_lora is false: the next stage begins with merged weights")


def _check_fit(before: Planned, config: Config) -> None:
    """The weights that are taken from the stage before must fit."""
    old, new = flatten(to_dict(before.config)), flatten(to_dict(config))
    wrong = [
        f"{name} is {old[name]!r} there and {new[name]!r} here"
        for name in new
        if STRUCTURAL.fullmatch(name) and old[name] != new[name] and name.split(".")[1] in config.checkpoint.load_parts
    ]
    if wrong:
        raise ValueError(f"the weights of stage {before.stage.name} do not fit: {', '.join(wrong)}; use one model in all stages")


def _check_inputs(config: Config) -> None:
    """What a stage that is to be trained reads is there."""
    check_inputs(config)
    load = config.checkpoint.load
    if load and not hash_mark(Path(load)):
        raise ValueError(f"checkpoint.load={load} holds no {COMPLETE}: give a complete checkpoint folder")


def _facts(config: Config, mark: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What the result of a stage depends on; if finished, what is gone of tokenizer and data (of a mixture: its registry) as `recorded`."""
    fields = {name: value for name, value in flatten(to_dict(config)).items() if not NEUTRAL.fullmatch(name)}
    files = [config.data.registry] if config.data.mixture else [Path(folder, "dataset.json") for folder in config.data.train]
    if recorded and not all(Path(file).is_file() for file in files):
        fields["data"] = recorded["data"]
    elif config.data.mixture:
        check_mixture(config.data)
        datasets, mixture = open_training_data(config.data)
        fields["data"] = [*(dataset.hash for dataset in datasets), mixture.describe()]
    else:
        fields["data"] = [json.loads(Path(folder, "dataset.json").read_text())["hash"] for folder in config.data.train]
    gone = recorded and not Path(config.data.tokenizer).exists()
    tokenizer = recorded["tokenizer"] if gone else load_tokenizer(config.data.tokenizer).hash
    return json.loads(json.dumps(fields | {"tokenizer": tokenizer, "input": mark}))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None
