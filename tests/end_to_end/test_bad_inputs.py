"""A folder as it comes from the internet: what is broken is refused or skipped with key and reason, the rest trains, nothing hangs."""

import json
import math
import os
import struct
import zlib
from pathlib import Path

import pytest
from media import audio_bytes, image_bytes, video_bytes
from programs import preprocess, read_lines, train
from tiny_tokenizers import write_sentencepiece

pytestmark = pytest.mark.end_to_end

GOOD = [f"good-{number}" for number in range(6)] + ["good-picture", "good-text"]
UNUSABLE = ["too-long", "too-many-frames"]  # fine files, known at the start of training
DAMAGED = {  # fine when preprocessed -> what training says about them
    "overwritten": "is not a known video or image format",
    "shortened": "when it was preprocessed",
    "removed": "is not in the media root",
    "damaged-inside": "frames asked for decodes",
}
REFUSED = {  # id -> the reason in report.json; a row without an id is found by its line
    "empty": "'empty.mp4' is empty (0 bytes)",
    "page": "'page.mp4' is not a known video or image format (it is an HTML page, perhaps a failed download)",
    "sound": "'sound.mp4' has no video track (it holds audio)",
    "cut": "'cut.mp4' is cut: its last",
    "cut-index-first": "'cut-index-first.mp4' is cut: its last",
    "playlist": "'playlist.mp4' is not a known video or image format (it is a playlist, which may point anywhere)",
    "no-image": "'nothing.png' is not in the media root",
    "bomb": "'bomb.png' has more pixels than a picture may have (decompression bomb)",
    "pipe": "'pipe.mp4' is not a plain file",
    "folder": "'folder' is a folder without frames",
    "dots": "'../outside.mp4' leads out of the media root",
    "absolute": "outside.mp4' leads out of the media root",
    "link": "'link.mp4' leads out of the media root",
    "two-marks": "2 <video> marks in the human turns, but 1 files in `video`",
    "no-mark": "0 <video> marks in the human turns, but 1 files in `video`",
    "wrong-mark": "'picture.png' is an image, but its mark is <video>",
    "no-answer": "turns must alternate human, gpt",
    "good-0": "its id 'good-0' was used before, in rows.jsonl:1",
}
BAD_LINES = {
    b'{"id": "half a row", "conv\n': "not JSON: ",
    b'{"id": "\xff\xfe"}\n': "not UTF-8 text: ",
    b"[1, 2]\n": "a row must be a JSON object",
}


def row(name: str, question: str = "<video>\nHow many?", **media: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "There are two circles."}]
    return {"id": name, "conversations": turns} | media


def write_media(folder: Path) -> list[dict]:
    """Good and bad files below folder/media, one outside of it; returns their rows, the good ones first."""
    media = folder / "media"
    (media / "folder").mkdir(parents=True)
    whole = video_bytes(range(700, 740))
    bad = {
        "empty": b"",
        "page": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
        "sound": audio_bytes(),
        "cut": whole[: len(whole) // 2],
        "cut-index-first": video_bytes(range(20), muxer_options={"movflags": "faststart"})[:-200],
        "playlist": b"ffconcat version 1.0\nfile good-0.mp4\n",
    }
    for number, name in enumerate([*GOOD[:6], *DAMAGED, *UNUSABLE]):
        (media / f"{name}.mp4").write_bytes(video_bytes(range(50 * number, 50 * number + 20)))
    for name, data in bad.items():
        (media / f"{name}.mp4").write_bytes(data)
    (media / "picture.png").write_bytes(image_bytes(5))
    (media / "bomb.png").write_bytes(png_header(60000, 60000))
    (folder / "outside.mp4").write_bytes(whole)
    (media / "link.mp4").symlink_to(folder / "outside.mp4")
    os.mkfifo(media / "pipe.mp4")
    return [
        *(row(name, video=f"{name}.mp4") for name in GOOD[:6]),
        row("good-picture", "<image>\nWhich shape?", image="picture.png"),
        row("good-text", "What is red?"),
        *(row(name, video=f"{name}.mp4") for name in DAMAGED),
        row("too-long", "<video>\n" + "How many circles are there? " * 100, video="too-long.mp4"),
        row("too-many-frames", "<video> <video> <video> <video>\nWhich?", video=["too-many-frames.mp4"] * 4),
        *(row(name, video=f"{name}.mp4") for name in (*bad, "pipe", "link")),
        row("no-image", "<image>\nWhat?", image="nothing.png"),
        row("bomb", "<image>\nWhat?", image="bomb.png"),
        row("folder", video="folder", fps=2),
        row("dots", video="../outside.mp4"),
        row("absolute", video=str(folder / "outside.mp4")),
        row("two-marks", "<video> <video>\nWhat?", video="good-1.mp4"),
        row("no-mark", "What?", video="good-1.mp4"),
        row("wrong-mark", video="picture.png"),
        {"id": "no-answer", "video": "good-1.mp4", "conversations": [{"from": "human", "value": "<video>"}]},
        row("good-0", video="good-2.mp4"),
    ]


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces more pixels than anybody should unpack."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(64))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)


def damage(media: Path) -> None:
    """What happens to files between preprocessing and training; sizes stay where a size check would already tell."""
    size = (media / "overwritten.mp4").stat().st_size
    (media / "overwritten.mp4").write_bytes(b"<html>moved</html>".ljust(size))
    (media / "shortened.mp4").write_bytes((media / "shortened.mp4").read_bytes()[:-100])
    (media / "removed.mp4").unlink()
    data = bytearray((media / "damaged-inside.mp4").read_bytes())
    start, stop = data.index(b"mdat") + 4, data.index(b"moov") - 4  # the pictures; the index stays whole
    data[start:stop] = b"\xa5" * (stop - start)
    (media / "damaged-inside.mp4").write_bytes(data)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder after preprocessing with --store reference, with what the tool said in said.txt, and then damaged."""
    folder = tmp_path_factory.mktemp("bad")
    lines = [json.dumps(one).encode() + b"\n" for one in write_media(folder)]
    (folder / "rows.jsonl").write_bytes(b"".join(lines + list(BAD_LINES)))
    write_sentencepiece(folder / "tokenizer.model")
    code, text = preprocess(folder / "rows.jsonl", folder / "media", folder / "dataset", "--store", "reference", "--timeout_s", 30)
    assert code == 0, text
    (folder / "said.txt").write_text(text)
    damage(folder / "media")
    return folder


def test_every_bad_row_is_refused_with_its_reason(data: Path) -> None:
    report = json.loads((data / "dataset" / "report.json").read_text())
    accepted = [*GOOD, *DAMAGED, *UNUSABLE]
    assert [sample["id"] for sample in read_lines(data / "dataset" / "samples.jsonl")] == accepted
    assert (report["accepted"], report["rejected"]) == (len(accepted), len(REFUSED) + len(BAD_LINES))
    lines = (data / "rows.jsonl").read_bytes().splitlines(keepends=True)
    for refused in report["rows"]:
        name, _, number = refused["key"].partition(":")
        line = lines[int(number) - 1]
        reason = BAD_LINES[line] if line in BAD_LINES else REFUSED[refused["id"]]
        assert name == "rows.jsonl" and reason in refused["reason"]
    assert sorted(one["id"] for one in report["rows"] if one["id"]) == sorted(REFUSED)
    said = (data / "said.txt").read_text()
    assert f"{len(accepted)} rows accepted, {len(REFUSED) + len(BAD_LINES)} rejected" in said and "Traceback" not in said


@pytest.mark.parametrize("flags", [["--parallel.ulysses_size", 2], ["--parallel.tp_size", 2], []], ids=["ulysses", "tp", "dp"])
def test_the_rest_trains(data: Path, tmp_path: Path, flags: list) -> None:
    code, text = train(tmp_path, [data / "dataset"], data / "tokenizer.model", "--data.max_bad_fraction", 0.5, *flags)
    assert code == 0 and "Traceback" not in text and "Warning" not in text, text
    steps = read_lines(tmp_path / "metrics.jsonl")
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert steps[-1]["skipped_samples"] == len(DAMAGED) + len(UNUSABLE)

    skipped = {record["id"]: record for record in read_lines(tmp_path / "data_report.jsonl")}
    assert sorted(skipped) == sorted([*DAMAGED, *UNUSABLE])
    samples = read_lines(data / "dataset" / "samples.jsonl")
    for name, record in skipped.items():
        assert set(record) == {"key", "id", "dataset", "reason"} and record["dataset"] == str(data / "dataset")
        assert record["key"] == f"samples.jsonl:{1 + [sample['id'] for sample in samples].index(name)}"
        assert DAMAGED.get(name, "more than data.context_length=128") in record["reason"]
    # A sample that fails while it is read keeps its place in the row, without labels; one that fits no row is in none.
    seen = sorted(name for step in steps for names in step["sample_ids"] for name in names)
    assert seen == sorted([*GOOD, *DAMAGED])


@pytest.mark.parametrize("limit, count", [(0.1, len(UNUSABLE)), (0.2, None)], ids=["at the start", "while reading"])
def test_past_the_limit_the_run_fails_with_the_numbers(data: Path, tmp_path: Path, limit: float, count: int | None) -> None:
    code, text = train(tmp_path, [data / "dataset"], data / "tokenizer.model", "--data.max_bad_fraction", limit)
    total = len(GOOD) + len(DAMAGED) + len(UNUSABLE)
    possible = [count] if count else range(len(UNUSABLE) + 1, total)
    messages = [
        f"{bad} of {total} samples had to be skipped, a share of {bad / total:.4f}, more than data.max_bad_fraction={limit}: "
        for bad in possible
        if bad / total > limit
    ]
    assert code != 0 and any(message in text for message in messages), text
    assert "repair the data, or raise the fraction" in text
    assert len(read_lines(tmp_path / "data_report.jsonl")) >= len(UNUSABLE)


def test_no_frames_are_refused_before_anything_starts(data: Path, tmp_path: Path) -> None:
    code, text = train(tmp_path / "run", [data / "dataset"], data / "tokenizer.model", "--data.video.num_frames", 0)
    assert code != 0 and text.count("error: data.video.num_frames=0 must be positive; the default is 8") == 1, text
    assert "Traceback" not in text.split("error: ")[0] and not (tmp_path / "run").exists()  # torchrun adds its own after it


def test_nothing_but_bad_rows(data: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("empty", video="empty.mp4")) + "\n")
    code, text = preprocess(tmp_path / "rows.jsonl", data / "media", tmp_path / "dataset")
    assert code == 1 and "error: no row was accepted" in text and "'empty.mp4' is empty (0 bytes)" in text
    assert json.loads((tmp_path / "dataset" / "report.json").read_text())["rejected"] == 1
    code, text = train(tmp_path / "run", [tmp_path / "dataset"], data / "tokenizer.model")
    assert code != 0 and "holds no sample" in text, text
