"""Answers are put together rightly on every mesh, scored whole, and compared with what a blind model could reach."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_model
import torch
from tiny_datasets import TinyDataset
from tiny_tokenizers import write_sentencepiece

from megatron_longvila.config import Config, VideoConfig
from ranks import run_ranks

# Frames of each sample's media (0: an image; none: text alone). Sample 4 cannot be read.
SHAPES = [[3], [9], [], [0], [5], [2, 0], [1], [0, 0], [7]]
BROKEN = 4
MESHES = {  # tp, pp, ulysses, ring; on 4 ranks the rest is dp
    "dp4": (1, 1, 1, 1),
    "ulysses2_ring2": (1, 1, 2, 2),
    "pp2_dp2": (1, 2, 1, 1),
    "tp2_ring2": (2, 1, 1, 2),
}


def make_config(tokenizer_path, sizes=(1, 1, 1, 1), evaluation_rows: int = 0) -> Config:
    config = tiny_model.make_config(tokenizer_path, sizes)
    return replace(
        config,
        data=replace(config.data, max_bad_fraction=0.5, video=VideoConfig(num_frames=6)),
        training=replace(config.training, evaluation_rows=evaluation_rows),
    )


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tiny.model")


def open_dataset() -> TinyDataset:
    dataset = TinyDataset(SHAPES)
    dataset.broken.add(dataset.medium_of(BROKEN))
    return dataset


def open_index(config: Config, dataset: TinyDataset):
    from megatron_longvila.data.index import SampleIndex
    from megatron_longvila.data.text import load_tokenizer

    tokenizer = load_tokenizer(config.data.tokenizer)
    sizes = {"tokens_per_frame": config.model.tokens_per_frame, "vocab_size": config.model.llm.vocab_size}
    return SampleIndex([dataset], tokenizer, config.data, **sizes), tokenizer


def _evaluate(rank: int, config: Config, world_size: int, folder) -> dict:
    """Answers of the model, of one that knows everything, and of one that never ends an answer, on this mesh."""
    from megatron_longvila.data.loader import Loader, Place
    from megatron_longvila.evaluation.answers import predict_labels, score_answers
    from megatron_longvila.parallel.groups import destroy_groups
    from megatron_longvila.parallel.plan import IGNORE_INDEX
    from megatron_longvila.training.loss import predict

    model, groups = tiny_model.build(config, world_size)
    dataset = open_dataset()
    index, tokenizer = open_index(config, dataset)
    place = Place.of(groups, sequence_parallel=config.parallel.sequence_parallel)

    def all_knowing(language_model, hidden, labels_T):
        return labels_T[labels_T != IGNORE_INDEX]

    def endless(language_model, hidden, labels_T):  # the right words, but another control token instead of the end
        labels_L = all_knowing(language_model, hidden, labels_T)
        return torch.where(labels_L == tokenizer.eos_id, tokenizer.bos_id, labels_L)

    def model_says(language_model, hidden, labels_T):
        return predict(language_model, hidden, labels_T, config)

    found, frames = {}, {}
    cases = (("model", model_says, False), ("blank", model_says, True), ("all-knowing", all_knowing, False), ("endless", endless, False))
    for name, predictor, blank in cases:
        loader = Loader(config, place, [dataset], tokenizer, evaluation=True, cache_dir=folder)
        steps = list(loader)
        settings = {"predict": predictor, "global_batch_size": config.data.global_batch_size, "blank_frames": blank}
        predictions = predict_labels(model, steps, groups, **settings)
        found[name] = score_answers(predictions, loader, index, tokenizer)
        frames[name] = max([int(one.frames.max()) for step in steps for one in step if len(one.frames)], default=0)
    destroy_groups()
    return {"found": found, "frames": frames, "holds_frames": place.holds_frames}


def _alone(rank: int, config: Config) -> list[str]:
    """What the model says about each readable sample, one at a time, from logits made here."""
    from megatron_longvila.data.batch import build_micro_batch
    from megatron_longvila.data.video import decode_frames
    from megatron_longvila.parallel.groups import destroy_groups
    from megatron_longvila.parallel.plan import IGNORE_INDEX, plan_row

    model, _ = tiny_model.build(config, 1)
    dataset = open_dataset()
    index, tokenizer = open_index(config, dataset)
    said = []
    for number in range(len(SHAPES)):
        if number == BROKEN:
            continue
        row = index.row([number])
        (plan,) = plan_row(row.spec, ulysses_size=1, ring_size=1)
        frames = [np.empty((0, 4, 4, 3), np.uint8)]
        for sha256 in dataset.samples[number].media:
            media = dataset.media[sha256]
            selected = index.selected_frames(media)
            frames.append(
                decode_frames(dataset.read(media), selected, image_size=4, preprocess="resize", fast_resize=False, timeout_s=10)[0]
            )
        one = build_micro_batch(row, plan, torch.from_numpy(np.concatenate(frames)))
        with torch.no_grad():
            hidden_T1D = model(one.frames, one.input_ids_T, one.positions_T, one.plan)
            logits_TV = hidden_T1D[:, 0] @ model.language_model.output_layer.weight[:420].T
        tokens_L = logits_TV.argmax(-1)[one.labels_T != IGNORE_INDEX]
        said.append(tokenizer.decode(tokens_L.tolist()))
    destroy_groups()
    return said


@pytest.fixture(scope="module")
def alone(tokenizer_path) -> list[str]:
    (said,) = run_ranks(_alone, 1, make_config(tokenizer_path), timeout_s=60)
    return said


@pytest.mark.parametrize("name", MESHES)
def test_answers_are_the_same_on_every_mesh(name, alone, tokenizer_path, tmp_path):
    config = make_config(tokenizer_path, MESHES[name])
    ranks = run_ranks(_evaluate, 4, config, 4, tmp_path, timeout_s=100)
    assert all(one["found"] == ranks[0]["found"] for one in ranks)
    answers, skipped = ranks[0]["found"]["model"]
    assert skipped == [f"sample-{BROKEN}"]
    assert [answer.sample_id for answer in answers] == [f"sample-{number}" for number in range(len(SHAPES)) if number != BROKEN]
    assert [answer.predicted for answer in answers] == alone and len(set(alone)) > 3
    assert not any(answer.correct for answer in answers)
    assert answers[0].question == "What colour is the square?" and answers[1].expected == "red red"

    for name, correct in (("all-knowing", True), ("endless", False)):
        answers, _ = ranks[0]["found"][name]
        assert all(answer.predicted == answer.expected and answer.correct is correct for answer in answers)

    blank, _ = ranks[0]["found"]["blank"]
    with_media = [bool(SHAPES[int(answer.sample_id.removeprefix("sample-"))]) for answer in blank]
    unchanged = [one.predicted == other for one, other in zip(blank, alone, strict=True)]
    assert all(same for same, media in zip(unchanged, with_media, strict=True) if not media)
    assert not all(same for same, media in zip(unchanged, with_media, strict=True) if media)
    for one in ranks:
        if one["holds_frames"]:
            assert one["frames"]["blank"] == 0
    assert max(one["frames"]["model"] for one in ranks) == 200


def test_evaluation_rows_limit_the_questions(tokenizer_path, tmp_path):
    """Rows past the limit are padding rows of some rank and bring no answer."""
    config = make_config(tokenizer_path, (1, 1, 2, 2), evaluation_rows=1)
    answers, skipped = run_ranks(_evaluate, 4, config, 4, tmp_path, timeout_s=100)[0]["found"]["all-knowing"]
    assert 0 < len(answers) < len(SHAPES) - 1 and all(answer.correct for answer in answers) and not skipped


def make_answer(question: str, expected: str, correct: bool = True):
    from megatron_longvila.evaluation.answers import Answer

    return Answer("id", 0, question, expected, expected if correct else "nothing", correct)


def test_blind_baselines():
    """Four colours and one shape: the text gives the second away."""
    from megatron_longvila.evaluation.answers import summarise

    colours = [make_answer("what colour ?", colour, colour != "red") for colour in ("red", "red", "blue", "green")]
    shapes = [make_answer("what shape ?", "circle") for _ in range(3)]
    found = summarise(colours + shapes)
    assert (found.num_questions, found.num_correct, found.accuracy) == (7, 5, 5 / 7)
    assert found.constant_accuracy == 3 / 7  # circle to everything
    assert found.question_only_accuracy == 5 / 7  # red twice, circle three times
    with pytest.raises(ValueError, match="no answer to score"):
        summarise([])


@pytest.mark.parametrize(("successes", "trials"), [(0, 72), (12, 72), (59, 72), (72, 72), (1, 1)])
def test_wilson_interval_solves_its_equation(successes, trials):
    """Its ends are the rates p at which the observed rate lies z standard deviations away: (rate - p)^2 = z^2 p (1 - p) / n."""
    from megatron_longvila.evaluation.answers import Z_99, wilson_interval

    low, high = wilson_interval(successes, trials)
    rate = successes / trials
    assert 0 <= low <= rate <= high <= 1 and low < high
    for end in (low, high):
        assert (rate - end) ** 2 == pytest.approx(Z_99**2 * end * (1 - end) / trials, abs=1e-12)


def test_wilson_interval_covers():
    """99% of samples have the true rate in their interval; of 72 draws at rate 1/6 exactly 0.9930 (sum of the binomial)."""
    from megatron_longvila.evaluation.answers import wilson_interval

    counts = np.random.default_rng(0).binomial(72, 1 / 6, 20_000)
    covered = {count: wilson_interval(int(count), 72) for count in set(counts.tolist())}
    assert np.mean([covered[count][0] <= 1 / 6 <= covered[count][1] for count in counts.tolist()]) == pytest.approx(0.9930, abs=0.003)
