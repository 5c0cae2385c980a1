"""How a picture must be turned to be upright, from the display matrix that cameras store beside a video track."""

from __future__ import annotations

import numpy as np
from PIL import Image

_ORIENTATIONS = {  # signs of the display matrix (a, b, c, d): x' = a x + c y, y' = b x + d y -> (clockwise degrees, Pillow's transpose)
    (1, 0, 0, 1): (0, None),
    (0, 1, -1, 0): (90, Image.Transpose.ROTATE_270),  # Pillow turns counter-clockwise
    (-1, 0, 0, -1): (180, Image.Transpose.ROTATE_180),
    (0, -1, 1, 0): (270, Image.Transpose.ROTATE_90),
    (-1, 0, 0, 1): (0, Image.Transpose.FLIP_LEFT_RIGHT),
    (1, 0, 0, -1): (180, Image.Transpose.FLIP_TOP_BOTTOM),
    (0, 1, 1, 0): (90, Image.Transpose.TRANSPOSE),
    (0, -1, -1, 0): (270, Image.Transpose.TRANSVERSE),
}


def orientation(matrix_9: np.ndarray) -> tuple[int, Image.Transpose | None]:
    """Clockwise degrees and Pillow's transpose for a 3 x 3 display matrix, rounded to the nearest of the eight axis-aligned ones."""
    a, b, c, d = (int(matrix_9[position]) for position in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        b = c = 0
    else:
        a = d = 0
    signs = tuple((value > 0) - (value < 0) for value in (a, b, c, d))
    return _ORIENTATIONS.get(signs, (0, None))
