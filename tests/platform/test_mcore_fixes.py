"""Each repair of megatron-core, run with it and without it: a test that passes without its fix proves nothing.

The toy is two replicated linear layers, one per pipeline stage, under DDP and the DistributedOptimizer.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_longvila.platform import mcore, mcore_fixes
from ranks import RankError, run_ranks

from megatron.core import dist_checkpointing, parallel_state  # isort: skip
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # isort: skip
from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # isort: skip
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip


class Toy(MegatronModule):
    """Two linear layers named by their pipeline stage; `trained` says which stages train."""

    def __init__(self, config: TransformerConfig, stage: int, trained: tuple[int, ...]):
        super().__init__(config)
        torch.manual_seed(stage)
        self.add_module(f"stage{stage}_a", torch.nn.Linear(4, 4))
        self.add_module(f"stage{stage}_b", torch.nn.Linear(4, 1))
        self.requires_grad_(stage in trained)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class Run:
    """Groups, toy model and optimizer of this rank."""

    def __init__(self, pp_size: int = 1, trained: tuple[int, ...] = (0, 1), bf16: bool = False):
        mcore.select_adam("torch")
        parallel_state.initialize_model_parallel(1, pp_size)
        self.group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dtype = torch.bfloat16 if bf16 else torch.float32
        config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, bf16=bf16, params_dtype=dtype, cuda_graph_scope=[])
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = Toy(config, parallel_state.get_pipeline_model_parallel_rank(), trained).to(dtype)
        self.wrapped = DistributedDataParallel(config, ddp, self.model)
        settings = OptimizerConfig(
            optimizer="adam", lr=0.1, weight_decay=0.1, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=1.0
        )
        self.optimizer = get_megatron_optimizer(settings, [self.wrapped])
        self.inner = self.optimizer.chained_optimizers[0].optimizer

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            if any(parameter.requires_grad for parameter in self.model.parameters()):
                self.wrapped(torch.full((2, 4), 0.5, dtype=next(self.model.parameters()).dtype)).float().square().sum().backward()
            self.wrapped.finish_grad_sync()
            self.optimizer.step()

    def state(self, *, loading: bool) -> tuple[dict, dict]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": self.group,
        }
        model = self.model.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}, {name: value for name, value in metadata.items() if name != "dp_cp_group"}

    def save(self, folder: Path, *, background: bool = False) -> None:
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        state, metadata = self.state(loading=False)
        request = dist_checkpointing.save(state, str(folder), async_sharded_save=background, content_metadata=metadata)
        if background:
            calls = AsyncCallsQueue(persistent=False)
            calls.schedule_async_request(request)
            calls.maybe_finalize_async_calls(blocking=True)
            calls.close()

    def load(self, folder: Path) -> None:
        loaded = dist_checkpointing.load(self.state(loading=True)[0], str(folder))
        self.model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def weights(self) -> dict[str, list[float]]:
        return {name: parameter.flatten().tolist() for name, parameter in self.model.named_parameters()}

    def steps(self) -> list[float]:
        """Every number of steps this rank would save or use."""
        in_state = [float(state["step"]) for state in self.inner.state.values()]
        return in_state or [float(group["step"]) for group in self.inner.param_groups]


def train_and_save(_rank: int, folder: Path, without: str | None, options: dict) -> tuple[dict, list]:
    """Two steps, save, one more step: the weights a resumed run must reach."""
    mcore_fixes.apply(without=without)
    run = Run(**options)
    run.step(2)
    run.save(folder)
    run.step()
    return run.weights(), run.steps()


def resume_and_train(_rank: int, folder: Path, without: str | None, options: dict) -> tuple[dict, list]:
    mcore_fixes.apply(without=without)
    run = Run(**options)
    run.load(folder)
    run.step()
    return run.weights(), run.steps()


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"pp_size": 2}, {"pp_size": 2, "trained": (0,)}, {"pp_size": 2, "trained": (1,)}], ids=str
)
def test_resumed_weights_equal_to_the_last_bit(tmp_path, options):
    """With all fixes; (1,) trains the last stage only: rank 0, whose common state is what is saved, has no parameter of its own."""
    straight = run_ranks(train_and_save, 2, tmp_path / "checkpoint", None, options)
    resumed = run_ranks(resume_and_train, 2, tmp_path / "checkpoint", None, options)
    assert resumed == straight
    assert all(set(steps) == {3.0} for _, steps in straight)


def test_fewer_ranks_resume_the_same_state(tmp_path):
    """One replica loads what two wrote; both replicas saw the same rows, so the next weights agree up to rounding."""
    straight = run_ranks(train_and_save, 2, tmp_path / "checkpoint", None, {})
    (weights, steps) = run_ranks(resume_and_train, 1, tmp_path / "checkpoint", None, {})[0]
    assert set(steps) == {3.0}
    for name, values in straight[0][0].items():
        torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(values), rtol=1e-5, atol=1e-6)


def test_without_keep_step_loading_fails(tmp_path):
    run_ranks(train_and_save, 1, tmp_path / "checkpoint", None, {})
    with pytest.raises(RankError, match="KeyError: 'step'"):
        run_ranks(resume_and_train, 1, tmp_path / "checkpoint", "keep_step", {})


def test_without_own_step_the_resumed_update_is_wrong(tmp_path):
    straight = run_ranks(train_and_save, 1, tmp_path / "checkpoint", None, {})
    resumed = run_ranks(resume_and_train, 1, tmp_path / "checkpoint", "own_step", {})
    assert set(resumed[0][1]) == {6.0}  # four parameters raised one shared step from 2
    assert resumed[0][0] != straight[0][0]


def test_without_primed_state_loading_fails(tmp_path):
    run_ranks(train_and_save, 1, tmp_path / "checkpoint", None, {})
    with pytest.raises(RankError, match="assert len\\(steps\\) == 1"):
        run_ranks(resume_and_train, 1, tmp_path / "checkpoint", "primed_state", {})


def save_before_training(_rank: int, folder: Path) -> list[float]:
    run = Run()
    run.save(folder)
    run.step()
    return run.steps()


def test_a_checkpoint_before_the_first_step_is_legal(tmp_path):
    assert set(run_ranks(save_before_training, 1, tmp_path / "checkpoint")[0]) == {1.0}


def test_without_empty_rank_saving_fails(tmp_path):
    with pytest.raises(RankError, match="assert len\\(steps\\) == 1"):
        run_ranks(train_and_save, 2, tmp_path / "checkpoint", "empty_rank", {"pp_size": 2, "trained": (0,)})


def recompute_norm(_rank: int, without: str | None) -> list[float]:
    mcore_fixes.apply(without=without)
    parallel_state.initialize_model_parallel(1)
    mcore.seed_tracker(1)
    norm = torch.nn.LayerNorm(3)
    x = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    checkpoint = CheckpointWithoutOutput()
    out = checkpoint.checkpoint(norm, x) * 2
    checkpoint.discard_output_and_register_recompute(out)
    out.sum().backward()
    reference = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    (norm(reference) * 2).sum().backward()
    return (x.grad - reference.grad).abs().flatten().tolist()


def test_norm_recompute():
    assert run_ranks(recompute_norm, 1, None) == [[0.0, 0.0, 0.0]]
    with pytest.raises(RankError, match="NameError"):
        run_ranks(recompute_norm, 1, "no_fp8")


def save_twice(_rank: int, folder: Path, background: bool) -> list[int]:
    run = Run()
    run.step()
    run.save(folder / "first", background=background)
    run.step()
    run.save(folder / "second", background=background)
    return [process.pid for process in multiprocessing.active_children()]


@pytest.mark.parametrize("background", [False, True])
def test_saves_leave_no_process_behind(tmp_path, background):
    """The Manager process of the unfixed library would be a living child."""
    assert run_ranks(save_twice, 2, tmp_path, background) == [[], []]
    assert (tmp_path / "second" / "metadata.json").is_file()


def test_without_forked_results_a_manager_is_spawned(monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    mcore_fixes.apply(without="forked_results")
    try:
        results = filesystem_async._get_write_results_queue()
        assert not isinstance(results, mcore_fixes.ResultsQueue)
        assert [child.name for child in multiprocessing.active_children() if "Manager" in child.name]
    finally:
        mcore_fixes.apply()


def test_results_larger_than_a_pipe():
    """64 KiB is what a pipe holds: a queue without a reader would block the writer for ever, in one process and in a joined child."""
    answer = {0: "x" * (1 << 20)}
    results = mcore_fixes.ResultsQueue()
    results.put(answer)
    assert results.get_nowait() == answer
    child = multiprocessing.get_context("fork").Process(target=results.put, args=(answer,))
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0
    assert results.get_nowait() == answer


def test_a_writer_that_never_answered(monkeypatch):
    monkeypatch.setattr(mcore_fixes, "RESULT_WAIT_S", 0.1)
    with pytest.raises(queue.Empty):
        mcore_fixes.ResultsQueue().get_nowait()


def queue_owner(_rank: int) -> tuple[int, int]:
    first = filesystem_async._get_write_results_queue()
    first.put(_rank)
    time.sleep(0.1)
    return first.get_nowait(), int(first is filesystem_async._get_write_results_queue())


def test_each_rank_has_its_own_queue():
    """Ranks forked from one parent that already made a queue must not read each other's answers."""
    filesystem_async._get_write_results_queue()
    assert run_ranks(queue_owner, 3) == [(0, 1), (1, 1), (2, 1)]


def test_another_source_is_refused(monkeypatch):
    patch = mcore_fixes.FIXES["keep_step"][0]
    other = mcore_fixes.Patch(patch.owner, "state_dict", "a line that is not there", patch.make)
    with pytest.raises(ImportError, match="state_dict does not contain 'a line that is not there'.*force-reinstall"):
        mcore_fixes._checked(other.target(), other)
    gone = mcore_fixes.Patch(patch.owner, "no_such_function", "", patch.make)
    with pytest.raises(ImportError, match="no_such_function does not contain"):
        mcore_fixes._checked(gone.target(), gone)


def test_markers_are_in_the_original_source():
    for patches in mcore_fixes.FIXES.values():
        for patch in patches:
            assert mcore_fixes._checked(type("Original", (), {patch.name: mcore_fixes._ORIGINALS[patch.owner, patch.name]}), patch)
            assert getattr(patch.target(), patch.name) is not mcore_fixes._ORIGINALS[patch.owner, patch.name]


def test_unknown_fix():
    with pytest.raises(ValueError, match="no fix is named 'nothing'"):
        mcore_fixes.apply(without="nothing")
