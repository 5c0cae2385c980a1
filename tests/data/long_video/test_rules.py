"""Clips, prompts, answers, filters and rows, one rule at a time."""

import itertools
import random

import numpy as np
import pytest
from media import video_bytes
from programs import ROOT

from megatron_longvila.data.long_video.answers import is_refusal, parse_caption, parse_questions, parse_summary, read_question
from megatron_longvila.data.long_video.asking import AnswerError
from megatron_longvila.data.long_video.export import ExportOptions, _choose
from megatron_longvila.data.long_video.filters import _NearDuplicates, find_language, leaks, normalise, shingles, similarity
from megatron_longvila.data.long_video.pictures import clip_frames
from megatron_longvila.data.long_video.prompts import PLACEHOLDERS, QUESTION_TYPES, load_prompt
from megatron_longvila.data.long_video.segments import SegmentOptions, _Task, cut_clips, look, plan_boundaries
from megatron_longvila.data.media import natural_key
from megatron_longvila.data.stream import VideoStream


@pytest.mark.parametrize(
    ("duration_s", "cuts_s", "lengths"),
    [
        (60, [], [10] * 6),
        (64, [], [64 / 6] * 6),
        (4, [], [4]),
        (14.9, [], [14.9]),
        (16, [], [8, 8]),
        (30, [3, 6, 9], [9, 10.5, 10.5]),  # short shots are joined, the long one is halved
        (30, [10, 20], [10, 10, 10]),
        (23, [10, 20], [10, 13]),  # a short rest joins what is before it
        (40, [12, 14], [12, 2 + 26 / 3, 26 / 3, 26 / 3]),
    ],
)
def test_lengths_of_clips(duration_s, cuts_s, lengths):
    ends = plan_boundaries(duration_s, 10.0, cuts_s)
    assert np.diff([0, *ends]) == pytest.approx(lengths)


def test_clips_cover_every_frame_once_whatever_the_cuts():
    draw = random.Random(0)
    for _ in range(300):
        times_s_F = np.cumsum([0.0, *(draw.choice([0.04, 0.2, 12.0]) for _ in range(draw.randint(0, 80)))])
        duration_s = float(times_s_F[-1]) + 0.04
        cuts_s = [float(draw.choice(times_s_F)) for _ in range(draw.randint(0, 6))]
        ends = plan_boundaries(duration_s, 10.0, cuts_s)
        assert ends == sorted(set(ends)) and ends[-1] == duration_s and all(end <= 15.001 for end in np.diff([0, *ends]))
        clips = cut_clips(times_s_F, ends)
        frames = [frame for clip in clips for frame in range(clip["first_frame"], clip["last_frame"] + 1)]
        assert frames == list(range(len(times_s_F)))
        assert clips[0]["start_s"] == 0 and clips[-1]["end_s"] == round(duration_s, 3)
        for clip in clips:
            shown = times_s_F[clip["first_frame"] : clip["last_frame"] + 1]
            assert clip["start_s"] - 1e-3 <= shown[0] and shown[-1] < clip["end_s"] + 1e-3


def test_frames_of_a_clip():
    assert clip_frames(0, 99, 4) == [12, 37, 62, 87]
    assert clip_frames(5, 7, 8) == [5, 6, 7]
    for count in range(1, 60):
        for wanted in range(1, 12):
            frames = clip_frames(10, 9 + count, wanted)
            assert len(frames) == min(count, wanted) == len(set(frames)) and frames[0] >= 10 and frames[-1] <= 9 + count


def test_prompts_in_the_repository_load_and_say_what_is_asked():
    for stage in PLACEHOLDERS:
        prompt = load_prompt(ROOT / "tools" / "prompts" / f"{stage}_v1.md", stage)
        values = {name: f"<{name}>" for name in PLACEHOLDERS[stage]}
        system, user = prompt.messages(values)
        assert system and "{{" not in user and all(value in user for name, value in values.items() if name not in ("start", "end"))


def test_what_a_caption_says_is_not_read_as_a_placeholder(tmp_path):
    path = tmp_path / "p_v3.md"
    path.write_text("## system\nBe exact.\n## user\n{{captions}} of {{duration}}\n")
    prompt = load_prompt(path, "qa")
    assert prompt.name == "p_v3" and len(prompt.hash) == 64
    assert prompt.messages({"captions": "a {{duration}}", "duration": "9"}) == ("Be exact.", "a {{duration}} of 9")


@pytest.mark.parametrize("text", ["", "## user\na", "## user\na\n## system\nb", "x\n## system\na\n## user\nb", "## system\na\n## user\n"])
def test_files_that_are_no_prompts(tmp_path, text):
    (tmp_path / "p.md").write_text(text)
    with pytest.raises(ValueError, match="must be a line"):
        load_prompt(tmp_path / "p.md", "image")


def test_captions():
    assert parse_caption("  A dog\n\nruns. ") == "A dog runs."
    assert parse_caption("<think>Is it a dog?\nYes.</think>\n\nA dog.") == parse_caption("It is.</think>A dog.") == "A dog."
    for text in ("<think>Is it a", "</think>", "A dog.<|im_end|>", "<image> A dog.", "A <think> dog"):
        with pytest.raises(AnswerError):
            parse_caption(text)
    for text in ("I'm sorry, but I can't help", "As an AI, I see", "...", "Damage \ufffd", "half \ud800 pair"):
        with pytest.raises(AnswerError):
            parse_caption(text)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I don\u2019t know.", True),
        ("Unknown", True),
        ("N/A.", True),
        ("I do not have enough context to answer.", True),
        ("I'm just an AI and cannot view videos.", True),
        ("It is not possible to determine the colour from the descriptions.", True),
        ("An unknown man enters.", False),
        ("Unknown Pleasures is written on his shirt.", False),
        ("It is not possible to open the door.", False),
        ("Sorry, I cannot see the video.", True),
        ("Unfortunately, I am unable to see the frames.", True),
        ("I apologize, but the frames are black.", True),
        ("As an AI, I have no eyes.", True),
        ("Unable to determine the colour.", True),
        ("I\u2019m sorry.", True),
        ("The colour cannot be determined.", True),
        ("The name of the man is not mentioned in the video.", True),
        ('A protester holds a sign reading "I can\'t breathe".', False),
        ("A protester holds a sign reading 'I can't breathe'.", False),
        ("\u201cI cannot go on,\u201d says the woman.", False),
        ("A card reads I am sorry.", False),
        ("A man says he cannot swim and is sorry.", False),
        ("A driver is unable to see the road in the fog.", False),
        ('The label says "not enough information".', False),
        ("I", False),
    ],
)
def test_refusals(text, refusal):
    assert is_refusal(text) is refusal


def test_summaries():
    expected = {"summary": "All.", "domain": "Pets & Animals"}
    assert parse_summary('{"summary": "All.", "domain": " pets &  ANIMALS"}') == expected
    assert parse_summary('<think>{Pets?}</think>{"summary": "All.", "domain": "Pets & Animals"}') == expected
    assert parse_summary('```json\n{"summary": "All.", "domain": "Pets & Animals"}\n```') == expected
    for text in (
        "",
        "All.",
        '{"summary": "All."}',
        '{"summary": "All.", "domain": "Cooking"}',
        '{"summary": 3, "domain": "Film"}',
        "[" * 99999,
    ):
        with pytest.raises(AnswerError):
            parse_summary(text)


def test_question_lists():
    assert parse_questions('{"questions": [{"a": 1}]}') == [{"a": 1}] == parse_questions('[{"a": 1}]')
    for text in ("[]", "{}", "[1]", '[{"a": 1}', "null", '"text"'):
        with pytest.raises(AnswerError):
            parse_questions(text)


def test_the_form_of_a_question():
    good = {"type": " ocr ", "question": "What  is written?", "answer": "STOP", "start_s": 1, "end_s": 2.5}
    assert read_question(good) == {"type": "OCR", "question": "What is written?", "answer": "STOP", "start_s": 1.0, "end_s": 2.5}
    bad = [{"type": None}, {"type": "Guess"}, {"question": " "}, {"answer": 3}, {"answer": "\ud800"}, {"start_s": True}, {"start_s": "1"}]
    bad += [{"end_s": float("nan")}, {"end_s": float("inf")}, {"end_s": 10**400}, {"start_s": None}]
    for change in bad:
        with pytest.raises(AnswerError):
            read_question({**good, **change})


@pytest.mark.parametrize(
    ("question", "answer", "leaking"),
    [
        ("What does the red car do?", "Red car.", True),
        ("What does the red car do?", "It stops.", False),
        ("Is the car red?", "Yes", False),
        ("Is the car red or blue?", "Red", False),
        ("Who wears the redcap?", "red", False),
        ("Where is ROSE written?", "\u201crose\u201d", True),
    ],
)
def test_leaks(question, answer, leaking):
    assert leaks(question, answer) is leaking


def test_near_duplicates_are_found_among_thousands_and_only_they():
    draw = random.Random(0)
    vocabulary = [f"word{number}" for number in range(400)]
    texts = [" ".join(draw.choices(vocabulary, k=80)) for _ in range(1500)]
    found = _NearDuplicates(0.8)
    assert [found.add(str(number), text) for number, text in enumerate(texts)] == [None] * len(texts)
    for number in range(0, 1500, 10):
        words = texts[number].split()
        words[draw.randrange(5, 75)] = "changed"  # three of 78 triples: similarity 75/81
        assert similarity(shingles(" ".join(words)), shingles(texts[number])) > 0.8
        assert found.add("again", " ".join(words)) == str(number)


def test_normal_form():
    assert normalise("  The CAFE\u0301, \uff11 time?! ") == "the caf\u00e9 1 time"


def test_characters_count_where_a_script_writes_no_spaces():
    assert normalise("\u5973\u4eba\u62ff\u7740 a red \u4f1e\uff1f") == "\u5973 \u4eba \u62ff \u7740 a red \u4f1e"
    assert normalise("\u0e41\u0e21\u0e27 2") == "\u0e41 \u0e21 \u0e27 2" and normalise("na\u00efve caf\u00e9") == "na\u00efve caf\u00e9"


def test_languages():
    language = find_language()
    assert language("What does the woman hold in her left hand? A red umbrella.") == "en"
    assert language("Was h\u00e4lt die Frau in der linken Hand? Einen roten Schirm.") == "de"


def test_one_question_per_video_keeps_the_types_even():
    taken = dict.fromkeys(QUESTION_TYPES, 0)
    questions = [{"type": kind, "number": number} for number, kind in enumerate(QUESTION_TYPES)]
    for _ in range(21):
        assert len(_choose(questions, taken, ExportOptions("one"))) == 1
    assert set(taken.values()) == {3}
    taken = dict.fromkeys(QUESTION_TYPES, 0)
    chosen = [_choose(questions * 2, taken, ExportOptions("each", max_per_type=3)) for _ in range(3)]
    assert [len(one) for one in chosen] == [14, 7, 0] and set(taken.values()) == {3}
    assert len(_choose(questions, taken, ExportOptions("all"))[0][1]) == 7


def test_natural_order_is_that_of_the_names_alone():
    ordered = ["frame", "frame_02", "frame_2", "frame_002a", "frame_10"]
    assert all(sorted(names, key=natural_key) == ordered for names in itertools.permutations(ordered))


def test_shots_are_found_in_one_go(tmp_path, monkeypatch):
    """Also where a stream has no stamps, whose frames are only reached from its start."""
    path, calls, decode = tmp_path / "a.avi", [], VideoStream._decode
    path.write_bytes(video_bytes([number // 200 % 2 * 4095 for number in range(1200)], encoder="mpeg4", container="avi"))
    monkeypatch.setattr(VideoStream, "_decode", lambda stream, packet: calls.append(packet) or decode(stream, packet))
    found = look(_Task("key", str(path), SegmentOptions(tmp_path, boundaries="shots")))
    assert found["num_shots"] == 6
    assert len(calls) < 2 * 1200 + 20  # once to count the frames, once to look at them
