"""tools/preprocess_video.py: what is accepted, what is refused and why, and that a kill costs nothing but time."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from media import audio_bytes, image_bytes, video_bytes, write_frames

from megatron_longvila.data import preprocess as preprocess_module
from megatron_longvila.data.output import PreprocessError
from megatron_longvila.data.preprocess import Options, preprocess
from megatron_longvila.data.rows import parse_row
from megatron_longvila.data.shards import open_dataset
from megatron_longvila.data.workers import Killed, run_tasks

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_video.py"


def turns(question: str, answer: str = "yes") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset but the working state."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "state" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run_tool(*arguments, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **settings)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A media root with six good videos, pictures, a frame folder and everything that goes wrong."""
    root = tmp_path_factory.mktemp("media")
    for number in range(6):
        (root / f"clip{number}.mp4").write_bytes(video_bytes(range(10 * number, 10 * number + 8)))
    (root / "copy.mp4").write_bytes((root / "clip0.mp4").read_bytes())
    (root / "one.png").write_bytes(image_bytes(1))
    write_frames(root / "frames", range(4))
    (root / "empty.mp4").touch()
    (root / "page.mp4").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (root / "sound.mp4").write_bytes(audio_bytes())
    (root / "cut.mp4").write_bytes(video_bytes()[:1500])
    (root / "concat.mp4").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    (root / "out.mp4").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe.mp4")
    return root


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def good_rows() -> list[dict]:
    clips = [{"id": f"clip{number}", "video": f"clip{number}.mp4", "conversations": turns("<video>\nWhat?")} for number in range(6)]
    return [
        *clips,
        {"id": "copy", "video": "copy.mp4", "conversations": turns("<video>\nAgain?")},
        {"id": "mix", "video": ["clip1.mp4", "clip2.mp4"], "image": "one.png", "conversations": turns("<video><image><video>")},
        {"id": "frames", "video": "frames", "fps": 1.5, "conversations": turns("<video>")},
        {"id": "text", "conversations": [{"from": "system", "value": "<image> is text here"}, *turns("Hi", "<video>"), *turns("And?")]},
        {"id": 12, "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
    ]


REFUSED = [
    ("{broken", "not JSON"),
    ('["a list"]', "must be a JSON object, not list"),
    ({"conversations": turns("no id")}, "has no `id`"),
    ({"id": True, "conversations": turns("no id")}, "has no `id`"),
    ({"id": "a"}, "has no `conversations`"),
    ({"id": "a", "conversations": [{"from": "human"}]}, "turn 0 must be"),
    ({"id": "a", "conversations": [{"from": "bot", "value": "x"}]}, "from 'bot'"),
    ({"id": "a", "conversations": turns("x")[:1]}, "must alternate"),
    ({"id": "a", "conversations": turns("x")[::-1]}, "must alternate"),
    ({"id": "a", "conversations": [*turns("x"), {"from": "system", "value": "x"}]}, "must alternate"),
    ({"id": "a", "conversations": turns("x", " \n")}, "answer in turn 1 is empty"),
    ({"id": "a", "conversations": turns("<video>")}, "1 <video> marks .* 0 files in `video`"),
    ({"id": "a", "video": "clip0.mp4", "conversations": turns("x")}, "0 <video> marks .* 1 files"),
    ({"id": "a", "video": "clip0.mp4", "conversations": turns("<image>")}, "0 <video> marks"),
    ({"id": "a", "video": "clip0.mp4", "conversations": turns("x", "<video>")}, "0 <video> marks"),
    ({"id": "a", "image": "one.png", "images": ["one.png"], "conversations": turns("<image>")}, "both `image` and `images`"),
    ({"id": "a", "video": 3, "conversations": turns("<video>")}, "`video` must be a path"),
    ({"id": "a", "video": "frames", "fps": 0, "conversations": turns("<video>")}, "`fps` must be a number above 0"),
    ({"id": "a", "video": "frames", "conversations": turns("<video>")}, "needs `fps` > 0"),
    ({"id": "a", "conversations": turns("\ud800")}, "half a surrogate pair"),
    ({"id": "text", "conversations": turns("x")}, "id 'text' was used before, in rows.jsonl:10"),
    ({"id": "b1", "video": "empty.mp4", "conversations": turns("<video>")}, "'empty.mp4' is empty"),
    ({"id": "b2", "video": "page.mp4", "conversations": turns("<video>")}, "HTML page"),
    ({"id": "b3", "video": "sound.mp4", "conversations": turns("<video>")}, "no video track"),
    ({"id": "b4", "video": "cut.mp4", "conversations": turns("<video>")}, "is cut"),
    ({"id": "b5", "video": "concat.mp4", "conversations": turns("<video>")}, "playlist"),
    ({"id": "b6", "video": "nowhere.mp4", "conversations": turns("<video>")}, "is not in the media root"),
    ({"id": "b7", "video": "out.mp4", "conversations": turns("<video>")}, "leads out of the media root"),
    ({"id": "b8", "video": "../" * 20 + "etc/passwd", "conversations": turns("<video>")}, "leads out of the media root"),
    ({"id": "b9", "video": "/etc/passwd", "conversations": turns("<video>")}, "leads out of the media root"),
    ({"id": "b10", "video": "a\0b", "conversations": turns("<video>")}, "cannot be opened"),
    ({"id": "b11", "video": "pipe.mp4", "conversations": turns("<video>")}, "not a plain file"),
    ({"id": "b12", "video": "one.png", "conversations": turns("<video>")}, "is an image, but its mark is <video>"),
    ({"id": "b13", "image": "clip0.mp4", "conversations": turns("<image>")}, "is a video, but its mark is <image>"),
]


@pytest.mark.parametrize("name", ["video", "image", "images", None])
def test_fields_that_are_null_are_none(name):
    mark = {"video": "<video>", None: ""}.get(name, "<image>")
    record = {"id": "a", "video": None, "image": None, "images": None, "fps": None, "conversations": turns(f"{mark}What?")}
    row = parse_row({**record, **({name: "a.file"} if name else {})})
    assert [(one.mark, one.path) for one in row.media] == ([(mark, "a.file")] if name else [])


@pytest.fixture(scope="module")
def finished(media, tmp_path_factory) -> Path:
    """The dataset of the good rows followed by the refused ones, made by the tool itself."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "rows.jsonl", [*good_rows(), "", *(row for row, _ in REFUSED)])
    done = run_tool("--input", rows, "--media-root", media, "--output", folder / "out", "--num_workers", 3, "--shard_mib", 1)
    assert done.returncode == 0, done.stderr
    assert f"11 rows accepted, {len(REFUSED)} rejected" in done.stdout
    return folder


def test_accepted_and_rejected_rows(finished, media):
    report = json.loads((finished / "out" / "report.json").read_text())
    assert not any(str(media) in row["reason"] for row in report["rows"])  # a report that is passed on names no place above the root
    assert (report["accepted"], report["rejected"]) == (11, len(REFUSED)) == (len(good_rows()), len(report["rows"]))
    for line, (row, (record, reason)) in enumerate(zip(report["rows"], REFUSED, strict=True), len(good_rows()) + 2):
        assert row["key"] == f"rows.jsonl:{line}"
        assert re.search(reason, row["reason"]), (row, reason)
        assert row["id"] == (None if isinstance(record, str) or "has no `id`" in reason else record["id"])
    dataset = open_dataset(finished / "out")
    samples = {sample.id: sample for sample in dataset.samples}
    assert list(samples) == [str(row["id"]) for row in good_rows()]
    assert samples["copy"].media == samples["clip0"].media  # stored once, by content
    clip1, one, clip2 = samples["mix"].media
    assert (clip1, clip2) == samples["clip1"].media + samples["clip2"].media and dataset.media[one].kind == "image"
    assert len(dataset.media) == 8 and dataset.media[samples["frames"].media[0]].fps == 1.5
    assert [turn["from"] for turn in samples["12"].conversations] == ["human", "gpt"]


def options(media: Path, folder: Path, rows: list, output: str = "out", **fields) -> Options:
    return Options(write_rows(folder / "rows.jsonl", rows), media, folder / output, **{"num_workers": 2, "shard_bytes": 6000, **fields})


def test_again_does_nothing_and_workers_do_not_matter(media, tmp_path):
    assert preprocess(options(media, tmp_path, good_rows(), num_workers=1)).changed
    before, stamps = contents(tmp_path / "out"), {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("**/*")}
    assert sum(name.startswith("shards/") for name in before) > 2
    assert not preprocess(options(media, tmp_path, good_rows())).changed
    assert {path: path.stat().st_mtime_ns for path in stamps if path.name != "lock"} == {
        path: stamp for path, stamp in stamps.items() if path.name != "lock"
    }
    preprocess(options(media, tmp_path, good_rows(), "other", num_workers=4))
    assert contents(tmp_path / "other") == before
    grown = [*good_rows(), {"id": "new", "video": "clip5.mp4", "conversations": turns("<video>")}]
    assert preprocess(options(media, tmp_path, grown)).changed and len(open_dataset(tmp_path / "out").samples) == 12
    shrunk = preprocess(options(media, tmp_path, good_rows()[:2]))  # shards that nothing refers to any more go away
    assert shrunk.num_shards == 1 and sum(name.startswith("shards/") for name in contents(tmp_path / "out")) == 1
    assert not preprocess(options(media, tmp_path, good_rows()[:2], dry_run=True)).changed


def test_dry_run_writes_nothing(media, tmp_path):
    report = preprocess(options(media, tmp_path, good_rows(), dry_run=True))
    assert (report.accepted, report.changed) == (11, False) and not (tmp_path / "out").exists()


def test_json_list_is_read_too(media, tmp_path):
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps([*good_rows(), 3]))
    report = preprocess(Options(tmp_path / "rows.json", media, tmp_path / "out"))
    assert report.accepted == 11 and report.rows[0]["key"] == "rows.json#12"
    (tmp_path / "rows.json").write_text("[{}")
    with pytest.raises(PreprocessError, match="starts like a JSON list but is not one"):
        preprocess(Options(tmp_path / "rows.json", media, tmp_path / "out2"))


@pytest.mark.parametrize("place", ["look", "shard", "journal", "index"])
def test_killed_and_run_again_gives_the_same_bytes(place, media, tmp_path):
    """The process dies by SIGKILL in the middle of each pass, the second time it is called there; the next run finishes the work."""
    whole = options(media, tmp_path, good_rows(), "whole")
    preprocess(whole)
    code = "import sys, test_preprocess as t; t._die_at(sys.argv[1]); t.preprocess(t.options(*map(t.Path, sys.argv[2:]), t.good_rows()))"
    paths = os.pathsep.join(str(Path(__file__).parents[level]) for level in range(3))
    command = [sys.executable, "-c", code, place, str(media), str(tmp_path)]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, timeout=120).returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="has not finished"):
        open_dataset(tmp_path / "out")
    report = preprocess(options(media, tmp_path, good_rows()))
    assert report.changed and contents(tmp_path / "out") == contents(tmp_path / "whole")


def _die_at(place: str) -> None:
    from megatron_longvila.data import output

    calls = []

    def dying(function, after: int):
        def called(*arguments, **settings):
            calls.append(None)
            if len(calls) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        return called

    if place == "look":
        output.Journal.append = dying(output.Journal.append, 4)
    elif place == "journal":  # a line that was being written when the kill came
        append = output.Journal.append

        def half(self, key, value):
            append(self, key, value)
            if len(self.entries) == 3:
                self._file.write(b'["half a li')
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        output.Journal.append = half
    elif place == "shard":
        write = output._write_shards

        def partly(tasks, num_workers):
            for task in write(tasks, 1):
                Path(tasks[-1].path + ".tmp").write_bytes(b"half a shard")
                yield task
                os.kill(os.getpid(), signal.SIGKILL)

        output._write_shards = partly
    else:
        output.write_atomically = dying(output.write_atomically, 4)


def _hang_or_crash(task: str) -> str:
    if task == "hang":
        time.sleep(100)
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return task.upper()


def test_workers_that_hang_or_crash_cost_only_their_task():
    answers = dict(run_tasks(_hang_or_crash, ["a", "hang", "b", "crash", "c"], num_workers=2, timeout_s=1.5))
    assert {task: answers[task] for task in "abc"} == {"a": "A", "b": "B", "c": "C"}
    assert answers["hang"] == Killed("took longer than 1.5 s and was stopped")
    assert answers["crash"] == Killed("crashed its reader (SIGSEGV)")


def test_slow_files_are_refused_and_tried_again_next_time(media, tmp_path):
    slow = preprocess(options(media, tmp_path, good_rows(), timeout_s=0.0))
    assert slow.accepted == 2 and "took longer than timeout_s=0" in slow.rows[0]["reason"]
    assert preprocess(options(media, tmp_path, good_rows())).accepted == 11


def test_a_file_that_changes_between_the_passes(media, tmp_path, monkeypatch):
    own = tmp_path / "media"
    own.mkdir()
    (own / "a.mp4").write_bytes(video_bytes(range(4)))
    plan = preprocess_module.plan_shards

    def change(*arguments):
        (own / "a.mp4").write_bytes(video_bytes(range(5, 10)))
        return plan(*arguments)

    monkeypatch.setattr(preprocess_module, "plan_shards", change)
    with pytest.raises(PreprocessError, match="changed while it was being preprocessed"):
        preprocess(options(own, tmp_path, [{"id": "a", "video": "a.mp4", "conversations": turns("<video>")}]))
    monkeypatch.undo()
    report = preprocess(options(own, tmp_path, [{"id": "a", "video": "a.mp4", "conversations": turns("<video>")}]))
    assert report.accepted == 1


def test_wrong_usage_and_unusable_folders(media, tmp_path, finished):
    rows = write_rows(tmp_path / "rows.jsonl", good_rows())
    for arguments, message in (
        (("--input", tmp_path / "none", "--media_root", media, "--output", tmp_path / "o"), "cannot be read: No such file"),
        (("--input", rows, "--media_root", tmp_path / "none", "--output", tmp_path / "o"), "is not a folder"),
        (("--input", rows, "--media_root", media, "--output", media), "did not write"),
        (("--input", rows, "--media_root", media, "--output", rows), "is a file"),
        (("--input", write_rows(tmp_path / "bad.jsonl", ["{"]), "--media_root", media, "--output", tmp_path / "b"), "no row was accepted"),
    ):
        done = run_tool(*arguments)
        assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr
    assert run_tool("--input", rows).returncode == 2
    done = run_tool("--help")
    assert done.returncode == 0 and "A worked example" in done.stdout


def test_a_full_disk_is_a_clean_error(media, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", good_rows())
    arguments = ("--input", rows, "--media_root", media, "--output", tmp_path / "out")
    limit = 16_000  # bytes any file may grow to: journals fit, the shard does not
    done = run_tool(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list((tmp_path / "out").rglob("*.tmp")) and not (tmp_path / "out" / "dataset.json").exists()
    assert preprocess(Options(rows, media, tmp_path / "out")).changed  # with room again, the rest is done


def test_one_run_at_a_time(media, tmp_path):
    first = options(media, tmp_path, good_rows())

    def second(iterable, total, unit):
        with pytest.raises(PreprocessError, match="another run"):
            preprocess(first)
        return iterable

    assert preprocess(first, second).changed
