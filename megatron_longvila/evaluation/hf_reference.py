"""transformers' own modules over a folder in Hugging Face's form, and the projector by its formula: the other side of every proof.

Nothing of this project's models is used here. Everything runs in fp32 on the CPU.

Shapes: F frames, S side of a frame in pixels, P patches, C tower width, V visual tokens of a frame, D decoder width, T tokens, H head dim.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from megatron_longvila.checkpoint.layouts import PARTS, part_folder, read_preprocessor
from megatron_longvila.checkpoint.tensor_files import PickledFile, SafetensorsFile, read_json
from megatron_longvila.parallel.plan import PLACEHOLDER_ID

# Steps of each projector, with the numbers its modules have in VILA's Sequential.
_PROJECTORS: dict[str, tuple[tuple[str, str | int], ...]] = {
    "linear": (("linear", "layers"),),
    "mlp2x_gelu": (("linear", "layers.0"), ("gelu", ""), ("linear", "layers.2")),
    "mlp_downsample": (("merge", 2), ("norm", "layers.1"), ("linear", "layers.2"), ("gelu", ""), ("linear", "layers.4")),
    "mlp_downsample_3x3_fix": (
        ("merge", 3), ("norm", "layers.1"), ("linear", "layers.2"), ("gelu", ""),
        ("norm", "layers.4"), ("linear", "layers.5"), ("gelu", ""), ("linear", "layers.7"),
    ),
}  # fmt: skip
_PROJECTORS["mlp_downsample_2x2_fix"] = _PROJECTORS["mlp_downsample"]
# Tensors of the tower that may be missing where they do not reach the feature; transformers makes them up.
_BEYOND_FEATURE = re.compile(r"(?:model\.vision_tower\.)?(?:vision_model\.)?(?:head\.|post_layernorm\.|encoder\.layers\.(\d+)\.)")


def merge_patches(features_FPC: Tensor, side: int) -> Tensor:
    """side x side neighbouring patches become one token: (row 0, column 0), (row 0, column 1), ...; zeros at the right and bottom edge."""
    grid = round(features_FPC.shape[1] ** 0.5)
    missing = -grid % side
    padded = F.pad(features_FPC.unflatten(1, (grid, grid)), (0, 0, 0, missing, 0, missing))
    return torch.cat([padded[:, row::side, column::side] for row in range(side) for column in range(side)], dim=-1).flatten(1, 2)


def project(features_FPC: Tensor, weights: dict[str, Tensor], kind: str = "mlp_downsample") -> Tensor:
    """A VILA projector from its formula: [F, P, C] to [F, V, D].

    Args:
        weights: under the names of `mm_projector/model.safetensors`.
        kind: `mm_projector_type`; KeyError for an unknown one.
    """
    x = features_FPC
    for step, place in _PROJECTORS[kind]:
        weight, bias = weights.get(f"{place}.weight"), weights.get(f"{place}.bias")
        if step == "merge":
            x = merge_patches(x, place)
        elif step == "norm":
            x = F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-5)
        elif step == "gelu":
            x = F.gelu(x)
        else:
            x = F.linear(x, weight, bias)
    return x


class HuggingFaceModel:
    """The parts a folder holds; what it does not hold is None.

    Attributes:
        sizes: image_size, tokens_per_frame, vocab_size, max_positions of the parts there are.
        dtypes: floating types of the weights on disk.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False):
        """Read a folder in VILA's or LLaVA's layout, of a causal language model or a SigLIP tower alone, or of both without a projector.

        Raises:
            ValueError: the folder is none of these, or does not hold all weights of its configuration.
        """
        self.folder, self.allow_pickle = folder, allow_pickle
        self.dtypes: set[torch.dtype] = set()
        self.llava = self.language_model = self.tower = self.projector = self.normalize = None
        settings = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        kind = settings.get("model_type")
        if "llm_cfg" in settings:
            self._open_vila(settings)
        elif kind == "llava":
            self.select_layer = settings.get("vision_feature_layer", -2)
            self.llava = self._load("LlavaForConditionalGeneration", folder)
            self.language_model, self.tower = self.llava, self.llava.model.vision_tower
            self.projector = self.llava.model.multi_modal_projector
            self.normalize = self._image_processor(folder)
        elif kind in ("qwen2", "llama"):
            self.language_model = self._load("AutoModelForCausalLM", folder)
        elif kind in ("siglip", "siglip_vision_model"):
            self._open_tower(folder, -2)
        elif not settings and (folder / "llm").is_dir() and (folder / "vision_tower").is_dir():
            self.language_model = self._load("AutoModelForCausalLM", folder / "llm")
            self._open_tower(folder / "vision_tower", -2)
        else:
            raise ValueError(f"{folder} has model_type={kind!r}; known are llava, qwen2, llama, siglip and VILA's llm_cfg")
        self.sizes = self._sizes()

    def text_logits(self, ids_T: np.ndarray, positions_T: np.ndarray) -> Tensor:
        """[T, vocabulary]."""
        ids, positions = torch.from_numpy(ids_T)[None], torch.from_numpy(positions_T)[None]
        # With a mask, because without one transformers takes a jump of the positions for the start of another document.
        return self.language_model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0]

    def vision_features(self, frames_FSS3: Tensor) -> Tensor:
        """[F, P, C] of uint8 frames."""
        return self.tower(self.normalize(frames_FSS3), output_hidden_states=True).hidden_states[self.select_layer]

    def projector_output(self, frames_FSS3: Tensor) -> Tensor:
        """[F, V, D]."""
        if self.llava is not None:
            return torch.stack(list(self.llava.get_image_features(pixel_values=self.normalize(frames_FSS3)).pooler_output))
        return self.projector(self.vision_features(frames_FSS3))

    def multimodal_logits(self, frames_FSS3: Tensor, ids_T: np.ndarray) -> Tensor:
        """[T, vocabulary]; ids are PLACEHOLDER_ID at visual tokens."""
        ids = torch.from_numpy(ids_T)
        is_visual = ids == PLACEHOLDER_ID
        if self.llava is not None:
            ids = ids.masked_fill(is_visual, self.llava.config.image_token_id)[None]
            return self.llava(input_ids=ids, pixel_values=self.normalize(frames_FSS3), attention_mask=torch.ones_like(ids)).logits[0]
        embeddings = self.language_model.get_input_embeddings()(ids.clamp(min=0)).clone()
        embeddings[is_visual] = self.projector_output(frames_FSS3).flatten(0, 1)
        return self.language_model(inputs_embeds=embeddings[None]).logits[0]

    def rotary(self, positions_T: np.ndarray) -> Tensor:
        """Cosine and sine that queries and keys are turned with. [T, 2, H]."""
        decoder = self.llava.model.language_model if self.llava is not None else self.language_model.model
        cos, sin = decoder.rotary_emb(torch.zeros(1), torch.from_numpy(positions_T)[None])
        return torch.stack((cos[0], sin[0]), dim=1)

    def embedding_table(self) -> Tensor:
        """A row for each id."""
        return self.language_model.get_input_embeddings().weight

    def weights(self) -> list[Tensor]:
        """Every parameter once, tied ones too."""
        modules = [self.llava] if self.llava is not None else [self.language_model, self.tower, self.projector]
        found = [weight for module in modules if isinstance(module, torch.nn.Module) for weight in module.parameters()]
        return found + (list(self.projector.keywords["weights"].values()) if isinstance(self.projector, partial) else [])

    def _open_vila(self, settings: dict[str, Any]) -> None:
        places, described = {}, {}
        for part in PARTS:
            places[part], described[part] = part_folder(self.folder, part, settings.get(f"{part}_cfg"), [])
        self.language_model = self._load("AutoModelForCausalLM", places["llm"])
        self._open_tower(places["vision_tower"], settings.get("mm_vision_select_layer", -2))
        file = places["mm_projector"] / "config.json"
        kind = (read_json(file) if file.exists() else described["mm_projector"]).get("mm_projector_type")
        if kind not in _PROJECTORS:
            raise ValueError(f"{places['mm_projector']} has mm_projector_type={kind!r}; known are {', '.join(_PROJECTORS)}")
        weights = {name: tensor.float() for name, tensor in self._read_tensors(places["mm_projector"]).items()}
        names = {f"{place}.{end}" for step, place in _PROJECTORS[kind] if step in ("norm", "linear") for end in ("weight", "bias")}
        if names != weights.keys():
            raise ValueError(
                f"{places['mm_projector']}: missing {sorted(names - weights.keys())}, unexpected {sorted(weights.keys() - names)}"
            )
        self.projector = partial(project, weights=weights, kind=kind)

    def _open_tower(self, folder: Path, select_layer: int) -> None:
        self.select_layer = select_layer
        self.tower = self._load("SiglipVisionModel", folder)
        self.normalize = self._image_processor(folder)

    def _load(self, class_name: str, folder: Path) -> torch.nn.Module:
        """A transformers model in fp32. transformers itself only warns of missing weights and goes on with random ones."""
        transformers = import_transformers()
        self.dtypes |= stored_dtypes(folder, allow_pickle=self.allow_pickle)
        try:
            model, found = getattr(transformers, class_name).from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True,
                use_safetensors=None if self.allow_pickle else True,
            )  # fmt: skip
        except Exception as error:  # transformers raises many kinds for configurations and files that make no sense
            raise ValueError(f"{folder} cannot be loaded with transformers: {error}") from error
        missing = [name for name in found["missing_keys"] if not self._is_beyond_feature(name, model.config)]
        if missing or found["unexpected_keys"]:
            raise ValueError(
                f"{folder} does not hold what its config.json describes: missing {sorted(missing)}, "
                f"unexpected {sorted(found['unexpected_keys'])}"
            )
        return model.eval().requires_grad_(False)

    def _is_beyond_feature(self, name: str, config) -> bool:
        """Whether no feature depends on a tensor of this transformers model."""
        match = _BEYOND_FEATURE.match(name)
        if match is None or match[1] is None:
            return match is not None
        return int(match[1]) > getattr(config, "vision_config", config).num_hidden_layers + self.select_layer

    def _read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """All tensors of a folder that transformers has no class for."""
        self.dtypes |= stored_dtypes(folder, allow_pickle=self.allow_pickle)
        tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        for path in pickles_of(folder) if not tensors and self.allow_pickle else ():
            tensors |= read_pickle(path)
        if not tensors:
            raise ValueError(f"{folder} holds no *.safetensors; pickled weights are read with --allow-pickle only")
        return tensors

    def _image_processor(self, folder: Path):
        """uint8 [F, S, S, 3] to normalized fp32 [F, 3, S, S], by the preprocessor the folder brings or SigLIP's own numbers."""
        if not read_preprocessor(folder)[1]:
            return lambda frames_FSS3: ((frames_FSS3.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
        processor = import_transformers().AutoImageProcessor.from_pretrained(folder, local_files_only=True)

        def normalize(frames_FSS3: Tensor) -> Tensor:
            options = dict(return_tensors="pt", input_data_format="channels_last", do_resize=False)  # the inputs have the tower's size
            return processor(list(frames_FSS3.numpy()), **options)["pixel_values"]

        return normalize

    def _sizes(self) -> dict[str, int]:
        sizes = {}
        if self.tower is not None:
            vision = self.tower.config
            sizes["image_size"] = vision.image_size
            if self.projector is not None:
                kind = self.projector.keywords["kind"] if isinstance(self.projector, partial) else "mlp2x_gelu"
                side = next((place for step, place in _PROJECTORS[kind] if step == "merge"), 1)
                sizes["tokens_per_frame"] = (-(-(vision.image_size // vision.patch_size) // side)) ** 2
        if self.language_model is not None:
            text = self.language_model.config.get_text_config()
            sizes |= {"vocab_size": text.vocab_size, "max_positions": text.max_position_embeddings}
        return sizes


def import_transformers():
    """The module transformers; ValueError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("comparing with Hugging Face needs transformers: pip install 'megatron-longvila[hf]'") from error
    return transformers


def pickles_of(folder: Path) -> list[Path]:
    """*.bin files that transformers takes for weights."""
    return sorted(path for path in folder.glob("*.bin") if path.name != "training_args.bin")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a *.bin file by name, read with weights_only. ValueError if it is damaged or holds something else."""
    file = PickledFile(path)
    return {name: file.read(name) for name in file.infos}


def stored_dtypes(folder: Path, *, allow_pickle: bool = False) -> set[torch.dtype]:
    """Floating types in the headers of the *.safetensors files of a folder itself; without any, of *.bin files if they may be read.

    Raises:
        ValueError: a file is damaged.
    """
    files: list[SafetensorsFile | PickledFile] = [SafetensorsFile(path) for path in folder.glob("*.safetensors")]
    if allow_pickle and not files:
        files = [PickledFile(path) for path in pickles_of(folder)]
    return {info.dtype for file in files for info in file.infos.values() if info.dtype.is_floating_point}
