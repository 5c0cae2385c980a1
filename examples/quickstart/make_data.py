"""Make the quickstart's own world: short H.264 videos, questions about them, and a SentencePiece model.

In each video two shapes cross the picture one after the other. Three questions are asked: the colour of the first shape, of the second, and
of the ground. They need the video, and the order of its frames: question by question every answer is equally often right, so whoever
does not see has one chance in six (ground: four), and whoever sees colours but no order has one in two for the shapes. An answer begins
with the word that says what it speaks of. No training video has the three answers of a held-out one.

Running it again with the same arguments writes the same rows and pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import sentencepiece
from tqdm import tqdm

# Far apart: with orange and purple among them the same training answered 59 of 72 questions right instead of 71.
COLOURS = {
    "red": (225, 25, 25), "green": (25, 170, 40), "blue": (40, 70, 240),
    "yellow": (245, 230, 25), "pink": (240, 80, 220), "white": (245, 245, 245),
}  # fmt: skip
GROUNDS = {"black": (10, 10, 10), "grey": (110, 110, 110), "navy": (15, 20, 90), "brown": (90, 55, 25)}
BALANCED = math.lcm(len(COLOURS), len(GROUNDS))
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIDE, FRAMES, FPS = 112, 24, 12  # pixels, frames of a video, frames per second

QUESTIONS = {
    "first": "what colour is the first shape ?",
    "second": "what colour is the second shape ?",
    "ground": "what colour is the ground ?",
}
# The symbols that the ChatML template needs; newline separates lines and follows each frame.
SPECIALS = ["<|im_start|>", "<|im_end|>", "\n"]


@dataclass(frozen=True)
class Scene:
    """What a video shows: the colours are asked for, the rest is drawn at random."""

    first: str
    second: str
    ground: str


def draw_scenes(rng: np.random.Generator, count: int, excluded: Sequence[Scene] = ()) -> list[Scene]:
    """`count` scenes in which, question by question, every answer is equally often right; the two shapes differ in colour."""
    if count < BALANCED or count % BALANCED:
        raise ValueError(f"{count} videos cannot balance {len(COLOURS)} colours and {len(GROUNDS)} grounds: give a multiple of {BALANCED}")
    first, second = (rng.permutation(list(COLOURS) * (count // len(COLOURS))).tolist() for _ in range(2))
    ground = rng.permutation(list(GROUNDS) * (count // len(GROUNDS))).tolist()
    while True:  # scenes that may not be swap their second colour with others until all may be
        scenes = [Scene(*scene) for scene in zip(first, second, ground, strict=True)]
        wrong = [i for i, scene in enumerate(scenes) if scene.first == scene.second or scene in excluded]
        if not wrong:
            return scenes
        for i in wrong:
            j = int(rng.integers(count))
            second[i], second[j] = second[j], second[i]


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """uint8 [FRAMES, SIDE, SIDE, 3]: two shapes cross the picture one after the other, each in its own way."""
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    frames[:] = GROUNDS[scene.ground]
    cut = FRAMES // 2 + int(rng.integers(-1, 2))
    for act, colour in ((frames[:cut], scene.first), (frames[cut:], scene.second)):
        shape, (step_x, step_y) = str(rng.choice(SHAPES)), DIRECTIONS[str(rng.choice(list(DIRECTIONS)))]
        radius, lane = rng.uniform(22, 34), rng.uniform(34, SIDE - 34)
        along = np.linspace(-0.6, 0.6, len(act)) * (SIDE - 2 * radius) * (step_x + step_y) + SIDE / 2
        for frame, position in zip(act, along, strict=True):
            x, y = (position, lane) if step_x else (lane, position)
            frame[_mask(shape, x, y, radius)] = COLOURS[colour]
    return frames


def _mask(shape: str, centre_x: float, centre_y: float, radius: float) -> np.ndarray:
    """bool [SIDE, SIDE], true inside the shape."""
    y, x = np.mgrid[:SIDE, :SIDE] - np.array([centre_y, centre_x]).reshape(2, 1, 1)
    inside = (abs(x) <= radius) & (abs(y) <= radius)
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    if shape == "square":
        return (abs(x) <= 0.85 * radius) & (abs(y) <= 0.85 * radius)
    if shape == "triangle":
        return inside & (2 * abs(x) <= y + radius)
    return inside & ((abs(x) <= radius / 3) | (abs(y) <= radius / 3))


def write_video(path: Path, frames: np.ndarray) -> None:
    """H.264 in mp4, 4:2:0, a key frame a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryfast", "g": str(FPS), "threads": "1"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def conversation(scene: Scene, rng: np.random.Generator) -> list[dict]:
    """The questions about a scene in random order; the first carries the mark of the video."""
    rows = []
    for name in rng.permutation(list(QUESTIONS)):
        mark = "" if rows else "<video>\n"
        rows += [{"from": "human", "value": mark + QUESTIONS[name]}, {"from": "gpt", "value": f"{name} {getattr(scene, name)}"}]
    return rows


def write_split(folder: Path, split: str, scenes: list[Scene], rng: np.random.Generator) -> list[dict]:
    """A video below folder/videos for every scene and the rows of folder/SPLIT.jsonl, which are returned."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, scene in enumerate(tqdm(scenes, desc=f"{split} videos", unit="video", mininterval=1)):
        name = f"{split}-{number:03d}"
        write_video(folder / "videos" / f"{name}.mp4", render(scene, rng))
        rows.append({"id": name, "video": f"{name}.mp4", "conversations": conversation(scene, rng)})
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_tokenizer(path: Path, rows: list[dict]) -> None:
    """A SentencePiece model with a piece for every word in `rows` and in the ChatML template, at the start of a line or after a space."""
    lines = [turn["value"].removeprefix("<video>\n") for row in rows for turn in row["conversations"]]
    text = ["user\n" + line + "\nassistant\n" + line for line in lines] + ["system\nYou are a helpful assistant."] * len(lines)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=384,
        hard_vocab_limit=False,
        user_defined_symbols=SPECIALS,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets videos/, train.jsonl, heldout.jsonl and tokenizer.model")
    parser.add_argument("--train_videos", type=int, default=144, help=f"a multiple of {BALANCED} [%(default)s]")
    parser.add_argument("--heldout_videos", type=int, default=24, help=f"a multiple of {BALANCED} [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    arguments = parser.parse_args(argv)
    rng, folder = np.random.default_rng(arguments.seed), arguments.output_dir
    heldout = draw_scenes(rng, arguments.heldout_videos)
    write_split(folder, "heldout", heldout, rng)
    rows = write_split(folder, "train", draw_scenes(rng, arguments.train_videos, excluded=heldout), rng)
    write_tokenizer(folder / "tokenizer.model", rows)


if __name__ == "__main__":
    main()
