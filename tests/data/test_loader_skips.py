"""Samples and frames that cannot be read or do not fit: skipped alike on every layout, counted, or the end of the run."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_datasets import SHAPES, TinyDataset, colour
from tiny_loaders import ids_of, make, places, same, steps_of

from megatron_longvila.data import loader as loader_module
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.parallel.plan import IGNORE_INDEX


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_file):
    return load_tokenizer(sentencepiece_file)


def test_failed_sample_is_masked_counted_once_and_stays_skipped(tokenizer, tmp_path):
    dataset = TinyDataset(SHAPES)
    dataset.broken.add(dataset.medium_of(4, 1))  # the image of a sample whose video is fine
    report = tmp_path / "run" / "data_report.jsonl"
    clean = steps_of(make(tokenizer, epochs=3))
    loader = make(tokenizer, dataset=dataset, epochs=3, loader={"report_path": report})
    steps = steps_of(loader)
    assert ids_of(steps) == ids_of(clean)
    seen = 0
    for before, after in zip((b for s in clean for b in s), (b for s in steps for b in s), strict=True):
        assert torch.equal(before.input_ids_T, after.input_ids_T)
        if "sample-4" in after.sample_ids:
            seen += 1
            assert after.skipped == ("sample-4",)
            place = after.sample_ids.index("sample-4")
            start, stop = (sum(after.plan.layout.sample_lengths[:p]) for p in (place, place + 1))
            assert (after.labels_T[start:stop] == IGNORE_INDEX).all() and (before.labels_T[start:stop] != IGNORE_INDEX).any()
            black = [i for i in range(len(after.frames)) if not after.frames[i].any()]
            assert len(black) == 7  # its video's frames too
            others = torch.cat([after.labels_T[:start], after.labels_T[stop:]])
            assert torch.equal(others, torch.cat([before.labels_T[:start], before.labels_T[stop:]]))
        else:
            assert same(before, after)
    assert seen == 3 and list(loader.skipped) == [4]
    assert dataset.reads[dataset.medium_of(4, 1)] == 1  # not tried again in later epochs
    (line,) = map(json.loads, report.read_text().splitlines())
    assert line["key"] == "samples.jsonl:5" and line["id"] == "sample-4" and "broken on purpose" in line["reason"]

    # A resumed run reads the same rows even if the file is whole again.
    resumed = make(tokenizer, dataset=TinyDataset(SHAPES), epochs=3, loader={"report_path": report})
    half = make(tokenizer, dataset=dataset, epochs=3)
    done = len(steps_of(half, 4))
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert all(same(a, b) for x, y in zip(steps[done:], steps_of(resumed), strict=True) for a, b in zip(x, y, strict=True))
    assert len(report.read_text().splitlines()) == 1


def test_a_bad_frame_shows_the_same_neighbour_on_every_layout(tokenizer, monkeypatch):
    dataset = TinyDataset([[6]])
    name = dataset.medium_of(0)
    dataset.bad_frames |= {(name, 2), (name, 3)}  # with two cp ranks each bad frame lies at the edge of a share
    shown = [colour(0, frame) for frame in (0, 1, 1, 4, 4, 5)]
    said: list[str] = []
    monkeypatch.setattr(loader_module.logger, "warning", lambda text, *values: said.append(text % values))
    for cp_size in (1, 2, 3, 6):
        loaders = [make(tokenizer, place, dataset=dataset, epochs=1, global_batch_size=1) for place in places(1, cp_size)[0]]
        frames = torch.cat([steps_of(loader)[0][0].frames for loader in loaders])
        assert [tuple(frame[0, 0].tolist()) for frame in frames] == shown
        assert sum(loader.frames_replaced for loader in loaders) == 2 and not any(loader.skipped for loader in loaders)
    assert said[0] == "sample sample-0: 2 frames do not decode; each shows its nearest good neighbour"

    said.clear()
    loader = make(tokenizer, dataset=dataset, epochs=3, global_batch_size=1)
    steps_of(loader)
    assert loader.frames_replaced == 6 and len(said) == 1
    skipping = make(tokenizer, dataset=dataset, epochs=1, global_batch_size=1, on_bad_frame="skip_sample", max_bad_fraction=1.0)
    assert steps_of(skipping)[0][0].skipped == ("sample-0",) and "2 of 6 frames do not decode" in skipping.skipped[0]


def test_too_many_bad_samples_end_the_run(tokenizer):
    dataset = TinyDataset(SHAPES)
    dataset.broken.update(dataset.medium_of(n) for n in (0, 1, 5))
    with pytest.raises(ValueError, match=r"3 of 12 samples had to be skipped, a share of 0.2500, more than data.max_bad_fraction=0.2"):
        steps_of(make(tokenizer, dataset=dataset, epochs=1, max_bad_fraction=0.2))
    assert len(steps_of(make(tokenizer, dataset=dataset, epochs=1, max_bad_fraction=0.25)))


def test_on_bad_frame_fail_ends_the_run_at_the_first(tokenizer):
    dataset = TinyDataset(SHAPES)
    dataset.broken.add(dataset.medium_of(0))
    with pytest.raises(ValueError, match="on_bad_frame='fail' and sample-0: medium 0+ is broken on purpose"):
        steps_of(make(tokenizer, dataset=dataset, epochs=1, on_bad_frame="fail"))


def test_sample_that_does_not_fit_is_left_out_and_reported(tokenizer, tmp_path):
    dataset = TinyDataset(SHAPES)
    long = {"from": "human", "value": "word " * 500}
    dataset.samples[2] = replace(dataset.samples[2], conversations=(long, dataset.samples[2].conversations[1]))
    dataset.samples[6] = replace(dataset.samples[6], conversations=({"from": "robot", "value": "?"},))
    report = tmp_path / "report.jsonl"
    loader = make(tokenizer, dataset=dataset, epochs=1, loader={"report_path": report})
    assert Counter(i for step in ids_of(steps_of(loader)) for i in step) == Counter(f"sample-{n}" for n in range(12) if n not in (2, 6))
    assert list(loader.unusable) == [2, 6] and loader.skipped == {}
    first, second = map(json.loads, report.read_text().splitlines())
    assert (first["key"], first["id"], first["dataset"]) == ("samples.jsonl:3", "sample-2", str(dataset.path))
    assert "tokens, more than data.context_length=64" in first["reason"] and "turn 0 must be" in second["reason"]

    # The held-out set shares the file; a sample of another folder with the same line is another sample.
    held_out = TinyDataset([[1], [1], []], tmp_path / "held_out")
    held_out.samples[2] = replace(held_out.samples[2], conversations=(long, held_out.samples[2].conversations[1]))
    for _ in range(2):
        make(tokenizer, dataset=held_out, loader={"report_path": report, "evaluation": True})
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert lines[:2] == [first, second] and [(line["key"], line["dataset"]) for line in lines[2:]] == [
        ("samples.jsonl:3", str(tmp_path / "held_out"))
    ]


def test_an_error_of_our_own_is_not_a_skipped_sample(tokenizer):
    dataset = TinyDataset(SHAPES)
    dataset.read = lambda media: 1 / 0
    with pytest.raises(ZeroDivisionError):
        steps_of(make(tokenizer, dataset=dataset, epochs=1))
