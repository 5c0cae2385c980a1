"""The configuration of an evaluation: the checkpoint's, without what only training asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_longvila.config import Config, LoggingConfig, OptimizerConfig
from megatron_longvila.config_io import parse, save
from megatron_longvila.evaluation.configuration import evaluation_config

TINY = str(Path(__file__).parents[2] / "examples" / "models" / "tiny.yaml")


@pytest.fixture
def trained(tmp_path: Path) -> Config:
    (tmp_path / "tokenizer.model").touch()
    return parse(["--config", TINY, "--data.tokenizer", str(tmp_path / "tokenizer.model")])


@pytest.mark.parametrize("kind", ["held-out rows", "optimizer", "logs"])
def test_what_only_training_needs_is_not_asked_for(kind: str, trained: Config, tmp_path: Path, monkeypatch) -> None:
    """A checkpoint is evaluated where neither the packages nor the held-out rows of its run are."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = {
        "held-out rows": replace(
            trained, data=replace(trained.data, evaluation=["gone"]), training=replace(trained.training, evaluation_interval=100)
        ),
        "optimizer": replace(trained, optimizer=OptimizerConfig(backend="te")),
        "logs": replace(trained, logging=LoggingConfig(tensorboard=True, wandb_project="x")),
    }[kind]
    save(run, tmp_path / "config.yaml")
    config = evaluation_config(tmp_path, [], prog="evaluate", world_size=1, gpus_per_host=1)
    assert (config.model, config.data.evaluation, config.checkpoint.load) == (trained.model, [], str(tmp_path))
