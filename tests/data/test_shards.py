"""The dataset folder: index and shards agree, others can read them, and damage is named."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset
from media import image_bytes, read_number, video_bytes, write_frames

from megatron_longvila.data.media import MediaError, frame_files, open_source
from megatron_longvila.data.preprocess import Options, preprocess
from megatron_longvila.data.shards import Samples, open_dataset
from megatron_longvila.data.tar import shard_index
from megatron_longvila.data.video import decode_frames


def turns(question: str, answer: str = "yes") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ROWS = [
    {"id": "video", "video": "a.mp4", "conversations": turns("<video>\nWhat?")},
    {"id": "pair", "images": ["one.png", "two.jpg"], "conversations": turns("<image> or <image>?")},
    {"id": "mix", "video": "a.mp4", "image": "one.png", "conversations": turns("<image> in <video>?", "\u00e9\u4e16 \U0001f600")},
    {"id": "frames", "video": "frames", "fps": 2, "conversations": turns("<video>")},
    {"id": 7, "conversations": turns("2 + 2?", "4")},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of media, rows, and the two datasets made of them."""
    root = tmp_path_factory.mktemp("dataset")
    media = root / "media"
    media.mkdir()
    (media / "a.mp4").write_bytes(video_bytes(range(20)))
    (media / "one.png").write_bytes(image_bytes(1))
    (media / "two.jpg").write_bytes(image_bytes(2, "JPEG", orientation=6))
    write_frames(media / "frames", range(30, 42))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for store in ("tar", "reference"):
        report = preprocess(Options(root / "rows.jsonl", media, root / store, store, num_workers=2, shard_bytes=4000))
        assert (report.accepted, report.rejected, report.num_media) == (5, 0, 4)
    return root


def test_samples_and_media(root):
    dataset = open_dataset(root / "tar")
    assert [sample.id for sample in dataset.samples] == ["video", "pair", "mix", "frames", "7"]
    video, one, two, frames = dataset.media
    assert [sample.media for sample in dataset.samples] == [(video,), (one, two), (one, video), (frames,), ()]
    assert dataset.samples[2].conversations[1] == {"from": "gpt", "value": "\u00e9\u4e16 \U0001f600"}
    assert [(media.kind, media.num_frames, media.duration_s) for media in dataset.media.values()] == [
        ("video", 20, 2.0), ("image", 1, 0.0), ("image", 1, 0.0), ("frames", 12, 6.0),
    ]  # fmt: skip
    assert len({media.shard for media in dataset.media.values()}) > 1
    assert [sample.id for sample in dataset.samples[-2:]] == ["frames", "7"] and dataset.samples[-1].id == "7"
    with pytest.raises(IndexError):
        dataset.samples[5]


@pytest.mark.parametrize("store", ["tar", "reference"])
def test_media_read_back(root, store):
    dataset = open_dataset(root / store)
    picked = {"video": [19, 4], "frames": [11, 2], "image": [0]}
    pictures = [decode_frames(dataset.read(media), picked[media.kind], image_size=32)[0] for media in dataset.media.values()]
    assert [[read_number(frame) for frame in frames] for frames in pictures] == [[19, 4], [1], [2], [41, 32]]


def test_hash_is_of_the_content_not_of_the_place(root):
    assert open_dataset(root / "tar").hash == open_dataset(root / "reference").hash
    moved = root / "moved"
    shutil.copytree(root / "tar", moved)
    assert open_dataset(moved).hash == open_dataset(root / "tar").hash


def test_webdataset_reads_the_shards_and_one_seek_finds_a_member(root):
    dataset = open_dataset(root / "tar")
    shards = sorted(str(path) for path in (root / "tar" / "shards").glob("*.tar"))
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(shards, shardshuffle=False)}
    assert list(samples) == list(dataset.media)
    for sha256, media in dataset.media.items():
        sample = samples[sha256]
        assert json.loads(sample["json"])["num_frames"] == media.num_frames
        files = [value for name, value in sorted(sample.items()) if not name.startswith("__") and name != "json"]
        ranges = dataset.read(media) if media.kind == "frames" else [dataset.read(media)]
        assert len(files) == len(ranges)
        for data, place in zip(files, ranges, strict=True):
            with open(place.path, "rb") as file:
                file.seek(place.offset)
                assert file.read(place.size) == data
            with open_source(place) as file:
                assert file.read() == data
    originals = [(root / "media" / name).read_bytes() for name in ("a.mp4", "one.png", "two.jpg")]
    assert [samples[sha256][kind] for sha256, kind in zip(list(samples)[:3], ("mp4", "png", "jpg"), strict=True)] == originals
    stored = [samples[list(samples)[3]][f"{number:06d}.png"] for number in range(12)]
    assert stored == [path.read_bytes() for path in frame_files(root / "media" / "frames")]


def _ids_in_child(dataset, queue) -> None:
    sample = dataset.samples[2]
    queue.put((sample.id, decode_frames(dataset.read(sample.media[1]), [3], image_size=32)[1].tolist()))


def test_forks_pickles_and_threads(root):
    dataset = open_dataset(root / "tar")
    assert dataset.samples[0].id == "video"  # the map is open before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_ids_in_child, args=(dataset, queue))
    child.start()
    assert queue.get(timeout=60) == ("mix", [0])
    child.join()
    assert [sample.id for sample in pickle.loads(pickle.dumps(dataset)).samples] == [sample.id for sample in dataset.samples]
    media = next(iter(dataset.media.values()))
    with ThreadPoolExecutor(4) as threads:
        pictures = threads.map(lambda index: decode_frames(dataset.read(media), [index], image_size=32)[0][0], range(20))
    assert [read_number(picture) for picture in pictures] == list(range(20))


def test_damaged_folders_are_refused_by_file_and_line(root, tmp_path):
    def broken(change) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(root / "tar", folder)
        change(folder)
        return folder

    def edit(name: str, old: str, new: str):
        def change(folder: Path) -> None:
            text = (folder / name).read_text()
            assert old in text
            (folder / name).write_text(text.replace(old, new, 1))

        return change

    cases = [
        (lambda folder: (folder / "dataset.json").unlink(), "has no dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "dataset.json is damaged"),
        (edit("dataset.json", '"version": 1', '"version": 99'), "version 99, this code reads version 1"),
        (lambda folder: (folder / "media.jsonl").unlink(), "media.jsonl is missing"),
        (edit("media.jsonl", '"kind":"image"', '"kind":'), r"media.jsonl:2: not a medium"),
        (edit("samples.jsonl", '"media":', '"media"'), r"samples.jsonl:1: not a sample"),
        (edit("samples.jsonl", "What?", "Who?"), "was changed after preprocessing"),
        (edit("samples.jsonl", '"media":["', '"media":["0'), r"samples.jsonl:1: sample 'video' shows 0"),
        (lambda folder: os.truncate(folder / "samples.jsonl", (folder / "samples.jsonl").stat().st_size - 9), "samples.jsonl:5: .* is cut"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            open_dataset(broken(change))
        assert "tools/preprocess_video.py" in str(caught.value) or "preprocess again" in str(caught.value)
    with pytest.raises(ValueError, match="is not a folder"):
        open_dataset(tmp_path / "nowhere")


def test_lost_media_are_an_error_of_that_medium_alone(root, tmp_path):
    shutil.copytree(root / "tar", tmp_path / "tar")
    dataset = open_dataset(tmp_path / "tar")
    first, *_, last = dataset.media.values()
    shard = tmp_path / "tar" / "shards" / last.shard
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(MediaError, match="is cut: 2000 bytes"):
        dataset.read(last)
    assert dataset.read(first).size == first.size
    shard.unlink()
    with pytest.raises(MediaError, match="cannot be read"):
        dataset.read(last)


def test_referred_media_must_stay_as_they_were(root, tmp_path):
    shutil.copytree(root / "media", tmp_path / "media")
    preprocess(Options(root / "rows.jsonl", tmp_path / "media", tmp_path / "out", "reference", num_workers=1))
    dataset = open_dataset(tmp_path / "out")
    video, one, two, frames = dataset.media.values()
    with open(tmp_path / "media" / "a.mp4", "ab") as file:
        file.write(b"x")
    (tmp_path / "media" / "frames" / "frame_3.png").unlink()
    (tmp_path / "media" / "one.png").unlink()
    (tmp_path / "media" / "one.png").symlink_to("/etc/passwd")
    for media, reason in ((video, "when it was preprocessed"), (frames, "holds 11 frames"), (one, "leads out of the media root")):
        with pytest.raises(MediaError, match=reason):
            dataset.read(media)
    assert dataset.read(two)
    shutil.rmtree(tmp_path / "media")
    with pytest.raises(MediaError, match=re.escape(f"is not in the media root (the root is {tmp_path / 'media'})")):
        dataset.read(two)


def test_an_empty_file_of_samples(tmp_path):
    (tmp_path / "samples.jsonl").touch()
    assert list(Samples(tmp_path / "samples.jsonl")) == []


def test_a_shard_cut_in_the_middle_is_written_again(root, tmp_path):
    shutil.copytree(root / "tar", tmp_path / "tar")
    media = list(open_dataset(tmp_path / "tar").media.values())[-1]
    shards = {path: path.read_bytes() for path in sorted((tmp_path / "tar" / "shards").glob("*.tar"))}
    cut = tmp_path / "tar" / "shards" / media.shard
    os.truncate(cut, media.members[-1][0] + 10)  # within the last picture: all others are still there, but the medium is refused as a whole
    with pytest.raises(MediaError, match=f"is cut: {media.members[-1][0] + 10} bytes, {sum(media.members[-1])} needed"):
        open_dataset(tmp_path / "tar").read(media.sha256)
    others = {path: path.stat().st_mtime_ns for path in shards if path != cut}
    assert preprocess(Options(root / "rows.jsonl", root / "media", tmp_path / "tar", num_workers=1, shard_bytes=4000)).changed
    assert {path: path.read_bytes() for path in shards} == shards
    assert others == {path: path.stat().st_mtime_ns for path in others}


def test_names_in_a_shard_mean_nothing(root, tmp_path):
    """Members are read by their place; a name that leads out of the folder is never a path."""
    shutil.copytree(root / "tar", tmp_path / "tar")
    for shard in (tmp_path / "tar" / "shards").glob("*.tar"):
        data = bytearray(shard.read_bytes())
        for offset, _ in shard_index(shard).values():
            data[offset - 512 : offset - 412] = b"../../../evil".ljust(100, b"\0")
        shard.write_bytes(data)
    dataset = open_dataset(tmp_path / "tar")
    for media in dataset.media.values():
        assert not decode_frames(dataset.read(media), [0], image_size=32)[1].any()
    assert not list(tmp_path.rglob("*evil*")) and not list(root.glob("**/evil*"))
