"""Whether records about films are true: told from the films' scripts alone, by other code than that which answers."""

from __future__ import annotations

import re

from films import Scene, shown_at, shown_between


def check_caption(record: dict, scenes: list[Scene]) -> None:
    """AssertionError unless the caption tells every scene of its clip in order, and nothing else."""
    expected = [
        f"the screen is {scene.colour} while a {scene.shape} moves from {scene.move[0]} to {scene.move[1]}, "
        f"and the word {scene.word} stands at the {scene.place}."
        for scene in shown_between(scenes, record["start_s"], record["end_s"])
    ]
    assert record["caption"] == "Here " + " After that, ".join(expected), (record, expected)


def check_summary(record: dict, scenes: list[Scene]) -> None:
    told = re.search(r"in this order: (.*)\.", record["summary"])[1].split(", then ")
    assert told == [f"{scene.colour} behind the word {scene.word}" for scene in scenes] and record["domain"] == "Film"


def check_question(record: dict, scenes: list[Scene]) -> None:
    """AssertionError unless the answer is right, and the span holds what it rests on."""
    numbers = [float(number) for number in re.findall(r"second ([0-9.]+)", record["question"])]
    start_s, end_s = record["start_s"], record["end_s"]
    scene, colours = shown_at(scenes, start_s), [scene.colour for scene in shown_between(scenes, start_s, end_s)]
    expected, length = {
        "Attribute": (scene.colour.capitalize(), 1),
        "OCR": (scene.word, 1),
        "Object": (f"A {scene.shape}.", 1),
        "Action": (f"It moves from {scene.move[0]} to {scene.move[1]}.", 1),
        "Spatial": (f"At the {scene.place}.", 1),
        "Temporal": (colours[1].capitalize() if len(colours) > 1 else None, 1),
        "Synopsis": (", then ".join(colours).capitalize() + ".", 2),
    }[record["type"]]
    assert record["answer"] == expected, (record, expected)
    assert numbers == [start_s, end_s][:length] and 0 <= start_s < end_s <= sum(scene.duration_s for scene in scenes), record
