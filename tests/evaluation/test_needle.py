"""Needles lie where they should, haystacks give the frames and sentences they should, and results survive."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from media import image_bytes, read_number, video_bytes
from tiny_model import make_config
from tiny_needles import Numbers, make_needles
from tiny_tokenizers import write_bpe, write_sentencepiece

from megatron_longvila.config import VisionConfig
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.evaluation.needle_grid import Cell, Grid, Trial, distractor_places, needle_place, split_rows

DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tiny.model")


# ------------------------------------------------------------------------------------------------ the grid


@pytest.mark.parametrize(("length", "depth", "place"), [(10, 0.0, 0), (10, 1.0, 9), (11, 0.5, 5), (6, 0.2, 1), (6, 0.8, 4), (1, 0.6, 0)])
def test_depth_is_a_place(length, depth, place):
    assert needle_place(length, depth) == place


@pytest.mark.parametrize(("needles", "trials"), [(2, 1), (5, 5), (5, 3), (64, 16), (3, 7), (6, 2)])
def test_every_cell_has_needles_of_its_own(needles, trials):
    grid = Grid((4, 8), DEPTHS, trials, needles, seed=3)
    for length in grid.lengths:
        chosen = np.asarray([[trial.needle for trial in grid.trials(Cell(length, depth))] for depth in DEPTHS])
        for number in range(trials):
            assert len(set(chosen[:, number])) > 1, "a trial meets one needle at every depth"
        if trials <= needles:
            assert all(len(set(cell)) == trials for cell in chosen.tolist()), "a cell asks for one needle twice"
        counts = np.bincount(chosen.flatten(), minlength=needles)
        assert counts.max() - counts.min() <= 1, "the file is not used evenly"


def test_trials_depend_on_nothing_but_their_cell():
    short, long = Grid((8,), DEPTHS, 4, 16), Grid((4, 8, 16), DEPTHS, 4, 16, control=True)
    for depth in DEPTHS:
        assert short.trials(Cell(8, depth)) == long.trials(Cell(8, depth))
        pairs = zip(long.trials(Cell(8, depth)), long.trials(Cell(8, depth, control=True)), strict=True)
        assert all((one.needle, one.number, one.seed) == (other.needle, other.number, other.seed) for one, other in pairs)
    assert len(long.cells) == 2 * len(DEPTHS) * 3 and len(set(long.cells)) == len(long.cells)
    firsts = {Grid((8,), DEPTHS, 1, 1000, seed=seed).trials(Cell(8, 0.0))[0].needle for seed in range(5)}
    assert len(firsts) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": ()}, "must name at least one value"),
        ({"lengths": (8, 8)}, "each once"),
        ({"lengths": (0,)}, "must be at least 1"),
        ({"depths": (0.0, 1.5)}, "must lie between 0"),
        ({"trials_per_cell": 0}, "at least 1"),
        ({"num_needles": 1}, "give at least 2"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Grid(**{"lengths": (8,), "depths": DEPTHS, "trials_per_cell": 2, "num_needles": 4} | change)


def test_distractors_lie_beside_the_needle():
    seen = set()
    for length in (1, 2, 3, 8, 33):
        for number in range(20):
            trial = Trial(Cell(length, 0.5), number, 0, (7, length, number))
            places = distractor_places(trial, 3, needle_place(length, 0.5))
            assert len(set(places)) == len(places) == min(3, (length - 1) // 2)
            assert needle_place(length, 0.5) not in places and all(0 <= place < length for place in places)
            assert places == distractor_places(trial, 3, needle_place(length, 0.5))
            if length == 33:
                seen.update(places)
    assert len(seen) > 20  # not always the same ones


@pytest.mark.parametrize(
    ("lengths", "tokens", "dp_size", "sizes"),
    [([30] * 5, 64, 1, [2, 2, 1]), ([30] * 5, 64, 2, [2, 1, 1, 1]), ([100] * 3, 64, 1, [1, 1, 1]), ([10], 64, 4, [1]),
     ([10] * 9, 64, 2, [5, 4])],
)  # fmt: skip
def test_rows_are_even_and_spread(lengths, tokens, dp_size, sizes):
    rows = split_rows(lengths, tokens, dp_size)
    assert [len(row) for row in rows] == sizes and sum(rows, []) == list(range(len(lengths)))


# ------------------------------------------------------------------------------------------------ frames


def test_frames_are_in_place():
    from megatron_longvila.evaluation.needle import ENDLESS_STEP, place_frames

    needle = make_needles(1, distractors=2)[0]
    grid = Grid((10,), DEPTHS, 3, 4, control=True)
    for cell in grid.cells:
        for trial in grid.trials(cell):
            frames = place_frames(trial, needle, Numbers(7), 3)
            start = trial.number * (7 // 3)
            at = needle_place(10, cell.depth)
            assert len(frames) == 10 and frames[at] == ((start + at) % 7 if cell.control else needle.image)
            others = [place for place, frame in enumerate(frames) if frame not in (needle.image, *needle.distractors)]
            assert [frames[place] for place in others] == [(start + place) % 7 for place in others]
            assert {frame for frame in frames if isinstance(frame, Path)} == {
                *needle.distractors,
                *([] if cell.control else [needle.image]),
            }
    assert place_frames(grid.trials(Cell(10, 0.0))[2], make_needles(1)[0], Numbers(), 3)[1] == 2 * ENDLESS_STEP + 1


def test_video_haystack_runs_through_its_files_and_starts_over(tmp_path):
    from megatron_longvila.evaluation.needle_haystack import FrameReader, VideoHaystack

    (tmp_path / "a.mp4").write_bytes(video_bytes(range(40), rotation=90))  # 10 frames a second
    (tmp_path / "b.mp4").write_bytes(video_bytes(range(100, 125)))
    (tmp_path / "card.png").write_bytes(image_bytes(999))
    vision = VisionConfig(image_size=64, patch_size=16)
    haystack = VideoHaystack([tmp_path / "a.mp4", tmp_path / "b.mp4"], fps=2.0, vision=vision)
    expected = [0, 5, 10, 15, 20, 25, 30, 35, 100, 105, 110, 115, 120]
    assert haystack.num_frames == len(expected)
    reader = FrameReader(haystack, vision)
    keys = [12, 3, tmp_path / "card.png", 8, 13, 3, 25]
    assert [read_number(picture) for picture in reader(keys)] == [120, 15, 999, 100, 0, 15, 120]
    assert reader.num_read == 5
    assert [read_number(picture) for picture in reader(range(26))] == expected * 2
    assert reader.num_read == 5 + 13 - 4  # the kept ones are not decoded again
    assert haystack.describe() == VideoHaystack([tmp_path / "a.mp4", tmp_path / "b.mp4"], fps=2.0, vision=vision).describe()

    (tmp_path / "b.mp4").write_bytes(video_bytes(range(101, 126)))
    assert haystack.describe() != VideoHaystack([tmp_path / "a.mp4", tmp_path / "b.mp4"], fps=2.0, vision=vision).describe()
    for path, message in ((tmp_path / "c.mp4", "does not exist"), (tmp_path / "text.mp4", "text.mp4")):
        (tmp_path / "text.mp4").write_text("not a video")
        with pytest.raises(ValueError, match=message):
            VideoHaystack([path], fps=1.0, vision=vision)
    with pytest.raises(ValueError, match="must be positive"):
        VideoHaystack([tmp_path / "a.mp4"], fps=0.0, vision=vision)


def test_cache_keeps_the_latest_frames(monkeypatch):
    from megatron_longvila.evaluation import needle_haystack

    monkeypatch.setattr(needle_haystack, "CACHE_BYTES", 4 * 3 * 4 * 4)
    reader = needle_haystack.FrameReader(Numbers(), VisionConfig(image_size=4, patch_size=2))
    for keys, read in (([0, 1, 2, 3], 4), ([0, 3], 4), ([4], 5), ([0, 3], 5), ([1], 6), ([5, 6, 7, 8, 9], 11), ([9], 11)):
        assert [int(picture[0, 0, 0]) for picture in reader(keys)] == [key + 1 for key in keys]
        assert reader.num_read == read


def test_generated_frames_need_no_other_frames():
    from megatron_longvila.evaluation.needle_haystack import SCENE_FRAMES, GeneratedHaystack

    haystack = GeneratedHaystack(5, 24)
    frames = haystack.read(range(2 * SCENE_FRAMES))
    assert frames.shape == (2 * SCENE_FRAMES, 24, 24, 3) and frames.dtype == np.uint8
    assert np.array_equal(GeneratedHaystack(5, 24).read([20, 3]), frames[[20, 3]])
    assert len({frame.tobytes() for frame in frames}) == len(frames)
    assert not np.array_equal(GeneratedHaystack(6, 24).read([3])[0], frames[3])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "1 is not JSON"),
        (["[]"], "id, image, question, answer must be a text"),
        ([{"id": "a", "image": "x.png", "question": " ", "answer": "b"}], "question must be a text"),
        ([{"id": "a", "image": "y.png", "question": "q", "answer": "b"}], "'y.png' is not in"),
        ([{"id": "a", "image": "../x.png", "question": "q", "answer": "b"}], "leads out of"),
        ([{"id": "a", "image": "x.png", "question": "q", "answer": "b", "distractors": "x.png"}], "`distractors` must be a list"),
        ([{"id": "a", "image": "x.png", "question": "q", "answer": "b"}] * 2, "was given before"),
    ],
)
def test_needle_lines_are_checked(tmp_path, lines, message):
    from megatron_longvila.evaluation.needle import read_needles

    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.png").write_bytes(image_bytes(1))
    path = tmp_path / "sub" / "needles.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        read_needles(path)


# ------------------------------------------------------------------------------------------------ text


def test_passages_are_full_and_hold_the_needle(tmp_path, tokenizer_path):
    from megatron_longvila.evaluation.text_needle import TextHaystack, TextNeedle

    tokenizer = load_tokenizer(tokenizer_path)
    sentences = [f"A green triangle goes {word}." for word in ("up", "down", "left")] + ["There are two shapes."]
    (tmp_path / "filler.txt").write_text("\n\n".join(sentences))
    haystack = TextHaystack(tmp_path / "filler.txt", tokenizer)
    assert haystack.num_tokens == sum(len(tokenizer.encode(sentence)) for sentence in sentences)
    needle = TextNeedle("n", "What is the circle?", "blue", "The circle is blue.", ("The square is red.",))
    longest = max(len(tokenizer.encode(sentence)) for sentence in sentences) + 1
    for length in (24, 60, 300):
        for depth in (0.0, 0.5, 1.0):
            for control in (False, True):
                trial = Trial(Cell(length, depth, control), 1, 0, (1, length))
                passage = haystack.passage(trial, needle)
                tokens = len(tokenizer.encode(passage))
                assert length - longest < tokens <= length
                assert passage.count(needle.facts) == (not control) and passage.count("The square is red.") == 1
                rest = passage.replace(needle.facts, "").replace(needle.distractors[0], "").split(".")
                assert {f"{part.strip()}." for part in rest if part.strip()} <= set(sentences)
                if not control:
                    before = len(tokenizer.encode(passage[: passage.index(needle.facts)]))
                    assert abs(before - depth * (tokens - 8)) <= longest + 8  # a sentence, and room for the other inserted one
    with pytest.raises(ValueError, match="alone take"):
        haystack.passage(Trial(Cell(5, 0.0), 0, 0, (1,)), needle)
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (("empty.txt", "holds no sentence"), ("none.txt", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            TextHaystack(tmp_path / name, tokenizer)


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_text_questions_in_and_without_a_template(tmp_path, tokenizer_path, kind):
    from megatron_longvila.evaluation.text_needle import TextNeedle, text_question

    tokenizer = load_tokenizer(tokenizer_path if kind == "sentencepiece" else write_bpe(tmp_path / "bpe"))
    needle = TextNeedle("n", "What is the circle?", "blue circle", "The circle is blue.")
    plain = text_question(needle, "The circle is blue. It moves.", tokenizer, None)
    ids = plain.encoded.input_ids_L.tolist()
    assert ids == [*tokenizer.encode("The circle is blue. It moves. What is the circle? blue circle"), tokenizer.eos_id]
    assert plain.answer_ids == (*tokenizer.encode(" blue circle" if kind == "bpe" else "blue circle"), tokenizer.eos_id)
    assert ids[plain.answer_at + 1 :] == list(plain.answer_ids)

    asked = text_question(needle, "The circle is blue.", tokenizer, "plain")
    assert asked.answer_ids == (*tokenizer.encode("blue circle"), tokenizer.eos_id)
    prompt = tokenizer.decode(asked.encoded.input_ids_L[: asked.answer_at + 1].tolist())
    assert " ".join(prompt.split()) == "The circle is blue. What is the circle?" and prompt.endswith("\n")
    for tokens, eos_id, message in ((lambda text: [len(text)], 0, "into one token"), (tokenizer.encode, None, "declares none")):
        with pytest.raises(ValueError, match=message):
            text_question(needle, "", SimpleNamespace(encode=tokens, eos_id=eos_id), None)


# ------------------------------------------------------------------------------------------------ results


def make_record(number: int, correct: bool, *, greedy: bool | None = None, expected: str = "red", question: str = "colour?") -> dict:
    said = {"predicted": expected if correct else "", "correct": correct, "tokens": [1]}
    record = {"trial": number, "needle": f"n{number}", "question": question, "expected": expected, "seconds": 0.5, "teacher_forcing": said}
    return record | ({} if greedy is None else {"greedy": said | {"correct": greedy}})


def test_summary_counts(tmp_path):
    from megatron_longvila.evaluation.heat_map import draw_heat_maps
    from megatron_longvila.evaluation.needle_results import Records, cells_csv, summarise

    records = Records(tmp_path, {"checkpoint": "a"})
    colours, shapes = ["red", "blue", "red", "green"], ["circle", "circle", "square", "circle"]
    records.add(Cell(8, 0.0), [make_record(n, n != 1, greedy=n != 1, expected=colours[n]) for n in range(4)])
    records.add(Cell(8, 0.0, control=True), [make_record(n, n == 0, greedy=False, expected=colours[n]) for n in range(4)])
    records.add(Cell(16, 1.0), [make_record(n, True, greedy=True, expected=shapes[n], question="shape?") for n in range(4)])
    summary = summarise(records.trials)
    assert (summary["correct"], summary["trials"], summary["needle_accuracy"]) == (7, 8, 7 / 8)
    assert summary["chance"] == 3 / 8 and summary["chance_given_question"] == 5 / 8
    assert summary["no_needle_accuracy"] == 1 / 4 and summary["no_needle_trials"] == 4
    assert summary["disagreements"] == 1 and summary["seconds"] == 6.0
    assert summary["accuracy_by_length"] == {"8": 3 / 4, "16": 1.0}
    assert [(cell["length"], cell["depth"], cell["greedy"], cell["no_needle"]) for cell in summary["cells"]] == [
        (8, 0.0, 3 / 4, 1 / 4),
        (16, 1.0, 1.0, None),
    ]
    assert cells_csv(summary).splitlines()[2] == "16,1.0,4,1.0,1.0,1.0,,0"
    draw_heat_maps([summary, summary | {"mode": "text"}], ["before", "after"], tmp_path / "maps" / "two.png")
    assert (tmp_path / "maps" / "two.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="2 summaries need as many titles"):
        draw_heat_maps([summary, summary], ["before"], tmp_path / "map.png")
    with pytest.raises(ValueError, match="no trial with a needle"):
        summarise([trial for trial in records.trials if trial["control"]])


def test_finished_cells_survive_and_other_settings_are_refused(tmp_path):
    from megatron_longvila.evaluation.needle_results import Records

    settings = {"checkpoint": "a", "depths": [0.0, 0.5]}
    first = Records(tmp_path, settings)
    first.add(Cell(8, 0.0), [make_record(0, True), make_record(1, True)])
    (tmp_path / ".trials.jsonl.partial").write_text('{"length": 8, "dep')  # a kill while the next cell was written
    again = Records(tmp_path, settings)
    assert again.done == {(8, 0.0, False)} and again.trials == first.trials
    again.add(Cell(8, 0.5), [make_record(0, False), make_record(1, True)])
    assert Records(tmp_path, settings).done == {(8, 0.0, False), (8, 0.5, False)}
    with pytest.raises(ValueError, match=r"trials of another test \(checkpoint changed\).*--restart"):
        Records(tmp_path, settings | {"checkpoint": "b"})
    assert Records(tmp_path, settings).done, "a refusal must leave the trials alone"
    assert not Records(tmp_path, settings | {"checkpoint": "b"}, restart=True).done


def test_tokens_and_batches(tokenizer_path):
    from megatron_longvila.evaluation.needle_run import video_test

    config = make_config(tokenizer_path)
    grid = Grid((1, 4, 12), (0.0, 0.5, 1.0), 3, 6)
    test = video_test(grid, make_needles(6), Numbers(), load_tokenizer(tokenizer_path), config, protocol="both")
    for length in grid.lengths:
        longest = max(question.max_tokens("both") for question in map(test.make_question, grid.trials(Cell(length, 0.5))))
        assert longest <= test.max_tokens(length) and test.max_tokens(length) - longest <= 2  # another needle may have a longer answer
    assert [line["rows"] for line in test.plan(1)] == [1, 1, 3] and test.plan(4)[0]["rows"] == 3
    batches = test.batches(grid.cells, 4)
    assert [cell for batch in batches for cell in batch] == grid.cells and all(
        len({cell.length for cell in batch}) == 1 for batch in batches
    )
    assert len(batches[0]) == 3 and len(batches) > 3
    with pytest.raises(ValueError, match=r"--lengths 12 makes trials of \d+ tokens.*add --model.llm.max_position_embeddings"):
        test.check_positions(30)
    test.check_positions(test.max_tokens(12))


def test_the_models_own_word_is_a_record(tokenizer_path):
    """`tokens` past the tokenizer's vocabulary (spare rows of the embedding) are no text and no error."""
    from megatron_longvila.evaluation.needle_protocols import Outcome
    from megatron_longvila.evaluation.needle_run import video_test

    grid = Grid((2,), (0.0,), 2, 2)
    test = video_test(grid, make_needles(2), Numbers(), load_tokenizer(tokenizer_path), make_config(tokenizer_path), protocol="both")

    class Says:
        def ask(self, questions, protocol, *, tokens_per_row):
            return [Outcome(questions[0].answer_ids, (*questions[0].answer_ids[:-1], 10_000)), Outcome(None, questions[1].answer_ids)]

    ((first, second),) = test.ask([Cell(2, 0.0)], Says())
    assert first["teacher_forcing"]["correct"] and not first["greedy"]["correct"]
    assert first["greedy"]["predicted"] == first["expected"] and "teacher_forcing" not in second and second["greedy"]["correct"]
