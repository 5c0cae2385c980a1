"""Make the data of the million-token needle run: the quickstart's world, seven times as large in pixels, in more and longer videos.

    images, albums, stories, short           as in ../quickstart/make_data.py; videos of 2 to 32 frames
    notes                                    texts that tell what cards say, asked for by their colours
    quizzes                                  the same with pictures: two to four cards
    long-512, long-1536, long-6000           videos of 2 to 512, 2 to 1,536 and 1,500 to 6,000 frames with questions
    passages-N                               texts of exactly N tokens, for language modelling
    needles/                                 held-out cards and a haystack of 6,000 frames

All processors draw and encode. Running it again with the same arguments writes the same rows and pictures.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from make_data import COLOURS, FILLER, SHORT, SIGNS, Card, Picture, World, answer, describe, dialogue, question  # noqa: E402

SHORT_FRAMES = 32
VIDEOS = {"short": (1.5, SHORT_FRAMES, 6), "long-512": (1.5, 512, 8), "long-1536": (1.5, 1536, 8), "long-6000": (1500, 6000, 8)}
"""Fewest and most frames of a video, most cards in it."""
PASSAGES = {128: 1000, 4096: 256, 16384: 64, 65536: 24, 262144: 12, 1048576: 3}
"""Tokens of a passage -> how many; one to three million tokens of each of the longer."""
PART = 40  # pictures or short videos made by one task

Task = tuple[Callable, Path, tuple[int, ...], int, tuple]


def run_task(task: Task):
    """One call of a World of its own, in a worker process."""
    method, folder, seed, scale, arguments = task
    return method(World(folder, seed, scale, quiet=True), *arguments)


def quizzes(pictures: list[Picture], count: int, rng: np.random.Generator) -> list[dict]:
    """Rows of two to four cards of different colours and a question about each, in any order.

    At 196 tokens a frame the border and the sign of a card are in different tokens. To answer from several cards, the tower has to write
    the colour next to the sign: captions of one card never ask for that, and of videos too few frames are cards to learn it from them.
    """
    shown = [picture for picture in pictures if picture.cards]
    by_colour: dict[str, list[Picture]] = {}
    for picture in shown:
        by_colour.setdefault(_card(picture).colour, []).append(picture)
    rows = []
    for number in range(count):
        colours = rng.permutation(sorted(by_colour))[: rng.integers(2, 5)]
        chosen = [by_colour[colour][rng.integers(len(by_colour[colour]))] for colour in colours]
        asked = [_card(chosen[place]) for place in rng.permutation(len(chosen))]
        pictures_first = "<image>" * len(chosen) + "\n"
        turns = [((pictures_first if place == 0 else "") + question(card), answer(card)) for place, card in enumerate(asked)]
        cards = [name for picture in chosen for name in picture.cards]
        rows.append({"id": f"quiz-{number}", "images": [picture.file for picture in chosen], "cards": cards, **dialogue(*turns)})
    return rows


def notes(count: int, most_tokens: int, rng: np.random.Generator) -> list[dict]:
    """Rows of texts of up to `most_tokens` tokens that tell what two to eight cards say, and questions about some of them like `quizzes`.

    They belong to the language model's own training: it then reads the questions, and says the colour that was asked for, before it sees a
    picture. Left to the pictures' stages alone this came late or not at all: of one run's 190 needles, 188 signs were read and 75
    colours named wrongly, which the question itself spells.
    """
    rows = []
    for number in range(count):
        colours = [str(colour) for colour in rng.permutation(list(COLOURS))[: rng.integers(2, len(COLOURS) + 1)]]
        cards = [Card(colour, "", str(rng.choice(SIGNS))) for colour in colours]
        asked = [cards[place] for place in rng.permutation(len(cards))[: rng.integers(1, 5)]]
        told = [f"the {card.colour} card says {card.sign} ." for card in cards]
        # A card's sentence has 6 tokens, a filler 7, a question 7 and its answer 4, and a line ends before each.
        most_filler = (most_tokens - 6 * len(told) - 13 * len(asked)) // 7
        told += [str(rng.choice(FILLER)) for _ in range(rng.integers(0, max(0, most_filler) + 1))]
        text = " ".join(told[place] for place in rng.permutation(len(told)))
        turns = [((text + "\n" if place == 0 else "") + question(card), answer(card)) for place, card in enumerate(asked)]
        rows.append({"id": f"note-{number}", "cards": [], **dialogue(*turns)})
    return rows


def _card(picture: Picture) -> Card:
    """What a caption like "the red card says K ." tells of its card."""
    _, colour, _, _, sign, _ = picture.caption.split()
    return Card(colour, "", sign)


def video_tasks(name: str, count: int, out: Path, seed: int, scale: int) -> list[Task]:
    """Tasks whose results are the rows of `count` videos; the longest videos first, one to a task."""
    fewest, most, cards = VIDEOS[name]
    part = PART if name == "short" else 1
    kind = list(VIDEOS).index(name)
    return [
        (World.write_videos, out, (seed, 1, kind, first), scale, (f"{name}-{first}", min(part, count - first), most, cards, fewest))
        for first in range(0, count, part)
    ]


def passage_task(length: int, count: int, out: Path, seed: int) -> Task:
    """The task that writes `count` passages of `length` tokens."""
    return World.write_passages, out, (seed, 3, length), 1, (f"passages-{length}.jsonl", count, length)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--scale", type=int, default=7, help="pictures are 56 x SCALE pixels wide [%(default)s]")
    parser.add_argument("--images", type=int, default=8000, help="[%(default)s]")
    parser.add_argument("--stories", type=int, default=12000, help="and as many notes [%(default)s]")
    parser.add_argument("--short", type=int, default=3000, help="videos [%(default)s]")
    parser.add_argument("--long_512", type=int, default=300, help="videos [%(default)s]")
    parser.add_argument("--long_1536", type=int, default=160, help="videos [%(default)s]")
    parser.add_argument("--long_6000", type=int, default=24, help="videos [%(default)s]")
    parser.add_argument("--passages", type=float, default=1.0, help="passages of each length, as a multiple of the usual [%(default)s]")
    parser.add_argument("--needles", type=int, default=240, help="[%(default)s]")
    parser.add_argument("--haystack_frames", type=int, default=6000, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    arguments = parser.parse_args(argv)
    out, seed, scale = arguments.output_dir, arguments.seed, arguments.scale
    world = World(out, (seed, 0), scale)
    world.write_tokenizer()

    counts = {"long-6000": arguments.long_6000, "long-1536": arguments.long_1536, "long-512": arguments.long_512, "short": arguments.short}
    tasks: dict[str, list[Task]] = {
        "needles": [(World.write_needles, out, (seed, 2), scale, (arguments.needles, arguments.haystack_frames))],
        "passages": [passage_task(length, round(arguments.passages * many), out, seed) for length, many in reversed(PASSAGES.items())],
        **{name: video_tasks(name, count, out, seed, scale) for name, count in counts.items()},
        "images": [
            (World.write_images, out, (seed, 4, first), scale, (min(PART, arguments.images - first), first))
            for first in range(0, arguments.images, PART)
        ],
        "stories": [(World.write_stories, out, (seed, 5), scale, (arguments.stories, SHORT))],
    }
    results = run_all(tasks)

    pictures = [picture for part in results["images"] for picture in part]
    captions = [describe(f"image-{number}", [picture]) for number, picture in enumerate(pictures)]
    stories, told = results["stories"][0], notes(arguments.stories, SHORT, world.rng)
    rows = {name: [row for part in results[name] for row in part] for name in VIDEOS}
    quarter = len(rows["short"]) // 4
    rows["short"] += captions[:quarter] + stories[:quarter] + told[:quarter]
    rows |= {"images": captions, "albums": world.write_albums("album", pictures, len(pictures) // 3, 4), "stories": stories, "notes": told}
    rows["quizzes"] = quizzes(pictures, len(pictures) // 2, world.rng)
    for name, lines in rows.items():
        world.write_rows(f"{name}.jsonl", lines)


def run_all(tasks: dict[str, list[Task]]) -> dict[str, list]:
    """Results of all tasks, in order, by name; begun in the order given."""
    every = [(name, task) for name, some in tasks.items() for task in some]
    results: dict[str, list] = {name: [] for name in tasks}
    with ProcessPoolExecutor(min(len(every), os.cpu_count() or 1)) as pool:
        done: Iterable = pool.map(run_task, [task for _, task in every])
        for (name, _), result in zip(every, tqdm(done, total=len(every), desc="data", unit="part", mininterval=1), strict=True):
            results[name].append(result)
    return results


if __name__ == "__main__":
    main()
