"""Kernel tests on a machine without a GPU run in Triton's interpreter, which has to be asked for before a kernel is defined."""

import os

if not os.environ.get("LONGVILA_GPU_TESTS"):
    os.environ["TRITON_INTERPRET"] = "1"
