"""The step loop on the tiny model: what it writes, how it stops, and that a resumed run is the run that was never interrupted."""

import json
import math
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_runs import SHAPES, losses, read, run_training, summary

from megatron_longvila.config import Config, LoraConfig, ParallelConfig
from ranks import RankError, run_ranks


def test_run_directory(make_config) -> None:
    config = make_config(steps=6, evaluation=["held_out"], training={"evaluation_interval": 4}, checkpoint={"save_interval": 4})
    run_ranks(run_training, 2, config)
    folder = Path(config.output_dir)
    names = {"config.yaml", "metrics.jsonl", "evaluation.jsonl", "checkpoints", "heartbeat.json", "loss.png", "parameters.json"}
    assert names <= {path.name for path in folder.iterdir()} and not (folder / "interrupted").exists()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step_0000004", "step_0000006"]
    lines = read(config)
    fields = (
        "step loss lr grad_norm tokens_per_s frames_per_s mfu data_wait_s memory_gib skipped_samples eta_s sample_ids"  # the promised ones
    )
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(list(line) == fields.split() for line in lines)
    assert all(line["tokens_per_s"] > 0 and line["memory_gib"] > 0 and line["mfu"] is None for line in lines)
    assert [line["lr"] for line in lines[:3]] == [0.0, 0.005, 0.01]
    assert lines[-1]["eta_s"] == 0 and 0 < lines[0]["eta_s"] < 600
    assert lines[-1]["loss"] < lines[0]["loss"]
    evaluations = read(config, "evaluation.jsonl")
    assert [line["step"] for line in evaluations] == [4, 6] and all(math.isfinite(line["loss"]) for line in evaluations)
    beat = json.loads((folder / "heartbeat.json").read_text())
    assert (beat["step"], beat["loss"], beat["eta_s"]) == (6, lines[-1]["loss"], 0.0) and beat["tokens_per_s"] > 0
    beats = [json.loads((folder / "heartbeats" / f"rank_0000{rank}.json").read_text()) for rank in range(2)]
    assert [(one["rank"], one["step"], one["phase"]) for one in beats] == [(rank, 6, "evaluate") for rank in range(2)]
    found = summary(config)
    assert (found["steps"], found["loss"], found["num_ranks"], found["input"]) == (6, lines[-1]["loss"], 2, "")
    assert found["evaluation_loss"] == evaluations[-1]["loss"] and found["checkpoint"] == "checkpoints/step_0000006"
    assert found["tokens"] > found["labelled_tokens"] > 0 and found["frames"] > 0 and found["wall_s"] > 0
    assert found["parameters"] == json.loads((folder / "parameters.json").read_text())
    tokens = json.loads((folder / "checkpoints" / "step_0000006" / "tokens.json").read_text())
    assert tokens["template"] == "plain" and len(tokens["newline_ids"]) == 1 and tokens["rotary_base"] == 10_000.0


MESHES = {
    "one": (1, {}),
    "ulysses2_ring2": (4, {"ulysses_size": 2, "ring_size": 2}),
    "tp2_sp": (2, {"tp_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp_size": 2}),
    "dp2": (2, {"overlap_grad_reduce": False}),
    "dp2_gather": (2, {"overlap_param_gather": True}),
}
TIED_MESHES = {
    "one": (1, {}),
    "pp2_dp2": (4, {"pp_size": 2}),
    "pp2_dp2_plain": (4, {"pp_size": 2, "overlap_grad_reduce": False}),
    "pp2_tp2": (4, {"pp_size": 2, "tp_size": 2, "sequence_parallel": True}),
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("meshes", [MESHES, TIED_MESHES], ids=["untied", "tied"])
def test_every_mesh_trains_alike(meshes: dict, make_config) -> None:
    """Ten steps of AdamW in fp32 from the same weights; meshes differ in the order of sums only. Adam's division by the root of the second
    moment makes a rounding of 1e-7 in a gradient one of up to lr in a weight whose gradient is near zero, hence 1e-4 after ten steps."""
    found = {}
    for name, (world_size, parallel) in meshes.items():
        config = make_config(name, parallel=parallel, evaluation=["held_out"], tie_embeddings=meshes is TIED_MESHES)
        run_ranks(run_training, world_size, config)
        found[name] = losses(config) + [read(config, "evaluation.jsonl")[-1]["loss"]]
        assert [line["sample_ids"] for line in read(config)] == [line["sample_ids"] for line in read(make_config("one"))]
        assert found[name] == pytest.approx(found["one"], rel=1e-4), name


def test_gathered_adapters_train_alike(make_config) -> None:
    """With overlap_param_gather the ranks' shares of updated adapters arrive before they are used, whatever else trains."""
    found = {}
    for gather in (False, True):
        config = make_config(f"gather_{gather}", steps=4, parallel={"overlap_param_gather": gather}, training={"trainable": ["lora"]})
        run_ranks(run_training, 2, replace(config, model=replace(config.model, lora=LoraConfig(rank=2))))
        found[gather] = losses(config)
    assert found[True] == found[False]


def kill_rank_one(rank: int, number: int, run) -> None:
    if number == 6:
        run.checkpoints.wait()  # a background save of step 5 is complete: what follows must start from it
        if rank == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)


RESUMES = {
    "fp32_cp4": (4, {"ulysses_size": 2, "ring_size": 2}, {}, {}),
    "bf16_dp2": (2, {}, {"precision": "bf16"}, {}),
    "projector_pp2": (2, {"pp_size": 2}, {"trainable": ["projector"]}, {}),
    "tied_pp2_dp2": (4, {"pp_size": 2, "pipeline_layers": [1, 3]}, {}, {}),
    "uneven_pp2": (2, {"pp_size": 2, "pipeline_layers": [1, 3]}, {}, {}),
    "tied_pp2": (2, {"pp_size": 2}, {}, {}),
    "pp2_dp2": (4, {"pp_size": 2}, {}, {}),
    "async_tp2": (2, {"tp_size": 2}, {}, {"async_save": True}),
    "gather_dp2": (2, {"overlap_param_gather": True}, {}, {}),
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("case", RESUMES)
def test_killed_and_resumed_is_bit_equal(case: str, make_config) -> None:
    world_size, parallel, training, checkpoint = RESUMES[case]
    tied = case.startswith("tied")
    options = dict(parallel=parallel, training=training, checkpoint={"save_interval": 5} | checkpoint, tie_embeddings=tied)
    whole, killed = make_config("whole", **options), make_config("killed", **options)
    run_ranks(run_training, world_size, whole)
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(run_training, world_size, killed, kill_rank_one)
    before = read(killed)[:5]
    assert len(before) == 5
    run_ranks(run_training, world_size, killed)
    assert read(killed)[:5] == before  # these steps, with the times they took, were not run again
    assert losses(killed) == losses(whole)  # ten losses, to the last bit
    assert [line["sample_ids"] for line in read(killed)] == [line["sample_ids"] for line in read(whole)]
    assert [line["grad_norm"] for line in read(killed)] == [line["grad_norm"] for line in read(whole)]


@pytest.mark.end_to_end
def test_resume_on_other_layouts_and_every_sample_once(make_config) -> None:
    """Five steps on ulysses 2 x ring 2 and a bad sample, killed; on tp 2, cp 1, dp 2, pp 2: same losses, each sample once an epoch."""
    dataset = make_config.datasets["train"]
    dataset.broken.add(dataset.medium_of(6))
    start = dict(parallel={"ulysses_size": 2, "ring_size": 2}, checkpoint={"save_interval": 5}, tie_embeddings=True)
    whole = make_config("whole", **start)
    run_ranks(run_training, 4, whole)
    per_epoch = Counter(f"sample-{number}" for number in range(len(SHAPES)))
    seen, rows = Counter(), [row for line in read(whole) for row in line["sample_ids"]]
    for row in rows:
        seen.update(row)
        if seen == per_epoch:
            seen.clear()
        assert all(seen[name] <= 1 for name in per_epoch)
    assert sum(map(len, rows)) > len(SHAPES)  # more than an epoch
    assert read(whole)[-1]["skipped_samples"] == 1
    for world_size, parallel in ((2, {"tp_size": 2}), (1, {}), (2, {}), (2, {"pp_size": 2})):
        config = make_config(f"continued{world_size}{''.join(parallel)}", **start)
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(run_training, 4, config, kill_rank_one)
        before = read(config)[:5]
        run_ranks(run_training, world_size, replace(config, parallel=ParallelConfig(**parallel)))
        assert read(config)[:5] == before and len(before) == 5
        assert losses(config) == pytest.approx(losses(whole), rel=1e-5)
        assert [line["sample_ids"] for line in read(config)] == [line["sample_ids"] for line in read(whole)]
        assert read(config)[-1]["skipped_samples"] == 1


def test_epochs_decide_the_steps(make_config) -> None:
    """Two epochs: the last step is filled with rows without samples, and every sample is seen twice."""
    config = make_config(steps=0, training={"epochs": 2}, global_batch_size=4)
    config = replace(config, optimizer=replace(config.optimizer, warmup_steps=1))
    run_ranks(run_training, 2, config)
    rows = [row for line in read(config) for row in line["sample_ids"]]
    assert Counter(name for row in rows for name in row) == Counter({f"sample-{number}": 2 for number in range(len(SHAPES))})
    assert len(rows) % 4 == 0 and rows[-1] == []
    thinned = replace(config, output_dir=config.output_dir + "-thinned", logging=replace(config.logging, interval=3))
    run_ranks(run_training, 2, thinned)
    kept = [line for line in read(config) if line["step"] % 3 == 0 or line["step"] == len(rows) // 4]
    assert [(line["step"], line["loss"]) for line in read(thinned)] == [(line["step"], line["loss"]) for line in kept]


@pytest.mark.parametrize("rows_of_a_step,done,total,warmup", [(1, 2, 8, 1), (4, 2, 4, 1), (4, 5, 5, 1), (4, 4, 5, 3)])
def test_epochs_end_at_their_last_row_whatever_the_batch_was(rows_of_a_step: int, done: int, total: int, warmup: int, make_config) -> None:
    """Ten rows, two a step, continued from step `done` with another batch: the schedule and the summary know the new number of steps.

    So does the check of the warm-up: ten rows by four alone would be three steps, all of them warm-up.
    """
    config = make_config(steps=0, training={"epochs": 2}, checkpoint={"save_interval": 1, "keep_last": 5})
    config = replace(config, optimizer=replace(config.optimizer, warmup_steps=warmup))
    run_ranks(run_training, 1, config)
    whole = [row for line in read(config) for row in line["sample_ids"]]
    assert len(whole) == 10
    for step in range(done + 1, 6):
        shutil.rmtree(Path(config.output_dir) / "checkpoints" / f"step_{step:07d}")
    run_ranks(run_training, 1, replace(config, data=replace(config.data, global_batch_size=rows_of_a_step)))
    lines = read(config)
    assert [row for line in lines for row in line["sample_ids"] if row] == whole
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    assert lines[-1]["lr"] == pytest.approx(0.005 * (1 + math.cos(math.pi * (total - 1 - warmup) / (total - warmup))))
    assert (summary(config)["steps"], summary(config)["checkpoint"]) == (total, f"checkpoints/step_{total:07d}")


def test_fewer_steps_than_were_done_end_the_run(make_config) -> None:
    config = make_config(steps=4)
    run_ranks(run_training, 1, config)
    run_ranks(run_training, 1, replace(config, training=replace(config.training, steps=3)))
    assert (summary(config)["steps"], summary(config)["checkpoint"]) == (4, "checkpoints/step_0000004")


def signal_rank_one(rank: int, number: int, run) -> None:
    if number == 3 and rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


def test_signal_stops_all_ranks_after_the_same_step(make_config) -> None:
    config, whole = make_config("stopped", steps=5), make_config("whole", steps=5)
    run_ranks(run_training, 2, config, signal_rank_one)
    folder = Path(config.output_dir)
    # The handler runs before step 3 asks for the flag or just after it, in which case step 4 sees it.
    stopped = json.loads((folder / "interrupted").read_text())["step"]
    assert stopped in (3, 4) and len(losses(config)) == stopped and not (folder / "run_summary.json").exists()
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{stopped:07d}\n"
    run_ranks(run_training, 2, config)
    run_ranks(run_training, 2, whole)
    assert losses(config) == losses(whole) and not (folder / "interrupted").exists()
    for name in ("tokens", "labelled_tokens", "frames", "parameters"):  # over both parts of the run
        assert summary(config)[name] == summary(whole)[name]


def signal_in_evaluation(rank: int, config: Config, at_step: int) -> None:
    """Training in which rank 1 is asked to stop while it evaluates after `at_step`."""
    from megatron_longvila.training import loop

    real = loop.forward_backward
    steps = [0]

    def forward_backward(run, batch, *, forward_only):
        steps[0] += not forward_only
        if forward_only and rank == 1 and steps[0] == at_step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(run, batch, forward_only=forward_only)

    loop.forward_backward = forward_backward
    run_training(rank, config)


@pytest.mark.parametrize("at_step", [2, 3])
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(at_step: int, make_config) -> None:
    """What was evaluated in part is saved, left, and evaluated whole by the run that goes on."""
    settings = {"steps": 3, "evaluation": ["held_out"], "training": {"evaluation_interval": 2}, "checkpoint": {"save_at_end": False}}
    config, whole = make_config("stopped", **settings), make_config("whole", **settings)
    run_ranks(signal_in_evaluation, 2, config, at_step)
    folder = Path(config.output_dir)
    assert json.loads((folder / "interrupted").read_text())["step"] == at_step and not (folder / "run_summary.json").exists()
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{at_step:07d}\n"
    path = folder / "evaluation.jsonl"
    assert [json.loads(line)["step"] for line in (path.read_text().splitlines() if path.exists() else [])] == [2][: at_step - 2]
    run_ranks(run_training, 2, config)
    run_ranks(run_training, 2, whole)
    assert read(config, "evaluation.jsonl") == read(whole, "evaluation.jsonl") and losses(config) == losses(whole)
    assert not (folder / "interrupted").exists() and (folder / "run_summary.json").exists()


def occupy_the_heartbeat(rank: int, number: int, run) -> None:
    if number == 2:
        (run.folder / "heartbeat.json").unlink(missing_ok=True)
        (run.folder / "heartbeat.json").mkdir(exist_ok=True)


def test_a_heartbeat_that_cannot_be_written_does_not_end_training(make_config) -> None:
    config = make_config(steps=3)
    run_ranks(run_training, 1, config, occupy_the_heartbeat)
    assert len(losses(config)) == 3 and (Path(config.output_dir) / "heartbeat.json").is_dir()


def test_a_kill_in_the_last_evaluation_does_not_lose_it(make_config) -> None:
    """The checkpoint of the last step is there, its evaluation is not: the next start makes up for it, once."""
    config = make_config(steps=3, evaluation=["held_out"], training={"evaluation_interval": 2})
    run_ranks(run_training, 2, config)
    whole, path = read(config, "evaluation.jsonl"), Path(config.output_dir) / "evaluation.jsonl"
    assert [line["step"] for line in whole] == [2, 3] and whole[0]["loss"] != whole[1]["loss"]
    path.write_text(json.dumps(whole[0]) + "\n")
    for _ in range(2):
        run_ranks(run_training, 2, config)
        assert read(config, "evaluation.jsonl") == whole and summary(config)["evaluation_loss"] == whole[1]["loss"]


def poison_weight(rank: int, number: int, run) -> None:
    if number == 2 and rank == 1:
        run.state.model.language_model.decoder.final_layernorm.weight.data[0] = float("nan")


def poison_gradient(rank: int, number: int, run) -> None:
    if number == 2 and rank == 1:
        weight = run.state.model.language_model.decoder.final_layernorm.weight
        weight.expand_as(weight).grad_fn.next_functions[0][0].register_prehook(lambda grads: (grads[0] * float("inf"),))


@pytest.mark.parametrize("poison,what", [(poison_weight, "loss"), (poison_gradient, "gradient")])
def test_not_finite_names_step_rank_and_samples(poison, what: str, make_config) -> None:
    config = make_config()
    with pytest.raises(RankError) as error:
        run_ranks(run_training, 2, config, poison)
    message = next(line for line in str(error.value).splitlines() if line.startswith("FloatingPointError"))
    assert f"step 2: the {what} is not finite" in message and "no weight was changed" in message
    whole = make_config("whole", steps=2)
    run_ranks(run_training, 2, whole)
    ids = read(whole)[1]["sample_ids"][1]
    named = message.split("rank 1: ")[1].split(";")[0]
    assert all(name in named for name in ids)
    if what == "loss":
        assert "rank 0" not in message
    assert len(losses(config)) == 1


def test_batch_without_labels_changes_nothing(make_config) -> None:
    config = make_config(steps=3)
    (states,) = {str(states) for states in run_ranks(_without_labels, 2, config)}
    assert states == "[True, False, False]"  # is the weight as it was after steps 1, 2, 3?
    assert [line["loss"] is None for line in read(config)] == [True, False, False]
    assert read(config)[0]["grad_norm"] is None


def _without_labels(rank: int, config: Config) -> list[bool]:
    from megatron_longvila.training import loop

    real, unchanged = loop.train_step, []

    def train_step(run, batch, number, stop_requested):
        weights = {name: value.clone() for name, value in run.state.model.named_parameters()}
        # lr is 0 in the first warm-up step: take it further, so that an update would show
        run.state.optimizer.param_groups[0]["lr"] = 0.01
        if number == 1:
            batch = [replace(one, labels_T=torch.full_like(one.labels_T, -100)) for one in batch]
        result = real(run, batch, number, stop_requested)
        unchanged.append(all(torch.equal(weights[name], value) for name, value in run.state.model.named_parameters()))
        return result

    loop.train_step = train_step
    run_training(rank, config)
    return unchanged
