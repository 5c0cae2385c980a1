"""Compile every Triton kernel for a Hopper GPU, on any machine: `python tests/compile_kernels.py` prints one line per kernel and dtype.

Each line is JSON: the kernel, the dtypes of its pointers, and the widest load and store of its PTX in bytes. Nothing is launched: the call
is caught, its arguments' types and alignment are taken as they would be on a GPU, and the compiler runs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
ALIGNED = [["tt.divisibility", 16]]
# Qwen2-7B, few rows.
SIZES = {
    "pack_qkv": dict(rows=64, heads=(28, 4), head_dim=128, ulysses_size=4),
    "swap_into": dict(ranks=4, rows=64, heads=7, head_dim=128),
    "merge_into": dict(rows=64, heads=28, head_dim=128),
    "take_rows": dict(rows=64, taken=40, width=3584),
    "place_rows": dict(rows=64, placed=40, width=3584),
    "rms_norm": dict(rows=640, width=3584),
    "layer_norm": dict(rows=640, width=1152),
    "swiglu": dict(rows=16, width=18944),
    "cross_entropy": dict(rows=16, width=152064, meaningless=416),
}


def widest(ptx: str, instruction: str) -> int:
    """Bytes of the widest global access of a kind: `ld.global.v4.b32` is 16."""
    found = re.findall(rf"{instruction}\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(vector or 1) * int(bits) // 8 for vector, bits in found), default=0)


def compile_call(kernel, *args, grid, warmup, **kwargs) -> None:
    """Stands in for a launch."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = f"*{DTYPES[value.dtype]}", ALIGNED
        elif isinstance(value, int):
            signature[name] = "i32"
            attributes |= {(index,): ALIGNED} if value % 16 == 0 else {}
        else:
            signature[name] = "fp32"
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=HOPPER, options=options or None)
    ptx, pointers = compiled.asm["ptx"], [kind for kind in signature.values() if kind.startswith("*")]
    name = f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"
    print(json.dumps({"kernel": name, "pointers": pointers, "load": widest(ptx, "ld"), "store": widest(ptx, "st")}), flush=True)


def main() -> None:
    import kernel_cases

    from megatron_longvila.kernels.choice import get_kernels

    triton.runtime.jit.JITFunction.run = compile_call
    device, kernels = torch.device("cpu"), get_kernels("triton", torch.device("meta"))  # not for a CPU, where they could not be launched
    for name, sizes in SIZES.items():
        kernel_cases.run(getattr(kernel_cases, name)(torch.bfloat16, device, **sizes), kernels)


if __name__ == "__main__":
    main()
