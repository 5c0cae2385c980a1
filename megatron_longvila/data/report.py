"""Samples that could not be used: counted once, written to a report, and too many of them end the run."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from megatron_longvila.config import DataConfig
from megatron_longvila.data.index import SampleIndex


class BadSamples:
    """The skipped samples of one loader.

    Args:
        path: JSON lines {"key": line of the dataset, "id", "dataset": its folder, "reason"}; a sample stands there once, also across
            resumes, and several loaders may share the file. None: no file.
        num_samples: what the share of bad ones is of; None is all of the index.
        writes: this rank writes the file; the others only know where it is.

    Attributes:
        unusable: reasons of the samples no row holds, because their text cannot be encoded or does not fit.
        failed: reasons of the samples whose media could not be read; they keep their place without labels.
    """

    def __init__(self, index: SampleIndex, config: DataConfig, path: Path | None, *, num_samples: int | None = None, writes: bool = True):
        self._index, self._config, self._path, self._writes = index, config, path, writes
        self._num_samples = len(index) if num_samples is None else num_samples
        self.unusable: dict[int, str] = {}
        self.failed: dict[int, str] = {}

    def add_unusable(self, reasons: dict[int, str]) -> None:
        """Record samples left out of the order. Raises ValueError past data.max_bad_fraction."""
        self.unusable |= reasons
        self._write(reasons)
        self._check()

    def add_failed(self, reasons: dict[int, str]) -> None:
        """Record samples that failed while they were read.

        Raises:
            ValueError: more than data.max_bad_fraction, or any at all with data.video.on_bad_frame=fail.
        """
        self.failed |= reasons
        self._write(reasons)
        if reasons and self._config.video.on_bad_frame == "fail":
            raise ValueError(
                f"data.video.on_bad_frame='fail' and {self._describe(reasons)}; repair the files, or use nearest or skip_sample"
            )
        self._check()

    def _check(self) -> None:
        bad = self.unusable | self.failed
        share, limit = len(bad) / max(1, self._num_samples), self._config.max_bad_fraction
        if share > limit:
            raise ValueError(
                f"{len(bad)} of {self._num_samples} samples had to be skipped, a share of {share:.4f}, more than "
                f"data.max_bad_fraction={limit}: {self._describe(bad)}; repair the data, or raise the fraction"
            )

    def _describe(self, reasons: dict[int, str]) -> str:
        shown = [f"{self._index.locate(number)[1].id}: {reason}" for number, reason in list(reasons.items())[:3]]
        more = f"and {len(reasons) - 3} more" + (f" in {self._path}" if self._path is not None else "")
        return "; ".join(shown + [more] * (len(reasons) > 3))

    def _write(self, reasons: dict[int, str]) -> None:
        """Add the new ones to the report and put the whole file in place at once."""
        if self._path is None or not self._writes or not reasons:
            return
        records = []
        with contextlib.suppress(FileNotFoundError):  # the first bad sample of this folder
            records = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        known = {(record["dataset"], record["key"]) for record in records}  # the first reason stays
        for number, reason in reasons.items():
            dataset, sample = self._index.locate(number)
            record = {"key": f"samples.jsonl:{self._index.line(number)}", "id": sample.id, "dataset": str(dataset.path), "reason": reason}
            if (record["dataset"], record["key"]) not in known:
                records.append(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        os.replace(partial, self._path)
