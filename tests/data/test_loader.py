"""The loader: one order for every layout, exact resume, each rank its own frames, and one opinion about what could not be read."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_datasets import FRAMES, SHAPES, TinyDataset, colour, png, tiny_config
from tiny_loaders import ids_of, make, places, same, steps_of

from megatron_longvila.data import loader as loader_module
from megatron_longvila.data.loader import Loader, Place
from megatron_longvila.data.media import MediaLimits
from megatron_longvila.data.preprocess import Options, preprocess
from megatron_longvila.data.shards import open_dataset
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.parallel.plan import IGNORE_INDEX


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_file):
    return load_tokenizer(sentencepiece_file)


def expected_pixels(dataset: TinyDataset, ids: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """Colours of a row's frames, from the rule `uniform` written out."""
    colours = []
    for name in ids:
        for sha256 in dataset.samples[int(name.split("-")[1])].media:
            count = dataset.media[sha256].num_frames
            chosen = range(count) if count <= 6 else np.linspace(0, count - 1, 6).round().astype(int)
            colours += [colour(int(sha256, 16), int(frame)) for frame in chosen]
    return colours


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2), (4, 1, 1)])
def test_rows_labels_and_pixels_do_not_depend_on_the_layout(tokenizer, mesh, workers):
    dataset = TinyDataset(SHAPES)
    reference = steps_of(make(tokenizer, dataset=dataset, epochs=2, global_batch_size=4, num_workers=0))
    assert len(reference) > 2
    dp_size, ulysses_size, ring_size = mesh
    played = [
        [steps_of(make(tokenizer, place, epochs=2, global_batch_size=4, num_workers=workers)) for place in replica]
        for replica in places(*mesh)
    ]
    for number, step in enumerate(reference):
        for index, whole in enumerate(step):
            parts = [ranks[number][index // dp_size] for ranks in played[index % dp_size]]
            assert all(part.sample_ids == whole.sample_ids for part in parts)
            pixels = torch.cat([part.frames for part in parts])
            assert [tuple(frame[1, 2].tolist()) for frame in pixels] == expected_pixels(dataset, whole.sample_ids)
            size = sum(map(len, (p.plan.row_source_T for p in parts)))
            labels, positions = np.full(size, IGNORE_INDEX), np.zeros(size, dtype=int)
            for part in parts:
                real = part.plan.row_source_T >= 0
                labels[part.plan.row_source_T[real]] = part.labels_T.numpy()[real]
                positions[part.plan.row_source_T[real]] = part.positions_T.numpy()[real]
            length = len(whole.labels_T)
            assert labels[:length].tolist() == whole.labels_T.tolist() and (labels[length:] == IGNORE_INDEX).all()
            assert positions[:length].tolist() == whole.positions_T.tolist()


def test_each_cp_rank_decodes_its_own_frames_only(tokenizer):
    for ulysses_size, ring_size in ((1, 1), (2, 2), (4, 2)):
        loaders = [make(tokenizer, place, epochs=1) for place in places(1, ulysses_size, ring_size)[0]]
        batches = [steps_of(loader) for loader in loaders]
        assert sum(loader.frames_decoded for loader in loaders) == sum(FRAMES) == sum(b.num_frames for step in batches[0] for b in step)
        assert all(len(b.frames) == len(b.plan.frames) for steps in batches for step in steps for b in step)


def test_every_epoch_reads_every_sample_once(tokenizer):
    loader = make(tokenizer, epochs=3, global_batch_size=4)
    steps = steps_of(loader)
    assert Counter(i for step in ids_of(steps) for i in step) == Counter({f"sample-{n}": 3 for n in range(len(SHAPES))})
    assert len(steps) == loader.num_steps and loader.position == loader.num_rows
    assert all(len(step) == 4 for step in steps)


def test_last_step_is_filled_with_padding_rows(tokenizer):
    loader = make(tokenizer, epochs=1, global_batch_size=1)
    batch_size = loader.num_rows + 2
    for dp_size in (1, batch_size):
        loaders = [make(tokenizer, place[0], epochs=1, global_batch_size=batch_size) for place in places(dp_size)]
        (rows,) = zip(*(steps_of(one)[0] for one in loaders), strict=True) if dp_size > 1 else (steps_of(loaders[0])[0],)
        empty = [row for row in rows if not row.sample_ids]
        assert len(rows) == batch_size and len(empty) == 2
        assert all((row.labels_T == IGNORE_INDEX).all() and len(row.input_ids_T) and not len(row.frames) for row in empty)


@pytest.mark.parametrize("limit", [{"epochs": 2}, {"steps": 9}])
def test_resume_at_every_row_equals_going_on(tokenizer, limit):
    whole = steps_of(make(tokenizer, global_batch_size=1, **limit), 9)
    for stop in range(len(whole)):
        first = make(tokenizer, global_batch_size=1, **limit)
        iterator = iter(first)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(first.state_dict()))
        iterator.close()
        assert state["rows_consumed"] == stop and state["newline_token_ids"] == list(tokenizer.newline_ids)
        second = make(tokenizer, global_batch_size=1, num_workers=stop % 3, **limit)
        second.load_state_dict(state)
        rest = steps_of(second, len(whole) - stop)
        assert all(same(a[0], b[0]) for a, b in zip(whole[stop:], rest, strict=True))


def test_resume_on_another_layout_goes_on_with_the_same_rows(tokenizer):
    first = make(tokenizer, epochs=2, global_batch_size=4)
    expected = ids_of(steps_of(make(tokenizer, epochs=2, global_batch_size=4)))
    steps_of(first, 1)
    state = first.state_dict()
    for mesh in ((2, 1, 1), (4, 1, 1), (2, 2, 1)):
        by_rank = []
        for replica in places(*mesh):
            loader = make(tokenizer, replica[-1], epochs=2, global_batch_size=4)
            loader.load_state_dict(state)
            by_rank.append(steps_of(loader))
        for number, ids in enumerate(expected[1:]):
            assert Counter(i for steps in by_rank for i in ids_of([steps[number]])[0]) == Counter(ids)


def test_state_belongs_to_its_data(tokenizer):
    state = make(tokenizer, epochs=1).state_dict()
    changes = {
        "packing": {"context_length": 80},
        "frames": {"num_frames": 5},
        "index": {"dataset": TinyDataset(SHAPES[:-1])},
        "seed": {"seed": 5},
    }
    for name, change in changes.items():
        other = make(tokenizer, epochs=1, **change)
        with pytest.raises(ValueError, match=f"{name}: .* in the checkpoint, .* now"):
            other.load_state_dict(state)


def test_state_belongs_to_its_pixels(tokenizer):
    loader = make(tokenizer, epochs=1)
    state = loader.state_dict()
    state["data"]["pixels"] = state["data"]["pixels"].replace("resize", "pad")
    with pytest.raises(ValueError, match="pixels: pad to .* in the checkpoint, resize to .* now"):
        loader.load_state_dict(state)


def test_lengths_are_cached_beside_the_index(tokenizer, tmp_path, monkeypatch):
    folder, run = tmp_path / "dataset", tmp_path / "run"
    folder.mkdir()
    first = ids_of(steps_of(make(tokenizer, dataset=TinyDataset(SHAPES, folder), epochs=1, loader={"cache_dir": run})))
    (cache,) = folder.iterdir()
    assert cache.name.startswith("token_lengths-") and not run.exists()
    monkeypatch.setattr("megatron_longvila.data.index.SampleIndex.measure", None)  # a second measurement would fail
    assert ids_of(steps_of(make(tokenizer, dataset=TinyDataset(SHAPES, folder), epochs=1))) == first
    monkeypatch.undo()
    cache.write_text("{")  # cut by a kill: measured again
    assert ids_of(steps_of(make(tokenizer, dataset=TinyDataset(SHAPES, folder), epochs=1))) == first
    make(tokenizer, dataset=TinyDataset(SHAPES, folder), epochs=1, num_frames=5)  # another rule, another file
    assert len(list(folder.iterdir())) == 2
    make(tokenizer, dataset=TinyDataset(SHAPES, tmp_path / "read-only"), epochs=1, loader={"cache_dir": run})
    assert len(list(run.iterdir())) == 1 and not (tmp_path / "read-only").exists()


def test_lengths_of_an_older_code_are_noticed(tokenizer, tmp_path):
    make(tokenizer, dataset=TinyDataset(SHAPES, tmp_path), epochs=1)
    (cache,) = tmp_path.iterdir()
    record = json.loads(cache.read_text())
    record["lengths"][0] += 1
    cache.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="in the cached token lengths; delete"):
        steps_of(make(tokenizer, dataset=TinyDataset(SHAPES, tmp_path), epochs=1))


def test_evaluation_is_one_pass_in_order_and_repeats(tokenizer):
    loader = make(tokenizer, global_batch_size=4, loader={"evaluation": True})
    first, second = steps_of(loader), steps_of(loader)
    assert ids_of(first) == ids_of(second) and len(first) == loader.num_steps
    flat = [i for step in ids_of(first) for i in step]
    assert sorted(flat) == sorted(f"sample-{n}" for n in range(12))
    assert flat[0] == "sample-0"
    limited = make(tokenizer, global_batch_size=4, evaluation_rows=3, loader={"evaluation": True})
    ((*rows,),) = steps_of(limited)
    assert [bool(row.sample_ids) for row in rows] == [True, True, True, False]


def test_text_alone_and_media_without_labels(tokenizer):
    dataset = TinyDataset([[], [2], []])
    dataset.samples[1] = replace(dataset.samples[1], conversations=dataset.samples[1].conversations[:1])
    (batches,) = steps_of(make(tokenizer, dataset=dataset, epochs=1, global_batch_size=3, context_length=24))
    by_id = {batch.sample_ids: batch for batch in batches}
    assert len(by_id) == 3
    for ids, batch in by_id.items():
        has_labels = (batch.labels_T != IGNORE_INDEX).any()
        assert has_labels == (ids != ("sample-1",)) and len(batch.frames) == (2 if ids == ("sample-1",) else 0)


def test_rows_wait_in_bounded_number(tokenizer):
    dataset = TinyDataset([[2]] * 40)
    loader = make(tokenizer, dataset=dataset, steps=100, context_length=24, global_batch_size=2, num_workers=3)
    iterator = iter(loader)
    next(iterator)
    iterator.close()  # waits for what is under way
    assert sum(dataset.reads.values()) <= 2 + 3  # the step handed out, and one row per thread


def test_batch_that_dp_does_not_divide(tokenizer):
    with pytest.raises(ValueError, match="global_batch_size=2 must be a multiple of dp_size=4"):
        make(tokenizer, places(4)[0][0], epochs=1)


def test_a_dataset_without_a_sample(tokenizer):
    with pytest.raises(ValueError, match=r"/nonexistent/dataset holds no sample; the report.json in it"):
        make(tokenizer, dataset=TinyDataset([]), epochs=1)


def test_ids_outside_the_embedding_table(tokenizer):
    config = tiny_config(epochs=1)
    config = replace(config, model=replace(config.model, llm=replace(config.model.llm, vocab_size=50)))
    with pytest.raises(ValueError, match="12 of 12 samples .* is outside model.llm.vocab_size=50"):
        Loader(config, Place(), [TinyDataset(SHAPES)], tokenizer)


def test_a_mended_vocabulary_size_measures_again(tokenizer, tmp_path):
    config, dataset = tiny_config(epochs=1), TinyDataset(SHAPES, path=tmp_path)
    small = replace(config, model=replace(config.model, llm=replace(config.model.llm, vocab_size=50)))
    with pytest.raises(ValueError, match="12 of 12 samples"):
        Loader(small, Place(), [dataset], tokenizer)
    assert not Loader(config, Place(), [dataset], tokenizer).unusable


def test_media_are_read_under_the_limits_they_were_accepted_under(tokenizer, tmp_path, monkeypatch):
    write_video(tmp_path / "moving.mp4", num_frames=12)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "one", "video": "moving.mp4", "conversations": talk("<video>?")}) + "\n")
    limits = MediaLimits(max_pixels=1 << 28, max_frames=4_000_000)
    preprocess(Options(tmp_path / "rows.jsonl", tmp_path, tmp_path / "out", num_workers=1, limits=limits))
    seen, real = [], loader_module.decode_frames
    monkeypatch.setattr(
        loader_module, "decode_frames", lambda *args, **settings: seen.append(settings["limits"]) or real(*args, **settings)
    )
    steps_of(make(tokenizer, dataset=open_dataset(tmp_path / "out"), epochs=1))
    assert seen == [limits]


def test_files_written_by_the_preprocessing_tool(tokenizer, tmp_path):
    """A video and a picture through shards; then the shard is damaged after it was indexed."""
    media = tmp_path / "media"
    media.mkdir()
    write_video(media / "moving.mp4", num_frames=12)
    (media / "still.png").write_bytes(png((1, 200, 3)))
    rows = [
        {"id": "both", "video": "moving.mp4", "image": "still.png", "conversations": talk("<video> or <image>?")},
        {"id": "picture", "image": "still.png", "conversations": talk("<image>")},
        {"id": "text", "conversations": talk("nothing to see")},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess(Options(tmp_path / "rows.jsonl", media, tmp_path / "out", num_workers=1))
    loader = make(tokenizer, dataset=open_dataset(tmp_path / "out"), epochs=1)
    ((batch, padding),) = steps_of(loader)
    assert batch.num_frames == loader.frames_decoded == 6 + 1 + 1 and not padding.sample_ids
    greens = [int(frame[..., 1].float().mean()) for frame in batch.frames]
    assert greens.count(200) == 2 and all(abs(green - 20) < 8 for green in greens if green != 200)

    (shard,) = (tmp_path / "out" / "shards").glob("*.tar")
    still = next(one for one in open_dataset(tmp_path / "out").media.values() if one.kind == "image")
    with open(shard, "r+b") as file:
        file.seek(still.offset)
        file.write(bytes(still.size))
    loader = make(tokenizer, dataset=open_dataset(tmp_path / "out"), epochs=1, max_bad_fraction=0.7)
    ((batch, _),) = steps_of(loader)
    assert sorted(batch.skipped) == ["both", "picture"] and not batch.frames.any()
    assert all(still.sha256[:16] in reason for reason in loader.skipped.values())


def write_video(path, num_frames: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            pixels = np.full((32, 32, 3), (10 * number, 20, 30), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def talk(question: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
