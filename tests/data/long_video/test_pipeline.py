"""The whole chain against the scripted server: every accepted record is true, and killing any stage at any point changes nothing."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from film_truth import check_caption, check_question, check_summary
from films import Scene, make_film, make_picture, plan_scenes, shown_between
from long_video_chain import STAGES, TOOL, build, words
from PIL import Image
from programs import ROOT, environment, preprocess, read_lines
from scripted_server import ScriptedServer

from megatron_longvila.data.long_video.filters import RULES
from megatron_longvila.data.long_video.prompts import QUESTION_TYPES
from megatron_longvila.data.rows import parse_row

KEY = "sk-0123456789abcdef"
HOSTILE = [
    "a b/c d.mp4", "\u00fcber \u732b.mp4", "new\nline.mp4", "x..mp4", "-rf.mp4", "'; rm -rf \".mp4", "<video>.mp4", "{{captions}}.mp4",
]  # fmt: skip
ASKING = ("caption", "summarize", "qa", "images")
ALL = (*STAGES, "images")  # caption --images, which shares nothing with the others but the folder
FILES = [f"{stage}{end}.jsonl" for stage in ALL if stage != "stats" for end in ("", ".rejects")]


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> tuple[Path, dict[str, list[Scene]]]:
    """A folder of eight films with hostile names and things that are no films, and the script of each film. Beside it, pictures of them."""
    root = tmp_path_factory.mktemp("films") / "root"
    scripts = {name: plan_scenes(seed, 40 + 7 * seed) for seed, name in enumerate(HOSTILE)}
    for number, (name, scenes) in enumerate(scripts.items()):
        make_film(root / name, scenes, number=number)
        for place, scene in enumerate(scenes[:2]):
            make_picture(root.parent / "images" / f"{number}.{place}.png", scene, number=number)
    (root / "copy.mp4").write_bytes((root / "-rf.mp4").read_bytes())
    (root / "notes.txt").write_text("no film")
    (root / "cut.mp4").write_bytes((root / "-rf.mp4").read_bytes()[:2000])
    outside = make_film(root.parent / "outside.mp4", [Scene("red", 10)])
    (root / "link_out.mp4").symlink_to(outside)
    (root / "link_in.mp4").symlink_to(root / "-rf.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    os.mkfifo(root / "pipe.mp4")
    (root / "linked").symlink_to(root / "a b")
    return root, scripts


@pytest.fixture(scope="module")
def built(films, tmp_path_factory) -> tuple[Path, dict]:
    work = tmp_path_factory.mktemp("built") / "work"
    with ScriptedServer() as server:
        build(work, films[0], server.url, ALL)
        counts = {"requests": len(server.requests), "different": len(set(server.requests))}
        build(work, films[0], server.url, ALL)  # idempotent
        assert len(server.requests) == counts["requests"]
    return work, counts


def test_videos_and_rejects(films, built):
    root, scripts = films
    videos = read_lines(built[0] / "segment.jsonl")
    rejects = {row["video"]: row["reason"] for row in read_lines(built[0] / "segment.rejects.jsonl")}
    assert {video["video"] for video in videos} == set(scripts)
    assert set(rejects) == {"copy.mp4", "notes.txt", "cut.mp4", "link_out.mp4", "link_in.mp4", "loop.mp4", "pipe.mp4", "linked"}
    assert rejects["linked"] == "is a link to a folder; give that folder itself, or copy it"
    assert "leads out" in rejects["link_out.mp4"] and "the same bytes as" in rejects["copy.mp4"] and "plain file" in rejects["pipe.mp4"]
    for video in videos:
        scenes = scripts[video["video"]]
        assert video["duration_s"] == pytest.approx(sum(scene.duration_s for scene in scenes), abs=0.01)
        clips = video["clips"]
        assert clips[0]["start_s"] == 0 and clips[-1]["end_s"] == video["duration_s"]
        assert [clip["first_frame"] for clip in clips[1:]] == [clip["last_frame"] + 1 for clip in clips[:-1]]
        assert clips[0]["first_frame"] == 0 and clips[-1]["last_frame"] == video["num_frames"] - 1
        assert video["num_shots"] == len(scenes)  # the library found every cut and no other
        edges = {round(sum(scene.duration_s for scene in scenes[:number]), 3) for number in range(len(scenes))}
        assert all(clip["start_s"] in edges for clip in clips if len(shown_between(scenes, clip["start_s"], clip["end_s"])) > 1)


def test_every_caption_is_true_and_says_how_it_was_made(films, built):
    root, scripts = films
    captions = read_lines(built[0] / "caption.jsonl")
    assert len(captions) == sum(len(video["clips"]) for video in read_lines(built[0] / "segment.jsonl"))
    digests = {video["video"]: video["sha256"] for video in read_lines(built[0] / "segment.jsonl")}
    prompt = hashlib.sha256((ROOT / "tools" / "prompts" / "caption_v1.md").read_bytes()).hexdigest()
    for clip in captions:
        check_caption(clip, scripts[clip["video"]])
        assert clip["video_sha256"] == digests[clip["video"]] and len(clip["frames"]) == 4
        origin = clip["origin"]
        assert origin["prompt_sha256"] == prompt and origin["prompt"] == "caption_v1" and origin["model"] == "scripted"
        assert origin["sampling"] == {"temperature": 0.2, "top_p": 0.6, "max_tokens": 1024, "seed": 0}


def test_every_caption_of_a_picture_is_true(films, built):
    scripts = list(films[1].values())
    rows = read_lines(built[0] / "images.jsonl")
    assert [row["id"] for row in rows] == [f"{number}.{place}.png" for number in range(len(scripts)) for place in range(2)]
    for row in rows:
        number, place, _ = row["image"].split(".")
        scene = scripts[int(number)][int(place)]
        expected = f"The screen is {scene.colour} behind a {scene.shape}, and the word {scene.word} stands at the {scene.place}."
        assert row["conversations"][1]["value"] == expected and row["origin"]["prompt"] == "image_v1"


def test_every_accepted_record_is_true_and_every_row_says_it(films, built):
    root, scripts = films
    accepted, told = read_lines(built[0] / "filter.jsonl"), Counter()
    for record in accepted:
        if record["kind"] == "summary":
            check_summary(record, scripts[record["video"]])
        else:
            check_question(record, scripts[record["video"]])
            told[record["video"], record["question"], record["answer"]] += 1
    kinds = Counter(record.get("type", "summary") for record in accepted)
    clips = len(read_lines(built[0] / "caption.jsonl"))
    assert kinds.pop("summary") == len(scripts) and set(kinds) == set(QUESTION_TYPES) and kinds.total() == clips
    for row in read_lines(built[0] / "export.jsonl"):
        parse_row(row)  # preprocess_video takes it
        question, answer = (turn["value"] for turn in row["conversations"])
        if row["evidence"]:
            told[row["video"], question.removeprefix("<video>\n"), answer] -= 1
        else:
            assert answer in {record["summary"] for record in accepted if record.get("summary") and record["video"] == row["video"]}
    assert not any(told.values())


def test_every_rule_refuses_what_was_planted_and_nothing_else(films, built):
    report = json.loads((built[0] / "filter.report.json").read_text())
    planted = {rule: 2 if rule == "format" else 1 for rule in RULES}
    number = len(films[1])
    clips = len(read_lines(built[0] / "caption.jsonl"))
    assert report["questions"] == {"kept": clips, **{rule: count * number for rule, count in planted.items()}}
    assert report["summaries"]["kept"] == number and sum(report["summaries"].values()) == number
    assert len(read_lines(built[0] / "filter.rejects.jsonl")) == sum(planted.values()) * number


def test_costs_and_statistics(films, built):
    stats = json.loads((built[0] / "stats.json").read_text())
    assert stats["videos"] == len(films[1]) and stats["domains"]["Film"] == len(films[1]) and len(stats["domains"]) == 12
    assert set(stats["question_types"]) == {"Spatial", "Attribute", "Action", "Object", "OCR", "Synopsis", "Temporal"}
    assert stats["hours"] == pytest.approx(sum(scene.duration_s for scenes in films[1].values() for scene in scenes) / 3600, abs=1e-3)
    usage = stats["stages"]["summarize"]["usage"]
    assert usage["answers"] == len(films[1]) and usage["completion_tokens"] == 7 * usage["answers"]
    assert stats["stages"]["summarize"]["dollars"] == pytest.approx((2 * usage["prompt_tokens"] + 10 * usage["completion_tokens"]) / 1e6)
    answers = [json.loads((built[0] / f"{stage}.report.json").read_text())["usage"]["answers"] for stage in ASKING]
    assert built[1]["requests"] == built[1]["different"] == sum(answers)
    assert sum(stats["question_lengths"].values()) == sum(stats["answer_lengths"].values()) == stats["rows"]
    with Image.open(built[0] / "stats.png") as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 20


def test_renamed_videos_are_not_asked_about_again(films, built, tmp_path):
    root = tmp_path / "moved"
    root.mkdir()
    for number, name in enumerate(sorted(films[1])):
        shutil.copy(films[0] / name, root / f"{number}.mp4")
    work = tmp_path / "work"
    shutil.copytree(built[0], work)
    with ScriptedServer() as server:
        build(work, root, server.url, STAGES[:4])
        assert server.requests == []
    assert {row["video"] for row in read_lines(work / "qa.jsonl")} == {f"{number}.mp4" for number in range(len(films[1]))}


def test_the_key_is_sent_and_written_nowhere(films, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", KEY)
    videos = tmp_path / "videos"
    make_film(videos / "a.mp4", [Scene("red", 10), Scene("blue", 10)])
    with ScriptedServer(fault=lambda digest, seen: "429" if not seen else None) as server:
        for stage in STAGES:
            flags = ["--key_env", "MY_KEY"] if stage in ("caption", "summarize", "qa") else []
            assert TOOL.main([*words(stage, tmp_path / "work", videos, server.url), *flags]) == 0
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    with ScriptedServer(fault=lambda digest, seen: "401") as server:
        flags = ["--key_env", "MY_KEY", "--seed", "1"]
        assert TOOL.main([*words("caption", tmp_path / "work", videos, server.url), *flags]) == 3
    output = capfd.readouterr()
    assert "HTTP 401" in output.err and KEY not in output.err + output.out
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert KEY.encode() not in path.read_bytes(), path


# ------------------------------------------------------------------------------------------------ kill -9


def stored_requests(work: Path, server: ScriptedServer) -> set[str]:
    """Digests of the requests whose answers stand in the store, by the numbers the server gave its answers."""
    numbers = set()
    for path in (work / "answers").glob("*.jsonl"):
        if path.stem in ASKING:
            lines = path.read_bytes().split(b"\n")[:-1]
            numbers |= {json.loads(line)["answer"]["usage"]["prompt_tokens"] for line in lines}
    return {server.served[number] for number in numbers}


REPLACED = {"segment": 3, "filter": 3, "export": 3, "stats": 1}  # files that each of these stages puts into place at its end
DYING = """
import os, runpy, signal, sys
left, replace, sys.argv = int(sys.argv[1]), os.replace, sys.argv[2:]
def replace_or_die(*paths):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = replace_or_die
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_and_kill(line: list[str], due: Callable[[], bool]) -> tuple[int, str]:
    """Run a command; kill -9 once it is `due`, or after two minutes. Returns (exit code, errors)."""
    end = time.monotonic() + 120
    with subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            if due() or time.monotonic() > end:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        return process.wait(), process.stderr.read().decode()


def plan_kill(stage: str, attempt: int, work: Path, server: ScriptedServer, draw: random.Random) -> tuple[list[str], Callable[[], bool]]:
    """(what runs the tool, when to kill it) for a point that is sure to be met: after some requests, once the journal has an answer, or
    just before a file is put into its place."""
    if stage in ASKING:
        wanted = len(server.requests) + draw.randint(1, 6)
        return [sys.executable], lambda: len(server.requests) >= wanted
    if stage == "segment" and attempt == 0:
        return [sys.executable], lambda: any(path.read_bytes().count(b"\n") > 1 for path in work.glob("answers/segment-*.jsonl"))
    return [sys.executable, "-c", DYING, str(draw.randint(1, REPLACED[stage]))], lambda: False


@pytest.mark.kill
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_points_gives_the_same_dataset_and_repeats_no_stored_answer(films, built, tmp_path, seed):
    draw = random.Random(seed)
    work, kills = tmp_path / "work", Counter()
    with ScriptedServer(delay_s=0.03) as server:
        for stage in ALL:
            command = [str(ROOT / "tools" / "build_long_video_sft.py"), *words(stage, work, films[0], server.url)]
            for attempt in range(4):
                before = stored_requests(work, server) if work.is_dir() else set()
                seen = len(server.requests)
                start, due = ([sys.executable], lambda: False) if attempt == 3 else plan_kill(stage, attempt, work, server, draw)
                code, errors = run_and_kill([*start, *command], due)
                kills[stage] += code == -signal.SIGKILL
                assert not before & set(server.requests[seen:]), "a stored answer was asked for again"
                if code == 0:
                    break
                assert code == -signal.SIGKILL, errors
            assert code == 0
        assert {stage: kills[stage] for stage in ("caption", *REPLACED)} == dict.fromkeys(("caption", *REPLACED), 3)
        assert kills["images"] and kills["summarize"] and kills["qa"]
        lost = len(server.requests) - built[1]["different"]  # asked, but killed before the answer was stored
        assert 0 < lost <= 4 * sum(kills[stage] for stage in ASKING) and len(set(server.requests)) == built[1]["different"]
    for name in FILES:
        assert (work / name).read_bytes() == (built[0] / name).read_bytes(), name


def test_a_store_cut_anywhere_gives_the_same_dataset(films, built, tmp_path):
    """What a kill leaves behind, without waiting for one: the logs cut in the middle of a line, stage files half-written or missing."""
    draw = random.Random(0)
    for trial in range(4):
        work = tmp_path / f"work{trial}"
        shutil.copytree(built[0], work)
        lost = 0
        for stage in ASKING:
            path = work / "answers" / f"{stage}.jsonl"
            data = path.read_bytes()
            path.write_bytes(data[: draw.randrange(len(data))])
            lost += data.count(b"\n") - path.read_bytes().count(b"\n")
        for path in sorted(work.glob("*.json*")):
            if draw.random() < 0.3:
                path.unlink()
            elif draw.random() < 0.3:
                path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size + 1)]) if path.suffix == ".jsonl" else None
        (work / "caption.jsonl.tmp").write_bytes(b"half a li")
        with ScriptedServer() as server:
            build(work, films[0], server.url, ALL)
            assert len(server.requests) == lost
        for name in FILES:
            assert (work / name).read_bytes() == (built[0] / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------ the rest of the tool


def test_the_rows_become_a_dataset(films, built, tmp_path):
    code, text = preprocess(built[0] / "export.jsonl", films[0], tmp_path / "dataset")
    assert code == 0, text
    report = json.loads((tmp_path / "dataset" / "report.json").read_text())
    assert report["rejected"] == 0 and report["accepted"] == len(read_lines(built[0] / "export.jsonl"))


def test_a_list_of_names(films, tmp_path, capsys):
    root, work = films[0], tmp_path / "work"
    names = ["-rf.mp4", "../outside.mp4", "-rf.mp4", str(root / "-rf.mp4"), "a b/../-rf.mp4", "a b", "\udcff.mp4", "a b/c d.mp4\r", ""]
    (tmp_path / "list").write_bytes("\n".join(names).encode(errors="surrogateescape"))
    segment = ["segment", "--work", str(work), "--videos", str(root), "--list", str(tmp_path / "list"), "--num_workers", "2"]
    for _ in range(2):
        assert TOOL.main(segment) == 0
        assert [video["video"] for video in read_lines(work / "segment.jsonl")] == ["-rf.mp4", "a b/c d.mp4"]
        rejects = read_lines(work / "segment.rejects.jsonl")
        assert [row["video"] for row in rejects] == names[1:7]
        expected = ["leads out", "listed twice", "same bytes", "same bytes", "not a plain file", "is not in"]
        assert all(words in row["reason"] for words, row in zip(expected, rejects, strict=True)), rejects
    (tmp_path / "list").unlink()
    assert TOOL.main(segment) == 1 and "cannot be read: No such file" in capsys.readouterr().err
