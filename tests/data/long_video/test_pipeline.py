"""The whole chain against the scripted server: every accepted record is true, and killing any stage at any point changes nothing."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from film_truth import check_caption, check_question, check_summary
from films import Scene, make_film, make_picture, plan_scenes, shown_between
from media import image_bytes, video_bytes
from PIL import Image
from programs import ROOT, environment, load_script, preprocess, read_lines
from scripted_server import ScriptedServer

from megatron_longvila.data.long_video.filters import RULES
from megatron_longvila.data.long_video.pictures import ClipReader, PictureOptions
from megatron_longvila.data.long_video.prompts import QUESTION_TYPES
from megatron_longvila.data.media import MediaError
from megatron_longvila.data.rows import parse_row
from megatron_longvila.data.workers import Assistant, Killed

TOOL = load_script(ROOT / "tools" / "build_long_video_sft.py")
KEY = "sk-0123456789abcdef"
HOSTILE = [
    "a b/c d.mp4", "\u00fcber \u732b.mp4", "new\nline.mp4", "x..mp4", "-rf.mp4", "'; rm -rf \".mp4", "<video>.mp4", "{{captions}}.mp4",
]  # fmt: skip
STAGES = ("segment", "caption", "summarize", "qa", "filter", "export", "stats")
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


def words(stage: str, work: Path, films: Path, url: str) -> list[str]:
    asking = ["--endpoint", url, "--model", "scripted", "--timeout_s", "20", "--backoff_s", "0.01", "--concurrency", "4"]
    flags = {
        "segment": ["--videos", films, "--boundaries", "shots", "--num_workers", 2],
        "caption": [*asking, "--num_frames", 4, "--image_size", 96],
        "summarize": [*asking, "--price_prompt", "2", "--price_completion", "10"],
        "qa": asking,
        "filter": [],
        "export": ["--questions", "each"],
        "stats": [],
        "images": [*asking, "--images", films.parent / "images"],
    }
    return ["caption" if stage == "images" else stage, "--work", str(work), *map(str, flags[stage])]


def build(work: Path, films: Path, url: str, stages=STAGES) -> None:
    for stage in stages:
        assert TOOL.main(words(stage, work, films, url)) == 0, stage


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


def test_an_open_stage_says_so_and_the_next_one_does_not_run(films, tmp_path, capsys):
    root = tmp_path / "videos"
    make_film(root / "a.mp4", [Scene("red", 30)])
    work = tmp_path / "work"
    with ScriptedServer(fault=lambda digest, seen: "500") as server:
        build(work, root, server.url, ["segment"])
        assert TOOL.main([*words("caption", work, root, server.url), "--max_tries", "2"]) == 3
        assert "3 of 3 questions got no answer" in capsys.readouterr().err
        assert [row["item"] for row in read_lines(work / "caption.pending.jsonl")] == ["a.mp4#0", "a.mp4#1", "a.mp4#2"]
        assert TOOL.main(words("summarize", work, root, server.url)) == 1
        assert "`caption` has not finished" in capsys.readouterr().err
    with ScriptedServer() as server:
        build(work, root, server.url, ["caption", "summarize"])
        assert not (work / "caption.pending.jsonl").exists()
        make_film(root / "b.mp4", [Scene("blue", 10)])
        build(work, root, server.url, ["segment"])
        assert TOOL.main(words("qa", work, root, server.url)) == 1
        assert "segment.jsonl has changed since `caption` ran" in capsys.readouterr().err
        before = len(server.requests)
        build(work, root, server.url)
        assert len(server.requests) == before + 1 + 1 + 2  # the new clip, the new summary, questions of both


def test_a_video_that_the_endpoint_refuses_is_a_reject_and_the_others_go_on(tmp_path, capsys):
    root, work = tmp_path / "videos", tmp_path / "work"
    for number, name in enumerate("ab"):
        make_film(root / f"{name}.mp4", [Scene("red", 10), Scene("blue", 10 + 5 * number)], number=number)
    with ScriptedServer() as server:
        build(work, root, server.url, ["segment", "caption"])
        for stage in ("summarize", "qa"):
            start = len(server.requests)
            server.fault = lambda digest, seen, start=start: "400" if digest == server.requests[start] else None
            build(work, root, server.url, [stage])
        reasons = {row["item"]: row["reason"] for row in read_lines(work / "summarize.rejects.jsonl")}
        assert len(reasons) == 1 and all(reason.startswith("the endpoint refuses it: HTTP 400") for reason in reasons.values())
        report = json.loads((work / "summarize.report.json").read_text())
        assert report["rejected"] == 1 == report["records"] and report["faults"] == {"refused": 1}
        server.fault = lambda digest, seen: None
        build(work, root, server.url, ["summarize"])  # another day, a longer context
        assert len(read_lines(work / "summarize.jsonl")) == 2
        server.fault = lambda digest, seen: "422"  # one that takes nothing: the settings are wrong, not the films
        assert TOOL.main([*words("summarize", work, root, server.url), "--seed", "1"]) == 3
        assert "2 of 2 were refused" in capsys.readouterr().err and len(read_lines(work / "summarize.jsonl")) == 2


def test_the_cost_is_that_of_the_model_in_the_report(tmp_path):
    root, work = tmp_path / "videos", tmp_path / "work"
    make_film(root / "a.mp4", [Scene("red", 10)])
    with ScriptedServer() as server:
        build(work, root, server.url, ["segment", "caption", "summarize"])
        assert TOOL.main([*words("summarize", work, root, server.url), "--model", "dear", "--price_prompt", "1000000"]) == 0
    report = json.loads((work / "summarize.report.json").read_text())
    used, other = report["usage"], report["usage_of_other_models"]
    assert report["model"] == "dear" and used["answers"] == 1 and report["dollars"] == pytest.approx(used["prompt_tokens"] + 7e-5)
    assert other.keys() == {"scripted"} and other["scripted"]["prompt_tokens"] == used["prompt_tokens"] - 1


def test_a_video_that_is_gone_for_a_while_stays_open(tmp_path, capsys):
    root, work = tmp_path / "videos", tmp_path / "work"
    for name in "ab":
        make_film(root / f"{name}.mp4", [Scene("red", 10)], number=ord(name))
    with ScriptedServer() as server:
        build(work, root, server.url, ["segment"])
        (root / "a.mp4").rename(tmp_path / "a.mp4")
        assert TOOL.main(words("caption", work, root, server.url)) == 3
        assert "1 of 2 questions got no answer" in capsys.readouterr().err and len(server.requests) == 1
        (tmp_path / "a.mp4").rename(root / "a.mp4")
        build(work, root, server.url, ["caption"])
        assert len(read_lines(work / "caption.jsonl")) == 2 == len(server.requests)


def test_images_get_captions_and_keep_their_ids(tmp_path, capsys):
    root = tmp_path / "images"
    root.mkdir()
    for number, name in enumerate(["a b.png", "z.jpg", "\u732b.png"]):
        (root / name).write_bytes(image_bytes(number))
    (root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (root / "same.png").write_bytes(image_bytes(0))
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "secret.png").write_bytes(image_bytes(9))
    command = ["caption", "--work", tmp_path / "work", "--model", "m", "--endpoint"]
    with ScriptedServer(lambda system, text, pictures: "A grid of black and white cells.") as server:
        words = [*map(str, command), server.url, "--images", str(root), "--concurrency", "2"]
        assert TOOL.main(words) == 0 and TOOL.main(words) == 0
        assert len(server.requests) == 3  # two of the pictures are the same
        rows = read_lines(tmp_path / "work" / "images.jsonl")
        assert [row["id"] for row in rows] == ["a b.png", "same.png", "z.jpg", "\u732b.png"]
        assert all(row["conversations"][1]["value"] == "A grid of black and white cells." for row in rows)
        assert {row["item"]: row["reason"] for row in read_lines(tmp_path / "work" / "images.rejects.jsonl")}.keys() == {
            "bad.png",
            "out.png",
        }
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Old"}]
        names = ["z.jpg", "../secret.png", "missing.png", "a b.png"]
        old = [{"id": f"row-{number}", "image": name, "conversations": turns} for number, name in enumerate(names)]
        old += [{**old[0], "image": "a b.png"}, {"id": "t", "conversations": [{**turns[0], "value": "a"}, turns[1]]}]
        (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old) + "{broken\n")
        words = [*map(str, command), server.url, "--images", str(tmp_path / "old.jsonl"), "--media_root", str(root)]
        assert TOOL.main(words) == 0 and len(server.requests) == 3
        written = read_lines(tmp_path / "work" / "images.jsonl")
        assert [(row["id"], row["image"]) for row in written] == [("row-0", "z.jpg"), ("row-3", "a b.png")]
        reasons = [row["reason"] for row in read_lines(tmp_path / "work" / "images.rejects.jsonl")]
        expected = ["leads out", "is not in", "used before", "one image", "not JSON"]
        assert len(reasons) == 5 and all(word in reason for word, reason in zip(expected, reasons, strict=True))
    code, text = preprocess(tmp_path / "work" / "images.jsonl", root, tmp_path / "dataset")
    assert code == 0, text


def test_pictures_that_come_and_go_while_the_stage_runs(tmp_path, monkeypatch):
    """Gone after the folder was read: refused. There but not readable now: open, and no question without a digest is asked."""
    root, work = tmp_path / "images", tmp_path / "work"
    (root / "sub").mkdir(parents=True)
    for number in range(12):
        (root / f"{number}.png").write_bytes(image_bytes(number))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(image_bytes(20))
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "a.png").write_bytes(image_bytes(30))

    def answer(*_):
        (root / "11.png").unlink(missing_ok=True)
        return "A grid."

    def hash_or_fail(path: Path) -> str:
        if path.name == "10.png" and failing:
            raise OSError(5, "Input/output error")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    failing = [True]
    monkeypatch.setattr("megatron_longvila.data.long_video.stages.file_hash", hash_or_fail)
    with ScriptedServer(answer) as server:
        line = ["caption", "--work", str(work), "--model", "m", "--endpoint", server.url, "--images", str(root), "--concurrency", "1"]
        assert TOOL.main(line) == 3
        assert read_lines(work / "images.pending.jsonl") == [{"item": "10.png", "reason": "cannot be read: Input/output error"}]
        failing.clear()
        assert TOOL.main(line) == 0 and len(server.requests) == 12
    assert [row["id"] for row in read_lines(work / "images.jsonl")] == [*(f"{number}.png" for number in range(11)), "sub/a.png"]
    assert {row["item"]: row["reason"] for row in read_lines(work / "images.rejects.jsonl")}["linked"].startswith("is a link to a folder")


def test_answers_about_pictures_are_not_kept_in_memory(tmp_path):
    """A second run reads stored answers of 20 KB each; what it keeps of one is where it stands."""
    root, peaks = tmp_path / "images", {}
    root.mkdir()
    with ScriptedServer(lambda *_: "A grid of cells. " * 1200) as server:
        command = ["caption", "--work", str(tmp_path / "work"), "--model", "m", "--endpoint", server.url, "--images", str(root)]
        for total in (50, 250):
            for number in range(total):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(root / f"{number}.png")
            assert TOOL.main(command) == 0
            tracemalloc.start()
            try:
                assert TOOL.main(command) == 0
                peaks[total] = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
    assert len(read_lines(tmp_path / "work" / "images.jsonl")) == 250 and peaks[250] - peaks[50] < 200 * 4000, peaks


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


def test_a_folder_without_a_video_ends_the_chain(tmp_path, capsys, monkeypatch):
    root, work = tmp_path / "videos", tmp_path / "work"
    root.mkdir()
    segment = ["segment", "--work", str(work), "--videos", str(root), "--num_workers", "1"]
    assert TOOL.main(segment) == 1 and "none of 0 files" in capsys.readouterr().err
    make_film(root / "a.mp4", [Scene("red", 10)])
    assert TOOL.main(segment) == 0
    assert "num_shots" not in read_lines(work / "segment.jsonl")[0]  # nobody looked for shots
    (root / "a.mp4").write_text("no film")
    assert TOOL.main(segment) == 1
    assert "none of 1 files" in (error := capsys.readouterr().err) and "'a.mp4' is not a known video" in error
    assert [row["video"] for row in read_lines(work / "segment.rejects.jsonl")] == ["a.mp4"]
    with ScriptedServer() as server:
        assert TOOL.main(words("caption", work, root, server.url)) == 1 and "`segment` has not finished" in capsys.readouterr().err


def test_a_clip_of_which_a_frame_does_not_decode_is_refused(tmp_path):
    """The prompt says how many pictures there are, and the record which: none may be left out in silence."""
    root, work = tmp_path / "videos", tmp_path / "work"
    root.mkdir()
    data = bytearray(video_bytes(range(40), options={"x264-params": "keyint=1:threads=1"}))  # keyframes alone
    with av.open(io.BytesIO(bytes(data))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    (root / "a.mp4").write_bytes(data)
    with ScriptedServer(lambda *_: "A grid.") as server:
        assert TOOL.main(["segment", "--work", str(work), "--videos", str(root), "--clip_s", "1", "--num_workers", "1"]) == 0
        clips = read_lines(work / "segment.jsonl")[0]["clips"]
        broken = [clip["first_frame"] <= 20 <= clip["last_frame"] for clip in clips].index(True)
        caption = words("caption", work, root, server.url)
        assert TOOL.main([*caption, "--num_frames", "100"]) == 0
    rejects = read_lines(work / "caption.rejects.jsonl")
    assert [row["item"] for row in rejects] == [
        f"a.mp4#{broken}"
    ] and "frames to show do not decode, the first of them frame 20" in rejects[0]["reason"]
    captions = read_lines(work / "caption.jsonl")
    shown = [[part["type"] for part in body["messages"][-1]["content"]].count("image_url") for body in server.bodies]
    assert len(captions) == len(clips) - 1 and sorted(shown) == sorted(len(record["frames"]) for record in captions)


def test_a_decoder_that_hangs_or_dies_takes_only_its_clip_along(tmp_path, monkeypatch):
    path = make_film(tmp_path / "a.mp4", [Scene("red", 10)])
    size = path.stat().st_size
    with ClipReader(PictureOptions()) as reader:
        first = reader.read(path, size, 50, [10])
        reader._streams[str(path)]._assistant._worker.process.kill()
        with pytest.raises(MediaError, match="crashed its reader .SIGKILL."):
            reader.read(path, size, 50, [20])
        assert reader.read(path, size, 50, [10]) == first
    with ClipReader(PictureOptions(timeout_s=1e-6)) as reader:
        with pytest.raises(MediaError, match="took longer than 1e-06 s and was stopped"):
            reader.read(path, size, 50, [10])
        monkeypatch.setattr(Assistant, "ask", lambda *_: pytest.fail("opened again"))
        with pytest.raises(MediaError, match="took longer"):
            reader.read(path, size, 50, [20])


def test_an_assistant_that_overruns_is_replaced():
    assistant = Assistant(time.sleep, 0.5)
    assert assistant.ask(60) == Killed("took longer than 0.5 s and was stopped")
    assert assistant.ask(0.01) is None
    with pytest.raises(ValueError, match="non-negative"):
        assistant.ask(-1)
    assert assistant.ask(0.01) is None
    assistant.close()


def test_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        TOOL.main(["caption", "--work", str(tmp_path)])
    assert error.value.code == 2
    assert TOOL.main(["segment", "--work", str(tmp_path / "w"), "--videos", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    prompt = tmp_path / "p.md"
    prompt.write_text("## system\n## user\n{{secret}}")
    words = ["caption", "--work", str(tmp_path / "w"), "--endpoint", "http://h/v1", "--model", "m", "--prompt", str(prompt)]
    assert TOOL.main(words) == 1 and "asks for ['secret']" in capsys.readouterr().err
    assert TOOL.main([*words[:-2], "--key_env", "NO_SUCH_KEY"]) == 1
    assert "--key_env NO_SUCH_KEY: that environment variable is not set" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        TOOL.main(["export", "--work", str(tmp_path), "--max_per_type", "-1"])
    assert error.value.code == 2 and "-1 is less than 0" in capsys.readouterr().err
