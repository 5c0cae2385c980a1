"""Hugging Face folders brought into checkpoints and back, for tests of what comes after."""

from __future__ import annotations

from pathlib import Path


def import_folder(source: Path, output: Path, **options) -> Path:
    """What tools/convert_checkpoint.py import does. Needs a job of one rank."""
    from megatron_longvila.checkpoint.importing import ImportOptions, plan, run

    run(plan(ImportOptions(source, output, **options)))
    return output


def import_folders(rank: int, pairs: list[tuple[Path, Path]]) -> None:
    """The same for several, as the body of a rank."""
    for source, output in pairs:
        import_folder(source, output)


def export_folder(checkpoint: Path, output: Path, form: str, **options) -> Path:
    """What tools/convert_checkpoint.py export does."""
    from megatron_longvila.checkpoint.exporting import ExportOptions, plan, run

    run(plan(ExportOptions(checkpoint, output, form, **options)))
    return output
