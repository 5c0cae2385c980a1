"""What the inspection says is what training does: counts, broken samples, tokens and labels, times, the plan. And its page is safe."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from media import image_bytes, video_bytes, write_frames
from PIL import Image
from programs import load_script
from tiny_datasets import TinyDataset, tiny_config

from megatron_longvila.config import ParallelConfig
from megatron_longvila.data.index import SampleIndex
from megatron_longvila.data.inspection import find_broken_media, histogram, summarise
from megatron_longvila.data.inspection_page import clock, escape, render
from megatron_longvila.data.inspection_views import SampleViewer
from megatron_longvila.data.mixture import UNUSABLE, RowSchedule
from megatron_longvila.data.preprocess import Options, preprocess
from megatron_longvila.data.shards import open_dataset
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.mesh import Mesh
from megatron_longvila.parallel.plan import IGNORE_INDEX, PLACEHOLDER_ID

HOSTILE = "</span><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" \u202e reversed \x07 bell"
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "section", "table", "tr", "th", "td", "span", "dl",
    "dt", "dd", "figure", "figcaption", "img", "br", "details", "summary",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset on disk: two videos (one turned, one with a hostile name and text), frames with an image, text alone, one too long."""
    root = tmp_path_factory.mktemp("inspected")
    media = root / "media"
    media.mkdir()
    (media / "a & <b>.mp4").write_bytes(video_bytes(range(40)))
    (media / "turned.mp4").write_bytes(video_bytes(range(100, 130), rotation=90))
    (media / "picture.png").write_bytes(image_bytes(7))
    write_frames(media / "frames", range(10))

    def talk(question: str, answer: str) -> list[dict]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    rows = [
        {"id": HOSTILE, "video": "a & <b>.mp4", "conversations": talk(f"<video>\n{HOSTILE}", HOSTILE)},
        {"id": "turned", "video": "turned.mp4", "conversations": talk("<video>\nWhich way?", "Up.")},
        {"id": "both", "video": "frames", "fps": 2, "image": "picture.png", "conversations": talk("<image> and <video>", "Same.")},
        {"id": "text", "conversations": talk("Speak.", "Words.")},
        {"id": "long", "conversations": talk("long " * 900, "Too long.")},
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    preprocess(Options(root / "rows.jsonl", media, root / "dataset", num_workers=1))
    return root


def make_viewer(datasets: list, tokenizer, mesh: Mesh, **settings) -> tuple[SampleViewer, np.ndarray]:
    config = tiny_config(**settings)
    index = SampleIndex(datasets, tokenizer, config.data, tokens_per_frame=config.model.tokens_per_frame, vocab_size=1024)
    lengths, reasons = index.measure(range(len(index)))
    too_long = index.too_long(lengths)
    lengths[list(too_long)] = UNUSABLE
    schedule = RowSchedule(lengths, config.data.context_length, seed=0, epochs=1)
    return SampleViewer(index, tokenizer, config, mesh, reasons | too_long, schedule), lengths


def test_histogram_bins_double():
    assert histogram([]) == []
    assert histogram([0, 0.5, 1, 2, 3, 4, 7.99, 8]) == [(0, 1, 2), (1, 2, 1), (2, 4, 2), (4, 8, 2), (8, 16, 1)]
    assert histogram([5]) == [(4, 8, 1)]


def test_counts_and_broken_samples(bpe_folder):
    dataset = TinyDataset([[3], [9], [], [0], [6, 0]])
    viewer, lengths = make_viewer([dataset], load_tokenizer(bpe_folder), Mesh(1, 1, 1, 1, 1))
    index, rows = viewer.index, viewer.schedule.num_rows
    summary = summarise(index, np.arange(5), np.array([0, 1, 2, 3, 4, 1]), lengths, {2: "bad"}, num_rows=rows, context_length=64)
    counts = summary.counts
    assert (counts["samples"], counts["samples of an epoch"], counts["samples of text alone"]) == (5, 6, 1)
    assert counts["frames of an epoch"] == 3 + 6 + 0 + 1 + 7 + 6  # at most 6 of a video, and sample 1 is drawn twice
    assert counts["tokens of an epoch"] == lengths.sum() + lengths[1]
    assert (counts["media: frames"], counts["media: image"]) == (3, 2)
    assert summary.histograms["frames of a sample"] == [(0, 1, 1), (1, 2, 1), (2, 4, 1), (4, 8, 2)]
    dataset.broken.add(dataset.medium_of(3))
    found = find_broken_media(index, range(5), viewer.config, decode=False, num_workers=1)
    assert [(one.id, one.line, "is broken on purpose" in one.reason) for one in found] == [("sample-3", 4, True)]
    assert [(one.number, one.reason) for one in summary.with_broken(found).broken] == [(2, "bad"), (3, found[0].reason)]


def test_frames_that_do_not_decode_are_found_by_decoding(bpe_folder):
    dataset = TinyDataset([[4], [4]])
    dataset.bad_frames.add((dataset.medium_of(1), 2))
    viewer, _ = make_viewer([dataset], load_tokenizer(bpe_folder), Mesh(1, 1, 1, 1, 1))
    found = find_broken_media(viewer.index, range(2), viewer.config, decode=True, num_workers=1)
    assert [one.id for one in found] == ["sample-1"] and "1 of 4 frames" in found[0].reason
    view = next(viewer.views([1]))
    assert [frame.is_replaced for frame in view.frames] == [False, False, True, False] and "1 of 4 frames" in view.problem


@pytest.mark.parametrize("mesh", [Mesh(1, 1, 1, 1, 1), Mesh(2, 1, 1, 2, 1), Mesh(8, 2, 1, 2, 2)], ids=str)
def test_a_view_is_what_training_sees(bpe_folder, mesh):
    tokenizer = load_tokenizer(bpe_folder)
    viewer, lengths = make_viewer([TinyDataset([[3], [9], [], [0], [6, 0]])], tokenizer, mesh, context_length=512)
    for number, view in enumerate(viewer.views(range(5))):
        encoded = viewer.index.encode(number)
        ids = [token_id for token in view.tokens for token_id in [token.token_id] * token.count]
        assert ids == encoded.input_ids_L.tolist() and not view.problem
        trained = [
            position for token in view.tokens if token.is_trained for position in range(token.position, token.position + token.count)
        ]
        assert trained == (np.flatnonzero(encoded.labels_L != IGNORE_INDEX) + 1).tolist()
        assert [token.position for token in view.tokens if token.token_id == PLACEHOLDER_ID] == list(encoded.frame_starts)
        assert sorted(p for rank in view.ranks for piece in rank.owns for p in piece) == list(range(int(lengths[number])))
        encoders = {frame: rank.cp_rank for rank in view.ranks for frame in rank.encodes}
        assert [encoders[frame] for frame in range(len(view.frames))] == [frame.cp_rank for frame in view.frames]
        assert len(view.ranks) == mesh.cp_size
        assert sum(rank.sends for rank in view.ranks) == sum(rank.receives for rank in view.ranks)


def test_times_and_pictures_of_real_videos(folder, bpe_folder):
    viewer, _ = make_viewer([open_dataset(folder / "dataset")], load_tokenizer(bpe_folder), Mesh(1, 1, 1, 1, 1), context_length=512)
    hostile, turned, both, text, long = viewer.views(range(5))
    assert [frame.index for frame in hostile.frames] == [0, 8, 16, 23, 31, 39]
    assert [frame.time_s for frame in hostile.frames] == pytest.approx([0, 0.8, 1.6, 2.3, 3.1, 3.9])
    assert [frame.time_s for frame in both.frames] == [None, 0.0, 1.0, 2.0, 2.5, 3.5, 4.5]
    assert all(frame.jpeg.startswith(b"\xff\xd8") for view in (hostile, turned, both) for frame in view.frames)
    assert turned.media[0].rotation == 90 and not text.frames
    assert "data.context_length=512" in long.problem and not long.tokens and long.row == -1


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        for name, value in attrs:
            assert name not in ("src", "href") or value.startswith("data:image/jpeg;base64,")

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_runs_nothing_and_loads_nothing(folder, bpe_folder, tmp_path, capsys):
    tool = load_script(Path(__file__).parents[2] / "tools" / "inspect_dataset.py")
    flags = ["--data.train", json.dumps([str(folder / "dataset")]), "--data.tokenizer", str(bpe_folder), "--model.llm.vocab_size", "1024"]
    tiny = Path(__file__).parents[2] / "examples" / "models" / "tiny.yaml"
    words = ["--output", str(tmp_path / "look"), "--config", str(tiny), *flags, "--parallel.ulysses_size", "2", "--check", "decode"]
    assert tool.main(words) == tool.BROKEN
    assert "1 broken samples" in capsys.readouterr().out
    broken = [json.loads(line) for line in (tmp_path / "look" / "broken.jsonl").read_text().splitlines()]
    assert [(one["id"], one["line"]) for one in broken] == [("long", 5)]
    assert json.loads((tmp_path / "look" / "summary.json").read_text())["counts"]["samples"] == 5
    source = (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(source)
    assert page.tags == TAGS and page.attributes <= {"lang", "charset", "http-equiv", "content", "class", "style", "title", "alt", "src"}
    assert "default-src &#x27;none&#x27;" in source and not re.search("https?://|url\\(|@import", source)
    shown = HOSTILE.replace("\u202e", "\u27e8U+202E\u27e9").replace("\x07", "\u27e8U+0007\u27e9")
    assert "".join(page.text).count(shown) >= 3  # its id, the question and the answer, to the letter

    assert tool.main([*words, "--ids", "nobody"]) == 1
    assert "'nobody'" in capsys.readouterr().err
    assert tool.main([*words, "--ids", "text", "--check", "none"]) == tool.BROKEN
    assert "Words" in (tmp_path / "look" / "index.html").read_text() and "turned" not in (tmp_path / "look" / "index.html").read_text()


@pytest.mark.end_to_end
def test_chromium_draws_the_page_and_runs_nothing(folder, bpe_folder, tmp_path):
    """What a browser makes of it: no script has run, every picture has loaded, and the colours of trained tokens and ranks are there."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: sudo apt-get install chromium")
    viewer, lengths = make_viewer([open_dataset(folder / "dataset")], load_tokenizer(bpe_folder), Mesh(2, 1, 1, 2, 1), context_length=512)
    summary = summarise(viewer.index, np.arange(5), np.arange(5), lengths, viewer.reasons, num_rows=1, context_length=512)
    views = list(viewer.views(range(5)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]

    def draw(name: str, shown: list) -> tuple[Path, np.ndarray]:
        page, picture = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        page.write_text("".join(render(HOSTILE, {HOSTILE: HOSTILE}, summary, viewer.mesh, shown)), encoding="utf-8")
        words = [browser, *flags, "--window-size=1320,8000", f"--screenshot={picture}", page.as_uri()]
        subprocess.run(words, check=True, capture_output=True, timeout=300)
        pixels_HW3 = np.asarray(Image.open(picture).convert("RGB"))
        assert pixels_HW3.shape == (8000, 1320, 3)
        return page, pixels_HW3

    (page, full_HW3), (_, bare_HW3) = draw("page", views), draw("bare", [])

    def more(*colour: int) -> float:
        """Share of the page in a colour, less what the key above the samples has of it."""
        full, bare = ((np.abs(one.astype(int) - colour).max(axis=2) <= 3).mean() for one in (full_HW3, bare_HW3))
        return float(full - bare)

    assert more(0xB6, 0xE3, 0xB4) > 1e-4  # trained tokens
    assert more(0xFF, 0xF0, 0xEE) > 1e-4  # the problem of the sample that is too long
    assert all(more(*colour) > 1e-4 for colour in ((44, 99, 150), (150, 95, 44)))  # the two ranks: hsl(210 55% 38%), hsl(30 55% 38%)
    tree = subprocess.run([browser, *flags, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=300, text=True).stdout
    assert "<script" not in tree and "onerror=alert(1)&gt;" in tree
    assert tree.count("<img") == sum(len(view.frames) for view in views)


def test_escape_shows_what_would_hide_or_reorder():
    assert escape("<a b=\"c\" d='e'>&") == "&lt;a b=&quot;c&quot; d=&#x27;e&#x27;&gt;&amp;"
    assert escape("a\u202eb\u200b\ud800\0") == "a\u27e8U+202E\u27e9b\u27e8U+200B\u27e9\u27e8U+D800\u27e9\u27e8U+0000\u27e9"
    assert escape("\u4f60\u597d caf\u00e9\n") == "\u4f60\u597d caf\u00e9\u21b5\n"
    assert [clock(seconds) for seconds in (0, 61.0004, 3599.9996, 7325.25)] == ["0:00.000", "1:01.000", "1:00:00.000", "2:02:05.250"]


def test_the_mesh_is_one_replica():
    tool = load_script(Path(__file__).parents[2] / "tools" / "inspect_dataset.py")
    config = tiny_config()
    parallel = ParallelConfig(tp_size=2, ulysses_size=2, ring_size=3)
    model = replace(config.model, llm=replace(config.model.llm, num_attention_heads=8, num_query_groups=4))
    mesh = tool.find_mesh(replace(config, parallel=parallel, model=model))
    assert (mesh.world_size, mesh.cp_size, mesh.dp_size) == (12, 6, 1)
