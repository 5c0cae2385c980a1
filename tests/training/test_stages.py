"""What trains must move and what is frozen must not: each breach is found, by name, on every rank, and nothing else is reported."""

import pytest
import torch

from megatron_longvila.config import Config, OptimizerConfig, ParallelConfig, TrainingConfig
from ranks import RankError, run_ranks

STARVED, FROZEN = "language_model.2.up.weight", "projector.bias"


def make_config(precision: str = "fp32", trainable=("llm",), lr: float = 0.01, allowed=(), weight_decay: float = 0.1) -> Config:
    return Config(
        parallel=ParallelConfig(overlap_grad_reduce=False),
        optimizer=OptimizerConfig(lr=lr, warmup_steps=2, weight_decay=weight_decay),
        training=TrainingConfig(precision=precision, trainable=list(trainable), may_see_no_gradient=list(allowed)),
    )


def starve(toy) -> None:
    """Multiply every gradient of one tensor by zero, on the stage that has it."""
    for name, parameter in toy.state.model.named_parameters():
        if name == STARVED:
            parameter.register_hook(lambda grad: 0 * grad)


def move_frozen(toy) -> None:
    """One bit of one frozen tensor, on one rank."""
    if torch.distributed.get_rank() == 0:
        dict(toy.state.model.named_parameters())[FROZEN].data.view(torch.uint8)[0] ^= 1


def train(rank: int, config: Config, sizes: dict, harm=None, steps: int = 5) -> list[int]:
    """Train the toy with the check; returns the counted steps after each step."""
    from toy_model import build_toy

    from megatron_longvila.training.metrics import Totals
    from megatron_longvila.training.stages import TrainableCheck

    toy, totals = build_toy(config, **sizes), Totals()
    check = TrainableCheck(toy.state.model, toy.state.optimizer, config, totals)
    if harm is not None:
        harm(toy)
    counted = []
    for number in range(1, steps + 1):
        lr = toy.state.optimizer.param_groups[0]["lr"]
        toy.train_step()
        check.after_step(number, lr=lr, frames=4 * (number != 3), labels=8)  # no media in step 3
        counted.append(totals.counted_steps)
    check.check(f"after the last step {steps}")
    return counted


MESHES = {"one": (1, {}), "dp2": (2, {}), "pp2": (2, {"pp_size": 2}), "tp2_pp2": (4, {"tp_size": 2, "pp_size": 2})}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_breach_is_found(mesh: str) -> None:
    """lr is 0 in step 1, so that steps 2, 3 and 4 count; on pp 2 the second stage of a frozen tower trains alone."""
    world, sizes = MESHES[mesh]
    assert run_ranks(train, world, make_config(), sizes) == [[0, 1, 2, 3, 4]] * world
    with pytest.raises(RankError, match=r"after step 4 \(3 steps had lr > 0 and labels\): 1 trainable tensors only ever saw zero") as error:
        run_ranks(train, world, make_config(), sizes, starve)
    assert f"zero gradients: {STARVED}; leave" in str(error.value) and "frozen" not in str(error.value).split("TrainableError")[-1]
    with pytest.raises(RankError, match=f"1 frozen tensors differ from the run's input: {FROZEN};"):
        run_ranks(train, world, make_config(), sizes, move_frozen)


def test_media_are_asked_for_where_they_train() -> None:
    parts = ("projector", "llm")
    assert run_ranks(train, 2, make_config(trainable=parts), {"pp_size": 2}) == [[0, 1, 1, 2, 3]] * 2


def test_named_tensors_may_go_without_gradient() -> None:
    """Without weight decay they do not move either."""
    run_ranks(train, 1, make_config(allowed=["language_model.2.*"], weight_decay=0.0), {}, starve)
    with pytest.raises(RankError, match="only ever saw zero gradients"):
        run_ranks(train, 1, make_config(allowed=["language_model.3.*"], weight_decay=0.0), {}, starve)


def test_short_runs_are_checked_at_the_end() -> None:
    run_ranks(train, 1, make_config(), {}, None, 2)
    with pytest.raises(RankError, match=r"after the last step 1 \(0 steps had .* 16 trainable tensors got gradients and equal"):
        run_ranks(train, 1, make_config(), {}, None, 1)  # lr was 0


def test_lost_updates_are_found() -> None:
    with pytest.raises(RankError, match="16 trainable tensors got gradients and equal the run's input to the last bit.*raise the rate"):
        run_ranks(train, 1, make_config(lr=1e-30), {})


def _bf16(rank: int, config: Config) -> tuple[list[int], bool]:
    """Counted steps, and whether any bf16 weight changed."""
    from toy_model import build_toy

    before = {name: value.clone() for name, value in build_toy(config).state.model.named_parameters()}
    from megatron_longvila.parallel.groups import destroy_groups

    destroy_groups()
    kept = {}
    counted = train(rank, config, {}, lambda toy: kept.update(toy=toy))
    return counted, any(not torch.equal(before[name], value) for name, value in kept["toy"].state.model.named_parameters())


def test_the_fp32_weight_counts_in_bf16() -> None:
    """Updates too small for bf16 move the fp32 main weight: that is training."""
    config = make_config("bf16", lr=1e-8, weight_decay=0.0)
    assert run_ranks(_bf16, 2, config) == [([0, 1, 2, 3, 4], False)] * 2
    with pytest.raises(RankError, match=STARVED):
        run_ranks(train, 2, make_config("bf16"), {}, starve)


def _counts(rank: int, config: Config, sizes: dict) -> dict:
    from toy_model import build_toy

    from megatron_longvila.training.stages import count_parameters

    toy = build_toy(config, **sizes)
    return count_parameters(toy.state.model, config, toy.groups)


def test_counts_do_not_depend_on_the_mesh() -> None:
    wanted = {
        "vision": {"trained": 0, "frozen": 8 * 16 + 16},
        "projector": {"trained": 0, "frozen": 16 * 16 + 16},
        "llm": {"trained": 4 * (16 * 32 + 32 + 32 * 16 + 16), "frozen": 0},
    }
    total = {kind: sum(part[kind] for part in wanted.values()) for kind in ("trained", "frozen")}
    for world, sizes in MESHES.values():
        assert run_ranks(_counts, world, make_config(), sizes) == [wanted | {"total": total}] * world


def test_passengers_must_be_the_same_file(tmp_path) -> None:
    from megatron_longvila.training.stages import TrainableError, check_passengers

    before, after = tmp_path / "before", tmp_path / "after"
    check_passengers(before, after)
    before.write_bytes(b"one")
    with pytest.raises(TrainableError, match="no such file"):
        check_passengers(before, after)
    after.write_bytes(b"one")
    check_passengers(before, after)
    after.write_bytes(b"two")
    with pytest.raises(TrainableError, match="passengers of the input and of the last checkpoint differ"):
        check_passengers(before, after)
