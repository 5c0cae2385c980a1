"""Adapters out of a checkpoint that began with imported weights: merged on the way out, alone, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import read_json, save_vila, transformers
from imported import export_folder, import_folder
from programs import ROOT, load_script
from safetensors.torch import load_file

from ranks import run_ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """source, imported, adapted (with adapters that are not zero), merged, and their exports."""
    root = tmp_path_factory.mktemp("adapters")
    save_vila(root / "source")
    run_ranks(_make, 1, root)
    return root


def _make(rank: int, root: Path) -> None:
    from tiny_model import build

    from megatron_longvila import config_io
    from megatron_longvila.checkpoint.lora import export_peft, merge_lora
    from megatron_longvila.checkpoint.origin import copy_travellers
    from megatron_longvila.checkpoint.sharded import load_weights, mark_complete, save_weights
    from megatron_longvila.config import LoraConfig
    from megatron_longvila.models.lora import is_adapter

    import_folder(root / "source", root / "imported")
    config = config_io.load(root / "imported" / "config.yaml")
    config = replace(config, model=replace(config.model, lora=LoraConfig(4, 6.0, ["q", "v", "o"])))
    config = replace(config, training=replace(config.training, trainable=["lora"]))
    model, groups = build(config, 1)
    load_weights(root / "imported", model, groups)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.2)
    save_weights(root / "adapted", model, config, groups)
    copy_travellers(root / "imported", root / "adapted")
    (root / "adapted" / "complete.json").unlink()
    mark_complete(root / "adapted")
    merge_lora(root / "adapted", root / "merged")
    export_folder(root / "adapted", root / "merged_on_export", "vila", merge_lora=True)
    export_folder(root / "merged", root / "merged_before", "vila")
    export_peft(root / "adapted", root / "peft")


def test_merged_on_export_is_merged_before_it(folders):
    changed = 0
    for part in ("llm", "vision_tower", "mm_projector"):
        one, other, source = (
            load_file(folders / name / part / "model.safetensors") for name in ("merged_on_export", "merged_before", "source")
        )
        assert one.keys() == other.keys() == source.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        changed += sum(not torch.equal(one[name], source[name]) for name in one)
    assert changed == 3 * 3  # q, v and o of three layers
    assert read_json(folders / "merged_on_export" / "config.json") == read_json(folders / "source" / "config.json")
    assert (folders / "merged_before" / "llm" / "tokenizer.json").read_bytes() == (folders / "source/llm/tokenizer.json").read_bytes()


def test_peft_loads_the_adapter_on_the_imported_decoder(folders):
    import peft

    decoder, merged = (transformers.AutoModelForCausalLM.from_pretrained(folders / name / "llm") for name in ("source", "merged_on_export"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted, base = merged(ids).logits, decoder(ids).logits
        found = peft.PeftModel.from_pretrained(decoder, folders / "peft")(ids).logits
    assert (found - wanted).abs().max() <= 1e-4 < (base - wanted).abs().max()


def test_adapters_are_not_lost_in_silence(folders, tmp_path):
    from megatron_longvila.checkpoint.exporting import ExportOptions, plan

    with pytest.raises(ValueError, match="has adapters .*give --merge-lora .*--format peft"):
        plan(ExportOptions(folders / "adapted", tmp_path / "out", "vila"))
    with pytest.raises(ValueError, match="has no adapters to merge"):
        plan(ExportOptions(folders / "imported", tmp_path / "out", "vila", merge_lora=True))
    with pytest.raises(ValueError, match="model.projector.type=mlp_downsample merges 2 x 2 patches, and LLaVA .*use --format vila"):
        plan(ExportOptions(folders / "imported", tmp_path / "out", "llava"))


def test_what_trained_beside_the_adapters_is_named(folders, tmp_path, capsys):
    """With a dry run: an adapter of the decoder cannot hold the projector, and would lose it without a word."""
    import shutil

    from megatron_longvila import config_io
    from megatron_longvila.checkpoint.sharded import mark_complete

    tool, folder = load_script(ROOT / "tools" / "convert_checkpoint.py"), tmp_path / "adapted"
    words = ["export", str(folder), str(tmp_path / "peft"), "--format", "peft", "--dry_run"]
    shutil.copytree(folders / "adapted", folder)
    assert tool.main(words) == 0 and "note" not in capsys.readouterr().err
    config = config_io.load(folder / "config.yaml")
    config_io.save(replace(config, training=replace(config.training, trainable=["projector", "lora"])), folder / "config.yaml")
    (folder / "complete.json").unlink()
    mark_complete(folder)
    assert tool.main(words) == 0 and "note: the run trained projector too, which this adapter does not hold" in capsys.readouterr().err
