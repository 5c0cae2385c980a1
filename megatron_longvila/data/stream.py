"""One video stream read exactly by frame index: the packet list, seeking per group of pictures, orientation.

Positions count packets in decode order; indices count frames in presentation order.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from megatron_longvila.data.colours import READ_AS, check_matrix
from megatron_longvila.data.media import SNIFF_BYTES, Deadline, MediaError, MediaLimits, MediaUnreadable, open_source, sniff
from megatron_longvila.data.nal import is_unreferenced
from megatron_longvila.data.orientation import orientation
from megatron_longvila.data.timeline import Timeline, counted, from_packets, starts_again

# Read ahead of the demuxer: fewer calls into Python per hour of video (PyAV's default is 32 KiB), little waste per seek.
_BUFFER_BYTES = 1 << 18
# Decoders that may drop the frames no other refers to, and report an error with the frame that has it. HEVC is left out: a "sub-layer
# non-reference" picture may be referred to by a higher temporal layer, and FFmpeg drops it all the same; so are AV1 and VP9 (no gain).
_MARKS_ITS_FRAMES = ("h264",)
# Decoders whose errors show in frames after the one that has them (FFmpeg's MPEG family): they always get all packets of a group.
_CARRIES_ERRORS = ("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "wmv3", "vc1", "h263", "flv")


class VideoStream:
    """The video track of a container, opened over any source. Close it, or use it as a context manager.

    `timeline` is that of an earlier visit: without it, the first look at any frame demuxes the whole file.

    Raises MediaError when the container has no video track, is damaged beyond opening, or is past a limit.
    """

    def __init__(self, source, deadline: Deadline, limits: MediaLimits, timeline: Timeline | None = None):
        self._deadline, self._limits = deadline, limits
        self._file = open_source(source, limits)
        self._container = None
        self._timeline = timeline
        self._ahead: deque[tuple[int, av.Packet]] = deque()  # read, but not yet decoded; `_rest` follows them
        self._rest: Iterator[tuple[int, av.Packet]] = iter(())
        self._transpose: Image.Transpose | None = None
        self._reported_rotation: int | None = None
        self._scaler = VideoReformatter()  # shared by all frames: each one's own would be set up again
        self.rotation = 0
        try:
            found = sniff(self._file.read(SNIFF_BYTES))
            if found.is_image:
                raise MediaError(f"is an image ({found.extension}), not a video")
            self.extension, self._demuxer = found.extension, found.reader
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None
        self._file.close()

    @property
    def timeline(self) -> Timeline:
        """Unless it was given, made at the first use by demuxing every packet once (reading the file, decoding nothing)."""
        if self._timeline is None:
            self._timeline = self._scan()
        return self._timeline

    def times_s(self) -> np.ndarray:
        """float64 [F]: when each frame is shown, in seconds from the first one."""
        timeline = self.timeline
        if not len(timeline.pts_P):  # ticks of frames, see `counted`
            ticks_F = timeline.pts_F - timeline.pts_F[0]
            return ticks_F * (timeline.duration_s / (ticks_F[-1] + 1))
        return (timeline.pts_F - timeline.pts_F[0]) * float(self._stream.time_base)

    def upright_size(self) -> tuple[int, int]:
        """(width, height) of the first frame that decodes, as it is meant to be seen. Raises MediaError when none does."""
        for index in range(min(self.timeline.num_frames, 32)):  # a stream may begin with a few damaged frames
            sizes = self.read([index], self._shown_size)
            if sizes:
                return sizes[index]
        raise MediaError("has a video track, but its first frames do not decode")

    def _shown_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        check_matrix(frame)
        return self.to_rgb(frame).shape[1::-1]

    def to_rgb(self, frame: av.VideoFrame, size: tuple[int, int] | None = None) -> np.ndarray:
        """Upright picture, uint8 [H, W, 3]; `size` (width, height before rotation) lets the decoder's scaler resize it."""
        if frame.width * frame.height > self._limits.max_pixels:
            raise MediaError(f"has a frame of {frame.width} x {frame.height} pixels, more than max_pixels={self._limits.max_pixels}")
        scaling = {} if size is None else {"width": size[0], "height": size[1], "interpolation": "BICUBIC"}
        matrix = READ_AS.get(int(frame.colorspace))
        rgb = self._scaler.reformat(frame, format="rgb24", src_colorspace=matrix, **scaling)
        rgb_HW3, transpose = rgb.to_ndarray(), self.orient(rgb)  # of the copy: `orient` keeps the buffers of what it looks at
        return rgb_HW3 if transpose is None else np.array(Image.fromarray(rgb_HW3).transpose(transpose))

    def orient(self, frame: av.VideoFrame) -> Image.Transpose | None:
        """What turns this frame upright; None where it is. A frame that does not say is turned as the one before it."""
        # A frame whose side data was looked at refers to itself and keeps its buffers until the collector runs: not for each one.
        if frame.rotation != self._reported_rotation:
            self._reported_rotation = frame.rotation
            matrix = frame.side_data.get("DISPLAYMATRIX")
            if matrix is not None:
                self.rotation, self._transpose = orientation(np.frombuffer(bytes(matrix), np.int32))
        return self._transpose

    @property
    def is_upright(self) -> bool:
        """Whether the frames read so far need no turning or mirroring."""
        return self._transpose is None

    def frames(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) of every frame that decodes without errors, in the order of presentation."""
        timeline = self.timeline
        numbers = {int(pts): index for index, pts in enumerate(timeline.pts_F)}
        counts = not len(timeline.pts_P)
        self._open()
        decoded = (frame for packet in self._packets_then_flush() for frame in self._decode(packet))
        for count, frame in enumerate(decoded):
            index = count if counts else numbers.get(frame.pts)
            if index is not None and not frame.is_corrupt:
                yield index, frame

    def read(
        self, indices: list[int], convert: Callable[[av.VideoFrame], object], found: MutableMapping[int, object] | None = None
    ) -> MutableMapping[int, object]:
        """Put `convert(frame)` of each sorted index into `found`, a new dict by default, and return that. Frames that do not decode, or
        only with errors, are missing."""
        found = {} if found is None else found
        if not len(self.timeline.pts_P):
            self._read_counting(set(indices), convert, found)
            return found
        for earlier in (0, 1, 2):  # again from further back: a keyframe that was none (a gradual refresh may outlast the next), or damage
            missing = [index for index in indices if index not in found]
            self._read_groups(missing, convert, found, earlier=earlier)
        return found

    def _open(self) -> None:
        def refuse(url, *_):
            raise MediaError(f"wants to open another file ({url!r})")

        if self._container is not None:
            self._container.close()
            self._container = None
        self._ahead.clear()
        self._file.seek(0)
        container_options = {"max_streams": str(self._limits.max_streams), "protocol_whitelist": ""}
        # Decoders already run while a container is opened. Only where the header lists the streams: PyAV 17 crashes on options otherwise.
        options = {"max_pixels": str(self._limits.max_pixels)} if self._demuxer in ("mov", "matroska", "avi") else {}
        try:
            self._container = av.open(
                self._file,
                format=self._demuxer,
                options=options,
                container_options=container_options,
                buffer_size=_BUFFER_BYTES,
                metadata_errors="replace",  # titles and comments in any encoding must not make a video unreadable
                io_open=refuse,
            )
        except (av.FFmpegError, MemoryError, UnicodeError) as error:
            raise MediaError(f"cannot be opened as {self.extension}: {_reason(error)}") from error
        if len(self._container.streams) > self._limits.max_streams:
            raise MediaError(f"has {len(self._container.streams)} streams, more than max_streams={self._limits.max_streams}")
        videos = [stream for stream in self._container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic]
        if not videos:
            kinds = sorted({stream.type for stream in self._container.streams}) or ["nothing"]
            raise MediaError(f"has no video track (it holds {', '.join(kinds)})")
        self._stream = videos[0]
        for stream in self._container.streams:
            if stream.index != self._stream.index and hasattr(stream, "discard"):  # PyAV 18: their bytes are not even read
                stream.discard = av.stream.Discard.all
        context = self._stream.codec_context
        if context is None:
            raise MediaError("is coded with a codec that this build of PyAV cannot decode")
        if context.width * context.height > self._limits.max_pixels:
            raise MediaError(f"has frames of {context.width} x {context.height} pixels, more than max_pixels={self._limits.max_pixels}")
        self.codec = context.name if context.name != "libdav1d" else "av1"
        context.thread_count = 1  # the loader runs many decoders side by side; and skipping per packet needs a decoder without lag
        context.options = {"max_pixels": str(self._limits.max_pixels)}

    def _packets(self) -> Iterator[av.Packet]:
        """Packets of the video track from where the container stands; ends at the end of the file or where the container breaks off."""
        packets = self._container.demux(self._stream)
        while True:
            self._deadline.check("reading packets")
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                return  # a cut file: what came before is still good
            except OSError as error:
                raise MediaUnreadable(f"cannot be read on: {error.strerror or error}") from error
            if packet is None:
                return
            if packet.size:  # else a sample without bytes (a dropped frame), or PyAV's sign of the end, which None follows
                yield packet

    def _scan(self) -> Timeline:
        pts, shown, durations, key_stamps = [], [], [], {}
        for packet in self._packets():
            if packet.is_keyframe:
                key_stamps[len(pts)] = (packet.pts, packet.dts)
            pts.append(packet.pts)
            durations.append(packet.duration)
            shown.append(not packet.is_discard)  # edit lists hide frames that only serve as references
            if len(pts) > self._limits.max_frames:
                raise MediaError(f"has more than max_frames={self._limits.max_frames} frames")
        if not pts:
            raise MediaError("has a video track without a single packet")
        # AVI has no presentation stamps: with B-frames its packets' times are those of other frames
        if self.extension == "avi" or None in pts or len(set(pts)) < len(pts) or not key_stamps:
            return self._count_by_decoding()
        if starts_again(np.array(pts, np.int64), np.array(shown), key_stamps):
            return self._count_by_decoding()
        timeline = from_packets(np.array(pts, np.int64), np.array(shown), key_stamps, 0.0)
        if not timeline.num_frames:
            raise MediaError("has a video track, but no frame that decodes on its own")
        last_duration = durations[int(timeline.position_F[-1])] or 0
        return replace(timeline, duration_s=self._duration_s(timeline.pts_F, last_duration))

    def _duration_s(self, pts_F: np.ndarray, last_duration: int) -> float:
        if last_duration <= 0:
            rate = self._stream.average_rate or Fraction(25)
            last_duration = int(np.median(np.diff(pts_F))) if len(pts_F) > 1 else max(1, int(1 / (rate * self._stream.time_base)))
        return float((int(pts_F[-1]) - int(pts_F[0]) + last_duration) * self._stream.time_base)

    def _count_by_decoding(self) -> Timeline:
        """Streams whose packets lack usable stamps (AVI, some old MPEG): the frames are what the decoder shows, so all are decoded."""
        self._open()
        num_frames, ticks = 0, []
        for packet in self._packets_then_flush():
            num_frames += len(self._decode(packet))
            if packet is not None and packet.dts is not None:
                ticks.append(packet.dts // max(1, packet.duration or 1))
        if not num_frames:
            raise MediaError("has a video track, but no frame of it decodes")
        # AVI counts its chunks, empty ones for frames that were dropped included, so that a frame's number there is when it is shown.
        if self.extension != "avi" or len(ticks) != num_frames or (np.diff(ticks) <= 0).any():
            ticks = range(num_frames)
        rate = self._stream.average_rate or Fraction(25)
        return counted(np.array(ticks, np.int64), float((ticks[-1] - ticks[0] + 1) / rate))

    def _packets_then_flush(self) -> Iterator[av.Packet | None]:
        yield from self._packets()
        yield None

    def _decode(self, packet: av.Packet | None, errors: list[int] | None = None, position: int = 0) -> list[av.VideoFrame]:
        """Frames that come out after this packet (None drains the decoder); a damaged one gives none, and its position goes to `errors`."""
        self._deadline.check("decoding")
        try:
            return self._stream.codec_context.decode(packet)
        except av.FFmpegError:
            if errors is not None:
                errors.append(position)
            return []

    def _read_counting(self, wanted: set[int], convert: Callable, found: MutableMapping) -> None:
        self._open()
        index, last = 0, max(wanted, default=-1)
        for packet in self._packets_then_flush():
            if index > last:
                break
            for frame in self._decode(packet):
                self._keep([frame], {frame.pts: index} if index in wanted else {}, convert, found)
                index += 1

    def _read_groups(self, indices: list[int], convert: Callable, found: MutableMapping, *, earlier: int) -> None:
        """Visit the groups of pictures that hold `indices`, in decode order; `earlier` starts each visit that many keyframes before."""
        timeline, keys = self.timeline, list(self.timeline.key_stamps)
        in_order = sorted(indices, key=lambda index: (int(timeline.key_position_F[index]), int(timeline.position_F[index])))
        for key, group in itertools.groupby(in_order, key=lambda index: int(timeline.key_position_F[index])):
            number = bisect.bisect_left(keys, key)
            if number >= earlier:
                self._read_group(keys[number - earlier], list(group), convert, found)

    def _read_group(self, start: int, group: list[int], convert: Callable, found: MutableMapping) -> None:
        """Frames that share a keyframe, each with the same pixels whichever others are read with it (on this rank).

        A decoder fills damaged places with what it has at hand: earlier groups, frames nobody refers to, even old buffers. So each visit
        begins with an empty decoder, and H.264's frames from the first error on, those of the whole group for others, are read again by a
        new one that gets all packets. Not seen are errors in silence: all of HEVC's and VP8's, and rare ones of others (a changed header).
        """
        position_of = {index: int(self.timeline.position_F[index]) for index in group}
        names_errors, whole, pending = self.codec in _MARKS_ITS_FRAMES, self.codec in _CARRIES_ERRORS, group
        while pending:
            error = self._visit(start, pending, convert, found, whole=whole)
            end = position_of[pending[-1]] if error is None else error
            bad = {index for index in pending if position_of[index] <= end and (index not in found or position_of[index] == error)}
            if error is None and (whole or not bad):
                return
            first = min([position_of[index] for index in bad] + [end]) if names_errors else 0
            pending = [index for index in (pending if names_errors else group) if position_of[index] >= first]
            for index in pending:
                found.pop(index, None)
            if bad and names_errors:  # once more without these, which may be such as nothing else needs
                pending = [index for index in pending if index not in bad]
                continue
            if pending:  # H.264: the error is in a frame that others refer to, else it had been skipped
                self._open()
                self._visit(start, pending, convert, found, whole=True)
            return

    def _visit(self, start: int, visit: list[int], convert: Callable, found: MutableMapping, *, whole: bool = False) -> int | None:
        """Decode from the keyframe at position `start` until the frames `visit` have come out; returns the first position with an error.

        `whole` decodes all packets of the group of `visit`, also the frames that nothing refers to and those behind an error."""
        timeline = self.timeline
        wanted = {int(timeline.pts_F[index]): index for index in visit}
        key, last, start_pts = int(timeline.key_position_F[visit[0]]), int(timeline.position_F[visit[-1]]), timeline.key_stamps[start][0]
        if whole or start < key:  # to the end of the group: from which keyframe a frame can be read must not depend on those behind it
            last = int(timeline.position_F[timeline.key_position_F == key].max())
        stream = self._packets_from(start)  # may open the file anew, and with it the decoder
        context, skips = self._stream.codec_context, self.codec in _MARKS_ITS_FRAMES and not whole
        context.skip_frame = skipping = "DEFAULT"
        context.flush_buffers()
        errors, ahead = [], []
        for position, packet in stream:
            if ahead or (position > key and position in timeline.key_stamps):
                ahead.append((position, packet))  # leading pictures follow the keyframe of the next group, which begins with it again
            if position < start or (start < position and packet.pts < start_pts):
                continue  # before the keyframe, or a leading picture that refers to what lies before it
            # The packet is asked first: told to drop what it can, the decoder does not say when it loses a frame that others refer to.
            skip = "NONREF" if skips and packet.pts not in wanted and is_unreferenced(bytes(packet), context.extradata) else "DEFAULT"
            if skip != skipping:
                context.skip_frame = skipping = skip
            self._keep(self._decode(packet, errors, position), wanted, convert, found, errors)
            if position >= last or (errors and not whole):
                break
        context.skip_frame = "DEFAULT"
        self._keep(self._decode(None), wanted, convert, found, errors)
        if not ahead and last + 1 in timeline.key_stamps:
            ahead = list(itertools.islice(stream, 1))
        self._ahead.extendleft(reversed(ahead))
        return min(errors, default=None)

    def _keep(
        self, frames: list[av.VideoFrame], wanted: dict[int, int], convert: Callable, found: MutableMapping, errors: list[int] | None = None
    ) -> None:
        """Convert the frames that are wanted and whole; the positions of those with errors go to `errors`."""
        for frame in frames:
            if frame.is_corrupt:
                if errors is not None:
                    errors.append(self.timeline.packets.get(frame.pts, 0))
            elif frame.pts in wanted:
                with contextlib.suppress(av.FFmpegError):  # a frame that cannot be converted is as bad as one that does not decode
                    found[wanted[frame.pts]] = convert(frame)

    def _packets_from(self, start: int) -> Iterator[tuple[int, av.Packet]]:
        """(position, packet) from the keyframe at position `start`, for an empty decoder.

        Where a seek lands differs by container (decode or presentation stamps, keyframes or any packet), so the landing is checked
        against the packet list and the seek repeated from further back; the last resort is the beginning of the file. In an mpeg-ps the
        packet at the landing may be the rest of a frame with the stamp of the next one, so that the one at `start` must be a keyframe.
        """
        if self._ahead and self._ahead[0][0] == start:  # where the last visit ended
            return self._packets_ahead()
        self._ahead.clear()
        key_stamps, keys = self.timeline.key_stamps, list(self.timeline.key_stamps)
        number = bisect.bisect_left(keys, start)
        targets = [*key_stamps[start], *(key_stamps[key][1] for key in reversed(keys[max(0, number - 2) : number]))]
        for target in (target for target in targets if target is not None and start > 0):
            try:
                self._container.seek(target, stream=self._stream)
            except (av.FFmpegError, OSError):
                continue
            self._rest = self._positions()
            first = next(((position, packet) for position, packet in self._rest if position >= start), None)
            if first is not None and first[0] == start and first[1].is_keyframe:
                self._ahead.append(first)
                return self._packets_ahead()
        self._open()
        self._rest = self._positions()
        return self._packets_ahead()

    def _packets_ahead(self) -> Iterator[tuple[int, av.Packet]]:
        while item := self._ahead.popleft() if self._ahead else next(self._rest, None):
            yield item

    def _positions(self) -> Iterator[tuple[int, av.Packet]]:
        return ((self.timeline.packets.get(packet.pts, -1), packet) for packet in self._packets())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
