"""The one-rank run equals a composition of transformers' own SigLIP and Qwen2 or Llama with the projector's formula, sample by sample.

Nothing of ours is on the other side but the name map: no packing, no plan, no Megatron layer.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_oracle import random_state

from hf_modules import hf_modules
from megatron_longvila.evaluation.hf_reference import project
from oracle import BATCHES, TOKENS_PER_FRAME, build, run_batch, tiny_config
from ranks import run_ranks


def composed_loss(row, tower, language_model, projector_weights) -> tuple[torch.Tensor, int]:
    """Sum of token losses of a row, each sample on its own."""
    pixels = (torch.from_numpy(row.frames_FHWC).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    visual = torch.zeros(0, TOKENS_PER_FRAME, language_model.config.hidden_size)
    if len(pixels):
        visual = project(tower(pixels, output_hidden_states=True).hidden_states[-2], projector_weights)
    total, count, start, frame = torch.zeros(()), 0, 0, 0
    for length in row.spec.sample_lengths:
        ids = torch.from_numpy(row.input_ids[start : start + length])
        labels = torch.from_numpy(row.labels[start : start + length])
        is_visual = ids < 0
        frames_here = int(is_visual.sum()) // TOKENS_PER_FRAME
        embeddings = language_model.get_input_embeddings()(ids.clamp(min=0)).clone()
        embeddings[is_visual] = visual[frame : frame + frames_here].flatten(0, 1)
        logits = language_model(inputs_embeds=embeddings[None]).logits[0].float()
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
        start, frame = start + length, frame + frames_here
    return total, count


def _one_rank(rank, config, state):
    model, groups = build(config, {}, state)
    results = {}
    for name, batch in BATCHES.items():
        loss, count = run_batch(model, batch, config, groups)
        results[name] = loss, count, {n.removeprefix("module."): p.main_grad.clone() for n, p in model.named_parameters()}
    return results


@pytest.mark.parametrize("architecture, tied", [("qwen2", False), ("qwen2", True), ("llama", False)])
def test_one_rank_equals_transformers(architecture, tied):
    from megatron_longvila.checkpoint.hf import from_megatron

    config = tiny_config(architecture, tied)
    state = random_state(config)
    results = run_ranks(_one_rank, 1, config, state)[0]

    hf_state = from_megatron(state, {}, config)
    prefixes = ("llm.", "vision_tower.", "mm_projector.")
    parts = {prefix: {k.removeprefix(prefix): v for k, v in hf_state.items() if k.startswith(prefix)} for prefix in prefixes}
    tower, language_model = hf_modules(config)
    wants_prefix = any(name.startswith("vision_model.") for name in tower.state_dict())
    vision_state = {(k if wants_prefix else k.removeprefix("vision_model.")): v for k, v in parts["vision_tower."].items()}
    # The last layer and the post norm of the published tower do not reach the loss; only these may be absent here.
    missing, unexpected = tower.load_state_dict(vision_state, strict=False)
    assert not unexpected and all(f"layers.{config.model.vision.num_layers - 1}." in name or "post_layernorm" in name for name in missing)
    missing, unexpected = language_model.load_state_dict(parts["llm."], strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    language_model.tie_weights()
    projector = {name: weight.clone().requires_grad_() for name, weight in parts["mm_projector."].items()}

    for name, batch in BATCHES.items():
        loss, count, grads = results[name]
        for module in (tower, language_model):
            module.zero_grad(set_to_none=True)
        for weight in projector.values():
            weight.grad = None
        sums = [composed_loss(row, tower, language_model, projector) for row in batch]
        expected_count = sum(row_count for _, row_count in sums)
        expected_loss = sum(total for total, _ in sums) / expected_count
        expected_loss.backward()
        assert count == expected_count, name
        assert abs(loss - expected_loss.item()) <= 1e-5 * abs(expected_loss.item()), (name, loss, expected_loss.item())

        expected = {f"llm.{k}": p.grad for k, p in language_model.named_parameters()}
        expected |= {f"vision_tower.{k if wants_prefix else 'vision_model.' + k}": p.grad for k, p in tower.named_parameters()}
        expected |= {f"mm_projector.{k}": weight.grad for k, weight in projector.items()}
        ours = from_megatron(grads, {}, config)
        scale = torch.stack([grad.norm() for grad in expected.values() if grad is not None]).norm()
        wrong = []
        for key, grad in ours.items():
            want = expected[key] if expected[key] is not None else torch.zeros_like(grad)
            error = (grad - want).norm()
            if error > 1e-4 * want.norm() + 1e-6 * scale:
                wrong.append(f"{key}: {error:.2e} of {want.norm():.2e}")
        assert not wrong, (name, wrong)
        reached = {key for key, grad in expected.items() if grad is not None and grad.abs().max() > 0}
        assert reached <= set(ours), (name, reached - set(ours))
