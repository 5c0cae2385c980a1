"""What tools/install.sh says and does before it downloads anything, with stand-ins for python and pip."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# An interpreter that answers the questions of install.sh from its environment and writes down what pip is asked to do.
STAND_IN = """#!/bin/bash
case "$*" in
  *"version_info[:2] not in"*) exit "${WRONG_VERSION:-0}" ;;
  *"import venv, ensurepip"*) exit "${NO_VENV:-0}" ;;
  *'"%d.%d"'*) echo 3.12 ;;
  *--version*) echo "Python 3.9.2" ;;
  *sys.prefix*) dirname "$(dirname "$0")" ;;
  *'m.version("torch")'*) exit "${NO_TORCH:-0}" ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "PATH=$3/bin:\\$PATH" >"$3/bin/activate" ;;
  "-m pip "*) shift 2; echo "$*" >>"$PIP_LOG" ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the script reads, and the stand-in as bin/python3."""
    for name in ("tools/install.sh", "setup.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    return tmp_path


def install(checkout: Path, extras: str = "dev,hf", **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run `install EXTRAS`; returns how it ended and the pip commands."""
    log = checkout / "pip.log"
    log.unlink(missing_ok=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "TORCH_REQUIREMENT", "PYTHON")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source tools/install.sh; install "{extras}"; echo "$PYTHON"'],
        cwd=checkout,
        env=clean | {"PYTHON": str(checkout / "bin/python3"), "PIP_LOG": str(log)} | environment,
        capture_output=True,
        text=True,
    )
    return done, log.read_text().splitlines() if log.exists() else []


def test_torch_is_installed_first_by_one_exact_version(checkout):
    version = re.search(r"^TORCH_VERSION=(\S+)", (ROOT / "tools/install.sh").read_text(), re.M).group(1)
    done, pip = install(checkout, NO_TORCH="1")
    assert done.returncode == 0, done.stderr
    assert pip == [f"install torch=={version}", f"install --editable {checkout}[dev,hf]"]
    assert done.stdout.strip() == str(checkout / ".venv/bin/python")
    assert install(checkout)[1] == []  # nothing changed: nothing to do
    (checkout / "setup.py").write_text((checkout / "setup.py").read_text() + "\n")
    assert install(checkout)[1] == [f"install --editable {checkout}[dev,hf]"]


def test_the_exact_version_stands_in_one_place():
    version = re.search(r"^TORCH_VERSION=(\S+)", (ROOT / "tools/install.sh").read_text(), re.M).group(1)
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("**/*.sh"), *ROOT.glob(".ci/*")]
    pinned = [
        path.name for path in scripts if ".venv" not in path.parts and re.search(rf"^[^#]*\b{re.escape(version)}\b", path.read_text(), re.M)
    ]
    assert pinned == ["install.sh"]


def test_no_extras_are_no_brackets(checkout):
    """pip refuses `DIR[]`."""
    assert install(checkout, extras="")[1] == [f"install --editable {checkout}"]


def test_torch_requirement_is_honoured(checkout):
    assert install(checkout, TORCH_REQUIREMENT="torch==2.12.0+cpu")[1][0] == "install torch==2.12.0+cpu"


def test_an_active_environment_and_its_torch_are_used(checkout):
    done, pip = install(checkout, VIRTUAL_ENV=str(checkout))
    assert (done.returncode, done.stdout.strip()) == (0, str(checkout / "bin/python"))
    assert pip == [f"install --editable {checkout}[dev,hf]"]
    assert not (checkout / ".venv").exists()


def test_the_commands_of_the_fine_tuning_example_run_where_it_is_installed(checkout):
    """With no environment active: `python` of its later commands, and of run.sh, is the one of the environment that was made."""
    line = next(line for line in (ROOT / "examples/finetune/README.md").read_text().splitlines() if line.startswith("source tools/"))
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "TORCH_REQUIREMENT", "PYTHON")}
    settings = {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "PIP_LOG": str(checkout / "pip.log")}
    words = ["bash", "-c", f"{line}\nbash -c 'command -v \"${{PYTHON:-python}}\"'"]
    done = subprocess.run(words, cwd=checkout, env=clean | settings, capture_output=True, text=True)
    assert done.stdout.strip() == str(checkout / ".venv/bin/python"), done.stderr


def test_another_python_is_refused_with_the_package_to_install(checkout):
    done, pip = install(checkout, WRONG_VERSION="1")
    assert done.returncode == 1 and pip == []
    assert "Python 3.11 or 3.12 is needed" in done.stderr and "Python 3.9.2" in done.stderr
    assert "sudo apt-get install python3.11 python3.11-venv" in done.stderr


def test_a_missing_venv_module_names_the_debian_package(checkout):
    done, pip = install(checkout, NO_VENV="1")
    assert done.returncode == 1 and pip == []
    assert "sudo apt-get install python3.12-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def install_programs(checkout: Path, *pairs: str, uid: int) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run `install_programs` with a stand-in for apt-get; returns how it ended and the apt-get commands."""
    log = checkout / "apt.log"
    for name, body in (("apt-get", f'echo "$*" >>{log}'), ("id", f"echo {uid}")):
        (checkout / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (checkout / "bin" / name).chmod(stat.S_IRWXU)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source tools/install.sh; install_programs {' '.join(pairs)}"],
        cwd=checkout, env=os.environ | {"PATH": f"{checkout}/bin:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    return done, log.read_text().splitlines() if log.exists() else []


def test_missing_programs_are_installed_by_root(checkout):
    done, apt = install_programs(checkout, "bash=bash", "no-such-a=one", "no-such-b=two", uid=0)
    assert done.returncode == 0 and apt == ["update -qq", "install -y -qq --no-install-recommends one two"]


def test_missing_programs_are_named_to_others(checkout):
    done, apt = install_programs(checkout, "no-such-a=one", uid=1000)
    assert done.returncode == 1 and not apt and "sudo apt-get install --no-install-recommends one" in done.stderr


def test_programs_that_are_there_need_no_root(checkout):
    done, apt = install_programs(checkout, "bash=bash", uid=1000)
    assert done.returncode == 0 and not apt
