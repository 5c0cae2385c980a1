"""The configuration an evaluation runs with: that of the checkpoint, on the mesh of this job, changed by flags. Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_longvila.config import CheckpointConfig, Config, LoggingConfig, OptimizerConfig, ParallelConfig
from megatron_longvila.config_check import resolve
from megatron_longvila.config_io import load, parse, save


def evaluation_config(
    checkpoint: Path, flags: Sequence[str], *, prog: str, world_size: int, gpus_per_host: int, evaluation: Sequence[Path] = ()
) -> Config:
    """Read a checkpoint's config.yaml, lay `flags` (any field) over it and check it for `world_size` ranks.

    Args:
        prog: name of the program in what an unknown flag is refused with.
        evaluation: held-out dataset folders.

    Raises:
        ValueError: the folder is no checkpoint, the tokenizer has moved, or a field does not fit.
    """
    saved = checkpoint / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"--checkpoint {checkpoint} holds no config.yaml; give a folder like RUN/checkpoints/step_0000100")
    trained = load(saved)
    trainable = ["lora"] if trained.model.lora.rank else ["vision", "projector", "llm"]  # nothing trains here; any legal choice will do
    start = replace(
        trained,
        parallel=ParallelConfig(),  # the mesh of this job is not that of the training run
        data=replace(trained.data, evaluation=[str(folder) for folder in evaluation], global_batch_size=world_size),
        # Nor are its optimizer, its evaluations and its logs, whose packages and data this machine need not have.
        optimizer=OptimizerConfig(),
        training=replace(trained.training, trainable=trainable, recompute="none", evaluation_interval=0, evaluation_rows=0),
        checkpoint=CheckpointConfig(load=str(checkpoint)),
        logging=LoggingConfig(),
    )
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        save(start, Path(folder, "config.yaml"))
        config = parse(["--config", str(Path(folder, "config.yaml")), *flags], prog=prog)
    if not Path(config.data.tokenizer).exists():
        raise ValueError(f"data.tokenizer={config.data.tokenizer!r} does not exist; say where it is now with --data.tokenizer PATH")
    return resolve(config, world_size=world_size, gpus_per_host=gpus_per_host)
