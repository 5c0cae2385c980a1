"""Legal meshes, `auto`, rank groups and pipeline stages, for every world size up to 64."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys

import pytest

from megatron_longvila.config import ParallelConfig
from megatron_longvila.mesh import Mesh, pipeline_layers, rank_groups, resolve_mesh
from megatron_longvila.mesh_cost import Row

ROW = Row(128 << 10)
HEADS = {"qwen2_7b": (28, 4), "qwen2_1.5b": (12, 2), "llama3_8b": (32, 8), "tiny": (8, 4)}


def resolve(world_size: int, heads: tuple[int, int] = (8, 4), gpus_per_host: int = 8, row: Row = ROW, **parallel) -> Mesh:
    num_heads, num_kv_heads = heads
    fixed = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, gpus_per_host=gpus_per_host, head_dim=128, row=row)
    return resolve_mesh(ParallelConfig(**parallel), world_size=world_size, **fixed)


def test_qwen2_7b_on_one_host():
    assert resolve(8, HEADS["qwen2_7b"], cp_size=8) == Mesh(8, tp_size=1, pp_size=1, ulysses_size=4, ring_size=2)


def test_auto_everything_is_data_parallel():
    assert resolve(8) == Mesh(8, 1, 1, 1, 1)
    assert resolve(8).dp_size == 8


@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("length", [8 << 10, 128 << 10])
def test_auto_is_the_largest_legal_ulysses_on_fast_links(model, length):
    """For every world up to 64, every tp and cp that divide it."""
    num_heads, num_kv_heads = HEADS[model]
    for world_size, host in itertools.product((1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64), (1, 4, 6, 8)):
        for tp_size in (size for size in (1, 2, 4, 8) if world_size % size == 0 and num_heads % size == 0):
            local_kv_heads = max(1, num_kv_heads // tp_size)
            for cp_size in (size for size in range(1, world_size // tp_size + 1) if world_size // tp_size % size == 0):
                mesh = resolve(world_size, HEADS[model], host, Row(length), tp_size=tp_size, cp_size=cp_size)
                legal = [size for size in range(1, cp_size + 1) if cp_size % size == 0 and local_kv_heads % size == 0]
                assert mesh.cp_size == cp_size and mesh.dp_size * tp_size * cp_size == world_size
                assert mesh.ulysses_size == max(size for size in legal if size == 1 or min(host, world_size) % (size * tp_size) == 0)


def test_two_of_three_sizes_decide_the_third():
    assert resolve(8, cp_size=8, ring_size=4).ulysses_size == 2
    assert resolve(8, cp_size=8, ulysses_size=2).ring_size == 4
    assert resolve(8, ulysses_size=2, ring_size=2).cp_size == 4
    assert resolve(8, ring_size=4) == Mesh(8, 1, 1, 1, 4)
    assert resolve(8, ulysses_size=4, cp_size="auto").ring_size == 1


@pytest.mark.parametrize(
    ("world_size", "heads", "sizes", "words"),
    [
        (8, (28, 4), {"ulysses_size": 8}, ["ulysses_size=8", "4 / 1 -> 4", "raise ring_size", "ulysses_size=4 ring_size=1"]),
        (8, (28, 4), {"tp_size": 8}, ["num_attention_heads=28", "tp_size=8", "tp_size=4"]),
        (8, (12, 6), {"tp_size": 4}, ["num_query_groups=6", "tp_size=4"]),
        (6, (8, 4), {"pp_size": 4}, ["world_size=6", "1 * 4 * 1 * 1 = 4", "pp_size=3"]),
        (8, (8, 4), {"cp_size": 8, "ulysses_size": 2, "ring_size": 2}, ["cp_size=8", "2 * 2 = 4", "leave the other `auto`"]),
        (8, (8, 4), {"cp_size": 4, "ring_size": 8}, ["cp_size=4", "ring_size"]),
        (8, (8, 4), {"cp_size": 8, "ulysses_size": 3}, ["cp_size=8", "3 * 2 = 6"]),
        (8, (8, 4), {"tp_size": 0}, ["tp_size=0", "at least 1"]),
        (8, (8, 4), {"ring_size": -2}, ["ring_size=-2", "at least 1"]),
    ],
)
def test_impossible_meshes_name_numbers_and_way_out(world_size, heads, sizes, words):
    with pytest.raises(ValueError) as error:
        resolve(world_size, heads, **sizes)
    for word in words:
        assert word in str(error.value)


def test_nearest_meshes_are_legal():
    with pytest.raises(ValueError) as error:
        resolve(12, (28, 4), tp_size=3, ulysses_size=4)
    options = str(error.value).split("ranks: ")[1].split("; ")
    assert len(options) == 3
    for option in options:
        sizes = {name: int(size) for name, size in (pair.split("=") for pair in option.split())}
        assert resolve(12, (28, 4), **sizes)


def test_nearest_meshes_keep_a_given_cp_size():
    with pytest.raises(ValueError) as error:
        resolve(16, (28, 4), cp_size=8, ulysses_size=8)
    meshes = re.findall(r"ulysses_size=(\d+) ring_size=(\d+)", str(error.value).split("nearest meshes")[1])
    assert [int(ulysses) * int(ring) for ulysses, ring in meshes] == [8, 8, 8]
    assert meshes[0] == ("4", "2")


def test_mesh_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="world_size=6 must be divisible by .* = 4"):
        Mesh(6, 2, 2, 1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        Mesh(4, 0, 1, 1, 1)


def test_rank_groups_by_eye():
    sizes = {"dp": 1, "ring": 2, "ulysses": 2, "tp": 1}
    assert rank_groups(sizes, "ring") == [[0, 2], [1, 3]]
    assert rank_groups(sizes, "ulysses") == [[0, 1], [2, 3]]
    assert rank_groups({"pp": 2, "dp": 1, "ring": 1, "ulysses": 2, "tp": 2}, "tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rank_groups({"pp": 2, "dp": 1, "ring": 1, "ulysses": 2, "tp": 2}, "pp", "tp") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert rank_groups({"tp": 3}) == [[0], [1], [2]]


@pytest.mark.parametrize("world_size", [1, 2, 6, 8, 12, 64])
def test_rank_groups_partition_the_world(world_size):
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    for tp, pp, ulysses, ring in itertools.product(sizes, repeat=4):
        if world_size % (tp * pp * ulysses * ring):
            continue
        axes = Mesh(world_size, tp, pp, ulysses, ring).axes
        for names in (("tp",), ("ring", "ulysses"), ("dp", "ring", "ulysses"), ("pp", "ring", "ulysses", "tp")):
            groups = rank_groups(axes, *names)
            assert sorted(itertools.chain(*groups)) == list(range(world_size))
            assert {len(group) for group in groups} == {math.prod(axes[name] for name in names)}


def test_pipeline_layers():
    assert pipeline_layers(28, 4) == [7, 7, 7, 7]
    assert pipeline_layers(10, 4) == [2, 2, 3, 3]
    assert pipeline_layers(4, 2, [1, 3]) == [1, 3]
    for num_layers, pp_size in itertools.product(range(1, 40), range(1, 40)):
        if pp_size <= num_layers:
            stages = pipeline_layers(num_layers, pp_size)
            assert sum(stages) == num_layers and len(stages) == pp_size
            assert max(stages) - min(stages) <= 1 and stages == sorted(stages)
    for num_layers, pp_size, layers in [(4, 2, [2, 3]), (4, 2, [4]), (4, 2, [4, 0]), (2, 4, [])]:
        with pytest.raises(ValueError, match="pp_size"):
            pipeline_layers(num_layers, pp_size, layers)


def test_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, megatron_longvila.mesh; assert 'torch' not in sys.modules"], check=True)


def test_auto_ulysses_stays_on_the_host():
    assert resolve(8, (32, 8), 8, cp_size=8).ulysses_size == 8
    assert resolve(16, (32, 8), 8, tp_size=2, cp_size=8).ulysses_size == 4
    assert resolve(8, (32, 8), 4, cp_size=8).ulysses_size == 4
    assert resolve(6, (8, 4), 8, cp_size=6).ulysses_size == 2
    # Ranks 4 to 7 of ulysses 4 would be on two hosts of 6; pairs are not, and one host holds all 4 ranks.
    assert resolve(12, (8, 4), 6, cp_size=4).ulysses_size == resolve(24, (8, 4), 6, cp_size=8).ulysses_size == 2
    assert resolve(12, (8, 8), 6, tp_size=2, cp_size=2).ulysses_size == 1
    assert resolve(4, (8, 4), 6, cp_size=4).ulysses_size == 4


def test_the_choice_is_explained(caplog):
    with caplog.at_level("INFO", logger="megatron_longvila.mesh"):
        resolve(8, HEADS["qwen2_7b"], cp_size=8)
        resolve(8, HEADS["qwen2_7b"], ulysses_size=2, ring_size=2)  # nothing was chosen
    (line,) = caplog.messages
    assert (
        line.startswith("mesh: chose ulysses 4 x ring 2: ") and "ulysses 2 x ring 4: " in line and "131072 tokens, 8 GPUs per host" in line
    )
