"""Every rule about the tower, the decoder, its rotary scaling and its adapters refuses; the neighbouring legal value passes."""

from __future__ import annotations

import pytest
from test_config_check import assert_refused, tiny

from megatron_longvila.config_check import check

# flags that are refused, world size, words of the message, flags that make it legal
RULES = {
    "tiling": (
        "--model.vision.preprocess dynamic",
        1,
        ["'dynamic'", "not supported", "'resize' or 'pad'"],
        "--model.vision.preprocess pad",
    ),
    "image below patch": ("--model.vision.image_size 5", 1, ["image_size=5", "patch_size=7", "raise"], "--model.vision.image_size 14"),
    "feature layer 0": ("--model.vision.select_layer 0", 1, ["select_layer=0", "-num_layers = -3", "-2"], "--model.vision.select_layer -1"),
    "feature layer deep": ("--model.vision.select_layer -4", 1, ["select_layer=-4", "-num_layers = -3"], "--model.vision.select_layer -3"),
    "vision head size": (
        "--model.vision.num_attention_heads 5",
        1,
        ["hidden_size=32", "num_attention_heads=5", "config.json"],
        "--model.vision.num_attention_heads 8",
    ),
    "vision heads over tp": (
        "--model.vision.num_attention_heads 1 --parallel.tp_size 2",
        2,
        ["num_attention_heads=1", "tp_size=2", "--parallel.tp_size 1"],
        "--model.vision.num_attention_heads 2 --parallel.tp_size 2",
    ),
    "vision mlp over tp": (
        "--model.vision.ffn_hidden_size 63 --parallel.tp_size 2",
        2,
        ["ffn_hidden_size=63", "tp_size=2"],
        "--model.vision.ffn_hidden_size 62 --parallel.tp_size 2",
    ),
    "query groups": (
        "--model.llm.num_query_groups 3",
        1,
        ["heads=8", "num_query_groups=3", "config.json"],
        "--model.llm.num_query_groups 2",
    ),
    "odd head": ("--model.llm.head_dim 15", 1, ["head_dim=15", "even"], "--model.llm.head_dim 14"),
    "mlp over tp": (
        "--model.llm.ffn_hidden_size 129 --parallel.tp_size 2",
        2,
        ["=129", "tp_size=2", "--parallel.tp_size 1"],
        "--parallel.tp_size 2",
    ),
    "vocabulary over tp": (
        "--parallel.tp_size 5 --model.vision.num_attention_heads 5 --model.vision.hidden_size 40 --model.vision.ffn_hidden_size 5 "
        "--model.llm.num_attention_heads 20 --model.llm.num_query_groups 5 --model.llm.ffn_hidden_size 5",
        5,
        ["padded_vocab_size=384", "tp_size=5", "--parallel.tp_size 1"],
        "--parallel.tp_size 5 --model.vision.num_attention_heads 5 --model.vision.hidden_size 40 --model.vision.ffn_hidden_size 5 "
        "--model.llm.num_attention_heads 20 --model.llm.num_query_groups 5 --model.llm.ffn_hidden_size 5 --model.llm.vocab_size 640",
    ),
    "a remedy that fits both towers": (
        "--parallel.tp_size 8 --model.vision.num_attention_heads 8 --model.llm.num_attention_heads 28 --model.llm.head_dim 8",
        8,
        ["llm.num_attention_heads=28", "tp_size=8", "use --parallel.tp_size 4"],  # 7 fits these heads, not the tower's
        "--parallel.tp_size 4 --model.vision.num_attention_heads 8 --model.llm.num_attention_heads 28 --model.llm.head_dim 8 "
        "--data.global_batch_size 2",
    ),
    "rotary base": ("--model.llm.rotary_base 1", 1, ["rotary_base=1", "1000000.0"], "--model.llm.rotary_base 1e4"),
    "rope factor": (
        '--model.llm.rope_scaling {"type":"linear","factor":0.5}',
        1,
        ["factor=0.5", "at least 1"],
        '--model.llm.rope_scaling {"type":"linear","factor":4}',
    ),
    "rope bands": (
        '--model.llm.rope_scaling {"type":"llama3","factor":8,"low_freq_factor":4}',
        1,
        ["low_freq_factor=4.0", "high_freq_factor=4.0", "1.0 and 4.0"],
        '--model.llm.rope_scaling {"type":"llama3","factor":8}',
    ),
    "rope band of nothing": (
        '--model.llm.rope_scaling {"type":"llama3","factor":8,"low_freq_factor":0}',
        1,
        ["low_freq_factor=0.0", "positive", "1.0 and 4.0"],
        '--model.llm.rope_scaling {"type":"llama3","factor":8,"low_freq_factor":0.5}',
    ),
    "rope original": (
        '--model.llm.rope_scaling {"type":"yarn","factor":8,"original_max_position_embeddings":0}',
        1,
        ["original_max_position_embeddings=0", "positive", "'yarn'", "config.json"],
        '--model.llm.rope_scaling {"type":"linear","factor":8,"original_max_position_embeddings":0}',
    ),
    "dynamic never": (
        '--model.llm.rope_scaling {"type":"dynamic","factor":2,"original_max_position_embeddings":4096}',
        1,
        ["original_max_position_embeddings=4096", "max_position_embeddings=4096", "remove rope_scaling"],
        '--model.llm.rope_scaling {"type":"dynamic","factor":2,"original_max_position_embeddings":4095}',
    ),
    "dynamic head": (
        '--model.llm.head_dim 2 --model.llm.rope_scaling {"type":"dynamic","factor":2,"original_max_position_embeddings":512}',
        1,
        ["head_dim=2", "at least 4", "'linear'"],
        '--model.llm.head_dim 4 --model.llm.rope_scaling {"type":"dynamic","factor":2,"original_max_position_embeddings":512}',
    ),
    "yarn betas": (
        '--model.llm.rope_scaling {"type":"yarn","factor":8,"beta_slow":32}',
        1,
        ["beta_slow=32.0", "beta_fast=32.0", "1.0 and 32.0"],
        '--model.llm.rope_scaling {"type":"yarn","factor":8,"beta_slow":31}',
    ),
    "yarn short": (
        '--model.llm.rope_scaling {"type":"yarn","factor":8,"original_max_position_embeddings":6}',
        1,
        ["original_max_position_embeddings=6", "beta_slow = 6.3", "no frequency"],
        '--model.llm.rope_scaling {"type":"yarn","factor":8,"original_max_position_embeddings":7}',
    ),
    "yarn attention": (
        '--model.llm.rope_scaling {"type":"yarn","factor":8,"attention_factor":-1}',
        1,
        ["attention_factor=-1.0", "negative", "0.1 * ln(factor) + 1"],
        '--model.llm.rope_scaling {"type":"yarn","factor":8,"attention_factor":0}',
    ),
    "adapter rank": (
        "--model.lora.rank -1 --training.trainable [lora]",
        1,
        ["rank=-1", "negative", "0 builds no adapter"],
        "--model.lora.rank 1 --training.trainable [lora]",
    ),
    "adapter alpha": (
        "--model.lora.rank 8 --model.lora.alpha 0 --training.trainable [lora]",
        1,
        ["alpha=0.0", "alpha / rank", "16"],
        "--model.lora.rank 8 --model.lora.alpha 0.5 --training.trainable [lora]",
    ),
    "adapter of nothing": (
        "--model.lora.rank 8 --model.lora.targets [] --training.trainable [lora]",
        1,
        ["targets=[]", "at least one of q, k, v, o", "rank 0"],
        "--model.lora.rank 8 --model.lora.targets [o] --training.trainable [lora]",
    ),
    "adapter target twice": (
        "--model.lora.rank 8 --model.lora.targets [q,q] --training.trainable [lora]",
        1,
        ["targets=['q', 'q']", "each once"],
        "--model.lora.targets [q,q]",
    ),
    "adapter too large": (
        "--model.lora.rank 64 --training.trainable [lora]",
        1,
        ["rank=64", "below 64", "q projection", "[llm]"],
        "--model.lora.rank 63 --training.trainable [lora]",
    ),
    "adapter beyond the KV heads": (
        "--model.lora.rank 32 --model.llm.num_query_groups 2 --training.trainable [lora]",
        1,
        ["rank=32", "below 32", "k projection", "lower rank"],
        "--model.lora.rank 32 --model.llm.num_query_groups 2 --model.lora.targets [q,o] --training.trainable [lora]",
    ),
    "adapter over tp": (
        "--model.lora.rank 8 --training.trainable [lora] --model.llm.num_query_groups 1 --parallel.tp_size 2",
        2,
        ["num_query_groups=1", "tp_size=2", "--parallel.tp_size 1", "'[o]'"],
        "--model.lora.rank 8 --training.trainable [lora] --model.llm.num_query_groups 1 --parallel.tp_size 2 --model.lora.targets [o]",
    ),
    "untrained positions": (
        "--data.context_length 4097",
        1,
        ["context_length=4097", "max_position_embeddings=4096", "rotary_base"],
        "--data.context_length 4096",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    flags, world_size, words, legal_flags = RULES[rule]
    assert_refused(flags, world_size, words)
    assert check(tiny(legal_flags), world_size).world_size == world_size
