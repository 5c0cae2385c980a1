"""Ranks of a real mesh: each decodes its own frames, all agree on what failed, and all stop together."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_datasets import FRAMES, SHAPES, TinyDataset, tiny_config

from megatron_longvila.data.loader import Loader, Place
from megatron_longvila.data.mixture import Mixture, Part
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.parallel.plan import IGNORE_INDEX
from ranks import run_ranks


def _ranks_read(rank: int, sizes: tuple[int, int, int, int], tokenizer_path, folder) -> dict:
    """All that one rank sees of an epoch in which sample 10 cannot be read."""
    import torch.distributed as dist

    from megatron_longvila.mesh import Mesh
    from megatron_longvila.parallel.groups import destroy_groups, initialize_groups

    groups = initialize_groups(Mesh(dist.get_world_size(), *sizes), timeout_s=60)
    place = Place.of(groups, sequence_parallel=True)
    dataset = TinyDataset(SHAPES, folder / "dataset")
    dataset.broken.add(dataset.medium_of(10))
    config = tiny_config(epochs=2, global_batch_size=4)
    loader = Loader(config, place, [dataset], load_tokenizer(tokenizer_path), report_path=folder / "report.jsonl", cache_dir=folder)
    steps = [
        [(b.sample_ids, b.skipped, b.frames.clone(), b.labels_T, b.input_ids_T, b.plan.frames, b.num_frames) for b in step]
        for step in loader
    ]
    seen = {
        "steps": steps,
        "decoded": loader.frames_decoded,
        "state": loader.state_dict(),
        "dp": place.dp_rank,
        "cp": place.cp_rank,
        "tp": groups.tp.rank(),
        "pp": groups.pp.rank(),
    }
    destroy_groups()
    return seen


@pytest.mark.parametrize(
    "sizes", [(2, 1, 2, 1), (1, 2, 1, 2), (2, 2, 1, 1), (1, 1, 2, 1), (1, 2, 1, 1)], ids=lambda s: "tp{} pp{} ulysses{} ring{}".format(*s)
)
def test_ranks_agree(sentencepiece_file, tmp_path, sizes):
    (tmp_path / "dataset").mkdir()
    seen = run_ranks(_ranks_read, 4, sizes, sentencepiece_file, tmp_path, timeout_s=60)
    broken = TinyDataset(SHAPES)
    broken.broken.add(broken.medium_of(10))
    alone = Loader(tiny_config(epochs=2, global_batch_size=4), Place(), [broken], load_tokenizer(sentencepiece_file))
    reference = list(alone)

    # Decoded once over all ranks: sample 10 fails in the first epoch and is not tried in the second.
    assert sum(one["decoded"] for one in seen) == alone.frames_decoded == 2 * (sum(FRAMES) - FRAMES[10])
    assert all(one["decoded"] == 0 for one in seen if one["tp"] or one["pp"])
    assert all(one["state"] == alone.state_dict() for one in seen) and list(alone.state_dict()["skipped"]) == ["10"]
    (record,) = map(json.loads, (tmp_path / "report.jsonl").read_text().splitlines())
    assert (record["key"], record["id"], record["dataset"]) == ("samples.jsonl:11", "sample-10", str(tmp_path / "dataset"))

    dp_size = max(one["dp"] for one in seen) + 1
    for number, step in enumerate(reference):
        for index, whole in enumerate(step):
            views = [(one, one["steps"][number][index // dp_size]) for one in seen if one["dp"] == index % dp_size]
            for one, (ids, skipped, frames, _, _, planned, num_frames) in views:
                assert (ids, skipped, num_frames) == (whole.sample_ids, whole.skipped, whole.num_frames)
                expected = whole.frames[planned.start : planned.stop] if one["pp"] == 0 else whole.frames[:0]
                assert torch.equal(frames, expected)
            for tp in {one["tp"] for one in seen}:  # every stage and tp rank has the labels of the row, once over cp
                for pp in {one["pp"] for one in seen}:
                    of_cp = [view[3] for one, view in views if (one["tp"], one["pp"]) == (tp, pp)]
                    assert Counter(torch.cat(of_cp).tolist())[IGNORE_INDEX] >= (whole.labels_T == IGNORE_INDEX).sum()
                    kept = sorted(label for part in of_cp for label in part.tolist() if label != IGNORE_INDEX)
                    assert kept == sorted(label for label in whole.labels_T.tolist() if label != IGNORE_INDEX)


def _ranks_fail(rank: int, tokenizer_path) -> str:
    """Every rank raises together when too much is bad, whoever saw it."""
    import torch.distributed as dist

    from megatron_longvila.mesh import Mesh
    from megatron_longvila.parallel.groups import destroy_groups, initialize_groups

    groups = initialize_groups(Mesh(dist.get_world_size(), 1, 1, 2, 1), timeout_s=60)
    dataset = TinyDataset(SHAPES)
    dataset.broken.add(dataset.medium_of(7))  # one frame: one cp rank of one replica sees it
    loader = Loader(
        tiny_config(epochs=1, global_batch_size=4, max_bad_fraction=0.0),
        Place.of(groups, sequence_parallel=False),
        [dataset],
        load_tokenizer(tokenizer_path),
    )
    try:
        list(loader)
    except ValueError as error:
        destroy_groups()
        return str(error)
    return "no error"


def test_all_ranks_stop_together(sentencepiece_file):
    messages = run_ranks(_ranks_fail, 4, sentencepiece_file, timeout_s=60)
    assert len(set(messages)) == 1 and messages[0].startswith("1 of 12 samples had to be skipped") and "sample-7" in messages[0]


def _mixture() -> Mixture:
    """Every second sample three times an epoch, so that one step may hold a sample twice, and a part of the rest; sample 3 never."""
    return Mixture([Part("even", np.arange(0, 12, 2), 18), Part("odd", np.array([1, 5, 7, 9, 11]), 2, seed=5)])


def _ranks_mix(rank: int, tokenizer_path, folder) -> dict:
    import torch.distributed as dist

    from megatron_longvila.mesh import Mesh
    from megatron_longvila.parallel.groups import destroy_groups, initialize_groups

    groups = initialize_groups(Mesh(dist.get_world_size(), 1, 1, 2, 1), timeout_s=60)
    dataset = TinyDataset(SHAPES, folder / "dataset")
    dataset.broken.add(dataset.medium_of(10))
    place = Place.of(groups, sequence_parallel=False)
    loader = Loader(
        tiny_config(epochs=3, global_batch_size=4), place, [dataset], load_tokenizer(tokenizer_path), mixture=_mixture(), cache_dir=folder
    )
    seen = {"ids": [[(b.sample_ids, b.skipped) for b in step] for step in loader], "state": loader.state_dict(), "dp": place.dp_rank}
    destroy_groups()
    return seen


def test_ranks_agree_on_a_mixture(sentencepiece_file, tmp_path):
    (tmp_path / "dataset").mkdir()
    broken = TinyDataset(SHAPES)
    broken.broken.add(broken.medium_of(10))
    alone = Loader(tiny_config(epochs=3, global_batch_size=4), Place(), [broken], load_tokenizer(sentencepiece_file), mixture=_mixture())
    expected = [[(b.sample_ids, b.skipped) for b in step] for step in alone]
    shown = Counter(name for step in expected for ids, _ in step for name in ids)
    assert all(shown[f"sample-{number}"] == 9 for number in range(0, 12, 2)) and sum(shown.values()) == 60 and "sample-3" not in shown
    for _ in range(2):  # measured by the ranks in shares, then from the cache
        seen = run_ranks(_ranks_mix, 4, sentencepiece_file, tmp_path, timeout_s=60)
        assert all(one["state"] == alone.state_dict() for one in seen)
        assert all(one["ids"] == [step[one["dp"] :: 2] for step in expected] for one in seen)
