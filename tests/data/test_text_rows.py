"""Rows of text in the loader: exact labels and positions, attended whole or by document, beside video, under every layout."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from text_files import options, pack_lines, text, write_file, write_words
from tiny_datasets import TinyDataset, tiny_config

from megatron_longvila.config_check import check_inputs
from megatron_longvila.data.index import SampleIndex
from megatron_longvila.data.loader import Loader, Place
from megatron_longvila.data.output import PreprocessError
from megatron_longvila.data.preprocess import Options, preprocess
from megatron_longvila.data.preprocess_text import preprocess_text
from megatron_longvila.data.shards import open_dataset
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.parallel.plan import IGNORE_INDEX
from ranks import run_ranks

ROW = 16
VIDEO_SHAPES = [[3], [], [2], [4], [1]]
WORDS = "shape colour is the"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Documents of 4 to 30 tokens in rows of ROW: some documents cross rows, some rows hold several."""
    root = tmp_path_factory.mktemp("text")
    write_words(root / "words.model")
    source = write_file(root / "a.jsonl", pack_lines([{"text": text(n, 3 + 5 * n % 27)} for n in range(12)]))
    preprocess_text(options([source], root / "words.model", root / "rows", context_length=ROW))
    return root


def load(folder: Path, *, video: bool = False, place: Place | None = None, evaluation: bool = False, **settings) -> Loader:
    settings = {"context_length": ROW, "epochs": 1} | settings
    datasets = [open_dataset(folder / "rows")] + ([TinyDataset(VIDEO_SHAPES, words=WORDS)] if video else [])
    return Loader(tiny_config(**settings), place or Place(), datasets, load_tokenizer(folder / "words.model"), evaluation=evaluation)


def batches_of(loader: Loader) -> list:
    return [batch for step in loader for batch in step if batch.sample_ids]


def whole_row(batches: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and positions of a row, put together from its cp ranks; shares without padding."""
    length = batches[0].num_tokens
    columns = [np.full(length, -7) for _ in range(3)]
    for batch in batches:
        real = batch.plan.row_source_T >= 0
        for column, part in zip(columns, (batch.input_ids_T, batch.labels_T, batch.positions_T), strict=True):
            column[batch.plan.row_source_T[real]] = part.numpy()[real]
    assert all((column != -7).all() for column in columns)
    return tuple(columns)


def expected(dataset, number: int, attention: str) -> tuple[list, list, list]:
    """Ids, labels and positions of a text row, written out token by token."""
    pieces = [piece.tolist() for piece in dataset.pieces(number)]
    if attention == "row":
        pieces = [sum(pieces, [])]
    ids, labels, positions = [], [], []
    for piece in pieces:
        for position, token in enumerate(piece):
            ids.append(token)
            labels.append(piece[position + 1] if position + 1 < len(piece) else IGNORE_INDEX)
            positions.append(position)
    return ids, labels, positions


@pytest.mark.parametrize("attention", ["row", "document"])
@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda mesh: "ulysses{} ring{}".format(*mesh))
def test_labels_and_positions_token_by_token(folder, attention, mesh):
    dataset, (ulysses_size, ring_size) = open_dataset(folder / "rows"), mesh
    places = [Place(cp_rank=rank, ulysses_size=ulysses_size, ring_size=ring_size) for rank in range(ulysses_size * ring_size)]
    ranks = [batches_of(load(folder, place=place, text_attention=attention, global_batch_size=3)) for place in places]
    assert len(ranks[0]) == len(dataset) > 5
    seen = set()
    for parts in zip(*ranks, strict=True):
        (name,) = parts[0].sample_ids
        number = int(name.removeprefix("row-"))
        seen.add(number)
        assert all((found == wanted).all() for found, wanted in zip(whole_row(parts), expected(dataset, number, attention), strict=True))
        pieces = [len(piece) for piece in dataset.pieces(number)] if attention == "document" else [ROW]
        assert parts[0].sample_lengths == tuple(pieces) and parts[0].num_tokens == ROW and not len(parts[0].frames)
        # What attention sees: a stretch of the padded row per piece, so nothing is attended across pieces.
        padded = [-(-length // (2 * ring_size)) * 2 * ring_size if ring_size > 1 else length for length in pieces]
        assert parts[0].plan.layout.sample_lengths[: len(pieces)] == tuple(padded)
    assert seen == set(range(len(dataset)))
    assert attention == "row" or any(len(parts.sample_lengths) > 2 for parts in ranks[0])


@pytest.mark.parametrize("attention", ["row", "document"])
def test_text_and_video_share_rows_and_failures_stay_apart(folder, attention):
    settings = {"context_length": 3 * ROW, "global_batch_size": 2, "text_attention": attention}
    video = TinyDataset(VIDEO_SHAPES, words=WORDS)
    video.broken.add(video.medium_of(0))
    dataset = open_dataset(folder / "rows")
    loader = Loader(tiny_config(epochs=1, **settings), Place(), [dataset, video], load_tokenizer(folder / "words.model"))
    batches = batches_of(loader)
    ids = [name for batch in batches for name in batch.sample_ids]
    assert Counter(ids) == Counter([f"row-{n}" for n in range(len(dataset))] + [f"sample-{n}" for n in range(5)])
    (mixed,) = [batch for batch in batches if "sample-0" in batch.sample_ids]
    assert mixed.skipped == ("sample-0",) and any(name.startswith("row-") for name in mixed.sample_ids)
    index = SampleIndex(
        [dataset, video], load_tokenizer(folder / "words.model"), tiny_config(**settings).data, tokens_per_frame=1, vocab_size=1024
    )
    for batch in batches:
        input_ids, labels, positions = whole_row([batch])
        start = 0
        for name in batch.sample_ids:
            kind, number = name.split("-")
            if kind == "row":
                wanted = expected(dataset, int(number), attention)
                found = [column[start : start + ROW].tolist() for column in (input_ids, labels, positions)]
                assert found == list(wanted)
                start += ROW
            else:
                sample = index.encode(len(dataset) + int(number))
                stop = start + len(sample)
                silent = np.full(len(sample), IGNORE_INDEX) if name in batch.skipped else sample.labels_L
                assert labels[start:stop].tolist() == silent.tolist() and positions[start:stop].tolist() == list(range(len(sample)))
                start = stop
        assert start == batch.num_tokens


def same(left, right) -> bool:
    return left.sample_ids == right.sample_ids and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in ("frames", "input_ids_T", "labels_T", "positions_T")
    )


def test_resume_goes_on_and_belongs_to_its_data(folder):
    settings = {"video": True, "context_length": 2 * ROW, "global_batch_size": 1, "epochs": 2}
    whole = batches_of(load(folder, **settings))
    for stop in (1, len(whole) // 2, len(whole) - 1):
        first = load(folder, **settings)
        iterator = iter(first)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(first.state_dict()))
        iterator.close()
        second = load(folder, **settings)
        second.load_state_dict(state)
        assert all(same(*pair) for pair in zip(whole[stop:], batches_of(second), strict=True))
    with pytest.raises(ValueError, match="text_attention: row in the checkpoint, document now"):
        load(folder, text_attention="document", **settings).load_state_dict(state)
    with pytest.raises(ValueError, match="index: "):
        load(folder, **settings | {"video": False}).load_state_dict(state)


def test_a_position_without_text_rows_says_nothing_of_their_attention(folder):
    video, tokenizer = TinyDataset(VIDEO_SHAPES, words=WORDS), load_tokenizer(folder / "words.model")
    states = [
        Loader(tiny_config(context_length=32, epochs=1, text_attention=attention), Place(), [video], tokenizer).state_dict()
        for attention in ("row", "document")
    ]
    assert states[0] == states[1] and "text_attention" not in states[0]["data"]


def test_lengths_are_known_without_tokenising_or_a_cache(folder, monkeypatch):
    before = sorted(folder.joinpath("rows").iterdir())
    tokenizer = load_tokenizer(folder / "words.model")
    monkeypatch.setattr(type(tokenizer), "encode", None)
    loader = Loader(tiny_config(context_length=ROW, epochs=1), Place(), [open_dataset(folder / "rows")], tokenizer)
    assert loader.num_rows == len(open_dataset(folder / "rows")) == len(batches_of(loader))
    assert sorted(folder.joinpath("rows").iterdir()) == before


def test_evaluation_reads_the_rows_in_order(folder):
    loader = load(folder, evaluation=True, global_batch_size=2)
    for _ in range(2):
        assert [name for batch in batches_of(loader) for name in batch.sample_ids] == [f"row-{n}" for n in range(loader.num_rows)]
    assert len(batches_of(load(folder, evaluation=True, evaluation_rows=3))) == 3


def test_what_rows_were_not_made_for(folder, tmp_path):
    with pytest.raises(ValueError, match="rows of 16 tokens, more than data.context_length=12; set --data.context_length 16"):
        load(folder, context_length=12)
    other = write_words(tmp_path / "other.model")
    other.write_bytes(other.read_bytes() + b"\x9a\x06\x00")  # an empty unknown field: the same words, another file
    dataset = open_dataset(folder / "rows")
    with pytest.raises(ValueError, match=r"was tokenised with .*words.model \(sha256 [0-9a-f]{16}\), but data.tokenizer='' has sha256 "):
        Loader(tiny_config(context_length=ROW), Place(), [dataset], load_tokenizer(other))
    config = tiny_config(context_length=ROW)
    config = replace(config, model=replace(config.model, llm=replace(config.model.llm, vocab_size=20)))
    with pytest.raises(ValueError, match=f"token id {dataset.header.largest_id}, which is outside model.llm.vocab_size=20"):
        Loader(config, Place(), [dataset], load_tokenizer(folder / "words.model"))
    # Text rows have no chat turns, so they ask no chat tokens of the tokenizer.
    config = tiny_config(context_length=ROW, template="chatml")
    assert Loader(config, Place(), [dataset], load_tokenizer(folder / "words.model")).num_rows


def test_folders_that_were_changed(folder, tmp_path):
    def broken(change) -> Path:
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        copy.mkdir()
        for path in (folder / "rows").iterdir():
            if path.is_file():
                (copy / path.name).write_bytes(path.read_bytes())
        change(copy)
        return copy

    def edit(**changes):
        return lambda copy: (copy / "dataset.json").write_text(json.dumps(json.loads((copy / "dataset.json").read_text()) | changes))

    def flip(copy):
        data = bytearray((copy / "rows.idx").read_bytes())
        data[40] ^= 1
        (copy / "rows.idx").write_bytes(data)

    open_dataset(broken(lambda copy: None))
    for change, message in (
        (lambda copy: (copy / "dataset.json").unlink(), "has no dataset.json"),
        (lambda copy: (copy / "rows.bin").unlink(), "rows.bin is missing; run tools/preprocess_text.py again"),
        (lambda copy: (copy / "rows.bin").write_bytes(b"0"), "rows.bin has 1 bytes"),
        (flip, "rows.idx was changed"),
        (edit(version=9), "has version 9"),
        (lambda copy: (copy / "dataset.json").write_text('{"kind": "text", "version": 1, "hash": ""}'), "is damaged"),
        (lambda copy: (copy / "dataset.json").write_text("[]"), "is damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(broken(change))
    with pytest.raises(PreprocessError, match="holds a dataset of tools/preprocess_text.py"):
        write_file(tmp_path / "rows.jsonl", b"")
        preprocess(Options(tmp_path / "rows.jsonl", tmp_path, folder / "rows"))


def test_opened_rows_pickle_and_pass_the_checks_of_a_run(folder):
    dataset = open_dataset(folder / "rows")
    again = pickle.loads(pickle.dumps(dataset))
    assert [piece.tolist() for piece in again.pieces(3)] == [piece.tolist() for piece in dataset.pieces(3)]
    assert [row.id for row in dataset.samples[1:3]] == ["row-1", "row-2"] and dataset.samples[-1].id == f"row-{len(dataset) - 1}"
    data = replace(tiny_config().data, train=[str(folder / "rows")], tokenizer=str(folder / "words.model"))
    check_inputs(replace(tiny_config(), data=data))


def _read_on_a_rank(rank: int, folder: Path, attention: str) -> tuple[list, dict]:
    import torch.distributed as dist

    from megatron_longvila.mesh import Mesh
    from megatron_longvila.parallel.groups import destroy_groups, initialize_groups

    groups = initialize_groups(Mesh(dist.get_world_size(), 1, 1, 1, 2), timeout_s=60)
    loader = load(
        folder,
        video=True,
        place=Place.of(groups, sequence_parallel=False),
        context_length=2 * ROW,
        text_attention=attention,
        global_batch_size=2,
    )
    rows = [(b.sample_ids, b.sample_lengths, b.plan.row_source_T, b.labels_T, b.positions_T, len(b.frames)) for b in batches_of(loader)]
    state = loader.state_dict()
    destroy_groups()
    return rows, state


@pytest.mark.parametrize("attention", ["row", "document"])
def test_two_ranks_share_rows_of_text_and_video(folder, attention):
    seen = run_ranks(_read_on_a_rank, 2, folder, attention, timeout_s=60)
    alone = load(folder, video=True, context_length=2 * ROW, text_attention=attention, global_batch_size=2)
    whole = batches_of(alone)
    assert seen[0][1] == seen[1][1] == alone.state_dict() and len(seen[0][0]) == len(seen[1][0]) == len(whole)
    for batch, *parts in zip(whole, seen[0][0], seen[1][0], strict=True):
        assert all((ids, lengths) == (batch.sample_ids, batch.sample_lengths) for ids, lengths, *_ in parts)
        assert sum(part[-1] for part in parts) == batch.num_frames
        labels, positions = np.full(batch.num_tokens, -7), np.full(batch.num_tokens, -7)
        for _, _, source_T, labels_T, positions_T, _ in parts:
            real = source_T >= 0
            labels[source_T[real]], positions[source_T[real]] = labels_T.numpy()[real], positions_T.numpy()[real]
        assert labels.tolist() == batch.labels_T.tolist() and positions.tolist() == batch.positions_T.tolist()
