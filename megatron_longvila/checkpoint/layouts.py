"""Which Hugging Face layout a folder has, what model it holds, and which file has each tensor under which name.

Three layouts are read:

| layout | recognised by | holds |
| --- | --- | --- |
| vila | config.json with `llm_cfg` | llm/, vision_tower/, mm_projector/ (VILA, LongVILA) |
| parts | Qwen2 or Llama with a separate SigLIP, or a folder with llm/ and vision_tower/ and no config.json | no projector |
| llava | config.json of LlavaForConditionalGeneration | all in one |

Names inside this program are VILA's with the inner `vision_model.` (checkpoint/hf.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longvila.checkpoint.hf import inner_names
from megatron_longvila.checkpoint.hf_config import ARCHITECTURES, llava_text, read_llm, read_vision
from megatron_longvila.checkpoint.tensor_files import WEIGHT_SUFFIXES, TensorFolder, TensorInfo, read_json
from megatron_longvila.config import PROJECTORS, ModelConfig, ProjectorConfig

PARTS = ("llm", "vision_tower", "mm_projector")
_TARGETS = {"llm": "language_model.", "vision_tower": "vision_tower.", "mm_projector": "projector."}
# Prefixes on disk -> ours. transformers has written LLaVA both ways.
LLAVA_NAMES = {
    "flat": {
        "vision_tower.": "vision_tower.",
        "language_model.": "llm.",
        "multi_modal_projector.linear_1.": "mm_projector.layers.0.",
        "multi_modal_projector.linear_2.": "mm_projector.layers.2.",
    },
    "nested": {
        "model.vision_tower.": "vision_tower.",
        "model.language_model.": "llm.model.",
        "lm_head.": "llm.lm_head.",
        "model.multi_modal_projector.linear_1.": "mm_projector.layers.0.",
        "model.multi_modal_projector.linear_2.": "mm_projector.layers.2.",
    },
}
_LINEAR_OUT = ("mm_projector.layers.2.weight", "mm_projector.layers.2.bias")
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# What VILA puts around and does to visual tokens behind the projector. Ours is what these do: nothing, and a newline behind each frame.
_ENCODERS = {"image_encoder": "BasicImageEncoder", "video_encoder": "BasicVideoEncoder"}
_BICUBIC = 3
_SETTINGS_LIMIT = 256 << 20
_SETTINGS_FOLDERS = ("chat_templates", "additional_chat_templates")


@dataclass(frozen=True)
class Source:
    """A folder (or two) of Hugging Face weights that can be imported.

    Attributes:
        layout: vila, parts or llava.
        model: what it holds.
        infos: our name -> shape and dtype.
        places: our name -> (folder of weights, name in it).
        settings: path below `source/` of an imported checkpoint -> the file that travels there.
        spelling: how names are spelled on disk: `vision` inner or flat, for llava also `llava` flat or nested.
        notes: what the user should know.
    """

    layout: str
    model: ModelConfig
    infos: dict[str, TensorInfo]
    places: dict[str, tuple[TensorFolder, str]]
    settings: dict[str, Path]
    spelling: dict[str, str]
    notes: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        """One tensor by our name."""
        folder, spelled = self.places[name]
        return folder.read(spelled)


def open_source(path: Path, *, vision_tower: Path | None = None, projector: str | None = None, allow_pickle: bool = False) -> Source:
    """Recognise what `path` is and read all its configurations and headers.

    Args:
        vision_tower: the SigLIP that goes with a bare language model.
        projector: type of the projector that separate parts get (default mlp_downsample).
        allow_pickle: read .bin and .pt files.

    Raises:
        ValueError: nothing we know, or one of its files is missing, damaged or of another architecture.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give one with the model's config.json, or with llm/ and vision_tower/")
    raw = read_json(path / "config.json") if (path / "config.json").exists() else {}
    kind = recognise(path, raw)
    if kind != "parts" and (vision_tower is not None or projector is not None):
        raise ValueError(f"{path} is a whole model ({kind}); leave out --vision_tower and --projector, which are for separate parts")
    if kind == "vila":
        return _open_vila(path, raw, allow_pickle)
    if kind == "llava":
        return _open_llava(path, raw, allow_pickle)
    return _open_parts(path, raw, vision_tower, projector or "mlp_downsample", allow_pickle)


def recognise(path: Path, raw: Mapping[str, Any]) -> str:
    """The layout of a folder with configuration `raw` (empty if it has none). Raises ValueError for what is none of the three."""
    if "llm_cfg" in raw:
        return "vila"
    if raw.get("model_type") == "llava":
        return "llava"
    if raw.get("model_type") in ARCHITECTURES:
        return "parts"
    if raw:
        raise ValueError(
            f"{path / 'config.json'} has model_type={raw.get('model_type')!r} and architectures={raw.get('architectures')}; known are "
            f"VILA's layout (llm_cfg), llava, and {' or '.join(ARCHITECTURES)} with a SigLIP"
        )
    if (path / "metadata.json").exists() and (path / "config.yaml").exists():
        raise ValueError(f"{path} is a Megatron checkpoint already; load it with --checkpoint.load, or bring it out with export")
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path} is a PEFT adapter; merge it into its model first")
    if all((path / part / "config.json").exists() for part in PARTS[:2]) and not (path / "mm_projector").exists():
        return "parts"
    raise ValueError(f"{path} has no config.json; give a folder with one, or with llm/ and vision_tower/ that have one each")


def apply_prefixes(names: Iterable[str], prefixes: Mapping[str, str], where: Path) -> dict[str, str]:
    """Name with its prefix replaced -> name. Raises ValueError for names that no prefix, or more than one, matches."""
    found, lost = {}, []
    for name in names:
        matches = [prefix for prefix in prefixes if name.startswith(prefix)]
        if len(matches) == 1:
            found[prefixes[matches[0]] + name.removeprefix(matches[0])] = name
        else:
            lost.append(name)
    if lost:
        raise ValueError(f"{where}: {len(lost)} tensors of an unknown part: {sorted(lost)}; known prefixes are {sorted(prefixes)}")
    return found


def part_dtypes(infos: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """The dtypes of each part of a model, from its global names."""
    return {
        part: sorted({str(info.dtype).removeprefix("torch.") for name, info in infos.items() if name.startswith(prefix)})
        for part, prefix in _TARGETS.items()
    }


def _open_vila(path: Path, raw: Mapping[str, Any], allow_pickle: bool) -> Source:
    where, notes = path / "config.json", []
    folders, configs = {}, {}
    for part in PARTS:
        folders[part], described = part_folder(path, part, raw.get(f"{part}_cfg"), notes)
        file = folders[part] / "config.json"
        configs[part] = read_json(file) if file.exists() else described
        if not configs[part]:
            raise ValueError(f"{file} does not exist and {where} does not describe {part} either; download the folder again")
    vision = read_vision(configs["vision_tower"], str(folders["vision_tower"]), select_layer=raw.get("mm_vision_select_layer", -2))
    vision = replace(vision, preprocess=_preprocess(raw, where, notes))
    _note_encoders(raw, where, notes)
    if raw.get("s2") or raw.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ValueError(
            f"{where} has s2={raw.get('s2')} and mm_hidden_size={raw.get('mm_hidden_size')}, the tower has hidden_size="
            f"{vision.hidden_size}: features of several scales are not supported"
        )
    if raw.get("mm_vision_select_feature", "cls_patch") != "cls_patch":
        raise ValueError(
            f"{where} drops the first patch (mm_vision_select_feature={raw['mm_vision_select_feature']!r}); only cls_patch keeps all"
        )
    _check_preprocessor(folders["vision_tower"])
    model = ModelConfig(
        vision=vision,
        projector=ProjectorConfig(_projector_type(configs["mm_projector"].get("mm_projector_type"), folders["mm_projector"])),
        llm=read_llm(configs["llm"], str(folders["llm"] / "config.json")),
    )
    settings = _settings(path, "")
    for part, folder in folders.items():
        settings |= _settings(folder, part)
    return _source("vila", model, _open_folders(folders, allow_pickle), settings, {}, notes)


def _open_parts(path: Path, raw: Mapping[str, Any], vision_tower: Path | None, projector: str, allow_pickle: bool) -> Source:
    if raw and vision_tower is None:
        raise ValueError(f"{path} is a language model alone; give the SigLIP that goes with it with --vision_tower DIR")
    folders = {"llm": path, "vision_tower": vision_tower} if raw else {part: path / part for part in PARTS[:2]}
    if not raw and vision_tower is not None:
        raise ValueError(f"{path} has a vision_tower/ of its own; leave out --vision_tower, or give {path / 'llm'} as the input")
    configs = {part: read_json(folder / "config.json") for part, folder in folders.items()}
    where = {part: str(folder / "config.json") for part, folder in folders.items()}
    notes = ["the projector is freshly initialised"]
    _check_preprocessor(folders["vision_tower"])
    _note_resampling(folders["vision_tower"], notes)
    model = ModelConfig(
        vision=read_vision(configs["vision_tower"], where["vision_tower"]),
        projector=ProjectorConfig(_projector_type(projector, Path("--projector"))),
        llm=read_llm(configs["llm"], where["llm"]),
    )
    settings = {key: file for part, folder in folders.items() for key, file in _settings(folder, part).items()}
    return _source("parts", model, _open_folders(folders, allow_pickle), settings, {}, notes)


def _open_llava(path: Path, raw: Mapping[str, Any], allow_pickle: bool) -> Source:
    where = path / "config.json"
    strategy, layer = raw.get("vision_feature_select_strategy", "default"), raw.get("vision_feature_layer", -2)
    if strategy != "full":
        raise ValueError(f"{where} has vision_feature_select_strategy={strategy!r}, which drops the first patch; a SigLIP needs 'full'")
    if not isinstance(layer, int) or layer >= 0:
        raise ValueError(f"{where} has vision_feature_layer={layer}; it must be one negative number, -2 in LLaVA and VILA")
    if not raw.get("multimodal_projector_bias", True):
        raise ValueError(f"{where} has multimodal_projector_bias=false; our projectors have biases")
    activation = raw.get("projector_hidden_act", "gelu")
    if activation not in ("gelu", "linear"):
        raise ValueError(f"{where} has projector_hidden_act={activation!r}; known are gelu (mlp2x_gelu) and linear")
    parts = {key: raw.get(key) or {} for key in ("text_config", "vision_config")}
    if not all(isinstance(part, Mapping) for part in parts.values()):
        raise ValueError(f"{where} has a text_config or a vision_config that is no object; download it again")
    notes: list[str] = []
    _check_preprocessor(path)
    _note_resampling(path, notes)
    model = ModelConfig(
        vision=read_vision(parts["vision_config"], f"{where} (vision_config)", select_layer=layer),
        projector=ProjectorConfig("linear" if activation == "linear" else "mlp2x_gelu"),
        llm=read_llm(llava_text(raw), f"{where} (text_config)"),
    )
    folder = TensorFolder(path, allow_pickle=allow_pickle)
    spelling = "nested" if any(name.startswith("model.") for name in folder.infos) else "flat"
    places = {ours: (folder, name) for ours, name in apply_prefixes(folder.infos, LLAVA_NAMES[spelling], path).items()}
    if activation == "linear":
        places = _as_linear(places, path)
    return _source("llava", model, places, _settings(path, ""), {"llava": spelling}, notes)


def _as_linear(places: dict[str, tuple[TensorFolder, str]], path: Path) -> dict[str, tuple[TensorFolder, str]]:
    """A LLaVA projector of two linears without activation, the second of which must be the identity: our `linear`."""
    missing = [name for name in _LINEAR_OUT if name not in places]
    if missing:
        raise ValueError(f"{path} lacks the second linear of its projector: {missing}")
    weight, bias = (folder.read(name) for folder, name in map(places.pop, _LINEAR_OUT))
    if weight.shape[0] != weight.shape[-1] or not torch.equal(weight, torch.eye(weight.shape[0], dtype=weight.dtype)) or bias.any():
        raise ValueError(
            f"{path} has a projector of two linears without an activation, and the second is not the identity; merge them first"
        )
    return {name.replace("mm_projector.layers.0.", "mm_projector.layers."): place for name, place in places.items()}


def _source(layout: str, model: ModelConfig, places: dict, settings: dict[str, Path], spelling: dict[str, str], notes: list[str]) -> Source:
    names = inner_names(places)
    places = {inner: places[name] for inner, name in names.items()}
    is_flat = any(inner != name for inner, name in names.items())
    infos = {name: folder.infos[spelled] for name, (folder, spelled) in places.items()}
    return Source(layout, model, infos, places, settings, spelling | {"vision": "flat" if is_flat else "inner"}, tuple(notes))


def _open_folders(folders: Mapping[str, Path], allow_pickle: bool) -> dict[str, tuple[TensorFolder, str]]:
    places = {}
    for part, path in folders.items():
        folder = TensorFolder(path, allow_pickle=allow_pickle)
        places |= {f"{part}.{name}": (folder, name) for name in folder.infos}
    return places


def part_folder(path: Path, part: str, described: Any, notes: list[str]) -> tuple[Path, dict]:
    """(folder of a part, its configuration in the root's config.json, empty if it has none there).

    Args:
        described: `{part}_cfg` of the root: an object (or nothing) means the folder of that name, a string is a path.
        notes: gets a line for a path that does not exist any more.

    Raises:
        ValueError: there is no such folder, or `described` is something else.
    """
    if isinstance(described, str) and described:
        for folder in (path / described, Path(described)):
            if folder.is_dir():
                return folder, {}
        if not (path / part).is_dir():
            raise ValueError(f"{path / 'config.json'} has {part}_cfg={described!r}, and neither that folder nor {path / part} exists")
        notes.append(f"{part}_cfg={described!r} does not exist (an old path?); {part}/ beside config.json is used")
    elif described is not None and not isinstance(described, dict):
        raise ValueError(f"{path / 'config.json'} has {part}_cfg={described!r}; it must be an object or a path")
    if not (path / part).is_dir():
        raise ValueError(f"{path} has no {part}/, which VILA's layout needs; download the folder again")
    return path / part, described if isinstance(described, dict) else {}


def _projector_type(name: Any, where: Path) -> str:
    if name not in PROJECTORS:
        raise ValueError(f"{where}: projector type {name!r} is unknown; known are {', '.join(PROJECTORS)}")
    return name


def _preprocess(raw: Mapping[str, Any], where: Path, notes: list[str]) -> str:
    aspect = raw.get("image_aspect_ratio")
    if aspect == "dynamic":
        notes.append("image_aspect_ratio='dynamic' cuts images (not video frames) into tiles; here images are resized like frames")
    elif aspect not in (None, "resize", "pad"):
        raise ValueError(f"{where} has image_aspect_ratio={aspect!r}; known are resize, pad and dynamic")
    return "pad" if aspect == "pad" else "resize"


def _note_encoders(raw: Mapping[str, Any], where: Path, notes: list[str]) -> None:
    """A line for each of VILA's encoders that is not ours. Raises ValueError for one that nobody can read."""
    for key, basic in _ENCODERS.items():
        settings = raw.get(key) or {"_target_": basic}
        try:
            settings = json.loads(settings) if isinstance(settings, str) else settings
        except ValueError as error:
            raise ValueError(f"{where} has {key}={raw[key]!r}, which is no JSON: {error}") from None
        if not isinstance(settings, Mapping):
            raise ValueError(f"{where} has {key}={raw[key]!r}; it must be an object with a _target_")
        is_ours = str(settings.get("_target_")).endswith(basic) and settings.get("end_tokens", "\n") == "\n"
        if not is_ours or settings.get("start_tokens"):
            notes.append(f"{key}={dict(settings)} is not supported; here a frame is its visual tokens and a newline, as {basic} has it")


def read_preprocessor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of how a model wants its pixels, and its content ({} if there is none); transformers 5 puts it into the processor's."""
    own, shared = folder / PREPROCESSOR, folder / PROCESSOR
    if own.exists() or not shared.exists():
        return own, read_json(own) if own.exists() else {}
    return shared, read_json(shared).get("image_processor") or {}


def _check_preprocessor(folder: Path) -> None:
    """Our pixels are (x / 255 - 0.5) / 0.5 of an image resized as a whole. Raises ValueError for a preprocessor that makes others."""
    path, raw = read_preprocessor(folder)
    fine = {key: raw.get(key) in (None, 0.5, [0.5], [0.5] * 3) for key in ("image_mean", "image_std")}
    fine |= {key: raw.get(key) is not False for key in ("do_rescale", "do_normalize")}
    fine |= {"do_center_crop": not raw.get("do_center_crop"), "rescale_factor": raw.get("rescale_factor") in (None, 1 / 255)}
    wrong = {key: raw[key] for key, is_fine in fine.items() if not is_fine}
    if wrong:
        raise ValueError(f"{path} has {wrong}; our frames are resized whole and scaled by 1/255, with mean and deviation 0.5, as SigLIP's")


def _note_resampling(folder: Path, notes: list[str]) -> None:
    """A line for a preprocessor that resizes in another way than we do. VILA's code resizes as we do before it calls one."""
    path, raw = read_preprocessor(folder)
    if raw.get("resample") not in (None, _BICUBIC):
        notes.append(f"{path.name} has resample={raw['resample']}; here images and frames are resized with {_BICUBIC} (PIL's bicubic)")


def _settings(folder: Path, prefix: str) -> dict[str, Path]:
    """Files beside the weights: everything visible in the folder itself and in its folders of chat templates, but for weights."""
    found = {}
    files = [path for place in ("", *_SETTINGS_FOLDERS) if (folder / place).is_dir() for path in sorted((folder / place).iterdir())]
    for path in files:
        is_weight = path.suffix in WEIGHT_SUFFIXES or path.name.endswith((".safetensors.index.json", ".bin.index.json"))
        if path.is_file() and not path.name.startswith(".") and not is_weight and path.stat().st_size <= _SETTINGS_LIMIT:
            found[str(Path(prefix) / path.relative_to(folder))] = path
    return found
