"""Every cross-field rule refuses with the value, the rule and the way out; the neighbouring legal value passes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_longvila import config_check, platform
from megatron_longvila.config import Config
from megatron_longvila.config_check import check, check_device, check_inputs, resolve
from megatron_longvila.config_io import parse

TINY = str(Path(__file__).parents[1] / "examples" / "models" / "tiny.yaml")


def tiny(flags: str = "") -> Config:
    return parse(["--config", TINY, *flags.split()])


# flags that are refused, world size, words of the message, flags that make it legal
RULES = {
    "kv heads over ulysses": (
        "--parallel.tp_size 2 --parallel.ulysses_size 4",
        8,
        ["ulysses_size=4", "4 / 2 -> 2", "raise ring_size", "nearest meshes"],
        "--parallel.tp_size 2 --parallel.ulysses_size 2 --parallel.ring_size 2",
    ),
    "heads over tp": ("--parallel.tp_size 16", 16, ["tp_size=16", "--parallel.tp_size"], "--parallel.tp_size 4 --parallel.ring_size 4"),
    "world": (
        "--parallel.pp_size 4",
        6,
        ["world_size=6", "= 4", "nearest meshes for 6 ranks"],
        "--parallel.pp_size 3 --data.global_batch_size 2",
    ),
    "stages over layers": (
        "--parallel.pp_size 8",
        8,
        ["pp_size=8", "num_layers=4", "lower pp_size"],
        "--parallel.pp_size 4 --data.global_batch_size 2",
    ),
    "stage sum": (
        "--parallel.pp_size 2 --parallel.pipeline_layers [1,2]",
        2,
        ["[1, 2]", "num_layers=4", "[2, 2]"],
        "--parallel.pp_size 2 --parallel.pipeline_layers [1,3]",
    ),
    "virtual stages": (
        "--parallel.virtual_pp_size 2",
        1,
        ["virtual_pp_size=2", "only 1", "pipeline_layers"],
        "--parallel.virtual_pp_size 1",
    ),
    "sequence_parallel alone": (
        "--parallel.sequence_parallel true",
        1,
        ["sequence_parallel=true", "tp_size=1", "sequence_parallel false"],
        "--parallel.sequence_parallel true --parallel.tp_size 2",
    ),
    "parameter overlap alone": (
        "--parallel.overlap_param_gather true --parallel.overlap_grad_reduce false",
        1,
        ["overlap_param_gather=true", "overlap_grad_reduce true"],
        "--parallel.overlap_param_gather true",
    ),
    "never": ("--parallel.timeout_s .inf", 1, ["parallel.timeout_s=inf", "finite"], "--parallel.timeout_s 86400"),
    "no number": ("--optimizer.weight_decay .nan", 1, ["optimizer.weight_decay=nan", "finite"], "--optimizer.weight_decay 0.0"),
    "spread": ("--model.init_std -0.02", 1, ["model.init_std=-0.02", "positive", "0.02"], "--model.init_std 0.02"),
    "norm epsilon": ("--model.llm.norm_epsilon 0", 1, ["model.llm.norm_epsilon=0", "1e-06"], "--model.llm.norm_epsilon 1e-5"),
    "no folder": ("--output_dir=", 1, ["output_dir=''", "--output_dir DIR"], "--output_dir=here"),
    "no host": ("--parallel.gpus_per_host 0", 1, ["gpus_per_host=0", "LOCAL_WORLD_SIZE"], "--parallel.gpus_per_host 1"),
    "batch over dp": (
        "--data.global_batch_size 6",
        4,
        ["global_batch_size=6", "4 / (1 * 1 * 1) = 4", "use 4 or 8", "ring_size"],
        "--data.global_batch_size 8",
    ),
    "batch below dp": ("--data.global_batch_size 1", 2, ["global_batch_size=1", "= 2", "use 2,"], "--parallel.ring_size 2"),
    "frames over context": (
        "--data.video.num_frames 300",
        1,
        ["num_frames=300", "4 visual tokens", "1500 tokens", "context_length=1024", "204 or less"],
        "--data.video.num_frames 204",
    ),
    "frame over context": (
        "--data.context_length 4 --data.video.num_frames 1",
        1,
        ["5 tokens", "context_length=4", "raise context_length"],
        "--data.context_length 6 --data.video.num_frames 1",
    ),
    "int32 tokens": (
        "--data.context_length 4096 --data.global_batch_size 524288",
        1,
        ["524288 * 4096 = 2147483648", "2147483647", "int32", "lower global_batch_size"],
        "--data.context_length 4096 --data.global_batch_size 524287",
    ),
    "no frames": ("--data.video.num_frames 0", 1, ["num_frames=0", "positive", "8"], "--data.video.num_frames 1"),
    "bad fraction": ("--data.max_bad_fraction 1.5", 1, ["max_bad_fraction=1.5", "between 0 and 1"], "--data.max_bad_fraction 1"),
    "two warm-ups": (
        "--optimizer.warmup_steps 5 --optimizer.warmup_fraction 0.1",
        1,
        ["warmup_steps=5", "warmup_fraction=0.1", "set one to 0"],
        "--optimizer.warmup_steps 5",
    ),
    "warm-up fraction": ("--optimizer.warmup_fraction 1", 1, ["warmup_fraction=1.0", "[0, 1)"], "--optimizer.warmup_fraction 0.5"),
    "only warm-up": (
        "--optimizer.warmup_steps 5 --training.steps 5",
        1,
        ["warmup_steps=5", "steps=5", "lower"],
        "--optimizer.warmup_steps 4",
    ),
    "only a share of warm-up": (
        "--optimizer.warmup_fraction 0.03 --training.steps 1",
        1,
        ["warmup_fraction=0.03", "steps=1", "lower warmup_fraction"],
        "--optimizer.warmup_fraction 0.03 --training.steps 2",
    ),
    "learning rates": (
        "--optimizer.lr 1e-5 --optimizer.min_lr 1e-4",
        1,
        ["lr=1e-05", "min_lr=0.0001", "raise lr"],
        "--optimizer.min_lr 1e-6",
    ),
    "beta": ("--optimizer.beta2 1", 1, ["beta2=1.0", "[0, 1)", "0.95"], "--optimizer.beta2 0.99"),
    "clip": ("--optimizer.clip_grad -1", 1, ["clip_grad=-1.0", "0 turns it off"], "--optimizer.clip_grad 0"),
    "nothing trains": ("--training.trainable []", 1, ["trainable=[]", "projector"], "--training.trainable [projector]"),
    "part twice": ("--training.trainable [llm,llm]", 1, ["twice", "once"], "--training.trainable [llm,vision]"),
    "no length": ("--training.epochs 0", 1, ["epochs=0", "steps=0"], "--training.epochs 0 --training.steps 3"),
    "no eps": ("--optimizer.eps 0", 1, ["eps=0", "positive", "1e-8"], "--optimizer.eps 1e-8"),
    "evaluation of nothing": (
        "--training.evaluation_interval 5",
        1,
        ["evaluation_interval=5", "data.evaluation=[]", "to 0"],
        "--training.evaluation_interval 5 --data.evaluation [x]",
    ),
    "fp32 flash": (
        "--model.attention_backend flash",
        1,
        ["attention_backend='flash'", "fp32", "--training.precision bf16"],
        "--model.attention_backend flash --training.precision bf16",
    ),
    "no adapter to train": (
        "--training.trainable [lora,llm_norms]",
        1,
        ["names lora", "rank=0", "--model.lora.rank 8"],
        "--training.trainable [llm_norms]",
    ),
    "adapter not trained": (
        "--model.lora.rank 8 --training.trainable [llm_norms]",
        1,
        ["rank=8", "stay zero", "add lora", "rank 0"],
        "--model.lora.rank 8 --training.trainable [lora,llm_norms]",
    ),
    "whole decoder and adapters": (
        "--model.lora.rank 8 --training.trainable [llm,lora]",
        1,
        ["'llm', 'lora'", "whole decoder", "leave lora out", "leave llm out"],
        "--model.lora.rank 8 --training.trainable [lora,llm_embeddings]",
    ),
    "whole decoder and its parts": (
        "--training.trainable [projector,llm,llm_norms,llm_embeddings]",
        1,
        ["whole decoder", "llm_norms, llm_embeddings", "leave llm_norms, llm_embeddings out"],
        "--training.trainable [projector,llm]",
    ),
    "empty pattern": (
        '--training.may_see_no_gradient ["a*",""]',
        1,
        ["['a*', '']", "empty pattern", "remove"],
        '--training.may_see_no_gradient ["a*"]',
    ),
    "nothing to load": (
        "--checkpoint.load_parts []",
        1,
        ["load_parts=[]", "at least one of vision, projector, llm", "leave checkpoint.load empty"],
        "--checkpoint.load_parts [llm]",
    ),
    "load twice": ("--checkpoint.load_parts [llm,llm]", 1, ["load_parts", "each once"], "--checkpoint.load_parts [llm,vision]"),
    "keep none": ("--checkpoint.keep_last 0", 1, ["keep_last=0", "positive", "2"], "--checkpoint.keep_last 1"),
    "negative interval": ("--checkpoint.save_interval -1", 1, ["save_interval=-1", "0 turns it off"], "--checkpoint.save_interval 0"),
    "no time": ("--parallel.timeout_s 0", 1, ["timeout_s=0", "positive", "600"], "--parallel.timeout_s 1.5"),
}


def assert_refused(flags: str, world_size: int, words: list[str]) -> None:
    """The check refuses these flags and its message has all the words."""
    with pytest.raises(ValueError) as error:
        check(tiny(flags), world_size)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    flags, world_size, words, legal_flags = RULES[rule]
    assert_refused(flags, world_size, words)
    assert check(tiny(legal_flags), 2 if rule == "sequence_parallel alone" else world_size).world_size >= world_size


@pytest.mark.parametrize(
    ("flags", "package", "words"),
    [
        (
            "--model.layers te --training.precision bf16",
            "transformer_engine",
            ["model.layers='te'", "megatron-longvila[te]", "--model.layers local"],
        ),
        ("--optimizer.backend te", "transformer_engine", ["optimizer.backend='te'", "megatron-longvila[te]", "--optimizer.backend torch"]),
        ("--optimizer.backend apex", "apex", ["optimizer.backend='apex'", "source repository", "--optimizer.backend torch"]),
        ("--logging.tensorboard true", "tensorboard", ["logging.tensorboard=True", "megatron-longvila[logging]"]),
        ("--logging.wandb_project x", "wandb", ["wandb", "megatron-longvila[logging]"]),
    ],
)
def test_missing_packages_are_named(monkeypatch, flags, package, words):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == package else find_spec(name, *args))
    with pytest.raises(ValueError) as error:
        check(tiny(flags), 1)
    for word in words:
        assert word in str(error.value)


def test_te_layers_in_fp32_are_refused():
    with pytest.raises(ValueError, match="'te' .*'fp32' would multiply in TF32.*--training.precision bf16"):
        check(tiny("--model.layers te"), 1)


def test_the_other_apex_is_not_apex(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not config_check._has_apex_optimizers()
    (tmp_path / "apex" / "optimizers").mkdir()
    assert config_check._has_apex_optimizers()


@pytest.mark.skipif(not platform.is_cpu(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    "flags", ["--model.layers te", "--model.attention_backend cudnn", "--model.kernels triton", "--optimizer.backend apex"]
)
def test_what_needs_cuda_is_refused_without_it(flags):
    with pytest.raises(ValueError, match=f"{flags.split()[0][2:]}='{flags.split()[1]}' needs a CUDA device.*use --{flags.split()[0][2:]} "):
        check_device(tiny(flags))
    check_device(tiny())


def test_fp32_on_cuda_must_name_its_attention(monkeypatch):
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    with pytest.raises(ValueError, match="'auto' is cuDNN.*--training.precision bf16 or --model.attention_backend reference"):
        check_device(tiny())
    check_device(tiny("--model.attention_backend reference"))
    check_device(tiny("--training.precision bf16"))


def test_inputs_must_exist(tmp_path):
    folder, tokenizer = tmp_path / "rows", tmp_path / "words.model"
    with pytest.raises(ValueError, match=r"data.train=\[\].*preprocess_video"):
        check_inputs(tiny())
    with pytest.raises(ValueError, match="rows' holds no dataset.json.*--output"):
        check_inputs(tiny(f"--data.train [{folder}]"))
    folder.mkdir()
    (folder / "dataset.json").touch()
    with pytest.raises(ValueError, match="data.tokenizer='' must be"):
        check_inputs(tiny(f"--data.train [{folder}]"))
    with pytest.raises(ValueError, match="data.tokenizer=.*does not exist"):
        check_inputs(tiny(f"--data.train [{folder}] --data.tokenizer {tokenizer}"))
    tokenizer.touch()
    check_inputs(tiny(f"--data.train [{folder}] --data.tokenizer {tokenizer}"))
    flags = f"--data.train [{folder}] --data.tokenizer {tokenizer} --checkpoint.load {tmp_path}/absent --output_dir {tmp_path}/run"
    with pytest.raises(ValueError, match="checkpoint.load=.*absent.*does not exist"):
        check_inputs(tiny(flags))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").touch()
    check_inputs(tiny(flags))  # a run that goes on does not begin with it
    with pytest.raises(ValueError, match="checkpoint.load=.*absent.*does not exist"):
        check_inputs(tiny(f"{flags} --checkpoint.resume false"))


def test_resolve_fills_every_auto():
    config = resolve(tiny("--parallel.cp_size 8"), world_size=8, gpus_per_host=2)
    parallel = config.parallel
    assert (parallel.cp_size, parallel.ulysses_size, parallel.ring_size, parallel.gpus_per_host) == (8, 2, 4, 2)
    assert resolve(config, world_size=8, gpus_per_host=8) == config
    assert resolve(tiny("--parallel.cp_size 8 --parallel.gpus_per_host 8"), world_size=8, gpus_per_host=2).parallel.ring_size == 2


def test_a_row_is_expected_to_hold_as_many_samples_as_fit(caplog):
    """Frames of 4 visual tokens and a newline; a model that trains neither tower nor projector reads text."""
    for frames, parts, samples in ((8, "vision,llm", 25), (1, "projector", 204), (102, "vision", 2), (200, "vision", 1), (8, "llm", 1)):
        flags = f"--parallel.cp_size 8 --data.video.num_frames {frames} --training.trainable [{parts}]"
        with caplog.at_level("INFO", logger="megatron_longvila.mesh"):
            check(tiny(flags), 8)
        assert f"for {samples} samples in 1024 tokens" in caplog.messages[-1]
