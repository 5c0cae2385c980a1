"""Checkpoints of a toy model: exact resume, other layouts, frozen stages, background saves, damage, kills and pruning."""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_longvila.config import (
    CheckpointConfig,
    Config,
    LLMConfig,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeScaling,
    TrainingConfig,
    VisionConfig,
)
from ranks import RankError, run_ranks


def make_config(precision: str = "fp32", trainable=("vision", "projector", "llm"), **checkpoint) -> Config:
    return Config(
        parallel=ParallelConfig(overlap_grad_reduce=False),
        optimizer=OptimizerConfig(lr=0.01, warmup_steps=2, weight_decay=0.1),
        training=TrainingConfig(precision=precision, trainable=list(trainable)),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def train(rank: int, root: str, config: Config, sizes: dict, steps: int, saves: tuple[int, ...] = ()) -> list[float]:
    """Resume from `root` if it holds a checkpoint, train until `steps`, save after the steps in `saves`; returns the losses."""
    from toy_model import build_toy

    from megatron_longvila.checkpoint.sharded import Checkpoints

    toy = build_toy(config, **sizes)
    checkpoints = Checkpoints(Path(root), config, toy.groups)
    done = toy.resume(checkpoints)
    losses = []
    for step in range(done + 1, steps + 1):
        losses.append(toy.train_step())
        if step in saves:
            checkpoints.save(toy.state, step)
        checkpoints.poll()
    checkpoints.wait()
    return losses


CASES = {
    "dp2": (2, {}, make_config()),
    "tp2": (2, {"tp_size": 2}, make_config()),
    "pp2": (2, {"pp_size": 2}, make_config()),
    "tp2_pp2": (4, {"tp_size": 2, "pp_size": 2}, make_config()),
    "bf16_dp2": (2, {}, make_config("bf16")),
    "projector_only_pp2": (2, {"pp_size": 2}, make_config(trainable=["projector"])),
    "projector_only_bf16_pp2_dp2": (4, {"pp_size": 2}, make_config("bf16", ["projector"])),
    "async_dp2": (2, {}, make_config(async_save=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_exact(case: str, tmp_path: Path) -> None:
    world, sizes, config = CASES[case]
    whole = run_ranks(train, world, str(tmp_path / "a"), config, sizes, 6)
    first = run_ranks(train, world, str(tmp_path / "b"), config, sizes, 3, (3,))
    second = run_ranks(train, world, str(tmp_path / "b"), config, sizes, 6)
    for rank in range(world):
        assert first[rank] + second[rank] == whole[rank]
    assert whole[0][-1] < whole[0][0]


def _many_buckets(rank: int, root: str, config: Config, steps: int, saves: tuple[int, ...], without: str | None) -> list[float]:
    from functools import partial

    from megatron_longvila.platform import mcore_fixes
    from megatron_longvila.training import optimizer

    mcore_fixes.apply(without=without)
    optimizer.DistributedDataParallelConfig = partial(optimizer.DistributedDataParallelConfig, bucket_size=600)
    return train(rank, root, config, {}, steps, saves)


@pytest.mark.parametrize("without,exact", [(None, True), ("unpadded_ranges", False)])
def test_padded_buckets(without: str | None, exact: bool, tmp_path: Path) -> None:
    """Gradients in several buckets, whose ends are padded, as in any model of more than 40 million parameters."""
    config = replace(make_config(), parallel=ParallelConfig(overlap_grad_reduce=True))
    whole = run_ranks(_many_buckets, 2, str(tmp_path / "whole"), config, 4, (), without)[0]
    run_ranks(_many_buckets, 2, str(tmp_path / "run"), config, 2, (2,), without)
    again = run_ranks(_many_buckets, 2, str(tmp_path / "run"), config, 4, (), without)[0]
    assert (again == whole[2:]) == exact


def test_any_layout_continues(tmp_path: Path) -> None:
    """Training on tp 2 x pp 2, continued on other meshes, follows the uninterrupted run to rounding."""
    config = make_config()
    whole = run_ranks(train, 4, str(tmp_path / "a"), config, {"tp_size": 2, "pp_size": 2}, 6)[0]
    run_ranks(train, 4, str(tmp_path / "b"), config, {"tp_size": 2, "pp_size": 2}, 3, (3,))
    for world, sizes in ((1, {}), (2, {"pp_size": 2}), (4, {"tp_size": 2}), (4, {})):
        continued = run_ranks(train, world, str(tmp_path / "b"), config, sizes, 6)[0]
        assert continued == pytest.approx(whole[3:], rel=1e-5), (world, sizes)
    # Another optimizer state would show: the same weights with fresh moments leave the curve by far more than rounding
    fresh = run_ranks(_weights_only, 1, str(tmp_path / "b" / "checkpoints" / "none"), str(tmp_path / "b"), config)[0]
    assert abs(fresh[-1] - whole[-1]) > 1e-3 * whole[-1]


def _weights_only(rank: int, root: str, source: str, config: Config) -> list[float]:
    from toy_model import build_toy

    from megatron_longvila.checkpoint.sharded import load_weights

    toy = build_toy(config)
    before = {name: value.clone() for name, value in toy.state.model.state_dict().items() if value is not None}
    load_weights(Path(source) / "step_0000003", toy.state.model, toy.groups)
    assert all(not torch.equal(before[name], value) for name, value in toy.state.model.state_dict().items() if value is not None)
    toy.state.optimizer.reload_model_params()
    toy.state.loader.consumed = 12
    toy.state.scheduler.step(3)
    return [toy.train_step() for _ in range(3)]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_keep_last_and_latest(tmp_path: Path) -> None:
    run_ranks(train, 2, str(tmp_path), make_config(keep_last=2), {}, 5, (1, 2, 3, 4, 5))
    assert _names(tmp_path) == ["latest", "step_0000004", "step_0000005"]
    assert (tmp_path / "latest").read_text() == "step_0000005\n"
    assert (tmp_path / "step_0000005" / "config.yaml").exists()
    with pytest.raises(RankError, match="keep_last=0 must be at least 1"):
        run_ranks(train, 1, str(tmp_path), make_config(keep_last=0), {}, 5)


def test_what_somebody_keeps_beside_them_is_left_alone(tmp_path: Path) -> None:
    """A copy under another name is neither resumed from, nor pruned, nor counted; nor is what another program is writing there."""
    config = make_config(keep_last=1)
    for step in (2, 3):
        run_ranks(train, 1, str(tmp_path), config, {}, step, (step,))
        shutil.copytree(tmp_path / f"step_000000{step}", tmp_path / f"step_000000{step}_best")
        (tmp_path / f".step_000000{step}_merged.partial").mkdir()
    kept = [".step_0000002_merged.partial", ".step_0000003_merged.partial", "latest"]
    assert _names(tmp_path) == [*kept, "step_0000002_best", "step_0000003", "step_0000003_best"]
    assert run_ranks(_newest, 1, str(tmp_path)) == [("step_0000003", [])]


def _truncate(folder: Path) -> None:
    path = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)


def _flip(folder: Path) -> None:
    path = folder / "common.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "incomplete": (lambda folder: (folder / "complete.json").unlink(), "its writing did not end"),
    "bad_mark": (lambda folder: (folder / "complete.json").write_text("{"), "complete.json cannot be read"),
    "missing": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "truncated": (_truncate, "bytes instead of"),
    "changed": (_flip, "common.pt has other content"),
}


def _newest(rank: int, root: str) -> tuple[str | None, list[str]]:
    """(name of the newest good checkpoint, messages of the log on rank 0)."""
    import logging

    from toy_model import build_toy

    from megatron_longvila.checkpoint.sharded import Checkpoints

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("megatron_longvila.checkpoint").addHandler(handler)
    config = make_config()
    folder = Checkpoints(Path(root), config, build_toy(config).groups).newest()
    return folder and folder.name, messages


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_and_skipped(damage: str, tmp_path: Path) -> None:
    from megatron_longvila.checkpoint.sharded import mark_complete

    for step in (1, 2):  # what a checkpoint holds does not matter here, only whether its files are as they were written
        folder = tmp_path / f"step_000000{step}"
        folder.mkdir()
        for name in (".metadata", "common.pt", "__0_0.distcp"):
            (folder / name).write_bytes(bytes(100))
        mark_complete(folder)
    assert run_ranks(_newest, 2, str(tmp_path)) == [("step_0000002", [])] * 2
    hurt, reason = DAMAGE[damage]
    hurt(tmp_path / "step_0000002")
    (name, messages), (other, _) = run_ranks(_newest, 2, str(tmp_path))
    assert name == other == "step_0000001"
    assert len(messages) == 1 and "step_0000002" in messages[0] and reason in messages[0]


def _killed_while_saving(rank: int, root: str, config: Config, where: str) -> None:
    """Save step 1, train on, and die by SIGKILL inside the save of step 2."""
    from toy_model import build_toy

    from megatron_longvila.checkpoint import sharded

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    toy = build_toy(config)
    checkpoints = sharded.Checkpoints(Path(root), config, toy.groups)
    toy.train_step()
    checkpoints.save(toy.state, 1)
    toy.train_step()
    if where == "writing" and rank == 1:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(die)
    if where == "renaming" and rank == 0:
        sharded.os.rename = die
    if where == "pruning" and rank == 0:
        sharded._remove = die
    checkpoints.save(toy.state, 2)


@pytest.mark.parametrize("where,survivor", [("writing", 1), ("renaming", 1), ("pruning", 2)])
def test_kill_during_save_leaves_a_good_checkpoint(where: str, survivor: int, tmp_path: Path) -> None:
    config = make_config(keep_last=1)
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(_killed_while_saving, 2, str(tmp_path), config, where)
    assert run_ranks(_newest, 2, str(tmp_path))[0] == (f"step_000000{survivor}", [])
    whole = run_ranks(train, 2, str(tmp_path / "whole"), config, {}, 4)
    again = run_ranks(train, 2, str(tmp_path), config, {}, 4, (2, 3, 4))
    assert again[0] == whole[0][survivor:]
    assert _names(tmp_path) == ["latest", "step_0000004"]  # nothing half-written stays behind


def test_other_optimizer_backend_is_refused(tmp_path: Path) -> None:
    run_ranks(train, 1, str(tmp_path), make_config(), {}, 1, (1,))
    with pytest.raises(RankError, match="trained with optimizer.backend='torch', this run has 'te'"):
        run_ranks(_resume_with_te, 1, str(tmp_path), make_config())


def test_other_trained_parts_are_refused(tmp_path: Path) -> None:
    run_ranks(train, 1, str(tmp_path), make_config(trainable=["projector"]), {}, 1, (1,))
    with pytest.raises(RankError, match=r"training.trainable=\['projector'\], this run has \['llm', 'projector'\].*--checkpoint.load"):
        run_ranks(train, 1, str(tmp_path), make_config(trainable=["projector", "llm"]), {}, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": LoraConfig(2, 64.0, ["q", "v"])}, r"model.lora was LoraConfig\(rank=2, alpha=16.0.* and is .*alpha=64.0"),
        ({"lora": LoraConfig(3, 16.0, ["q", "v"])}, "model.lora was .*rank=2.* and is .*rank=3.*merge_lora"),
        ({"llm": LLMConfig(rotary_base=5e5)}, "model.llm.rotary_base was 1000000.0 and is 500000.0 now"),
        ({"llm": LLMConfig(rope_scaling=RopeScaling("linear", 4.0))}, "model.llm.rope_scaling was None and is RopeScaling"),
        ({"llm": LLMConfig(norm_epsilon=1e-4)}, r"model.llm.norm_epsilon was 1e-06 and is 0\.0001 now"),
        ({"llm": LLMConfig(num_attention_heads=56, num_query_groups=8, head_dim=64)}, "model.llm.num_attention_heads was .* and is 56 now"),
        ({"vision": VisionConfig(num_attention_heads=8)}, "model.vision.num_attention_heads was 16 and is 8 now"),
    ],
)
def test_another_model_of_the_same_shape_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    """The toy has neither adapters nor positions: the configurations are what is compared."""
    config = make_config()
    config = replace(config, model=replace(config.model, lora=LoraConfig(2, 16.0, ["q", "v"])))
    run_ranks(train, 1, str(tmp_path), config, {}, 1, (1,))
    with pytest.raises(RankError, match=f"was trained as another model: {message}"):
        run_ranks(train, 1, str(tmp_path), replace(config, model=replace(config.model, **change)), {}, 2)
    reordered = replace(config, model=replace(config.model, lora=LoraConfig(2, 16.0, ["v", "q"])))
    run_ranks(train, 1, str(tmp_path), reordered, {}, 2)


def _resume_with_te(rank: int, root: str, config: Config) -> None:
    from toy_model import build_toy

    from megatron_longvila.checkpoint.sharded import Checkpoints

    toy = build_toy(config)
    other = replace(config, optimizer=replace(config.optimizer, backend="te"))
    Checkpoints(Path(root), other, toy.groups).resume(toy.state, Path(root) / "step_0000001")


def _random_numbers(rank: int, root: str, config: Config, sizes: dict, drawn: int) -> list[float]:
    """What is drawn after a save (first call) or a resume (later calls); `drawn` numbers were taken before."""
    from toy_model import build_toy

    from megatron_longvila.checkpoint.sharded import Checkpoints

    toy = build_toy(config, **sizes)
    checkpoints = Checkpoints(Path(root), config, toy.groups)
    torch.rand(drawn + rank)
    if not toy.resume(checkpoints):
        checkpoints.save(toy.state, 1)
    dist.barrier()
    return torch.rand(3).tolist()


def test_random_state_on_the_same_layout_only(tmp_path: Path) -> None:
    saved = run_ranks(_random_numbers, 2, str(tmp_path), make_config(), {}, 7)
    assert saved[0] != saved[1]
    assert run_ranks(_random_numbers, 2, str(tmp_path), make_config(), {}, 2) == saved
    assert run_ranks(_random_numbers, 2, str(tmp_path), make_config(), {"tp_size": 2}, 2) != saved


def _import_weights(rank: int, folder: str, config: Config) -> None:
    from toy_model import build_toy

    from megatron_longvila.checkpoint.sharded import Checkpoints, save_weights

    toy = build_toy(config)
    save_weights(Path(folder), toy.state.model, config, toy.groups, {"unused": torch.arange(5.0)})
    with pytest.raises(ValueError, match="holds weights alone.*checkpoint.load"):
        Checkpoints(Path(folder).parent, config, toy.groups).resume(toy.state, Path(folder))


def _bf16_weights(rank: int, folder: str, config: Config) -> float:
    """Largest difference of bf16 weights loaded from fp32 ones to those ones, rounded."""
    from toy_model import build_toy

    from megatron_longvila.checkpoint.sharded import load_weights

    toy = build_toy(config)
    want = {name: value.clone() for name, value in toy.state.model.state_dict().items() if value is not None}
    for parameter in toy.state.model.parameters():
        parameter.data.fill_(7)
    load_weights(Path(folder), toy.state.model, toy.groups)
    got = toy.state.model.state_dict()
    assert all(got[name].dtype == torch.bfloat16 for name in want)
    return max((got[name] - want[name]).abs().max().item() for name in want)


def test_passengers_travel(tmp_path: Path) -> None:
    """Tensors that are not trained go from an imported model through every checkpoint of the runs that follow, also past the pruning."""
    from safetensors.torch import load_file

    source = tmp_path / "imported"
    run_ranks(_import_weights, 2, str(source), make_config())
    first = make_config(keep_last=1, load=str(source))
    run_ranks(train, 2, str(tmp_path / "run"), first, {}, 2, (1, 2))
    run_ranks(train, 2, str(tmp_path / "run"), make_config(keep_last=1), {}, 4, (3, 4))
    passengers = load_file(tmp_path / "run" / "step_0000004" / "passengers.safetensors")
    assert list(passengers) == ["unused"] and torch.equal(passengers["unused"], torch.arange(5.0))
    assert run_ranks(_bf16_weights, 2, str(source), make_config("bf16")) == [0.0, 0.0]


def _dies_while_writing(rank: int, root: str, config: Config, without: str | None) -> None:
    """Rank 0 is killed by its own writer, which then goes on for ever."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from toy_model import build_toy

    from megatron_longvila.checkpoint.sharded import Checkpoints
    from megatron_longvila.platform import mcore_fixes

    mcore_fixes.apply(without=without)
    rank_pid = os.getpid()

    def hang(*args, **kwargs):
        Path(root, f"writer.{os.getpid()}").touch()
        os.closerange(3, 4096)  # or the test would wait for the pipe this process shares with its rank
        os.kill(rank_pid, signal.SIGKILL)
        time.sleep(600)

    filesystem_async._write_item = hang
    toy = build_toy(config)
    checkpoints = Checkpoints(Path(root), config, toy.groups)
    checkpoints.save(toy.state, 1)
    checkpoints.wait()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("async_save,without", [(False, None), (True, None), (False, "mortal_writers")])
def test_writers_end_with_their_rank(async_save: bool, without: str | None, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(_dies_while_writing, 1, str(tmp_path), make_config(async_save=async_save), without)
    writers = [int(path.suffix[1:]) for path in tmp_path.glob("writer.*")]
    assert writers
    deadline = time.monotonic() + 10
    while without is None and any(map(_runs, writers)):
        assert time.monotonic() < deadline, "a writer outlived its rank"
        time.sleep(0.05)
    alive = [pid for pid in writers if _runs(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert bool(alive) == (without is not None)
