"""Frames by index are exactly the frames of the stream, whatever the container, codec, stamps, rotation or damage."""

import gc
import io
import itertools
import os
import struct
import tracemalloc

import av
import numpy as np
import pytest
from media import audio_bytes, image_bytes, read_number, video_bytes, write_frames
from PIL import Image, ImageOps

from megatron_longvila.config import VideoConfig
from megatron_longvila.data.images import open_image
from megatron_longvila.data.media import ByteRange, Deadline, DecodeTimeout, MediaError, MediaLimits, missing_bytes, open_source, sniff
from megatron_longvila.data.stream import VideoStream
from megatron_longvila.data.video import decode_frames, probe, select_frames

VFR_MS = [1500 + 40 * index + index * index * 7 % 23 + (20_000 if index > 30 else 0) for index in range(40)]
OPEN_GOP = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:threads=1:open-gop=1"}
OPEN_GOP_HEVC = {"x265-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:log-level=none:pools=1:open-gop=1"}
REFRESH = {"x264-params": "keyint=12:threads=1:bframes=0:intra-refresh=1"}
ALL_KEYS = {"x264-params": "keyint=1:threads=1"}
VIDEOS = {
    "h264": {},
    "h264 with sound": {"sound": True},
    "h264 odd stamps": {"stamps_ms": VFR_MS},
    "h264 odd stamps mkv": {"stamps_ms": VFR_MS, "container": "matroska"},
    "h264 transport stream": {"container": "mpegts"},
    "mpeg2 program stream": {"container": "mpeg", "encoder": "mpeg2video"},
    "h264 flv": {"container": "flv"},
    "h264 avi, no stamps": {"container": "avi"},
    "h264 fragments": {"muxer_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264 open groups": {"options": OPEN_GOP},
    "h264 gradual refresh": {"options": REFRESH, "container": "mpegts"},
    "hevc": {"encoder": "libx265"},
    "hevc open groups, odd stamps": {"encoder": "libx265", "options": OPEN_GOP_HEVC, "stamps_ms": VFR_MS, "container": "matroska"},
    "av1": {"encoder": "libsvtav1"},
    "vp9": {"encoder": "libvpx-vp9", "container": "webm"},
    "mpeg4 avi": {"encoder": "mpeg4", "container": "avi"},
}


def test_making_av1_leaves_the_scheduling_alone():
    before = os.sched_getscheduler(0)
    video_bytes(range(2), encoder="libsvtav1")
    assert os.sched_getscheduler(0) == before


def numbers(pixels_FSS3: np.ndarray) -> list[int | None]:
    return [read_number(picture) for picture in pixels_FSS3]


def linear(data: bytes) -> np.ndarray:
    """Every frame by decoding from start to end, without seeking or skipping."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", VIDEOS)
def test_every_frame_is_the_one_asked_for(name):
    data = video_bytes(**VIDEOS[name])
    facts = probe(data)
    assert (facts.kind, facts.num_frames, facts.width, facts.height) == ("video", 40, 64, 64)
    whole = linear(data)
    assert numbers(whole) == list(range(40))
    picked = [39, 1, 7, 8, 13, 13, 25, 0, 26]
    pixels, status = decode_frames(data, picked, image_size=64)
    np.testing.assert_array_equal(pixels, whole[picked])  # to the bit: native size, nothing is resized
    assert not status.any()
    for index in (11, 12, 23, 37):  # one at a time: around keyframes, where leading pictures are
        np.testing.assert_array_equal(decode_frames(data, [index], image_size=64)[0][0], whole[index])


def test_facts_follow_the_real_stamps():
    facts = probe(video_bytes(stamps_ms=VFR_MS))
    assert facts.duration_s == pytest.approx((VFR_MS[-1] - VFR_MS[0]) / 1000, abs=0.2)  # and the last frame's own duration
    assert facts.fps == pytest.approx(40 / facts.duration_s)
    facts = probe(video_bytes())
    assert (facts.duration_s, facts.fps, facts.codec, facts.extension) == (4.0, 10.0, "h264", "mp4")


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("fast_resize", [False, True])
def test_rotated_video_is_upright(rotation, fast_resize):
    data = video_bytes(range(500, 510), size=(64, 96), rotation=rotation)
    facts = probe(data)
    assert (facts.width, facts.height, facts.rotation) == (64, 96, rotation)
    pixels, _ = decode_frames(data, [0, 9], image_size=48, fast_resize=fast_resize)
    assert numbers(pixels) == [500, 509]
    padded, _ = decode_frames(data, [9], image_size=48, preprocess="pad", fast_resize=fast_resize)
    assert (padded[0, :, :6] == 127).all() and (padded[0, :, 42:] == 127).all()  # the filter mixes two pixels at the edge
    assert read_number(padded[0, :, 8:40]) == 509


def test_a_sample_without_bytes_is_no_end():
    """A recorder that drops a frame may leave an empty sample: the video goes on after it."""
    data = bytearray(video_bytes(range(20), encoder="mpeg4", options={"bf": "0", "g": "1"}))
    entry = data.index(b"stsz") + 16 + 4 * 8  # the size of the ninth sample goes to the one before it
    before, own = struct.unpack_from(">II", data, entry - 4)
    struct.pack_into(">II", data, entry - 4, before + own, 0)
    assert probe(bytes(data)).duration_s == 2.0
    assert numbers(decode_frames(bytes(data), range(8, 19), image_size=64)[0]) == list(range(9, 20))


def test_only_wanted_frames_are_converted_and_files_are_closed(monkeypatch, tmp_path):
    converted = []
    to_rgb = VideoStream.to_rgb
    monkeypatch.setattr(VideoStream, "to_rgb", lambda self, frame, *size: converted.append(frame.pts) or to_rgb(self, frame, *size))
    path = tmp_path / "clip.bin"  # the name says nothing
    path.write_bytes(video_bytes())
    decode_frames(path, [3, 17, 30], image_size=16)
    assert len(converted) == 3
    for bad in (b"", b"<html></html>", audio_bytes(), path.read_bytes()[:900]):
        with pytest.raises(MediaError):
            probe(bad)
    assert not [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(path)]


def test_a_range_of_a_file_reads_like_the_file(tmp_path):
    data = video_bytes()
    (tmp_path / "shard").write_bytes(b"x" * 777 + data + image_bytes(9))
    shard = str(tmp_path / "shard")
    assert numbers(decode_frames(ByteRange(shard, 777, len(data)), [5, 38], image_size=32)[0]) == [5, 38]
    assert numbers(decode_frames(ByteRange(shard, 777 + len(data), len(image_bytes(9))), [0], image_size=32)[0]) == [9]
    with pytest.raises(MediaError, match="cut|cannot be opened|no frame"):
        probe(ByteRange(shard, 777, len(data) // 2))


BAD = {
    "empty": (lambda: b"", "empty"),
    "html": (lambda: b"<!DOCTYPE html><html>not found", "HTML page"),
    "concat": (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "playlist"),
    "hls": (lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\nfile:///etc/passwd\n", "playlist"),
    "dash": (lambda: b'<?xml version="1.0"?><MPD></MPD>', "not a known"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "sound only": (audio_bytes, "no video track"),
    "cut mp4": (lambda: video_bytes()[:-500], "cut"),
    "cut faststart": (lambda: video_bytes(muxer_options={"movflags": "faststart"})[:-500], "cut"),
    "cut mkv": (lambda: video_bytes(container="matroska")[:-500], "cut"),
    "cut avi": (lambda: video_bytes(container="avi")[:-500], "cut"),
    "noise mp4": (lambda: b"\0\0\0\x14ftypisom" + bytes(range(256)) * 8, "cannot be opened"),
    "noise mkv": (lambda: b"\x1a\x45\xdf\xa3" + bytes(range(256)) * 8, "cannot be opened"),
    "avif": (lambda: b"\0\0\0\x1cftypavif" + bytes(64), "HEIF or AVIF"),
    "cut jpeg": (lambda: image_bytes(1, "JPEG")[:400], "damaged JPEG"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(name, tmp_path):
    make, reason = BAD[name]
    path = tmp_path / "clip.mp4"
    path.write_bytes(make())
    for source in (path, make(), ByteRange(str(path), 0, path.stat().st_size)):
        with pytest.raises(MediaError, match=reason):
            probe(source)


def test_missing_bytes_of_whole_files_is_zero():
    for settings in VIDEOS.values():
        with open_source(video_bytes(range(4), **{key: value for key, value in settings.items() if key != "stamps_ms"})) as file:
            assert missing_bytes(file, sniff(file.read(1024))) == 0


def test_no_fifo_and_no_folder_of_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    with pytest.raises(MediaError, match="plain file"):
        probe(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match="without frames"):
        probe(tmp_path / "nothing" if (tmp_path / "nothing").mkdir() else tmp_path / "nothing", fps=1.0)


def damaged(bad_frames: set[int]) -> bytes:
    """A video of keyframes alone in which the bytes of some are zero: just those do not decode."""
    data = bytearray(video_bytes(range(20), options=ALL_KEYS))
    with av.open(io.BytesIO(bytes(data))) as container:
        for index, packet in enumerate(packet for packet in container.demux(video=0) if packet.size):
            if index in bad_frames:
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    return bytes(data)


def test_bad_frames_are_replaced_by_the_nearest_good_one():
    data = damaged({4, 5, 6, 19})
    pixels, status = decode_frames(data, range(20), image_size=64)
    assert status.tolist() == [int(index in {4, 5, 6, 19}) for index in range(20)]
    assert numbers(pixels) == [0, 1, 2, 3, 3, 3, 7, *range(7, 19), 18]  # 5 is as near to 3 as to 7: the earlier one
    for policy in ("skip_sample", "fail"):
        with pytest.raises(MediaError, match="4 of 20 frames"):
            decode_frames(data, range(20), image_size=64, on_bad_frame=policy)
    with pytest.raises(MediaError, match="none of the 2"):
        decode_frames(data, [4, 5], image_size=64)


@pytest.mark.parametrize("share", [1, 3, 7])
def test_replacement_does_not_depend_on_the_share_of_a_rank(share):
    data, selected = damaged({4, 5, 6, 19}), list(range(2, 20))
    whole, status = decode_frames(data, selected, image_size=64)
    parts = [
        decode_frames(data, selected[start : start + share], image_size=64, siblings=selected) for start in range(0, len(selected), share)
    ]
    np.testing.assert_array_equal(np.concatenate([pixels for pixels, _ in parts]), whole)
    np.testing.assert_array_equal(np.concatenate([status for _, status in parts]), status)


def test_limits_and_time():
    data = video_bytes(sound=True)
    for limits, reason in (
        (MediaLimits(max_pixels=64 * 64 - 1), "max_pixels=4095"),
        (MediaLimits(max_frames=39), "max_frames=39"),
        (MediaLimits(max_streams=1), "max_streams=1|cannot be opened"),
        (MediaLimits(max_bytes=len(data) - 1), "max_bytes"),
    ):
        with pytest.raises(MediaError, match=reason):
            probe(data, limits=limits)
        with pytest.raises(MediaError, match=reason):
            decode_frames(data, [0], image_size=16, limits=limits)
    probe(data, limits=MediaLimits(64 * 64, 40, 2, len(data)))
    with pytest.raises(DecodeTimeout, match="timeout_s=0"):
        decode_frames(data, [0], image_size=16, timeout_s=0.0)
    with pytest.raises(MediaError, match="has 40 frames, but frame 40"):
        decode_frames(data, [40], image_size=16)


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_images_are_media_of_one_frame(kind):
    data = image_bytes(77, kind)
    facts = probe(data)
    assert (facts.kind, facts.num_frames, facts.duration_s) == ("image", 1, 0.0)
    pixels, status = decode_frames(data, [0], image_size=32)
    assert numbers(pixels) == [77] and pixels.dtype == np.uint8 and status.tolist() == [0]


@pytest.mark.parametrize(("orientation", "rotation"), [(6, 90), (8, 270), (3, 180), (2, 0)])
def test_exif_orientation(orientation, rotation):
    data = image_bytes(1234, "JPEG", size=(64, 96), orientation=orientation)
    facts = probe(data)
    assert (facts.width, facts.height, facts.rotation) == (64, 96, rotation)
    assert numbers(decode_frames(data, [0], image_size=64)[0]) == [1234]


def test_a_turned_picture_with_exif_fields_of_the_wrong_kind():
    """Cameras and editors write them; only the orientation matters here."""
    picture = Image.open(io.BytesIO(image_bytes(99, size=(64, 96))))
    for orientation, wrong in itertools.product(range(1, 9), [(0x010E, 3, 72), (0x011A, 3, 72), (0x0100, 9, 0xFFFFFFFF)]):
        entries = sorted([(0x0112, 3, orientation), wrong])  # a number as description, a short as resolution, a width of -1
        body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
        file = io.BytesIO()
        picture.save(file, "JPEG", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4), quality=95)
        picture.getexif()[0x0112] = orientation
        found, expected = open_image(file.getvalue())[0], ImageOps.exif_transpose(picture)
        assert found.size == expected.size
        assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_with_damaged_exif_is_upright(kind):
    file = io.BytesIO()
    Image.open(io.BytesIO(image_bytes(99))).save(file, kind, exif=b"Exif\0\0no TIFF header")
    assert numbers(decode_frames(file.getvalue(), [0], image_size=64)[0]) == [99]


def encode(image: Image.Image, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **settings)
    return file.getvalue()


def test_transparency_palettes_and_depths():
    def pixel(data: bytes) -> list[int]:
        return decode_frames(data, [0], image_size=4)[0][0, 0, 0].tolist()

    assert pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == [255, 255, 255]  # invisible red is the white page
    assert pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == [255, 0, 0]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(encode(palette)) == [10, 20, 30]
    assert pixel(encode(palette, transparency=1)) == [255, 255, 255]
    assert pixel(encode(Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)))) == [128, 128, 128]  # 16 bit: scaled, not clipped
    assert pixel(encode(Image.new("L", (4, 4), 7))) == [7, 7, 7]
    assert pixel(encode(Image.new("1", (4, 4), 1))) == [255, 255, 255]


def test_pixels_are_pillows_bicubic_and_the_mean_colour():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8))
    pixels, _ = decode_frames(encode(image), [0], image_size=14)
    np.testing.assert_array_equal(pixels[0], np.asarray(image.resize((14, 14), Image.Resampling.BICUBIC)))
    canvas = np.full((31, 31, 3), 127, np.uint8)
    canvas[5:25] = np.asarray(image)
    padded, _ = decode_frames(encode(image), [0], image_size=31, preprocess="pad")
    np.testing.assert_array_equal(padded[0], canvas)
    with pytest.raises(ValueError, match="preprocess='dynamic'"):
        decode_frames(encode(image), [0], image_size=14, preprocess="dynamic")


def test_decompression_bomb(monkeypatch):
    with pytest.raises(MediaError, match="64 x 64 pixels, more than max_pixels=1000"):
        probe(image_bytes(1), limits=MediaLimits(max_pixels=1000))
    for most, reason in ((3000, "more than Pillow's MAX_IMAGE_PIXELS=3000"), (1000, "decompression bomb")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)  # Pillow's own limit counts as well, and refuses by itself past twice
        with pytest.raises(MediaError, match=reason):
            probe(image_bytes(1))


def test_folder_of_frames(tmp_path):
    folder = write_frames(tmp_path / "frames", range(100, 112))
    (folder / ".hidden").write_text("not a frame")
    facts = probe(folder, fps=2.0)
    assert (facts.kind, facts.num_frames, facts.duration_s, facts.fps) == ("frames", 12, 6.0, 2.0)
    assert numbers(decode_frames(folder, [11, 2, 10], image_size=32)[0]) == [111, 102, 110]
    with pytest.raises(MediaError, match="`fps` > 0"):
        probe(folder)
    (folder / "frame_3.png").write_bytes(b"broken")
    with pytest.raises(MediaError, match=r"frame 3 \(frame_3.png\)"):
        probe(folder, fps=2.0)
    pixels, status = decode_frames(folder, [2, 3, 4], image_size=32)
    assert numbers(pixels) == [102, 102, 104] and status.tolist() == [0, 1, 0]


# ------------------------------------------------------------------------------------------------ which frames


def test_uniform_rule():
    for num_frames in range(1, 60):
        for wanted in range(1, 60):
            indices = select_frames(num_frames, 1.0, VideoConfig(num_frames=wanted))
            assert len(indices) == min(wanted, num_frames) == len(set(indices))
            assert indices == sorted(indices) and indices[0] == 0
            assert wanted == 1 or indices[-1] == num_frames - 1
    assert select_frames(10, 1.0, VideoConfig(num_frames=4)) == [0, 3, 6, 9]
    assert select_frames(100, 1.0, VideoConfig(num_frames=4)) == [0, 33, 66, 99]
    assert select_frames(6, 1.0, VideoConfig(num_frames=3)) == [0, 2, 5]  # 2.5 is rounded to the even neighbour


def test_fps_capped_rule():
    def select(length, duration_s, **fields):
        return select_frames(length, duration_s, VideoConfig(frame_rule="fps_capped", **fields))

    assert select(300, 10.0, num_frames=8, fps=2.0) == [0, 42, 85, 128, 170, 213, 256, 299]  # 10 s >= 8 / 2: N over all of it
    assert select(90, 3.0, num_frames=8, fps=2.0) == [0, 17, 35, 53, 71, 89]  # int(3 * 2) = 6
    assert select(120, 4.0, num_frames=8, fps=2.0) == [0, 17, 34, 51, 68, 85, 102, 119]  # exactly N / fps
    assert select(30, 0.4, num_frames=8, fps=2.0) == [0, 29]  # at least 2
    assert select(30, 0.4, num_frames=1, fps=2.0) == [0]  # but never more than the cap
    assert select(3, 3.0, num_frames=8, fps=2.0) == [0, 0, 0, 1, 1, 2]  # more often than the video has frames


def test_fps_head_rule():
    def select(length, duration_s, **fields):
        return select_frames(length, duration_s, VideoConfig(frame_rule="fps_head", **fields))

    assert select(300, 10.0, num_frames=4, fps=2.0) == [0, 15, 30, 45]  # only the first 4 / 2 s of the video
    assert select(300, 10.0, num_frames=100, fps=1.0) == [0, 30, 60, 90, 120, 150, 180, 210, 240, 270]  # 10 s is past the end
    assert select(90, 3.0, num_frames=100, fps=10.0) == list(range(0, 90, 3))  # 0.1 * 30 is 3, not 2.9999
    assert select(30, 0.4, num_frames=8, fps=2.0) == [0]


@pytest.mark.parametrize("rule", ["uniform", "fps_capped", "fps_head"])
def test_no_frames_and_one_frame(rule):
    assert select_frames(1, 0.0, VideoConfig(frame_rule=rule, num_frames=8)) == [0]
    with pytest.raises(ValueError, match="num_frames=0: at least 1"):
        select_frames(10, 1.0, VideoConfig(frame_rule=rule, num_frames=0))
    with pytest.raises(ValueError, match="num_frames=0"):
        select_frames(0, 0.0, VideoConfig(frame_rule=rule))
    if rule != "uniform":
        with pytest.raises(ValueError, match="fps=0"):
            select_frames(10, 1.0, VideoConfig(frame_rule=rule, fps=0))


def test_a_frame_is_let_go_once_it_is_read():
    """By its references alone: the decoded frames of a long video must not wait for the garbage collector."""

    def held() -> int:
        return sum(isinstance(one, av.VideoFrame) for one in gc.get_objects())

    data = video_bytes(range(40), rotation=90, size=(64, 96))
    gc.collect()
    before = held()
    gc.disable()
    try:
        with VideoStream(data, Deadline(None), MediaLimits()) as stream:
            assert len(stream.read(list(range(40)), stream.to_rgb)) == 40
            assert held() - before <= 2  # the first one, whose side data was looked at, and the decoder's next
    finally:
        gc.enable()


def test_memory_is_that_of_the_frames_kept():
    data, kept = video_bytes(range(40)), 40 * 256 * 256 * 3
    decode_frames(data, [0], image_size=256)
    tracemalloc.start()
    pixels, _ = decode_frames(data, range(40), image_size=256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pixels.nbytes == kept and peak < 1.2 * kept  # nothing is held twice, but for the frame at hand
