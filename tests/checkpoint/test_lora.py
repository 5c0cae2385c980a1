"""Adapters out of a checkpoint: merged they give the same model, PEFT reads them, and a load takes the parts it names."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import ROOT, start
from test_oracle import random_state

from hf_modules import hf_modules
from megatron_longvila import config_io
from megatron_longvila.parallel.plan import IGNORE_INDEX
from oracle import BATCHES, build, rank_batch, run_batch, teardown, tiny_config
from ranks import RankError, run_ranks

ALL = ("vision", "projector", "llm", "lora")


def make_config(targets="qkvo", rank=4, trainable=("lora",), **overrides):
    lora = {"rank": rank, "alpha": 6.0, "targets": list(targets)} if rank else {}
    return tiny_config(lora=lora, training={"trainable": list(trainable)}, **overrides)


def _logits(model, groups) -> list[torch.Tensor]:
    """Of rows with and without frames [T, padded vocabulary], whole on every rank, on a mesh without cp."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    found = []
    for name in ("three_packed", "no_frame"):
        frames, ids, positions, _, plan = rank_batch(BATCHES[name][0], groups.mesh, groups.cp.rank(), 1)
        with torch.no_grad():
            local_T1V, _ = model.module.language_model.output_layer(model(frames, ids, positions, plan))
            found.append(gather_from_tensor_model_parallel_region(local_T1V, group=groups.tp)[:, 0])
    return found


def _save(rank, folder, config, state, sizes, passengers=None):
    from megatron_longvila.checkpoint.sharded import save_weights

    model, groups = build(config, sizes, state, trainable=ALL if config.model.lora.rank else ALL[:3])
    save_weights(folder, model.module, config, groups, passengers)
    return _logits(model, groups)


def _load(rank, folder, config, sizes, parts=("vision", "projector", "llm")):
    """Logits, and this rank's weights by name, of a model that was filled with ones before it loaded `parts`."""
    from megatron_longvila.checkpoint.sharded import load_weights
    from megatron_longvila.models.init import global_parameters

    model, groups = build(config, sizes, None, trainable=ALL if config.model.lora.rank else ALL[:3])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    load_weights(folder, model.module, groups, parts)
    return _logits(model, groups), {name: parameter.detach().clone() for name, parameter in global_parameters(model.module)}


def _merge(rank, folder, output):
    from megatron_longvila.checkpoint.lora import merge_lora

    return merge_lora(folder, output)


def close(left, right, tolerance) -> bool:
    """Largest difference in units of the largest value."""
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("targets", ["qkvo", "vo"])
def test_merged_equals_unmerged(targets, tmp_path):
    """Written on tp 2, merged by one process, read on one rank and on tp 2; everything but the adapted weights is bit-equal."""
    config, base = make_config(targets, trainable=["lora", "llm_norms"]), make_config(rank=0)
    state = random_state(config)
    source, output = tmp_path / "adapted", tmp_path / "merged"
    passengers = {"unused": torch.randn(5)}
    adapted = run_ranks(_save, 2, source, config, state, {"tp_size": 2}, passengers)[0]
    merged = run_ranks(_merge, 1, source, output)[0]
    num_adapted = 8  # the fused linear and the output of four layers
    assert (merged.written, merged.num_merged) == (True, num_adapted)
    assert merged.num_tensors == sum(".lora." not in name for name in state)

    logits, weights = run_ranks(_load, 1, output, base, {})[0]
    assert close(logits, adapted, 1e-5)
    changed = {name for name, weight in weights.items() if not torch.equal(weight, state[name])}
    prefixes = {name.split("lora.")[0] for name in state if ".lora." in name}
    assert changed == {f"{prefix}weight" for prefix in prefixes} and len(changed) == num_adapted
    assert close(run_ranks(_load, 2, output, base, {"tp_size": 2})[1][0], adapted, 1e-5)

    saved = config_io.load(output / "config.yaml")
    assert saved.model.lora.rank == 0 and saved.training.trainable == ["llm_norms"]
    assert (output / "passengers.safetensors").read_bytes() == (source / "passengers.safetensors").read_bytes()
    assert not run_ranks(_merge, 1, source, output)[0].written
    # Without its adapters the model is another one: the comparison above could fail.
    assert not close(run_ranks(_load, 1, source, config, {}, ["vision", "projector"])[0][0], adapted, 1e-2)


def test_the_sum_is_rounded_once():
    """bf16 weights: the product and the sum are fp32."""
    from megatron_longvila.checkpoint.hf import from_megatron, split_qkv
    from megatron_longvila.checkpoint.lora import adapted, merged_weight

    config = make_config()
    state = {name: tensor.to(torch.bfloat16) for name, tensor in random_state(config).items()}
    merged = {
        name: merged_weight(name, tensor, state.__getitem__, config) if adapted(name, config) else tensor for name, tensor in state.items()
    }
    assert sum(adapted(name, config) for name in state) == 2 * config.model.llm.num_layers
    attention = "language_model.decoder.layers.2.self_attention"
    for field, parts in (("linear_qkv", "qkv"), ("linear_proj", "o")):
        split = (lambda weight: split_qkv(weight, 4, 16)) if parts == "qkv" else lambda weight: (weight,)
        before, after = (split(states[f"{attention}.{field}.weight"]) for states in (state, merged))
        for part, old, new in zip(parts, before, after, strict=True):
            a, b = (state[f"{attention}.{field}.lora.{part}.{matrix}"].float() for matrix in "AB")
            assert torch.equal(new, (old.float() + 6.0 / 4 * (b @ a)).to(torch.bfloat16)), part
    with pytest.raises(ValueError, match="has adapters.*tools/merge_lora.py"):
        from_megatron(merged, {}, config)


def test_what_cannot_be_merged(tmp_path):
    from megatron_longvila.checkpoint.lora import merge_lora

    config = make_config()
    run_ranks(_save, 1, tmp_path / "a", config, random_state(config), {})
    base = make_config(rank=0)
    run_ranks(_save, 1, tmp_path / "base", base, random_state(base), {})
    for source, output, message in (
        ("a", "base", "exists and is not the merged"),
        ("base", "other", "has no adapters"),
        ("none", "other", "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_lora(tmp_path / source, tmp_path / output)


def _plain(weights: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, weight in weights.items() if (weight == 1).all()}


def test_loading_parts(tmp_path):
    """Parts that are not listed keep their values, on every pipeline stage; a base checkpoint leaves adapters as they are."""
    base, adapted = make_config(rank=0), make_config()
    state = random_state(base)
    run_ranks(_save, 1, tmp_path / "base", base, state, {})
    for parts, prefixes in ((["projector"], "projector."), (["llm", "vision"], ("language_model.", "vision_tower."))):
        weights = run_ranks(_load_pp2, 2, tmp_path / "base", adapted, parts)
        found = weights[0] | weights[1]
        assert _plain(found) == {name for name in found if ".lora." in name or not name.startswith(prefixes)}
        assert all(torch.equal(found[name], state[name]) for name in found.keys() - _plain(found))


def _load_pp2(rank, folder, config, parts):
    from megatron_longvila.checkpoint.sharded import load_weights
    from megatron_longvila.models.init import global_parameters

    model, groups = build(config, {"pp_size": 2}, None, trainable=ALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    load_weights(folder, model.module, groups, parts)
    return {name: parameter.detach().clone() for name, parameter in global_parameters(model.module)}


def test_adapters_are_never_lost(tmp_path):
    config = make_config()
    state = random_state(config)
    run_ranks(_save, 1, tmp_path / "a", config, state, {})
    _, weights = run_ranks(_load, 1, tmp_path / "a", config, {})[0]
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
    with pytest.raises(RankError, match=r"holds adapters of model.lora.rank=4, which .* would lose; merge first with tools/merge_lora.py"):
        run_ranks(_load, 1, tmp_path / "a", make_config(rank=0), {})
    run_ranks(_load, 1, tmp_path / "a", make_config(rank=0), {}, ["vision"])
    with pytest.raises(RankError, match=r"the model has LoraConfig\(rank=2.*merge first"):
        run_ranks(_load, 1, tmp_path / "a", make_config(rank=2), {})


@pytest.mark.parametrize("architecture, trainable", [("llama", ["lora"]), ("qwen2", ["lora", "llm_norms", "llm_embeddings"])])
def test_peft_reads_the_exported_adapter(architecture, trainable, tmp_path):
    """transformers' decoder with the base weights and PEFT's own loader gives our logits and the gradients of our adapters."""
    peft = pytest.importorskip("peft")
    from megatron_longvila.checkpoint.hf import from_megatron

    config = make_config(trainable=trainable, architecture=architecture)
    state, began_with = random_state(config), random_state(config, seed=1)
    ids = torch.from_numpy(BATCHES["no_frame"][0].input_ids)
    logits, loss, gradients = run_ranks(_export, 1, tmp_path, config, state)[0]

    # Weights that the run did not train are those it began with; the others must come out of the adapter.
    from megatron_longvila.training.optimizer import is_trainable

    base = {name: began_with[name] if is_trainable(name, trainable) else tensor for name, tensor in state.items() if ".lora." not in name}
    plain = replace(config, model=replace(config.model, lora=make_config(rank=0).model.lora))
    weights = {k.removeprefix("llm."): v for k, v in from_megatron(base, {}, plain).items() if k.startswith("llm.")}
    _, decoder = hf_modules(config)
    decoder.load_state_dict(weights)
    adapted = peft.PeftModel.from_pretrained(decoder, str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = adapted(input_ids=ids[None]).logits[0]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    check_peft_gradients(adapted, config, loss, gradients)
    with torch.no_grad(), adapted.disable_adapter():
        assert (logits - adapted(input_ids=ids[None]).logits[0]).abs().max() > 1e-2 * expected.abs().max()


def check_peft_gradients(adapted, config, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    """One backward of PEFT's model over a row: each adapter matrix has our gradient, to 1e-4 of its norm."""
    from megatron_longvila.checkpoint.hf import adapter_rules

    row = BATCHES["no_frame"][0]
    ids, labels = (torch.from_numpy(array) for array in (row.input_ids, row.labels))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    logits_TV = adapted(input_ids=ids[None]).logits[0]
    expected_loss = torch.nn.functional.cross_entropy(logits_TV, labels, ignore_index=IGNORE_INDEX)
    expected_loss.backward()
    assert abs(loss - expected_loss.item()) <= 1e-4 * loss
    theirs = {name.replace(".default.", "."): parameter.grad for name, parameter in adapted.named_parameters() if ".lora_" in name}
    ours = {rule.sources[0]: gradients[rule.target] for rule in adapter_rules(config)}
    assert ours.keys() == theirs.keys() and len(ours) == 32  # A and B of q, k, v and o in four layers
    for name, gradient in ours.items():
        assert theirs[name].norm() > 0 and (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def _export(rank, folder, config, state):
    from megatron_longvila.checkpoint.lora import export_peft
    from megatron_longvila.checkpoint.sharded import save_weights
    from megatron_longvila.models.init import global_parameters
    from megatron_longvila.models.lora import is_adapter

    model, groups = build(config, {}, state, trainable=ALL)
    save_weights(folder / "checkpoint", model.module, config, groups)
    names = export_peft(folder / "checkpoint", folder / "adapter")
    assert names[0].startswith("base_model.model.") and sum("lora_A" in name for name in names) == 16
    with pytest.raises(ValueError, match="exists"):
        export_peft(folder / "checkpoint", folder / "adapter")
    frames, ids, positions, _, plan = rank_batch(BATCHES["no_frame"][0], groups.mesh, 0, 1)
    with torch.no_grad():
        hidden = model(frames, ids, positions, plan)
        logits = model.module.language_model.output_layer(hidden)[0][:, 0, : config.model.llm.vocab_size]
    loss, _ = run_batch(model, BATCHES["no_frame"][:1], config, groups)
    # The schedule has divided them by the labelled tokens, as the mean of the loss does.
    gradients = {name: parameter.main_grad.clone() for name, parameter in global_parameters(model.module) if is_adapter(name)}
    teardown()
    return logits, loss, gradients


@pytest.mark.end_to_end
def test_the_tool(tmp_path):
    config = make_config()
    run_ranks(_save, 2, tmp_path / "a", config, random_state(config), {"tp_size": 2})
    tool = [sys.executable, ROOT / "tools" / "merge_lora.py", "--checkpoint", tmp_path / "a"]
    code, text = start(*tool, "--output", tmp_path / "merged", "--peft_output", tmp_path / "adapter")
    assert code == 0 and "merged the adapters into 8 of" in text and "exported 32 tensors" in text, text
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert config_io.load(Path(tmp_path / "merged" / "config.yaml")).model.lora.rank == 0
    code, text = start(*tool, "--output", tmp_path / "a")
    assert code == 1 and text.strip().startswith("error: --output") and len(text.strip().splitlines()) == 1, text
