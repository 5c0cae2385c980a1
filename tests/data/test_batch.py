"""A row cut for its ranks: together they hold every token, label and frame once; padding is legal and unlabelled."""

import numpy as np
import pytest
import torch

from megatron_longvila.data.batch import PADDING_TOKEN_ID, Row, build_micro_batch, split_media
from megatron_longvila.data.conversation import Encoded
from megatron_longvila.parallel.plan import IGNORE_INDEX, PLACEHOLDER_ID, plan_row

TOKENS = 3


def sample(text: int, media: list[int], first_id: int) -> Encoded:
    """`text` tokens, then frames of 3 placeholders and a newline, then two answer tokens; labels as conversation.py would set them."""
    ids, starts, sources = list(range(first_id, first_id + text)), [], []
    for medium, frames in enumerate(media):
        for frame in range(frames):
            starts.append(len(ids))
            sources.append((medium, frame))
            ids += [PLACEHOLDER_ID] * TOKENS + [9]
    ids += [first_id + 50, first_id + 51]
    labels = [IGNORE_INDEX] * (len(ids) - 3) + [first_id + 50, first_id + 51, IGNORE_INDEX]
    return Encoded(np.array(ids), np.array(labels), tuple(starts), tuple(sources))


ROW = Row((4, 7, 1), ("a", "b", "c"), (sample(3, [2, 1], 100), sample(5, [], 200), sample(2, [4], 300)), TOKENS)


def cut(row: Row, failed=(), **mesh):
    plans = plan_row(row.spec, **mesh)
    frames = [torch.full((len(plan.frames), 2, 2, 3), 7, dtype=torch.uint8) for plan in plans]
    return plans, [build_micro_batch(row, plan, one, failed) for plan, one in zip(plans, frames, strict=True)]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_ranks_hold_every_token_once(mesh):
    plans, batches = cut(ROW, ulysses_size=mesh[0], ring_size=mesh[1], row_multiple=2)
    ids, labels = np.full(ROW.starts[-1], -7), np.full(ROW.starts[-1], -7)
    for plan, batch in zip(plans, batches, strict=True):
        real = plan.row_source_T >= 0
        assert batch.input_ids_T.dtype == batch.labels_T.dtype == batch.positions_T.dtype == torch.int64
        assert (ids[plan.row_source_T[real]] == -7).all()
        ids[plan.row_source_T[real]] = batch.input_ids_T.numpy()[real]
        labels[plan.row_source_T[real]] = batch.labels_T.numpy()[real]
        assert (batch.input_ids_T.numpy()[~real] == PADDING_TOKEN_ID).all() and (batch.labels_T.numpy()[~real] == IGNORE_INDEX).all()
        assert batch.sample_ids == ("a", "b", "c") and batch.skipped == () and batch.num_frames == 7 and batch.num_tokens == len(ids)
    assert ids.tolist() == np.concatenate([s.input_ids_L for s in ROW.samples]).tolist()
    assert labels.tolist() == np.concatenate([s.labels_L for s in ROW.samples]).tolist()


def test_no_label_crosses_into_the_next_sample():
    labels = ROW.labels_L()
    for end in ROW.starts[1:]:
        assert labels[end - 1] == IGNORE_INDEX
    assert (labels != IGNORE_INDEX).sum() == 6


def test_failed_sample_keeps_its_place_without_labels_and_with_black_frames():
    plans, batches = cut(ROW, failed={2}, ulysses_size=2, ring_size=1)
    clean_plans, clean = cut(ROW, ulysses_size=2, ring_size=1)
    for plan, batch, before in zip(plans, batches, clean, strict=True):
        assert batch.input_ids_T.tolist() == before.input_ids_T.tolist()
        assert batch.positions_T.tolist() == before.positions_T.tolist()
        of_sample = (plan.row_source_T >= ROW.starts[2]) & (plan.row_source_T < ROW.starts[3])
        assert (batch.labels_T.numpy()[of_sample] == IGNORE_INDEX).all()
        assert (batch.labels_T.numpy()[~of_sample] == before.labels_T.numpy()[~of_sample]).all()
        assert batch.skipped == ("c",)
        for offset, frame in enumerate(plan.frames):
            assert (batch.frames[offset] == (0 if frame >= 3 else 7)).all()


def test_padding_row():
    row = Row((), (), (), TOKENS)
    for mesh in ((1, 1), (2, 2)):
        _, batches = cut(row, ulysses_size=mesh[0], ring_size=mesh[1])
        for batch in batches:
            assert len(batch.input_ids_T) >= 1 and (batch.input_ids_T == PADDING_TOKEN_ID).all()
            assert (batch.labels_T == IGNORE_INDEX).all() and batch.frames.shape[0] == 0 and batch.sample_ids == ()
            assert batch.num_tokens == 0


def test_shares_of_media_cover_the_frames_of_a_rank():
    for cp_size in (1, 2, 3, 8):
        seen = []
        for plan in plan_row(ROW.spec, ulysses_size=cp_size, ring_size=1):
            shares = split_media(ROW, plan.frames)
            assert [row for share in shares for row in range(share.rows.start, share.rows.stop)] == list(range(len(plan.frames)))
            seen += [(share.place, share.medium, frame) for share in shares for frame in share.frames]
        assert seen == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (2, 0, 0), (2, 0, 1), (2, 0, 2), (2, 0, 3)]
