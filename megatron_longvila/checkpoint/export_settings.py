"""The files of an export that are no weights: configurations, tokenizer, chat template, generation and preprocessor settings.

What an import brought along is copied; in its configurations only those keys change that say something else than the checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_longvila.checkpoint.hf_config import (
    ARCHITECTURES,
    llava_text,
    update_llm,
    update_vision,
    with_old_rope,
    write_llm,
    write_vision,
)
from megatron_longvila.checkpoint.layouts import PARTS, PREPROCESSOR, PROCESSOR, part_dtypes, read_preprocessor
from megatron_longvila.checkpoint.origin import SOURCE, TOKENS
from megatron_longvila.checkpoint.sharded import read_progress
from megatron_longvila.checkpoint.tensor_files import read_json, write_json

if TYPE_CHECKING:
    from megatron_longvila.checkpoint.exporting import ExportJob

Raw = dict[str, Any]

_LLAVA_ONLY = ("config.json", PREPROCESSOR, PROCESSOR, "README.md")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*")
_IMAGE = "<image>"


def write(job: ExportJob, folder: Path) -> list[str]:
    """Write everything but the weights into the new `folder`; returns what the user should know.

    Raises:
        ValueError: the llava format finds no id for its images.
    """
    return {"vila": _write_vila, "llava": _write_llava, "llm": _write_llm}[job.options.format](job, folder)


def _write_vila(job: ExportJob, folder: Path) -> list[str]:
    layout, source = job.imported.get("layout"), job.options.input / SOURCE
    before: dict[str, Raw | None] = {"llm": _raw_llm(job), "vision_tower": _raw_vision(job)}
    after = {"llm": _llm(job), "vision_tower": _vision(job)}
    if layout == "vila":
        _copy(source, folder)
        raw = read_json(source / "config.json")
        root = dict(raw)
        for part in after:
            if root.get(f"{part}_cfg") and isinstance(root[f"{part}_cfg"], dict):
                root[f"{part}_cfg"] = root[f"{part}_cfg"] | _changes(before[part], after[part])
        if (raw.get("image_aspect_ratio") == "pad") != (job.config.model.vision.preprocess == "pad"):
            root["image_aspect_ratio"] = job.config.model.vision.preprocess
        if "model_dtype" in root and _is_other_dtype(job, "llm"):
            root["model_dtype"] = f"torch.{_dtype(job, 'llm')}"
        after = {part: content for part, content in after.items() if (folder / part / "config.json").exists()}
    else:
        if layout == "parts":
            _copy(source, folder)
        else:
            _copy_tokenizer(job, folder / "llm")
        kind = {"architectures": ["MultimodalProjector"], "mm_projector_type": job.config.model.projector.type}
        after["mm_projector"] = kind | {"model_type": "v2l_projector"}
        raw, root = {}, _vila_root(job) | {f"{part}_cfg": after[part] for part in PARTS}
    for part, content in after.items():
        _write_if_other(folder / part / "config.json", before.get(part), content)
    _write_if_other(folder / "config.json", raw, root)
    _write_preprocessor(job, folder / "vision_tower")
    return _notes_on_files(job)


def _write_llava(job: ExportJob, folder: Path) -> list[str]:
    layout, source, model = job.imported.get("layout"), job.options.input / SOURCE, job.config.model
    if layout == "llava":
        _copy(source, folder)
    else:
        _copy_tokenizer(job, folder)
    llm, vision, notes = _llm(job), _vision(job), _notes_on_files(job)
    if layout == "llava":
        before = read_json(source / "config.json")
        after = before | {"text_config": before.get("text_config", {}) | _changes(_raw_llm(job) or {}, llm)}
        after["vision_config"] = before.get("vision_config", {}) | _changes(_raw_vision(job) or {}, vision)
        _set_dtype(after, job, "llm")
        if job.options.image_token_id >= 0:
            after[_image_key(before)] = token = _image_token(job, folder)
            if (folder / PROCESSOR).exists():
                write_json(folder / PROCESSOR, read_json(folder / PROCESSOR) | {"image_token": _image_text(folder, token, notes)})
    else:
        before, token = {}, _image_token(job, folder)
        after = {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": token,
            "image_seq_length": model.tokens_per_frame, "multimodal_projector_bias": True,
            "projector_hidden_act": "linear" if model.projector.type == "linear" else "gelu", "text_config": llm,
            "vision_config": vision.get("vision_config", vision) | {"model_type": "siglip_vision_model"},
            "vision_feature_layer": model.vision.select_layer, "vision_feature_select_strategy": "full",
            "tie_word_embeddings": model.llm.tie_embeddings, "torch_dtype": _dtype(job, "llm"),
        }  # fmt: skip
        processor = {
            "image_token": _image_text(folder, token, notes), "num_additional_image_tokens": 0, "patch_size": model.vision.patch_size,
            "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "full",
        }  # fmt: skip
        write_json(folder / PROCESSOR, processor)
    _write_if_other(folder / "config.json", before, after)
    _write_preprocessor(job, folder)
    if model.vision.preprocess == "pad":
        notes.append("in training images were padded to squares (model.vision.preprocess=pad), which transformers does not: pad them first")
    tokens = job.options.input / TOKENS
    if tokens.exists() and read_progress(job.options.input)["step"] and read_json(tokens)["newline_ids"]:
        notes.append("in training a newline followed each frame and each image, which LLaVA does not add: write '<image>\\n' in prompts")
    return notes


def _write_llm(job: ExportJob, folder: Path) -> list[str]:
    layout, source = job.imported.get("layout"), job.options.input / SOURCE
    if layout in ("vila", "parts"):
        _copy(source / "llm", folder)
    else:
        _copy_tokenizer(job, folder)
    before = _raw_llm(job) if (folder / "config.json").exists() else {}
    _write_if_other(folder / "config.json", before or {}, _llm(job))
    return _notes_on_files(job)


def _raw_llm(job: ExportJob) -> Raw | None:
    """The decoder's configuration as it was imported."""
    source = job.options.input / SOURCE
    if job.imported.get("layout") == "llava":
        return llava_text(read_json(source / "config.json"))
    return _raw_part(job, "llm")


def _raw_vision(job: ExportJob) -> Raw | None:
    if job.imported.get("layout") == "llava":
        return read_json(job.options.input / SOURCE / "config.json").get("vision_config", {})
    return _raw_part(job, "vision_tower")


def _raw_part(job: ExportJob, part: str) -> Raw | None:
    source = job.options.input / SOURCE
    if (source / part / "config.json").exists():
        return read_json(source / part / "config.json")
    return read_json(source / "config.json").get(f"{part}_cfg") if (source / "config.json").exists() else None


def _llm(job: ExportJob) -> Raw:
    """The decoder's configuration as it is now."""
    raw, llm = _raw_llm(job), job.config.model.llm
    now = write_llm(llm) if raw is None else update_llm(raw, llm)
    if job.imported.get("layout") == "llava" and job.options.format != "llava":
        now = {"architectures": [ARCHITECTURES[llm.architecture]]} | with_old_rope(now, llm)
    _set_dtype(now, job, "llm", is_root=job.options.format != "llava")
    return now


def _vision(job: ExportJob) -> Raw:
    raw = _raw_vision(job)
    now = write_vision(job.config.model.vision) if raw is None else update_vision(raw, job.config.model.vision)
    if job.imported.get("layout") == "llava" and job.options.format != "llava":
        now = {"architectures": ["SiglipVisionModel"]} | now
    _set_dtype(now, job, "vision_tower", is_root=job.options.format != "llava")
    return now


def _set_dtype(raw: Raw, job: ExportJob, part: str, *, is_root: bool = True) -> None:
    """Say the dtype of the weights, unless it is what was imported: then the configuration said what it said. Where one configuration is
    inside another, only keys that are there change."""
    if _is_other_dtype(job, part):
        keys = [key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"] * is_root
        raw.update(dict.fromkeys(keys, _dtype(job, part)))


def _is_other_dtype(job: ExportJob, part: str) -> bool:
    return part_dtypes(job.tensors.infos)[part] != job.imported.get("dtypes", {}).get(part)


def _dtype(job: ExportJob, part: str) -> str:
    found = part_dtypes(job.tensors.infos)[part]
    return found[0] if len(found) == 1 else "float32"


def _vila_root(job: ExportJob) -> Raw:
    """A root configuration with the keys that VILA's public code reads."""
    model, video = job.config.model, job.config.data.video
    encoder = {"start_tokens": None, "end_tokens": "\n"}
    return {
        "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama", "hidden_size": model.llm.hidden_size,
        "mm_hidden_size": model.vision.hidden_size, "mm_vision_select_layer": model.vision.select_layer,
        "mm_vision_select_feature": "cls_patch", "image_aspect_ratio": model.vision.preprocess, "num_video_frames": video.num_frames,
        "fps": video.fps if video.frame_rule != "uniform" else 0.0, "resume_path": None, "chat_template": None,
        "image_encoder": json.dumps({"_target_": "llava.model.encoders.BasicImageEncoder"} | encoder),
        "video_encoder": json.dumps({"_target_": "llava.model.encoders.BasicVideoEncoder"} | encoder),
        "model_dtype": f"torch.{_dtype(job, 'llm')}",
    }  # fmt: skip


def _image_token(job: ExportJob, folder: Path) -> int:
    """The id that stands for an image: it must have a row in the embedding, which LLaVA looks up before it puts the image there."""
    token, rows = job.options.image_token_id, job.infos["llm.model.embed_tokens.weight"].shape[0]
    if token < 0 and (folder / "tokenizer.json").exists():
        added = read_json(folder / "tokenizer.json").get("added_tokens", [])
        token = next((entry["id"] for entry in added if entry["content"] == _IMAGE), -1)
    if not 0 <= token < rows:
        raise ValueError(
            f"LLaVA needs an id below {rows} (rows of the embedding) that stands for an image; found "
            f"{token if token >= 0 else f'no {_IMAGE} in the tokenizer'}: say which with --image_token_id N, one that no text gives"
        )
    return token


def _image_text(folder: Path, token: int, notes: list[str]) -> str:
    """How a prompt says the id that stands for an image; `notes` gets a line if no prompt can."""
    path = folder / "tokenizer.json"
    added = read_json(path).get("added_tokens", []) if path.exists() else []
    text = next((entry["content"] for entry in added if entry["id"] == token), None)
    if text is None:
        notes.append(f"the tokenizer has no special token with an image's id {token}: transformers' processor cannot make it from a prompt")
    return text or _IMAGE


def _image_key(raw: Mapping[str, Any]) -> str:
    return "image_token_id" if "image_token_id" in raw else "image_token_index"


def _write_preprocessor(job: ExportJob, folder: Path) -> None:
    """The source's, or SigLIP's with our size."""
    layout, source = job.imported.get("layout"), job.options.input / SOURCE
    before, raw = read_preprocessor(source / ("" if layout == "llava" else "vision_tower"))
    if before.name == PREPROCESSOR and before.exists():
        shutil.copyfile(before, folder / PREPROCESSOR)
    elif raw and layout != job.options.format:
        write_json(folder / PREPROCESSOR, raw)
    elif layout is None or layout != job.options.format and job.options.format == "llava":
        size = job.config.model.vision.image_size
        write_json(
            folder / PREPROCESSOR,
            {
                "image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": {"height": size, "width": size}, "resample": 3,
                "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            },
        )  # fmt: skip


def _copy(source: Path, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copy files and the folders in them."""
    if not source.is_dir():
        return
    for path in sorted(source.rglob("*")):
        name = str(path.relative_to(source))
        if path.is_file() and wanted(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def _copy_tokenizer(job: ExportJob, folder: Path) -> None:
    """Everything beside the decoder but its configuration; without an import, the tokenizer that the run used."""
    layout, source = job.imported.get("layout"), job.options.input / SOURCE
    folder.mkdir(exist_ok=True)
    if layout == "llava":
        _copy(source, folder, lambda name: name not in _LLAVA_ONLY)
    elif layout is not None:
        _copy(source / "llm", folder, lambda name: name not in ("config.json", "README.md"))
    else:
        path = Path(job.config.data.tokenizer)
        for file in [path] if path.is_file() else [file for pattern in _TOKENIZER_FILES for file in sorted(path.glob(pattern))]:
            if file.is_file():
                shutil.copyfile(file, folder / ("tokenizer.model" if path.is_file() else file.name))


def _write_if_other(path: Path, before: Raw | None, after: Raw) -> None:
    """Write a configuration unless the file that was copied, `before`, says it already."""
    if not path.exists() or before != after:
        path.parent.mkdir(exist_ok=True)
        write_json(path, after)


def _changes(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Raw:
    return {key: value for key, value in after.items() if key not in (before or {}) or before[key] != value}


def _notes_on_files(job: ExportJob) -> list[str]:
    if job.imported or job.config.data.tokenizer and Path(job.config.data.tokenizer).exists():
        return []
    return [f"no tokenizer was written: data.tokenizer={job.config.data.tokenizer!r} does not exist; copy one into the output"]
