"""tools/benchmark_attention.py at toy size on gloo ranks: every scheme that a CPU can run, rows as documented, resumed, drawn."""

import json
import os
from collections import Counter
from importlib.util import find_spec
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from programs import ROOT, load_script

from dense_attention import dense_gradients, relative_error
from megatron_longvila.parallel.plan import SequenceLayout, owned_rows
from ranks import RankError, run_ranks, warm_parent

FLAGS = ["--heads", "4/2", "--head_dim", "8", "--iterations", "1", "--warm_up", "0", "--tiles", "8", "--parts", "1"]
COLUMNS = {"work", "scheme", "heads", "seq_len", "hosts", "median_ms", "tflops_per_gpu", "peak_memory_gib", "fraction_of_no_communication"}


def _tool():
    """tools/benchmark_attention.py; the schemes are its `peers`."""
    warm_parent()
    return load_script(ROOT / "tools" / "benchmark_attention.py")


def _run(path, *flags, num_ranks=2):
    """Run the tool; returns its rows."""
    tool = _tool()
    run_ranks(lambda rank: tool.main(["--output", str(path), *FLAGS, *flags]), num_ranks)
    return json.loads(path.read_text())


def test_rows_are_measured_once_and_drawn(tmp_path):
    path = tmp_path / "rows.json"
    flags = ["--lengths", "64", "--work", "forward+backward", "packed forward", "--shortest_document", "4", "--longest_document", "40"]
    rows = _run(path, *flags)
    assert all(set(row) >= COLUMNS and row["median_ms"] > 0 and row["peak_memory_gib"] is None for row in rows)
    assert all(row["tflops_per_gpu"] > 0 and row["run"] == 1 and "simulated_ranks" not in row for row in rows)
    schemes = {row["scheme"] for row in rows if row["work"] == "forward+backward"}
    ours = {
        "ulysses2",
        "ulysses2 tile8",
        "ulysses2 parts1",
        *(f"ulysses1 ring2 {x}{tile}" for x in ("all_gather", "p2p") for tile in ("", " tile8")),
    }
    assert {name.removeprefix("mmsp ") for name in schemes if name.startswith("mmsp ")} == ours
    assert {"no communication, one call", "no communication, ulysses2 parts1", "three all-to-alls", "replicated"} <= schemes
    for work in {row["work"] for row in rows}:
        same = [row for row in rows if row["work"] == work]
        ceiling = min(row["median_ms"] for row in same if row["scheme"].startswith("no communication"))
        assert all(abs(row["fraction_of_no_communication"] - ceiling / row["median_ms"]) < 1e-3 for row in same)
    facts = json.loads((tmp_path / "rows_machine.json").read_text())
    assert facts["ranks"] == 2 and facts["versions"]["torch"] == torch.__version__
    (run,) = facts["runs"]
    assert set(run) == {"id", "date", "command", "commit", "driver"} and run["command"].startswith("torchrun --nproc_per_node 2 tools/")
    assert any("TE p2p" in name for name in facts["left_out"])

    path.write_text(json.dumps(rows[1:]))
    again = _run(path, *flags)
    assert [row["median_ms"] for row in again[:-1]] == [row["median_ms"] for row in rows[1:]]
    assert again[-1]["scheme"] == rows[0]["scheme"] and again[-1]["run"] == 2

    _tool().main(["--output", str(path), "--plot"])
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["rows_forward_backward_hosts1.png", "rows_packed_forward_hosts1.png"]


def test_one_process_measures_the_shares_of_simulated_ranks(tmp_path):
    path = tmp_path / "share.json"
    rows = _run(path, "--simulate_ranks", "4", "--lengths", "64", num_ranks=1)
    meshes = {"ulysses2 ring2", "ulysses1 ring4"}
    names = {f"{mesh} {transport}{tile}" for mesh in meshes for transport in ("all_gather", "p2p") for tile in ("", " tile8")}
    names |= {f"ulysses2 ring2 {transport} parts1" for transport in ("all_gather", "p2p")}
    assert {row["scheme"] for row in rows} == {f"no communication, {name}" for name in ("one call", *names)}
    for row in rows:
        assert row["simulated_ranks"] == 4 and row["fraction_of_no_communication"] > 0
        ring = 4 if "ring4" in row["scheme"] else 2 if "ring2" in row["scheme"] else 1
        assert row["times_max_over_mean"] == 1 if ring == 1 else 1 <= row["times_max_over_mean"] <= ring
    # A rank's share of causal attention, forward alone: 4 * heads * head dim * pairs, over 4 ranks.
    (row,) = _run(path, "--simulate_ranks", "4", "--lengths", "64", "--work", "forward", "--schemes", "one call", num_ranks=1)[len(rows) :]
    assert row["tflops_per_gpu"] == pytest.approx(4 * 4 * 8 * 64 * 64 / 2 / 4 / row["median_ms"] / 1e9, rel=1e-3)
    with pytest.raises(RankError, match="4 simulated ranks, this run measures 8 simulated ranks; choose another --output"):
        _run(path, "--simulate_ranks", "8", "--lengths", "64", num_ranks=1)
    with pytest.raises(RankError, match="4 simulated ranks, this run measures real ranks; choose another --output"):
        _run(path, "--lengths", "64", num_ranks=1)
    _run(tmp_path / "real.json", "--lengths", "64", "--schemes", "one call", num_ranks=1)
    with pytest.raises(RankError, match="real ranks, this run measures 4 simulated ranks"):
        _run(tmp_path / "real.json", "--simulate_ranks", "4", "--lengths", "64", num_ranks=1)
    with pytest.raises(RankError, match="start it with python instead of torchrun"):
        _run(tmp_path / "two.json", "--simulate_ranks", "4", "--lengths", "64")


def test_a_simulated_rank_does_the_work_of_the_real_one():
    """Every place of a simulated ring computes what that rank of a real one does: same blocks, shapes and number of results."""
    warm_parent()
    peers = load_script(ROOT / "tools" / "attention_peers.py")
    case = peers.Case(4, 2, 8, (48, 16), torch.float64)

    def body(rank, simulated):
        results = []
        for one in range(2) if simulated else [rank]:
            step = peers.without_transfers(case, 2, "p2p", None, rank=one, num_ranks=2)
            results.append([x.detach() for x in step(None, True)])
        return results

    simulated = run_ranks(body, 1, True)[0]
    for place, (real,) in enumerate(run_ranks(body, 2, False)):
        assert all(torch.equal(a, b) for a, b in zip(real, simulated[place], strict=True))
        assert [x.shape for x in real] == [(32, 4, 8), (32, 4, 8), (32, 2, 8), (32, 2, 8)]
    assert not torch.equal(simulated[0][0], simulated[1][0])


def test_rows_of_another_commit_are_not_added_to(tmp_path):
    path = tmp_path / "rows.json"
    flags = ["--lengths", "64", "--schemes", "one call", "--repeats"]
    _run(path, *flags, "1", num_ranks=1)
    facts_path = tmp_path / "rows_machine.json"
    facts = json.loads(facts_path.read_text())
    facts["runs"][0]["commit"] = "0123abc"
    facts_path.write_text(json.dumps(facts))
    with pytest.raises(RankError, match="rows of commit 0123abc, the code here is commit .*choose another --output, or"):
        _run(path, *flags, "2", num_ranks=1)
    assert [row["run"] for row in _run(path, *flags, "2", "--allow_other_commit", num_ranks=1)] == [1, 2]
    # A file from before runs were noted is gone on with: nothing is known of its code.
    del facts["runs"]
    facts_path.write_text(json.dumps(facts))
    assert len(_run(path, *flags, "3", num_ranks=1)) == 3


def test_at_long_lengths_the_strongest_are_kept():
    warm_parent()
    tool = load_script(ROOT / "tools" / "benchmark_attention.py")

    def kept(heads, length, num_ranks):
        case = tool.Case(*heads, 128, (length,), torch.bfloat16)
        ours = tool.our_schemes(case, [], [], num_ranks)
        names = [f"{kind}{name}" for name in ours for kind in ("mmsp ", "no communication, ")]
        names += ["TE p2p", "TE a2a", "TE a2a+p2p", "TE all_gather", "replicated", "ring-flash-attn zigzag", "torch context_parallel CUDNN"]
        names += ["yunchang ulysses4 ring1", "yunchang ulysses2 ring2"]
        return {name for name in names if tool.is_wanted(name, case, "forward+backward", num_ranks)}

    ours = {"ulysses4", "ulysses1 ring4 all_gather", "ulysses1 ring4 p2p"}
    longest = {f"{kind}{name}" for name in ours for kind in ("mmsp ", "no communication, ")} | {"TE p2p", "TE a2a+p2p"}
    assert kept((32, 8), 512 << 10, 4) == longest
    assert {"mmsp ulysses2 ring2 p2p", "TE a2a", "TE all_gather", "yunchang ulysses2 ring2"} <= kept((32, 8), 256 << 10, 4)
    assert "mmsp ulysses2 ring2 all_gather" in kept((12, 2), 512 << 10, 4)


def test_torch_rotates_keys_in_both_ways_that_are_measured():
    """Its context_parallel needs a GPU; the names of the two ways do not."""
    from torch.distributed.tensor.experimental import _attention

    warm_parent()
    case = load_script(ROOT / "tools" / "attention_peers.py").Case(4, 2, 8, (64,), torch.float32)

    def body(rank):
        built = load_script(ROOT / "tools" / "benchmark_attention.py").schemes(case, [], [])
        chosen = {}
        for name in (name for name in built if name.startswith("torch context_parallel")):
            _attention.set_rotate_method(built[name].args[-1])
            chosen[name] = _attention._cp_options.rotate_method.name
        return chosen

    (chosen,) = run_ranks(body, 1)
    names = {"torch context_parallel CUDNN": "ALL_GATHER", "torch context_parallel CUDNN alltoall": "ALL_TO_ALL"}
    assert chosen == names | {name.replace("CUDNN", "FLASH"): way for name, way in names.items()}


def test_a_time_limit_ends_a_run_between_two_schemes(tmp_path):
    assert _run(tmp_path / "rows.json", "--lengths", "64", "--time_limit_s", "0") == []


def _errors(peers, case, schemes):
    """Largest error of output and gradients against the dense attention of one rank, by scheme, for each rank.

    Args:
        schemes: (rows of each rank, builder) by name.
    """
    generator = torch.Generator().manual_seed(0)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    whole = [torch.randn(case.total_rows, n, case.head_dim, dtype=torch.float64, generator=generator).to(case.dtype) for n in heads]
    exact = dense_gradients(*whole, case.lengths, case.scale)

    def body(rank):
        errors = {}
        for name, (rows, build) in schemes.items():
            mine = torch.from_numpy(rows[rank])
            values = build()(peers.Inputs(*(x[mine] for x in whole)), True)
            pairs = [(value.detach().reshape(right[mine].shape), right[mine]) for value, right in zip(values, exact, strict=True)]
            errors[name] = max(relative_error(*pair) for pair in pairs)
        return errors

    return run_ranks(body, 2)


def _rows(case, ulysses_size, ring_size):
    return owned_rows(SequenceLayout(ring_size, ulysses_size, case.lengths))


def test_our_schemes_compute_the_attention_of_one_rank():
    """Output and gradients of a pack."""
    peers = _tool().peers
    case = peers.Case(8, 4, 8, (48, 16), torch.float64)
    ulysses, ring = _rows(case, 2, 1), _rows(case, 1, 2)
    errors = _errors(
        peers,
        case,
        {
            "ulysses": (ulysses, lambda: peers.ours(case, 2, 1, "all_gather", None)),
            "parts": (ulysses, lambda: peers.ours(case, 2, 1, "all_gather", None, 2)),
            "tiles": (ulysses, lambda: peers.ours(case, 2, 1, "all_gather", 8)),
            "ring": (ring, lambda: peers.ours(case, 1, 2, "p2p", None)),
            "gathered ring": (ring, lambda: peers.ours(case, 1, 2, "all_gather", None)),
            "three": (ulysses, lambda: peers.three_all_to_alls(case)),
            "replicated": (ulysses, lambda: peers.replicated(case)),
        },
    )
    for of_rank in errors:
        assert len(of_rank) == 7 and all(error < 1e-12 for error in of_rank.values()), of_rank


def _tagged(make):
    """`dist.P2POp` whose transfers gloo matches by their order, as NCCL does and as peers count on: of two in flight it may swap them."""
    numbers = Counter()

    def tagged(operation, tensor, peer=None, group=None, tag=0, **others):
        numbers[operation, peer, group] += 1
        return make(operation, tensor, peer, group, numbers[operation, peer, group], **others)

    return tagged


@pytest.mark.skipif(None in map(find_spec, ("ring_flash_attn", "yunchang")), reason="ring-flash-attn and yunchang are not installed")
@pytest.mark.parametrize(
    ("dtype", "bound", "names"),
    [
        (torch.float64, 1e-6, ("zigzag", "usp")),  # they merge in fp32
        (torch.bfloat16, 2**-7, ("zigzag", "usp", "ring", "stripe")),  # the last two only know half precision: dK and dV travel in fp32
    ],
    ids=["fp64", "bf16"],
)
def test_outside_peers_compute_the_attention_of_one_rank(dtype, bound, names):
    """On the FlashAttention that torch brings, as the benchmark runs them where flash-attn is not installed."""
    peers = _tool().peers
    case = peers.Case(8, 4, 8, (64,), dtype)
    rows, zigzag = np.arange(64), _rows(case, 1, 2)
    schemes = {
        "zigzag": (zigzag, lambda: peers.ring_flash_attn(case, "zigzag")),
        "usp": (zigzag, lambda: peers.yunchang_usp(case, 1, 2, "flash")),
        "ring": (np.split(rows, 2), lambda: peers.ring_flash_attn(case, "ring")),
        "stripe": ([rows[0::2], rows[1::2]], lambda: peers.ring_flash_attn(case, "stripe")),
    }
    with mock.patch.object(dist, "P2POp", _tagged(dist.P2POp)):
        errors = _errors(peers, case, {name: schemes[name] for name in names})
    assert all(error < bound for of_rank in errors for error in of_rank.values()), errors


def test_two_emulated_hosts(tmp_path):
    """Four ranks, two on each: NCCL is told so, rows say so, and heads travel in groups where the ring's point-to-point crosses hosts."""
    path, tool = tmp_path / "rows.json", _tool()

    def body(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE="4")  # as torchrun does; a rank's environment ends with it
        calls, make = [], tool.peers._call
        with mock.patch.object(tool.peers, "_call", lambda *x, **settings: (calls.append(make(*x, **settings)), calls[-1])[1]):
            tool.main(["--output", str(path), *FLAGS, "--lengths", "64", "--hosts", "2", "--schemes", "(no communication|mmsp).*ring"])
        return os.environ["NCCL_HOSTID"], {call.crosses_hosts for call in calls}

    assert run_ranks(body, 4) == [(node, {True}) for node in ("node0", "node0", "node1", "node1")]
    rows = json.loads(path.read_text())
    meshes = [f"ulysses{u} ring{4 // u} {x}{tile}" for u in (1, 2) for x in ("all_gather", "p2p") for tile in ("", " tile8")]
    assert {f"{kind} {mesh}" for kind in ("mmsp", "no communication,") for mesh in meshes} <= {row["scheme"] for row in rows}
    assert all(row["hosts"] == 2 and row["median_ms"] > 0 and row["fraction_of_no_communication"] > 0 for row in rows)


@pytest.mark.parametrize(("rank", "node"), [(0, "node0"), (1, "node0"), (2, "node1"), (3, "node1")])
def test_nccl_sees_neighbouring_ranks_on_one_host_and_the_others_through_sockets(rank, node):
    tool = _tool()
    with mock.patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": "4"}):
        for name in [name for name in os.environ if "NCCL" in name]:
            del os.environ[name]
        tool.prepare_nccl(1)
        assert {name for name in os.environ if "NCCL" in name} == {"TORCH_NCCL_HIGH_PRIORITY"}
        tool.prepare_nccl(2)
        assert os.environ["NCCL_HOSTID"] == node and os.environ["NCCL_SOCKET_IFNAME"] == "lo"
        assert os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "1"
        with pytest.raises(ValueError, match="--hosts 3 must divide the number of ranks, 4"):
            tool.prepare_nccl(3)


def test_a_chosen_priority_of_transfers_is_kept():
    with mock.patch.dict(os.environ, {"TORCH_NCCL_HIGH_PRIORITY": "0"}):
        _tool().prepare_nccl(1)
        assert os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "0"


def _mesh_rows(times, **case):
    common = {"work": "forward+backward", "heads": "28/4", "seq_len": 131072, "hosts": 1} | case
    return [{**common, "scheme": scheme, "median_ms": ms} for scheme, ms in times.items()]


@pytest.mark.parametrize(
    ("times", "taken", "best", "meshes", "ratio", "verdict"),
    [
        ({"ulysses4": 200.0, "ulysses1 ring4 all_gather": 210.0}, "ulysses4", "ulysses4", 2, 1.0, "right"),
        ({"ulysses4": 231.0, "ulysses1 ring4 all_gather": 210.0}, "ulysses4", "ulysses1", 2, 1.1, "wrong"),
        ({"ulysses4": 231.0, "ulysses1 ring4 p2p": 210.0}, "ulysses4", "ulysses4", 1, 1.0, "only one mesh measured"),
        ({"ulysses4 parts2": 9.0, "ulysses1 ring4 all_gather": 210.0}, "ulysses4", "ulysses1", 1, None, "taken mesh not measured"),
        ({"ulysses1 ring4 p2p": 210.0}, "ulysses4", None, 0, None, "taken mesh not measured"),
    ],
)
def test_a_choice_of_mesh_is_compared_with_what_was_measured(times, taken, best, meshes, ratio, verdict, tmp_path, capsys):
    """On one host training gathers keys: rows of p2p count for nothing. The program fails where the choice is wrong or was not measured."""
    tool = load_script(ROOT / "tools" / "benchmark_attention.py")
    rows = _mesh_rows({f"mmsp {name}": ms for name, ms in times.items()} | {"TE p2p": 1.0})
    (choice,) = tool.check_meshes(rows, 4, 128)
    assert list(choice.values()) == ["28/4", 131072, 1, taken, best, meshes, ratio, verdict]

    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows_machine.json").write_text('{"ranks": 4}')
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--output", str(tmp_path / "rows.json"), "--check_meshes"])
    assert bool(stopped.value.code) == (verdict in ("wrong", "taken mesh not measured"))
    assert f"meshes {meshes}, ratio {ratio}, verdict {verdict}\n" in capsys.readouterr().out


def test_meshes_across_hosts_are_compared_by_p2p():
    tool = load_script(ROOT / "tools" / "benchmark_attention.py")
    times = {"mmsp ulysses2 ring2 p2p": 100.0, "mmsp ulysses2 ring2 all_gather": 200.0, "mmsp ulysses1 ring4 p2p": 90.0}
    (choice,) = tool.check_meshes(_mesh_rows(times, hosts=2), 4, 128)
    assert (choice["taken"], choice["meshes"], choice["ratio"], choice["verdict"]) == ("ulysses2", 2, round(100 / 90, 4), "wrong")


def test_no_row_to_compare_is_a_failure(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "rows_machine.json").write_text('{"ranks": 4}')
    with pytest.raises(SystemExit, match="nothing to compare"):
        load_script(ROOT / "tools" / "benchmark_attention.py").main(["--output", str(tmp_path / "rows.json"), "--check_meshes"])


def test_no_committed_row_shows_a_wrong_mesh():
    """Two meshes were measured at 32K; where only one was, nothing is claimed."""
    folder = ROOT / "tools" / "benchmark_results"
    ranks = json.loads((folder / "attention_2xh200_machine.json").read_text())["ranks"]
    rows = json.loads((folder / "attention_2xh200.json").read_text())
    choices = load_script(ROOT / "tools" / "benchmark_attention.py").check_meshes(rows, ranks, 128)
    verdicts = {(choice["heads"], choice["seq_len"]): choice["verdict"] for choice in choices}
    assert verdicts["28/4", 32768] == verdicts["32/8", 32768] == "right"
    assert set(verdicts.values()) <= {"right", "only one mesh measured"}
