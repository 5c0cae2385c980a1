"""Which queries meet which keys on the ring, as sets of integers: no tensors, no ranks."""

import numpy as np
import pytest

from megatron_longvila.attention.ring import gathered_blocks, own_blocks, visiting_blocks
from megatron_longvila.parallel.plan import SequenceLayout, pad_samples, share_order


def _pairs(block, query_rows, key_rows):
    """(query, key) positions in the padded pack of one block; a causal block sees keys up to its own place in the list."""
    return [
        (query, key) for i, query in enumerate(query_rows[block.q]) for j, key in enumerate(key_rows[block.k]) if not block.causal or j <= i
    ]


def _wanted(layout, rank):
    """All (query, key) pairs of a share, from the definition: same sample, key not after query."""
    sample = np.repeat(np.arange(len(layout.sample_lengths)), layout.sample_lengths)
    rows = range(layout.total_rows)
    return sorted((query, key) for query in share_order(layout, rank) for key in rows if sample[query] == sample[key] and key <= query)


@pytest.mark.parametrize("ring_size", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [(9,), (1,), (13, 1, 6)])
def test_blocks_meet_every_pair_exactly_once(ring_size, lengths):
    layout = pad_samples(lengths, ulysses_size=2, ring_size=ring_size)
    shares = [share_order(layout, rank) for rank in range(ring_size)]
    pack = np.arange(layout.total_rows)
    for rank in range(ring_size):
        own = [pair for block in own_blocks(layout) for pair in _pairs(block, shares[rank], shares[rank])]
        gathered = [pair for block in gathered_blocks(layout, rank) for pair in _pairs(block, shares[rank], pack)]
        visiting = [
            pair
            for source in range(ring_size)
            if source != rank
            for block in visiting_blocks(layout, rank, source)
            for pair in _pairs(block, shares[rank], shares[source])
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


def test_the_keys_of_two_rectangles_never_overlap():
    # Their gradients are written, not added, into one buffer.
    layout = SequenceLayout(ring_size=4, ulysses_size=1, sample_lengths=(64, 16, 8))
    for rank in range(4):
        keys = [key for block in gathered_blocks(layout, rank) for key in range(block.k.start, block.k.stop)]
        assert len(keys) == len(set(keys))
