"""Encode and decode a clip with every codec, in memory: `python -m megatron_longvila.doctor.codecs` prints what each says, as JSON.

A program of its own, because encoders write about themselves on standard error and a broken one may end its process.
"""

from __future__ import annotations

import io
import json
import sys
from fractions import Fraction

import av
import numpy as np

# Decoder to try, and an encoder to make a clip for it with.
CODECS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1", "mpeg4": "mpeg4"}
FRAMES = 4


def try_codec(decoder: str, encoder: str) -> str:
    """Empty if a clip of this codec decodes; what is wrong otherwise. Without the encoder only the decoder's presence is known."""
    if encoder not in av.codecs_available:
        return "" if decoder in av.codecs_available else "no such decoder"
    try:
        frames = round_trip(encoder)
    except (av.FFmpegError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if frames == FRAMES else f"{frames} of {FRAMES} frames decoded"


def round_trip(encoder: str) -> int:
    """Frames that come back of those that went through an encoder, as a Matroska file in memory."""
    data = io.BytesIO()
    with av.open(data, "w", format="matroska") as container:
        stream = container.add_stream(encoder, rate=Fraction(FRAMES))
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for shade in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((128, 128, 3), 60 * shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data.seek(0)
    with av.open(data) as container:
        return sum(1 for _ in container.decode(video=0))


if __name__ == "__main__":
    sys.stdout.write(json.dumps({decoder: try_codec(decoder, encoder) for decoder, encoder in CODECS.items()}))
