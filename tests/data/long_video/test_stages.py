"""The stages where something is wrong: endpoints that refuse, files that go or break, flags that do not fit."""

import hashlib
import io
import json
import time
import tracemalloc
from pathlib import Path

import av
import pytest
from films import Scene, make_film
from long_video_chain import TOOL, build, words
from media import image_bytes, video_bytes
from PIL import Image
from programs import preprocess, read_lines
from scripted_server import ScriptedServer

from megatron_longvila.data.long_video.pictures import ClipReader, PictureOptions
from megatron_longvila.data.media import MediaError
from megatron_longvila.data.workers import Assistant, Killed


def test_an_open_stage_says_so_and_the_next_one_does_not_run(tmp_path, capsys):
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


def test_what_gets_no_answer_is_given_up_if_the_user_says_so(tmp_path, capsys):
    root, work = tmp_path / "videos", tmp_path / "work"
    make_film(root / "a.mp4", [Scene("red", 30)])
    with ScriptedServer(fault=lambda digest, seen: "500") as server:
        build(work, root, server.url, ["segment"])
        flags = [*words("caption", work, root, server.url), "--max_tries", "2", "--give_up"]
        assert TOOL.main(flags) == 3 and "no question was answered and 3 of 3" in capsys.readouterr().err
        server.fault = lambda digest, seen: "500" if digest == server.requests[0] else None
        assert TOOL.main(flags) == 0
        (reject,) = read_lines(work / "caption.rejects.jsonl")
        assert reject["reason"].startswith("given up: no answer in 2 tries, the last one: server_error: HTTP 500")
        assert len(read_lines(work / "caption.jsonl")) == 2 and not (work / "caption.pending.jsonl").exists()
        build(work, root, server.url, ["summarize"])


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


def test_a_folder_without_a_video_ends_the_chain(tmp_path, capsys):
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
        monkeypatch.setattr(Assistant, "ask", lambda *_: Killed("took longer than 1e-06 s and was stopped"))  # a fast worker may win
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
