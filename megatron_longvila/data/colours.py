"""Which colour matrices of videos are read, and how."""

from __future__ import annotations

import av
from av.video.reformatter import Colorspace

from megatron_longvila.data.media import MediaError

# AVColorSpace of a frame -> the matrix to read it with, where the scaler refuses the frame's own: BT.2020 with constant luminance has the
# coefficients of BT.2020, and players show it so; 3 is a reserved number that some encoders write for "unspecified".
READ_AS = {3: Colorspace.ITU601, 10: Colorspace.BT2020}
_NOT_READ = {8: "YCgCo", 11: "SMPTE 2085", 12: "by the primaries", 13: "by the primaries, constant luminance", 14: "ICtCp", 15: "IPT-C2"}
_NOT_READ |= {16: "YCgCo-Re", 17: "YCgCo-Ro"}


def check_matrix(frame: av.VideoFrame) -> None:
    """Raises MediaError for a colour matrix that the scaler does not know."""
    matrix = int(frame.colorspace)
    if matrix in _NOT_READ:
        raise MediaError(
            f"has colours in matrix {matrix} ({_NOT_READ[matrix]}), but only 0 to 7, 9 and 10 are read; re-encode it in BT.709 with a "
            "program that knows this one, for 8 and 12 to 14: ffmpeg -i IN -vf zscale=matrix=709 OUT.mp4"
        )
