"""Tokenizers that the tests of this folder share."""

from pathlib import Path

import pytest
from tiny_tokenizers import write_bpe, write_sentencepiece


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory) -> Path:
    return write_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory) -> Path:
    symbols = {"user_defined_symbols": ["<image>", "<|im_end|>", "\n"], "control_symbols": ["<|im_start|>"]}
    return write_sentencepiece(tmp_path_factory.mktemp("spm") / "toy.model", **symbols)
