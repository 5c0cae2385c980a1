"""Decoders equal transformers' with rotary scaling and packed samples; stages of uneven pipelines hold the right layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_longvila.config import Config, RopeScaling
from oracle import tiny_config
from ranks import run_ranks

transformers = pytest.importorskip("transformers")

LENGTHS = (9, 5)
SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", factor=4.0),
    "llama3": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=64),
    "yarn": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=64),
    "dynamic": RopeScaling("dynamic", factor=4.0, original_max_position_embeddings=6),  # between the two lengths
}


def make_config(architecture: str, tied: bool = False, scaling: str = "none", **overrides) -> Config:
    config = tiny_config(architecture, tied, **overrides)
    return replace(config, model=replace(config.model, llm=replace(config.model.llm, rope_scaling=SCALINGS[scaling])))


def random_llm_state(config: Config) -> dict[str, torch.Tensor]:
    from megatron_longvila.checkpoint.hf import full_shapes

    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, shape in full_shapes(config).items() if name.startswith("language_model.")}
    return {name: ("norm" in name) + 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def token_ids() -> torch.Tensor:
    return torch.randint(0, 120, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def make_llm(config: Config, **sizes: int):
    """(module with this stage's language model, groups)."""
    from megatron_longvila import platform
    from megatron_longvila.mesh import Mesh
    from megatron_longvila.models.llm import LanguageModel
    from megatron_longvila.models.transformer_config import transformer_config
    from megatron_longvila.parallel.groups import initialize_groups

    mesh = Mesh(dist.get_world_size(), **{"tp_size": 1, "pp_size": 1, "ulysses_size": 1, "ring_size": 1} | sizes)
    groups = initialize_groups(mesh, timeout_s=60)
    platform.seed(0, groups.pp.rank())
    model = LanguageModel(config, groups, transformer_config(config, groups))
    return torch.nn.ModuleDict({"language_model": model}), groups


def logits_and_gradients(rank: int, config: Config, state: dict):
    """Logits of two packed samples on one rank, and the gradients of the sum of their squares."""
    from megatron_longvila.attention.core_attention import SequenceParams
    from megatron_longvila.checkpoint.hf import load_full_state
    from megatron_longvila.models.init import global_parameters
    from megatron_longvila.parallel.plan import SequenceLayout

    module, groups = make_llm(config)
    load_full_state(module, state, config, groups)
    model = module["language_model"]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    layout = SequenceLayout(ring_size=1, ulysses_size=1, sample_lengths=LENGTHS)
    hidden_T1D = model(model.embedding(token_ids()[None], None), positions, SequenceParams(layout=layout))
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits_TV = model.output_layer(hidden_T1D, weight=weight)[0][:, 0, : config.model.llm.vocab_size]
    logits_TV.square().sum().backward()
    return logits_TV.detach(), {name: p.grad for name, p in global_parameters(module)}


def hf_llm(config: Config):
    llm, scaling = config.model.llm, config.model.llm.rope_scaling
    rope = {"rope_type": "default", "rope_theta": llm.rotary_base}
    if scaling is not None:
        rope |= {"rope_type": scaling.type, "factor": scaling.factor}
    max_positions = llm.max_position_embeddings
    if scaling is not None and scaling.type in ("llama3", "yarn"):
        rope |= {"original_max_position_embeddings": 64}
    if scaling is not None and scaling.type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if scaling is not None and scaling.type == "dynamic":  # there it scales beyond max_position_embeddings
        max_positions = scaling.original_max_position_embeddings
    config_class, model_class = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[llm.architecture]
    return model_class(
        config_class(
            hidden_size=llm.hidden_size, intermediate_size=llm.ffn_hidden_size, num_hidden_layers=llm.num_layers,
            num_attention_heads=llm.num_attention_heads, num_key_value_heads=llm.num_query_groups, head_dim=llm.head_dim,
            vocab_size=llm.vocab_size, max_position_embeddings=max_positions, rms_norm_eps=llm.norm_epsilon,
            rope_parameters=rope, tie_word_embeddings=llm.tie_embeddings, attn_implementation="eager",
        )
    ).float()  # fmt: skip


@pytest.mark.parametrize(
    "architecture, tied, scaling",
    [
        ("qwen2", False, "none"),
        ("qwen2", True, "linear"),
        ("llama", False, "llama3"),
        ("llama", True, "none"),
        ("qwen2", False, "yarn"),
        ("llama", True, "dynamic"),
    ],
)
def test_logits_and_gradients_equal_transformers(architecture, tied, scaling):
    from megatron_longvila.checkpoint.hf import rules

    config = make_config(architecture, tied, scaling)
    state = random_llm_state(config)
    logits, grads = run_ranks(logits_and_gradients, 1, config, state)[0]
    model = hf_llm(config)
    parameters = {f"llm.{name}": parameter for name, parameter in model.named_parameters()}
    llm_rules = [rule for rule in rules(config) if rule.target in state]
    assert {source for rule in llm_rules for source in rule.sources} == set(parameters)
    for rule in llm_rules:
        for source, tensor in zip(rule.sources, rule.split(state[rule.target]), strict=True):
            parameters[source].data.copy_(tensor)
    # One padded batch, not sample by sample: dynamic scaling goes by the longest sample of a batch.
    batch = torch.nn.utils.rnn.pad_sequence(token_ids().split(LENGTHS), batch_first=True)
    expected = torch.cat([logits[:length] for logits, length in zip(model(batch).logits, LENGTHS, strict=True)])
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    expected.square().sum().backward()
    for rule in llm_rules:
        expected_grad = rule.merge(*(parameters[source].grad for source in rule.sources))
        assert (grads[rule.target] - expected_grad).norm() <= 1e-4 * expected_grad.norm(), rule.target


def _hidden_rows(rank: int, config: Config, state: dict):
    """Unpadded row numbers of this ring rank, and their hidden states."""
    from megatron_longvila.attention.core_attention import SequenceParams
    from megatron_longvila.checkpoint.hf import load_full_state
    from megatron_longvila.parallel.plan import RowSpec, plan_row

    ring_size = dist.get_world_size()
    module, groups = make_llm(config, ring_size=ring_size)
    load_full_state(module, state, config, groups)
    model, plan = module["language_model"], plan_row(RowSpec(LENGTHS, (), 4), ulysses_size=1, ring_size=ring_size)[rank]
    ids_T = token_ids()[torch.from_numpy(plan.row_source_T)]  # padding rows take some id, as in training
    hidden_T1D = model(model.embedding(ids_T[None], None), torch.from_numpy(plan.positions_T), SequenceParams(layout=plan.layout))
    is_real_T = ~plan.is_padding_T
    return plan.row_source_T[is_real_T], hidden_T1D[torch.from_numpy(is_real_T), 0].detach()


def test_dynamic_scaling_does_not_depend_on_the_mesh():
    """The ring pads 9 and 5 tokens to 12 and 8; the frequencies must still be those of 9."""
    config = make_config("qwen2", scaling="dynamic")
    state = random_llm_state(config)
    expected_TD = run_ranks(_hidden_rows, 1, config, state)[0][1]
    shares = run_ranks(_hidden_rows, 2, config, state)
    assert sum(len(rows) for rows, _ in shares) == sum(LENGTHS)
    for rows, hidden_TD in shares:
        assert (hidden_TD - expected_TD[rows]).norm() <= 1e-5 * expected_TD[rows].norm()


def _stage(rank: int, config: Config):
    from megatron_longvila.models.init import global_parameters

    module, groups = make_llm(config, pp_size=3)
    model = module["language_model"]
    numbers = [layer.layer_number for layer in model.decoder.layers]
    assert [layer.self_attention.layer_number for layer in model.decoder.layers] == numbers
    ends = [hasattr(model, "embedding"), hasattr(model, "output_layer"), model.decoder.final_layernorm is not None]
    return numbers, ends, [name for name, _ in global_parameters(module)]


@pytest.mark.parametrize("wanted, expected", [([2, 1, 1], [[1, 2], [3], [4]]), ([1, 2, 1], [[1], [2, 3], [4]]), ([], [[1], [2], [3, 4]])])
def test_uneven_stages_hold_consecutive_layers(wanted, expected):
    from megatron_longvila.checkpoint.hf import full_shapes

    config = make_config("qwen2", parallel={"pipeline_layers": wanted})
    stages = run_ranks(_stage, 3, config)
    assert [numbers for numbers, _, _ in stages] == expected
    assert [ends for _, ends, _ in stages] == [[True, False, False], [False, False, False], [False, True, True]]
    names = [name for _, _, names in stages for name in names]
    assert sorted(names) == sorted(name for name in full_shapes(config) if name.startswith("language_model."))


HOSTS = [("auto", (1, 4), "all_gather"), (4, (1, 4), "all_gather"), (4, (2, 4), "p2p"), (12, (1, 8), "all_gather")]


@pytest.mark.parametrize("gpus_per_host, sizes, expected", HOSTS)
def test_auto_transport_follows_the_hosts(gpus_per_host, sizes, expected):
    from types import SimpleNamespace

    from megatron_longvila.mesh import Mesh
    from megatron_longvila.models.llm import ring_transport, rings_cross_hosts

    ulysses_size, ring_size = sizes
    groups = SimpleNamespace(mesh=Mesh(8, 1, 1, ulysses_size, ring_size))
    config = make_config("qwen2", parallel={"gpus_per_host": gpus_per_host})
    assert ring_transport(config, groups) == expected and rings_cross_hosts(config, groups) == (expected == "p2p")
    chosen = replace(config, parallel=replace(config.parallel, ring_transport="p2p"))
    assert ring_transport(chosen, groups) == "p2p"


def test_frequencies_survive_bf16():
    """Megatron's mixed-precision wrapper calls .bfloat16() on the model."""

    def frequencies(rank):
        module, _ = make_llm(make_config("qwen2"))
        return module.bfloat16()["language_model"].inv_freq

    from megatron_longvila.models.rope import inverse_frequencies

    assert torch.equal(run_ranks(frequencies, 1)[0], inverse_frequencies(make_config("qwen2").model.llm))


def test_te_layers_without_transformer_engine_are_refused():
    import importlib.util

    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed")
    config = make_config("qwen2")
    config = replace(config, model=replace(config.model, layers="te"))
    with pytest.raises(Exception, match="ValueError: model.layers=te needs Transformer Engine.*model.layers=local"):
        run_ranks(lambda rank: make_llm(config) and None, 1)
