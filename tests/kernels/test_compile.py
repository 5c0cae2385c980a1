"""Every kernel passes the compiler for Hopper, which needs no GPU, and moves activations in 16 bytes at a time."""

import json
import sys

from programs import ROOT, start


def test_every_kernel_compiles_for_hopper_and_loads_16_bytes():
    code, text = start(sys.executable, ROOT / "tests" / "compile_kernels.py")
    assert code == 0, text
    kernels = {}
    for line in filter(lambda line: line.startswith("{"), text.splitlines()):
        row = json.loads(line)
        kernels[row["kernel"]] = row
    defined = {
        f"{path.stem}.{line.removeprefix('def ').split('(')[0]}"
        for path in (ROOT / "megatron_longvila" / "kernels").glob("*.py")
        for before, line in zip(path.read_text().splitlines(), path.read_text().splitlines()[1:], strict=False)
        if before == "@triton.jit"
    }
    assert set(kernels) == defined and defined
    for name, row in kernels.items():
        assert row["load"] == 16, row
        assert row["store"] == (4 if name == "cross_entropy._lse_kernel" else 16), row  # two numbers per row
