"""The stages that ask models: captions of clips and of images, summaries and questions over the ordered captions of a video."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain, groupby
from pathlib import Path

from megatron_longvila.data.long_video.answers import parse_caption, parse_questions, parse_summary
from megatron_longvila.data.long_video.asking import (
    DECLINED,
    Answered,
    AnswerError,
    Asker,
    Declined,
    FaultLog,
    Missing,
    Parse,
    Pending,
    Question,
    ask_all,
    check_writable,
)
from megatron_longvila.data.long_video.endpoint import Client, Endpoint, EndpointUnusable
from megatron_longvila.data.long_video.pictures import ClipReader, PictureOptions, clip_frames, picture_content, read_image
from megatron_longvila.data.long_video.prompts import DOMAINS, QUESTION_TYPES
from megatron_longvila.data.long_video.records import (
    AnswerStore,
    Log,
    WorkError,
    file_hash,
    read_report,
    read_stage,
    write_lines,
    write_stage,
)
from megatron_longvila.data.long_video.segments import LINKED_FOLDER
from megatron_longvila.data.media import MediaError, MediaUnreadable, natural_key, open_source, resolve_below
from megatron_longvila.data.output import Progress
from megatron_longvila.data.rows import RowError, read_rows

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
IMAGE_QUESTION = "<image>\nDescribe the image."


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0


@dataclass(frozen=True)
class Service:
    """What a stage asks with: the endpoint, who answers there, what it costs, and how progress is shown.

    `give_up`: a question that the endpoint fails in every try is refused, so that the stage can end without it; else it stays open.
    """

    endpoint: Endpoint
    asker: Asker
    prices: Prices
    progress: Progress
    give_up: bool = False


Collect = Callable[[Question, object, dict], Iterable[dict]]
"""Records of one answered question: (question, value, origin)."""


GIVEN_UP = "given up: "  # begins the reason of a reject that --give_up made


class Incomplete(WorkError):
    """Some questions got no answer; all others are stored, and the same command goes on."""


@dataclass(frozen=True)
class StagePlan:
    """A stage that asks: `total` questions (for the bar), how an answer is read and becomes records, and its input files.

    `refused` and `pending` are what is not asked at all, for good or this time; they may grow while `questions` is read.
    """

    name: str
    questions: Iterable[Question]
    total: int
    parse: Parse
    collect: Collect
    refused: list[dict]
    sources: list[Path]
    pending: list[dict] = field(default_factory=list)


@dataclass
class _Tally:
    """What became of the questions, filled while they are asked; only what is no record is kept."""

    asked: int = 0
    answered: int = 0
    records: int = 0
    declined: int = 0
    rejects: list[dict] = field(default_factory=list)
    pending: list[dict] = field(default_factory=list)


def run_stage(plan: StagePlan, service: Service, work: Path) -> dict:
    """Ask everything that has no stored answer, then write the stage's files. Returns the report.

    What is left open is listed in WORK/STAGE.pending.jsonl, which a finished stage does not have.

    Raises:
        Incomplete: the endpoint left questions open; WorkError: answers cannot be stored, or the endpoint is unusable.
    """
    tally, report = _Tally(), {}
    open_questions = work / f"{plan.name}.pending.jsonl"
    with AnswerStore(work / "answers" / f"{plan.name}.jsonl") as store, Log(work / "answers" / "faults.jsonl", durable=False) as log:
        faults = FaultLog(log, plan.name)
        try:
            with closing(_ask(plan, service, store, faults, tally, report)) as records:
                rejects = chain(plan.refused, tally.rejects)
                report = write_stage(work, plan.name, records, rejects, report, sources=plan.sources)
        except Incomplete:
            write_lines(open_questions, chain(plan.pending, tally.pending))
            raise
    open_questions.unlink(missing_ok=True)
    return report


def _ask(plan: StagePlan, service: Service, store: AnswerStore, faults: FaultLog, tally: _Tally, report: dict) -> Iterator[dict]:
    """The records in the order of the questions. Fills `tally` on the way and `report` at the end; raises as run_stage."""
    stored, asker = len(store), service.asker
    try:
        with closing(ask_all(plan.questions, plan.parse, asker, store, Client(service.endpoint, faults, proven=stored > 0))) as outcomes:
            for question, outcome in service.progress(outcomes, plan.total, plan.name):
                tally.asked += 1
                if isinstance(outcome, Answered):
                    tally.answered += 1
                    for record in plan.collect(question, outcome.value, outcome.origin):
                        tally.records += 1
                        yield record
                else:
                    given_up = service.give_up and isinstance(outcome, Pending) and outcome.endpoint_failed
                    tally.declined += isinstance(outcome, Declined) or given_up
                    kind = tally.pending if isinstance(outcome, Pending) and not given_up else tally.rejects
                    kind.append({"item": question.item, "reason": f"{GIVEN_UP}{outcome.reason}" if given_up else outcome.reason})
    except EndpointUnusable as error:
        raise Incomplete(f"{error}; {len(store) - stored} new answers are stored and the same command goes on") from None
    except OSError as error:
        raise check_writable(error) from None
    faults_seen = dict(sorted(faults.counts.items()))
    _check_complete(plan, tally, faults_seen, len(store) - stored)
    usage, prices = store.usage_of(asker.model), service.prices
    dollars = (usage["prompt_tokens"] * prices.prompt + usage["completion_tokens"] * prices.completion) / 1e6
    made_with = {"model": asker.model, "prompt": asker.prompt.name, "prompt_sha256": asker.prompt.hash, "sampling": asdict(asker.sampling)}
    report |= {"questions": tally.asked, "records": tally.records, "rejected": len(plan.refused) + len(tally.rejects), **made_with}
    report |= {"usage": usage, "dollars": round(dollars, 6), "usage_of_other_models": store.usage_without(asker.model)}
    report |= {"faults": faults_seen}


def _check_complete(plan: StagePlan, tally: _Tally, faults: dict[str, int], new_answers: int) -> None:
    pending = plan.pending + tally.pending
    if pending:
        raise Incomplete(
            f"{len(pending)} of {tally.asked + len(plan.pending)} questions got no answer (faults so far: {faults}), the first one: "
            f"{pending[0]['item']}: {pending[0]['reason']}; {new_answers} new answers are stored, and the same command asks for the rest "
            f"({plan.name}.pending.jsonl)"
        )
    if tally.declined and not tally.answered:  # a wrong flag looks like this; one film that is too long does not
        first = next(row for row in tally.rejects if row["reason"].startswith((DECLINED, GIVEN_UP)))
        raise Incomplete(
            f"no question was answered and {tally.declined} of {tally.asked} were refused, the first one: {first['item']}: "
            f"{first['reason']}; look at what the endpoint takes, and run the same command again"
        )


# ------------------------------------------------------------------------------------------------ caption


def caption(service: Service, pictures: PictureOptions, videos: Path | None, work: Path) -> dict:
    """WORK/caption.jsonl: one line per captioned clip, in the order of WORK/segment.jsonl."""
    root = videos or Path(read_report(work, "segment")["root"])
    if not root.is_dir():
        raise WorkError(f"the folder of the videos, {root}, is not there; say where it is with --videos")
    total = sum(len(video["clips"]) for video in read_stage(work, "segment"))
    with ClipReader(pictures) as reader:
        questions = (
            _ask_clip(video, number, root, reader, service.asker, pictures)
            for video in read_stage(work, "segment")
            for number in range(len(video["clips"]))
        )
        plan = StagePlan("caption", questions, total, parse_caption, _clip_record, [], [work / "segment.jsonl"])
        return run_stage(plan, service, work)


def _ask_clip(video: dict, number: int, root: Path, reader: ClipReader, asker: Asker, pictures: PictureOptions) -> Question:
    clip = video["clips"][number]
    indices = clip_frames(clip["first_frame"], clip["last_frame"], pictures.num_frames)
    values = {"num_frames": str(len(indices)), "start": f"{clip['start_s']:.1f}", "end": f"{clip['end_s']:.1f}"}
    system, user = asker.prompt.messages({**values, "duration": f"{clip['end_s'] - clip['start_s']:.1f}"})

    def content() -> list[dict]:
        try:
            path = resolve_below(root, video["video"])
            return picture_content(user, reader.read(path, video["size"], video["num_frames"], indices))
        except MediaUnreadable as error:
            raise Missing(f"{error}; bring it back, or run `segment` again without it") from None
        except MediaError as error:
            raise AnswerError(str(error)) from None

    shown = {"video_sha256": video["sha256"], "frames": indices, "image_size": pictures.image_size, "jpeg_quality": pictures.jpeg_quality}
    about = {"video": video["video"], "clip": number, "start_s": clip["start_s"], "end_s": clip["end_s"]}
    return Question(f"{video['video']}#{number}", {**shown, "text": user}, about, system, content)


def _clip_record(question: Question, value: str, origin: dict) -> Iterator[dict]:
    shown = {name: part for name, part in question.identity.items() if name != "text"}
    yield {**question.about, "caption": value, **shown, "origin": origin}


def caption_images(service: Service, pictures: PictureOptions, source: Path, media_root: Path | None, work: Path) -> dict:
    """WORK/images.jsonl: rows for preprocess_video with the pictures of a folder, or of a file of rows, and new captions."""
    total = sum(1 for _ in _find_images(source, media_root))
    refused: list[dict] = []
    pending: list[dict] = []

    def questions() -> Iterator[Question]:
        for name, row_id, reason in _find_images(source, media_root):
            if reason is None:
                try:
                    yield _ask_image(name, row_id, media_root or source, service.asker, pictures)
                    continue
                except Missing as error:
                    pending.append({"item": name, "reason": str(error)})
                    continue
                except MediaError as error:
                    reason = str(error)
            refused.append({"item": name, "reason": reason})

    plan = StagePlan("images", questions(), total, parse_caption, _image_record, refused, [], pending)
    return run_stage(plan, service, work)


def _find_images(source: Path, media_root: Path | None) -> Iterator[tuple[str, str, str | None]]:
    """(path below the root, id of the row, why it is refused or None) of each picture."""
    if source.is_dir():
        for name, reason in _walk_images(source, ""):
            yield name, _row_id(name), reason
        return
    if media_root is None:
        raise WorkError(f"--images {source} is a file of rows; say with --media_root where their paths start")
    try:
        seen = set()
        for key, row in read_rows(source):
            if isinstance(row, RowError):
                yield key, key, str(row)
            elif len(row.media) != 1 or row.media[0].mark != "<image>":
                yield key, key, "a row must show one image and nothing else to be captioned anew"
            else:
                again = f"its id {row.id!r} was used before" if row.id in seen else None
                seen.add(row.id)
                yield row.media[0].path, row.id, again
    except (OSError, ValueError) as error:
        raise WorkError(f"--images {source} cannot be read: {error}") from None


def _walk_images(root: Path, below: str) -> Iterator[tuple[str, str | None]]:
    """(path below `root`, why it is refused or None) of a folder's pictures in natural order; holds the names of one folder at a time."""
    with os.scandir(root / below) as entries:
        found = [entry.name + "/" * entry.is_dir() for entry in entries]
    for name in sorted(found, key=natural_key):  # a folder with its slash: the order is that of the whole paths
        path = below + name
        if name.endswith("/") and os.path.islink(root / path[:-1]):
            yield path[:-1], LINKED_FOLDER
        elif name.endswith("/"):
            yield from _walk_images(root, path)
        elif Path(name).suffix.lower() in IMAGE_SUFFIXES:
            yield path, None


def _row_id(name: str) -> str:
    """A file name as an id: bytes that are no text are written as escapes, since an id must be text."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _ask_image(name: str, row_id: str, root: Path, asker: Asker, pictures: PictureOptions) -> Question:
    """Raises MediaError when the picture can never be shown, Missing when it cannot be read now."""
    system, user = asker.prompt.messages({})
    path = resolve_below(root, name)
    try:
        with open_source(path):
            pass
        digest = file_hash(path)
    except MediaUnreadable as error:
        raise Missing(str(error)) from None
    except OSError as error:
        raise Missing(f"cannot be read: {error.strerror or error}") from None

    def content() -> list[dict]:
        try:
            return picture_content(user, [read_image(path, pictures)])
        except MediaUnreadable as error:
            raise Missing(str(error)) from None
        except MediaError as error:
            raise AnswerError(str(error)) from None

    shown = {"image_size": pictures.image_size, "jpeg_quality": pictures.jpeg_quality}
    return Question(name, {"image_sha256": digest, **shown, "text": user}, {"id": row_id, "image": name}, system, content)


def _image_record(question: Question, value: str, origin: dict) -> Iterator[dict]:
    turns = [{"from": "human", "value": IMAGE_QUESTION}, {"from": "gpt", "value": value.replace("<image>", "").replace("<video>", "")}]
    yield {**question.about, "conversations": turns, "origin": origin}


# ------------------------------------------------------------------------------------------------ summarize and qa


def summarize(service: Service, work: Path) -> dict:
    """WORK/summarize.jsonl: one summary and domain per video."""
    values = {"domains": ", ".join(DOMAINS)}
    return run_stage(_plan_videos("summarize", values, parse_summary, _summary_record, service.asker, work), service, work)


def qa(service: Service, num_questions: int, work: Path) -> dict:
    """WORK/qa.jsonl: the questions of each video as the model wrote them, one line each."""
    values = {"num_questions": str(num_questions), "types": ", ".join(QUESTION_TYPES)}
    return run_stage(_plan_videos("qa", values, parse_questions, _question_records, service.asker, work), service, work)


def _plan_videos(stage: str, values: dict[str, str], parse: Parse, collect: Collect, asker: Asker, work: Path) -> StagePlan:
    """A question per video; the model reads all its captions in order. A video without a caption is refused."""
    durations = {video["video"]: video["duration_s"] for video in read_stage(work, "segment")}
    captioned = {clip["video"] for clip in read_stage(work, "caption")}
    refused = [{"item": video, "reason": "none of its clips has a caption"} for video in durations if video not in captioned]

    def one(name: str, captions: Iterable[dict]) -> Question:
        lines = "\n".join(f"[{clip['start_s']:.1f} - {clip['end_s']:.1f}] {clip['caption']}" for clip in captions)
        system, user = asker.prompt.messages({**values, "captions": lines, "duration": f"{durations[name]:.1f}"})
        return Question(name, {"text": user}, {}, system, lambda: user)

    videos = groupby(read_stage(work, "caption"), key=lambda clip: clip["video"])
    questions = (one(name, captions) for name, captions in videos)
    return StagePlan(stage, questions, len(captioned), parse, collect, refused, [work / "caption.jsonl"])


def _summary_record(question: Question, value: dict, origin: dict) -> Iterator[dict]:
    yield {"video": question.item, **value, "origin": origin}


def _question_records(question: Question, value: list[dict], origin: dict) -> Iterator[dict]:
    for number, candidate in enumerate(value):
        yield {"video": question.item, "number": number, "candidate": candidate, "origin": origin}
