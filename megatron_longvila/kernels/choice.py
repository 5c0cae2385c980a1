"""Which implementation of the kernels runs: Triton's or the plain twins. Both have the same signatures; `reference` documents them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec

import torch

from megatron_longvila.kernels import reference


@dataclass(frozen=True)
class Kernels:
    """One implementation of each operation of `reference`, under the same name.

    Attributes:
        name: `triton` or `reference`.
    """

    name: str
    pack_qkv: Callable
    swap_into: Callable
    merge_into: Callable
    take_rows: Callable
    place_rows: Callable
    rms_norm: Callable
    layer_norm: Callable
    swiglu: Callable
    lse_and_target: Callable
    cross_entropy_gradient: Callable


_OPERATIONS = [field.name for field in fields(Kernels) if field.name != "name"]
REFERENCE = Kernels("reference", **{name: getattr(reference, name) for name in _OPERATIONS})


def get_kernels(name: str, device: torch.device) -> Kernels:
    """The kernels `model.kernels` asks for.

    Args:
        name: `triton`, `reference`, or `auto`: Triton on a GPU, the twins on a CPU.
        device: where the tensors will be.

    Raises:
        ValueError: `name` is unknown, or Triton is asked for and not installed, or asked for on a CPU outside its interpreter.
    """
    if name not in ("auto", "triton", "reference"):
        raise ValueError(f"kernels {name!r} are unknown; choose one of auto, triton, reference")
    if name == "reference" or (name == "auto" and device.type == "cpu"):
        return REFERENCE
    if find_spec("triton") is None:
        raise ValueError(
            f"model.kernels={name!r} needs the package triton, which this Python lacks; install it or set model.kernels to 'reference'"
        )
    # Only here and below: CPU installations of torch bring no Triton.
    import triton

    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("model.kernels='triton' needs a GPU and this job runs on a CPU; set model.kernels to 'auto' or 'reference'")
    return _triton_kernels()


def _triton_kernels() -> Kernels:
    from megatron_longvila.kernels import cross_entropy, layer_norm, merge, qkv_pack, rms_norm, rows, swiglu

    return Kernels(
        "triton",
        pack_qkv=qkv_pack.pack_qkv,
        swap_into=qkv_pack.swap_into,
        merge_into=merge.merge_into,
        take_rows=rows.take_rows,
        place_rows=rows.place_rows,
        rms_norm=rms_norm.rms_norm,
        layer_norm=layer_norm.layer_norm,
        swiglu=swiglu.swiglu,
        lse_and_target=cross_entropy.lse_and_target,
        cross_entropy_gradient=cross_entropy.cross_entropy_gradient,
    )
