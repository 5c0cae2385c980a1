"""The mark of a complete checkpoint folder: a list of its files with their sizes, written when all of them are on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from megatron_longvila.checkpoint.origin import COMPLETE

VERSION = 1
_HASHED_BYTES = 16 << 20  # larger files are checked by size alone: reading all of a checkpoint again would cost minutes


def find_steps(root: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, in order. A copy that somebody keeps beside them, under another name, is none of them."""
    found = {int(match[1]): path for path in root.glob("step_*") if (match := re.fullmatch(r"step_([0-9]{7,})", path.name))}
    return dict(sorted((step, path) for step, path in found.items() if path.name == f"step_{step:07d}"))


def find_leftovers(root: Path) -> list[Path]:
    """What a run that was killed left half-written or half-removed."""
    return [path for path in root.glob(".step_*") if re.fullmatch(r"\.step_\d+\.(partial|removed)", path.name)]


def mark_complete(folder: Path) -> None:
    """Write `complete.json`: size of every file, and the SHA-256 of the small ones. Everything is on disk before the mark is."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": _digest(path)}
    sync_folder(folder)
    write_text(folder / COMPLETE, json.dumps({"version": VERSION, "files": files}, indent=1) + "\n")
    sync_folder(folder)


def find_damage(folder: Path) -> str | None:
    """What makes a checkpoint folder unusable, None if nothing was found."""
    mark = folder / COMPLETE
    if not folder.is_dir():
        return "there is no such folder"
    if not mark.exists():
        return f"it has no {COMPLETE}, so its writing did not end"
    try:
        files = json.loads(mark.read_text())["files"]
        found = (_find_damage(folder / name, name, facts["size"], facts["sha256"]) for name, facts in files.items())
        return next(filter(None, found), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a changed byte can make anything of it
        return f"{COMPLETE} cannot be read ({error!r})"
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error})"


def _find_damage(path: Path, name: str, size: int, sha256: str | None) -> str | None:
    """What is wrong with one file of the list."""
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if sha256 and _digest(path) != sha256:
        return f"{name} has other content than was written"
    return None


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, on disk when this returns."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _digest(path: Path) -> str | None:
    """SHA-256 of a small file, None for a large one."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size <= _HASHED_BYTES else None


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
