"""What a run trains on: the dataset folders of data.train, or data.mixture resolved by its registry into draws from numbered samples."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_longvila.config import DataConfig
from megatron_longvila.data.mixture import Mixture, Part, apportion, permute
from megatron_longvila.data.registry import Registry, Subset, Wanted, load_registry
from megatron_longvila.data.shards import Dataset, open_dataset
from megatron_longvila.data.text_rows import TextDataset

logger = logging.getLogger(__name__)
MAX_DRAWS = 1 << 31  # of one epoch: 16 GiB of sample numbers, more than any run of this recipe by a factor of 80


def open_training_data(config: DataConfig) -> tuple[list[Dataset | TextDataset], Mixture | None]:
    """The opened datasets in the order of the index, and what an epoch draws from them (None: every sample once).

    Raises:
        ValueError: a folder that is no finished dataset; a registry, expression or subset that means nothing.
    """
    if not config.mixture:
        return [open_dataset(path) for path in config.train], None
    return _Opener(load_registry(config.registry)).open(config.mixture, config.stage)


def check_mixture(config: DataConfig) -> None:
    """Everything that can be said against data.mixture without opening a dataset. Raises ValueError."""
    if not config.mixture:
        return
    registry = load_registry(config.registry)
    for wanted in registry.resolve(config.mixture, config.stage, lambda dataset, subset: 1):
        folder = registry.datasets[wanted.dataset].path
        if not (folder / "dataset.json").is_file():
            raise ValueError(
                f"{registry.path}, dataset {wanted.dataset}: {str(folder)!r} holds no dataset.json; write it with "
                f"tools/preprocess_video.py --output {folder} (or tools/preprocess_text.py for plain text), or correct the path"
            )


class _Opener:
    """Opens each dataset and subset of a registry once."""

    def __init__(self, registry: Registry):
        self._registry = registry
        self._datasets: dict[str, Dataset | TextDataset] = {}
        self._chosen: dict[tuple[str, str], np.ndarray] = {}

    def open(self, expression: str, stage: str) -> tuple[list[Dataset | TextDataset], Mixture]:
        samples = self._registry.resolve(expression, stage, lambda dataset, subset: len(self._choose(dataset, subset)))
        counts = apportion(list(samples.values()))
        self._check(samples, counts, expression)
        first = dict(zip(self._datasets, np.cumsum([0, *(len(one.samples) for one in self._datasets.values())]), strict=False))
        parts = [
            Part(
                wanted.label,
                self._choose(wanted.dataset, wanted.subset) + first[wanted.dataset],
                count,
                self._draw_seed(wanted),
                subset=bool(wanted.subset),
            )
            for wanted, count in zip(samples, counts, strict=True)
        ]
        parts.sort(key=lambda part: int(part.numbers[0]))  # in the order of the index, whatever the nesting
        mixture = Mixture(parts)
        logger.info("an epoch of data.mixture=%r draws %d samples: %s", expression, len(mixture), mixture.describe())
        return list(self._datasets.values()), mixture

    def _check(self, samples: dict[Wanted, Fraction], counts: Sequence[int], expression: str) -> None:
        for (wanted, exact), count in zip(samples.items(), counts, strict=True):
            if not count:
                raise ValueError(
                    f"data.mixture={expression!r}: {wanted.label} comes down to {float(exact):.3g} samples of an epoch of {sum(counts)}, "
                    "which is none; raise its weight or the size, or leave it out"
                )
        if sum(counts) > MAX_DRAWS:
            raise ValueError(f"data.mixture={expression!r}: {sum(counts)} samples an epoch are more than {MAX_DRAWS}; lower the weights")

    def _draw_seed(self, wanted: Wanted) -> int:
        """Of this part alone: what else is in the mixture does not change which of its samples are drawn, nor does its name."""
        content = f"{wanted.seed} {self._datasets[wanted.dataset].hash} {wanted.subset}"
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little") >> 1

    def _choose(self, name: str, subset: str) -> np.ndarray:
        """Sample numbers of a subset within its dataset, ascending. int64."""
        if name not in self._datasets:
            self._datasets[name] = open_dataset(self._registry.datasets[name].path)
        if (name, subset) not in self._chosen:
            dataset = self._datasets[name]
            where = f"{self._registry.path}, dataset {name}, subset {subset}"
            rule = self._registry.datasets[name].subsets[subset] if subset else None
            self._chosen[name, subset] = np.arange(len(dataset.samples)) if rule is None else choose(dataset, rule, where)
        return self._chosen[name, subset]


def choose(dataset: Dataset | TextDataset, subset: Subset, where: str) -> np.ndarray:
    """Sample numbers of a subset, ascending. int64. A subset that has fewer samples than it asks for is logged as a warning.

    Raises ValueError that begins with `where` for a list of ids that cannot be meant.
    """
    numbers = np.arange(len(dataset.samples))
    if subset.include or subset.exclude:
        ids = [sample.id for sample in dataset.samples]
        if subset.include:
            wanted = _read_ids(subset.include, ids, where, expected=True)
            numbers = np.flatnonzero([one in wanted for one in ids])
        if subset.exclude:
            unwanted = _read_ids(subset.exclude, ids, where, expected=False)
            numbers = np.asarray([number for number in numbers.tolist() if ids[number] not in unwanted], dtype=np.int64)
    for name, size in (("first", subset.first), ("count", subset.count)):
        if size is not None and size > len(numbers):
            logger.warning("%s: `%s: %d` takes all %d samples there are; lower it, or add samples", where, name, size, len(numbers))
    if subset.first is not None:
        return numbers[: subset.first]
    count = subset.count if subset.fraction is None else int(subset.fraction * len(numbers) + Fraction(1, 2))
    if count is None or count >= len(numbers):
        return numbers
    return numbers[np.sort(permute(len(numbers), subset.seed, 0)[:count])]


def _read_ids(path: Path, ids: Sequence[str], where: str, *, expected: bool) -> set[str]:
    """The ids of a list; with `expected` one that the dataset lacks is worth a warning."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: the list of ids {path} cannot be read: {error}") from None
    listed = {line.strip() for line in lines if line.strip()}
    known = listed & set(ids)
    if not known:
        raise ValueError(f"{where}: none of the {len(listed)} ids in {path} is one of the dataset (such as {ids[:1]}); one id a line")
    if len(known) < len(listed):
        level = logging.WARNING if expected else logging.INFO
        example = min(listed - known)
        logger.log(
            level, "%s: %d of the %d ids in %s are not in the dataset (%s)", where, len(listed) - len(known), len(listed), path, example
        )
    return listed
