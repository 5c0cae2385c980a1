"""Tiny random models on disk, saved by transformers itself: Qwen2, Llama, SigLIP, LLaVA, and folders in VILA's layout made of them.

Every tensor is random, norms and biases too, and large enough that a wrong one shows in the logits. All sizes run under tp 2 and cp 4.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import write_bpe

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 420  # more than the tokenizer's 389, and not a multiple of 128
PATCH_SIZE = 7
EVEN_GRID, ODD_GRID = 28, 37  # image sizes: 4 x 4 patches; 5 x 5 and two pixels of each side in no patch
HIDDEN_SIZE, VISION_HIDDEN_SIZE = 64, 32
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3_SCALING = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR_SCALING = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 4.0}


def llm_config(architecture: str = "qwen2", tied: bool = False, rope_parameters: dict | None = None):
    """transformers' configuration of the language model; Llama has llama3 scaling unless told otherwise."""
    default = LLAMA3_SCALING if architecture == "llama" else {"rope_type": "default", "rope_theta": 1_000_000.0}
    config_class = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[architecture]
    return config_class(
        hidden_size=HIDDEN_SIZE, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB_SIZE, max_position_embeddings=512, rope_parameters=dict(rope_parameters or default),
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=381, pad_token_id=379,
    )  # fmt: skip


def vision_config(image_size: int = EVEN_GRID, pooling_head: bool = True):
    """transformers' configuration of the tower: three layers, of which LLaVA and VILA use two."""
    return transformers.SiglipVisionConfig(
        hidden_size=VISION_HIDDEN_SIZE, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=image_size,
        patch_size=PATCH_SIZE, vision_use_head=pooling_head,
    )  # fmt: skip


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Norm weights around one, everything else around zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = "norm" in name and name.endswith("weight")
        parameter.copy_(1 + 0.2 * noise if is_scale else 0.15 * noise)
    return model


def save_llm(
    folder: Path, architecture: str = "qwen2", *, tied: bool = False, dtype=torch.float32, rope_parameters: dict | None = None,
    old_rope: bool = False, shard_size: str = "50GB", seed: int = 0,
) -> Path:  # fmt: skip
    """Qwen2ForCausalLM or LlamaForCausalLM with a tokenizer; `old_rope` writes rope_theta and rope_scaling, as transformers 4 did."""
    model_class = {"qwen2": transformers.Qwen2ForCausalLM, "llama": transformers.LlamaForCausalLM}[architecture]
    model = randomize(model_class(llm_config(architecture, tied, rope_parameters)), seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder)
    if old_rope:
        spell_rope_as_before(folder / "config.json")
    return folder


def save_siglip(
    folder: Path, image_size: int = EVEN_GRID, *, inner_prefix: bool = False, pooling_head: bool = True, dtype=torch.float32, seed: int = 1
) -> Path:
    """SiglipVisionModel and its preprocessor; `inner_prefix` writes the names that transformers wrote before 5.6."""
    model = randomize(transformers.SiglipVisionModel(vision_config(image_size, pooling_head)), seed)
    model.to(dtype).save_pretrained(folder)
    if inner_prefix:
        path = folder / "model.safetensors"
        tensors = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    write_preprocessor(folder, image_size)
    return folder


def save_llava(folder: Path, architecture: str = "qwen2", *, tied: bool = False, image_size: int = EVEN_GRID, dtype=torch.float32) -> Path:
    """LlavaForConditionalGeneration: SigLIP's layer -2, two linears with GELU between, Qwen2 or Llama."""
    write_tokenizer(folder)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision_config(image_size, pooling_head=False), text_config=llm_config(architecture, tied),
            vision_feature_layer=-2, vision_feature_select_strategy="full", projector_hidden_act="gelu",
            image_token_index=image_token(folder), tie_word_embeddings=tied,
        )
    )  # fmt: skip
    randomize(model, 2).to(dtype).save_pretrained(folder)
    write_preprocessor(folder, image_size)
    return folder


def save_vila(
    root: Path, architecture: str = "qwen2", *, projector: str = "mlp_downsample", image_size: int = EVEN_GRID, tied: bool = False,
    dtype=torch.float32, pooling_head: bool = True, rope_parameters: dict | None = None,
) -> Path:  # fmt: skip
    """A folder as the public VILA code writes it: llm/, vision_tower/ with the inner prefix, mm_projector/, and old rope names."""
    save_llm(root / "llm", architecture, tied=tied, dtype=dtype, rope_parameters=rope_parameters, old_rope=True)
    save_siglip(root / "vision_tower", image_size, inner_prefix=True, pooling_head=pooling_head, dtype=dtype)
    (root / "mm_projector").mkdir()
    tensors = {name: tensor.to(dtype) for name, tensor in projector_tensors(projector).items()}
    save_file(tensors, root / "mm_projector" / "model.safetensors", metadata={"format": "pt"})
    settings = {"architectures": ["MultimodalProjector"], "mm_projector_type": projector, "model_type": "v2l_projector"}
    write_json(root / "mm_projector" / "config.json", settings)
    part_configs = {
        f"{key}_cfg": read_json(root / key / "config.json") | {"_name_or_path": f"/somewhere/else/{key}"}
        for key in ("llm", "vision_tower", "mm_projector")
    }
    write_json(
        root / "config.json",
        part_configs | {
            "_name_or_path": "/somewhere/else", "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama",
            "hidden_size": HIDDEN_SIZE, "mm_hidden_size": VISION_HIDDEN_SIZE, "resume_path": "/somewhere/else",
            "image_aspect_ratio": "resize", "num_video_frames": 8, "fps": 0.0, "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "cls_patch", "chat_template": None, "tune_language_model": True, "tune_vision_tower": True,
            "tune_mm_projector": True, "model_dtype": str(dtype), "s2": False, "time_token_format": "<t{t}>",
            "image_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder"}',
            "video_encoder": '{"_target_": "llava.model.encoders.BasicVideoEncoder"}',
        },
    )  # fmt: skip
    return root


def projector_tensors(kind: str, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random weights under VILA's names: the numbers of a Sequential's modules."""
    width, hidden = VISION_HIDDEN_SIZE, HIDDEN_SIZE
    if kind == "linear":
        shapes = {"layers": (hidden, width)}
    elif kind == "mlp2x_gelu":
        shapes = {"layers.0": (hidden, width), "layers.2": (hidden, hidden)}
    elif kind == "mlp_downsample_3x3_fix":
        wide, middle = 9 * width, 3 * width
        shapes = {"layers.1": (wide,), "layers.2": (middle, wide), "layers.4": (middle,), "layers.5": (hidden, middle)}
        shapes["layers.7"] = (hidden, hidden)
    else:
        shapes = {"layers.1": (4 * width,), "layers.2": (hidden, 4 * width), "layers.4": (hidden, hidden)}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = 0.15 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        tensors[f"{name}.bias"] = 0.15 * torch.randn(shape[0], generator=generator)
    return tensors


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with chat tokens and a chat template."""
    write_bpe(folder)
    settings = read_json(folder / "tokenizer_config.json")
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", settings)


def image_token(folder: Path) -> int:
    """Id of <image> in the tokenizer of `folder`."""
    added = read_json(folder / "tokenizer.json")["added_tokens"]
    return next(token["id"] for token in added if token["content"] == "<image>")


def write_preprocessor(folder: Path, image_size: int) -> None:
    """SigLIP's: resize, 1/255, mean and deviation 0.5."""
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            "image_processor_type": "SiglipImageProcessor", "resample": 3, "rescale_factor": 1 / 255,
            "size": {"height": image_size, "width": image_size},
        },
    )  # fmt: skip


def spell_rope_as_before(path: Path) -> None:
    """rope_parameters to rope_theta and rope_scaling."""
    settings = read_json(path)
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    write_json(path, settings)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
