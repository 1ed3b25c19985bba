#!/usr/bin/env bash
# Creates the virtual environment FOLDER with the first Python >= 3.11 found ($PYTHON is tried first), or leaves it alone
# when it is there and works.
set -euo pipefail
folder=$1

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if recent "$folder/bin/python" && "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.14; do
    if recent "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "${python:-}" ]; then
    echo "error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "error: $python has no venv module; on Debian and Ubuntu: sudo apt install python$version-venv" >&2
    exit 1
fi
echo "creating $folder with $("$python" --version)"
"$python" -m venv --clear "$folder"
