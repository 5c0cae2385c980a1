"""Films whose every second is known: scenes of one colour with a word burnt in and a shape that crosses the screen, one after another.

`plan_scenes` writes a film's script, `make_film` shoots it, `read_frame` sees what a frame shows, and the functions below `shown_at` say
from the script alone what is true of a span. Nothing that sees knows the script.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (200, 30, 30), "green": (30, 160, 40), "blue": (90, 150, 250), "white": (225, 225, 225), "purple": (110, 20, 130),
    "grey": (60, 60, 60),
}  # fmt: skip
# any two are at least 37 apart on average in hue, saturation and value, and a shot detector's usual threshold is 27
WORDS = ("ROSE", "LEAF", "LAKE", "SNOW", "PLUM", "WIND")
SHAPES = ("square", "cross")
PLACES = ("top", "bottom")
MOVES = {("left", "right"): (1, 0), ("right", "left"): (-1, 0), ("top", "bottom"): (0, 1), ("bottom", "top"): (0, -1)}
BAND = 0.26  # share of the height that a word may fill, above and below the shape


@dataclass(frozen=True)
class Scene:
    """What is shown for a while: names of COLOURS, WORDS, SHAPES, MOVES, and where the word stands."""

    colour: str
    duration_s: float
    word: str = "ROSE"
    shape: str = "square"
    move: tuple[str, str] = ("left", "right")
    place: str = "top"


class Seen(NamedTuple):
    """What a frame shows; the shape's middle in pixels."""

    colour: str
    word: str
    place: str
    shape: str
    middle: tuple[float, float]


# ------------------------------------------------------------------------------------------------ script


def plan_scenes(seed: int, duration_s: float, scene_s: tuple[int, int] = (6, 24)) -> list[Scene]:
    """Scenes of whole seconds that add up to `duration_s`, neighbours of different colours."""
    draw, scenes, left = random.Random(seed), [], int(duration_s)
    while left:
        length = left if left < 2 * scene_s[0] else min(draw.randint(*scene_s), left - scene_s[0])
        colours = [colour for colour in COLOURS if not scenes or colour != scenes[-1].colour]
        rest = (draw.choice(WORDS), draw.choice(SHAPES), draw.choice(list(MOVES)), draw.choice(PLACES))
        scenes.append(Scene(draw.choice(colours), length, *rest))
        left -= length
    return scenes


def shown_between(scenes: list[Scene], start_s: float, end_s: float) -> list[Scene]:
    """The scenes shown in a span, in order."""
    shown, at = [], 0.0
    for scene in scenes:
        if at < end_s - 1e-6 and at + scene.duration_s > start_s + 1e-6:
            shown.append(scene)
        at += scene.duration_s
    return shown


def shown_at(scenes: list[Scene], second: float) -> Scene:
    return shown_between(scenes, second, second + 0.01)[0]


# ------------------------------------------------------------------------------------------------ camera


def make_film(path: Path, scenes: list[Scene], *, fps: int = 5, size: tuple[int, int] = (96, 64), number: int = 0) -> Path:
    """H.264 in mp4; the scenes one after the other, the shape crosses the screen once in each. `number` tells films apart."""
    width, height = size
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as output:
        video = output.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "18", "g": str(10 * fps), "threads": "1"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for scene in scenes:
            picture, count = _draw(scene.colour, scene.word, scene.place, size, str(number)), round(scene.duration_s * fps)
            for frame in range(count):
                shown = picture.copy()
                _draw_shape(shown, scene, frame / max(1, count - 1))
                output.mux(video.encode(av.VideoFrame.from_ndarray(np.asarray(shown), format="rgb24")))
        output.mux(video.encode(None))
    return path


def make_picture(path: Path, scene: Scene, *, size: tuple[int, int] = (96, 64), number: int = 0) -> Path:
    """A PNG of the middle of a scene."""
    picture = _draw(scene.colour, scene.word, scene.place, size, str(number))
    _draw_shape(picture, scene, 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def _ink(colour: str) -> tuple[int, int, int]:
    return (0, 0, 0) if min(COLOURS[colour]) > 200 else (255, 255, 255)


def _draw(colour: str, word: str, place: str, size: tuple[int, int], mark: str = "") -> Image.Image:
    """The ground with the word, and a mark beside it."""
    width, height = size
    image, font, top = (
        Image.new("RGB", size, COLOURS[colour]),
        ImageFont.load_default(height // 5),
        2 if place == "top" else height * 3 // 4,
    )
    draw = ImageDraw.Draw(image)
    draw.text((width // 5, top), word, font=font, fill=_ink(colour))
    draw.text((width * 3 // 4, top), mark, font=font, fill=_ink(colour))
    return image


def _draw_shape(image: Image.Image, scene: Scene, way: float) -> None:
    """`way` of its way, from 0 to 1, between the bands of the words."""
    (width, height), (step_x, step_y) = image.size, MOVES[scene.move]
    side = height // 6
    places = [(width - side) / 2, (height - side) / 2]
    if step_x:
        places[0] = (width - side) * (way if step_x > 0 else 1 - way)
    else:
        low, high = BAND * height + 2, (1 - BAND) * height - 2 - side
        places[1] = low + (high - low) * (way if step_y > 0 else 1 - way)
    x, y = map(round, places)
    draw, ink, third = ImageDraw.Draw(image), _ink(scene.colour), side // 3
    if scene.shape == "square":
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=ink)
    else:
        draw.rectangle((x + third, y, x + side - 1 - third, y + side - 1), fill=ink)
        draw.rectangle((x, y + third, x + side - 1, y + side - 1 - third), fill=ink)


# ------------------------------------------------------------------------------------------------ eye


def read_frame(picture: Image.Image) -> Seen:
    """What the pixels of a frame show."""
    pixels_HW3 = np.asarray(picture.convert("RGB"), dtype=np.int16)
    height, width = pixels_HW3.shape[:2]
    ground = pixels_HW3[-8:-2, 2:8].reshape(-1, 3).mean(axis=0).astype(np.int16)  # lower left corner
    colour = min(COLOURS, key=lambda name: int(abs(np.subtract(COLOURS[name], ground)).sum()))
    low, high = round(BAND * height), round((1 - BAND) * height)
    painted_HW = abs(pixels_HW3[low:high] - ground).sum(axis=2) > abs(np.subtract(_ink(colour), ground)).sum() / 2
    rows, columns = painted_HW.any(axis=1).nonzero()[0], painted_HW.any(axis=0).nonzero()[0]
    filled = painted_HW.sum() / ((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1))  # a square 1, a cross 5/9
    middle = ((columns[0] + columns[-1]) / 2, low + (rows[0] + rows[-1]) / 2)
    grey_HW = pixels_HW3.sum(axis=2, dtype=np.int16)
    distances = {
        (word, place): int(abs(_word_bands(grey_HW, width, height) - _template(colour, word, place, (width, height))).sum())
        for word in WORDS for place in PLACES
    }  # fmt: skip
    word, place = min(distances, key=distances.get)
    return Seen(colour, word, place, "square" if filled > 0.78 else "cross", middle)


def _word_bands(grey_HW: np.ndarray, width: int, height: int) -> np.ndarray:
    """Where words stand: above and below, without the mark beside them."""
    columns = slice(width // 5, width * 7 // 10)
    return np.concatenate([grey_HW[: round(BAND * height), columns], grey_HW[round((1 - BAND) * height) :, columns]])


@cache
def _template(colour: str, word: str, place: str, size: tuple[int, int]) -> np.ndarray:
    return _word_bands(np.asarray(_draw(colour, word, place, size), dtype=np.int16).sum(axis=2, dtype=np.int16), *size)


# ------------------------------------------------------------------------------------------------ library


def film_library(cache_folder: Path, count: int = 20) -> tuple[Path, dict[str, list[Scene]]]:
    """`count` films of 2 to 10 minutes at 5 fps and 320 x 240 with their scripts; shot once per version of this file (under a minute)."""
    scripts = {f"film {number:02d}.mp4": plan_scenes(number, 120 + round(480 * number / (count - 1))) for number in range(count)}
    version = hashlib.sha256(Path(__file__).read_bytes() + f"{av.__version__} {count}".encode()).hexdigest()[:12]
    folder = cache_folder / version
    if not folder.exists():
        half_made = cache_folder / f"{version}.{os.getpid()}"
        for number, (name, scenes) in enumerate(scripts.items()):
            make_film(half_made / name, scenes, size=(320, 240), number=number)
        for old in cache_folder.iterdir():
            if old != half_made:
                shutil.rmtree(old)
        half_made.rename(folder)
    return folder, scripts
