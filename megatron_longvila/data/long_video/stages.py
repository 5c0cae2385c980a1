"""The stages that ask models: captions of clips and of images, summaries and questions over the ordered captions of a video."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from megatron_longvila.data.long_video.answers import parse_caption, parse_questions, parse_summary
from megatron_longvila.data.long_video.asking import (
    Answered,
    AnswerError,
    Asker,
    FaultLog,
    Parse,
    Pending,
    Question,
    ask_all,
    check_writable,
)
from megatron_longvila.data.long_video.endpoint import Client, Endpoint, EndpointUnusable, Unanswered
from megatron_longvila.data.long_video.pictures import ClipReader, PictureOptions, clip_frames, picture_content, read_image
from megatron_longvila.data.long_video.prompts import DOMAINS, QUESTION_TYPES
from megatron_longvila.data.long_video.records import AnswerStore, Log, WorkError, file_hash, read_report, read_stage, write_stage
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
    """What a stage asks with: the endpoint, who answers there, what it costs, and how progress is shown."""

    endpoint: Endpoint
    asker: Asker
    prices: Prices
    progress: Progress


Collect = Callable[[Question, object, dict], Iterable[dict]]
"""Records of one answered question: (question, value, origin)."""


class Incomplete(WorkError):
    """Some questions got no answer; all others are stored, and the same command goes on."""


@dataclass(frozen=True)
class StagePlan:
    """A stage that asks: `total` questions, how an answer is read and becomes records, what is refused unasked, its input files."""

    name: str
    questions: Iterable[Question]
    total: int
    parse: Parse
    collect: Collect
    refused: list[dict]
    sources: list[Path]


def run_stage(plan: StagePlan, service: Service, work: Path) -> dict:
    """Ask everything that has no stored answer, then write the stage's files. Returns the report.

    Raises:
        Incomplete: the endpoint left questions open; WorkError: answers cannot be stored, or the endpoint is unusable.
    """
    stage, total = plan.name, plan.total
    records, rejects, pending = [], list(plan.refused), []
    with AnswerStore(work / "answers" / f"{stage}.jsonl") as store, Log(work / "answers" / "faults.jsonl", durable=False) as log:
        faults = FaultLog(log, stage)
        stored = len(store)
        try:
            outcomes = ask_all(plan.questions, plan.parse, service.asker, store, Client(service.endpoint, faults))
            for question, outcome in service.progress(outcomes, total, stage):
                if isinstance(outcome, Answered):
                    records += plan.collect(question, outcome.value, outcome.origin)
                elif isinstance(outcome, Pending):
                    pending.append({"item": question.item, "reason": outcome.reason})
                else:
                    rejects.append({"item": question.item, "reason": outcome.reason})
        except EndpointUnusable as error:
            raise Incomplete(f"{error}; {len(store) - stored} new answers are stored and the same command goes on") from None
        except OSError as error:
            raise check_writable(error) from None
        usage, faults_seen = dict(store.usage), dict(sorted(faults.counts.items()))
    if pending:
        raise Incomplete(
            f"{len(pending)} of {total} questions got no answer (faults so far: {faults_seen}), the first one: {pending[0]['item']}: "
            f"{pending[0]['reason']}; {len(store) - stored} new answers are stored, and the same command asks for the rest"
        )
    dollars = (usage["prompt_tokens"] * service.prices.prompt + usage["completion_tokens"] * service.prices.completion) / 1e6
    asker = service.asker
    made_with = {"model": asker.model, "prompt": asker.prompt.name, "prompt_sha256": asker.prompt.hash, "sampling": asdict(asker.sampling)}
    report = {"questions": total, "records": len(records), "rejected": len(rejects), **made_with}
    report |= {"usage": usage, "dollars": round(dollars, 6), "faults": faults_seen}
    return write_stage(work, stage, records, rejects, report, sources=plan.sources)


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
            raise Unanswered(f"{error}; bring it back, or run `segment` again without it") from None
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
    found = list(_find_images(source, media_root))
    root = media_root or source
    refused = [{"item": name, "reason": reason} for name, _, reason in found if reason]
    questions = (_ask_image(name, row_id, root, service.asker, pictures) for name, row_id, reason in found if not reason)
    plan = StagePlan("images", questions, len(found) - len(refused), parse_caption, _image_record, refused, [])
    return run_stage(plan, service, work)


def _find_images(source: Path, media_root: Path | None) -> Iterator[tuple[str, str, str | None]]:
    """(path below the root, id of the row, why it is refused or None) of each picture."""
    if source.is_dir():
        paths = [Path(folder) / file for folder, _, files in os.walk(source) for file in files]
        names = [os.path.relpath(path, source) for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        for name in sorted(names, key=natural_key):
            yield name, _row_id(name), _problem(source, name)
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
                yield row.media[0].path, row.id, again or _problem(media_root, row.media[0].path)
    except (OSError, ValueError) as error:
        raise WorkError(f"--images {source} cannot be read: {error}") from None


def _row_id(name: str) -> str:
    """A file name as an id: bytes that are no text are written as escapes, since an id must be text."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _problem(root: Path, name: str) -> str | None:
    try:
        resolve_below(root, name)
    except MediaError as error:
        return str(error)
    return None


def _ask_image(name: str, row_id: str, root: Path, asker: Asker, pictures: PictureOptions) -> Question:
    system, user = asker.prompt.messages({})
    path = resolve_below(root, name)
    try:
        with open_source(path):
            pass
        digest = file_hash(path)
    except (MediaError, OSError):
        digest = ""  # content() says what is wrong with it

    def content() -> list[dict]:
        try:
            return picture_content(user, [read_image(path, pictures)])
        except MediaUnreadable as error:
            raise Unanswered(str(error)) from None
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
