"""Megatron's indexed format written by hand: the bytes are those of Megatron's builder, and Megatron reads them."""

import numpy as np
import pytest

from megatron_longvila.data.indexed import IndexedWriter, read_lengths, token_dtype
from megatron_longvila.platform import mcore  # noqa: F401  (imported first: its fixes)

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder  # isort: skip


@pytest.mark.parametrize("documents", [[], [[3]], [[4, 1], [5], [], [2, 0, 7]]], ids=["none", "one", "several"])
@pytest.mark.parametrize("vocab_size", [32_000, 152_064])
def test_bytes_of_megatron(tmp_path, documents, vocab_size):
    dtype = token_dtype(vocab_size)
    ours, theirs = IndexedWriter(tmp_path / "ours.bin", dtype), IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    tokens = np.random.default_rng(0).integers(vocab_size, size=100)
    for lengths in documents:
        for writer in (ours, theirs):
            writer.add_document(tokens[: sum(lengths)], lengths)
    ours.finish(tmp_path / "ours.idx")
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    lengths, found = read_lengths(tmp_path / "ours.idx")
    assert lengths.tolist() == sum(documents, []) and lengths.dtype == np.int32 and found is dtype
    if documents:
        read = IndexedDataset(str(tmp_path / "ours"), mmap=True)
        assert read[0].tolist() == tokens[: documents[0][0]].tolist() and read.index.dtype is dtype


def test_types_of_megatron():
    for vocab_size in (1, 65_499, 65_500, 65_501, 65_536, 152_064):
        assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:20], lambda data: b"x" + data[1:], lambda data: data[:17] + b"\x09" + data[18:]]
)
def test_a_file_that_is_no_index(tmp_path, damage):
    writer = IndexedWriter(tmp_path / "a.bin", np.uint16)
    writer.add_document(np.arange(4), [4])
    writer.finish(tmp_path / "a.idx")
    (tmp_path / "a.idx").write_bytes(damage((tmp_path / "a.idx").read_bytes()))
    with pytest.raises(ValueError, match="a.idx is no index of tokens"):
        read_lengths(tmp_path / "a.idx")
