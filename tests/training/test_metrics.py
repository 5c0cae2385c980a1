"""FLOPs against the shapes of the real parameters, the peak table, and metrics.jsonl across kills and sinks."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_longvila.checkpoint.hf import full_shapes
from megatron_longvila.config import Config, LLMConfig, LoggingConfig, ModelConfig, ProjectorConfig, TrainingConfig, VisionConfig
from megatron_longvila.training.metrics import MetricsLog, StepMetrics, peak_flops, plot_loss, read_lines, row_cost


def make_config(projector: str = "mlp_downsample", trainable=("vision", "projector", "llm")) -> Config:
    vision = VisionConfig(28, 7, 32, 48, 3, 4)
    model = ModelConfig(vision=vision, projector=ProjectorConfig(projector), llm=LLMConfig("qwen2", 64, 96, 4, 8, 4, 16, 120, 256))
    return Config(model=model, training=TrainingConfig(trainable=list(trainable)))


@pytest.mark.parametrize("projector", ["mlp_downsample", "mlp_downsample_3x3_fix", "linear", "mlp2x_gelu"])
def test_linear_flops_are_twice_the_weights(projector: str) -> None:
    """One multiply-add per weight and row: a decoder layer sees each token, the tower each patch, the projector each visual token."""
    config = make_config(projector)
    sizes = {"tower": 0, "projector": 0, "decoder": 0}
    for name, shape in full_shapes(config).items():
        if len(shape) < 2 or name.endswith(("position_table", "word_embeddings.weight", "output_layer.weight")):
            continue  # biases and norms; tables are looked up; the output layer is counted by label
        part = "tower" if name.startswith("vision_tower.") else "projector" if name.startswith("projector.") else "decoder"
        sizes[part] += math.prod(shape)
    cost = row_cost(config)
    patches, visual = 16, config.model.tokens_per_frame
    attention = 2 * 4 * patches**2 * 32  # two layers; scores and values, 2 FLOPs a multiply-add
    assert cost.token == 3 * 2 * sizes["decoder"]
    assert cost.frame == 3 * (2 * (patches * sizes["tower"] + visual * sizes["projector"]) + attention)
    assert cost.label == 3 * 2 * 64 * 120
    assert cost.pair == 3 * 4 * 4 * 128  # 4 layers of 8 heads of 16


def test_frozen_parts_cost_less() -> None:
    whole, projector, llm = (row_cost(make_config(trainable=parts)) for parts in (["vision", "projector", "llm"], ["projector"], ["llm"]))
    assert projector.token == pytest.approx(whole.token * 2 / 3) and projector.pair == whole.pair
    assert llm.token == whole.token and llm.frame == pytest.approx(whole.frame / 3)
    assert llm.frame < projector.frame < whole.frame
    embeddings, norms = (row_cost(make_config(trainable=[part])) for part in ("llm_embeddings", "llm_norms"))
    assert (embeddings.label, norms.label) == (whole.label, pytest.approx(whole.label * 2 / 3))
    assert embeddings.token == norms.token == projector.token


def test_rows_add_up() -> None:
    cost = row_cost(make_config())
    assert cost.row((10, 4), 3, 5) == 3 * cost.frame + 14 * cost.token + (55 + 10) * cost.pair + 5 * cost.label
    assert cost.row((), 0, 0) == 0


def test_peak_table() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert (peak_flops("NVIDIA H100 PCIe"), peak_flops("NVIDIA H100 NVL"), peak_flops("NVIDIA H200 NVL")) == (756e12, 835e12, 835e12)
    assert (peak_flops("NVIDIA B200"), peak_flops("NVIDIA GB200")) == (2250e12, 2500e12)
    assert peak_flops("cpu") is peak_flops("NVIDIA RTX A1000") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12


def line(step: int, **values) -> dict:
    return StepMetrics(step, 1.5, 0.1, 2.0, 10.0, 1.0, None, 0.0, 1.0, 0, 0.0).to_dict() | values


def test_resume_keeps_each_step_once(tmp_path: Path) -> None:
    config = make_config()
    log = MetricsLog(tmp_path, config, 0)
    for step in (1, 2, 3):
        log.write(line(step))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')  # a kill cut this line
    log = MetricsLog(tmp_path, config, 2)
    log.write(line(3, loss=None))
    log.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(one["step"], one["loss"]) for one in lines] == [(1, 1.5), (2, 1.5), (3, None)]
    assert "sample_ids" not in lines[0]
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_console_line() -> None:
    text = StepMetrics(3, None, 1e-4, None, 1234.0, 5.6, 0.41, 0.1, 2.0, 7, 3725.0).line(10)
    assert "step 3/10 | loss no labels | lr 1.000e-04 | grad norm - | 1234 tokens/s | 5.6 frames/s | mfu 41.0%" in text
    assert text.endswith("skipped 7 | eta 1:02:05")


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, replace(make_config(), logging=LoggingConfig(tensorboard=True)), 0)
    log.write(line(1))
    log.write(line(2, lr=0.9))  # undone by a kill: the run goes on from step 1
    log.close()
    log = MetricsLog(tmp_path, replace(make_config(), logging=LoggingConfig(tensorboard=True)), 1)
    log.write(line(2, loss=None, sample_ids=[["a"]]))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1] and [event.step for event in events.Scalars("lr")] == [1, 2]
    assert [round(event.value, 6) for event in events.Scalars("lr")] == [0.1, 0.1]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["sample_ids"] == [["a"]]


def test_missing_sink_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb could not be imported .* pip install wandb"):
        MetricsLog(tmp_path, replace(make_config(), logging=LoggingConfig(wandb_project="p")), 0)
