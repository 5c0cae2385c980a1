"""Configurations of the step loop's tests."""

import pytest
from tiny_datasets import TinyDataset
from tiny_tokenizers import write_sentencepiece
from training_runs import SHAPES

from megatron_longvila.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LLMConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ProjectorConfig,
    TrainingConfig,
    VideoConfig,
    VisionConfig,
)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> str:
    return str(write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tiny.model"))


@pytest.fixture
def make_config(tmp_path, tokenizer_path, monkeypatch):
    """Builds configurations over datasets in memory; forked ranks inherit the replaced `open_dataset`."""
    from megatron_longvila.data import training_data
    from megatron_longvila.training import loop

    datasets = {"train": TinyDataset(SHAPES), "held_out": TinyDataset(SHAPES[:5], words="Which shape?")}
    for module in (loop, training_data):
        monkeypatch.setattr(module, "open_dataset", datasets.__getitem__)

    def make(
        name: str = "run", steps: int = 10, parallel=None, training=None, checkpoint=None, logging=None, tie_embeddings=False, **data
    ) -> Config:
        settings = {"train": ["train"], "tokenizer": tokenizer_path, "template": "plain", "context_length": 64, "global_batch_size": 2}
        return Config(
            output_dir=str(tmp_path / name),
            model=ModelConfig(
                vision=VisionConfig(4, 2, 16, 24, 3, 2, frames_per_micro_batch=4),
                projector=ProjectorConfig(),
                llm=LLMConfig("qwen2", 32, 48, 4, 4, 2, 8, 420, 256, 10_000.0, tie_embeddings=tie_embeddings),
                init_std=0.1,
            ),
            parallel=ParallelConfig(**(parallel or {})),
            data=DataConfig(video=VideoConfig(num_frames=6), max_bad_fraction=0.5, **settings | data),
            optimizer=OptimizerConfig(lr=0.01, warmup_steps=min(2, steps - 1), weight_decay=0.1),
            training=TrainingConfig(**{"steps": steps, "precision": "fp32", "loss_chunk_rows": 8} | (training or {})),
            checkpoint=CheckpointConfig(**(checkpoint or {})),
            logging=LoggingConfig(**{"sample_ids": True} | (logging or {})),
        )

    make.datasets = datasets
    return make
