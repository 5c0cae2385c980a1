"""Every Triton kernel against its twin and fp64, in Triton's interpreter, or on the GPU where GPU tests are asked for.

bf16 is for the GPU (tests/gpu/test_kernels_gpu.py): the interpreter computes it wrongly.
"""

import os

import pytest
import torch
from kernel_cases import CASES, Case, check, max_error, run

from megatron_longvila.kernels.choice import REFERENCE, get_kernels

CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if os.environ.get("LONGVILA_GPU_TESTS") else CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_kernel(name, dtype):
    build, sizes = CASES[name]
    check(build(dtype, DEVICE, **sizes))


def test_the_check_refuses_a_small_error():
    build, _ = CASES["rms_norm"]
    case = build(torch.float32, DEVICE)
    wrong = Case(case.inputs, lambda kernels, *x: (case.function(kernels, *x)[0] * (1.0 + 1e-5 * (kernels.name == "triton")),), (0, 1))
    with pytest.raises(AssertionError, match="result 0 is off"):
        check(wrong)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_programs_that_sum_several_rows(name, monkeypatch):
    monkeypatch.setattr(f"megatron_longvila.kernels.{name}.BACKWARD_PROGRAMS", 4)
    monkeypatch.setattr("megatron_longvila.kernels.layer_norm.TILE_VALUES", 64)  # a row of 40
    check(CASES[name][0](torch.float32, DEVICE, rows=5, width=40))  # 10 rows: 4, 4 and 2


@pytest.mark.filterwarnings("ignore:divide by zero")  # log(0) in the interpreter
def test_a_shard_of_meaningless_columns_has_no_lse():
    logits, labels = torch.full((2, 50), float("-inf"), device=DEVICE), torch.tensor([3, 99], device=DEVICE)
    lse, target = get_kernels("triton", DEVICE).lse_and_target(logits, labels, 60)
    assert lse.tolist() == [float("-inf")] * 2 and target.tolist() == [0.0, float("-inf")]


def test_a_logit_that_is_not_a_number_is_not_hidden():
    logits = torch.zeros(2, 50, device=DEVICE)
    logits[1, 7] = float("nan")
    lse, _ = get_kernels("triton", DEVICE).lse_and_target(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE), 0)
    assert lse[0].isfinite() and lse[1].isnan()


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "swiglu", "take_rows", "place_rows"])
def test_gradients_of_expanded_and_transposed_tensors(name):
    """A summed loss sends back one value for all places; activations may arrive transposed."""
    case = CASES[name][0](torch.float32, DEVICE)
    x = case.inputs[0].transpose(0, 1).contiguous().transpose(0, 1) if case.inputs[0].dim() > 2 else case.inputs[0]
    grads = []
    for kernels in (get_kernels("triton", DEVICE), REFERENCE):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        case.function(kernels, leaf, *case.inputs[1:])[0].sum().backward()
        grads.append(leaf.grad)
    assert max_error(*grads) <= 1e-5


def test_auto_follows_the_device_and_names_are_checked():
    assert get_kernels("auto", CPU) is REFERENCE and get_kernels("auto", torch.device("meta")).name == "triton"
    with pytest.raises(ValueError, match="'cuda' are unknown; choose one of auto, triton, reference"):
        get_kernels("cuda", CPU)


def test_asking_for_a_missing_triton_says_so(monkeypatch):
    monkeypatch.setattr("megatron_longvila.kernels.choice.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton.*model.kernels to 'reference'"):
        get_kernels("triton", CPU)
    assert get_kernels("auto", CPU) is REFERENCE


def test_triton_on_a_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' needs a GPU.*'auto' or 'reference'"):
        get_kernels("triton", CPU)


def test_kernels_do_not_write_into_their_inputs():
    for build, sizes in CASES.values():
        case = build(torch.float32, DEVICE, **sizes)
        before = [None if x is None else x.clone() for x in case.inputs]
        run(case, get_kernels("triton", DEVICE))
        assert all(x is None or torch.equal(x, old) for x, old in zip(case.inputs, before, strict=True))
