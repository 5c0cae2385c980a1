# shellcheck shell=bash
# Sourced by the scripts that install: `install EXTRAS` makes sure torch and this package are there and sets PYTHON;
# `install_programs PROGRAM=PACKAGE...` makes sure programs from Debian packages are there.
#
#   TORCH_REQUIREMENT   what to install as torch instead of the version below, e.g. torch==2.13.0+cpu
#   PYTHON              the interpreter to make a virtual environment with, when none is active
#
# pip's own settings (PIP_INDEX_URL, pip.conf, ...) hold. An active virtual environment is used as it is; otherwise .venv is made.

TORCH_VERSION=2.13.0 # the one place

install() { # EXTRAS, as in "dev,hf"
  local root stamp wanted
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
  else
    [ -x "$root/.venv/bin/python" ] || _make_venv "$root/.venv"
    PYTHON="$root/.venv/bin/python"
  fi

  # A second call costs nothing while the requirements stay the same.
  stamp=$("$PYTHON" -c 'import sys; print(sys.prefix)')/.megatron-longvila${1:+-${1//,/-}}
  wanted="${TORCH_REQUIREMENT:-torch==$TORCH_VERSION} [$1] $(cksum <"$root/setup.py") $root"
  [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0

  echo "Installing into $("$PYTHON" -c 'import sys; print(sys.prefix)')" >&2
  if [ -n "${TORCH_REQUIREMENT:-}" ] || ! "$PYTHON" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    "$PYTHON" -m pip install "${TORCH_REQUIREMENT:-torch==$TORCH_VERSION}"
  fi # else: the environment's own torch stays; pip replaces it below if it is outside the tested range
  "$PYTHON" -m pip install --editable "$root${1:+[$1]}"
  echo "$wanted" >"$stamp"
}

install_programs() { # PROGRAM=PACKAGE...: what is missing, with apt-get, which needs root
  local pair missing=()
  for pair in "$@"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
  done
  ((${#missing[@]})) || return 0
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "error: the Debian packages ${missing[*]} are missing, and installing them needs root and apt-get;" \
      "run: sudo apt-get update && sudo apt-get install --no-install-recommends ${missing[*]}" >&2
    return 1
  fi
  echo "Installing ${missing[*]}" >&2
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

_make_venv() { # DIR
  local python=""
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "error: Python 3.11 or 3.12 is needed and ${PYTHON:-python3} is $(${PYTHON:-python3} --version 2>&1);" \
      "install one (sudo apt-get install python3.11 python3.11-venv) or set PYTHON to it" >&2
    return 1
  fi
  if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "error: $python cannot make a virtual environment; run: sudo apt-get install python$version-venv" >&2
    return 1
  fi
  echo "Making a virtual environment in $1" >&2
  "$python" -m venv "$1" || {
    rm -rf "$1"
    return 1
  }
}
