"""What checkpoints say of the weights a run began with and of their token ids."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tokenizers import write_sentencepiece

from megatron_longvila.checkpoint.origin import check_tokens, describe_origin, describe_tokens, find_origin
from megatron_longvila.config import CheckpointConfig, Config, DataConfig, LLMConfig, ModelConfig, RopeScaling
from megatron_longvila.data.text import load_tokenizer


def config_for(load: Path | str, **data) -> Config:
    return Config(checkpoint=CheckpointConfig(load=str(load)), data=DataConfig(**data))


def checkpoint(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "complete.json").write_text(content)
    return folder


def test_the_start_of_a_run_is_found_where_it_is_now(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", "a")
    origin = describe_origin(config_for(first))
    assert origin["load"] == str(first)
    assert find_origin(origin, config_for("")) == first
    assert find_origin(origin, config_for(checkpoint(tmp_path / "other", "b"))) == first  # another checkpoint is not its start
    moved = first.rename(tmp_path / "moved")
    assert find_origin(origin, config_for(moved)) == moved
    with pytest.raises(ValueError, match="which were in .*first and are not in .*other or .*first; say where that checkpoint is now"):
        find_origin(origin, config_for(tmp_path / "other"))
    assert find_origin(describe_origin(config_for("")), config_for(moved)) is None


def test_token_ids_may_not_change_their_meaning(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "tiny.model"))
    config = config_for("", template="plain")
    tokens = describe_tokens(tokenizer, config)
    assert check_tokens(tmp_path, tokens) == []  # imported weights say nothing
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    assert check_tokens(tmp_path, tokens) == []
    for name, value in (("tokenizer_sha256", "0"), ("newline_ids", [5])):
        with pytest.raises(ValueError, match=f"was trained with {name}=.*the same ids would mean other tokens; use the tokenizer"):
            check_tokens(tmp_path, tokens | {name: value})


def test_a_later_stage_may_change_template_and_rope(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "tiny.model"))
    config = config_for("", template="plain")
    (tmp_path / "tokens.json").write_text(json.dumps(describe_tokens(tokenizer, config)))
    scaling = RopeScaling("linear", 4.0)
    later = replace(config, model=ModelConfig(llm=LLMConfig(rotary_base=4e6, rope_scaling=scaling)), data=DataConfig(template="chatml"))
    template, base, scaled = check_tokens(tmp_path, describe_tokens(tokenizer, later))
    assert template == "template was plain and is chatml now" and base == "rotary_base was 1000000.0 and is 4000000.0 now"
    assert scaled.startswith("rope_scaling was None and is {'type': 'linear', 'factor': 4.0")
