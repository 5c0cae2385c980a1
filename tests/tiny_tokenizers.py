"""Tokenizers made on the spot: a SentencePiece model with byte fallback and a byte-level BPE with chat tokens."""

import io
import json
from pathlib import Path

CORPUS = [
    "What colour is the square? The square is red.", "Which shape moves to the left? A blue circle moves left.",
    "system user assistant You are a helpful assistant.", "How many circles are there? There are two circles.",
    "Describe the video.\nA green triangle goes up.", "image video im_start im_end end of text",
] * 4  # fmt: skip
CHAT_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


def write_sentencepiece(path: Path, **options) -> Path:
    """Train a SentencePiece model on CORPUS; options go to the trainer."""
    import sentencepiece

    model = io.BytesIO()
    settings = {"vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


def write_bpe(folder: Path, specials: list[str] = CHAT_TOKENS, plain_added: tuple[str, ...] = ("<image>", "<tool_call>", "    ")) -> Path:
    """Train a byte-level BPE; `specials` are special added tokens, `plain_added` added tokens that are not marked special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain_added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = "<|endoftext|>" if "<|endoftext|>" in specials else None
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "bos_token": None}))
    return folder
