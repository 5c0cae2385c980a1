"""What a run may train and what it must leave alone: counted, written down, and checked twice against the weights it began with.

The digests of the input are taken before a resumed run loads its state, from the weights that the run began with: on any layout the check
compares with the true start. Hashing reads every local weight once (three times per run, about a second per GB).

These digests see only what changes after loading. What loading itself does is checked on the disk, at the end: the frozen tensors of the
last checkpoint are those of the input, rounded once if the run's dtype is less exact, which is counted and logged when it happens. That
reads each of them twice from the disk, shared by the ranks.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longvila.checkpoint.origin import check_tokens, find_origin
from megatron_longvila.checkpoint.sharded import PARTS, PASSENGERS, Checkpoints, load_weights, read_progress
from megatron_longvila.checkpoint.streaming import DistributedTensors
from megatron_longvila.config import Config
from megatron_longvila.models.init import full_shape, global_parameters, initialize_weights
from megatron_longvila.models.lora import is_adapter
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.training.metrics import Totals

logger = logging.getLogger(__name__)

FIRST_CHECK = 3  # adapters need it: B begins at zero, so that A sees its first gradient one update later
NAMED = 12  # tensors an error names


class TrainableError(RuntimeError):
    """A tensor that should train did not, or one that should not did."""


def fill_model(model: torch.nn.Module, checkpoints: Checkpoints, newest: Path | None) -> Path | None:
    """Give `model` the weights the run began with, also when `newest` is to be resumed and only the check of what trains needs them.

    Returns:
        The folder they are from, None if they are fresh (or not needed).
    """
    config, groups = checkpoints.config, checkpoints.groups
    initialize_weights(model, config, config.training.seed)
    if newest is None:
        origin = Path(config.checkpoint.load) if config.checkpoint.load else None
        parts = config.checkpoint.load_parts
        if origin is not None and "llm" in parts:
            for change in check_tokens(origin, checkpoints.tokens):
                logger.info("%s: %s", origin, change)
    elif config.training.check_trainable:
        saved = read_progress(newest).get("origin")
        origin, parts = (find_origin(saved, config), saved["parts"]) if saved else (None, [])
    else:
        return None
    if origin is not None:
        load_weights(origin, model, groups, parts)
    return origin


def note_rounding(model: torch.nn.Module, checkpoints: Checkpoints, origin: Path) -> None:
    """Log what a new run's weights from `origin` lost when they were loaded, and keep the count in what its checkpoints say of them.

    Collective over all ranks; needs the parts that do not train to be frozen already.
    """
    parts = checkpoints.config.checkpoint.load_parts
    rounded = count_rounded(model, origin, parts)
    checkpoints.origin = checkpoints.origin | {"rounded": rounded}
    if rounded["tensors"] and dist.get_rank() == 0:
        logger.warning(
            "%s: %d tensors, %d of them frozen, were rounded from %s to %s when they were loaded, and are saved so; "
            "--training.precision fp32 keeps them as they are",
            origin,
            rounded["tensors"],
            rounded["frozen"],
            " and ".join(rounded["from"]),
            " and ".join(rounded["to"]),
        )


def count_rounded(model: torch.nn.Module, origin: Path, parts: Iterable[str]) -> dict[str, Any]:
    """How many tensors of the checkpoint `origin` the model holds in a dtype that cannot have all their values; reads no weights.

    Collective over all ranks, the same answer everywhere.

    Returns:
        {tensors, frozen: how many of these do not train, from, to: names of dtypes}.
    """
    held = {(name, parameter.dtype, parameter.requires_grad) for name, parameter in global_parameters(model)}
    (held,) = union_over_ranks(held)
    saved = DistributedTensors(origin, [PARTS[part] for part in parts]).infos
    found = [
        (saved[name].dtype, dtype, trained)
        for name, dtype, trained in held
        if name in saved and torch.promote_types(saved[name].dtype, dtype) != dtype
    ]
    before, after = ({str(one[place]).removeprefix("torch.") for one in found} for place in (0, 1))
    return {"tensors": len(found), "frozen": sum(not one[2] for one in found), "from": sorted(before), "to": sorted(after)}


def part_of(name: str) -> str:
    """Part of the model that a global parameter name belongs to: vision, projector, llm, or lora for the decoder's adapters."""
    if name.startswith("vision_tower."):
        return "vision"
    if name.startswith("projector."):
        return "projector"
    return "lora" if ".lora." in name else "llm"


def count_parameters(model: torch.nn.Module, config: Config, groups: Groups) -> dict[str, dict[str, int]]:
    """{part: {trained, frozen}} and the same for `total`, over all tp and pp ranks; rows that pad the vocabulary do not count.

    Collective over all ranks, the same answer everywhere.
    """
    counts = {part: {"trained": 0, "frozen": 0} for part in ("vision", "projector", "llm", "lora")}
    if groups.dp_cp.rank() == 0 and groups.tp.rank() == 0:
        for name, parameter in global_parameters(model):
            if getattr(parameter, "shared", False):  # the last stage's copy of a tied embedding
                continue
            shape = list(full_shape(parameter, groups.tp.size()))
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                shape[0] = config.model.llm.vocab_size
            counts[part_of(name)]["trained" if parameter.requires_grad else "frozen"] += math.prod(shape)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, counts)
    summed = {part: {kind: sum(one[part][kind] for one in gathered) for kind in found} for part, found in counts.items()}
    summed = {part: found for part, found in summed.items() if any(found.values())}
    return summed | {"total": {kind: sum(found[kind] for found in summed.values()) for kind in ("trained", "frozen")}}


def describe_counts(counts: dict[str, dict[str, int]]) -> str:
    """A small table for the console."""
    lines = [f"{'parameters':12}{'trained':>16}{'frozen':>16}"]
    lines += [f"{part:12}{found['trained']:16,}{found['frozen']:16,}" for part, found in counts.items()]
    return "\n".join(lines)


def main_weights(model: torch.nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """(global name, fp32 main weight, Adam's state of it) of every trainable tensor of which this rank's optimizer owns a share.

    The weight is the flat share of this data-parallel rank; in an fp32 run it is a view of the parameter. The state is empty before the
    first update.
    """
    names = {parameter: name for name, parameter in global_parameters(model)}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:
            continue
        for parameter, (group, order) in part.model_param_group_index_map.items():
            main = part.optimizer.param_groups[group]["params"][order]
            yield names[parameter], main, part.optimizer.state.get(main, {})


class TrainableCheck:
    """Compares the weights of a run with those it began with. All methods are collective over all ranks.

    A step counts when it had lr > 0, labels, and, if the vision tower or the projector trains, media: only then can everything move.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, config: Config, totals: Totals):
        """Take the digests of the weights as they are now, which must be the run's input.

        Args:
            model: this rank's chunk, not wrapped in DDP.
            totals: keeps the number of steps that count, so that it is part of the run's checkpoints.
        """
        self._model, self._optimizer, self._settings = model, optimizer, config.training
        self._lr = config.optimizer.lr
        self._needs_media = bool({"vision", "projector"} & set(config.training.trainable))
        self._totals = totals
        self._main = {name: digest(main) for name, main, _ in main_weights(model, optimizer)}
        self._frozen = {name: digest(parameter) for name, parameter in self._frozen_parameters()}

    def after_step(self, step: int, *, lr: float, frames: float, labels: float) -> None:
        """Count a step by its learning rate and the frames and labels of its global batch; after the third that counts, check.

        Raises:
            TrainableError: as `check`.
        """
        if lr > 0 and labels and (frames or not self._needs_media):
            self._totals.counted_steps += 1
            if self._totals.counted_steps == FIRST_CHECK:
                self.check(f"after step {step}", first=True)

    def check(self, when: str, *, first: bool = False) -> None:
        """Every trainable tensor has seen a gradient and moved, no frozen one has changed.

        Raises:
            TrainableError: otherwise; names the tensors and the way out, on every rank.
        """
        moved, fed = set(), set()
        for name, main, state in main_weights(self._model, self._optimizer):
            if digest(main) != self._main[name]:
                moved.add(name)
            if any(key in state and bool(state[key].any()) for key in ("exp_avg", "exp_avg_sq")):
                fed.add(name)
        trainable = {name for name, parameter in global_parameters(self._model) if parameter.requires_grad}
        changed = {name for name, parameter in self._frozen_parameters() if digest(parameter) != self._frozen[name]}
        trainable, moved, fed, changed = union_over_ranks(trainable, moved, fed, changed)

        starved = trainable - fed
        allowed = {name for name in starved if any(fnmatchcase(name, pattern) for pattern in self._settings.may_see_no_gradient)}
        if allowed and dist.get_rank() == 0:
            logger.info("%s: no gradient so far, as training.may_see_no_gradient allows: %s", when, list_names(allowed))
        if not first and self._totals.counted_steps >= FIRST_CHECK:
            starved = allowed  # the first check has seen their gradients; Adam's moments fade to zero in thousands of steps without any
        self._refuse(when, starved - allowed, trainable - moved - starved, changed)

    def _refuse(self, when: str, starved: set[str], still: set[str], changed: set[str]) -> None:
        """Raise TrainableError unless the three sets are empty."""
        needs = "lr > 0, media and labels" if self._needs_media else "lr > 0 and labels"
        # An adapter's A has no gradient before its B, which begins at zero, has moved.
        too_few = f", fewer than {FIRST_CHECK}: a longer run may be all it needs" if self._totals.counted_steps < FIRST_CHECK else ""
        problems = []
        if starved:
            problems.append(
                f"{len(starved)} trainable tensors only ever saw zero gradients: {list_names(starved)}; leave them out of "
                f"training.trainable={self._settings.trainable}, find out why the loss does not reach them, or name them in "
                "training.may_see_no_gradient (shell patterns)"
            )
        if still:
            problems.append(
                f"{len(still)} trainable tensors got gradients and equal the run's input to the last bit: {list_names(still)}; updates of "
                f"optimizer.lr={self._lr} (and less in the warm-up) are lost in fp32 weights, or something writes them back: raise the rate"
            )
        if changed:
            problems.append(
                f"{len(changed)} frozen tensors differ from the run's input: {list_names(changed)}; "
                f"training.trainable={self._settings.trainable} does not name them, so nothing may write them"
            )
        if problems:
            raise TrainableError(
                f"{when} ({self._totals.counted_steps} steps had {needs}{too_few}): {'. '.join(problems)}. "
                "--training.check_trainable false goes on without this check"
            )

    def _frozen_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter) for name, parameter in global_parameters(self._model) if not parameter.requires_grad)


def check_saved(model: torch.nn.Module, checkpoints: Checkpoints, last: Path) -> None:
    """What did not train is in the checkpoint `last` as it is in the run's input, by the files of both: nothing that loads or saves is
    trusted.

    Frozen tensors have the SHA-256 of the input's, rounded once if `last` has a less exact dtype; passengers that of the input's file.
    Collective over all ranks, which share the reading. Without an input, or `last`, there is nothing to compare.

    Raises:
        TrainableError: otherwise; names the tensors, on every rank.
        OSError: a rank does not find the input, or cannot read a file; names the rank, the file and the cause, on every rank.
    """
    origin = on_all_ranks(lambda: find_origin(checkpoints.origin, checkpoints.config))[dist.get_rank()]
    if origin is None:
        return
    written = [last.exists()]
    dist.broadcast_object_list(written, src=0)
    if not written[0]:
        return
    prefixes = tuple(PARTS[part] for part in checkpoints.origin["parts"])
    frozen = {name for name, parameter in global_parameters(model) if not parameter.requires_grad and name.startswith(prefixes)}
    (frozen,) = union_over_ranks(frozen)
    changed = set().union(*on_all_ranks(lambda: find_changed(frozen, origin, last, prefixes)))
    if changed:
        raise TrainableError(
            f"{len(changed)} frozen tensors of {last} are not those of {origin}: {list_names(changed)}; they were loaded or saved as "
            "something else, and what was trained beside them fits those. --training.check_trainable false goes on without this check"
        )


def find_changed(frozen: set[str], origin: Path, last: Path, prefixes: tuple[str, ...]) -> set[str]:
    """Those of this rank's share of the frozen tensors that are others in `last` than in `origin`. Raises as `check_saved`, but alone."""
    check_passengers(origin / PASSENGERS, last / PASSENGERS)
    before, after = DistributedTensors(origin, prefixes), DistributedTensors(last, prefixes)
    # A checkpoint without adapters leaves those of the model as they were made.
    names = [name for name in frozen if name in before.infos or not is_adapter(name)]
    names.sort(key=lambda name: (after.infos[name].num_bytes, name))  # so that ranks get about as many bytes each
    mine = names[dist.get_rank() :: dist.get_world_size()]
    return {name for name in mine if digest(before.read(name).to(after.infos[name].dtype)) != digest(after.read(name))}


def on_all_ranks(look: Callable[[], Any]) -> list[Any]:
    """What `look` returns on each rank. It may fail on one of them, and must hold no collective. Collective over all ranks.

    Raises:
        TrainableError, OSError: what `look` raised first, by rank, on every rank: none waits for one that has left.
    """
    found, failure, cause = None, None, None
    try:
        found = look()
    except TrainableError as error:
        cause, failure = error, (TrainableError, str(error))
    except Exception as error:
        cause, failure = error, (OSError, f"rank {dist.get_rank()} cannot compare with the run's input: {type(error).__name__}: {error}")
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (failure, found))
    for kind, text in filter(None, (failure for failure, _ in gathered)):
        raise kind(text) from cause
    return [found for _, found in gathered]


def check_passengers(before: Path, after: Path) -> None:
    """Raise TrainableError if two files of passengers differ; both may be missing."""
    digests = [hash_file(path) if path.exists() else "no such file" for path in (before, after)]
    if digests[0] != digests[1]:
        raise TrainableError(
            f"the passengers of the input and of the last checkpoint differ: {before} ({digests[0]}), {after} ({digests[1]}); "
            "tensors that are not trained must travel unchanged"
        )


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's elements in memory order."""
    return hashlib.sha256(tensor.detach().contiguous().flatten().cpu().view(torch.uint8).numpy()).digest()


def union_over_ranks(*sets: set[str]) -> list[set[str]]:
    """Each set united over all ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sets)
    return [set().union(*found) for found in zip(*gathered, strict=True)]


def list_names(names: set[str]) -> str:
    """The first names in order, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(sorted(names)[:NAMED]) + (f" and {more} more" if more > 0 else "")
