"""What a checkpoint says about a run besides its state: the weights it began with, and what its token ids mean."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_longvila.config import Config
from megatron_longvila.data.conversation import Turn, find_template
from megatron_longvila.data.text import Tokenizer

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
TOKENS = "tokens.json"
# What an imported model brings along and its export needs: tensors that do not reach the loss, its own files, and how it was spelled.
PASSENGERS = "passengers.safetensors"
SOURCE = "source"
IMPORTED = "imported.json"


def describe_origin(config: Config) -> dict[str, Any]:
    """The checkpoint whose weights a new run begins with: its place, the parts taken from it, and the hash of its list of files.

    `load` is empty for a run that begins with fresh weights.
    """
    folder = Path(config.checkpoint.load).absolute() if config.checkpoint.load else None
    return {"load": str(folder or ""), "parts": sorted(config.checkpoint.load_parts), "mark": hash_mark(folder) if folder else ""}


def find_origin(origin: dict[str, Any], config: Config) -> Path | None:
    """The folder whose weights a resumed run began with, None if they were fresh.

    It may have moved: what checkpoint.load says now is looked at first, and either place counts only with the same list of files.

    Raises:
        ValueError: neither place holds it.
    """
    if not origin["load"]:
        return None
    places = list(dict.fromkeys(path for path in (config.checkpoint.load, origin["load"]) if path))
    for place in places:
        if hash_mark(Path(place)) == origin["mark"]:
            return Path(place)
    raise ValueError(
        f"training.check_trainable compares with the weights this run began with, which were in {origin['load']} and are not in "
        f"{' or '.join(places)}; say where that checkpoint is now with --checkpoint.load DIR, or set --training.check_trainable false"
    )


def hash_mark(folder: Path) -> str:
    """SHA-256 of a checkpoint's list of files, empty if it has none."""
    mark = folder / COMPLETE
    return hashlib.sha256(mark.read_bytes()).hexdigest() if mark.is_file() else ""


def describe_tokens(tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    """What the token ids of a run mean, and where its positions lie: the content of tokens.json in each of its checkpoints."""
    turns = [Turn("system", ""), Turn("user", ""), Turn("assistant", "")]
    names = [segment.value for segment in find_template(config.data.template)(turns, True) if segment.kind == "special"]
    scaling = config.model.llm.rope_scaling
    return {
        "tokenizer_sha256": tokenizer.hash,
        "newline_ids": list(tokenizer.newline_ids),
        "newline_follows": "each frame and each image",
        "template": config.data.template,
        "special_ids": {name: tokenizer.find_special(name) for name in names},
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "rotary_base": config.model.llm.rotary_base,
        "rope_scaling": asdict(scaling) if scaling else None,
    }


def check_tokens(folder: Path, tokens: dict[str, Any]) -> list[str]:
    """Compare what token ids mean in the checkpoint `folder` with what they mean in a run that loads its weights.

    Returns:
        Differences that a later stage may want (template, rotary base and scaling), one sentence each. Nothing for a checkpoint without
        tokens.json: imported weights.

    Raises:
        ValueError: the ids themselves mean something else: the tokenizer or the newline after each frame differs.
    """
    path = folder / TOKENS
    if not path.is_file():
        return []
    before = json.loads(path.read_text())
    for name in ("tokenizer_sha256", "newline_ids"):
        if before[name] != tokens[name]:
            raise ValueError(
                f"checkpoint.load={folder} was trained with {name}={before[name]}, data.tokenizer gives {tokens[name]}: the same ids would "
                "mean other tokens; use the tokenizer it was trained with, or do not take the llm from it (checkpoint.load_parts)"
            )
    names = ("template", "rotary_base", "rope_scaling")
    return [f"{name} was {before[name]} and is {tokens[name]} now" for name in names if before[name] != tokens[name]]


def copy_travellers(source: Path, target: Path) -> None:
    """Hand what an imported model brought along from one checkpoint folder to the next, unchanged."""
    for name in (PASSENGERS, IMPORTED):
        if (source / name).is_file():
            shutil.copy(source / name, target)
    if (source / SOURCE).is_dir():
        shutil.copytree(source / SOURCE, target / SOURCE)
