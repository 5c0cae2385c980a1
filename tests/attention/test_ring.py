"""Which queries meet which keys on the ring, as sets of integers: no tensors, no ranks."""

import numpy as np
import pytest

from megatron_longvila.attention.blocks import Scattered, fits_as_gathered, gathered_blocks, own_blocks, sent_rows, visiting_blocks
from megatron_longvila.parallel.plan import SequenceLayout, pad_samples, share_order


def _pairs(block, query_rows, key_rows):
    """(query, key) positions in the padded pack of one block; with `causal`, keys of the query's own sample up to its place in the list."""
    queries, keys = query_rows[_taken(block.q)], key_rows[_taken(block.k)]
    lengths, key_lengths = block.lengths or (len(queries),), block.key_lengths or (len(keys),)
    sample, key_sample = (np.repeat(np.arange(len(sizes)), sizes) for sizes in (lengths, key_lengths))
    return [
        (query, key)
        for i, query in enumerate(queries)
        for j, key in enumerate(keys)
        if sample[i] == key_sample[j] and (not block.causal or j <= i)
    ]


def _taken(rows):
    return rows.rows if isinstance(rows, Scattered) else rows


def _wanted(layout, rank):
    """All (query, key) pairs of a share, from the definition: same sample, key not after query."""
    sample = np.repeat(np.arange(len(layout.sample_lengths)), layout.sample_lengths)
    rows = range(layout.total_rows)
    return sorted((query, key) for query in share_order(layout, rank) for key in rows if sample[query] == sample[key] and key <= query)


def _received(layout, share, source, reader):
    """Positions in the padded pack of the rows that `source` sends to `reader`."""
    return share[_taken(sent_rows(layout, source, reader))]


@pytest.mark.parametrize("ring_size", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [(9,), (1,), (13, 1, 6), (29, 3)])
@pytest.mark.parametrize(("tile", "short"), [(None, 0), (1, 0), (4, 0), (None, 14), (4, 6), (4, 1 << 20)])
def test_blocks_meet_every_pair_exactly_once(ring_size, lengths, tile, short):
    layout = pad_samples(lengths, ulysses_size=2, ring_size=ring_size)
    shares = [share_order(layout, rank) for rank in range(ring_size)]
    pack = np.concatenate(shares) if fits_as_gathered(layout) else np.arange(layout.total_rows)
    for rank in range(ring_size):
        own = [pair for block in own_blocks(layout, tile, short) for pair in _pairs(block, shares[rank], shares[rank])]
        gathered = [pair for block in gathered_blocks(layout, rank, tile, short) for pair in _pairs(block, shares[rank], pack)]
        visiting = [
            pair
            for source in range(ring_size)
            if source != rank
            for block in visiting_blocks(layout, rank, source, tile, short)
            for pair in _pairs(block, shares[rank], _received(layout, shares[source], source, rank))
        ]
        # sorted lists, not sets: a pair counted twice must be seen
        assert sorted(own + gathered) == _wanted(layout, rank)
        assert sorted(own + visiting) == _wanted(layout, rank)


def test_zigzag_gives_every_rank_the_same_work():
    layout = SequenceLayout(ring_size=4, ulysses_size=1, sample_lengths=(64, 16))

    def num_pairs(rank):
        whole = sum((block.q.stop - block.q.start) * (block.k.stop - block.k.start) for block in gathered_blocks(layout, rank))
        return whole + sum((n := block.q.stop - block.q.start) * (n + 1) // 2 for block in own_blocks(layout))

    work = [num_pairs(rank) for rank in range(4)]
    assert len(set(work)) == 1 and sum(work) == 64 * 65 // 2 + 16 * 17 // 2


@pytest.mark.parametrize("short", [0, 4])
def test_the_keys_of_two_rectangles_never_overlap(short):
    # Their gradients are written, not added, into one buffer.
    layout = SequenceLayout(ring_size=4, ulysses_size=1, sample_lengths=(64, 16, 8))
    for rank in range(4):
        keys = [key for block in gathered_blocks(layout, rank, short=short) for key in np.arange(layout.total_rows)[_taken(block.k)]]
        assert len(keys) == len(set(keys))


def test_rectangles_of_short_neighbours_are_one_call():
    layout = SequenceLayout(ring_size=4, ulysses_size=1, sample_lengths=(16, 8, 64, 8, 16))
    found = [(block.lengths, block.key_lengths) for block in gathered_blocks(layout, 1, short=7)]
    long = [((), ())] * 2
    assert found == [((4, 2), (2, 1)), ((2, 1), (8, 4)), *long, ((2, 4), (1, 2)), ((1, 2), (4, 8))]
    assert [len(visiting_blocks(layout, 1, source, short=4)) for source in (0, 2, 3)] == [3, 3, 3]


def test_no_row_is_sent_that_nobody_looks_at():
    layout = SequenceLayout(ring_size=4, ulysses_size=1, sample_lengths=(64, 16, 8))
    for source, reader in ((source, reader) for source in range(4) for reader in range(4) if source != reader):
        share, needed = share_order(layout, source), {key for _, key in _wanted(layout, reader)}
        received = _received(layout, share, source, reader).tolist()
        assert received == [row for row in share.tolist() if row in needed]


def test_a_long_sample_is_cut_into_tiles_and_a_short_one_is_not():
    layout = SequenceLayout(ring_size=1, ulysses_size=1, sample_lengths=(8, 10))
    shapes = [(block.q.start, block.q.stop, block.k.start, block.k.stop, block.causal) for block in own_blocks(layout, 4)]
    causal = [(0, 8, 0, 8), (8, 12, 8, 12), (12, 16, 12, 16), (16, 18, 16, 18)]
    assert shapes == [*((*block, True) for block in causal), (12, 18, 8, 12, False), (16, 18, 12, 16, False)]


def test_short_neighbours_are_one_block_and_a_lone_one_is_not():
    layout = SequenceLayout(ring_size=1, ulysses_size=1, sample_lengths=(3, 2, 9, 4, 12, 1, 1))
    blocks = [(block.q.start, block.q.stop, block.lengths) for block in own_blocks(layout, short=4)]
    assert blocks == [(0, 5, (3, 2)), (5, 14, ()), (14, 18, ()), (18, 30, ()), (30, 32, (1, 1))]


@pytest.mark.parametrize(("shortest", "longest", "total"), [(64, 512, 16384), (1024, 65536, 131072)])
@pytest.mark.parametrize("ring_size", [2, 4])
def test_packs_cost_a_ring_little_more_than_they_need(ring_size, shortest, longest, total):
    """What cuDNN computes, its blocks rounded up to 256 rows, of documents of log-uniform length, and how even that is over ranks."""
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) < total:
        lengths.append(min(int(np.exp(rng.uniform(np.log(shortest), np.log(longest)))), total - sum(lengths)))
    layout = pad_samples(tuple(lengths), ulysses_size=1, ring_size=ring_size)

    def executed(block):
        if block.lengths:
            pairs = zip(block.lengths, block.key_lengths, strict=True)
            return sum(rows * (rows + 1) // 2 if block.causal else rows * keys for rows, keys in pairs)
        rows = -(-(block.q.stop - block.q.start) // 256) * 256
        return rows * rows // 2 if block.causal else rows * (block.k.stop - block.k.start)

    blocks = [[*own_blocks(layout, short=4096), *gathered_blocks(layout, rank, short=4096)] for rank in range(ring_size)]
    work = [sum(map(executed, of_rank)) for of_rank in blocks]
    assert max(work) <= 1.01 * sum(work) / ring_size
    assert sum(work) <= 1.03 * sum(length * (length + 1) // 2 for length in lengths)
