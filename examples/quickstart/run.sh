#!/usr/bin/env bash
# Install what is missing, then the quickstart: `bash examples/quickstart/run.sh [--output_dir DIR] [--restart]`.
# Minutes on two cores; what it does and where everything is stands at the end of its output.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/tools/install.sh"
install ""
exec "$PYTHON" "$root/examples/quickstart/quickstart.py" "$@"
