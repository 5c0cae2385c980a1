"""What passed the filters as rows that preprocess_video reads, and where each row came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_longvila.data.long_video.prompts import QUESTION_TYPES
from megatron_longvila.data.long_video.records import Groups, WorkError, read_stage, write_stage
from megatron_longvila.data.output import Progress

# Asked in turn, so that a model does not learn one wording. Chosen by the video, so that a rerun chooses the same.
SUMMARY_QUESTIONS = (
    "Describe what happens in this video from beginning to end.",
    "Please summarize the video.",
    "What is this video about? Give a detailed account.",
    "Tell me what can be seen in this video, in the order in which it happens.",
)


@dataclass(frozen=True)
class ExportOptions:
    """Which samples a video gives.

    Attributes:
        questions: `one`, a summary sample and one question sample, of the type that is rarest so far (the paper has one of each per video);
            `each`, a sample for every question; `all`, one sample with all questions as turns.
        max_per_type: questions of one type in the whole set, with `one` and `each`; 0: no limit.
        summaries: whether summary samples are written.
    """

    questions: str = "one"
    max_per_type: int = 0
    summaries: bool = True


def export(options: ExportOptions, work: Path, progress: Progress) -> dict:
    """WORK/export.jsonl: rows with `id`, `video`, `conversations`, and `evidence` for people and statistics. Returns the report.

    Raises:
        WorkError: `filter` has not run, or nothing passed it.
    """
    report = {"rows": 0, "videos": 0, "questions_by_type": dict.fromkeys(QUESTION_TYPES, 0), "rejected": 0}
    rejects: list[dict] = []
    return write_stage(work, "export", _rows(options, work, progress, report, rejects), rejects, report, sources=[work / "filter.jsonl"])


def _rows(options: ExportOptions, work: Path, progress: Progress, report: dict, rejects: list[dict]) -> Iterator[dict]:
    """The rows, one video after the other; fills `report` and `rejects`."""
    passed = Groups(read_stage(work, "filter"))
    num_videos = sum(1 for _ in read_stage(work, "segment"))
    for segmented in progress(read_stage(work, "segment"), num_videos, "export"):
        video, records = segmented["video"], passed.take(segmented["video"])
        if records and not _is_text(video):
            rejects.append({"video": video, "reason": "its name is no UTF-8 text"})
            report["rejected"] += 1
            continue
        rows = list(_video_rows(video, segmented["sha256"], records, options, report["questions_by_type"]))
        report["rows"] += len(rows)
        report["videos"] += bool(rows)
        yield from rows
    passed.close()
    if not report["rows"]:
        raise WorkError("nothing to export: no record passed the filters; look at filter.rejects.jsonl")


def _video_rows(video: str, digest: str, records: list[dict], options: ExportOptions, taken: dict[str, int]) -> Iterator[dict]:
    name = {"id": digest[:16], "video": video}
    summary = next((record for record in records if record["kind"] == "summary"), None)
    if summary and options.summaries:
        asked = SUMMARY_QUESTIONS[int(digest, 16) % len(SUMMARY_QUESTIONS)]
        yield _row(name, "summary", [(asked, summary["summary"])], [summary])
    for number, group in _choose([record for record in records if record["kind"] == "question"], taken, options):
        yield _row(name, number, [(one["question"], one["answer"]) for one in group], group)


def _choose(questions: list[dict], taken: dict[str, int], options: ExportOptions) -> list[tuple[str, list[dict]]]:
    """(name, questions of one sample); counts the types in `taken`."""
    if options.questions == "all":
        for one in questions:
            taken[one["type"]] += 1
        return [("questions", questions)] if questions else []
    free = [one for one in questions if not options.max_per_type or taken[one["type"]] < options.max_per_type]
    if options.questions == "one":
        free = sorted(free, key=lambda one: (taken[one["type"]], one["number"]))[:1]
    chosen = []
    for one in free:
        if not options.max_per_type or taken[one["type"]] < options.max_per_type:
            taken[one["type"]] += 1
            chosen.append((f"question-{one['number']}", [one]))
    return chosen


def _row(name: dict, sample: str, turns: list[tuple[str, str]], records: list[dict]) -> dict:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        mark = "" if number else "<video>\n"
        conversations += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    evidence = [{"type": one["type"], "start_s": one["start_s"], "end_s": one["end_s"]} for one in records if "type" in one]
    origins = [one["origin"] for one in records]
    origins = [origin for number, origin in enumerate(origins) if origin not in origins[:number]]
    return {
        "id": f"{name['id']}-{sample}",
        "video": name["video"],
        "conversations": conversations,
        "evidence": evidence,
        "origins": origins,
    }


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
