"""What the step loop begins with: checkpoints that fit and do not, and what did not train against the input's weights and files."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_runs import losses, read, run_training, summary

from megatron_longvila.config import CheckpointConfig, Config
from ranks import RankError, run_ranks


def test_old_checkpoints_without_resume_are_refused(make_config) -> None:
    config = make_config(steps=1, checkpoint={"save_interval": 1})
    run_ranks(run_training, 1, config)
    again = replace(config, checkpoint=replace(config.checkpoint, resume=False))
    with pytest.raises(RankError, match="holds checkpoints up to step_0000001 and checkpoint.resume=false"):
        run_ranks(run_training, 1, again)


def test_weights_alone_start_a_new_run(make_config) -> None:
    first = make_config("first", steps=3)
    run_ranks(run_training, 1, first)
    second = make_config("second", steps=1, checkpoint={"load": str(Path(first.output_dir) / "checkpoints" / "step_0000003")})
    run_ranks(run_training, 1, second)
    fresh = make_config("fresh", steps=1)
    run_ranks(run_training, 1, fresh)
    assert losses(second)[0] < 0.9 * losses(fresh)[0]
    assert [line["step"] for line in read(second)] == [1]


def test_weights_of_other_tokens_are_refused(make_config) -> None:
    from megatron_longvila.checkpoint.sharded import mark_complete

    first = make_config("first", steps=1)
    run_ranks(run_training, 1, first)
    source = Path(first.output_dir) / "checkpoints" / "step_0000001"
    tokens = json.loads((source / "tokens.json").read_text())
    (source / "tokens.json").write_text(json.dumps(tokens | {"newline_ids": [5]}))
    (source / "complete.json").unlink()
    mark_complete(source)
    second = make_config("second", steps=1, checkpoint={"load": str(source)})
    with pytest.raises(RankError, match=r"was trained with newline_ids=\[5\], data.tokenizer gives .*load_parts"):
        run_ranks(run_training, 1, second)
    run_ranks(run_training, 1, make_config("third", steps=1, checkpoint={"load": str(source), "load_parts": ["vision", "projector"]}))


def move_frozen(rank: int, number: int, run) -> None:
    if number == 3:
        run.state.model.language_model.decoder.final_layernorm.weight.data += 1


def test_a_resumed_run_is_compared_with_its_true_start(make_config, tmp_path) -> None:
    """A frozen weight that moved before the resume is found after it, on another mesh, and where the input lies now does not matter."""
    first = make_config("first", steps=3)
    run_ranks(run_training, 1, first)
    source = Path(first.output_dir) / "checkpoints" / "step_0000003"
    second = make_config("second", steps=4, training={"trainable": ["vision", "projector"]}, checkpoint={"load": str(source)})
    sound, unchecked = replace(second, output_dir=str(tmp_path / "sound")), replace(second.training, check_trainable=False)
    run_ranks(run_training, 2, replace(second, training=unchecked), move_frozen)
    run_ranks(run_training, 2, sound)
    source = source.rename(tmp_path / "elsewhere")
    with pytest.raises(RankError, match="compares with the weights this run began with.*say where that checkpoint is now"):
        run_ranks(run_training, 1, sound)
    second, sound = (replace(one, checkpoint=CheckpointConfig(load=str(source))) for one in (second, sound))
    run_ranks(run_training, 1, sound)  # nothing left to do but the check
    with pytest.raises(RankError, match="1 frozen tensors differ from the run's input: language_model.decoder.final_layernorm.weight;"):
        run_ranks(run_training, 1, second)


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from megatron_longvila.checkpoint.streaming import DistributedTensors

    tensors = DistributedTensors(folder, ["vision_tower.", "projector.", "language_model."])
    return {name: tensors.read(name) for name in tensors.infos}


def _log(rank: int, config: Config, fault=None) -> list[str]:
    """Train; returns what the rank's log says of rounding. `fault(model)` follows the loading of the weights."""
    import logging

    from megatron_longvila.training import loop

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron_longvila").addHandler(handler)
    if fault is not None:
        real = loop.fill_model

        def fill_model(model, *others):
            origin = real(model, *others)
            fault(model)
            return origin

        loop.fill_model = fill_model
    run_training(rank, config)
    return [line for line in lines if "rounded" in line]


def touch_decoder(model: torch.nn.Module) -> None:
    """One bit of one frozen tensor of the last layer, on the last rank: of its slice (tp), or of its stage (pp)."""
    if dist.get_rank() == dist.get_world_size() - 1:
        model.language_model.decoder.layers[-1].mlp.linear_fc2.weight.data.view(torch.uint8)[0, 0] ^= 1


@pytest.mark.parametrize("mesh", ["tp2", "pp2"])
def test_frozen_tensors_are_the_files_of_the_input(make_config, mesh) -> None:
    """An fp32 input is rounded to bf16 once, which the log and the summary say; whatever else loading did to it is found at the end."""
    world, sizes = {"tp2": (2, {"tp_size": 2}), "pp2": (2, {"pp_size": 2})}[mesh]
    first = make_config("first", steps=1)
    run_ranks(run_training, 1, first)
    source = Path(first.output_dir) / "checkpoints" / "step_0000001"
    settings = {"parallel": sizes, "checkpoint": {"load": str(source)}}
    half = make_config("half", steps=3, training={"trainable": ["projector"], "precision": "bf16"}, **settings)
    logs = run_ranks(_log, world, half)
    before, after = saved_tensors(source), saved_tensors(Path(half.output_dir) / "checkpoints" / "step_0000003")
    frozen = [name for name in before if not name.startswith("projector.")]
    assert before.keys() == after.keys() and 0 < len(frozen) < len(before)
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in frozen)
    assert logs[1:] == [[]] * (world - 1) and len(logs[0]) == 1
    assert f"{len(before)} tensors, {len(frozen)} of them frozen, were rounded from float32 to bfloat16" in logs[0][0]
    rounded = {"tensors": len(before), "frozen": len(frozen), "from": ["float32"], "to": ["bfloat16"]}
    assert (summary(first)["rounded"], summary(half)["rounded"]) == (None, rounded)
    with pytest.raises(
        RankError, match=r"1 frozen tensors of .*step_0000003 are not those of .*: language_model.decoder.layers.3.mlp.linear_fc2.weight;"
    ):
        run_ranks(_log, world, replace(half, output_dir=half.output_dir + "_touched"), touch_decoder)


def test_nothing_is_rounded_into_the_same_or_a_wider_dtype(make_config) -> None:
    """Nor is it when a run goes on: the count is of what the run began with."""
    first = make_config("first", steps=1, training={"precision": "bf16"})
    run_ranks(run_training, 1, first)
    source = Path(first.output_dir) / "checkpoints" / "step_0000001"
    none = {"tensors": 0, "frozen": 0, "from": [], "to": []}
    for precision in ("bf16", "fp32"):
        training = {"trainable": ["projector"], "precision": precision}
        config = make_config(precision, steps=3, training=training, checkpoint={"load": str(source)})
        assert run_ranks(_log, 1, config) == [[]] and summary(config)["rounded"] == none
    assert run_ranks(_log, 1, config) == [[]] and summary(config)["rounded"] == none


def cut(checkpoints, last: Path) -> Path:
    """A copy of the checkpoint whose files of tensors lack their second half."""
    copy = shutil.copytree(last, last.with_name("cut"))
    for path in copy.glob("*.distcp"):
        os.truncate(path, path.stat().st_size // 2)
    return copy


def leave_out(checkpoints, last: Path) -> Path:
    return last.with_name("not_there")


def lose_input(checkpoints, last: Path) -> Path:
    checkpoints.config = replace(checkpoints.config, checkpoint=CheckpointConfig())
    checkpoints.origin = checkpoints.origin | {"load": "/not_there"}
    return last


def _said(rank: int, config: Config, harm) -> str:
    """What a rank says at the end of a run in which rank 1 alone meets the harm."""
    from megatron_longvila.training import loop

    real = loop.check_saved
    if rank == 1:
        loop.check_saved = lambda model, checkpoints, last: real(model, checkpoints, harm(checkpoints, last))
    try:
        run_training(rank, config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("harm", "file"), [(cut, r"/cut/__\d_\d\.distcp"), (leave_out, r"/not_there/\.metadata"), (lose_input, "are not in /not_there")]
)
def test_a_rank_that_cannot_read_what_did_not_train_tells_all(make_config, harm, file) -> None:
    first = make_config("first", steps=1)
    run_ranks(run_training, 1, first)
    load = {"load": str(Path(first.output_dir) / "checkpoints" / "step_0000001")}
    second = make_config("second", steps=3, training={"trainable": ["projector"]}, checkpoint=load)
    said = run_ranks(_said, 2, second, harm, timeout_s=60)
    assert said[0] == said[1]
    assert re.fullmatch(rf"OSError: rank 1 cannot compare with the run's input: .*{file}.*", said[0], re.DOTALL)
