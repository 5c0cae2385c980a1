"""Importers of video sets."""

from __future__ import annotations

import math
from functools import partial

from megatron_longvila.data.importers.rows import (
    VIDEOS,
    MediaFolder,
    RowError,
    Settings,
    attempt,
    check_object,
    dialogue,
    mark_dialogue,
    name_field,
    path_list,
    text_field,
    video_fields,
)

STEPS_QUESTION = "<video>\nWhich steps does this video show? Give the time span of each."
STEP_QUESTION = "<video>\nWhich step is shown here?"
SUMMARY_QUESTION = "<video>\nDescribe what happens in this video."
SHOT_QUESTION = "<video>\nDescribe this shot."


def youcook2(value: object, media: MediaFolder, settings: Settings) -> list[dict | RowError]:
    """YouCook2: youcookii_annotations_trainval.json.

    {"database": {"GLd3aX16zBg": {"subset": "training", "recipe_type": "113", "duration": 241.62, "video_url": "...",
      "annotations": [{"id": 0, "segment": [90, 102], "sentence": "spread margarine on two slices of white bread"}, ...]}}}

    One row for each video: its steps in order, with their time spans. With --clips one row for each step, of a file that holds that step
    alone. --split takes one of the sets (training, validation), or all.
    Files: ID.mp4 (.mkv, .webm, ...), 113/ID.mp4 or training/113/ID.mp4; clips: ID_0.mp4 or ID/0.mp4, in the same folders.
    """
    name, record = value  # type: ignore[misc]
    record = check_object(record)
    if settings.split not in ("all", record.get("subset")):
        return []
    steps = record.get("annotations")
    if not isinstance(steps, list) or not steps:
        raise RowError("has no `annotations`")
    subset, kind = (str(record.get(field) or "") for field in ("subset", "recipe_type"))
    folders = ("", *(f"{'/'.join(filter(None, parts))}/" for parts in ((kind,), (subset, kind)) if any(parts)))
    described = [(*_span(check_object(step)), text_field(step, "sentence"), step.get("id", number)) for number, step in enumerate(steps)]
    if settings.clips:

        def clip(number: object, sentence: str) -> dict:
            path = media.find([f"{at}{name}{by}{number}" for at in folders for by in "_/"], VIDEOS[1:])
            return {"id": f"youcook2-{name}-{number}", "video": path, "conversations": dialogue(STEP_QUESTION, sentence)}

        return [attempt(partial(clip, number, sentence)) for _, _, sentence, number in described]
    answer = "\n".join(f"{start:g} s to {end:g} s: {sentence}" for start, end, sentence, _ in sorted(described, key=lambda one: one[:2]))
    path = media.find([f"{at}{name}" for at in folders], VIDEOS[1:])
    return [{"id": f"youcook2-{name}", "video": path, "conversations": dialogue(STEPS_QUESTION, answer)}]


def _span(step: dict) -> tuple[float, float]:
    segment = step.get("segment")
    numbers = segment if isinstance(segment, list) and len(segment) == 2 else ()
    if len(numbers) != 2 or not all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in numbers):
        raise RowError(f"a step has no `segment` of two times, but {segment!r}"[:200])
    if not 0 <= numbers[0] < numbers[1]:
        raise RowError(f"a step goes from {numbers[0]} s to {numbers[1]} s")
    return float(numbers[0]), float(numbers[1])


def sharegptvideo(value: object, media: MediaFolder, settings: Settings) -> list[dict | RowError]:
    """ShareGPTVideo (LLaVA-Hound): video_caption_pretrain.jsonl, video_240k_caption_15k.jsonl, chatgpt_qa_900k.jsonl.

    {"id": "v_abc", "video": "v_abc",
     "conversations": [{"from": "human", "value": "<video>\\nWrite down everything you see."}, {"from": "gpt", "value": "..."}]}

    The release holds frames, not videos: `video` names a folder of pictures, in the media folder or in train_300k/ or train_600k/ of it,
    and --fps says at which rate they were taken. Video files of the same name are taken as well.
    """
    record = check_object(value)
    name = name_field(record, "video")
    path = media.find([f"{folder}{name}" for folder in ("", "train_300k/", "train_600k/")], VIDEOS)
    turns = mark_dialogue(record.get("conversations"), num_images=0, num_videos=1)
    identity = record.get("id") if record.get("id") is not None else name
    return [{"id": identity, **video_fields(path, media, settings), "conversations": turns}]


def shot2story(value: object, media: MediaFolder, settings: Settings) -> list[dict | RowError]:
    """Shot2Story: 20k_train.json, 43k_human_train.json, 90k_gptv_train.json, 134k_full_train.json.

    {"id": 0, "video": "a.mp4", "image_id": "a.mp4", "nvid": "a.mp4", "whole_caption": "summary", "whole_ASR": "...",
     "video_names": ["a_0_80.mp4", ...], "captions": ["caption of the shot", ...], "audio_captions": ["narration", ...], "ASR": [...]}

    One row for each video: its summary. With --clips one row for each shot: its caption, and the narration where there is one, of the
    shot's own file. Speech recognition (whole_ASR, ASR) is not used.
    Not read, and rejected record by record: the files of single shots (43k_human_shot_train.json, with `caption` and `audio_caption`)
    and those of questions (*_qa.json).
    """
    record = check_object(value)
    identity = name_field(record, "id", "video")
    if not settings.clips:
        answer = text_field(record, "whole_caption")
        video = video_fields(media.find([name_field(record, "video", "image_id", "nvid")], VIDEOS), media, settings)
        return [{"id": f"shot2story-{identity}", **video, "conversations": dialogue(SUMMARY_QUESTION, answer)}]
    names, shots = path_list(record, "video_names"), record.get("captions")
    heard = record.get("audio_captions") or [""] * len(names)
    if not names or not isinstance(shots, list) or not isinstance(heard, list) or not len(names) == len(shots) == len(heard):
        raise RowError("its `video_names`, `captions` and `audio_captions` are not lists of one length")

    def clip(number: int, name: str, texts: tuple[object, object]) -> dict:
        answer = " ".join(text.strip() for text in texts if isinstance(text, str) and text.strip())
        video = video_fields(media.find([name], VIDEOS), media, settings)
        return {"id": f"shot2story-{identity}-{number}", **video, "conversations": dialogue(SHOT_QUESTION, answer)}

    return [attempt(partial(clip, number, *one)) for number, one in enumerate(zip(names, zip(shots, heard, strict=True), strict=True))]


def activitynet_qa(value: object, media: MediaFolder, settings: Settings) -> list[dict | RowError]:
    """ActivityNet-QA and sets in its form.

    train_q.json: [{"video_name": "1QIUV7WYKXg", "question": "is the athlete wearing trousers", "question_id": "1QIUV7WYKXg_1"}]
    train_a.json: [{"answer": "yes", "type": 3, "question_id": "1QIUV7WYKXg_1"}], given with --answers
    one file:     [{"video_id": "v_k_ZXmr8pmrs", "q": "...", "a": "..."}] (Video-ChatGPT), or video_name (video), question, answer together

    Files: v_NAME.mp4 or NAME.mp4 (.mkv, .webm, ...).
    """
    record = check_object(value)
    name = name_field(record, "video_name", "video_id", "video")
    question = text_field(record, "question" if "question" in record else "q")
    answer = text_field(record, "answer" if "answer" in record else "a")
    path = media.find([name, f"v_{name}"], VIDEOS)
    identity = name_field(record, "question_id", "video_name", "video_id", "video")
    video = video_fields(path, media, settings)
    return [{"id": identity, **video, "conversations": dialogue(f"<video>\n{question[0].upper()}{question[1:]}", answer)}]


def longvila(value: object, media: MediaFolder, settings: Settings) -> list[dict | RowError]:
    """LongVILA's own long-video SFT set (LongVILA/longvila_sft_dataset): data/train-00000-of-00001.parquet, or the same as JSON.

    {"id": "zeSsGIx4W8E", "video": "zeSsGIx4W8E.mp4",
     "conversations": [{"from": "human", "value": "What is shown? \\n<video>"}, {"from": "gpt", "value": "..."}]}

    `id` is the video's; several records share it, so that rows after the first are called ID-2, ID-3, ... The mark goes to the front, as
    the paper has it (media first, then the question). With --search the files may lie in sub-folders.
    """
    record = check_object(value)
    name = name_field(record, "video", "id")
    path = media.find([name, name_field(record, "id", "video")], VIDEOS)
    turns = mark_dialogue(record.get("conversations"), num_images=0, num_videos=1)
    return [{"id": record.get("id"), **video_fields(path, media, settings), "conversations": turns}]
