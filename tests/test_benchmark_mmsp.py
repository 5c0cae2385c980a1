"""tools/benchmark_mmsp.py at toy size: the schemes give the same rows and gradients, and rows are written once."""

import json
from argparse import Namespace

import torch
import torch.distributed as dist
from programs import ROOT, load_script

from ranks import run_ranks, warm_parent

TINY = ROOT / "examples" / "models" / "tiny.yaml"


def test_rows_are_measured_once(tmp_path):
    warm_parent()
    tool = load_script(ROOT / "tools" / "benchmark_mmsp.py")
    path = tmp_path / "rows.json"
    flags = ["--output", str(path), "--config", str(TINY), "--frames", "7", "--videos", "2", "--text_tokens", "3"]
    flags += ["--frames_per_micro_batch", "2", "--iterations", "1", "--warm_up", "0"]
    run_ranks(lambda rank: tool.main(flags), 2)
    rows = json.loads(path.read_text())
    names = ["no communication", "mmsp reshard", "replicated towers", "all-gather + slice", "one-stage sharding"]
    assert [row["scheme"] for row in rows] == names
    by_name = {row["scheme"]: row for row in rows}
    assert by_name["mmsp reshard"]["frames_max_over_mean"] == round(4 / 3.5, 4)
    assert by_name["replicated towers"]["frames_max_over_mean"] == 1
    assert all(row["seq_len"] == 7 * 5 + 4 * 3 and row["fraction_of_no_communication"] > 0 for row in rows)
    run_ranks(lambda rank: tool.main(flags), 2)
    assert json.loads(path.read_text()) == rows


def test_one_stage_sharding_cuts_placeholders_like_text():
    tool = load_script(ROOT / "tools" / "benchmark_mmsp.py")
    # 6 tokens of text, 8 frames with a token behind each, 6 of text: 28 tokens with one placeholder per frame
    spec = tool.make_row(8, 1, 6, 4)
    assert spec.sample_lengths == (12 + 8 * 5,) and spec.frame_starts == tuple(range(6, 46, 5))
    assert tool.one_stage_frames(spec, 4) == [range(0, 1), range(1, 4), range(4, 8), range(8, 8)]


def test_the_schemes_give_the_same_rows_and_gradients():
    warm_parent()
    tool = load_script(ROOT / "tools" / "benchmark_mmsp.py")

    def body(rank):
        from megatron_longvila import platform

        arguments = Namespace(config=TINY, frames_per_micro_batch=2, recompute=True)
        config = tool.configure(arguments)
        groups = tool.initialize_groups(tool.check(config, 2))
        platform.seed(0, 0)
        model = tool.build_model(config, groups)
        tool.initialize_weights(model, config, 0)
        front = tool.Front(model, groups, tool.make_row(7, 2, 3, config.model.tokens_per_frame))
        results = {}
        for name in ("mmsp reshard", "replicated towers", "all-gather + slice"):
            out = front.schemes()[name]().detach().clone()
            grads = [parameter.grad.clone() for parameter in (*model.vision_tower.parameters(), *model.projector.parameters())]
            for grad in grads:
                dist.all_reduce(grad)  # what training does
            results[name] = out, torch.cat([grad.flatten() for grad in grads])
        out, grads = results["mmsp reshard"]
        return [
            ((other - out).abs().max() / out.abs().max()).item() + ((other_grads - grads).norm() / grads.norm()).item()
            for other, other_grads in results.values()
        ]

    for errors in run_ranks(body, 2):
        assert max(errors) < 1e-5, errors
