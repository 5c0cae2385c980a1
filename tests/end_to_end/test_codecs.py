"""Videos as cameras and sites make them, from file to loss: every codec, rotation and frame rate, each frame decoded by one rank only."""

import json
import math
from pathlib import Path

import pytest
from media import read_number, video_bytes
from programs import ROOT, preprocess, read_lines, train
from tiny_tokenizers import write_sentencepiece

from ranks import run_ranks

pytestmark = pytest.mark.end_to_end
FRAMES = 8  # data.video.num_frames
STAMPS_MS = [0, 40, 80, 400, 420, 440, 460, 2000, 2033, 2066] + [2100 + 50 * index for index in range(20)]
VIDEOS = {  # name -> (how it is made, codec and rotation the index must say)
    "h264-sound": ({"sound": True}, "h264", 0),
    "hevc": ({"encoder": "libx265"}, "hevc", 0),
    "av1": ({"encoder": "libsvtav1"}, "av1", 0),
    "rotated": ({"rotation": 90, "size": (48, 96)}, "h264", 90),
    "variable-rate": ({"stamps_ms": STAMPS_MS}, "h264", 0),
    "hevc-mkv-sound": ({"encoder": "libx265", "container": "matroska", "sound": True}, "hevc", 0),
}


def numbers_of(name: str) -> range:
    """What the frames of a video show: no two frames of the test show the same."""
    first = 100 * (1 + list(VIDEOS).index(name))
    return range(first, first + 30)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The videos, preprocessed, and a tokenizer."""
    folder = tmp_path_factory.mktemp("codecs")
    (folder / "media").mkdir()
    rows = []
    for name, (settings, _, _) in VIDEOS.items():
        (folder / "media" / f"{name}.bin").write_bytes(video_bytes(numbers_of(name), **settings))  # a name says nothing about a file
        turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "A green triangle goes up."}]
        rows.append({"id": name, "video": f"{name}.bin", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = preprocess(folder / "rows.jsonl", folder / "media", folder / "dataset")
    assert code == 0, text
    write_sentencepiece(folder / "tokenizer.model")
    return folder


def test_the_index_says_what_the_files_are(data: Path) -> None:
    assert json.loads((data / "dataset" / "report.json").read_text())["rejected"] == 0
    samples, media = read_lines(data / "dataset" / "samples.jsonl"), read_lines(data / "dataset" / "media.jsonl")
    for sample, medium in zip(samples, media, strict=True):
        settings, codec, rotation = VIDEOS[sample["id"]]
        assert sample["media"] == [medium["sha256"]]
        assert (medium["codec"], medium["rotation"], medium["num_frames"]) == (codec, rotation, 30)
        assert (medium["width"], medium["height"]) == settings.get("size", (64, 64))
        assert medium["duration_s"] == pytest.approx(3.1 if "stamps_ms" in settings else 3.0, abs=0.06)


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_an_epoch_over_all_of_them(data: Path, tmp_path: Path, axis: str) -> None:
    code, text = train(tmp_path, [data / "dataset"], data / "tokenizer.model", f"--parallel.{axis}_size", 2)
    assert code == 0 and "Warning" not in text, text
    steps = read_lines(tmp_path / "metrics.jsonl")
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert sorted(name for step in steps for row in step["sample_ids"] for name in row) == sorted(VIDEOS)
    assert steps[-1]["skipped_samples"] == 0 and not (tmp_path / "data_report.jsonl").exists()


def _ranks_read(rank: int, sizes: tuple[int, int, int, int], flags: list[str]) -> tuple[int, list]:
    """How many frames this rank decoded in an epoch, and per row its first frame, what its frames show and the row's samples."""
    from megatron_longvila.config_io import parse
    from megatron_longvila.data.loader import Loader, Place
    from megatron_longvila.data.shards import open_dataset
    from megatron_longvila.data.text import load_tokenizer
    from megatron_longvila.mesh import Mesh
    from megatron_longvila.parallel.groups import destroy_groups, initialize_groups

    config = parse(flags)
    groups = initialize_groups(Mesh(2, *sizes), timeout_s=60)
    datasets, place = [open_dataset(path) for path in config.data.train], Place.of(groups, sequence_parallel=False)
    loader = Loader(config, place, datasets, load_tokenizer(config.data.tokenizer))
    rows = []
    for number, step in enumerate(loader):
        for at, one in enumerate(step):
            row = number * config.data.global_batch_size + at * place.dp_size + place.dp_rank
            rows.append((row, one.plan.frames.start, [read_number(frame.numpy()) for frame in one.frames], one.sample_ids))
    destroy_groups()
    return loader.frames_decoded, rows


@pytest.mark.parametrize("sizes", [(1, 1, 2, 1), (1, 1, 1, 2), (1, 1, 1, 1)], ids=["ulysses", "ring", "dp"])
def test_every_frame_is_decoded_once_and_is_the_right_one(data: Path, sizes: tuple[int, int, int, int]) -> None:
    flags = ["--config", str(ROOT / "examples" / "models" / "tiny.yaml"), "--data.train", json.dumps([str(data / "dataset")])]
    flags += ["--data.tokenizer", str(data / "tokenizer.model"), "--data.template", "plain", "--model.llm.vocab_size", "448"]
    flags += ["--data.context_length", "128", "--data.global_batch_size", "2"]
    seen = run_ranks(_ranks_read, 2, sizes, flags, timeout_s=120)
    assert sum(decoded for decoded, _ in seen) == FRAMES * len(VIDEOS)
    cp_size = sizes[2] * sizes[3]
    assert all(decoded == FRAMES * len(VIDEOS) // 2 for decoded, _ in seen) or cp_size == 1
    rows: dict[int, list] = {}
    for _, of_rank in seen:
        for row, start, shown, names in of_rank:
            rows.setdefault(row, []).append((start, shown, names))
    for shares in rows.values():
        shown = [number for _, numbers, _ in sorted(shares, key=lambda share: share[0]) for number in numbers]
        # uniform: linspace(0, 29, 8), rounded
        assert shown == [numbers_of(name)[index] for name in shares[0][2] for index in (0, 4, 8, 12, 17, 21, 25, 29)]
    assert sorted(name for shares in rows.values() for name in shares[0][2]) == sorted(VIDEOS)
