"""Device, process group, seeds, and what the CPU shim changes."""

from __future__ import annotations

import random
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_longvila import platform
from megatron_longvila.platform import cpu, mcore
from ranks import run_ranks

from megatron.core import parallel_state  # isort: skip
from megatron.core.optimizer import clip_grads, optimizer  # isort: skip
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # isort: skip

cpu_only = pytest.mark.skipif(not platform.is_cpu(), reason="the shim is inactive with CUDA")


@cpu_only
def test_cuda_literals_mean_the_cpu():
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.ones(2).cuda().tolist() == [1.0, 1.0]
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"  # what megatron's optimizer asserts
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()


@cpu_only
def test_activating_twice_enters_once():
    depth = torch._C._len_torch_function_stack()
    assert cpu.activate() is True
    assert torch._C._len_torch_function_stack() == depth


@cpu_only
def test_device_and_backend():
    assert (platform.device(), platform.backend(), platform.device_name()) == (torch.device("cpu"), "gloo", "cpu")
    assert 0.0 < platform.memory_gib() < 1000.0


def draws() -> tuple:
    """One number from every stream."""
    with get_cuda_rng_tracker().fork():
        inner = torch.rand(1).item()
    return random.random(), float(np.random.rand()), torch.rand(1).item(), inner


def seed_and_draw(rank: int) -> list[tuple]:
    parallel_state.initialize_model_parallel(2, 2)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    platform.seed(7, stage)
    first = draws()
    state = platform.rng_state()
    second = draws()
    platform.set_rng_state(state)
    again = draws()
    platform.seed(7, stage)
    return [first, second, again, draws()]


def test_seeds_and_their_state():
    ranks = run_ranks(seed_and_draw, 4)
    for first, second, again, reseeded in ranks:
        assert first == reseeded and second == again and first != second
    # tp ranks of a stage agree outside megatron's streams and differ inside; stages differ everywhere.
    assert ranks[0][0][:3] == ranks[1][0][:3] and ranks[0][0][3] != ranks[1][0][3]
    assert all(a != b for a, b in zip(ranks[0][0], ranks[2][0], strict=True))


@cpu_only
def test_random_state_of_the_other_device_is_refused():
    with pytest.raises(ValueError, match="saved on a CUDA device and this process runs on cpu"):
        platform.set_rng_state({"cuda": None})


def tracker_misuse(_rank: int) -> list[str]:
    parallel_state.initialize_model_parallel(1)
    platform.seed(1, 0)
    messages = []
    for use in (lambda: get_cuda_rng_tracker().add("model-parallel-rng", 5), lambda: get_cuda_rng_tracker().fork("absent").__enter__()):
        try:
            use()
        except ValueError as error:
            messages.append(str(error))
    outer = torch.get_rng_state()
    with pytest.raises(KeyError), get_cuda_rng_tracker().fork():
        raise KeyError
    assert torch.equal(outer, torch.get_rng_state())
    return messages


@cpu_only
def test_tracker_refuses_misuse_and_survives_errors():
    twice, absent = run_ranks(tracker_misuse, 1)[0]
    assert "'model-parallel-rng' or seed 5 was added before" in twice
    assert "'absent' was never added; known: ['data-parallel-rng'" in absent


def lone(_rank: int) -> tuple:
    dist.destroy_process_group()
    platform.init_distributed(timeout_s=12.5)
    answer = dist.get_world_size(), dist.get_rank(), dist.get_backend()
    timeout = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    platform.shutdown_distributed()
    platform.shutdown_distributed()
    return *answer, timeout


@cpu_only
def test_a_lone_process_is_a_job_of_one(monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_ranks(lone, 1) == [(1, 0, "gloo", 12.5)]
    assert not list(tmp_path.iterdir())  # nothing stays behind


def group_timeouts(_rank: int) -> set[float]:
    parallel_state.initialize_model_parallel(1, 1, context_parallel_size=2, distributed_timeout_minutes=90.5 / 60)
    groups = [
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_context_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_data_parallel_group_gloo(with_context_parallel=True),
    ]
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_megatron_takes_fractions_of_a_minute():
    assert run_ranks(group_timeouts, 2) == [{90.5}, {90.5}]


def test_norm_and_clipping_need_neither_transformer_engine_nor_apex():
    """Whatever can be imported: theirs need a GPU, and this may be a run on the CPUs of a machine that has one."""
    for module in (clip_grads, optimizer):
        assert module.multi_tensor_applier.__module__ == "megatron.core.utils"
        assert module.multi_tensor_scale_impl.__module__ == mcore.__name__
    assert clip_grads.l2_norm_impl.__module__ == mcore.__name__
    grads = [torch.full(shape, value) for shape, value in (((3, 5), 2.0), ((7,), -1.0), ((), 3.0), ((0,), 1.0))]
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1, dtype=torch.int), [grads], False)
    assert norm.shape == (1,) and norm.item() == pytest.approx((15 * 4 + 7 + 9) ** 0.5)
    copies, halves = [grad.bfloat16() for grad in grads], [grad / 2 for grad in grads]
    optimizer._multi_tensor_copy_this_to_that(grads, copies, torch.zeros(1, dtype=torch.int))
    assert all(torch.equal(*pair) for pair in zip(copies, [grad.bfloat16() for grad in grads], strict=True))
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, None, [grads, grads], 0.5)
    assert all(torch.equal(*pair) for pair in zip(grads, halves, strict=True))


def test_select_adam():
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    mcore.select_adam("torch")
    assert optimizer.Adam is distrib_optimizer.Adam is torch.optim.AdamW
    assert optimizer.USING_PYTORCH_OPTIMIZER and not distrib_optimizer.HAVE_APEX_OR_TE
    assert not distrib_optimizer.USING_TE_OPTIMIZER and not distrib_optimizer.USING_APEX_OPTIMIZER


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("te", ["needs transformer_engine.pytorch.optimizers.FusedAdam", "megatron-longvila[te]", "--optimizer.backend torch"]),
        ("apex", ["needs apex.optimizers.FusedAdam", "source repository", "--optimizer.backend torch"]),
        ("sgd", ["'sgd' is not one of ['apex', 'te', 'torch']"]),
    ],
)
def test_select_adam_refuses_what_is_not_there(backend, words, monkeypatch):
    # None in sys.modules makes the import fail wherever the package is installed.
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine.pytorch.optimizers", None)
    monkeypatch.setitem(__import__("sys").modules, "apex.optimizers", None)
    with pytest.raises(ValueError) as error:
        mcore.select_adam(backend)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("0.17.0", ["megatron-core 0.17.0 is installed, 0.16.1 is needed", "pip install megatron-core==0.16.1"]),
        (None, ["is not installed"]),
    ],
)
def test_another_megatron_is_refused(monkeypatch, found, words):
    def version(name):
        if found is None:
            raise mcore.importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(mcore.importlib.metadata, "version", version)
    with pytest.raises(ImportError) as error:
        mcore.check_version()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("package", ["psutil", "einops"])
def test_undeclared_requirements_of_megatron_are_named(monkeypatch, package):
    find_spec = mcore.importlib.util.find_spec
    monkeypatch.setattr(mcore.importlib.util, "find_spec", lambda name, *args: None if name == package else find_spec(name, *args))
    with pytest.raises(ImportError, match=f"needs {package}.*pip install {package}"):
        mcore.check_version()


def test_the_import_is_quiet():
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", "import megatron_longvila.platform.mcore"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@cpu_only
def test_a_warning_about_grad_names_the_line_that_reads_it():
    """Megatron's own reads of views' .grad are silent; anybody else's still warn, once, and not as if the shim had read it."""
    import subprocess
    import sys

    lines = [
        "from megatron_longvila.platform import mcore",
        "import torch",
        "from megatron.core.optimizer.optimizer import _zero_grad_group_helper",
        "leaf = torch.ones(2, requires_grad=True)",
        "view = leaf[:1]",
        "_zero_grad_group_helper([view, leaf], set_to_none=True)",
        "assert leaf.grad is None",
        "view.grad",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"<string>:{len(lines)}: UserWarning: The .grad attribute") and done.stderr.count("Warning") == 1
