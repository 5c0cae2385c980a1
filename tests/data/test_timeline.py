"""A stored timeline reads the same frames as the file itself, without going through the file, and damage to it is told."""

import io
import json
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from media import paint, read_number, video_bytes

from megatron_longvila.data.media import DEFAULT_LIMITS, Deadline, MediaError
from megatron_longvila.data.preprocess import Options, preprocess
from megatron_longvila.data.shards import open_dataset
from megatron_longvila.data.stream import VideoStream
from megatron_longvila.data.timeline import from_packets, pack, unpack
from megatron_longvila.data.video import decode_frames, probe

UNEVEN_MS = [1500 + 40 * index + index * index * 7 % 23 + (20_000 if index > 30 else 0) for index in range(40)]
OPEN = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:threads=1:open-gop=1"}
VIDEOS = {
    "mp4": {},
    "uneven matroska": {"stamps_ms": UNEVEN_MS, "container": "matroska"},
    "open groups": {"options": OPEN},
    "transport stream": {"container": "mpegts"},
    "av1": {"encoder": "libsvtav1"},
    "hevc": {"encoder": "libx265"},
}


def test_leading_and_hidden_pictures():
    """Decode order: I0 P3 B1 B2 | I6 B4 B5 (leading, refer to P3) P7; and one packet before the first keyframe."""
    pts = np.array([-1, 0, 3, 1, 2, 6, 4, 5, 7])
    shown = np.array([True] * 8 + [False])
    timeline = from_packets(pts, shown, {1: (0, None), 5: (6, 4)}, 7.0)
    assert timeline.pts_F.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert timeline.position_F.tolist() == [1, 3, 4, 2, 6, 7, 5]
    assert timeline.key_position_F.tolist() == [1, 1, 1, 1, 1, 1, 5]
    again = unpack(pack(timeline))
    assert again.key_stamps == {1: (0, None), 5: (6, 4)} and again.packets == timeline.packets and again.duration_s == 7.0
    for name in ("pts_F", "position_F", "key_position_F", "pts_P"):
        np.testing.assert_array_equal(getattr(again, name), getattr(timeline, name))


@pytest.mark.parametrize("name", VIDEOS)
def test_the_same_frames_without_reading_the_packet_list(name, monkeypatch):
    data = video_bytes(range(40), **VIDEOS[name])
    facts = probe(data)
    picked = [39, 1, 7, 8, 13, 25, 0, 26, 11, 12]
    expected = decode_frames(data, picked, image_size=64)[0]
    monkeypatch.setattr(VideoStream, "_scan", lambda self: pytest.fail("went through the whole file"))
    for indices in (picked, [12], [39]):
        pixels, status = decode_frames(data, indices, image_size=64, timeline=facts.timeline)
        np.testing.assert_array_equal(pixels, expected[[picked.index(index) for index in indices]])
        assert not status.any()
    with VideoStream(data, Deadline(None), DEFAULT_LIMITS, unpack(facts.timeline)) as stream:
        assert (stream.timeline.num_frames, stream.timeline.duration_s) == (facts.num_frames, facts.duration_s)


def with_edits(data: bytes, edits: list[tuple[int, int]]) -> bytes:
    """An MP4 that shows (duration in the movie's time, start in the medium's time) one after the other."""
    body = struct.pack(">II", 0, len(edits)) + b"".join(struct.pack(">IiI", *edit, 1 << 16) for edit in edits)

    def rebuilt(boxes: bytes, path: tuple[str, ...]) -> bytes:
        out, place = b"", 0
        while place < len(boxes):
            size, kind = struct.unpack_from(">I4s", boxes, place)
            inside = boxes[place + 8 : place + size]
            if kind.decode() == path[0]:
                inside = rebuilt(inside, path[1:]) if path[1:] else body
            out += struct.pack(">I4s", len(inside) + 8, kind) + inside
            place += size
        return out

    return rebuilt(data, ("moov", "trak", "edts", "elst"))  # moov stands behind the samples, whose places stay the same


def test_a_second_edit_between_keyframes():
    """Its hidden keyframe has a stamp from before the first edit's end: that is no second recording."""
    data = video_bytes(range(40), options={"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=0:threads=1"})
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frame = int(1 / stream.average_rate / stream.time_base)
        milliseconds = float(1000 / stream.average_rate)
    edited = with_edits(data, [(round(15.5 * milliseconds), 0), (round(10 * milliseconds), 20 * frame)])
    with av.open(io.BytesIO(edited)) as container:
        shown = [read_number(one.to_ndarray(format="rgb24")) for one in container.decode(video=0)]
    assert shown[:17] == [*range(16), 20]
    facts = probe(edited)
    assert facts.timeline and facts.num_frames == len(shown)
    assert [read_number(one) for one in decode_frames(edited, list(range(len(shown))), image_size=64)[0]] == shown


def test_a_stored_timeline_of_mixed_recordings_is_refused():
    """As stored by versions that sorted the frames of several by their stamps."""
    pts = np.array([0, 1, 2, 3, 0, 1, 2, 3]) + np.array([0] * 4 + [2] * 4) * 0.5
    mixed = from_packets((pts * 2).astype(np.int64), np.ones(8, bool), {0: (0, 0), 4: (2, 2)}, 4.0)
    with pytest.raises(MediaError, match="mixes recordings put one after the other; preprocess it again"):
        unpack(pack(mixed))


@pytest.mark.parametrize("name", ["mp4", "open groups", "hevc"])
def test_damaged_frames_are_the_same_ones(name):
    """Damage in the packets after the list was made: bad frames are found and replaced as without the list, never shown as others."""
    data = bytearray(video_bytes(range(40), **VIDEOS[name]))
    timeline = probe(bytes(data)).timeline
    with av.open(io.BytesIO(bytes(data))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[14:17]:
        data[packet.pos + 5 : packet.pos + packet.size] = bytes(packet.size - 5)
    expected, bad = decode_frames(bytes(data), range(40), image_size=64)
    pixels, status = decode_frames(bytes(data), range(40), image_size=64, timeline=timeline)
    assert 0 < bad.sum() < 40
    np.testing.assert_array_equal(status, bad)
    np.testing.assert_array_equal(pixels, expected)
    shown = [read_number(picture) for picture in pixels]
    assert all(number == index for index, (number, one) in enumerate(zip(shown, status, strict=True)) if not one)
    cut = bytes(data[: packets[20].pos])
    with pytest.raises(MediaError, match="cut|cannot be opened"):
        decode_frames(cut, [0], image_size=64, timeline=timeline)


def test_the_list_of_another_file_shows_no_wrong_frame():
    """Its stamps name no packets here: every frame is bad, and none is taken for another."""
    other = probe(video_bytes(range(40), container="matroska", stamps_ms=[7 + 33 * number for number in range(40)])).timeline
    with pytest.raises(MediaError, match="none of the 3"):
        decode_frames(video_bytes(range(40)), [3, 17, 30], image_size=64, timeline=other)


def test_nothing_is_stored_where_frames_are_counted():
    data = video_bytes(range(20), encoder="mpeg4", container="avi")
    assert probe(data).timeline == b""
    assert [read_number(one) for one in decode_frames(data, [3, 19], image_size=64, timeline=b"")[0]] == [3, 19]


def test_an_even_rate_takes_little_room():
    pts = np.arange(108_000) * 512  # an hour at 30 frames per second
    timeline = from_packets(
        pts, np.ones(len(pts), bool), {position: (position * 512, position * 512) for position in range(0, 108_000, 60)}, 3600.0
    )
    assert len(pack(timeline)) < 108_000 / 16


def test_damage_is_told():
    data = video_bytes(range(20))
    whole = probe(data).timeline
    for broken in (b"LVT1", whole[:-1], b"LVT2" + whole[4:], whole[:30] + bytes([whole[30] ^ 255]) + whole[31:]):
        with pytest.raises(MediaError, match="timeline that is damaged"):
            decode_frames(data, [0], image_size=64, timeline=broken)


@pytest.mark.parametrize("store", ["tar", "reference"])
def test_a_dataset_stores_them(tmp_path, store, monkeypatch):
    (tmp_path / "media").mkdir()
    rows = []
    for number in range(3):
        name = f"{number}.{'avi' if number == 1 else 'mp4'}"
        settings = {"encoder": "mpeg4", "container": "avi"} if number == 1 else {}
        (tmp_path / "media" / name).write_bytes(video_bytes(range(10 * number, 10 * number + 20), **settings))
        talk = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "Yes."}]
        rows.append({"id": str(number), "video": name, "conversations": talk})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(tmp_path / "rows.jsonl", tmp_path / "media", tmp_path / "out", store=store, num_workers=1)
    assert preprocess(options).changed and not preprocess(options).changed
    dataset = open_dataset(tmp_path / "out")
    media = [dataset.media[sample.media[0]] for sample in dataset.samples]
    assert [bool(dataset.timeline(one)) for one in media] == [True, False, True]
    monkeypatch.setattr(VideoStream, "_scan", lambda self: pytest.fail("went through the whole file"))
    pixels, _ = decode_frames(dataset.read(media[2]), [0, 19], image_size=64, timeline=dataset.timeline(media[2]))
    assert [read_number(one) for one in pixels] == [20, 39]

    path = tmp_path / "out" / "timelines.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MediaError, match="timelines.bin is cut"):
        dataset.timeline(media[2])
    monkeypatch.undo()
    assert preprocess(options).changed  # the way out that the error names
    assert dataset.timeline(media[2])


def test_a_dataset_of_before_lists_were_stored(tmp_path):
    """It opens and reads as it is; preprocessing it again adds the lists and changes neither its hash nor its shards."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.mp4").write_bytes(video_bytes(range(20)))
    talk = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "video": "a.mp4", "conversations": talk}) + "\n")
    output = tmp_path / "out"
    options = Options(tmp_path / "rows.jsonl", tmp_path / "media", output, num_workers=1)
    preprocess(options)
    new = {name: (output / name).read_bytes() for name in ("media.jsonl", "timelines.bin", "dataset.json")}

    (output / "timelines.bin").unlink()
    line = json.loads(new["media.jsonl"])
    line.pop("timeline")
    (output / "media.jsonl").write_text(json.dumps(line, separators=(",", ":")) + "\n")
    journal = output / "state" / "media.jsonl"
    header, entry = journal.read_text().splitlines()
    key, answer = json.loads(entry)
    answer.pop("timeline")
    journal.write_text(f"{header}\n{json.dumps([key, answer])}\n")

    dataset = open_dataset(output)
    (media,) = dataset.media.values()
    assert dataset.timeline(media) == b"" and dataset.hash == json.loads(new["dataset.json"])["hash"]
    assert [read_number(one) for one in decode_frames(dataset.read(media), [3, 19], image_size=64, timeline=b"")[0]] == [3, 19]
    shard = output / "shards" / media.shard
    written = shard.stat().st_mtime_ns
    assert preprocess(options).changed and not preprocess(options).changed
    assert {name: (output / name).read_bytes() for name in new} == new and shard.stat().st_mtime_ns == written


@pytest.mark.parametrize("offset_s", [0.0, 0.433, 2.033, 10.0])
@pytest.mark.parametrize("keyint", [12, 250])
def test_recordings_put_one_after_the_other_are_shown_so(offset_s, keyint):
    """Their stamps may begin anew, or lie in each other."""
    options = {"x264-params": f"keyint={keyint}:min-keyint={keyint}:scenecut=0:bframes=3:threads=1"}
    one = video_bytes(range(24), container="mpegts", options=options)
    other = video_bytes(range(100, 124), container="mpegts", options=options, muxer_options={"output_ts_offset": str(offset_s)})
    for data, expected in ((one + other, [*range(24), *range(100, 124)]), (other + one, [*range(100, 124), *range(24)])):
        facts = probe(data)
        pixels, _ = decode_frames(data, range(48), image_size=64, timeline=facts.timeline)
        assert [read_number(picture) for picture in pixels] == expected
        assert facts.duration_s == pytest.approx(12.2 if offset_s == 10 and data[: len(one)] == one else 4.8)


@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_frames_that_an_avi_dropped_take_their_time(b_frames):
    """Capture programs write a chunk without bytes for each; the frame before stays on screen."""
    kept = [*range(5), *range(10, 20), *range(26, 40)]
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        video = output.add_stream("mpeg4", rate=10, options={"bf": b_frames})
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for number in kept:
            frame = av.VideoFrame.from_ndarray(paint(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    facts = probe(file.getvalue())
    assert (facts.num_frames, facts.duration_s) == (29, 4.0)
    assert [read_number(picture) for picture in decode_frames(file.getvalue(), range(29), image_size=64)[0]] == kept
    if b_frames == "0":  # with B-frames, the muxer writes the empty chunks a few frames late
        with VideoStream(file.getvalue(), Deadline(None), DEFAULT_LIMITS) as stream:
            np.testing.assert_allclose(stream.times_s(), np.array(kept) / 10)
