"""A checkpoint written tensor by tensor is one that Megatron wrote: the same entries, and any mesh loads it and writes it back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hf_models import ODD_GRID, save_vila
from imported import export_folder, import_folder
from safetensors.torch import load_file

from megatron_longvila.checkpoint.tensor_files import SafetensorsFile, SafetensorsWriter, TensorInfo
from ranks import run_ranks

MESHES = {"tp2": (2, dict(tp_size=2)), "pp3": (3, dict(pp_size=3)), "cp4": (4, dict(ulysses_size=2, ring_size=2))}


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    for name, tied in (("untied", False), ("tied", True)):
        save_vila(root / f"{name}_source", tied=tied, image_size=ODD_GRID, projector="mlp_downsample_3x3_fix")
        run_ranks(lambda rank, name=name: import_folder(root / f"{name}_source", root / name), 1)
    return root


def _load_and_save(rank: int, folder: Path, output: Path, sizes: dict, world_size: int) -> None:
    from dataclasses import replace

    from tiny_model import build

    from megatron_longvila import config_io
    from megatron_longvila.checkpoint.sharded import load_weights, save_weights
    from megatron_longvila.config import ParallelConfig

    config = replace(config_io.load(folder / "config.yaml"), parallel=ParallelConfig(**sizes))
    model, groups = build(config, world_size)
    load_weights(folder, model, groups)
    save_weights(output, model, config, groups)


@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_loads_it(imported, tmp_path, mesh):
    from megatron_longvila.checkpoint.streaming import DistributedTensors

    world_size, sizes = MESHES[mesh]
    name = "tied" if mesh == "pp3" else "untied"
    run_ranks(_load_and_save, world_size, imported / name, tmp_path / "out", sizes, world_size)
    before, after = (DistributedTensors(folder, [""]) for folder in (imported / name, tmp_path / "out"))
    assert before.infos == after.infos
    for tensor in before.infos:
        assert torch.equal(before.read(tensor), after.read(tensor)), tensor
    # What a mesh wrote in pieces is exported as what was imported in one.
    export_folder(tmp_path / "out", tmp_path / "llm", "llm")
    exported, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "llm", imported / f"{name}_source" / "llm"))
    assert exported.keys() == source.keys() and all(torch.equal(exported[key], source[key]) for key in source)


def test_it_has_the_entries_that_megatron_writes(imported, tmp_path):
    import torch.distributed.checkpoint as dcp

    run_ranks(_load_and_save, 1, imported / "untied", tmp_path / "out", {}, 1)
    ours, theirs = (dcp.FileSystemReader(folder).read_metadata() for folder in (imported / "untied", tmp_path / "out"))
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for key, entry in ours.state_dict_metadata.items():
        other = theirs.state_dict_metadata[key]
        assert type(entry) is type(other)
        if hasattr(entry, "size"):
            assert entry.size == other.size and entry.properties.dtype == other.properties.dtype


def test_one_tensor_at_a_time():
    """The writer lets go of each tensor before it asks for the next."""
    import weakref

    from megatron_longvila.checkpoint.streaming import write_distributed

    def write(rank: int) -> int:
        import tempfile

        alive: list[weakref.ref] = []

        def read(name: str) -> torch.Tensor:
            tensor = torch.zeros(64, 64)
            alive.append(weakref.ref(tensor))
            held.append(sum(one() is not None for one in alive))
            return tensor

        held: list[int] = []
        infos = {f"language_model.decoder.layers.{index}.x.weight": TensorInfo((64, 64), torch.float32) for index in range(20)}
        with tempfile.TemporaryDirectory() as folder:
            write_distributed(Path(folder), infos, read, {})
        assert len(held) == 20
        return max(held)

    assert run_ranks(write, 1)[0] <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_safetensors_are_read_as_they_were_written(tmp_path, dtype):
    tensors = {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4), "strided": torch.randn(5, 6).t(), "wide": torch.randn(700, 800)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path, infos) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    ours, theirs = SafetensorsFile(tmp_path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.infos == infos and theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(ours.read(name), tensor) and torch.equal(theirs[name], tensor)


def test_shards_are_cut_as_late_as_possible():
    from megatron_longvila.checkpoint.tensor_files import split_shards

    random.seed(0)
    infos = {f"t{index}": TensorInfo((random.randint(1, 50),), torch.uint8) for index in range(100)} | {
        "big": TensorInfo((500,), torch.uint8)
    }
    shards = split_shards(infos, 100)
    sizes = [sum(infos[name].num_bytes for name in shard) for shard in shards]
    assert [name for shard in shards for name in shard] == list(infos)
    assert all(size <= 100 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    assert all(size + infos[after[0]].num_bytes > 100 for size, after in zip(sizes, shards[1:], strict=False))
    assert split_shards(infos, 0) == [list(infos)]
