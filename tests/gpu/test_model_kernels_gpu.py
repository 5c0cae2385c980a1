"""The whole model on one GPU, on Triton's kernels against plain PyTorch: loss and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_oracle import check_gradients, random_state

from megatron_longvila import platform
from oracle import BATCHES, build, run_batch, teardown, tiny_config

pytestmark = pytest.mark.gpu

BATCH = BATCHES["three_packed"]
RECOMPUTE = ("none", "selective", "full")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    platform.init_distributed(timeout_s=60)
    yield
    platform.shutdown_distributed()


def _config(kernels: str, precision: str, architecture: str = "qwen2", recompute: str = "none"):
    config = tiny_config(architecture, training={"recompute": recompute})
    model = replace(config.model, kernels=kernels, attention_backend="reference")
    return replace(config, model=model, training=replace(config.training, precision=precision))


def _step(config, state, compare=None):
    """(loss, gradients by name) of one batch; `compare(model, groups)` looks at the gradients where they are."""
    model, groups = build(config, {}, state)
    loss, _ = run_batch(model, BATCH, config, groups)
    gradients = {name.removeprefix("module."): parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    if compare is not None:
        compare(model, groups)
    teardown()
    return loss, gradients


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_fp32(architecture, recompute):
    state = random_state(tiny_config(architecture))
    loss_ref, gradients_ref = _step(_config("reference", "fp32", architecture), state)
    config = _config("triton", "fp32", architecture, recompute)
    loss, _ = _step(config, state, lambda model, groups: check_gradients(model, groups, gradients_ref))
    assert abs(loss - loss_ref) <= 1e-5 * abs(loss_ref)


def test_bf16_loses_at_most_twice_what_plain_pytorch_loses():
    """Against fp32, for the loss and each parameter's gradient; plus one bf16 ulp of their size."""
    state = random_state(tiny_config())
    loss_exact, exact = _step(_config("reference", "fp32"), state)
    (loss_plain, plain), (loss, values) = (_step(_config(kernels, "bf16"), state) for kernels in ("reference", "triton"))
    assert abs(loss - loss_exact) <= 2 * abs(loss_plain - loss_exact) + 2**-8 * abs(loss_exact)

    def errors(gradients):
        return {name: (gradients[name] - exact[name]).norm().item() for name in exact}

    ours, theirs = errors(values), errors(plain)
    far = {name: (ours[name], theirs[name]) for name in exact if ours[name] > 2 * theirs[name] + 2**-8 * exact[name].norm().item()}
    assert not far, far
