"""Rules that a question or summary must pass; each refusal names its rule, and the report counts them.

Duplicates are looked for where they hurt: questions of one video against each other (another video may well be asked the same), summaries
against those of all videos (two that say the same come from copies of one video, cut or coded differently).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_longvila.data.long_video.answers import MARKS, is_refusal, read_question
from megatron_longvila.data.long_video.asking import AnswerError
from megatron_longvila.data.long_video.records import Groups, WorkError, read_stage, write_stage
from megatron_longvila.data.output import Progress

RULES = ("format", "refusal", "marks", "about_the_text", "length", "language", "span", "leak", "duplicate", "near_duplicate")
_ABOUT_THE_TEXT = re.compile(
    r"\b(according to|based on|in|from) the (captions?|descriptions?|lines?|transcript|segments?)\b"
    r"|\b(captions|descriptions|transcripts?) (do|does|did)(n't|n\u2019t| not)\b",
    re.IGNORECASE,
)
# Thai and Lao, Burmese, Khmer, kana, Chinese characters: nothing shows where a word ends, so that each character counts as one.
_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_WITHOUT_SPACES}]|[^\W{_WITHOUT_SPACES}]+")
_SPAN_SLACK_S = 0.1  # prompts show seconds with one digit
_NUM_HASHES, _BAND = 32, 2  # 16 bands of 2: texts of similarity 0.8 meet in a band with probability 1 - (1 - 0.64)^16 > 0.9999999
_MIN_LETTERS = 12  # of a text whose language is judged; shorter ones are names and numbers

Earlier = dict[str, np.ndarray]
"""Questions of a video that passed: normalised text to its shingles."""


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
    """Lower-case words (or characters, where a script writes no spaces) without punctuation, one space apart, compatible ones made one."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def shingles(text: str) -> np.ndarray:
    """Triples of neighbouring words of a normalised text (the whole text where it has fewer) as sorted 64-bit hashes, uint64 [S].

    Two of a million different triples share a hash once in forty million texts.
    """
    words = text.split()
    triples = (" ".join(words[start : start + 3]).encode() for start in range(max(1, len(words) - 2)))
    return np.unique(np.frombuffer(b"".join(hashlib.blake2b(triple, digest_size=8).digest() for triple in triples), dtype=np.uint64))


def similarity(a_S: np.ndarray, b_S: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sets of shingles."""
    union = len(np.union1d(a_S, b_S))
    return (len(a_S) + len(b_S) - union) / union


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

    def check_question(self, candidate: dict, duration_s: float, earlier: Earlier) -> dict:
        """The checked question. `earlier` are those of the same video that passed; this one joins them."""
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
        triples = shingles(words)
        for other, other_triples in earlier.items():
            if other == words:
                raise _Broken("duplicate", f"asks the same as {other!r}")
            if similarity(other_triples, triples) >= options.max_similarity:
                raise _Broken("near_duplicate", f"asks nearly the same as {other!r}")
        earlier[words] = triples
        return record

    def _check_text(self, text: str) -> None:
        if is_refusal(text):
            raise _Broken("refusal", "declines instead of answering")
        if MARKS.search(text):
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
        self._texts: dict[str, np.ndarray] = {}
        self._bands: dict[bytes, list[str]] = {}
        self._factors_N = np.random.default_rng(0).integers(1, 1 << 63, _NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def add(self, name: str, text: str) -> str | None:
        """The name of an earlier text that says the same; None, and this one is remembered, where there is none."""
        triples = shingles(text)
        smallest_N = (triples[:, None] * self._factors_N).min(axis=0)  # modulo 2^64: a hash function for each odd factor
        bands = [bytes([start]) + smallest_N[start : start + _BAND].tobytes() for start in range(0, _NUM_HASHES, _BAND)]
        for other in dict.fromkeys(other for band in bands for other in self._bands.get(band, ())):
            if similarity(self._texts[other], triples) >= self._max_similarity:
                return other
        self._texts[name] = triples
        for band in bands:
            self._bands.setdefault(band, []).append(name)
        return None


def filter_all(options: FilterOptions, work: Path, progress: Progress) -> dict:
    """WORK/filter.jsonl: what is kept, per video its summary, then its questions. Returns the report with counts by rule."""
    counts = {kind: {"kept": 0, **dict.fromkeys(RULES, 0)} for kind in ("summaries", "questions")}
    rejects: list[dict] = []
    report = {"settings": asdict(options), **counts}
    sources = [work / f"{stage}.jsonl" for stage in ("summarize", "qa")]
    return write_stage(work, "filter", _sift(_Rules(options), work, progress, counts, rejects), rejects, report, sources=sources)


def _sift(rules: _Rules, work: Path, progress: Progress, counts: dict[str, dict[str, int]], rejects: list[dict]) -> Iterator[dict]:
    """The records that keep the rules, one video after the other; fills `counts` and `rejects`."""
    summaries, questions = Groups(read_stage(work, "summarize")), Groups(read_stage(work, "qa"))
    num_videos = sum(1 for _ in read_stage(work, "segment"))

    def refuse(kind: str, name: str, broken: _Broken, record: dict) -> None:
        counts[kind][broken.rule] += 1
        rejects.append({"kind": name, "video": record["video"], "rule": broken.rule, "reason": str(broken), "record": record})

    for segmented in progress(read_stage(work, "segment"), num_videos, "filter"):
        video, duration_s = segmented["video"], segmented["duration_s"]
        for record in summaries.take(video):
            try:
                rules.check_summary(record)
                counts["summaries"]["kept"] += 1
                yield {"kind": "summary", **record, "duration_s": duration_s}
            except _Broken as broken:
                refuse("summaries", "summary", broken, record)
        earlier: Earlier = {}
        for record in questions.take(video):
            try:
                checked = rules.check_question(record["candidate"], duration_s, earlier)
            except _Broken as broken:
                refuse("questions", "question", broken, record)
                continue
            counts["questions"]["kept"] += 1
            named = {"kind": "question", "video": video, "number": record["number"]}
            yield {**named, **checked, "duration_s": duration_s, "origin": record["origin"]}
    summaries.close()
    questions.close()
