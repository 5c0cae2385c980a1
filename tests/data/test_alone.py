"""A frame looks the same whichever frames are read with it: alone, as the share of a rank, or with all others; also in damaged files."""

import gc
import io
import random
from fractions import Fraction

import av
import numpy as np
import pytest

from megatron_longvila.data.media import DEFAULT_LIMITS, Deadline
from megatron_longvila.data.nal import is_unreferenced
from megatron_longvila.data.stream import VideoStream

SIZE, NUM_FRAMES = (192, 112), 60
# The same bytes on every x86 processor: the damage drawn below depends on them.
X264 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:threads=1:cpu-independent=1:"
MPEG = {"g": "12", "bf": "2", "b": "1500000", "flags": "+bitexact"}
VIDEOS = {
    "h264": ("libx264", "mp4", {"preset": "fast", "x264-params": X264 + "open-gop=0"}),
    "h264 open groups": ("libx264", "mp4", {"preset": "fast", "x264-params": X264 + "open-gop=1"}),
    "h264 gradual refresh": ("libx264", "mp4", {"preset": "fast", "x264-params": X264 + "intra-refresh=1"}),
    "mpeg2 transport stream": ("mpeg2video", "mpegts", MPEG),
    "mpeg2 program stream": ("mpeg2video", "mpeg", MPEG),
    "mpeg4": ("mpeg4", "mp4", MPEG),
}


def moving(encoder: str, container: str, options: dict[str, str]) -> bytes:
    """A video of a texture that moves, so that frames refer to one another and each is different."""
    width, height = SIZE
    texture = np.kron(np.random.default_rng(0).integers(0, 255, (100, 100), np.uint8), np.ones((8, 8), np.uint8))
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        video = output.add_stream(encoder, rate=25, options=options)
        video.width, video.height, video.pix_fmt, video.codec_context.thread_count = width, height, "yuv420p", 1
        for number in range(NUM_FRAMES):
            planes = np.full((height * 3 // 2, width), 128, np.uint8)
            planes[:height] = texture[2 * number : 2 * number + height, 3 * number : 3 * number + width]
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    return file.getvalue()


def hurt(data: bytes, seed: int) -> bytes:
    """A few bytes changed, at places that differ by `seed`; none where `seed` is 0."""
    draw, damaged = random.Random(seed), bytearray(data)
    for _ in range(3 if seed else 0):
        place = draw.randrange(len(data) // 20, len(data) * 9 // 10)
        damaged[place : place + 4] = draw.randbytes(4)
    return bytes(damaged)


def shown(data: bytes, indices: list[int]) -> dict[int, bytes | None]:
    """By index; frames that do not decode, or that the damage took away, are None."""
    with VideoStream(data, Deadline(None), DEFAULT_LIMITS) as stream:
        present = [index for index in indices if index < stream.timeline.num_frames]
        found = stream.read(present, lambda frame: stream.to_rgb(frame).tobytes())
    return {index: found.get(index) for index in indices}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_frame_does_not_depend_on_those_read_with_it(name):
    video = moving(*VIDEOS[name])
    for seed in (0, 1, 2, 15, 25):
        data = hurt(video, seed)
        together = shown(data, list(range(NUM_FRAMES)))
        shares = [list(range(first, NUM_FRAMES, 7)) for first in range(7)] + [[index] for index in range(NUM_FRAMES)]
        for share in shares:
            assert [index for index, picture in shown(data, share).items() if picture != together[index]] == [], (seed, share)


def test_a_lost_frame_that_others_refer_to_is_seen_by_all_of_them():
    """FFmpeg's decoder, where it may drop frames that no other refers to, takes a packet without any frame for one of these."""
    data = moving(*VIDEOS["h264"])
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.video[0]
        packets = [bytes(packet) for packet in file.demux(stream) if packet.size and not packet.is_keyframe]
        referred_to = [packet for packet in packets if not is_unreferenced(packet, stream.codec_context.extradata)]
    for packet in referred_to[2::3]:
        place = data.index(packet) + 4
        assert data[place] & 31 == 1  # a slice, behind its length; now it is filler
        damaged = data[:place] + b"\x4c" + data[place + 1 :]
        together = shown(damaged, list(range(NUM_FRAMES)))
        assert None in together.values()
        for share in [list(range(first, NUM_FRAMES, 7)) for first in range(7)]:
            assert shown(damaged, share) == {index: together[index] for index in share}


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_the_packets_that_may_be_dropped_are_those_that_the_decoder_drops(container):
    with av.open(io.BytesIO(moving("libx264", container, VIDEOS["h264"][2]))) as file:
        stream = file.streams.video[0]
        context = stream.codec_context
        packets = [packet for packet in file.demux(stream) if packet.size]
        kept = [packet.pts for packet in packets if not is_unreferenced(bytes(packet), context.extradata)]
        context.thread_count, context.skip_frame = 1, "NONREF"
        decoded = [frame.pts for packet in [*packets, None] for frame in context.decode(packet)]
        assert len(packets) == NUM_FRAMES
        assert 10 < len(kept) < 50
        assert sorted(kept) == decoded
        one = next(bytes(packet) for packet in packets if is_unreferenced(bytes(packet), context.extradata))
        assert [is_unreferenced(one[:size], context.extradata) for size in (0, 1, 4)] == [False, False, False]


def decoded_frames() -> list[av.VideoFrame]:
    return [one for one in gc.get_objects() if isinstance(one, av.VideoFrame) and one.format and one.format.name == "yuv420p"]


def test_the_decoder_gets_its_buffers_back():
    """What a decoder shows in place of a lost slice is what its buffers held before: they must not depend on which frames were read."""
    with VideoStream(moving(*VIDEOS["mpeg2 transport stream"]), Deadline(None), DEFAULT_LIMITS) as stream:
        gc.collect()
        before = decoded_frames()  # held, so that no new one takes the place of an old one
        gc.disable()
        try:
            assert len(stream.read([4, 5], stream.to_rgb)) == 2
            assert len(decoded_frames()) == len(before)
        finally:
            gc.enable()


@pytest.mark.parametrize("name", ["mpeg2 program stream", "h264 gradual refresh"])
def test_a_frame_read_alone_is_the_one_that_reading_on_from_the_start_shows(name):
    """A seek in a program stream may land within a frame; a gradual refresh may last longer than to the next one."""
    data = moving(*VIDEOS[name])
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        expected = [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]
    assert [index for index in range(NUM_FRAMES) if shown(data, [index])[index] != expected[index]] == []


def test_packets_are_let_go_once_they_are_decoded():
    """The packet after a group is read with it and kept for the next group: one at a time, not a chain of all."""
    with VideoStream(moving("mpeg4", "mp4", {"g": "1"}), Deadline(None), DEFAULT_LIMITS) as stream:
        assert len(stream.timeline.key_stamps) == NUM_FRAMES
        gc.collect()
        before = sum(isinstance(one, av.Packet) for one in gc.get_objects())
        assert len(stream.read(list(range(NUM_FRAMES)), stream.to_rgb)) == NUM_FRAMES
        gc.collect()
        assert sum(isinstance(one, av.Packet) for one in gc.get_objects()) <= before + 1
