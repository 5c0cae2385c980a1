"""Prepared copies show the frames they should, upright, at an even pace, with keyframes where they were asked for; runs can be killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from media import MATRICES, image_bytes, read_number, set_matrix, video_bytes
from programs import ROOT, environment, load_script

from megatron_longvila.data.media import DEFAULT_LIMITS, Deadline, MediaError
from megatron_longvila.data.output import PreprocessError
from megatron_longvila.data.reencode import AsWanted, Options, Settings, prepare, reencode
from megatron_longvila.data.stream import VideoStream
from megatron_longvila.data.video import decode_frames, probe

COLOURS = {  # tags of a source: matrix, range, primaries, transfer
    "601": (6, 1, 6, 6),
    "709": (1, 1, 1, 1),
    "709 full range": (1, 2, 1, 1),
    "601 full range": (5, 2, 2, 2),
    "2020": (9, 1, 9, 14),
    "2020 with constant luminance": (10, 1, 9, 16),
    "untagged": (2, 0, 2, 2),
}
TAGS = ("colorspace", "color_range", "color_primaries", "color_trc")

ONE_GROUP = {"x264-params": "keyint=250:scenecut=0:bframes=3:threads=1"}
SETTINGS = Settings(height=64, keyframe_s=0.5, preset="ultrafast", crf=10)


def make(source: bytes, target: Path, settings: Settings = SETTINGS) -> list[int | None]:
    """Re-encode; the numbers painted in the copy's frames."""
    path = target.with_suffix(".source")
    path.write_bytes(source)
    count = reencode(path, target, settings, timeout_s=None, limits=DEFAULT_LIMITS)
    facts = probe(target)
    assert facts.num_frames == count and facts.rotation == 0
    pixels, status = decode_frames(target, range(count), image_size=64)
    assert not status.any()
    return [read_number(picture) for picture in pixels]


def keyframes(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
        return [index for index, packet in enumerate(sorted(packets, key=lambda packet: packet.pts)) if packet.is_keyframe]


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_every_frame_once_upright_with_even_keyframes(tmp_path, rotation):
    numbers = make(video_bytes(range(40), options=ONE_GROUP, rotation=rotation, size=(128, 96)), tmp_path / "a.mp4")
    assert numbers == list(range(40))
    assert keyframes(tmp_path / "a.mp4") == list(range(0, 40, 5))
    facts = probe(tmp_path / "a.mp4")
    assert (facts.width, facts.height, facts.fps, facts.codec) == (86, 64, 10.0, "h264")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stamps = sorted(packet.pts * packet.time_base for packet in container.demux(video=0) if packet.pts is not None)
    assert len(set(np.diff(stamps).tolist())) == 1 and stamps[0] == 0


def coloured(path: Path, tags: tuple[int, ...], *, encoder: str = "libx264", format: str = "yuv420p") -> Path:
    """A video of one colour whose planes hold 90, 160 and 100, with colour tags."""
    with av.open(str(path), "w", format="mp4") as output:
        video = output.add_stream(encoder, rate=10, options={"crf": "0"})
        video.width, video.height, video.pix_fmt = 96, 96, format
        for name, tag in zip(TAGS, tags, strict=True):
            setattr(video.codec_context, name, tag)
        for number in range(4):
            frame = av.VideoFrame(96, 96, format)
            for plane, level in zip(frame.planes, (90, 160, 100), strict=False):
                plane.update(bytes([level]) * plane.buffer_size)
            for name, tag in zip(TAGS, tags, strict=True):
                setattr(frame, name, tag)
            frame.pts = number
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    return path


@pytest.mark.parametrize("rotation", [0, 90])
@pytest.mark.parametrize("kind", COLOURS)
def test_copies_keep_the_colours(tmp_path, kind, rotation):
    """To 4 of 255: what one code value of luma (1.17) and one of chroma (2.15, blue of BT.2020) come to."""
    source = coloured(tmp_path / "a.mp4", COLOURS[kind])
    if rotation:
        source.write_bytes(set_matrix(source.read_bytes(), MATRICES[rotation]))
    reencode(source, tmp_path / "b.mp4", Settings(height=64, crf=1, preset="ultrafast"), timeout_s=None, limits=DEFAULT_LIMITS)
    before, after = (decode_frames(path, [1], image_size=64)[0].astype(int) for path in (source, tmp_path / "b.mp4"))
    assert np.abs(before - after).max() <= 4
    with av.open(str(tmp_path / "b.mp4")) as container:
        frame = next(container.decode(video=0))
    space, _, *others = COLOURS[kind]
    assert [frame.color_range in (0, 1), frame.color_primaries, frame.color_trc] == [True, *others]
    assert frame.colorspace == {5: 6, 10: 9}.get(space, space)  # two names of the matrix of BT.601, and two of BT.2020's


@pytest.mark.parametrize(("matrix", "name"), [(8, "YCgCo"), (12, "primaries"), (14, "ICtCp")])
def test_colours_that_cannot_be_read_are_named(tmp_path, matrix, name):
    source = coloured(tmp_path / "a.mp4", (matrix, 1, 9, 16))
    refusal = rf"matrix {matrix} \(.*{name}.*only 0 to 7, 9 and 10 are read; re-encode it in BT.709"
    with pytest.raises(MediaError, match=refusal):
        probe(source)
    with pytest.raises(MediaError, match=refusal):
        reencode(source, tmp_path / "b.mp4", SETTINGS, timeout_s=None, limits=DEFAULT_LIMITS)


def test_the_reserved_matrix_is_read_as_none_given(tmp_path):
    """x264 does not write it, other encoders do."""
    with VideoStream(video_bytes(range(2)), Deadline(None), DEFAULT_LIMITS) as stream:
        _, frame = next(stream.frames())
        expected = stream.to_rgb(frame)
        assert frame.colorspace == 2
        frame.colorspace = 3
        np.testing.assert_array_equal(stream.to_rgb(frame), expected)


def test_copies_of_rgb_keep_the_colours(tmp_path):
    source = coloured(tmp_path / "a.mp4", COLOURS["untagged"], encoder="libx264rgb", format="rgb24")
    reencode(source, tmp_path / "b.mp4", Settings(height=64, crf=1, preset="ultrafast"), timeout_s=None, limits=DEFAULT_LIMITS)
    before, after = (decode_frames(path, [1], image_size=64)[0].astype(int) for path in (source, tmp_path / "b.mp4"))
    assert np.abs(before - after).max() <= 4


def test_uneven_stamps_become_even_ones(tmp_path):
    stamps_ms = [0, 100, 200, 600, 700, 750, 800, 900]
    source = video_bytes(range(8), stamps_ms=stamps_ms, container="matroska")
    shown = make(source, tmp_path / "a.mp4", Settings(height=64, fps=10, preset="ultrafast", crf=10))
    ticks = (np.arange(len(shown)) + 0.5) * 100
    assert shown == [max(i for i, stamp in enumerate(stamps_ms) if stamp <= tick) for tick in ticks]
    assert len(shown) in (9, 10)  # the last frame's own length is the muxer's guess


def test_frames_that_do_not_decode_repeat_the_one_before(tmp_path):
    data = bytearray(video_bytes(range(40), options={"x264-params": "keyint=1:threads=1"}))
    with av.open(io.BytesIO(data)) as container:
        packets = {int(packet.pts * packet.time_base * 10): packet for packet in container.demux(video=0) if packet.pts is not None}
    for index in (20, 21, 39):
        data[packets[index].pos : packets[index].pos + packets[index].size] = bytes(packets[index].size)
    smaller = Settings(height=32, preset="ultrafast", crf=10)  # as it is, it would be left alone: every frame is a keyframe
    assert make(bytes(data), tmp_path / "a.mp4", smaller) == [*range(20), 19, 19, *range(22, 39), 38]


def test_a_video_as_wanted_is_left_alone(tmp_path):
    source = video_bytes(range(40), options=ONE_GROUP)
    make(source, tmp_path / "a.mp4")
    with pytest.raises(AsWanted):
        reencode(tmp_path / "a.mp4", tmp_path / "b.mp4", SETTINGS, timeout_s=None, limits=DEFAULT_LIMITS)
    for other in (Settings(height=32, keyframe_s=0.5), Settings(height=64, keyframe_s=0.3), Settings(height=64, keyframe_s=0.5, fps=5)):
        assert reencode(tmp_path / "a.mp4", tmp_path / "b.mp4", other, timeout_s=None, limits=DEFAULT_LIMITS) == (20 if other.fps else 40)
    with pytest.raises(MediaError, match="image"):
        make(image_bytes(1), tmp_path / "c.mp4")


def fill(folder: Path) -> Path:
    """Videos in strange places, a picture, and what cannot be used."""
    (folder / "sub dir").mkdir(parents=True)
    (folder / "long.mp4").write_bytes(video_bytes(range(60), options=ONE_GROUP, size=(96, 96)))
    (folder / "sub dir" / "\u00fcn\u00ef <b>.mkv").write_bytes(video_bytes(range(20), container="matroska", options=ONE_GROUP))
    (folder / "picture.png").write_bytes(image_bytes(3))
    (folder / "notes.txt").write_text("no media")
    (folder / "cut.mp4").write_bytes(video_bytes(range(20))[:500])
    (folder / ".hidden.mp4").write_bytes(b"x")
    (folder.parent / "outside.mp4").write_bytes(video_bytes(range(4)))
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    return folder


def test_a_folder(tmp_path):
    source = fill(tmp_path / "in")
    before = {path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()}
    options = Options(source, tmp_path / "out", SETTINGS, num_workers=2)
    report = prepare(options)
    assert (report.prepared, report.kept, report.changed) == (2, 1, True)
    assert {row["path"] for row in report.rejected} == {"notes.txt", "cut.mp4", "link.mp4"}
    assert not any(str(tmp_path) in row["reason"] for row in report.rejected)  # no place above the input folder
    assert report.bytes_before > 0 and report.bytes_after > 0 and report.decode_s_before > 0 and report.decode_s_after > 0
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {"long.mp4", "sub dir/\u00fcn\u00ef <b>.mkv", "picture.png", "state/lock", "state/prepared.jsonl"}
    assert {path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()} == before
    written = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names if not name.startswith("state")}

    again = prepare(options)
    assert not again.changed and (again.prepared, again.kept, again.rejected) == (2, 1, report.rejected)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == written
    (tmp_path / "out" / "long.mp4").unlink()
    assert prepare(options).changed and (tmp_path / "out" / "long.mp4").is_file()
    prepare(Options(source, tmp_path / "out", Settings(height=32, keyframe_s=0.5), num_workers=2))
    assert probe(tmp_path / "out" / "long.mp4").height == 32


def test_copies_of_what_changed_or_went_away(tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    for name in ("same.mp4", "changed.mp4", "spoilt.mp4", "sub/gone.mp4"):
        (source / name).write_bytes(video_bytes(range(12), options=ONE_GROUP))
    assert prepare(Options(source, output, SETTINGS, num_workers=1)).without_original == ()
    (source / "changed.mp4").write_bytes(video_bytes(range(30), options=ONE_GROUP))
    (source / "spoilt.mp4").write_bytes(b"no video any more")
    (source / "sub" / "gone.mp4").unlink()
    report = prepare(Options(source, output, SETTINGS, num_workers=1))
    assert [row["path"] for row in report.rejected] == ["spoilt.mp4"] and not (output / "spoilt.mp4").exists()
    assert report.without_original == ("sub/gone.mp4",) and (output / "sub" / "gone.mp4").is_file()
    assert probe(output / "changed.mp4").num_frames == 30
    tool = load_script(ROOT / "tools" / "prepare_video.py")
    assert tool.main(["--input", str(source), "--output", str(output), "--num_workers", "1"]) == 0
    assert "1 files below" in (said := capsys.readouterr().out) and "'sub/gone.mp4'" in said
    assert json.loads((output / "report.json").read_text())["without_original"] == ["sub/gone.mp4"]


def test_kept_files_are_links(tmp_path):
    """As --help says: no second copy on the disk."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "picture.png").write_bytes(image_bytes(3))
    assert prepare(Options(tmp_path / "in", tmp_path / "out", SETTINGS, num_workers=1)).kept == 1
    assert os.path.samefile(tmp_path / "in" / "picture.png", tmp_path / "out" / "picture.png")


def test_folders_that_cannot_be_meant(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(PreprocessError, match="not a folder"):
        prepare(Options(tmp_path / "none", tmp_path / "out", SETTINGS))
    for output in (tmp_path / "in", tmp_path / "in" / "out", tmp_path):
        with pytest.raises(PreprocessError, match="lie in one another"):
            prepare(Options(tmp_path / "in", output, SETTINGS))


def test_the_command_killed_and_run_again(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    data = video_bytes(range(200), options=ONE_GROUP, size=(256, 256))
    for number in range(4):
        (source / f"{number}.mp4").write_bytes(data)
    words = [sys.executable, str(ROOT / "tools" / "prepare_video.py"), "--input", str(source), "--output", str(tmp_path / "out")]
    words += ["--height", "128", "--preset", "ultrafast", "--num_workers", "1"]
    journal = tmp_path / "out" / "state" / "prepared.jsonl"
    with subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        end = time.monotonic() + 120
        while not (journal.exists() and b'"prepared"' in journal.read_bytes()) and time.monotonic() < end:
            time.sleep(0.01)
        assert run.poll() is None
        os.killpg(run.pid, signal.SIGKILL)
    assert journal.read_bytes().count(b'"prepared"') < 4
    first = (tmp_path / "out" / "0.mp4").stat().st_mtime_ns
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "4 videos re-encoded" in done.stdout and "times as fast" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prepared"] == 4 and report["decode_speedup"] > 0 and report["size_ratio"] > 0
    assert len({(tmp_path / "out" / f"{number}.mp4").read_bytes() for number in range(4)}) == 1  # the same whether interrupted or not
    assert not list((tmp_path / "out").glob(".*"))
    assert journal.read_bytes().count(b'"prepared"') == 4
    assert (tmp_path / "out" / "0.mp4").stat().st_mtime_ns == first  # what the first run had finished was left alone


def test_exit_codes(tmp_path, capsys):
    tool = load_script(ROOT / "tools" / "prepare_video.py")
    assert tool.main(["--input", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 1
    assert "not a folder" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    assert tool.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 1
    assert "nothing could be prepared" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--input", "a", "--output", "b", "--crf", "99"])
    assert stopped.value.code == 2
