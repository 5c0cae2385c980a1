"""transformers' own SigLIP and Qwen2 or Llama with the sizes of one of our configurations."""

import pytest

from megatron_longvila.config import Config

transformers = pytest.importorskip("transformers")


def hf_modules(config: Config, *, pooling_head: bool = False):
    """(tower, language model) in fp32 with random weights."""
    vision, llm = config.model.vision, config.model.llm
    tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=vision.hidden_size, intermediate_size=vision.ffn_hidden_size, num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_attention_heads, image_size=vision.image_size, patch_size=vision.patch_size,
            layer_norm_eps=vision.layernorm_epsilon, attn_implementation="eager", vision_use_head=pooling_head,
        )
    )  # fmt: skip
    config_class, model_class = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[llm.architecture]
    language_model = model_class(
        config_class(
            hidden_size=llm.hidden_size, intermediate_size=llm.ffn_hidden_size, num_hidden_layers=llm.num_layers,
            num_attention_heads=llm.num_attention_heads, num_key_value_heads=llm.num_query_groups, head_dim=llm.head_dim,
            vocab_size=llm.vocab_size, max_position_embeddings=llm.max_position_embeddings, rms_norm_eps=llm.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": llm.rotary_base},
            tie_word_embeddings=llm.tie_embeddings, attn_implementation="eager",
        )
    )  # fmt: skip
    return tower.float(), language_model.float()
