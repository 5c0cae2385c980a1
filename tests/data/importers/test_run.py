"""What holds for every import: path safety, counts, ids, long files, damaged files, kills, and doing nothing the second time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_longvila.data.importers import records as records_module
from megatron_longvila.data.importers import run as run_module
from megatron_longvila.data.importers.records import Broken, read_records
from megatron_longvila.data.importers.rows import IMAGES, VIDEOS, MediaFolder, Missing, Settings
from megatron_longvila.data.importers.run import Options, run_import
from megatron_longvila.data.output import PreprocessError
from megatron_longvila.data.rows import RowError

ROOT = Path(__file__).parents[3]


def record(number: int, image: str = "a.jpg", identity=None) -> dict:
    question = {"from": "human", "value": f"<image>\nQuestion {number}?"}
    return {
        "id": f"r{number}" if identity is None else identity,
        "image": image,
        "conversations": [question, {"from": "gpt", "value": "A"}],
    }


@pytest.fixture
def media(tmp_path) -> Path:
    root = tmp_path / "media"
    root.mkdir()
    (root / "a.jpg").write_bytes(b"x")
    return root


def options(tmp_path, records, media, **changes) -> Options:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in records))
    return Options(**{"name": "llava", "inputs": (source,), "output": tmp_path / "out.jsonl", "media_root": media} | changes)


def rejected(options: Options) -> list[dict]:
    return [json.loads(line) for line in Path(f"{options.output}.rejected.jsonl").read_text().splitlines()]


def rows(options: Options) -> list[dict]:
    return [json.loads(line) for line in options.output.read_text().splitlines()]


def test_hostile_names_never_leave_the_folder(tmp_path, media):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (media / "with space ü.jpg").write_bytes(b"x")
    (media / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (media / "up").symlink_to(tmp_path)
    (media / "inside.jpg").symlink_to(media / "a.jpg")
    (media / "loop").symlink_to(media / "loop")
    names = ["../secret.jpg", "..", ".", "", "out.jpg", "up/secret.jpg", str(tmp_path / "secret.jpg"), "a\0.jpg", "x" * 300, "loop"]
    names += ["with space ü.jpg", "inside.jpg", str(media / "a.jpg"), "file:///etc/passwd", "http://example.org/a.jpg", "\ud800.jpg"]
    job = options(tmp_path, [record(number, name) for number, name in enumerate(names)], media)
    report = run_import(job)
    assert {row["id"]: row["image"] for row in rows(job)} == {"r10": "with space ü.jpg", "r11": "a.jpg", "r12": "a.jpg"}
    reasons = {one["id"]: (one["kind"], one["reason"]) for one in rejected(job)}
    assert all("leads out" in reasons[f"r{number}"][1] for number in (0, 1, 4, 5, 6))
    assert all(reasons[f"r{number}"][0] == "missing media" for number in (13, 14))
    assert report.rows == 3 and len(reasons) == 13


def test_search_takes_one_file_or_none(tmp_path, media):
    for name in ("x/one.jpg", "x/two.jpg", "y/two.png"):
        (media / name).parent.mkdir(exist_ok=True)
        (media / name).write_bytes(b"x")
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (media / "secret.jpg").symlink_to(tmp_path / "secret.jpg")
    job = options(tmp_path, [record(n, name) for n, name in enumerate(["one", "two", "secret"])], media, settings=Settings(search=True))
    run_import(job)
    assert [row["image"] for row in rows(job)] == ["x/one.jpg"]
    assert ["may be" in one["reason"] or "leads out" in one["reason"] for one in rejected(job)] == [True, True]


def test_search_takes_no_other_file_of_a_like_name(tmp_path):
    for name in ("sub/W26.mp4", "sub/pic.mp4", "a/x.jpg", "b/x.mp4", "c/y.mkv", "d/y.mp4", "e/v_z.webm", "f/3/0.mp4", "g/W1.2.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    folder = MediaFolder(tmp_path, search=True)
    for names, endings in (
        (["W26.8"], VIDEOS),
        (["pic.jpg"], IMAGES),
        (["pic.jpg"], VIDEOS),
        (["W1.mp4"], VIDEOS),
        (["4_0", "4/0"], VIDEOS),
    ):
        with pytest.raises(Missing):
            folder.find(names, endings)
    assert folder.find(["x.jpg"], IMAGES) == folder.find(["x"], IMAGES) == "a/x.jpg"
    assert folder.find(["x"], VIDEOS) == "b/x.mp4" and folder.find(["W1.2"], VIDEOS) == "g/W1.2.mp4"
    assert folder.find(["y.mp4"], VIDEOS) == "d/y.mp4" and folder.find(["W26.avi"], VIDEOS) == "sub/W26.mp4"
    assert folder.find(["z", "v_z"], VIDEOS) == "e/v_z.webm" and folder.find(["3_0", "3/0"], VIDEOS[1:]) == "f/3/0.mp4"
    with pytest.raises(RowError, match="may be"):
        folder.find(["y"], VIDEOS)


def test_rows_of_an_older_importer_are_made_anew(tmp_path, media, monkeypatch):
    job = options(tmp_path, [record(0)], media)
    monkeypatch.setattr(run_module, "VERSION", run_module.VERSION - 1)
    assert run_import(job).changed and not run_import(job).changed
    monkeypatch.undo()
    assert run_import(job).changed


def test_duplicate_ids(tmp_path, media):
    records = [
        record(0, identity="x"),
        record(1, identity="x"),
        record(0, identity="x"),
        record(2, identity="x-2"),
        record(3, identity="x"),
    ]
    records += [record(4, identity=7), record(5, identity="7"), record(6, identity=True), {**record(7), "id": None}]
    job = options(tmp_path, records, media)
    report = run_import(job)
    assert [(row["id"], row.get("origin")) for row in rows(job)] == [
        ("x", None), ("x-2", "x"), ("x-2-2", "x-2"), ("x-3", "x"), ("7", None), ("7-2", "7"), ("in.jsonl:9", None),
    ]  # fmt: skip
    assert report.renamed == 4 and report.rejected == {"duplicate": 1, "unusable": 1}
    assert rejected(job)[1]["reason"].startswith("has no `id`")


def test_damaged_lines_cost_themselves(tmp_path, media):
    job = options(tmp_path, [record(0), "{broken\n", "\n", "[1]\n", '"text"\n', json.dumps(record(1))[:-3] + "\n", record(2)], media)
    job.inputs[0].write_bytes(job.inputs[0].read_bytes() + b'{"id": "\xff"}\n')
    report = run_import(job)
    assert [row["id"] for row in rows(job)] == ["r0", "r2"] and report.records == 7
    assert [one["key"] for one in rejected(job)] == [f"in.jsonl:{number}" for number in (2, 4, 5, 6, 8)]


def as_list(path: Path, chunk: int, monkeypatch) -> list[object]:
    monkeypatch.setattr(records_module, "_CHUNK_BYTES", chunk)
    return [one.value for one in read_records(path)]


def test_lists_are_cut_at_any_chunk_boundary(tmp_path, monkeypatch):
    values = [{"a": 'x]},"\\"', "b": [1, {"c": "\\\\"}]}, [], {}, "s", 12, None, -1.5e3, {"ü": "\u2028"}]
    for text in (json.dumps(values), json.dumps(values, indent=3), "\ufeff" + json.dumps(values, ensure_ascii=False) + "\n \n"):
        path = tmp_path / "list.json"
        path.write_text(text, encoding="utf-8")
        for chunk in (1, 2, 3, 7, 64, 1 << 20):
            assert as_list(path, chunk, monkeypatch) == values
        numbered = list(read_records(path))
        assert [one.key for one in numbered] == [f"list.json#{number}" for number in range(1, 9)]
        assert all(a.done < b.done <= len(text.encode()) for a, b in zip(numbered, numbered[1:], strict=False))


def test_damaged_lists(tmp_path, monkeypatch):
    path = tmp_path / "list.json"
    path.write_text('[{"a": 1}, {"a": }, {"a": 2}]')
    values = as_list(path, 4, monkeypatch)
    assert values[0] == {"a": 1} and isinstance(values[1], Broken) and values[2] == {"a": 2}
    for text, message in (('[{"a": 1}, {"a"', "breaks off after element 1"), ("[1] [2]", "something follows"), ('[{"a": "x', "breaks off")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            as_list(path, 4, monkeypatch)
    path.write_text("[" + '"' + "x" * 100)
    monkeypatch.setattr(records_module, "_MAX_RECORD_BYTES", 50)
    with pytest.raises(ValueError, match="element 1 does not end within 50 bytes"):
        as_list(path, 4, monkeypatch)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match="no readable Parquet"):
        list(read_records(tmp_path / "bad.parquet"))


def test_a_second_run_does_nothing_unless_media_were_missing(tmp_path, media):
    job = options(tmp_path, [record(0), record(1)], media)
    assert run_import(job).changed
    stamp = job.output.stat().st_mtime_ns
    again = run_import(job)
    assert not again.changed and again.rows == 2 and job.output.stat().st_mtime_ns == stamp
    job = options(tmp_path, [record(0), record(1, "later.jpg")], media)
    assert run_import(job).rejected == {"missing media": 1}
    (media / "later.jpg").write_bytes(b"x")
    found = run_import(job)
    assert found.changed and found.rows == 2 and not found.rejected
    assert not run_import(job).changed
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == [
        "out.jsonl", "out.jsonl.lock", "out.jsonl.rejected.jsonl", "out.jsonl.report.json",
    ]  # fmt: skip


class Stopped(Exception):
    pass


def test_stopping_anywhere_and_going_on_gives_the_same_files(tmp_path, media, monkeypatch):
    monkeypatch.setattr(run_module, "CHECKPOINT_RECORDS", 3)
    records = [record(n % 8, "gone.jpg" if n % 5 == 4 else "a.jpg", identity="x" if n % 3 else f"y{n % 6}") for n in range(20)]
    (tmp_path / "whole").mkdir()
    whole = options(tmp_path / "whole", records, media)
    expected = run_import(whole)
    assert expected.renamed and expected.rejected["duplicate"] and expected.rejected["missing media"]
    job = options(tmp_path, records, media)
    starts = []

    def stop_after(count):
        def watch(records, total):
            for number, one in enumerate(records):
                if not number:
                    starts.append(one.key)
                if number == count:
                    raise Stopped
                yield one

        return watch

    for count in (0, 2, 4, 1, 7, 5):
        with pytest.raises(Stopped):
            run_import(job, stop_after(count))
        with open(f"{job.output}.partial", "ab") as file:
            file.write(b'{"cut')  # what a kill leaves behind
        assert not job.output.exists()
    report = run_import(job)
    assert job.output.read_bytes() == whole.output.read_bytes() and rejected(job) == rejected(whole)
    assert (report.rows, report.records, report.renamed, report.rejected) == (
        expected.rows, expected.records, expected.renamed, expected.rejected,
    )  # fmt: skip
    assert starts == [f"in.jsonl:{number}" for number in (1, 1, 1, 4, 4, 10)]


def test_another_input_starts_again(tmp_path, media, monkeypatch):
    monkeypatch.setattr(run_module, "CHECKPOINT_RECORDS", 1)
    job = options(tmp_path, [record(0), record(1)], media)

    def stop(records, total):
        yield next(records)
        raise Stopped

    with pytest.raises(Stopped):
        run_import(job, stop)
    job = options(tmp_path, [record(5), record(6), record(7)], media)
    run_import(job)
    assert [row["id"] for row in rows(job)] == ["r5", "r6", "r7"]


def test_wrong_use_is_refused(tmp_path, media):
    job = options(tmp_path, [record(0)], media)

    def refused(message, **changes):
        with pytest.raises(PreprocessError, match=message):
            run_import(options(tmp_path, [record(0)], media, **changes))

    refused("--media_root .* is not a folder", media_root=tmp_path / "none")
    refused("--media_root None is not a folder", media_root=None)
    refused("none.json is not a file", inputs=(tmp_path / "none.json",))
    refused("named twice", inputs=(job.inputs[0], tmp_path / "media" / ".." / "in.jsonl"))
    refused("is also an input", output=job.inputs[0])
    refused("is a folder; give a file name", output=media)


def tool(*arguments, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "import_dataset.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **settings)


def test_the_tool_speaks_and_leaves_the_right_status(tmp_path, media):
    job = options(tmp_path, [record(0), record(1, "gone.jpg"), record(0)], media)
    words = ["llava", "--input", job.inputs[0], "--output", job.output]
    done = tool(*words, "--media-root", media)
    assert done.returncode == 0, done.stderr
    assert "3 records: 1 rows, 2 rejected" in done.stdout and "1 missing media" in done.stdout and "1 duplicate" in done.stdout
    assert tool(*words, "--media_root", tmp_path / "none").returncode == 1
    assert tool(*words).returncode == 2 and tool("laion").returncode == 2
    empty = tool("llava", "--input", media / "a.jpg", "--output", tmp_path / "none.jsonl", "--media_root", media)
    assert empty.returncode == 1 and "no row was written" in empty.stderr
    shown = tool("youcook2", "--help").stdout
    assert '"database"' in shown and "--clips" in shown and "--fps" not in shown


MEASURE = """
import sys
from pathlib import Path
from megatron_longvila.data.importers.run import Options, run_import
source, output, media = map(Path, sys.argv[1:])
run_import(Options("llava", (source,), output, media))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_mib(source: Path, output: Path, media: Path) -> float:
    """Memory of an import in a process of its own. (What getrusage says of a child includes its parent at the fork.)"""
    words = [sys.executable, "-c", MEASURE, str(source), str(output), str(media)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


@pytest.mark.parametrize(("kind", "count"), [("lines", 100_000), ("list", 20_000)])
def test_large_files_need_the_memory_of_their_ids(tmp_path, media, kind, count):
    images = ["gone.jpg" if number % 1000 == 999 else "a.jpg" for number in range(count)]
    ids = [f"i{number % (count * 9 // 10)}" for number in range(count)]
    lines = [
        json.dumps(record(number, image, identity=name) | {"unused": "x" * 600})
        for number, (image, name) in enumerate(zip(images, ids, strict=True))
    ]
    source, output = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps([record(0)]))
    little = peak_mib(source, tmp_path / "little.jsonl", media)
    source.write_text("\n".join(lines) if kind == "lines" else "[" + ",\n".join(lines) + "]")
    much = peak_mib(source, output, media)
    report = json.loads(Path(f"{output}.report.json").read_text())
    assert (report["records"], report["rows"], report["rejected"]) == (count, count * 999 // 1000, {"missing media": count // 1000})
    assert report["renamed"] == count // 10 - count // 10_000
    assert len({json.loads(line)["id"] for line in output.read_text().splitlines()}) == report["rows"]
    # Two sets of 45-byte objects (about 26 bytes a slot in a set more), at most 200 bytes a row; the file is 780 bytes a row, and four
    # times that as objects.
    print(f"{kind}: {much - little:.1f} MiB more for {count} rows")
    assert much - little < 12 + 200 * count / 2**20


@pytest.mark.kill
def test_a_killed_tool_goes_on(tmp_path, media):
    job = options(tmp_path, [record(number) for number in range(60_000)], media)
    command = [sys.executable, str(ROOT / "tools" / "import_dataset.py"), "llava", "--input", job.inputs[0], "--output", job.output]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*map(str, command), "--media_root", str(media)], env=environment, stderr=subprocess.DEVNULL)
    state = Path(f"{job.output}.state")
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not job.output.exists() and json.loads(state.read_text())["report"]["records"] >= run_module.CHECKPOINT_RECORDS
    assert run_import(job).rows == 60_000
    assert [row["id"] for row in rows(job)] == [f"r{number}" for number in range(60_000)]
