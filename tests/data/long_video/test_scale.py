"""Inputs of a hundred thousand lines: what is planted is found, in a few hundred megabytes."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from films import Scene, make_film
from programs import ROOT, environment, read_lines

from megatron_longvila.data.long_video.prompts import DOMAINS, QUESTION_TYPES
from megatron_longvila.data.long_video.records import work_folder, write_stage

VIDEOS, QUESTIONS = 5000, 20  # of each video
MOST_MIB = 500
PROGRAM = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    # Not getrusage: its maximum outlives exec, and begins with that of the process that forked this one.
    print("peak_kib:", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    raise
"""


def write_stages(work: Path) -> None:
    """What the stages before `filter` would write: every hundredth summary is nearly that of the video before, and of each video one
    question is asked again in capitals, one nearly again, and one rests on a span outside."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    names = [f"{number:05d}.mp4" for number in range(VIDEOS)]
    origin = {"prompt": "p_v1", "prompt_sha256": "f" * 64, "model": "m", "sampling": {"seed": 0}, "try": 0, "answered_by": "m"}
    spent = {"model": "m", "records": 1, "rejected": 0, "usage": {}, "dollars": 0.0, "faults": {}}

    def summaries():
        text: list[str] = []
        for number, name in enumerate(names):
            text = [*text[:59], "changed", *text[60:]] if number % 100 == 99 else draw.choices(words, k=120)
            yield {"video": name, "summary": " ".join(text), "domain": draw.choice(DOMAINS), "origin": origin}

    def questions():
        for name in names:
            asked = [" ".join(draw.choices(words, k=14)) for _ in range(QUESTIONS - 2)] + ["", ""]
            asked[-2], asked[-1] = asked[0].upper() + "?", asked[1] + " now"
            for number, question in enumerate(asked):
                one = {"type": QUESTION_TYPES[number % 7], "question": question, "answer": "An answer.", "start_s": 1, "end_s": 60}
                one["end_s"] += 100 * (number == 2)
                yield {"video": name, "number": number, "candidate": one, "origin": origin}

    clip = {"start_s": 0.0, "end_s": 60.0, "first_frame": 0, "last_frame": 299}
    videos = (
        {"video": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "duration_s": 60.0, "clips": [clip] * 6} for name in names
    )
    with work_folder(work):
        write_stage(work, "segment", videos, [], {}, sources=[])
        write_stage(work, "caption", [], [], spent, sources=[work / "segment.jsonl"])
        write_stage(work, "summarize", summaries(), [], spent, sources=[work / "caption.jsonl"])
        write_stage(work, "qa", questions(), [], spent, sources=[work / "caption.jsonl"])


def run(stage: str, work: Path, *flags: object) -> float:
    """Peak memory of a stage in MiB."""
    words = [sys.executable, "-c", PROGRAM, ROOT / "tools" / "build_long_video_sft.py", stage, "--work", work, *flags]
    done = subprocess.run(list(map(str, words)), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("peak_kib: ")[1]) / 1024


pytestmark = pytest.mark.end_to_end


def test_a_list_of_a_hundred_thousand_names(tmp_path):
    make_film(tmp_path / "films" / "a.mp4", [Scene("red", 10)])
    (tmp_path / "list").write_text("".join(f"missing {number}.mp4\n" for number in range(100_000)) + "a.mp4\n")
    peak = run("segment", tmp_path / "work", "--videos", tmp_path / "films", "--list", tmp_path / "list")
    assert peak < MOST_MIB and [row["video"] for row in read_lines(tmp_path / "work" / "segment.jsonl")] == ["a.mp4"]
    assert len(read_lines(tmp_path / "work" / "segment.rejects.jsonl")) == 100_000


def test_a_hundred_thousand_questions(tmp_path):
    work = tmp_path / "work"
    write_stages(work)
    peaks = {"filter": run("filter", work, "--language", "any"), "export": run("export", work, "--questions", "each"), "stats": 0.0}
    peaks["stats"] = run("stats", work)
    assert max(peaks.values()) < MOST_MIB, peaks
    report = json.loads((work / "filter.report.json").read_text())
    found = {kind: {rule: count for rule, count in report[kind].items() if count} for kind in ("summaries", "questions")}
    assert found["summaries"] == {"kept": VIDEOS - VIDEOS // 100, "near_duplicate": VIDEOS // 100}
    planted = {"duplicate": VIDEOS, "near_duplicate": VIDEOS, "span": VIDEOS}
    assert found["questions"] == {"kept": VIDEOS * (QUESTIONS - 3), **planted}
    rejects = [row for row in read_lines(work / "filter.rejects.jsonl") if row["kind"] == "question"]
    assert {row["record"]["number"] for row in rejects} == {2, QUESTIONS - 2, QUESTIONS - 1}
    stats = json.loads((work / "stats.json").read_text())
    assert stats["rows"] == VIDEOS * (QUESTIONS - 3) + VIDEOS - VIDEOS // 100 == sum(stats["answer_lengths"].values())
    assert stats["videos"] == VIDEOS == sum(stats["domains"].values()) and stats["clips"] == 6 * VIDEOS
