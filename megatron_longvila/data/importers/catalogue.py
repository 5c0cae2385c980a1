"""Every importer by name: how its files are read and how a record becomes rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_longvila.data.documents import Refused, list_pieces, read_documents
from megatron_longvila.data.importers import images, videos
from megatron_longvila.data.importers.records import Broken, Record, read_object, read_records
from megatron_longvila.data.importers.rows import MediaFolder, RowError, Settings

Convert = Callable[[object, MediaFolder, Settings], list[dict | RowError]]
Read = Callable[[Path, Settings], Iterator[Record]]


@dataclass(frozen=True)
class Importer:
    """One published format.

    Attributes:
        convert: the rows of a record (none where it is not wanted), or what is wrong with one of several. Its docstring is the schema that
            --help shows. Raises RowError.
        read: the records of one input file.
        flags: fields of Settings that it looks at, besides `search`.
        is_text: it makes documents for tools/preprocess_text.py and needs no media.
    """

    convert: Convert
    read: Read
    flags: tuple[str, ...] = ()
    is_text: bool = False


def _records(path: Path, settings: Settings) -> Iterator[Record]:
    return read_records(path)


def _coyo(path: Path, settings: Settings) -> Iterator[Record]:
    return read_records(path, tuple(filter(None, ("id", "key", "status", "text", "caption", settings.caption))))


def _database(path: Path, settings: Settings) -> Iterator[Record]:
    database = read_object(path).get("database")
    if not isinstance(database, dict):
        raise ValueError(f"{path} has no `database` (an object of videos by name)")
    if settings.split != "all":
        known = sorted({str(video.get("subset")) for video in database.values() if isinstance(video, dict)})
        if settings.split not in known:
            raise ValueError(f"--split {settings.split} is none of the sets in {path}, which are {', '.join(known)}; or use all")
    size = path.stat().st_size
    for number, item in enumerate(database.items(), 1):
        yield Record(f"{path.name}#{number}", item, size * number // len(database))


def _answered(path: Path, settings: Settings) -> Iterator[Record]:
    """Questions with the answers of their ids."""
    if settings.answers is None:
        yield from read_records(path)
        return
    answers = {}
    for _, value, _ in read_records(settings.answers):
        if isinstance(value, dict) and (identity := _question_id(value)) is not None:
            answers[identity] = value
    for key, value, done in read_records(path):
        if isinstance(value, dict):
            identity = _question_id(value)
            if identity is None:
                value = Broken("has no `question_id` that is a text or a whole number")
            elif identity in answers:
                value = {**answers[identity], **value}
            else:
                value = Broken(f"{settings.answers.name} has no answer to it")
        yield Record(key, value, done)


def _question_id(record: dict) -> str | None:
    value = record.get("question_id")
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def _documents(path: Path, settings: Settings) -> Iterator[Record]:
    pieces, _ = list_pieces([path], piece_bytes=1 << 62)
    before = 0
    for piece in pieces:
        for document in read_documents(piece, text_field="text", source_field="meta.redpajama_set_name"):
            yield Record(f"{piece.label}:{document.line}", document, before)
        before += piece.size


def slimpajama(value: object, media: MediaFolder, settings: Settings) -> list[dict | RowError]:
    """SlimPajama-627B: train/chunk1/example_0.jsonl.zst, ... (plain .jsonl and .gz too), files or folders of them.

    {"text": "...", "meta": {"redpajama_set_name": "RedPajamaArXiv"}}

    Documents of the wanted --sources (all without it), in the same schema, for tools/preprocess_text.py. That tool reads the published
    files as they are as well: import them to keep some sources only, or to see what is wrong with them before days of tokenising.
    """
    if isinstance(value, Refused):
        raise RowError(value.kind + (f": {value.detail}" if value.detail else ""))
    if settings.sources and value.source not in settings.sources:
        return []
    return [{"text": value.text, "meta": {"redpajama_set_name": value.source}}]


IMPORTERS = {
    "llava": Importer(images.llava, _records, ("fps",)),
    "captions": Importer(images.captions, _records, ("caption", "fps")),
    "coyo": Importer(images.coyo, _coyo, ("caption",)),
    "youcook2": Importer(videos.youcook2, _database, ("split", "clips")),
    "sharegptvideo": Importer(videos.sharegptvideo, _records, ("fps",)),
    "shot2story": Importer(videos.shot2story, _records, ("clips", "fps")),
    "activitynet_qa": Importer(videos.activitynet_qa, _answered, ("answers", "fps")),
    "longvila": Importer(videos.longvila, _records, ("fps",)),
    "slimpajama": Importer(slimpajama, _documents, ("sources",), is_text=True),
}
