"""Importers of image sets and of LLaVA-style dialogues."""

from __future__ import annotations

import hashlib

from megatron_longvila.data.importers.rows import (
    IMAGES,
    VIDEOS,
    MediaFolder,
    RowError,
    Settings,
    check_object,
    dialogue,
    mark_dialogue,
    name_field,
    path_list,
    text_field,
    video_fields,
)

# Short requests for short captions; which one a record gets depends on its id alone.
SHORT_QUESTIONS = (
    "Describe this image in one sentence.",
    "Write a short caption for this picture.",
    "What does this image show? Answer briefly.",
    "Sum up what can be seen here in a few words.",
)


def llava(value: object, media: MediaFolder, settings: Settings) -> list[dict | RowError]:
    """LLaVA-style JSON: a list or JSON lines of dialogues, with or without media.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is on the bus?"}, {"from": "gpt", "value": "An advertisement."}]}

    `image` or `images` (a path or a list of paths), `video` (the same), or none of them; paths start at the media folder. Marks are <image>
    and <video>, or <vila/image> and <vila/video>; a record with a video only may mark it <image>.
    Used by LLaVA-Instruct, LLaVA-1.5 and -OneVision, ShareGPT4V's SFT set, VILA's own lists.
    """
    record = check_object(value)
    images = [media.find([path], IMAGES) for name in ("image", "images") for path in path_list(record, name)]
    videos = [media.find([path], VIDEOS) for path in path_list(record, "video")]
    fields: dict = {}
    if videos:
        fields = {**video_fields(videos[0], media, settings), "video": videos if len(videos) > 1 else videos[0]}
    if images:
        fields |= {"images": images} if len(images) > 1 else {"image": images[0]}
    turns = mark_dialogue(record.get("conversations"), num_images=len(images), num_videos=len(videos))
    return [{"id": record.get("id"), **fields, "conversations": turns}]


def captions(value: object, media: MediaFolder, settings: Settings) -> list[dict | RowError]:
    """Image captions: LLaVA-CC3M-Pretrain-595K and ShareGPT4V.

    chat.json and share-captioner_*.json:
    {"id": "004539375", "image": "00453/004539375.jpg",
     "conversations": [{"from": "human", "value": "Render a summary of the photo.\\n<image>"}, {"from": "gpt", "value": "..."}]}
    metadata.json and other plain captions:
    {"id": "GCC_train_002582585", "image": "GCC_train_002582585.jpg", "caption": "...", "blip_caption": "...", "url": "..."}

    A record without `conversations` becomes a short question and its `caption` (another field with --caption).
    """
    record = check_object(value)
    if "conversations" in record:
        return llava(record, media, settings)
    caption = text_field(record, settings.caption or "caption")
    image = media.find([name_field(record, "image", "id")], IMAGES)
    identity = name_field(record, "id", "image")
    return [{"id": identity, "image": image, "conversations": dialogue(f"<image>\n{_question(identity)}", caption)}]


def coyo(value: object, media: MediaFolder, settings: Settings) -> list[dict | RowError]:
    """COYO-700M Parquet files, as published or as written by img2dataset.

    published:   id (int64), url, text, width, height, image_phash, ... ; the picture is ID.jpg (.jpeg, .png, .webp)
    img2dataset: key ("000010005"), status ("success"), caption or text, url, ... ; the picture is 00001/000010005.jpg (or without folder)

    The caption is `text`, or `caption` where there is no `text`; --caption reads another column, such as one with better captions.
    Rows whose download did not succeed are rejected. The url is never opened.
    """
    record = check_object(value)
    status = record.get("status")
    if status not in (None, "success"):
        raise RowError(f"was not downloaded: its status is {status!r}")
    column = settings.caption or ("text" if record.get("text") is not None else "caption")
    caption = text_field(record, column)
    if record.get("key") not in (None, ""):
        identity = name_field(record, "key")
        names = [f"{identity[:5]}/{identity}", identity]
    else:
        identity = name_field(record, "id")
        names = [identity]
    image = media.find(names, IMAGES[1:])
    return [{"id": f"coyo-{identity}", "image": image, "conversations": dialogue(f"<image>\n{_question(identity)}", caption)}]


def _question(identity: str) -> str:
    return SHORT_QUESTIONS[hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[0] % len(SHORT_QUESTIONS)]
