"""Tokenizers that read text from data as plain text only: no string a user types can become a special token.

Special tokens enter a sequence by id alone (`special_id`), placed there by a template in conversation.py. To make that
true by construction, the tokenizer's own table of special pieces is taken away before any text is encoded:
SentencePiece pieces that would match text (`user_defined_symbols` such as `<image>`) become control pieces, which
never match; a Hugging Face `tokenizer.json` is loaded without its `added_tokens`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

# Files that decide how text becomes ids, in a Hugging Face tokenizer folder.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"
)  # fmt: skip


class Tokenizer(ABC):
    """Text to ids and back. Encoding is thread-safe.

    Attributes:
        hash: sha256 of the files it was read from.
        vocab_size: largest id it knows, plus one.
        bos_id, eos_id: None where the tokenizer declares none.
        newline_ids: the ids that separate lines, and follow each frame.
    """

    hash: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    newline_ids: tuple[int, ...]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`; none of them is special. No bos or eos is added."""

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text. For processes that never fork: the library may start threads for it."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens are left out, and ids past the vocabulary, which a model with spare rows can predict."""

    @abstractmethod
    def find_special(self, name: str) -> int | None:
        """Id of the special token written `name`, or None."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """What one id stands for, specials by their name: for people to read. An id of half a character gives U+FFFD or the byte's name."""

    def special_id(self, name: str) -> int:
        """Id of the special token written `name`; ValueError if the tokenizer has none."""
        found = self.find_special(name)
        if found is None:
            raise ValueError(
                f"the tokenizer has no special token {name!r}; choose the data.template that fits the tokenizer, or add the token to it"
            )
        return found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer from a SentencePiece `.model` file or a Hugging Face tokenizer folder; nothing is downloaded.

    A folder is read from `tokenizer.json`, else from `tokenizer.model`, else (`vocab.json` with `merges.txt`) through
    transformers, which must then be installed. Raises ValueError for anything else.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path, (path / "tokenizer.json").read_text(encoding="utf-8"))
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        from transformers import AutoTokenizer

        return HuggingFaceTokenizer(path, AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer.to_str())
    raise ValueError(
        f"data.tokenizer={str(path)!r} is neither a SentencePiece .model file nor a folder with tokenizer.json, tokenizer.model, "
        "or vocab.json and merges.txt"
    )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. The newline is the piece "\\n" (a user-defined symbol) or the byte piece <0x0A>."""

    def __init__(self, path: Path):
        import sentencepiece

        model = path.read_bytes()
        self.hash = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=_special_pieces_to_control(model))
        self.vocab_size = self._processor.get_piece_size()
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.eos_id = self._processor.eos_id() if self._processor.eos_id() >= 0 else None
        newline = next((i for i in map(self._find_piece, ("\n", "<0x0A>")) if i is not None), None)
        if newline is None:
            raise ValueError(f"{path} has no piece for a newline; train it with user_defined_symbols=['\\n'] or byte_fallback=True")
        self.newline_ids = (newline,)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([i for i in ids if i < self.vocab_size and not self._processor.is_control(i)])

    def piece(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id).replace("\u2581", " ") if token_id < self.vocab_size else ""

    def find_special(self, name: str) -> int | None:
        found = self._find_piece(name)
        return found if found is not None and self._processor.is_control(found) else None

    def _find_piece(self, piece: str) -> int | None:
        found = self._processor.piece_to_id(piece)  # the unknown id for any other string
        return found if self._processor.id_to_piece(found) == piece else None


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` model; `definition` is the text of its tokenizer.json, `folder` holds the files beside it."""

    def __init__(self, folder: Path, definition: str):
        from tokenizers import Tokenizer as Backend

        self.hash = _hash_files(folder)
        self._full = Backend.from_str(definition)
        beside = _read_json(folder / "tokenizer_config.json")
        self._special = {token["content"]: token["id"] for token in json.loads(definition)["added_tokens"]}
        self._special |= {token["content"]: int(i) for i, token in beside.get("added_tokens_decoder", {}).items()}
        self._special |= _read_json(folder / "added_tokens.json")
        self._special_ids = frozenset(self._special.values())
        stripped, self._text_ids = _without_specials(definition)
        self._plain = Backend.from_str(stripped)
        self._plain.no_truncation()
        self._plain.no_padding()
        self.vocab_size = max([*self._full.get_vocab(with_added_tokens=True).values(), *self._special_ids]) + 1
        self.bos_id = self._declared(beside, "bos_token")
        self.eos_id = self._declared(beside, "eos_token")
        self.newline_ids = tuple(self.encode("\n"))
        if not self.newline_ids:
            raise ValueError(f"{folder} encodes a newline as nothing; frames need a token that follows them")

    def encode(self, text: str) -> list[int]:
        return self._checked(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        # without the place of each token in the text, which takes a tenth of the time
        return [self._checked(one.ids) for one in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def _checked(self, ids: list[int]) -> list[int]:
        leaked = self._special_ids.intersection(ids) - self._text_ids
        if leaked:  # a vocabulary that reaches a special piece by merging; none of the supported models has one
            raise ValueError(f"text reaches the special token {self._full.id_to_token(min(leaked))!r} through ordinary pieces")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._full.decode([i for i in ids if i not in self._special_ids or i in self._text_ids])

    def piece(self, token_id: int) -> str:
        return self.decode([token_id]) or self._full.id_to_token(token_id) or ""

    def find_special(self, name: str) -> int | None:
        return self._special.get(name)

    def _declared(self, config: dict, key: str) -> int | None:
        token = config.get(key)
        if token is None:
            return None
        return self.special_id(token["content"] if isinstance(token, dict) else token)


def _without_specials(definition: str) -> tuple[str, frozenset[int]]:
    """A tokenizer.json without added tokens, and the ids of added tokens that are text and stay (runs of white space; unknown)."""
    tokenizer = json.loads(definition)
    model = tokenizer["model"]
    vocab = model["vocab"]
    kept = [token for token in tokenizer["added_tokens"] if not token["special"] and not token["content"].strip()]
    if isinstance(vocab, list):
        kept = [token for token in kept if token["id"] < len(vocab)]
    dropped = [token for token in tokenizer["added_tokens"] if token not in kept]
    tokenizer["added_tokens"] = kept
    if isinstance(vocab, list):  # Unigram: [piece, score] by id; ids must not move, so the piece gets a name nobody types
        unknown = {model.get("unk_id")}
        for token in dropped:
            if token["id"] < len(vocab) and token["id"] not in unknown:
                vocab[token["id"]][0] = f"\x00{token['id']}\x00"
    else:
        names = {token["content"] for token in dropped} - {model.get("unk_token")}
        unknown = {vocab[name] for name in (model.get("unk_token"),) if name in vocab}
        model["vocab"] = {piece: i for piece, i in vocab.items() if piece not in names}
        # An added token outside the vocabulary is numbered by its place in the list, which is shorter now.
        model["vocab"] |= {token["content"]: token["id"] for token in kept}
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not names.intersection(_merged(merge))]
    return json.dumps(tokenizer), frozenset(token["id"] for token in kept) | frozenset(i for i in unknown if i is not None)


def _merged(merge: str | list[str]) -> tuple[str, str, str]:
    """Left, right and joined piece of a BPE merge, written "a b" in old files and ["a", "b"] in new ones."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _hash_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


# SentencePiece: the ModelProto is edited on the wire, so that protobuf is not needed to read one enumeration.
_USER_DEFINED, _CONTROL = 4, 3
_PIECES_FIELD, _PIECE_TEXT_FIELD, _PIECE_TYPE_FIELD = 1, 1, 3


def _special_pieces_to_control(model: bytes) -> bytes:
    """The model with every user-defined symbol that is more than white space or one character turned into a control piece.

    White space ("\\n", runs of spaces) and single characters (digits) are ordinary text and keep matching.
    Source of the layout: sentencepiece_model.proto, `repeated SentencePiece pieces = 1` with piece = 1, score = 2, type = 3.
    """
    out = bytearray()
    for number, start, value_start, stop in _wire_fields(model):
        if number != _PIECES_FIELD:
            out += model[start:stop]
            continue
        message = model[value_start:stop]
        fields = {n: (begin, end) for n, _, begin, end in _wire_fields(message)}
        text = message[slice(*fields[_PIECE_TEXT_FIELD])].decode("utf-8")
        piece_type = message[fields[_PIECE_TYPE_FIELD][0]] if _PIECE_TYPE_FIELD in fields else 1
        if piece_type == _USER_DEFINED and len(text.replace("\u2581", " ").strip()) > 1:
            message += bytes([_PIECE_TYPE_FIELD << 3, _CONTROL])  # a scalar given twice: the last one counts
        out += bytes([_PIECES_FIELD << 3 | 2]) + _varint(len(message)) + message
    return bytes(out)


def _wire_fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(field number, start of the field, start of its value, stop) of a protobuf message, field by field."""
    position = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        kind = key & 7
        if kind == 0:
            value = position
            _, position = _read_varint(message, position)
        elif kind == 2:
            size, value = _read_varint(message, position)
            position = value + size
        elif kind in (1, 5):
            value = position
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"not a SentencePiece model: protobuf wire type {kind} at byte {start}")
        yield key >> 3, start, value, position


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError(f"not a SentencePiece model: broken number at byte {position}")
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
