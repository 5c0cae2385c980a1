"""From data.mixture to batches: the same rows as data.train where nothing is weighted, and a changed mixture refused on resume."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from programs import ROOT, load_script
from tiny_datasets import tiny_config

from megatron_longvila.config_check import check_inputs
from megatron_longvila.data.loader import Loader, Place
from megatron_longvila.data.preprocess import Options, preprocess
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.data.training_data import check_mixture, open_training_data

COUNTS = {"a": 10, "b": 6, "c": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sentencepiece_file):
    """Three datasets of dialogues without media; sample c-4 is too long for any row."""
    root = tmp_path_factory.mktemp("mixtures")
    for name, count in COUNTS.items():
        answers = [" ".join(["red"] * (200 if (name, number) == ("c", 4) else 3 + number)) for number in range(count)]
        rows = [
            {"id": f"{name}-{number}", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]}
            for number, answer in enumerate(answers)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        preprocess(Options(input=root / f"{name}.jsonl", media_root=root, output=root / name, num_workers=1))
    return root


def write(folder, mixtures: str, *, a: str = "a", file: str = "mixtures.yaml"):
    subsets = "{bad: {include: ids.txt}, good: {exclude: ids.txt}, three: {first: 3}, half: {fraction: 0.5, seed: 2}}"
    (folder / "ids.txt").write_text("c-4\nc-0\n")
    (folder / file).write_text(
        f"datasets: {{{a}: a, b: {{path: b, subsets: {{two: {{count: 2}}}}}}, c: {{path: c, subsets: {subsets}}}}}\nmixtures:\n{mixtures}"
    )
    return str(folder / file)


def loader(folder, sentencepiece_file, expression="", registry="", stage="", train=(), **settings) -> Loader:
    settings = {"epochs": 2, "num_workers": 0, "context_length": 64, **settings}
    config = tiny_config(mixture=expression, registry=registry, stage=stage, train=[str(folder / name) for name in train], **settings)
    datasets, mixture = open_training_data(config.data)
    return Loader(config, Place(), datasets, load_tokenizer(sentencepiece_file), mixture=mixture)


def ids(loader: Loader) -> list[list[tuple[str, ...]]]:
    return [[batch.sample_ids for batch in step] for step in loader]


def epoch_ids(loader: Loader) -> list[Counter]:
    epochs: list[Counter] = []
    for row in range(loader.schedule.num_rows):
        epoch, _ = loader.schedule.locate(row)
        epochs += [Counter()] * (epoch + 1 - len(epochs))
        numbers = loader.schedule.row(row)
        epochs[epoch] = epochs[epoch] + Counter(loader._index.locate(int(number))[1].id for number in numbers)
    return epochs


def test_a_plain_sum_gives_the_rows_of_data_train(folder, sentencepiece_file):
    registry = write(folder, "  all: a + b + c\n")
    plain = loader(folder, sentencepiece_file, train=("a", "b", "c"))
    mixed = loader(folder, sentencepiece_file, "all", registry)
    assert ids(mixed) == ids(plain)
    assert mixed.state_dict() == plain.state_dict()  # so a run may change over
    other = loader(folder, sentencepiece_file, train=("a", "b", "c"))
    other.load_state_dict(mixed.state_dict())


def test_epochs_show_what_the_expression_says(folder, sentencepiece_file):
    registry = write(folder, "  m: 2*a + 0.5*b\n  top: {mix: m + c@good, limit: {s: 1000}}\n")
    first, second = epoch_ids(loader(folder, sentencepiece_file, "top", registry, "s"))
    for epoch in (first, second):
        assert all(epoch[f"a-{number}"] == 2 for number in range(10))
        assert {name for name in epoch if name.startswith("c")} == {"c-1", "c-2", "c-3"}
        assert sum(count for name, count in epoch.items() if name.startswith("b")) == 3
    assert all((first + second)[f"b-{number}"] == 1 for number in range(6))


def test_shares_and_stage_limits_reach_the_rows(folder, sentencepiece_file):
    registry = write(folder, "  m: {weights: {a: 0.75, b: 0.25}, limit: {small: 8, large: 32}}\n")
    for stage, total in (("small", 8), ("large", 16)):  # without `size` an epoch is as long as its parts, which `large` allows
        for epoch in epoch_ids(loader(folder, sentencepiece_file, "m", registry, stage)):
            assert sum(epoch.values()) == total
            assert sum(count for name, count in epoch.items() if name.startswith("a")) == total * 3 // 4


def test_subsets(folder, sentencepiece_file):
    registry = write(folder, "  m: a\n")
    assert set(epoch_ids(loader(folder, sentencepiece_file, "c@three", registry))[0]) == {"c-0", "c-1", "c-2"}
    assert set(epoch_ids(loader(folder, sentencepiece_file, "c@bad", registry))[0]) == {"c-0"}  # c-4 does not fit a row
    halves = epoch_ids(loader(folder, sentencepiece_file, "c@good + b@two", registry))
    assert halves[0] == halves[1] and len(halves[0]) == 5  # a subset is the same in every epoch
    assert len(epoch_ids(loader(folder, sentencepiece_file, "c@half", registry))[0]) <= 3


def test_samples_that_no_epoch_draws_are_neither_measured_nor_counted_as_bad(folder, sentencepiece_file):
    registry = write(folder, "  m: a\n")
    strict = {"max_bad_fraction": 0.0}
    assert not loader(folder, sentencepiece_file, "a + c@good", registry, **strict).unusable
    with pytest.raises(ValueError, match="1 of 15 samples had to be skipped"):
        loader(folder, sentencepiece_file, "a + c", registry, **strict)
    with pytest.raises(ValueError, match="1 of 12 samples had to be skipped"):
        loader(folder, sentencepiece_file, "a + c@bad", registry, **strict)
    again = loader(folder, sentencepiece_file, "a + c", registry)  # the cache of a subset is not taken for that of the whole
    assert list(again.unusable) == [14] and (np.delete(again._lengths, 14) > 0).all()


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("  m: a + b\n", "  m: a + 2*b\n", "mixture: None in the checkpoint, 10 from the 10 of a; 12 from the 6 of b now"),
        ("  m: a + 2*b\n", "  m: a + b\n", "12 from the 6 of b in the checkpoint, None now"),
        ("  m: a + 2*b\n", "  m: a + 3*b\n", "18 from the 6 of b now"),
        ("  m: a + 2*b\n", "  m: 2*b + a\n", "index: "),
        ("  m: a + 0.5*b\n", "  m: {mix: a + 0.5*b, seed: 1}\n", r"3 from the 6 of b \(seed"),
        ("  m: a + c@good\n", "  m: a + c@three\n", "c@three"),
        ("  m: {mix: a + b, limit: 8}\n", "  m: {mix: a + b, limit: 9}\n", "mixture: "),
    ],
)
def test_a_changed_mixture_is_refused_on_resume(folder, sentencepiece_file, before, after, named):
    state = loader(folder, sentencepiece_file, "m", write(folder, before)).state_dict()
    state = json.loads(json.dumps(state))
    loader(folder, sentencepiece_file, "m", write(folder, before)).load_state_dict(state)
    with pytest.raises(ValueError, match=f"belongs to other data.*{named}"):
        loader(folder, sentencepiece_file, "m", write(folder, after)).load_state_dict(state)


def test_a_list_of_ids_that_changed_is_a_changed_mixture(folder, sentencepiece_file):
    registry = write(folder, "  m: a + c@good\n")
    state = loader(folder, sentencepiece_file, "m", registry).state_dict()
    (folder / "ids.txt").write_text("c-1\nc-2\n")
    with pytest.raises(ValueError, match="samples [0-9a-f]{8}.*in the checkpoint"):
        loader(folder, sentencepiece_file, "m", registry).load_state_dict(state)


def test_show_mixture_prints_what_is_drawn(folder, capsys):
    tool = load_script(ROOT / "tools" / "show_mixture.py")
    registry = write(folder, "  m: 2*a + 0.5*b\n")
    assert tool.main([registry, "m + c@three"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["a", "10", "20", "76.9%", "2", "x"], ["b", "6", "3", "11.5%", "0.5", "x"], ["c@three", "3", "3", "11.5%", "1", "x"],
        ["together", "19", "26"],
    ]  # fmt: skip
    assert tool.main([registry, "m + d"]) == 1 and "there is no 'd'" in capsys.readouterr().err


def test_what_changes_nothing_may_change(folder, sentencepiece_file):
    state = loader(folder, sentencepiece_file, "m", write(folder, "  m: 0.5*a + b\n")).state_dict()
    other = write(folder, "  x: {mix: 0.25*a, limit: 1000}\n  y: b\n  m: 2*x + y\n", file="other.yaml")
    loader(folder, sentencepiece_file, "m", other).load_state_dict(state)


def test_resume_in_the_middle_of_a_mixture(folder, sentencepiece_file):
    registry = write(folder, "  m: 1.5*a + 0.5*b + c@good\n")
    whole = ids(loader(folder, sentencepiece_file, "m", registry, epochs=4, global_batch_size=1))
    first = loader(folder, sentencepiece_file, "m", registry, epochs=4, global_batch_size=1)
    steps = iter(first)
    for _ in range(len(whole) // 2):
        next(steps)
    state = first.state_dict()
    steps.close()
    second = loader(folder, sentencepiece_file, "m", registry, epochs=4, global_batch_size=1, num_workers=2)
    second.load_state_dict(state)
    assert ids(second) == whole[len(whole) // 2 :]


def test_names_of_datasets_do_not_decide_what_is_drawn(folder, sentencepiece_file):
    left = loader(folder, sentencepiece_file, "0.5*a + b", write(folder, "  m: b\n"))
    right = loader(folder, sentencepiece_file, "0.5*renamed + b", write(folder, "  m: b\n", a="renamed", file="renamed.yaml"))
    assert ids(left) == ids(right)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("a + 0.001*b", "b comes down to 0.006 samples of an epoch of 10, which is none"),
        ("1000000000*a", "more than 2147483648"),
        ("c@lost", "list of ids .*cannot be read"),
        ("c@foreign", "none of the 1 ids"),
    ],
)
def test_mixtures_that_cannot_be_drawn_are_refused(folder, expression, message):
    (folder / "foreign.txt").write_text("elsewhere\n")
    path = folder / "refused.yaml"
    path.write_text("datasets: {a: a, b: b, c: {path: c, subsets: {lost: {include: x.txt}, foreign: {exclude: foreign.txt}}}}\n")
    with pytest.raises(ValueError, match=message):
        open_training_data(replace(tiny_config().data, mixture=expression, registry=str(path)))


def test_configuration_is_checked_before_data_is_opened(folder):
    data = replace(tiny_config().data, tokenizer=str(folder / "ids.txt"))
    write(folder, "  m: a + 2*b\n  gone: a + d\n", file="mixtures.yaml")

    def refused(message, **fields):
        with pytest.raises(ValueError, match=message):
            config = replace(tiny_config(), data=replace(data, **fields))
            check_inputs(config)
            check_mixture(config.data)

    registry = str(folder / "mixtures.yaml")
    refused("both set", mixture="m", registry=registry, train=["x"])
    refused("data.mixture='m' needs the file", mixture="m")
    refused("data.registry=.* means nothing while data.mixture is empty", registry=registry, train=["x"])
    refused("data.stage='s' is named by no limit", mixture="m", registry=registry, stage="s")
    refused("there is no 'd'", mixture="gone", registry=registry)
    (folder / "absent.yaml").write_text("datasets: {z: no/where}\n")
    refused("dataset z: .*no/where' holds no dataset.json.*preprocess_video", mixture="z", registry=str(folder / "absent.yaml"))
    config = replace(tiny_config(), data=replace(data, mixture="m", registry=registry))
    check_inputs(config)
    check_mixture(config.data)


def test_subsets_that_fall_short_are_said(folder, caplog):
    (folder / "some.txt").write_text("a-1\na-2\ngone\n")
    rules = "{much: {count: 11}, far: {first: 12}, all: {count: 10}, some: {include: some.txt}, rest: {exclude: some.txt}}"
    (folder / "short.yaml").write_text(f"datasets: {{a: {{path: a, subsets: {rules}}}}}\n")
    said = {}
    for name in ("much", "far", "all", "some", "rest"):
        caplog.clear()
        open_training_data(tiny_config(mixture=f"a@{name}", registry=str(folder / "short.yaml"), train=[]).data)
        said[name] = " ".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "`count: 11` takes all 10" in said["much"] and "`first: 12` takes all 10" in said["far"]
    assert "subset some: 1 of the 3 ids" in said["some"] and "(gone)" in said["some"]
    assert said["all"] == said["rest"] == ""  # a list of what is not wanted may well name more


def test_the_inspection_looks_beyond_the_first_epoch(folder, sentencepiece_file, tmp_path, capsys):
    """A fifth of c an epoch: its sample that no row can hold is found, though the first epoch does not draw it."""
    registry = write(folder, "  fifth: {mix: 0.2*c, seed: 2}\n")
    _, mixture = open_training_data(tiny_config(mixture="fifth", registry=registry, train=[]).data)
    assert 4 not in mixture.draw(0) and 4 in np.concatenate([mixture.draw(epoch) for epoch in range(5)])
    tool = load_script(ROOT / "tools" / "inspect_dataset.py")
    words = ["--output", str(tmp_path / "look"), "--config", str(ROOT / "examples" / "models" / "tiny.yaml"), "--data.context_length", "64"]
    words += [
        "--data.registry",
        registry,
        "--data.mixture",
        "fifth",
        "--data.tokenizer",
        str(sentencepiece_file),
        "--model.llm.vocab_size",
        "1024",
    ]
    assert tool.main(words) == tool.BROKEN
    assert [json.loads(line)["id"] for line in (tmp_path / "look" / "broken.jsonl").read_text().splitlines()] == ["c-4"]
    counts = json.loads((tmp_path / "look" / "summary.json").read_text())["counts"]
    assert (counts["samples"], counts["usable samples"], counts["samples of an epoch"]) == (5, 4, 1)
    assert "1 broken samples" in capsys.readouterr().out
