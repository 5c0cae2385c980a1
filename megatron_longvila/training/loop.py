"""A training run: build every part, resume, step until the end or a signal, evaluate, save, report."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_longvila import config_io, platform
from megatron_longvila.checkpoint.origin import describe_tokens
from megatron_longvila.checkpoint.sharded import Checkpoints, TrainingState
from megatron_longvila.config import Config
from megatron_longvila.config_check import check
from megatron_longvila.data.batch import MicroBatch
from megatron_longvila.data.loader import Loader, Place
from megatron_longvila.data.shards import open_dataset
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.data.training_data import open_training_data
from megatron_longvila.models.longvila import build_model
from megatron_longvila.parallel.groups import Groups, initialize_groups
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)
from megatron_longvila.pulse import MARKER, Pulse
from megatron_longvila.training import metrics
from megatron_longvila.training.loss import token_loss
from megatron_longvila.training.optimizer import apply_settings, build_optimizer, build_scheduler, freeze, set_length, step, wrap_ddp
from megatron_longvila.training.stages import TrainableCheck, check_saved, count_parameters, describe_counts, fill_model, note_rounding
from megatron_longvila.training.stopping import StopSignal, raise_bad_gradients, raise_bad_loss

from megatron.core.distributed import DistributedDataParallel  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

logger = logging.getLogger(__name__)

SUMMARY = "run_summary.json"


@dataclass
class Run:
    """Everything a rank holds during training.

    Attributes:
        model: DDP around this rank's pipeline stage.
        state: the same model bare, with optimizer, schedule and loader: what a checkpoint holds.
        evaluation: loader of the held-out rows, None without a held-out set.
        check: whether what should train does and the rest does not; None without training.check_trainable.
        parameters: how many parameters of each part train and do not.
        first_step: steps done by the run this one continues.
        pulse: what this rank leaves for whoever asks why the job ended.
    """

    config: Config
    groups: Groups
    model: DistributedDataParallel
    state: TrainingState
    checkpoints: Checkpoints
    evaluation: Loader | None
    check: TrainableCheck | None
    parameters: dict[str, dict[str, int]]
    total_steps: int
    first_step: int
    folder: Path
    pulse: Pulse


def train(config: Config, pulse: Pulse) -> None:
    """Train as `config` says on the ranks of this job; returns on every rank after the last step, or after a signal and its checkpoint.

    Raises:
        ValueError: for what a user did: data, weights or checkpoints that do not fit.
        FloatingPointError: loss or gradient is not finite; names step, ranks and samples.
    """
    platform.init_distributed(config.parallel.timeout_s)
    pulse.progress = platform.collectives_begun
    with StopSignal() as stop:
        run = build_run(config, pulse)
        fit(run, stop)
    # Not in a `finally`: after an error the other ranks may be inside a collective, and leaving the job politely would wait for them.
    platform.shutdown_distributed()


def build_run(config: Config, pulse: Pulse | None = None) -> Run:
    """Groups, model, optimizer, data and, if there is something to continue, its state. Without `pulse` a plain one is made."""
    groups = initialize_groups(check(config, dist.get_world_size()), timeout_s=config.parallel.timeout_s)
    platform.seed(config.training.seed, groups.pp.rank())
    folder, tokenizer = Path(config.output_dir), load_tokenizer(config.data.tokenizer)
    checkpoints = Checkpoints(folder / "checkpoints", config, groups, describe_tokens(tokenizer, config))
    newest = checkpoints.newest()
    if newest is not None and not config.checkpoint.resume:
        raise ValueError(
            f"output_dir={folder} holds checkpoints up to {newest.name} and checkpoint.resume=false; choose another output_dir, or resume"
        )
    model = build_model(config, groups)
    origin = fill_model(model, checkpoints, newest)
    freeze(model, config.training.trainable)
    if newest is None and origin is not None:
        note_rounding(model, checkpoints, origin)
    wrapped = wrap_ddp(model, config)
    optimizer = build_optimizer(wrapped, config)
    totals = metrics.Totals()
    trainable_check = TrainableCheck(model, optimizer, config, totals) if config.training.check_trainable else None

    place = Place.of(groups, sequence_parallel=config.parallel.sequence_parallel)
    open_loader = partial(Loader, config, place, tokenizer=tokenizer, cache_dir=folder / "cache", report_path=folder / "data_report.jsonl")
    datasets, mixture = open_training_data(config.data)
    loader = open_loader(datasets, mixture=mixture)
    evaluation = None
    if config.data.evaluation:
        held_out = [open_dataset(path) for path in config.data.evaluation]
        evaluation = open_loader(held_out, evaluation=True)

    scheduler = build_scheduler(optimizer, config, None)
    state = TrainingState(model, optimizer, scheduler, loader, totals)
    first_step = checkpoints.resume(state, newest) if newest is not None else 0
    steps = (loader.total_steps(first_step), first_step)
    set_length(scheduler, config, steps[0])
    apply_settings(optimizer, scheduler, config)
    counts = count_parameters(model, config, groups)
    pulse = pulse or Pulse(folder, dist.get_rank())
    return Run(config, groups, wrapped, state, checkpoints, evaluation, trainable_check, counts, *steps, folder, pulse)


def fit(run: Run, stop: StopSignal) -> None:
    """Step from `run.first_step` to the end of the run, or to the step or evaluation in which any rank got a signal."""
    log = open_log(run) if dist.get_rank() == 0 else None
    pace, config, totals = metrics.Pace(), run.config, run.state.totals
    totals.start()
    interval, number = config.checkpoint.save_interval, run.first_step
    stopped = not evaluate_if_missing(run, stop)
    with contextlib.closing(iter(run.state.loader)) as batches:
        while number < run.total_steps and not stopped:
            number += 1
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - start
            run.pulse.beat(number, "step", [name for one in batch for name in one.sample_ids])
            lr = run.state.optimizer.param_groups[0]["lr"]
            result = train_step(run, batch, number, stop.requested)
            pace.recent_s.append(time.perf_counter() - start)
            totals.add(tokens=result["tokens"], labelled_tokens=result["labels"], frames=result["frames"])
            if run.check is not None:
                run.check.after_step(number, lr=lr, frames=result["frames"], labels=result["labels"])
            report(run, log, pace, number, batch, {"lr": lr, "waited_s": waited} | result)
            last = number == run.total_steps
            due = (last and config.checkpoint.save_at_end) or result["stop"] or (interval and number % interval == 0)
            if due:
                save(run, number)
            run.checkpoints.poll()
            # At once: whoever sent the signal will not wait for an evaluation.
            stopped = (result["stop"] and not last) or (is_evaluated(run, number) and not evaluate(run, number, stop))
            if stopped and not due:
                save(run, number)
    run.checkpoints.wait()
    if not stopped:
        check_end(run)
    if dist.get_rank() == 0:
        finish(run, log, number, stopped)


def save(run: Run, number: int) -> None:
    """Write the checkpoint of step `number`. Collective over all ranks."""
    run.pulse.beat(number, "save")
    with whole_parameters(run.model):
        run.checkpoints.save(run.state, number)


def is_evaluated(run: Run, number: int) -> bool:
    """Whether an evaluation follows step `number`."""
    interval = run.config.training.evaluation_interval
    return run.evaluation is not None and (number == run.total_steps or bool(interval and number % interval == 0))


def evaluate_if_missing(run: Run, stop: StopSignal) -> bool:
    """Evaluate after `run.first_step` if a kill or a signal after its checkpoint left that out; returns as `evaluate`."""
    if run.first_step == 0 or not is_evaluated(run, run.first_step):
        return True
    found = [any(line["step"] == run.first_step for line in metrics.read_lines(run.folder / "evaluation.jsonl"))]
    dist.broadcast_object_list(found, src=0)
    return found[0] or evaluate(run, run.first_step, stop)


def check_end(run: Run) -> None:
    """What trained and what did not, over the whole run. Collective; raises TrainableError, or OSError if the input cannot be read."""
    if run.check is None:
        return
    run.check.check(f"after the last step {run.total_steps}")
    check_saved(run.state.model, run.checkpoints, run.checkpoints.folder(run.total_steps))


def train_step(run: Run, batch: list[MicroBatch], number: int, stop_requested: bool) -> dict[str, Any]:
    """Forward, backward and update for one global batch.

    Returns:
        loss (None without labels), grad_norm (None without an update), tokens, labels, frames and flops of the global batch, and `stop`:
        whether any rank asks to stop. All are the same on every rank.
    """
    optimizer = run.state.optimizer
    run.model.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = forward_backward(run, batch, forward_only=False)
    loss_sum, count, tokens, frames, flops, stop = reduce_totals(run, batch, outputs, stop_requested)
    sample_ids = [micro_batch.sample_ids for micro_batch in batch]
    if not math.isfinite(loss_sum):
        raise_bad_loss(number, [output["loss_sum"] for output in outputs], sample_ids)
    grad_norm = None
    if count:
        grad_norm = step(optimizer)
        if not math.isfinite(grad_norm):
            raise_bad_gradients(number, run.state.model, sample_ids)
    run.state.scheduler.step(1)
    return {
        "loss": loss_sum / count if count else None,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "labels": count,
        "frames": frames,
        "flops": flops + metrics.row_cost(run.config).label * count,
        "stop": stop > 0,
    }


def forward_backward(run: Run, batch: list[MicroBatch], *, forward_only: bool) -> list[dict[str, torch.Tensor]]:
    """Run the micro-batches through Megatron's schedule; returns the loss logs of each on the last stage, nothing on the others."""

    def forward_step(micro_batches: Iterator[MicroBatch], model: DistributedDataParallel):
        one = next(micro_batches)
        hidden_T1D = model(one.frames, one.input_ids_T, one.positions_T, one.plan)
        return hidden_T1D, partial(token_loss, model.module.language_model, labels_T=one.labels_T, config=run.config)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batch),
        model=run.model,
        num_microbatches=len(batch),
        seq_length=run.config.data.context_length,  # rows differ: the stages tell each other the real lengths
        micro_batch_size=1,
        forward_only=forward_only,
    )


def reduce_totals(run: Run, batch: list[MicroBatch], outputs: list[dict[str, torch.Tensor]], stop_requested: bool) -> list[float]:
    """[loss sum, labelled tokens, tokens, frames, FLOPs without the output layer, ranks that ask to stop], summed over the job."""
    groups = run.groups
    totals = torch.zeros(6, dtype=torch.float64, device=platform.device())
    if outputs and groups.tp.rank() == 0:
        totals[:2] = torch.stack([torch.stack([output["loss_sum"], output["count"]]) for output in outputs]).sum(0)
    if groups.replica.rank() == 0:
        cost = metrics.row_cost(run.config)
        totals[2] = sum(one.num_tokens for one in batch)
        totals[3] = sum(one.num_frames for one in batch)
        totals[4] = sum(cost.row(one.sample_lengths, one.num_frames, num_labels=0) for one in batch)
    totals[5] = float(stop_requested)
    dist.all_reduce(totals)
    return totals.tolist()


@torch.no_grad()
def evaluate(run: Run, number: int, stop: StopSignal) -> bool:
    """After step `number`: record the mean loss per labelled token over the held-out rows. Collective over all ranks.

    Returns:
        False, with nothing recorded, if a signal asked to stop on the way: one that is resumed makes up for it.
    """
    run.model.eval()
    loss_sum = count = asked = 0.0
    with whole_parameters(run.model), contextlib.closing(iter(run.evaluation)) as batches:
        for batch in batches:
            run.pulse.beat(number, "evaluate", [name for one in batch for name in one.sample_ids])
            totals = reduce_totals(run, batch, forward_backward(run, batch, forward_only=True), stop.requested)
            loss_sum, count, asked = loss_sum + totals[0], count + totals[1], totals[5]
            if asked:
                break
    run.model.train()
    if not asked and dist.get_rank() == 0:
        loss = loss_sum / count if count else None
        metrics.append_line(run.folder / "evaluation.jsonl", {"step": number, "loss": loss})
        logger.info("step %d | held-out loss %s", number, "no labels" if loss is None else f"{loss:.4f}")
    return not asked


@contextlib.contextmanager
def whole_parameters(model: DistributedDataParallel) -> Iterator[None]:
    """Complete parameters on every rank: with overlap_param_gather they are gathered bit by bit during the next forward pass."""
    if not model.use_forward_hook:
        yield
        return
    model.disable_forward_pre_hook()
    try:
        yield
    finally:
        model.enable_forward_pre_hook()


def report(
    run: Run, log: metrics.MetricsLog | None, pace: metrics.Pace, number: int, batch: list[MicroBatch], result: dict[str, Any]
) -> None:
    """Count a step, and every logging.interval steps write it to metrics.jsonl, the console and the sinks. Collective over all ranks."""
    for name in ("tokens", "frames", "flops"):
        setattr(pace, name, getattr(pace, name) + result[name])
    pace.elapsed_s += pace.recent_s[-1]
    pace.data_wait_s += result["waited_s"]
    if log is not None:
        beat = {"step": number, "total_steps": run.total_steps, "time_s": time.time(), "pid": os.getpid()}
        beat |= {"loss": result["loss"], "tokens_per_s": pace.tokens / pace.elapsed_s, "eta_s": pace.eta_s(run.total_steps - number)}
        try:
            metrics.write_json(run.folder / "heartbeat.json", beat)
        except OSError as error:
            run.pulse.warn(f"heartbeat.json cannot be written: {error}")
    if number % run.config.logging.interval and number != run.total_steps and not result["stop"]:
        return
    most = torch.tensor([pace.data_wait_s, platform.memory_gib()], dtype=torch.float64, device=platform.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    data_wait_s, memory_gib = most.tolist()
    sample_ids = gather_sample_ids(run, batch) if run.config.logging.sample_ids else None
    if log is not None:
        peak = metrics.peak_flops(platform.device_name())
        loader = run.state.loader
        line = metrics.StepMetrics(
            step=number,
            loss=result["loss"],
            lr=result["lr"],
            grad_norm=result["grad_norm"],
            tokens_per_s=pace.tokens / pace.elapsed_s,
            frames_per_s=pace.frames / pace.elapsed_s,
            mfu=pace.flops / (pace.elapsed_s * peak * run.groups.mesh.world_size) if peak else None,
            data_wait_s=data_wait_s,
            memory_gib=memory_gib,
            skipped_samples=len(loader.skipped | loader.unusable),
            eta_s=pace.eta_s(run.total_steps - number),
            sample_ids=sample_ids,
        )
        log.write(line.to_dict())
        logger.info(line.line(run.total_steps))
    pace.reset()


def gather_sample_ids(run: Run, batch: list[MicroBatch]) -> list[list[str]]:
    """Sample ids of the global batch, row after row: row r is micro-batch r // dp_size of dp rank r % dp_size."""
    shares: list[list[list[str]]] = [[] for _ in range(run.groups.dp.size())]
    dist.all_gather_object(shares, [list(one.sample_ids) for one in batch], group=run.groups.dp)
    return list(itertools.chain.from_iterable(zip(*shares, strict=True)))


def open_log(run: Run) -> metrics.MetricsLog:
    """Prepare the run directory. For rank 0."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in (MARKER, SUMMARY):
        (run.folder / name).unlink(missing_ok=True)
    metrics.write_json(run.folder / "parameters.json", run.parameters)
    logger.info("trainable: %s\n%s", ", ".join(run.config.training.trainable), describe_counts(run.parameters))
    config_io.save(run.config, run.folder / "config.yaml")
    metrics.keep_until(run.folder / "evaluation.jsonl", run.first_step)
    logger.info("steps %d to %d on %s", run.first_step + 1, run.total_steps, run.groups.mesh)
    return metrics.MetricsLog(run.folder, run.config, run.first_step)


def finish(run: Run, log: metrics.MetricsLog, number: int, stopped: bool) -> None:
    """Close the log, draw the loss curve, and mark a run that was asked to stop. For rank 0."""
    log.close()
    if stopped:
        metrics.write_json(run.folder / MARKER, {"step": number, "total_steps": run.total_steps})
        logger.info("stopped by a signal after step %d; start the same command again to continue", number)
        return
    if number > run.first_step:
        logger.info("loss curve: %s", metrics.plot_loss(run.folder))
    metrics.write_json(run.folder / SUMMARY, summarise(run))
    logger.info("finished after step %d; everything is in %s", number, run.folder)


def summarise(run: Run) -> dict[str, Any]:
    """The content of run_summary.json, which only a run that reached its last step and passed its checks has. For rank 0."""
    steps, evaluations = (metrics.read_lines(run.folder / name) for name in ("metrics.jsonl", "evaluation.jsonl"))
    totals, last = run.state.totals, run.checkpoints.folder(run.total_steps)
    return {
        "steps": run.total_steps,
        "tokens": totals.tokens,
        "labelled_tokens": totals.labelled_tokens,
        "frames": totals.frames,
        "wall_s": round(totals.wall_s, 3),
        "loss": steps[-1]["loss"],
        "evaluation_loss": evaluations[-1]["loss"] if evaluations else None,
        "memory_gib": max(line["memory_gib"] for line in steps),
        "num_ranks": run.groups.mesh.world_size,
        "parameters": run.parameters,
        "input": run.checkpoints.origin["load"],
        "rounded": run.checkpoints.origin.get("rounded"),
        "checkpoint": str(last.relative_to(run.folder)) if last.exists() else None,
    }
