"""Prompts: files that a person can read and change. Their hash stands in every record made with them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

QUESTION_TYPES = ("Spatial", "Attribute", "Action", "Object", "OCR", "Synopsis", "Temporal")
DOMAINS = (
    "Travel & Events", "Sports", "Education", "Pets & Animals", "People & Blogs", "News & Politics",
    "Music", "Science & Technology", "Comedy", "Entertainment", "Film", "Gaming",
)  # fmt: skip
# What a prompt of each stage may speak of.
PLACEHOLDERS = {
    "caption": {"num_frames", "start", "end", "duration"},
    "image": set(),
    "summarize": {"captions", "duration", "domains"},
    "qa": {"captions", "duration", "num_questions", "types"},
}
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_SECTION = re.compile(r"^## (system|user)\n", re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """A prompt file: `name` is its file name without ending (and says its version), `hash` the sha256 of its bytes."""

    name: str
    hash: str
    system: str
    user: str

    def messages(self, values: dict[str, str]) -> tuple[str, str]:
        """(system, user) with every {{name}} replaced once; what a value itself contains stays as it is."""
        return tuple(_PLACEHOLDER.sub(lambda match: values[match[1]], text) for text in (self.system, self.user))


def load_prompt(path: Path, stage: str) -> Prompt:
    """Read a prompt of `stage`: a line `## system`, its text, a line `## user`, its text. Raises ValueError when it is no such file."""
    try:
        data = path.read_bytes()
        text = data.decode().replace("\r\n", "\n")
    except OSError as error:
        raise ValueError(f"prompt {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt {path} is not UTF-8 text: {error}") from None
    pieces = _SECTION.split(text)
    if [piece for piece in pieces[1::2]] != ["system", "user"] or pieces[0].strip() or not pieces[4].strip():
        raise ValueError(f"prompt {path} must be a line `## system`, text, a line `## user`, text, and nothing before them")
    unknown = set(_PLACEHOLDER.findall(text)) - PLACEHOLDERS[stage]
    if unknown:
        raise ValueError(f"prompt {path} asks for {sorted(unknown)}; a prompt of `{stage}` may use {sorted(PLACEHOLDERS[stage])}")
    return Prompt(path.stem, hashlib.sha256(data).hexdigest(), pieces[2].strip(), pieces[4].strip())
