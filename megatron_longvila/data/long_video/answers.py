"""What models write, checked: captions, summaries with a domain, questions with their evidence. Pure functions of the text."""

from __future__ import annotations

import json
import re

from megatron_longvila.data.long_video.asking import AnswerError
from megatron_longvila.data.long_video.prompts import DOMAINS, QUESTION_TYPES

_FENCE = re.compile(r"\A```[a-zA-Z]*\s*\n(.*)\n\s*```\s*\Z", re.DOTALL)
# A model that declines says so of itself, and first; people in a film and writing on a wall may say the same later.
_DECLINES = re.compile(
    r"\W*((i('m| am) )?(very |so )?(sorry|afraid)\b[\w\s]{0,20}?\W+|(my )?apologies\W+|i apologi[sz]e\b|unfortunately\W+){0,2}"
    r"(but )?(as an ai\b|as a (large )?language model|i('m| am) (sorry|unable|not able|not sure)\b|i apologi[sz]e\b"
    r"|i (cannot|can't|can not|won't|don't know|do not know|don't have|do not have)\b"
    r"|i('m| am) (just |only )?an? (ai|(large )?language model)\b"
    r"|unable to (determine|answer|provide|assist|see)|it('s| is) (not possible|impossible) to (determine|answer|say|tell|know)\b"
    r"|(unknown|n/?a|not (available|applicable|specified|mentioned|known|enough information))\W*\Z)",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(
    r"\b((cannot|can't|can not|could not) be (determined|answered|inferred)"
    r"|(is|are) not (mentioned|specified|stated|provided) in|no information (is|about|on)|not enough information)",
    re.IGNORECASE,
)
# What a model thinks before it answers; some templates open the thought in the prompt, so that only its end is seen.
_THOUGHT = re.compile(r"\A.*</think(ing)?>", re.DOTALL | re.IGNORECASE)
_THINKING = re.compile(r"\A\s*<think(ing)?>", re.IGNORECASE)
MARKS = re.compile(r"<(image|video|vila/\w+)>|<\|\w+\|>|</?think(ing)?>", re.IGNORECASE)
"""What would be read as media or control tokens."""
_QUOTED = re.compile(r"\"[^\"]*\"|\u201c[^\u201d]*\u201d|(?<!\w)'.{0,500}?'(?!\w)", re.DOTALL)


def is_refusal(text: str) -> bool:
    """Whether a text declines instead of answering."""
    own_words = _QUOTED.sub('""', text.replace("\u2018", "'").replace("\u2019", "'"))
    return _DECLINES.match(own_words) is not None or _UNKNOWN.search(own_words) is not None


def parse_caption(text: str) -> str:
    """A caption as one paragraph, without the thoughts before it. Raises AnswerError for a refusal, marks or text without a letter."""
    caption = " ".join(_without_thought(text).split())
    if MARKS.search(caption):
        raise AnswerError("holds a mark that stands for media or control")
    if is_refusal(caption):
        raise AnswerError("is a refusal")
    if not any(character.isalpha() for character in caption):
        raise AnswerError("holds no word")
    _check_characters(caption)
    return caption


def parse_summary(text: str) -> dict:
    """{"summary", "domain"}; the domain is one of DOMAINS, whatever its case. Raises AnswerError."""
    value = _parse_json(text)
    if not isinstance(value, dict) or not isinstance(value.get("summary"), str) or not isinstance(value.get("domain"), str):
        raise AnswerError('is not {"summary": text, "domain": text}')
    domain = {name.casefold(): name for name in DOMAINS}.get(" ".join(value["domain"].split()).casefold())
    if domain is None:
        raise AnswerError(f"names a domain that is none of the {len(DOMAINS)}")
    return {"summary": parse_caption(value["summary"]), "domain": domain}


def parse_questions(text: str) -> list[dict]:
    """The questions of one video as the model wrote them, a list of JSON objects that is not empty; `filter` looks at each.

    Raises:
        AnswerError: the text is no JSON list (or {"questions": list}) of objects.
    """
    value = _parse_json(text)
    if isinstance(value, dict) and isinstance(value.get("questions"), list):
        value = value["questions"]
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise AnswerError("is not a JSON list of question objects")
    return value


def read_question(value: dict) -> dict:
    """{"type", "question", "answer", "start_s", "end_s"} of one object. Raises AnswerError with what is wrong in its form."""
    types = {name.casefold(): name for name in QUESTION_TYPES}
    kind = value.get("type")
    if not isinstance(kind, str) or kind.strip().casefold() not in types:
        raise AnswerError(f"`type` is none of {', '.join(QUESTION_TYPES)}")
    record = {"type": types[kind.strip().casefold()]}
    for name in ("question", "answer"):
        if not isinstance(value.get(name), str) or not value[name].strip():
            raise AnswerError(f"`{name}` is no text")
        record[name] = " ".join(value[name].split())
        _check_characters(record[name])
    for name in ("start_s", "end_s"):
        second = value.get(name)
        if isinstance(second, bool) or not isinstance(second, int | float) or not -1e9 < second < 1e9:
            raise AnswerError(f"`{name}` is no number of seconds")
        record[name] = float(second)
    return record


def _without_thought(text: str) -> str:
    answer = _THOUGHT.sub("", text)
    if _THINKING.match(answer):
        raise AnswerError("ends before the model has thought to the end")
    return answer


def _parse_json(text: str) -> object:
    text = _without_thought(text)
    fenced = _FENCE.match(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise AnswerError("is not JSON") from None


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise AnswerError("holds half a surrogate pair, which is no character") from None
    if "\x00" in text or "\ufffd" in text:
        raise AnswerError("holds characters that stand for damage")
