"""Training on a mixture as a user starts it: what each epoch shows, a changed mixture refused, the same one resumed."""

import json
from collections import Counter
from pathlib import Path

import pytest
from programs import preprocess, read_lines, train, write_question_videos

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight videos with questions, and six dialogues without media."""
    folder = tmp_path_factory.mktemp("data")
    write_question_videos(folder)
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "There are 3 circles."}]
    rows = "".join(json.dumps({"id": f"text-{number}", "conversations": turns}) + "\n" for number in range(6))
    (folder / "texts.jsonl").write_text(rows)
    code, text = preprocess(folder / "texts.jsonl", folder / "media", folder / "texts")
    assert code == 0, text
    return folder


def write(data: Path, mixture: str) -> Path:
    path = data / "mixtures.yaml"
    path.write_text(f"datasets: {{videos: dataset, texts: texts}}\nmixtures:\n  short: {mixture}\n")
    return path


def shown(run: Path) -> list[str]:
    """Samples of every row of every step so far."""
    return [name for line in read_lines(run / "metrics.jsonl") for row in line["sample_ids"] for name in row]


def test_train_change_and_resume(data, tmp_path):
    run = tmp_path / "run"
    mixture = ["--data.mixture", "short", "--data.registry", str(write(data, "0.5*videos + 2*texts"))]
    flags = [*mixture, "--checkpoint.save_at_end", "true", "--parallel.ulysses_size", "2", "--data.global_batch_size", "1"]

    code, text = train(run, [], data / "tokenizer.model", *flags, "--training.epochs", "1")
    assert code == 0, text
    assert "an epoch of data.mixture='short' draws 16 samples: 4 from the 8 of videos (seed" in text and "12 from the 6 of texts" in text
    first = shown(run)
    count = Counter(name.partition("-")[0] for name in first)
    assert count == {"row": 4, "text": 12} and Counter(Counter(first).values()) == {1: 4, 2: 6}

    write(data, "0.5*videos + 3*texts")
    code, text = train(run, [], data / "tokenizer.model", *flags, "--training.epochs", "2")
    assert code != 0 and "belongs to other data (mixture: " in text and "18 from the 6 of texts" in text

    write(data, "texts*2 + 0.5*videos")  # another order of datasets is another order of rows
    code, text = train(run, [], data / "tokenizer.model", *flags, "--training.epochs", "2")
    assert code != 0 and "index: " in text

    write(data, "{mix: 0.25*(2*videos + 8*texts), limit: 1000}")  # the same draws in other words
    code, text = train(run, [], data / "tokenizer.model", *flags, "--training.epochs", "2")
    assert code == 0 and "resumed from" in text, text
    assert Counter(shown(run)) == Counter({f"row-{number}": 1 for number in range(8)} | {f"text-{number}": 4 for number in range(6)})
