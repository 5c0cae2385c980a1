"""What all importers share: finding media below a folder, and dialogues with the marks our rows have."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_longvila.data.importers.records import Broken
from megatron_longvila.data.media import MediaError, MediaUnreadable, resolve_below
from megatron_longvila.data.rows import RowError

IMAGES = ("", ".jpg", ".jpeg", ".png", ".webp")
VIDEOS = ("", ".mp4", ".mkv", ".webm", ".avi", ".mov")
_OTHER_MARKS = {"<vila/image>": "<image>", "<vila/video>": "<video>", "<image_placeholder>": "<image>", "<video_placeholder>": "<video>"}
_MARK = re.compile("<image>|<video>")


class Missing(RowError):
    """The folder does not hold a medium of the record."""


@dataclass(frozen=True)
class Settings:
    """What the flags of an importer say.

    Attributes:
        fps: of media that are folders of frames; 0 refuses them.
        caption: field or column with the caption.
        split: part of the set that is read, `all` for all.
        clips: one row for each clip, whose files were cut before, not one for the whole video.
        answers: file of answers, where those stand apart from the questions.
        sources: only documents of these sources; none for all.
        search: media are also looked for by name in all sub-folders.
    """

    fps: float = 0.0
    caption: str = ""
    split: str = "training"
    clips: bool = False
    answers: Path | None = None
    sources: tuple[str, ...] = ()
    search: bool = False


_REMEMBERED = 1 << 16  # names looked up lately; videos are asked for again and again, pictures hardly


class MediaFolder:
    """The files below one folder. Nothing outside it is ever opened, and nothing is fetched."""

    def __init__(self, root: Path, *, search: bool = False):
        self._root, self._search = root, search
        self._real_root = root.resolve()
        self._found: dict[tuple[str, ...], str] = {}
        self._by_stem: dict[str, list[str]] | None = None

    def find(self, names: Sequence[str], endings: Sequence[str]) -> str:
        """Path below the folder of the first file there is among `names`, each with each of `endings`. With VIDEOS it may be a folder.

        Raises:
            Missing: there is none. RowError: a name leads out of the folder, or several files are meant.
        """
        key = (*names, *endings)
        if key not in self._found:
            if len(self._found) == _REMEMBERED:
                self._found.clear()
            self._found[key] = self._look(list(dict.fromkeys(names)), endings)
        return self._found[key]

    def _look(self, names: Sequence[str], endings: Sequence[str]) -> str:
        for name in names:
            for ending in endings:
                try:
                    real = resolve_below(self._root, name + ending)
                except MediaUnreadable:
                    continue
                except MediaError as error:
                    raise RowError(str(error)) from None
                if real.is_file() or (endings is VIDEOS and real.is_dir() and real != self._real_root):
                    return os.path.relpath(real, self._real_root)
        if self._search:
            # A name with folders first means a path that ends like it. Of names without their folders only the first one is looked for:
            # the others may be as short as "0".
            for name, whole in [*((name, True) for name in names), (names[0], False)]:
                found = self._matches(name, endings, whole)
                if len(found) > 1:
                    raise RowError(f"{name!r} may be {found[0]!r} or {found[1]!r}; name the file with its folder")
                if found:
                    return found[0]
        raise Missing(f"{names[0]!r} is not in the media folder")

    def _matches(self, name: str, endings: Sequence[str], whole: bool) -> list[str]:
        """Files with one of the `endings` that have this name in any folder, or with `whole` in any folder above its own. The one with
        the ending of the name, or else all."""
        path = Path(name)
        bare = path.with_suffix("") if path.suffix.lower() in endings and path.suffix else path  # "W26.8" has no ending
        found = [Path(one) for one in self._index().get(bare.name, []) if Path(one).suffix.lower() in endings]
        if whole:
            found = [one for one in found if one.with_suffix("").parts[-len(bare.parts) :] == bare.parts]
        return [str(one) for one in found if one.name == path.name] or [str(one) for one in found]

    def _index(self) -> dict[str, list[str]]:
        """Paths by name without ending. Links are left out: what they point to is found where it is."""
        if self._by_stem is None:
            self._by_stem = {}
            for folder, _, files in os.walk(self._real_root):
                for name in sorted(files):
                    path = Path(folder, name)
                    if path.suffix.lower() in (*IMAGES[1:], *VIDEOS[1:]) and not path.is_symlink():
                        self._by_stem.setdefault(path.stem, []).append(os.path.relpath(path, self._real_root))
        return self._by_stem

    def is_folder(self, path: str) -> bool:
        return (self._real_root / path).is_dir()


def attempt(make: Callable[[], dict]) -> dict | RowError:
    """A row, or what is wrong with it: so that one clip of a record costs no more than itself."""
    try:
        return make()
    except RowError as error:
        return error


def video_fields(path: str, media: MediaFolder, settings: Settings) -> dict:
    """The fields of a row that shows the video at `path`. Raises RowError for a folder of frames without a rate."""
    if not media.is_folder(path):
        return {"video": path}
    if not settings.fps:
        raise RowError(f"{path!r} is a folder of frames; say at which rate they were taken with --fps")
    return {"video": path, "fps": settings.fps}


def check_object(value: object) -> dict:
    if isinstance(value, Broken):
        raise RowError(value.reason)
    if not isinstance(value, dict):
        raise RowError(f"a record must be an object, not {type(value).__name__}")
    return value


def text_field(record: dict, name: str, *, empty: bool = False) -> str:
    """A text of the record without space around it. Raises RowError if it is none, or empty."""
    value = record.get(name)
    if not isinstance(value, str):
        raise RowError(f"has no `{name}` (a text); its fields are {', '.join(map(str, record))}"[:300])
    if not value.strip() and not empty:
        raise RowError(f"its `{name}` is empty")
    return value.strip()


def name_field(record: dict, *names: str) -> str:
    """The first of these fields that holds a name (a text or a whole number). Raises RowError if none does."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    raise RowError(f"has no {' or '.join(f'`{name}`' for name in names)}; its fields are {', '.join(map(str, record))}"[:300])


def path_list(record: dict, name: str) -> list[str]:
    """A field with a path or a list of paths; none if it is not there."""
    value = record.get(name)
    values = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) and one.strip() for one in values):
        raise RowError(f"its `{name}` must be a path or a list of paths")
    return values


def dialogue(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def mark_dialogue(turns: object, *, num_images: int, num_videos: int) -> list[dict]:
    """A published dialogue with our marks.

    Other spellings of marks become ours, and the image marks of a record that has videos only become video marks. A mark that is alone in
    its turn goes to the front, followed by a newline, as LLaVA and VILA do when they train. Without any mark the media come first of all.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise RowError("has no `conversations` (a list of {from, value})")
    marked, found = [], 0
    for turn in turns:
        value = turn["value"]
        if turn.get("from") in ("human", "user"):
            for other, ours in _OTHER_MARKS.items():
                value = value.replace(other, ours)
            if num_videos and not num_images:
                value = value.replace("<image>", "<video>")
            marks = _MARK.findall(value)
            found += len(marks)
            if len(marks) == 1:
                value = f"{marks[0]}\n{_MARK.sub('', value).strip()}"
        marked.append({"from": turn.get("from"), "value": value})
    first = next((turn for turn in marked if turn["from"] in ("human", "user")), None)
    if first is not None and not found and num_images + num_videos:
        first["value"] = "<video>\n" * num_videos + "<image>\n" * num_images + first["value"].strip()
    return marked
