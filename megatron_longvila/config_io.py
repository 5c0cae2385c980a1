"""Command line and YAML to `Config` and back: one typed tree, several --config files (later wins), then flags; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import os
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
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
    words = _files_first(argv)
    for path in _files(words):
        if os.path.isfile(path):  # else the parser says so; Path.is_file raises for text that is longer than a name may be
            _check_file(path, Config)
    try:
        namespace = parser.parse_args(words)
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
    """Write every field as YAML; `--config PATH` reads it back to an equal Config. A file that is there stays if the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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


def _files(words: Sequence[str]) -> list[Path]:
    """The configuration files among the words of a command line."""
    named = [value for word, value in itertools.pairwise(words) if word == "--config"]
    return [Path(path) for path in named + [word.partition("=")[2] for word in words if word.startswith("--config=")]]


def _check_file(path: Path, cls: type) -> None:
    """Refuse what the parser reads without a word as something else than it says, or not at all, in a file of fields of `cls`.

    Raises ValueError."""
    try:
        node = yaml.compose(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from None
    if node is None:
        raise ValueError(f"--config {path} is empty; give it fields, or leave it out")
    refuse_repeated_keys(node, str(path))
    _check_sections(node, cls, path)


def refuse_repeated_keys(node: yaml.Node, where: str, above: tuple[yaml.Node, ...] = ()) -> None:
    """Raise ValueError for a key that stands twice in a mapping of a YAML document: the first would be dropped without a word.

    And for a part that holds itself, by an alias: nothing that reads it would come to an end."""
    if any(node is one for one in above):
        raise ValueError(f"{where}: what begins in line {node.start_mark.line + 1} holds itself; write out what is meant")
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    lines: dict[str, int] = {}
    for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
        if key.value in lines:
            there = f"lines {lines[key.value]} and {key.start_mark.line + 1}"
            raise ValueError(f"{where}: {key.value} stands twice, in {there}, and only the last would count; keep one")
        lines[key.value] = key.start_mark.line + 1
    for inner in [value for _, value in pairs] or (node.value if isinstance(node, yaml.SequenceNode) else []):
        refuse_repeated_keys(inner, where, (*above, node))


def _check_sections(node: yaml.Node, cls: type, file: Path, where: str = "") -> None:
    """Raise ValueError unless a document, and every part of it that is a dataclass, is a mapping, and every other field has a value.

    A part may also be the name of a file that holds it, relative to the file that names it."""
    where = where or str(file)
    if not isinstance(node, yaml.MappingNode):
        found = repr(node.value) if isinstance(node, yaml.ScalarNode) and node.value else "a list" if node.value else "nothing"
        raise ValueError(f"{where} must be a mapping of fields and holds {found}; give it fields, or leave it out")
    defaults = _defaults(cls)
    for key, value in node.value:
        default = defaults.get(key.value) if isinstance(key, yaml.ScalarNode) else None
        if dataclasses.is_dataclass(default):
            other = file.parent / value.value if isinstance(value, yaml.ScalarNode) and value.value else None
            if other is not None and os.path.isfile(other):
                _check_file(other, type(default))
            else:
                _check_sections(value, type(default), file, f"{where}, {key.value}")
        elif default is not None and value.tag == "tag:yaml.org,2002:null":  # the parser takes it, whatever the type of the field
            raise ValueError(f"{where}, {key.value} has no value; give it one, or leave it out for {default!r}")


def _defaults(cls: type) -> dict[str, Any]:
    """Fields of a dataclass and what they are if not given."""
    return {
        field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)
    }


def _explain(message: str) -> str:
    """jsonargparse's message, with the nearest known fields if it is about an unknown one."""
    if "Expected a <class 'list'>" in message:
        return f"{message}\n  A list is written '[a, b]', also when it has one element"
    patterns = (r"unrecognized arguments: --([\w.]+)", r"Option '([\w.]+)' is not accepted", r"Group '([\w.]+)' .* option '([\w.]+)'")
    match = re.search("|".join(patterns), message)
    if not match:
        return message
    unknown = ".".join(word for word in match.groups() if word)
    near = difflib.get_close_matches(unknown, field_names(), n=3)
    return f"{message}; nearest fields: {', '.join(near)}" if near else message


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all leaves of a dataclass tree."""
    names = []
    for name, default in _defaults(cls).items():
        inner = dataclasses.is_dataclass(default)
        names += field_names(type(default), f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names


def name_fields(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of fields that may be written nested; one whose value is a mapping by itself stays whole."""
    for name, value in nested.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" not in field_names():
            yield from name_fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
