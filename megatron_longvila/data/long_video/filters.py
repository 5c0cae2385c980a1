"""Rules that a question or summary must pass; each refusal names its rule, and the report counts them.

Duplicates are looked for where they hurt: questions of one video against each other (another video may well be asked the same), summaries
against those of all videos (two that say the same come from copies of one video, cut or coded differently).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from megatron_longvila.data.long_video.answers import is_refusal, read_question
from megatron_longvila.data.long_video.asking import AnswerError
from megatron_longvila.data.long_video.records import WorkError, read_stage, write_stage

RULES = ("format", "refusal", "marks", "about_the_text", "length", "language", "span", "leak", "duplicate", "near_duplicate")
_MARKS = re.compile(r"<(image|video|vila/\w+)>|<\|\w+\|>", re.IGNORECASE)  # would be read as media or control tokens
_ABOUT_THE_TEXT = re.compile(
    r"\b(according to|based on|in|from) the (captions?|descriptions?|lines?|transcript|segments?)\b", re.IGNORECASE
)
_WORD = re.compile(r"\w+")
_SPAN_SLACK_S = 0.1  # prompts show seconds with one digit
_NUM_HASHES, _BAND = 32, 2  # 16 bands of 2: texts of similarity 0.8 meet in a band with probability 1 - (1 - 0.64)^16 > 0.9999999
_MIN_LETTERS = 12  # of a text whose language is judged; shorter ones are names and numbers


@dataclass(frozen=True)
class FilterOptions:
    """Limits of the rules: words of questions, answers and summaries; `language` None: any; similarity in 0..1 of word triples."""

    language: str | None = "en"
    min_question_words: int = 3
    max_question_words: int = 60
    max_answer_words: int = 80
    min_summary_words: int = 20
    max_summary_words: int = 400
    max_similarity: float = 0.8


class _Broken(Exception):
    """A rule that is not kept."""

    def __init__(self, rule: str, detail: str):
        super().__init__(detail)
        self.rule = rule


def normalise(text: str) -> str:
    """Lower-case words without punctuation, one space apart, compatible characters made one."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def shingles(text: str) -> frozenset[str]:
    """Triples of neighbouring words of a normalised text (the whole text where it has fewer)."""
    words = text.split()
    return frozenset(" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2)))


def similarity(a: frozenset, b: frozenset) -> float:
    """Size of the intersection over size of the union."""
    return len(a & b) / len(a | b)


def leaks(question: str, answer: str) -> bool:
    """Whether the answer stands word for word in the question. Yes and no are no leak, nor is an option of a choice (`... or ...`)."""
    asked, answered = normalise(question), normalise(answer)
    if not answered or answered in ("yes", "no") or " or " in f" {asked} ":
        return False
    return f" {answered} " in f" {asked} "


def find_language() -> Callable[[str], str]:
    """Code of the language of a text, by py3langid's model. Raises WorkError where the package is missing."""
    try:
        from py3langid import classify
    except ImportError:
        raise WorkError("--language needs py3langid: pip install 'megatron-longvila[long_video]', or give --language any") from None
    return lambda text: classify(text)[0]


class _Rules:
    """All rules over one run."""

    def __init__(self, options: FilterOptions):
        self._options = options
        self._language = find_language() if options.language else None
        self._summaries = _NearDuplicates(options.max_similarity)

    def check_summary(self, record: dict) -> None:
        text = record["summary"]
        self._check_text(text)
        self._check_length("summary", text, self._options.min_summary_words, self._options.max_summary_words)
        self._check_language(text)
        earlier = self._summaries.add(record["video"], normalise(text))
        if earlier:
            raise _Broken("near_duplicate", f"says the same as the summary of {earlier!r}")

    def check_question(self, candidate: dict, duration_s: float, earlier: list[dict]) -> dict:
        """The checked question. `earlier` are those of the same video that passed."""
        try:
            record = read_question(candidate)
        except AnswerError as error:
            raise _Broken("format", str(error)) from None
        question, answer, options = record["question"], record["answer"], self._options
        for text in (question, answer):
            self._check_text(text)
        self._check_length("question", question, options.min_question_words, options.max_question_words)
        self._check_length("answer", answer, 1, options.max_answer_words)
        self._check_language(f"{question} {answer}")
        if not -_SPAN_SLACK_S <= record["start_s"] < record["end_s"] <= duration_s + _SPAN_SLACK_S:
            raise _Broken("span", f"{record['start_s']:g} to {record['end_s']:g} s is no span of a video of {duration_s:g} s")
        record["start_s"], record["end_s"] = max(0.0, record["start_s"]), min(duration_s, record["end_s"])
        if leaks(question, answer):
            raise _Broken("leak", "the question holds its answer")
        words = normalise(question)
        for other in earlier:
            if normalise(other["question"]) == words:
                raise _Broken("duplicate", f"asks the same as question {other['number']}")
            if similarity(shingles(normalise(other["question"])), shingles(words)) >= options.max_similarity:
                raise _Broken("near_duplicate", f"asks nearly the same as question {other['number']}")
        return record

    def _check_text(self, text: str) -> None:
        if is_refusal(text):
            raise _Broken("refusal", "declines instead of answering")
        if _MARKS.search(text):
            raise _Broken("marks", "holds a mark that stands for media or control")
        if _ABOUT_THE_TEXT.search(text):
            raise _Broken("about_the_text", "speaks of the descriptions, which nobody sees")

    def _check_length(self, name: str, text: str, least: int, most: int) -> None:
        count = len(_WORD.findall(text))
        if not least <= count <= most:
            raise _Broken("length", f"the {name} has {count} words, not {least} to {most}")

    def _check_language(self, text: str) -> None:
        if self._language and sum(character.isalpha() for character in text) >= _MIN_LETTERS:
            found = self._language(text)
            if self._options.language not in (found, self._language(text.lower())):  # signs and titles in capitals mislead the model
                raise _Broken("language", f"is {found}, not {self._options.language}")


class _NearDuplicates:
    """Texts that are nearly the same, among many: candidates share a band of their MinHash, and are then compared exactly."""

    def __init__(self, max_similarity: float):
        self._max_similarity = max_similarity
        self._texts: dict[str, frozenset[str]] = {}
        self._bands: dict[tuple, list[str]] = {}

    def add(self, name: str, text: str) -> str | None:
        """The name of an earlier text that says the same; None, and this one is remembered, where there is none."""
        triples = shingles(text)
        hashes = _min_hashes(triples)
        bands = [(start, *hashes[start : start + _BAND]) for start in range(0, _NUM_HASHES, _BAND)]
        for other in dict.fromkeys(other for band in bands for other in self._bands.get(band, ())):
            if similarity(self._texts[other], triples) >= self._max_similarity:
                return other
        self._texts[name] = triples
        for band in bands:
            self._bands.setdefault(band, []).append(name)
        return None


def _min_hashes(triples: frozenset[str]) -> list[int]:
    """The smallest value of each of _NUM_HASHES hash functions over the set."""
    digests = [hashlib.blake2b(triple.encode(), digest_size=4 * _NUM_HASHES // 2).digest() for triple in triples]  # 2 bytes a function
    return [
        min(int.from_bytes(digest[2 * n : 2 * n + 2]) << 32 | int.from_bytes(digest[:4]) for digest in digests) for n in range(_NUM_HASHES)
    ]


def filter_all(options: FilterOptions, work: Path) -> dict:
    """WORK/filter.jsonl: what is kept, per video its summary, then its questions. Returns the report with counts by rule."""
    rules = _Rules(options)
    durations = {video["video"]: video["duration_s"] for video in read_stage(work, "segment")}
    questions = {name: list(group) for name, group in groupby(read_stage(work, "qa"), key=lambda record: record["video"])}
    summaries = {record["video"]: record for record in read_stage(work, "summarize")}
    kept, rejects = [], []

    def reject(kind: str, video: str, broken: _Broken, record: dict) -> None:
        rejects.append({"kind": kind, "video": video, "rule": broken.rule, "reason": str(broken), "record": record})

    for video, duration_s in durations.items():
        if video in summaries:
            record = summaries[video]
            try:
                rules.check_summary(record)
                kept.append({"kind": "summary", **record, "duration_s": duration_s})
            except _Broken as broken:
                reject("summary", video, broken, record)
        passed: list[dict] = []
        for record in questions.get(video, []):
            try:
                checked = rules.check_question(record["candidate"], duration_s, passed)
                passed.append(
                    {
                        "kind": "question",
                        "video": video,
                        "number": record["number"],
                        **checked,
                        "duration_s": duration_s,
                        "origin": record["origin"],
                    }
                )
            except _Broken as broken:
                reject("question", video, broken, record)
        kept += passed
    report = {
        "settings": asdict(options),
        "summaries": _count(kept, rejects, "summary"),
        "questions": _count(kept, rejects, "question"),
    }
    sources = [work / f"{stage}.jsonl" for stage in ("summarize", "qa")]
    return write_stage(work, "filter", kept, rejects, report, sources=sources)


def _count(kept: Iterable[dict], rejects: Iterable[dict], kind: str) -> dict[str, int]:
    broken = [one["rule"] for one in rejects if one["kind"] == kind]
    return {"kept": sum(one["kind"] == kind for one in kept), **{rule: broken.count(rule) for rule in RULES}}
