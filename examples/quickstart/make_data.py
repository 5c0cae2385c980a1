"""Make the quickstart's own world: pictures, H.264 videos, text, questions, needles and a SentencePiece model.

A scene is a coloured shape that moves over a ground. A card has a coloured border and a sign in coloured ink on white. Videos are scenes
that cut every few frames, one frame a second; single frames of them show cards. The question of the whole quickstart: "what is on card
red ?", answered "red K .", where the red card is one frame of the video. Of the 1,024 cards, 64 are kept for the needle test: no picture
and no video for training shows one (every pair of border and sign is trained, with another ink).

    images.jsonl  one picture and its caption                      albums.jsonl   one to four pictures, described in order
    short.jsonl   videos of 2 to 8 frames and questions, captions  long.jsonl     videos of 2 to 64 frames and questions
    stories.jsonl a text with up to four facts in it, questions    passages-*.jsonl the same as running text, for language modelling
    needles/      held-out cards, needles.jsonl, haystack.mp4      text_needles.jsonl, filler.txt, tokenizer.model

Running it again with the same arguments writes the same rows and pictures.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import sentencepiece
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

SIDE, FPS = 56, 1  # pixels, frames per second
COLOURS = {
    "red": (220, 30, 30), "green": (30, 170, 40), "blue": (40, 70, 235), "yellow": (240, 220, 30),
    "purple": (130, 40, 170), "orange": (245, 135, 20), "cyan": (40, 215, 220), "pink": (250, 140, 190),
}  # fmt: skip
GROUNDS = {"black": (10, 10, 10), "grey": (110, 110, 110), "navy": (15, 20, 90), "brown": (95, 60, 30)}
INKS = {
    "black": (10, 10, 10), "navy": (15, 20, 90), "brown": (95, 60, 30), "maroon": (110, 10, 30),
    "teal": (0, 80, 80), "olive": (75, 80, 10), "violet": (85, 20, 110), "slate": (60, 70, 90),
}  # fmt: skip
SIGNS = list("1247ACEHJKLMTUXZ")  # no two look alike at this size
SHAPES = ("circle", "square", "triangle", "cross")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FACTS = {
    "animal": ["lion", "bear", "wolf", "fox", "owl", "cat", "dog", "cow"],
    "food": ["apple", "bread", "cheese", "egg", "fig", "grape", "ham", "jam"],
    "tool": ["axe", "brush", "chisel", "drill", "file", "hammer", "iron", "saw"],
    "place": ["attic", "barn", "cave", "dock", "farm", "garden", "harbour", "mill"],
}
FILLER = [f"a {shape} moves {move} on {ground} ." for shape in SHAPES for move, ground in zip(MOVES, GROUNDS, strict=True)][:12]
SHORT_FRAMES, LONG_FRAMES = 8, 64
SHORT, MIDDLE, LONG = 128, 320, 512  # tokens of a text before, while and after the context is extended
BORDER = 8  # pixels: 4:2:0 keeps one sample of colour per two pixels


class Card(NamedTuple):
    """A needle: names of the border colour, of the ink and the sign."""

    colour: str
    ink: str
    sign: str

    @property
    def held_out(self) -> bool:
        """Kept for the needle test: one sign in sixteen for each border and ink."""
        return (5 * list(COLOURS).index(self.colour) + 3 * list(INKS).index(self.ink)) % len(SIGNS) == SIGNS.index(self.sign)


CARDS = [Card(colour, ink, sign) for colour in COLOURS for ink in INKS for sign in SIGNS]
TRAINED = {colour: [card for card in CARDS if card.colour == colour and not card.held_out] for colour in COLOURS}
HELD_OUT = [card for card in CARDS if card.held_out]


def question(card: Card) -> str:
    """A space first: after a line break, the tokenizer then meets the pieces that it meets inside a line."""
    return f" what is on card {card.colour} ?"


def answer(card: Card) -> str:
    """The colour first: whoever looks for the sign then stands on the name of the card it is on."""
    return f"{card.colour} {card.sign} ."


def draw_card(card: Card, rng: np.random.Generator) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]; the sign stands up to two pixels off the centre."""
    picture = Image.new("RGB", (SIDE, SIDE), COLOURS[card.colour])
    draw = ImageDraw.Draw(picture)
    draw.rectangle((BORDER, BORDER, SIDE - 1 - BORDER, SIDE - 1 - BORDER), fill=(240, 240, 240))
    centre = SIDE // 2 + rng.integers(-2, 3, 2)
    draw.text(tuple(map(int, centre)), card.sign, fill=INKS[card.ink], font=ImageFont.load_default(36), anchor="mm")
    return np.asarray(picture)


class Scene(NamedTuple):
    """Names of what a scene shows."""

    colour: str
    shape: str
    move: str
    ground: str

    @classmethod
    def any(cls, rng: np.random.Generator) -> Scene:
        return cls(*(str(rng.choice(list(names))) for names in (COLOURS, SHAPES, MOVES, GROUNDS)))


def draw_scene(scene: Scene, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [num_frames, SIDE, SIDE, 3]: the shape moves four pixels a frame and comes back on the other side."""
    frames = np.empty((num_frames, SIDE, SIDE, 3), np.uint8)
    frames[:] = GROUNDS[scene.ground]
    place, (step_x, step_y) = rng.integers(0, SIDE, 2), MOVES[scene.move]
    for number, frame in enumerate(frames):
        y, x = np.mgrid[:SIDE, :SIDE]
        x = (x - place[0] - 4 * step_x * number) % SIDE - SIDE // 2
        y = (y - place[1] - 4 * step_y * number) % SIDE - SIDE // 2
        frame[_inside(scene.shape, x, y, 10)] = COLOURS[scene.colour]
    return frames


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: int) -> np.ndarray:
    square = (abs(x) <= radius) & (abs(y) <= radius)
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    if shape == "square":
        return square
    if shape == "triangle":
        return square & (2 * abs(x) <= y + radius)
    return square & ((abs(x) <= radius / 3) | (abs(y) <= radius / 3))


def draw_movie(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [num_frames, SIDE, SIDE, 3]: scenes that cut every 3 to 12 frames."""
    parts: list[np.ndarray] = []
    while (missing := num_frames - sum(map(len, parts))) > 0:
        parts.append(draw_scene(Scene.any(rng), min(int(rng.integers(3, 13)), missing), rng))
    return np.concatenate(parts)


def enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    """uint8 [S, S, 3] to [scale * S, scale * S, 3]: every pixel becomes a square."""
    return pixels if scale == 1 else pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def write_video(path: Path, frames: np.ndarray, scale: int = 1) -> None:
    """H.264 in mp4, 4:2:0, one frame a second, a key frame every eight."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "veryfast", "g": "8", "threads": "1"})
        stream.width = stream.height = scale * SIDE
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(enlarge(pixels, scale), format="rgb24")))
        container.mux(stream.encode())


class Picture(NamedTuple):
    """A file in media/, what it shows, and the cards on it."""

    file: str
    caption: str
    cards: list[str]


class World:
    """Writes the files of one folder from one random stream.

    Args:
        scale: pictures and videos are written at `scale` times SIDE pixels.
        quiet: show no bars.
    """

    def __init__(self, folder: Path, seed: int | tuple[int, ...], scale: int = 1, quiet: bool = False):
        self.folder, self.rng, self.scale, self.quiet = folder, np.random.default_rng(seed), scale, quiet
        (folder / "media").mkdir(parents=True, exist_ok=True)
        (folder / "needles").mkdir(exist_ok=True)

    def save_picture(self, path: Path, pixels: np.ndarray) -> None:
        Image.fromarray(enlarge(pixels, self.scale)).save(path, quality=92, subsampling=0)

    def write_rows(self, name: str, rows: list[dict]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write_images(self, count: int, first: int = 0) -> list[Picture]:
        """`count` pictures, three in four of them cards; their files are numbered from `first` on."""
        made = []
        for number in tqdm(range(first, first + count), desc="pictures", unit="picture", mininterval=1, disable=self.quiet):
            if self.rng.random() < 0.75:
                card = self._any_card(str(self.rng.choice(list(COLOURS))))
                pixels, caption, cards = draw_card(card, self.rng), f"the {card.colour} card says {card.sign} .", ["".join(card)]
            else:
                scene = Scene.any(self.rng)
                pixels, caption, cards = draw_scene(scene, 1, self.rng)[0], f"a {scene.colour} {scene.shape} on {scene.ground} .", []
            name = f"{number:05d}.jpg"
            self.save_picture(self.folder / "media" / name, pixels)
            made.append(Picture(name, caption, cards))
        return made

    def write_albums(self, name: str, pictures: list[Picture], count: int, most: int) -> list[dict]:
        """Rows of one to `most` pictures that are described in order."""
        rows = []
        for number in range(count):
            shown = [pictures[i] for i in self.rng.integers(0, len(pictures), self.rng.integers(1, most + 1))]
            rows.append(describe(f"{name}-{number}", shown))
        return rows

    def write_videos(self, name: str, count: int, most_frames: int, most_cards: int, fewest: float = 1.5) -> list[dict]:
        """Rows of `count` videos of `fewest` to `most_frames` frames (log-uniform), each with cards in it and one question per card."""
        rows = []
        for number in tqdm(range(count), desc=f"{name} videos", unit="video", mininterval=1, disable=self.quiet):
            num_frames = round(float(np.exp(self.rng.uniform(np.log(fewest), np.log(most_frames + 0.49)))))
            num_frames = max(2, min(num_frames, most_frames))
            frames = draw_movie(num_frames, self.rng)
            colours = self.rng.permutation(list(COLOURS))[: self.rng.integers(1, min(most_cards, num_frames) + 1)]
            cards = [self._any_card(str(colour)) for colour in colours]
            for place, card in zip(self.rng.permutation(num_frames), cards, strict=False):
                frames[place] = draw_card(card, self.rng)
            file = f"{name}-{number:04d}.mp4"
            write_video(self.folder / "media" / file, frames, self.scale)
            asked = [cards[i] for i in self.rng.permutation(len(cards))]
            turns = [(("" if place else "<video>\n") + question(card), answer(card)) for place, card in enumerate(asked)]
            shown = ["".join(card) for card in cards]
            rows.append({"id": f"{name}-{number}", "video": file, "cards": shown, **dialogue(*turns)})
        return rows

    def story(self, num_tokens: int, num_questions: int = len(FACTS)) -> tuple[str, list[tuple[str, str]]]:
        """A text with facts scattered in it, and up to `num_questions` about them with their answers; together they have `num_tokens`
        tokens as `write_passages` writes them."""
        kinds = [str(kind) for kind in self.rng.permutation(list(FACTS))[: max(1, num_tokens // 30)]]
        values = {kind: str(self.rng.choice(FACTS[kind])) for kind in kinds}
        sentences = [f"the {kind} is {values[kind]} ." for kind in kinds]
        questions = [(f" what is the {kind} ?", f"{values[kind]} .") for kind in self.rng.permutation(kinds)[:num_questions]]
        # A fact has 5 tokens, a question 5 and its answer 2, and a line ends before each; then the end of the text.
        room = num_tokens - 5 * len(kinds) - 9 * len(questions) - 1
        full, rest = divmod(room, len(FILLER[0].split()))
        sentences += [str(self.rng.choice(FILLER)) for _ in range(full)]
        if rest:
            sentences.append(" ".join([*FILLER[0].split()[: rest - 1], "."]))
        return " ".join(sentences[i] for i in self.rng.permutation(len(sentences))), questions

    def write_stories(self, count: int, most_tokens: int) -> list[dict]:
        """Dialogues about texts of 36 to `most_tokens` tokens; only the answers are trained."""
        rows = []
        for number in range(count):
            text, ((first, value), *rest) = self.story(int(np.exp(self.rng.uniform(np.log(36), np.log(most_tokens - 10)))))
            rows.append({"id": f"story-{number}", "cards": [], **dialogue((text + "\n" + first, value), *rest)})
        return rows

    def write_passages(self, name: str, count: int, num_tokens: int) -> None:
        """The same as running text with one question, each of exactly `num_tokens` tokens with the one that ends it.

        One question only: the text ends after its answer, as a dialogue's turn does. With several, only the position would tell whether
        an answer ends the text, and that is what a model then learns."""
        texts = [self.story(num_tokens, 1) for _ in range(count)]
        self.write_rows(
            name, [{"text": "\n".join([text, *(line for ask, value in asked for line in (ask, " " + value))])} for text, asked in texts]
        )

    def write_needles(self, count: int, haystack_frames: int) -> None:
        """Held-out cards, each with up to three trained cards of other colours to mislead, and a film without cards."""
        rows = []
        for number in range(count):
            card = HELD_OUT[number % len(HELD_OUT)]
            others = [str(colour) for colour in self.rng.permutation(list(COLOURS)) if colour != card.colour][:3]
            files = [f"{number:03d}.png", *(f"{number:03d}-other{place}.png" for place in range(3))]
            for file, shown in zip(files, [card, *map(self._any_card, others)], strict=True):
                self.save_picture(self.folder / "needles" / file, draw_card(shown, self.rng))
            row = {"id": f"needle-{number}", "image": files[0], "distractors": files[1:], "cards": ["".join(card)]}
            rows.append(row | {"question": question(card), "answer": answer(card)})
        self.write_rows("needles/needles.jsonl", rows)
        write_video(self.folder / "needles" / "haystack.mp4", draw_movie(haystack_frames, self.rng), self.scale)

    def write_text_needles(self, count: int) -> None:
        """Facts, each with one of every other kind to mislead, and a file of filler."""
        rows = []
        for number in range(count):
            values = {kind: str(self.rng.choice(words)) for kind, words in FACTS.items()}
            kind = list(FACTS)[number % len(FACTS)]
            sentences = {name: f"the {name} is {value} ." for name, value in values.items()}
            row = {"id": f"fact-{number}", "facts": sentences.pop(kind), "distractors": list(sentences.values())}
            rows.append(row | {"question": f" what is the {kind} ?", "answer": f"{values[kind]} ."})
        self.write_rows("text_needles.jsonl", rows)
        (self.folder / "filler.txt").write_text("\n".join(FILLER) + "\n")

    def write_tokenizer(self) -> None:
        """A SentencePiece model with one piece for every word of this world."""
        words = " ".join([*COLOURS, *GROUNDS, *SIGNS, *SHAPES, *MOVES, *FACTS, *(word for words in FACTS.values() for word in words)])
        words += " what is on card the a moves describe says ? ."
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([word + " " + word for word in words.split()] * 3), model_writer=model, model_type="bpe", vocab_size=512,
            hard_vocab_limit=False, user_defined_symbols=["\n"], minloglevel=2,
        )  # fmt: skip
        (self.folder / "tokenizer.model").write_bytes(model.getvalue())
        encoder = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        for word in set(words.split()):
            assert len(encoder.encode(f"a {word}")) == 2, word

    def _any_card(self, colour: str) -> Card:
        return TRAINED[colour][self.rng.integers(len(TRAINED[colour]))]


def describe(name: str, pictures: list[Picture]) -> dict:
    """The row that asks to describe some pictures in order."""
    question, answer = "<image>" * len(pictures) + "\n describe", " ".join(picture.caption for picture in pictures)
    cards = [card for picture in pictures for card in picture.cards]
    return {"id": name, "images": [picture.file for picture in pictures], "cards": cards, **dialogue((question, answer))}


def dialogue(*turns: tuple[str, str]) -> dict:
    """LLaVA's list of turns for pairs of question and answer."""
    speakers = [{"from": speaker, "value": value} for pair in turns for speaker, value in zip(("human", "gpt"), pair, strict=True)]
    return {"conversations": speakers}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=4000, help="[%(default)s]")
    parser.add_argument("--albums", type=int, default=1500, help="[%(default)s]")
    parser.add_argument("--short_videos", type=int, default=1500, help="[%(default)s]")
    parser.add_argument("--long_videos", type=int, default=300, help="[%(default)s]")
    parser.add_argument("--stories", type=int, default=3000, help="[%(default)s]")
    parser.add_argument("--short_passages", type=int, default=120, help="[%(default)s]")
    parser.add_argument("--middle_passages", type=int, default=160, help="[%(default)s]")
    parser.add_argument("--long_passages", type=int, default=400, help="[%(default)s]")
    parser.add_argument("--needles", type=int, default=192, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    arguments = parser.parse_args(argv)
    world = World(arguments.output_dir, arguments.seed)
    world.write_tokenizer()
    pictures = world.write_images(arguments.images)
    captions = [describe(f"image-{number}", [picture]) for number, picture in enumerate(pictures)]
    world.write_rows("images.jsonl", captions)
    world.write_rows("albums.jsonl", world.write_albums("album", pictures, arguments.albums, 4))
    stories = world.write_stories(arguments.stories, SHORT)
    world.write_rows("stories.jsonl", stories)
    short = world.write_videos("short", arguments.short_videos, SHORT_FRAMES, 6)
    world.write_rows("short.jsonl", short + captions[: len(short) // 4] + stories[: len(short) // 4])
    world.write_rows("long.jsonl", world.write_videos("long", arguments.long_videos, LONG_FRAMES, 8))
    world.write_passages("passages-short.jsonl", arguments.short_passages, SHORT)
    world.write_passages("passages-middle.jsonl", arguments.middle_passages, MIDDLE)
    world.write_passages("passages-long.jsonl", arguments.long_passages, LONG)
    world.write_needles(arguments.needles, 256)
    world.write_text_needles(arguments.needles)


if __name__ == "__main__":
    main()
