"""tools/preprocess_text.py: what is a document, what is refused and why, which documents are drawn, and that a kill costs only time."""

import errno
import functools
import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from programs import load_script
from text_files import options, pack_lines, text, write_file, write_words

from megatron_longvila.data import preprocess_text as module
from megatron_longvila.data.documents import Document, list_pieces, read_documents
from megatron_longvila.data.output import PreprocessError
from megatron_longvila.data.preprocess_text import find_end, preprocess_text
from megatron_longvila.data.shards import open_dataset
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.data.upsampling import Mixture, compare, draw

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_text.py"


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    return write_words(tmp_path_factory.mktemp("words") / "words.model")


@functools.cache
def tool():
    return load_script(TOOL)


def of_set(name: str, value: str) -> dict:
    return {"text": value, "meta": {"redpajama_set_name": name}}


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "state" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tokens_of(folder: Path) -> list[list[list[int]]]:
    """Pieces of every row."""
    dataset = open_dataset(folder)
    return [[piece.tolist() for piece in dataset.pieces(number)] for number in range(len(dataset))]


def flat(rows: list[list[list[int]]]) -> list[int]:
    return [token for row in rows for piece in row for token in piece]


def test_slimpajama_layout_and_everything_that_is_no_document(words, tmp_path):
    root = tmp_path / "train"
    book, web = "RedPajamaBook", "RedPajamaCommonCrawl"
    first = [of_set(book, text(1, 9)), b"{broken", of_set(web, text(2, 3)), b"", of_set(web, " \n")]
    second = [of_set(web, text(3, 4)), {"meta": {}}, {"text": 5}, b"[1]", b'{"text": "\xff"}', b'{"text": "\\ud800"}', {"text": text(4, 2)}]
    write_file(root / "chunk1" / "example_0.jsonl.zst", pack_lines(first, ".jsonl.zst"))
    write_file(root / "chunk2" / "example_1.jsonl.gz", pack_lines(second, ".jsonl.gz"))
    write_file(root / "chunk2" / "whole.txt", b"\xef\xbb\xbf" + text(5, 6).encode())
    write_file(root / "chunk2" / "bad.txt", b"\xff\xfe")
    write_file(root / "notes.md", b"no data")
    report = preprocess_text(options([root], words, tmp_path / "out"))
    assert (report.accepted, report.rejected, report.ignored_files) == (5, 8, 1)
    reasons = {row["key"]: row["reason"] for row in report.rows}
    expected = {
        "train/chunk1/example_0.jsonl.zst:2": "not JSON", "train/chunk1/example_0.jsonl.zst:5": "empty text",
        "train/chunk2/example_1.jsonl.gz:2": "no field 'text'", "train/chunk2/example_1.jsonl.gz:3": "field 'text' is not a text",
        "train/chunk2/example_1.jsonl.gz:4": "not a JSON object", "train/chunk2/example_1.jsonl.gz:5": "not UTF-8 text",
        "train/chunk2/example_1.jsonl.gz:6": "half a surrogate pair", "train/chunk2/bad.txt": "not UTF-8 text",
    }  # fmt: skip
    assert reasons.keys() == expected.keys() and all(reasons[key].startswith(reason) for key, reason in expected.items())
    assert report.rejected_kinds["not UTF-8 text"] == 2 and sum(report.rejected_kinds.values()) == 8
    counts = {row.source: (row.documents_before, row.tokens_before) for row in report.sources}  # one end token each
    assert counts == {book: (1, 10), web: (2, 9), "train": (2, 10), "all": (5, 29)}
    assert (report.num_rows, report.dropped_tokens) == (3, 29 - 24)
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (record["accepted"], record["rejected"], record["dropped_tokens"]) == (5, 8, 5)
    assert (tmp_path / "out" / "document_lengths.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_the_documents_one_after_the_other(words, tmp_path):
    lengths = [3, 11, 1, 7, 20, 2, 5]
    source = write_file(tmp_path / "a.jsonl", pack_lines([{"text": text(n, length)} for n, length in enumerate(lengths)]))
    tokenizer = load_tokenizer(words)
    documents = {tuple(tokenizer.encode(text(n, length))) + (tokenizer.eos_id,) for n, length in enumerate(lengths)}
    report = preprocess_text(options([source], words, tmp_path / "out", context_length=8))
    rows = tokens_of(tmp_path / "out")
    assert report.num_rows == len(rows) == 56 // 8 and report.dropped_tokens == 0
    assert all(sum(map(len, row)) == 8 for row in rows) and report.num_pieces == sum(map(len, rows))
    stream, read = flat(rows), []
    while stream:
        end = stream.index(tokenizer.eos_id) + 1
        read.append(tuple(stream[:end]))
        stream = stream[end:]
    assert set(read) == documents and len(read) == len(lengths)
    for row in rows:  # a piece ends with its document or with the row
        assert all(piece.count(tokenizer.eos_id) == (piece[-1] == tokenizer.eos_id) for piece in row)
        assert all(piece[-1] == tokenizer.eos_id for piece in row[:-1])
    preprocess_text(options([source], words, tmp_path / "other", context_length=8, seed=1))
    assert Counter(flat(tokens_of(tmp_path / "other"))) == Counter(flat(rows)) and tokens_of(tmp_path / "other") != rows


@pytest.mark.parametrize(("end", "num_words"), [("auto", 7), ("<|im_end|>", 7), ("", 8), ("none", 8)])
def test_documents_of_the_row_length_are_the_rows(words, tmp_path, end, num_words):
    source = write_file(tmp_path / "a.jsonl", pack_lines([{"text": text(n, num_words)} for n in range(30)]))
    report = preprocess_text(options([source], words, tmp_path / "out", end_of_document=end))
    tokenizer, rows = load_tokenizer(words), tokens_of(tmp_path / "out")
    ends = {"auto": [tokenizer.eos_id], "<|im_end|>": [tokenizer.special_id("<|im_end|>")]}.get(end, [])
    assert sorted(rows) == sorted([tokenizer.encode(text(n, num_words)) + ends] for n in range(30))
    header = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (header["end_id"], header["end_of_document"]) == (ends[0] if ends else None, report.end_of_document)


def test_end_token_of_a_tokenizer_without_end_of_sequence(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    assert find_end("auto", tokenizer) == ("eos", tokenizer.eos_id)
    tokenizer.eos_id = None
    assert find_end("auto", tokenizer) == ("<|im_end|>", tokenizer.special_id("<|im_end|>"))
    with pytest.raises(ValueError, match="'<nothing>' is no special token"):
        find_end("<nothing>", tokenizer)


# Source 0: six short documents of 100 tokens and two long ones of 200; source 1: ten short ones of 60 and none long.
LENGTHS = np.array([100] * 6 + [200] * 2 + [60] * 10)
SOURCES = np.array([0] * 8 + [1] * 10)


def drawn_tokens(**settings) -> tuple[list, np.ndarray]:
    mixture = Mixture(**{"long_tokens": 100, "long_share": 0.0, "max_copies": 10, "num_tokens": None, "seed": 3} | settings)
    drawn = draw(LENGTHS, SOURCES, mixture)
    rows = compare(LENGTHS, SOURCES, ["a", "b"], drawn, 100)
    return rows, drawn


@pytest.mark.parametrize(
    ("settings", "documents", "tokens", "long_share"),
    [
        ({}, (8, 10), (1000, 600), 0.4),
        ({"long_share": 0.8}, (4 + 2, 10), (1000, 600), 0.8),  # both long ones twice make 800; two short ones stay
        ({"long_share": 0.6}, (3 + 4, 10), (1000, 600), 0.6),  # one of the long ones twice, the other once
        ({"long_share": 0.1}, (8, 10), (1000, 600), 0.4),  # never less than there is
        ({"long_share": 1.0}, (5, 10), (1000, 600), 1.0),
        ({"long_share": 0.8, "max_copies": 1}, (8, 10), (1000, 600), 0.4),  # the cap holds, short ones fill
        ({"num_tokens": 800}, (1 + 3, 5), (500, 300), 0.4),
        ({"num_tokens": 800, "long_share": 0.8}, (2 + 1, 5), (500, 300), 0.8),
        ({"num_tokens": 10**6}, (8, 10), (1000, 600), 0.4),  # no more than there is
    ],
)
def test_upsampling_by_hand(settings, documents, tokens, long_share):
    (a, b, every), drawn = drawn_tokens(**settings)
    assert (a.documents_after, b.documents_after) == documents and (a.tokens_after, b.tokens_after) == tokens
    assert (a.tokens_before, b.tokens_before, every.tokens_before) == (1000, 600, 1600)
    assert a.share_before == a.share_after == 1000 / 1600 and b.share_after == b.share_before  # the mixture is kept
    assert (a.long_share_before, a.long_share_after, b.long_share_after) == (0.4, long_share, 0.0)
    assert a.most_copies == Counter(drawn.tolist()).most_common(1)[0][1] or a.most_copies == 1
    again, other = drawn_tokens(**settings)[1], drawn_tokens(**settings, seed=4)[1]
    assert drawn.tolist() == again.tolist() != other.tolist()


def test_upsampling_and_num_rows_reach_the_rows(words, tmp_path):
    records = [of_set("a", text(n, 9)) for n in range(20)] + [of_set("a", text(n, 99)) for n in range(3)]
    source = write_file(tmp_path / "a.jsonl", pack_lines(records))
    settings = {"context_length": 50, "long_tokens": 50, "long_share": 0.9, "num_rows": 8, "documents": tmp_path / "tokens"}
    report = preprocess_text(options([source], words, tmp_path / "out", **settings))
    ((row, _),) = [report.sources]
    assert (row.tokens_before, row.tokens_after, row.long_share_before) == (500, 440, 0.6)  # 400: 360 + 40; the last long one is whole
    assert row.long_share_after == 400 / 440 and report.num_rows == 8 and report.dropped_tokens == 40
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.bin")}
    longer = preprocess_text(options([source], words, tmp_path / "longer", **settings | {"context_length": 100, "num_rows": 0}))
    assert longer.num_rows == 5 and parts == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.bin")}


def test_a_large_file_is_cut_between_lines(words, tmp_path, monkeypatch):
    records = [{"text": text(n, 1 + n % 7)} if n % 5 else b"{" for n in range(60)]
    source = write_file(tmp_path / "a.jsonl", pack_lines(records))
    whole = preprocess_text(options([source], words, tmp_path / "whole"))
    for size in (1, 7, 100, 1000):
        pieces = list_pieces([source], size)[0]
        found = [one for piece in pieces for one in read_documents(piece, text_field="text", source_field="none")]
        texts = [one.text for one in found if isinstance(one, Document)]
        assert texts == [record["text"] for record in records if record != b"{"] and len(found) == 60
    monkeypatch.setattr(module, "list_pieces", functools.partial(list_pieces, piece_bytes=100))
    cut = preprocess_text(options([source], words, tmp_path / "cut"))
    assert len(list((tmp_path / "cut" / "documents").glob("*.bin"))) > 5
    assert cut.rows == whole.rows and cut.rows[1]["key"] == "a.jsonl:6"  # lines are those of the file
    for name in ("rows.bin", "rows.idx", "report.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_links_are_read_as_their_own_names_say(words, tmp_path):
    """The layout of Hugging Face's cache: names that link to files called by their hash."""
    records = [{"text": text(n, 4)} for n in range(6)]
    for number, suffix in enumerate((".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")):
        data = text(9, 4).encode() if suffix == ".txt" else pack_lines(records, suffix)
        write_file(tmp_path / "blobs" / f"{number:064x}", data)
        write_file(tmp_path / "snapshot" / f"a{suffix}", b"").unlink()
        (tmp_path / "snapshot" / f"a{suffix}").symlink_to(f"../blobs/{number:064x}")
    for piece_bytes in (1 << 20, 50):
        pieces = list_pieces([tmp_path / "snapshot"], piece_bytes)[0]
        found = [one for piece in pieces for one in read_documents(piece, text_field="text", source_field="none")]
        assert [one.text for one in found] == [record["text"] for record in records] * 3 + [text(9, 4)]
    report = preprocess_text(options([tmp_path / "snapshot"], words, tmp_path / "out"))
    assert (report.accepted, report.rejected) == (19, 0)


def test_linked_folders_are_searched_once(words, tmp_path):
    for number, folder in enumerate(("train/chunk1", "disk2/chunk2", "disk2/chunk2/part")):
        write_file(tmp_path / folder / f"{number}.jsonl", pack_lines([{"text": text(number, 4)}]))
    (tmp_path / "train" / "chunk2").symlink_to("../disk2/chunk2")
    (tmp_path / "train" / "chunk3").symlink_to("../disk2/chunk2/part")  # is below another link already
    (tmp_path / "disk2" / "chunk2" / "up").symlink_to("../../train")
    (tmp_path / "train" / "gone.jsonl").symlink_to("nowhere")
    report = preprocess_text(options([tmp_path / "train"], words, tmp_path / "out"))
    assert (report.accepted, report.rejected, report.ignored_files) == (3, 0, 0)


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    write_file(tmp_path / "train" / "chunk" / "a.jsonl", b"{}")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("chunk"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="chunk"):
        list_pieces([tmp_path / "train"])


def test_shares_are_the_whole_and_meet_nowhere(words, tmp_path):
    for number in range(5):
        write_file(tmp_path / "train" / f"{number}.jsonl", pack_lines([{"text": text(number, 4)}] * 3))
    write_file(tmp_path / "train" / "README.md", b"")
    one = write_file(tmp_path / "one.txt", text(9, 4).encode())
    whole = list_pieces([tmp_path / "train", one])[0]
    parts = [list_pieces([tmp_path / "train", one], share=(place, 4))[0] for place in range(4)]
    assert [len(part) for part in parts] == [2, 2, 1, 1] and sorted(sum(parts, []), key=whole.index) == whole
    assert {piece.source for piece in parts[0]} == {"train"}
    with pytest.raises(ValueError, match="holds 6 files, so that share 6/7 has none; make fewer shares"):
        list_pieces([tmp_path / "train", one], share=(6, 7))
    reports = [preprocess_text(options([tmp_path / "train"], words, tmp_path / f"out{n}", share=(n, 2))) for n in range(2)]
    assert [report.accepted for report in reports] == [9, 6]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_damaged_packed_files_keep_what_came_before(words, tmp_path, suffix):
    good = [{"text": f"{os.urandom(60).hex()} {text(n, 5)}"} for n in range(3000)]
    data = pack_lines(good, suffix)
    two_frames = pack_lines(good[:10], suffix) + pack_lines(good[10:20], suffix)
    for name, damaged, most in (("cut", data[: len(data) // 2], 2999), ("end", data[:-6], 3000), ("frames", two_frames, 20)):
        source = write_file(tmp_path / f"{name}{suffix}", damaged)
        report = preprocess_text(options([source], words, tmp_path / f"{name}.out"))
        assert 20 <= report.accepted <= most and report.rejected == (name != "frames")
        assert name == "frames" or report.rows[0]["reason"].startswith("the compressed file is damaged from here on")
    whole = write_file(tmp_path / "whole.txt.zst", zstandard.ZstdCompressor().compress(text(1, 2000).encode())[:-5])
    report = preprocess_text(options([whole, source], words, tmp_path / "out"))
    assert (report.accepted, report.rows[0]["key"]) == (20, "whole.txt.zst")


@pytest.mark.parametrize("window_log", [10, 28, 31])
def test_zstandard_files_with_a_long_window(words, tmp_path, window_log):
    """As `zstd --long=31` packs dumps. By hand, since packing that way takes gigabytes: one raw block after the window's size."""
    line = json.dumps({"text": text(1, 9)}).encode() + b"\n"
    block = (1 | len(line) << 3).to_bytes(3, "little") + line
    source = write_file(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd\0" + bytes([(window_log - 10) << 3]) + block)
    report = preprocess_text(options([source], words, tmp_path / "out"))
    assert (report.accepted, report.rejected) == (1, 0)


def die_in_a_child(run, *, at_call: int, of: str) -> None:
    """Call `run` in a forked process that kills itself when it is about to call `of` for the `at_call`-th time."""
    child = os.fork()
    if not child:
        function, calls = getattr(module, of), []

        def dying(*arguments, **settings):
            calls.append(None)
            if len(calls) == at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        setattr(module, of, dying)
        try:
            run()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize(("of", "at_call", "left"), [("tokenise", 3, 2), ("draw", 1, 0), ("draw_histogram", 1, 0)])
def test_killed_and_run_again_gives_the_same_bytes(words, tmp_path, monkeypatch, of, at_call, left):
    for number in range(4):
        write_file(tmp_path / "in" / f"{number}.jsonl", pack_lines([{"text": text(n, n + 3)} for n in range(number, 9)]))
    whole, broken = (options([tmp_path / "in"], words, tmp_path / name) for name in ("whole", "out"))
    preprocess_text(whole)
    die_in_a_child(lambda: preprocess_text(broken), at_call=at_call, of=of)
    with pytest.raises(ValueError, match="has not finished"):
        open_dataset(broken.output)
    tokenised = []
    monkeypatch.setattr(module, "tokenise", lambda task, real=module.tokenise: tokenised.append(task) or real(task))
    assert preprocess_text(broken).changed and len(tokenised) == left

    def same(folder):
        files = contents(folder)
        return files | {"dataset.json": json.loads(files["dataset.json"])}

    assert same(broken.output) == same(whole.output)
    before = {path: path.stat().st_mtime_ns for path in broken.output.rglob("*") if path.is_file() and path.name != "lock"}
    assert not preprocess_text(broken).changed and len(tokenised) == left
    assert before == {path: path.stat().st_mtime_ns for path in before}
    write_file(tmp_path / "in" / "1.jsonl", pack_lines([{"text": text(1, 30)}]))  # one file is new: it alone is tokenised
    assert preprocess_text(broken).changed and len(tokenised) == left + 1
    assert len(list((broken.output / "documents").glob("*.bin"))) == 4


def test_the_tool_with_processes(words, tmp_path, capsys):
    for number in range(3):
        write_file(tmp_path / "in" / f"{number}.jsonl", pack_lines([{"text": text(n, 5)} for n in range(40)] + [b"{"]))
    arguments = ["--input", tmp_path / "in", "--tokenizer", words, "--context_length", 16, "--num_workers"]
    for workers in (2, 1):
        assert tool().main([*map(str, [*arguments, workers, "--output", tmp_path / str(workers)])]) == 0
    printed = capsys.readouterr().out
    assert "rejected in/0.jsonl:41: not JSON" in printed and "45 rows of 16 tokens" in printed and "share of tokens" in printed
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two
    assert tool().main([*map(str, [*arguments, 2, "--output", tmp_path / "2"])]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_what_a_user_can_mend(words, tmp_path, capsys):
    source = write_file(tmp_path / "a.jsonl", pack_lines([{"text": text(1, 3)}]))
    write_file(tmp_path / "media" / "state" / "lock", b"")
    write_file(tmp_path / "media" / "samples.jsonl", b"")
    for inputs, changes, message in (
        ([tmp_path / "none"], {}, "none does not exist"),
        ([words], {}, "holds no file that ends in .jsonl, "),
        ([source, tmp_path], {}, "both hold"),
        ([source], {"tokenizer": tmp_path}, "is neither a SentencePiece"),
        ([source], {"end_of_document": "<x>"}, "is no special token"),
        ([source], {"output": tmp_path / "media"}, "holds a dataset of tools/preprocess_video.py"),
        ([source], {"documents": tmp_path / "out"}, "is --output itself"),
        ([source], {"output": source}, "is a file"),
    ):
        settings = {"tokenizer": words, "output": tmp_path / "out"} | changes
        with pytest.raises(PreprocessError, match=message):
            preprocess_text(options(inputs, settings.pop("tokenizer"), settings.pop("output"), **settings))
    arguments = ["--input", source, "--tokenizer", words, "--output", tmp_path / "out"]
    assert tool().main([*map(str, [*arguments, "--context_length", 100])]) == 1
    assert "4 tokens are less than one row" in capsys.readouterr().err and not (tmp_path / "out" / "dataset.json").exists()
    for wrong in (["--context_length", "1"], ["--context_length", "8", "--long_share", "1.5"], []):
        with pytest.raises(SystemExit, match="2"):
            tool().main([*map(str, arguments), *wrong])
    with pytest.raises(SystemExit, match="0"):
        tool().main(["--help"])
    assert "A worked example" in capsys.readouterr().out


def test_a_file_that_changes_while_it_is_read(words, tmp_path, monkeypatch):
    source = write_file(tmp_path / "a.jsonl", pack_lines([{"text": text(1, 30)}]))

    def growing(task, real=module.tokenise):
        write_file(source, pack_lines([{"text": text(1, 31)}]))
        return real(task)

    monkeypatch.setattr(module, "tokenise", growing)
    with pytest.raises(PreprocessError, match="a.jsonl changed while it was read"):
        preprocess_text(options([source], words, tmp_path / "out"))
    monkeypatch.undo()
    assert preprocess_text(options([source], words, tmp_path / "out")).num_rows == 4
    assert len(list((tmp_path / "out" / "documents").glob("*.*"))) == 3
