#!/bin/sh
# venv.sh FOLDER [PYTHON]: make a virtual environment with Python 3.10 or newer, or say what is missing.
set -eu
folder=$1
system=$(uname -s)

fail() {
    printf 'mlxq: %s\n' "$@" >&2
    exit 1
}

if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
    [ "$system" = Darwin ] && fail "no C++ compiler; run: xcode-select --install"
    fail "no C++ compiler (${CXX:-c++}); on Debian run: apt-get install g++"
fi

found=
for python in ${2:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
        found=$python
        break
    fi
done

if [ -z "$found" ]; then
    [ $# -gt 1 ] && fail "$2 is not a Python 3.10 or newer"
    [ "$system" = Darwin ] || fail "no python3 of version 3.10 or newer on this machine"
    # The Command Line Tools bring Python 3.9: uv, from PyPI, fetches a newer one into the user's own folder.
    command -v python3 >/dev/null 2>&1 || fail "no python3; run: xcode-select --install"
    echo "python3 here is older than 3.10: fetching Python 3.12 with uv ..."
    trap 'rm -rf "$folder.uv"' EXIT
    python3 -m venv "$folder.uv"
    "$folder.uv/bin/python" -m pip install -q uv
    "$folder.uv/bin/uv" venv -q --python 3.12 --seed "$folder"
    exit
fi

need=$("$found" - <<'PYTHON'
import os
import sysconfig

try:
    import ensurepip, venv
except ImportError:
    print("python3-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python3-dev")
PYTHON
)
if [ -n "$need" ]; then
    fail "$found lacks $(echo $need | sed 's/ / and /') (Debian's names); run: apt-get install $(echo $need)"
fi
"$found" -m venv "$folder"
