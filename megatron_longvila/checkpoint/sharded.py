"""Sharded training checkpoints: save (also in the background), find the newest good one, resume on any layout, load weights only.

A checkpoint is a folder `step_0000010` with Megatron's `torch_dist` files, the resolved `config.yaml`, and `complete.json`, which lists
every file with its size. It is written under a hidden name and renamed when complete: a kill at any moment leaves the previous one usable.
`passengers.safetensors` (tensors of an imported model that do not reach the loss), `imported.json` and `source/` (its own files) go along
from checkpoint to checkpoint unchanged.
`tokens.json` says what the token ids of the run mean.
The files hold pickled Python objects: load only checkpoints you trust.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from megatron_longvila import config_io, platform
from megatron_longvila.checkpoint.complete import VERSION, find_damage, find_leftovers, find_steps, mark_complete, sync_folder, write_text
from megatron_longvila.checkpoint.origin import PASSENGERS, TOKENS, copy_travellers, describe_origin
from megatron_longvila.checkpoint.space import checkpoint_bytes, explain, require_space
from megatron_longvila.config import Config, LoraConfig, ModelConfig
from megatron_longvila.models.lora import holds_adapters, is_adapter
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject  # isort: skip
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # isort: skip

logger = logging.getLogger(__name__)

SAVE_S = 3600.0  # how long ranks wait for each other in a save: some write more than others, and rank 0 brings all of it to the disk

PARTS = {"vision": "vision_tower.", "projector": "projector.", "llm": "language_model."}


class Resumable(Protocol):
    """Something whose state is a dict of plain values and tensors, the same on all ranks: the schedule, the loader. (Of the totals, which
    hold a time, rank 0's are written.)"""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainingState:
    """Everything a resumed run needs, besides its configuration.

    Attributes:
        model: the bare model chunk of this rank, not its DDP wrapper (whose keys begin with "module.").
        optimizer: Megatron's optimizer of that chunk.
        totals: what the run has done so far; None is not written.
    """

    model: torch.nn.Module
    optimizer: Any
    scheduler: Resumable
    loader: Resumable
    totals: Resumable | None = None


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that is being written: where, of which step, and its bytes."""

    folder: Path
    step: int
    needed: int


class Checkpoints:
    """The checkpoints of one run directory. Every public method is collective: all ranks call it together."""

    def __init__(self, root: Path, config: Config, groups: Groups, tokens: dict[str, Any] | None = None):
        """`root` is created by the first save; `tokens` is what each checkpoint says of its token ids (`origin.describe_tokens`).

        Raises ValueError if checkpoint.keep_last is below 1.
        """
        if config.checkpoint.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={config.checkpoint.keep_last} must be at least 1: the newest checkpoint is always kept")
        self.root, self.config, self.groups, self.tokens = root, config, groups, tokens
        self.origin = describe_origin(config)
        self._travellers = Path(config.checkpoint.load) if config.checkpoint.load else None
        self._pending = AsyncCallsQueue(persistent=False) if config.checkpoint.async_save else None

    def save(self, state: TrainingState, step: int) -> None:
        """Write `step_{step}`. With checkpoint.async_save this returns once the state is copied; `poll` or `wait` completes it.

        Ranks wait for each other for up to SAVE_S here.

        Raises OSError with the sizes, from here or from what completes it, if the disk is too small; earlier checkpoints stay.
        """
        self.wait()
        folder = self.root / f".{_name(step)}.partial"
        if dist.get_rank() == 0:
            for leftover in find_leftovers(self.root):
                shutil.rmtree(leftover)
            folder.mkdir(parents=True)
        with self._patience():
            dist.barrier()
        metadata = _metadata(self.groups)
        model = state.model.sharded_state_dict(metadata=metadata)
        sharded = {
            "model": model,
            "optimizer": state.optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata),
            "rng": _sharded_rng(platform.rng_state()),
            "progress": self._progress(step),
            "scheduler": state.scheduler.state_dict(),
            "loader": state.loader.state_dict(),
        }
        if state.totals is not None:
            sharded["totals"] = state.totals.state_dict()
        self._writing = _Writing(folder, step, checkpoint_bytes(sharded))
        with self._full_disk_explained():
            require_space(self.root, self._writing.needed, step)
            request = dist_checkpointing.save(
                sharded,
                str(folder),
                ("torch_dist", 1),
                async_sharded_save=self._pending is not None,
                preprocess_common_before_consistancy_check=_comparable,
                content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
            )
            commit = partial(self._commit, folder, step)
            if self._pending is None:
                commit()
            else:
                request.add_finalize_fn(commit)
                self._pending.schedule_async_request(request)

    def poll(self) -> None:
        """Complete a background save whose writers have ended on all ranks; returns at once otherwise."""
        if self._pending is not None and self._pending.get_num_unfinalized_calls():
            with self._full_disk_explained():
                self._pending.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Complete a background save, waiting for its writers."""
        if self._pending is not None and self._pending.get_num_unfinalized_calls():
            with self._full_disk_explained():
                self._pending.maybe_finalize_async_calls(blocking=True)

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """Bound the collectives inside by SAVE_S instead of parallel.timeout_s."""
        timeout_s = self.config.parallel.timeout_s
        platform.limit_collectives(max(SAVE_S, timeout_s))
        try:
            yield
        finally:
            platform.limit_collectives(timeout_s)

    @contextlib.contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        """Turn what the library raises on a full disk into an OSError with the sizes, and give the room of the unfinished folder back."""
        try:
            with self._patience():
                yield
        except (Exception, CheckpointException) as error:  # which is no Exception
            full = explain(error, self.root, self._writing.folder, self._writing.needed, self._writing.step)
            if full is None:
                raise
            if dist.get_rank() == 0:
                shutil.rmtree(self._writing.folder, ignore_errors=True)  # other ranks may still write into it
            raise full from error

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or would lie."""
        return self.root / _name(step)

    def newest(self) -> Path | None:
        """The newest complete and undamaged checkpoint; those passed over are named in the log. Rank 0 looks, all ranks get its answer."""
        with self._patience():
            found = [self._search() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def resume(self, state: TrainingState, folder: Path) -> int:
        """Continue from `folder` (what `newest` found): fills `state` and returns the step.

        Any layout may continue; random states are restored on the layout that saved them only.

        Raises:
            ValueError: the checkpoint holds weights alone, or was written by another version, with another optimizer backend, while other
                parts trained or with other adapters or rotary positions, or the loader refuses its state.
        """
        progress = read_progress(folder)
        self._check_resumable(folder, progress)
        metadata = _metadata(self.groups)
        model = state.model.sharded_state_dict(metadata=metadata)
        sharded = {"model": model, "optimizer": state.optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)}
        same_layout = progress["layout"] == self._layout()
        if same_layout:
            sharded["rng"] = _sharded_rng(None)
        loaded = dist_checkpointing.load(sharded, str(folder))
        state.model.load_state_dict(loaded["model"])
        state.optimizer.load_state_dict(loaded["optimizer"])
        state.scheduler.load_state_dict(loaded["scheduler"])
        state.loader.load_state_dict(loaded["loader"])
        if state.totals is not None:
            state.totals.load_state_dict(loaded["totals"])
        if same_layout:
            platform.set_rng_state(loaded["rng"])
        self._travellers, self.origin = folder, progress["origin"]
        if dist.get_rank() == 0:
            logger.info("resumed from %s (step %d, written on %s)", folder, progress["step"], progress["layout"])
        return progress["step"]

    def _check_resumable(self, folder: Path, progress: dict[str, Any]) -> None:
        """Raises ValueError as `resume`."""
        if not progress["layout"]:
            raise ValueError(
                f"{folder} holds weights alone, no optimizer state and no data position to continue from; "
                f"start a run from it with --checkpoint.load {folder} and another output_dir"
            )
        if "origin" not in progress:
            raise ValueError(
                f"{folder} was written by an earlier version of this program and does not say what weights its run began with; "
                f"start a new run from it with --checkpoint.load {folder} and another output_dir"
            )
        wanted = self._progress(progress["step"])
        for name, field in (("optimizer_backend", "optimizer.backend"), ("trainable", "training.trainable")):
            if progress[name] != wanted[name]:
                raise ValueError(
                    f"{folder} was trained with {field}={progress[name]!r}, this run has {wanted[name]!r}, and the optimizer state of one "
                    f"does not fit the other; set --{field} as it was, or start a new run from its weights in another output_dir with "
                    f"--checkpoint.load {folder}"
                )
        saved, built = (_meaning(config.model) for config in (config_io.load(folder / "config.yaml"), self.config))
        changed = [f"model.{name} was {saved[name]} and is {built[name]} now" for name in saved if saved[name] != built[name]]
        if changed:
            raise ValueError(
                f"{folder} was trained as another model: {', '.join(changed)}; set it as it was, or start a new run from its weights in "
                f"another output_dir with --checkpoint.load {folder} (adapters merged first with tools/merge_lora.py)"
            )

    def _progress(self, step: int) -> dict[str, Any]:
        progress = {"version": VERSION, "step": step, "layout": self._layout(), "optimizer_backend": self.config.optimizer.backend}
        return progress | {"trainable": sorted(self.config.training.trainable), "origin": self.origin}

    def _layout(self) -> dict[str, int | str]:
        mesh = self.groups.mesh
        sizes = {name: getattr(mesh, name) for name in ("world_size", "tp_size", "pp_size", "ulysses_size", "ring_size")}
        return sizes | {"device": platform.backend()}

    def _commit(self, folder: Path, step: int) -> None:
        """Mark the written folder complete, give it its name, point `latest` at it and remove the oldest."""
        if dist.get_rank() == 0:
            config_io.save(self.config, folder / "config.yaml")
            if self.tokens is not None:
                write_text(folder / TOKENS, json.dumps(self.tokens, indent=1) + "\n")
            if self._travellers is not None:
                copy_travellers(self._travellers, folder)
            mark_complete(folder)
            final = self.root / _name(step)
            if final.exists():  # a damaged one of the same step
                _remove(final)
            os.rename(folder, final)
            self._travellers = final  # the folder they came from may be removed next
            write_text(self.root / "latest", final.name + "\n")
            sync_folder(self.root)
            # A later step can only be a damaged one that the resume passed over: it must not push out a good one.
            folders = [path for number, path in find_steps(self.root).items() if number <= step]
            for old in folders[: -self.config.checkpoint.keep_last]:
                _remove(old)
            logger.info("saved %s", final)
        dist.barrier()

    def _search(self) -> Path | None:
        for folder in reversed(find_steps(self.root).values()):
            damage = find_damage(folder)
            if damage is None:
                return folder
            logger.warning("skipped checkpoint %s: %s", folder, damage)
        return None


def load_weights(folder: Path, model: torch.nn.Module, groups: Groups, parts: Iterable[str] = tuple(PARTS)) -> None:
    """Fill `model` (this rank's bare chunk, any layout) with the weights of a checkpoint; optimizer and data position are left.

    Build the optimizer afterwards: it copies the weights.

    Args:
        parts: what is taken: vision, projector, llm (with its adapters). The others keep their values, and so do adapters of the model if
            the checkpoint holds none.

    Raises:
        ValueError: `folder` is no complete checkpoint, or holds other adapters than the model; the message says what to do.
    """
    damage = find_damage(folder)
    if damage is not None:
        raise ValueError(f"checkpoint.load={folder} cannot be used: {damage}")
    read_progress(folder)
    prefixes = tuple(PARTS[part] for part in parts)
    wanted = model.sharded_state_dict(metadata=_metadata(groups))
    wanted = {name: entry for name, entry in wanted.items() if name.startswith(prefixes)}
    saved, built = config_io.load(folder / "config.yaml").model.lora, getattr(model, "lora", LoraConfig())
    if "llm" in parts and not holds_adapters(folder, saved, built):
        wanted = {name: entry for name, entry in wanted.items() if not is_adapter(name)}
    loaded = dist_checkpointing.load({"model": wanted}, str(folder)).get("model", {})  # a pipeline stage may want nothing
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected and not wanted.keys() & set(missing), (unexpected, missing)


def save_weights(
    folder: Path, model: torch.nn.Module, config: Config, groups: Groups, passengers: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a checkpoint of weights alone, for `load_weights`. All ranks call it; `folder` must not exist yet.

    Args:
        passengers: tensors of an imported model that do not reach the loss; kept for its export. Those of rank 0 are written.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    metadata = _metadata(groups)
    progress = {"version": VERSION, "step": 0, "layout": {}, "optimizer_backend": ""}
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=metadata), "progress": progress}, str(folder), ("torch_dist", 1))
    if dist.get_rank() == 0:
        config_io.save(config, folder / "config.yaml")
        if passengers:
            save_file(passengers, folder / PASSENGERS)
        mark_complete(folder)
    dist.barrier()


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """Fields that no weight's shape shows (or shows too late) and without which the weights are another model."""
    lora = replace(model.lora, targets=sorted(model.lora.targets)) if model.lora.rank else LoraConfig()
    llm = ("rotary_base", "rope_scaling", "norm_epsilon", "num_attention_heads", "num_query_groups", "head_dim")
    vision = ("num_attention_heads", "layernorm_epsilon")
    found = {"lora": lora} | {f"llm.{name}": getattr(model.llm, name) for name in llm}
    return found | {f"vision.{name}": getattr(model.vision, name) for name in vision}


def _name(step: int) -> str:
    return f"step_{step:07d}"


def _metadata(groups: Groups) -> dict[str, Any]:
    """How Megatron shards the state. Layers are keyed one by one, so that freezing or adapting some of them stays possible; the optimizer
    is written per parameter, for any layout, and gathered to one rank of each dp x cp group in host memory instead of to all of them."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,
        "dp_cp_group": groups.dp_cp,
    }


def _sharded_rng(state: dict[str, Any] | None) -> ShardedObject:
    """Each rank's own random state."""
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def _comparable(common: dict[str, Any]) -> dict[str, Any]:
    """The part of the common state that must be the same on all ranks: the optimizer's gathered state exists on one rank per group only,
    and the totals hold each rank's time."""
    return {key: value for key, value in common.items() if key not in ("optimizer", "totals")}


def read_progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, layout, what trained, and the weights its run began with.

    Raises:
        ValueError: it has another format.
    """
    progress = dist_checkpointing.load_common_state_dict(str(folder)).get("progress")
    if progress is None or progress["version"] != VERSION:
        found = None if progress is None else progress["version"]
        raise ValueError(f"{folder} has checkpoint format {found}, this program reads {VERSION}; convert it with the program that wrote it")
    return progress


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves no folder that looks like one."""
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)
