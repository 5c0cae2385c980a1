"""Each importer on small files of the schema it documents: what the rows say, and that tools/preprocess_video.py takes all of them."""

import ast
import gzip
import inspect
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from media import image_bytes, video_bytes, write_frames

from megatron_longvila.data.importers.catalogue import IMPORTERS
from megatron_longvila.data.importers.images import SHORT_QUESTIONS
from megatron_longvila.data.importers.rows import Settings
from megatron_longvila.data.importers.run import Options, Report, run_import
from megatron_longvila.data.output import PreprocessError
from megatron_longvila.data.preprocess import Options as PreprocessOptions
from megatron_longvila.data.preprocess import preprocess

IMAGES = ["a.jpg", "b c/ü.png", "00453/004539375.jpg", "GCC_1.jpg", "841814333321.webp", "00001/000010005.jpg"]
VIDEOS = [
    "clip.mp4",
    "training/113/GLd3aX16zBg.mp4",
    "113/GLd3aX16zBg_0.mp4",
    "xyz.mp4",
    "xyz_0_80.mp4",
    "v_1QIUV7WYKXg.mp4",
    "deep/zeS.mp4",
]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("media")
    for number, name in enumerate(IMAGES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes(number, "WEBP" if name.endswith("webp") else "JPEG"))
    video = video_bytes(range(4))
    for name in VIDEOS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(video)
    write_frames(root / "train_300k" / "v_abc", range(3))
    return root


def write(path: Path, records, kind: str = "json") -> Path:
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records, indent=1))
    return path


def imported(tmp_path, media, name, *inputs, **settings) -> tuple[Report, list[dict], list[dict]]:
    output = tmp_path / f"{name}.jsonl"
    report = run_import(Options(name, inputs, output, media, Settings(**settings)))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    rejected = [json.loads(line) for line in Path(f"{output}.rejected.jsonl").read_text().splitlines()]
    assert (report.rows, sum(report.rejected.values())) == (len(rows), len(rejected))
    return report, rows, rejected


def turns(human: str, gpt: str) -> list[dict]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def accepted(tmp_path, media, name) -> None:
    """The next tool takes every row."""
    rows = tmp_path / f"{name}.jsonl"
    report = preprocess(PreprocessOptions(input=rows, media_root=media, output=tmp_path / f"{name}-dataset", num_workers=1))
    assert report.rejected == 0 and report.accepted == len(rows.read_text().splitlines()), report.rows


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_llava(tmp_path, media, kind):
    source = write(
        tmp_path / "in.json",
        [
            {"id": "1", "image": "a.jpg", "conversations": turns("What is it?\n<image>", "A square.") + turns("Sure?", "Yes.")},
            {"id": 2, "images": ["a.jpg", "b c/ü.png"], "conversations": turns("<image> or <vila/image>?", "Both.")},
            {"id": "3", "video": "clip.mp4", "conversations": turns("<image>\nWhat moves?", "Cells.")},
            {"id": "4", "video": "clip", "conversations": turns("What moves?", "Cells.")},
            {"id": "5", "conversations": turns("Hello", "Hi")},
            {"image": "a.jpg", "video": "clip.mp4", "conversations": turns("Compare.", "No. <image> is a word here.")},
            {"id": "7", "video": "train_300k/v_abc", "conversations": turns("<vila/video> What?", "Frames.")},
            {"id": "8", "image": "a.jpg", "conversations": turns("<image><image>", "x")},
            {"id": "9", "image": "a.jpg", "conversations": [{"from": "gpt", "value": "x"}]},
            {"id": "10", "image": ["a.jpg", 3], "conversations": turns("x", "y")},
            {"id": "11", "image": "a.jpg"},
            ["no object"],
        ],
        kind,
    )
    report, rows, rejected = imported(tmp_path, media, "llava", source, fps=2.0)
    sign = "#" if kind == "json" else ":"
    assert rows == [
        {"id": "1", "image": "a.jpg", "conversations": turns("<image>\nWhat is it?", "A square.") + turns("Sure?", "Yes.")},
        {"id": "2", "images": ["a.jpg", "b c/ü.png"], "conversations": turns("<image> or <image>?", "Both.")},
        {"id": "3", "video": "clip.mp4", "conversations": turns("<video>\nWhat moves?", "Cells.")},
        {"id": "4", "video": "clip.mp4", "conversations": turns("<video>\nWhat moves?", "Cells.")},
        {"id": "5", "conversations": turns("Hello", "Hi")},
        {
            "id": f"in.json{sign}6",
            "video": "clip.mp4",
            "image": "a.jpg",
            "conversations": turns("<video>\n<image>\nCompare.", "No. <image> is a word here."),
        },
        {"id": "7", "video": "train_300k/v_abc", "fps": 2.0, "conversations": turns("<video>\nWhat?", "Frames.")},
    ]
    assert [(one["key"], one["id"]) for one in rejected] == [
        (f"in.json{sign}{number}", name) for number, name in ((8, "8"), (9, "9"), (10, "10"), (11, "11"), (12, None))
    ]
    words = ["2 <image> marks", "must alternate", "must be a path or a list", "has no `conversations`", "must be an object, not list"]
    assert all(word in one["reason"] for word, one in zip(words, rejected, strict=True))
    assert report.rejected == {"unusable": 5}
    accepted(tmp_path, media, "llava")


def test_captions(tmp_path, media):
    chat = {"id": "004539375", "image": "00453/004539375.jpg", "conversations": turns("Render a summary.\n<image>", "a cat")}
    plain = {"id": "GCC_1", "image": "GCC_1.jpg", "caption": "a dog", "blip_caption": "a small dog", "url": "http://never.opened/x.jpg"}
    source = write(tmp_path / "in.json", [chat, plain, {"id": "x", "image": "a.jpg", "caption": " "}, {"image": "b c/ü", "caption": "u"}])
    _, rows, rejected = imported(tmp_path, media, "captions", source)
    assert rows[0]["conversations"] == turns("<image>\nRender a summary.", "a cat")
    assert rows[1]["image"] == "GCC_1.jpg" and rows[1]["conversations"][1]["value"] == "a dog"
    assert rows[1]["conversations"][0]["value"].removeprefix("<image>\n") in SHORT_QUESTIONS
    assert rows[2]["id"] == "b c/ü" and rows[2]["image"] == "b c/ü.png"
    assert [one["reason"] for one in rejected] == ["its `caption` is empty"]
    accepted(tmp_path, media, "captions")
    (tmp_path / "two").mkdir()
    _, rows, rejected = imported(tmp_path / "two", media, "captions", source, caption="blip_caption")
    assert rows[1]["conversations"][1]["value"] == "a small dog" and len(rejected) == 2


def test_coyo(tmp_path, media):
    scores = {"width": 1000, "height": 988, "image_phash": "c9b6a7d8469c1959", "clip_similarity_vitb32": 0.43, "num_faces": 0}
    published = [
        {"id": 841814333321, "url": "https://never.opened/a.jpg", "text": "A Pomsky dog", **scores},
        {"id": 841814333322, "url": "https://never.opened/b.jpg", "text": "not downloaded", **scores},
    ]
    downloaded = [
        {"key": "000010005", "status": "success", "caption": "A boat", "url": "x", "long_caption": "A long boat"},
        {"key": "000010006", "status": "failed_to_download", "caption": "Gone", "url": "x", "long_caption": None},
    ]
    first, second = write(tmp_path / "1.parquet", published, "parquet"), write(tmp_path / "2.parquet", downloaded, "parquet")
    report, rows, rejected = imported(tmp_path, media, "coyo", first, second)
    assert [(row["id"], row["image"], row["conversations"][1]["value"]) for row in rows] == [
        ("coyo-841814333321", "841814333321.webp", "A Pomsky dog"),
        ("coyo-000010005", "00001/000010005.jpg", "A boat"),
    ]
    assert [(one["key"], one["kind"]) for one in rejected] == [("1.parquet#2", "missing media"), ("2.parquet#2", "unusable")]
    assert "status is 'failed_to_download'" in rejected[1]["reason"] and report.records == 4
    accepted(tmp_path, media, "coyo")
    _, rows, _ = imported(tmp_path, media, "coyo", second, caption="long_caption")
    assert rows[0]["conversations"][1]["value"] == "A long boat"


def test_youcook2(tmp_path, media):
    steps = [
        {"id": 1, "segment": [114, 127.5], "sentence": "place cheese on the bread"},
        {"id": 0, "segment": [90, 102], "sentence": "spread margarine"},
    ]
    known = {"subset": "training", "recipe_type": "113", "duration": 241.62, "video_url": "https://never.opened/x", "annotations": steps}
    bad = {**known, "annotations": [{"id": 0, "segment": [5, 2], "sentence": "x"}]}
    plain = {"subset": "training", "annotations": steps}
    database = {"GLd3aX16zBg": known, "gone": plain, "bad": bad, "later": {**known, "subset": "validation"}, "clip": plain}
    source = write(tmp_path / "youcookii_annotations_trainval.json", {"database": database})
    report, rows, rejected = imported(tmp_path, media, "youcook2", source)
    answer = "90 s to 102 s: spread margarine\n114 s to 127.5 s: place cheese on the bread"
    assert [(row["id"], row["video"], row["conversations"][1]["value"]) for row in rows] == [
        ("youcook2-GLd3aX16zBg", "training/113/GLd3aX16zBg.mp4", answer),
        ("youcook2-clip", "clip.mp4", answer),  # found without a recipe_type, and "gone" without one is just missing
    ]
    assert [one["kind"] for one in rejected] == ["missing media", "unusable"] and "from 5 s to 2 s" in rejected[1]["reason"]
    assert report.unwanted == 1
    accepted(tmp_path, media, "youcook2")
    _, rows, rejected = imported(tmp_path, media, "youcook2", source, clips=True)
    assert [(row["id"], row["video"]) for row in rows] == [("youcook2-GLd3aX16zBg-0", "113/GLd3aX16zBg_0.mp4")]
    assert [one["kind"] for one in rejected] == ["missing media"] * 3 + ["unusable"] + ["missing media"] * 2
    with pytest.raises(PreprocessError, match="--split test is none of the sets .* training, validation"):
        imported(tmp_path, media, "youcook2", source, split="test")
    assert imported(tmp_path, media, "youcook2", source, split="all")[0].unwanted == 0
    with pytest.raises(PreprocessError, match="has no `database`"):
        imported(tmp_path, media, "youcook2", write(tmp_path / "other.json", {}))


def test_sharegptvideo(tmp_path, media):
    records = [
        {"id": "v_abc__0", "video": "v_abc", "conversations": turns("Write down everything.\n<video>", "A grid.")},
        {"video": "clip", "conversations": turns("<video>\nWhat?", "Cells.")},
        {"id": "x", "video": "v_gone", "conversations": turns("<video>\nWhat?", "Cells.")},
    ]
    source = write(tmp_path / "video_caption_pretrain.jsonl", records, "jsonl")
    _, rows, rejected = imported(tmp_path, media, "sharegptvideo", source, fps=1.0)
    assert rows == [
        {"id": "v_abc__0", "video": "train_300k/v_abc", "fps": 1.0, "conversations": turns("<video>\nWrite down everything.", "A grid.")},
        {"id": "clip", "video": "clip.mp4", "conversations": turns("<video>\nWhat?", "Cells.")},
    ]
    assert [one["kind"] for one in rejected] == ["missing media"]
    accepted(tmp_path, media, "sharegptvideo")
    _, rows, rejected = imported(tmp_path, media, "sharegptvideo", source)
    assert len(rows) == 1 and "with --fps" in rejected[0]["reason"]


def test_shot2story(tmp_path, media):
    record = {
        "id": 0, "video": "xyz.mp4", "image_id": "xyz.mp4", "nvid": "xyz.mp4", "whole_caption": "A story.", "whole_ASR": "heard",
        "video_names": ["xyz_0_80.mp4", "xyz_80_90.mp4"], "captions": ["A start.", "An end."], "audio_captions": ["He speaks.", ""],
        "ASR": ["a", "b"],
    }  # fmt: skip
    source = write(tmp_path / "20k_train.json", [record, {**record, "id": 1, "whole_caption": ""}, {**record, "id": 2, "captions": []}])
    _, rows, rejected = imported(tmp_path, media, "shot2story", source)
    assert [(row["id"], row["video"], row["conversations"][1]["value"]) for row in rows] == [
        ("shot2story-0", "xyz.mp4", "A story."),
        ("shot2story-2", "xyz.mp4", "A story."),
    ]
    assert [one["reason"] for one in rejected] == ["its `whole_caption` is empty"]
    accepted(tmp_path, media, "shot2story")
    _, rows, rejected = imported(tmp_path, media, "shot2story", source, clips=True)
    assert [(row["id"], row["conversations"][1]["value"]) for row in rows] == [
        ("shot2story-0-0", "A start. He speaks."),
        ("shot2story-1-0", "A start. He speaks."),
    ]
    assert [one["kind"] for one in rejected] == ["missing media", "missing media", "unusable"]


def test_activitynet_qa(tmp_path, media):
    questions = [
        {"video_name": "1QIUV7WYKXg", "question": "is the athlete wearing trousers", "question_id": "1QIUV7WYKXg_1"},
        {"video_name": "1QIUV7WYKXg", "question": "who won", "question_id": "1QIUV7WYKXg_2"},
        {"video_name": "1QIUV7WYKXg", "question": "who won", "question_id": ["1QIUV7WYKXg_2"]},
        {"video_name": "1QIUV7WYKXg", "question": "when", "question_id": 7},
    ]
    source = write(tmp_path / "train_q.json", questions)
    given = [{"answer": "yes", "type": 3, "question_id": "1QIUV7WYKXg_1"}, {"answer": "no", "question_id": {"a": 1}}]
    answers = write(tmp_path / "train_a.json", [*given, {"answer": "now", "question_id": "7"}])
    _, rows, rejected = imported(tmp_path, media, "activitynet_qa", source, answers=answers)
    asked = turns("<video>\nIs the athlete wearing trousers", "yes")
    assert rows[0] == {"id": "1QIUV7WYKXg_1", "video": "v_1QIUV7WYKXg.mp4", "conversations": asked}
    assert [row["id"] for row in rows[1:]] == ["7"]
    missing = "has no `question_id` that is a text or a whole number"
    assert [one["reason"] for one in rejected] == ["train_a.json has no answer to it", missing]
    accepted(tmp_path, media, "activitynet_qa")
    together = write(tmp_path / "all.json", [{"video_id": "v_1QIUV7WYKXg", "q": "Who?", "a": "She."}, {"video_id": "v_1QIUV7WYKXg"}])
    report, rows, rejected = imported(tmp_path, media, "activitynet_qa", together)
    assert rows[0]["conversations"] == turns("<video>\nWho?", "She.") and rejected[0]["reason"].startswith("has no `q`")


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_longvila(tmp_path, media, kind):
    records = [
        {"id": "zeS", "video": "zeS.mp4", "conversations": turns("What is shown? \n<video>", "A film.")},
        {"id": "zeS", "video": "zeS.mp4", "conversations": turns("Who acts? \n<video>", "Nobody.")},
        {"id": "zeS", "video": "zeS.mp4", "conversations": turns("Who acts? \n<video>", "Nobody.")},
        {"id": "gone", "video": "gone.mp4", "conversations": turns("<video>", "x")},
    ]
    source = write(tmp_path / f"train.{kind}", records, kind)
    assert imported(tmp_path, media, "longvila", source)[0].rejected == {"missing media": 4}
    report, rows, rejected = imported(tmp_path, media, "longvila", source, search=True)
    assert rows == [
        {"id": "zeS", "video": "deep/zeS.mp4", "conversations": turns("<video>\nWhat is shown?", "A film.")},
        {"id": "zeS-2", "video": "deep/zeS.mp4", "conversations": turns("<video>\nWho acts?", "Nobody."), "origin": "zeS"},
    ]
    assert report.renamed == 1 and report.rejected == {"duplicate": 1, "missing media": 1}
    accepted(tmp_path, media, "longvila")


def test_slimpajama(tmp_path):
    lines = [
        json.dumps({"text": "one text", "meta": {"redpajama_set_name": "RedPajamaArXiv"}}),
        json.dumps({"text": "two", "meta": {"redpajama_set_name": "RedPajamaC4"}}),
        json.dumps({"text": " ", "meta": {}}),
        "{broken",
    ]
    chunk = tmp_path / "train" / "chunk1"
    chunk.mkdir(parents=True)
    (chunk / "example_0.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    (chunk / "example_1.jsonl.gz").write_bytes(gzip.compress(lines[0].encode()))
    report, rows, rejected = imported(tmp_path, None, "slimpajama", tmp_path / "train")
    assert [json.dumps(row) for row in rows] == [lines[0], lines[1], lines[0]]
    assert [one["key"] for one in rejected] == ["train/chunk1/example_0.jsonl.zst:3", "train/chunk1/example_0.jsonl.zst:4"]
    assert "empty text" in rejected[0]["reason"] and "not JSON" in rejected[1]["reason"]
    report, rows, _ = imported(tmp_path, None, "slimpajama", tmp_path / "train", sources=("RedPajamaC4",))
    assert [row["text"] for row in rows] == ["two"] and report.unwanted == 2
    (tmp_path / "disk2").mkdir()
    (tmp_path / "train" / "chunk2").symlink_to("../disk2")
    for number, count in ((1, 4), (2, 5)):  # what comes into a linked folder is seen like any other file
        (tmp_path / "disk2" / f"{number}.jsonl").write_text(lines[1])
        assert imported(tmp_path, None, "slimpajama", tmp_path / "train")[0].rows == count


def fields_read(function) -> set[str]:
    """Names of the record's fields in a function's source: arguments of record.get and of helpers whose first argument is the record."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        if isinstance(node, ast.Call):
            owner = node.func.value if isinstance(node.func, ast.Attribute) else next(iter(node.args), None)
            if isinstance(owner, ast.Name) and owner.id == "record":
                literals = [one for argument in node.args for one in ast.walk(argument) if isinstance(one, ast.Constant)]
                found |= {one.value for one in literals if isinstance(one.value, str)}
    return found


def test_every_importer_is_tested_and_documents_what_it_reads():
    tested = {name.removeprefix("test_") for name in globals()}
    assert set(IMPORTERS) <= tested
    assert {"conversations", "video"} <= fields_read(IMPORTERS["llava"].convert)
    for name, importer in IMPORTERS.items():
        documented = set(re.findall(r"\w+", importer.convert.__doc__))
        assert fields_read(importer.convert) - documented == set(), name
