"""Films whose every second is known: scenes of one colour with a word burnt in and a square that moves, one frame after another."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": ((200, 30, 30), "ROSE"), "green": ((30, 160, 40), "LEAF"), "blue": ((90, 150, 250), "LAKE"),
    "white": ((225, 225, 225), "SNOW"), "purple": ((110, 20, 130), "PLUM"), "grey": ((60, 60, 60), "RAIN"),
}  # fmt: skip
# any two are at least 37 apart on average in hue, saturation and value, and a shot detector's usual threshold is 27


@dataclass(frozen=True)
class Scene:
    """A colour of COLOURS for a while."""

    colour: str
    duration_s: float


def make_film(path: Path, scenes: list[Scene], *, fps: int = 5, size: tuple[int, int] = (96, 64), number: int = 0) -> Path:
    """H.264 in mp4; the scenes one after the other, the square moves left to right once in each. `number` tells films apart."""
    width, height = size
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as output:
        video = output.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "18", "g": str(10 * fps), "threads": "1"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for scene in scenes:
            picture = np.asarray(_draw(scene.colour, size, number))
            count, side, paint = round(scene.duration_s * fps), height // 6, 0 if min(COLOURS[scene.colour][0]) > 200 else 255
            for number in range(count):
                frame_HW3 = picture.copy()
                left = (width - side) * number // max(1, count - 1)
                frame_HW3[height // 2 : height // 2 + side, left : left + side] = paint
                output.mux(video.encode(av.VideoFrame.from_ndarray(frame_HW3, format="rgb24")))
        output.mux(video.encode(None))
    return path


def _draw(colour: str, size: tuple[int, int], number: int) -> Image.Image:
    fill, word = COLOURS[colour]
    image = Image.new("RGB", size, fill)
    ImageDraw.Draw(image).text(
        (size[0] // 4, 2),
        f"{word} {number}",
        font=ImageFont.load_default(size[1] // 5),
        fill=(0, 0, 0) if min(fill) > 200 else (255, 255, 255),
    )
    return image


def read_colour(picture: Image.Image) -> str:
    """The colour of a frame, from its lower left corner."""
    red, green, blue = np.asarray(picture.convert("RGB"))[-8:-2, 2:8].reshape(-1, 3).mean(axis=0)
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name][0], (red, green, blue), strict=True)))


def plan_scenes(seed: int, duration_s: float, scene_s: tuple[int, int] = (6, 24)) -> list[Scene]:
    """Scenes of whole seconds that add up to `duration_s`, neighbours of different colours."""
    draw, scenes, left = random.Random(seed), [], int(duration_s)
    while left:
        length = left if left < 2 * scene_s[0] else min(draw.randint(*scene_s), left - scene_s[0])
        colours = [colour for colour in COLOURS if not scenes or colour != scenes[-1].colour]
        scenes.append(Scene(draw.choice(colours), length))
        left -= length
    return scenes


def colours_between(scenes: list[Scene], start_s: float, end_s: float) -> list[str]:
    """The colours shown in a span, in order."""
    shown, at = [], 0.0
    for scene in scenes:
        if at < end_s - 1e-6 and at + scene.duration_s > start_s + 1e-6:
            shown.append(scene.colour)
        at += scene.duration_s
    return shown
