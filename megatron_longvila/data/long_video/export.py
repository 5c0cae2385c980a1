"""What passed the filters as rows that preprocess_video reads, and where each row came from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megatron_longvila.data.long_video.prompts import QUESTION_TYPES
from megatron_longvila.data.long_video.records import WorkError, read_stage, write_stage

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


def export(options: ExportOptions, work: Path) -> dict:
    """WORK/export.jsonl: rows with `id`, `video`, `conversations`, and `evidence` for people and statistics. Returns the report."""
    videos = [(video, list(group)) for video, group in groupby(read_stage(work, "filter"), key=lambda record: record["video"])]
    digests = {video["video"]: video["sha256"] for video in read_stage(work, "segment")}
    taken: Counter[str] = Counter({kind: 0 for kind in QUESTION_TYPES})
    rows = []
    for video, records in videos:
        name = {"id": digests[video][:16], "video": video}
        summary = next((record for record in records if record["kind"] == "summary"), None)
        if summary and options.summaries:
            asked = SUMMARY_QUESTIONS[int(digests[video], 16) % len(SUMMARY_QUESTIONS)]
            rows.append(_row(name, "summary", [(asked, summary["summary"])], [summary]))
        questions = [record for record in records if record["kind"] == "question"]
        for number, group in _choose(questions, taken, options):
            rows.append(_row(name, number, [(one["question"], one["answer"]) for one in group], group))
    rejects = [{"video": row["video"], "reason": "its name is no UTF-8 text"} for row in rows if not _is_text(row["video"])]
    rows = [row for row in rows if _is_text(row["video"])]
    if not rows:
        raise WorkError("nothing to export: no record passed the filters; look at filter.rejects.jsonl")
    report = {"rows": len(rows), "videos": len({row["video"] for row in rows}), "questions_by_type": dict(taken), "rejected": len(rejects)}
    return write_stage(work, "export", rows, rejects, report, sources=[work / "filter.jsonl"])


def _choose(questions: list[dict], taken: Counter[str], options: ExportOptions) -> list[tuple[str, list[dict]]]:
    """(name, questions of one sample); counts the types in `taken`."""
    if options.questions == "all":
        taken.update(one["type"] for one in questions)
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
