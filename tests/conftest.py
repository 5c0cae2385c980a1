"""Settings every test needs before torch is imported."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.environ.get("LONGVILA_GPU_TESTS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CPU tests fork ranks, and a forked child cannot use a CUDA context
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in the interpreter, which has to be asked for before triton is imported

sys.path.insert(0, str(Path(__file__).parent))  # `from ranks import run_ranks` from any folder below
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def question_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight H.264 videos with one question each, preprocessed by the tool, and a tokenizer; tests only read them."""
    from programs import write_question_videos

    folder = tmp_path_factory.mktemp("data")
    write_question_videos(folder)
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu run only where they were asked for."""
    if os.environ.get("LONGVILA_GPU_TESTS"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="GPU test: set LONGVILA_GPU_TESTS=1 on a machine with a GPU"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """LONGVILA_NO_SKIPS=1: a skip of anything but a GPU test fails the run, so that a missing package cannot hide a test."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("LONGVILA_NO_SKIPS") or reporter is None:
        return
    skipped = [report for report in reporter.stats.get("skipped", []) if "gpu" not in getattr(report, "keywords", ())]
    for report in skipped:
        reporter.write_line(f"SKIPPED although LONGVILA_NO_SKIPS is set: {report.nodeid}: {report.longrepr}", red=True)
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
