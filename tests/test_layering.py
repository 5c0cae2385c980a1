"""The shape of the package: imports point down, only `platform` knows the device, and a few habits that would undo both."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_longvila"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Lower numbers may be imported by higher ones. Parts of one number do not import each other, except that a benchmark runs the engine.
LAYERS = {
    "platform": 0,
    "kernels": 0,
    "pulse": 0,
    "config": 1,
    "config_io": 1,
    "config_check": 1,
    "config_check_model": 1,
    "mesh": 1,
    "mesh_cost": 1,
    "parallel": 2,
    "attention": 3,
    "models": 4,
    "data": 5,
    "checkpoint": 6,
    "training": 7,
    "inference": 7,
    "evaluation": 7,
    "watch": 7,
    "train": 8,
    "diagnose": 8,
    "doctor": 8,
}
CONFIGURATION = {"config", "config_io", "config_check", "config_check_model", "mesh", "mesh_cost"}
ALLOWED = {("evaluation", "inference")} | {(upper, lower) for upper in CONFIGURATION for lower in CONFIGURATION}
FORBIDDEN = {("data", "models"), ("models", "data")}
ENTRY_POINTS = {"train", "doctor", "platform"}


def part(path: Path) -> str:
    """Top-level part of the package a file belongs to; empty for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py").replace("__init__", "")


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything a module imports, also inside functions; relative imports made absolute."""
    package = ["megatron_longvila", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def is_upward(importer: str, imported: str) -> bool:
    """Whether part `importer` must not import part `imported`."""
    if importer == imported or not imported:
        return False
    if (importer, imported) in FORBIDDEN:
        return True
    return (importer, imported) not in ALLOWED and LAYERS[imported] >= LAYERS[importer]


def code_strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """String constants that are not docstrings, and every dotted attribute."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value, node.lineno
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno


def habits(source: str, path: Path) -> list[str]:
    """Every broken rule of one module."""
    tree = ast.parse(source)
    here, broken = part(path), []
    door = min((line for name, line in imports(tree, path) if name == "megatron_longvila.platform.mcore"), default=None)
    for name, line in imports(tree, path):
        top, *rest = name.split(".")
        if top == "megatron_longvila" and rest and here and rest[0] in LAYERS and is_upward(here, rest[0]):
            broken.append(f"line {line}: {here} imports {rest[0]}")
        if top in ("tools", "tests", "examples"):
            broken.append(f"line {line}: the package imports {top}")
        if top == "megatron" and here != "platform" and (door is None or door > line):
            broken.append(f"line {line}: megatron is imported before megatron_longvila.platform.mcore")
    if here != "platform":
        words = (
            (text, line)
            for text, line in code_strings(tree)
            if text.startswith(("torch.cuda", "cuda:")) or text in ("gloo", "nccl", "cuda")
        )
        broken += [f"line {line}: {text} outside platform" for text, line in words]
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            broken.append(f"line {node.lineno}: global")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            broken.append(f"line {node.lineno}: print")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv") and here not in ENTRY_POINTS:
            broken.append(f"line {node.lineno}: the environment is read below the entry points")
    return sorted(set(broken))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module(path):
    assert habits(path.read_text(), path) == []


def test_every_part_has_a_layer_and_a_telling_name():
    parts = {part(path) for path in MODULES} - {""}
    assert parts <= set(LAYERS), f"give these a layer: {parts - set(LAYERS)}"
    vague = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
    assert not vague & {name for path in MODULES for name in (*path.relative_to(PACKAGE).parts[:-1], path.stem)}


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("attention/ring.py", "from megatron_longvila.models import llm", "attention imports models"),
        ("models/llm.py", "def f():\n    import megatron_longvila.data.text", "models imports data"),
        ("data/text.py", "from megatron_longvila.models.llm import x", "data imports models"),
        ("data/text.py", "from ..models import llm", "data imports models"),
        ("inference/engine.py", "from megatron_longvila import training", "inference imports training"),
        ("platform/cpu.py", "from megatron_longvila.config import Config", "platform imports config"),
        ("models/llm.py", "import megatron.core", "before megatron_longvila.platform.mcore"),
        ("models/llm.py", "import megatron.core\nfrom megatron_longvila.platform import mcore", "before megatron_longvila.platform.mcore"),
        ("models/llm.py", "import torch\ntorch.cuda.synchronize()", "torch.cuda.synchronize outside platform"),
        ("data/batch.py", "x.to('cuda')", "cuda outside platform"),
        ("parallel/groups.py", "init('nccl')", "nccl outside platform"),
        ("models/llm.py", "def f():\n    global x", "global"),
        ("models/llm.py", "print(1)", "print"),
        ("models/llm.py", "import os\nos.environ['A']", "environment"),
        ("models/llm.py", "from tests import ranks", "imports tests"),
    ],
)
def test_a_broken_rule_is_found(path, source, message):
    assert any(message in line for line in habits(source, PACKAGE / path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "models/llm.py",
            '"""Speaks of torch.cuda and nccl."""\nfrom megatron_longvila.platform import mcore\nimport megatron.core',
        ),
        ("evaluation/needle.py", "from megatron_longvila.inference.engine import Engine"),
        ("checkpoint/hf.py", "from megatron_longvila.models import llm\nfrom megatron_longvila.data import text"),
        ("config_check.py", "from megatron_longvila.mesh import Mesh\nfrom megatron_longvila import platform"),
    ],
)
def test_a_kept_rule_is_not_reported(path, source):
    assert habits(source, PACKAGE / path) == []
