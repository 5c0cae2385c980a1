"""tools/trace_attention.py: how much of the transfers is hidden, and the picture, from kernels written down by hand."""

import json

from programs import ROOT, load_script

from ranks import warm_parent

KERNELS = [
    {"name": "ncclDevKernel_SendRecv", "stream": 20, "start_ms": 0.0, "ms": 2.0},
    {"name": "cudnn_generated_fort_native_sdpa_flash", "stream": 7, "start_ms": 1.0, "ms": 3.0},
    {"name": "_merge_kernel", "stream": 7, "start_ms": 4.0, "ms": 0.5},
    {"name": "ncclDevKernel_AllGather", "stream": 20, "start_ms": 4.25, "ms": 1.0},
]


def test_hidden_time_is_counted_once_and_drawn(tmp_path):
    warm_parent()
    tool = load_script(ROOT / "tools" / "trace_attention.py")
    numbers = tool.summary(KERNELS)
    assert numbers == {"step_ms": 5.25, "attention_ms": 3.0, "other_ms": 0.5, "transfer_ms": 3.0, "transfer_hidden_ms": 1.25}
    assert tool.merged([(2, 3), (0, 1), (0.5, 2.5)]) == [(0, 3)]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"scheme": "mmsp", "summary": numbers, "kernels": KERNELS}))
    tool.main(["--output", str(tmp_path / "trace"), "--plot"])
    assert (tmp_path / "trace.png").stat().st_size > 1000
