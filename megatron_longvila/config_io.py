"""Command line and YAML to `Config` and back: one typed tree, several --config files (later wins), then flags; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from megatron_longvila.config import Config


@functools.cache
def _parser(prog: str | None = None) -> ArgumentParser:
    description = "Train a LongVILA model. Flags are spelled as the fields of megatron_longvila/config.py."
    usage = "%(prog)s [--config FILE]... [--FIELD VALUE]..."
    # No abbreviations: `--parallel.tp` would silently mean tp_size until a field tp_something appears.
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, usage=usage, description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; may be repeated: later files win, flags win over all.")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def parse(argv: Sequence[str], *, prog: str | None = None) -> Config:
    """The configuration of a command line; `--help` and `--print_config` print and exit 0.

    Raises ValueError for a missing file, an unknown key (with the nearest known ones) or a value of the wrong type.
    """
    parser = _parser(prog)
    try:
        namespace = parser.parse_args(_files_first(argv))
    except ArgumentError as error:
        raise ValueError(_explain(str(error))) from None
    return _build(parser, namespace)


def from_dict(raw: Mapping[str, Any]) -> Config:
    """The configuration a nested dictionary describes; missing fields take their default. Raises ValueError as `parse` does."""
    parser = _parser()
    try:
        namespace = parser.parse_object(dict(raw))
    except ArgumentError as error:
        raise ValueError(_explain(str(error))) from None
    return _build(parser, namespace)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary of every field, fit for YAML, JSON and checkpoints."""
    return dataclasses.asdict(config)


def save(config: Config, path: str | Path) -> None:
    """Write every field as YAML; `--config PATH` reads it back to an equal Config."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def load(path: str | Path) -> Config:
    """Read what `save` wrote, or any YAML file of fields. Raises ValueError as `parse` does."""
    return parse(["--config", str(path)])


def _build(parser: ArgumentParser, namespace: Any) -> Config:
    parts = parser.instantiate(namespace)
    return Config(**{field.name: getattr(parts, field.name) for field in dataclasses.fields(Config)})


def _files_first(argv: Sequence[str]) -> list[str]:
    """`argv` with every --config in front, so that a flag wins wherever it stands."""
    files: list[str] = []
    flags: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config":
            files += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            (files if word.startswith("--config=") else flags).append(word)
    return files + flags


def _explain(message: str) -> str:
    """jsonargparse's message, with the nearest known fields if it is about an unknown one."""
    if "Expected a <class 'list'>" in message:
        return f"{message}\n  A list is written '[a, b]', also when it has one element"
    patterns = (r"unrecognized arguments: --([\w.]+)", r"Option '([\w.]+)' is not accepted", r"Group '([\w.]+)' .* option '([\w.]+)'")
    match = re.search("|".join(patterns), message)
    if not match:
        return message
    unknown = ".".join(word for word in match.groups() if word)
    near = difflib.get_close_matches(unknown, _field_names(Config), n=3)
    return f"{message}; nearest fields: {', '.join(near)}" if near else message


def _field_names(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all leaves of a dataclass tree."""
    names = []
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        inner = dataclasses.is_dataclass(default)
        names += _field_names(type(default), f"{prefix}{field.name}.") if inner else [f"{prefix}{field.name}"]
    return names
