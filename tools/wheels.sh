#!/bin/sh
# wheels.sh PYTHON...: an sdist, and from it a wheel for each of these interpreters that is here, in dist/.
# Each wheel is installed into a fresh environment and must pass `mlxq doctor` there, outside the checkout.
set -eu
dist=$PWD/dist
work=$(mktemp -d)
step="the start"
trap 'code=$?; rm -rf "$work"; [ $code = 0 ] || echo "mlxq: stopped at $step" >&2' EXIT
mkdir -p "$dist"

built=
for python in "$@"; do
    if ! "$python" -c '' >/dev/null 2>&1; then
        echo "$python: not on this machine"
        continue
    fi
    venv=$work/$(basename "$python")
    step="the environment for $python"
    "$python" -m venv "$venv"
    if [ -z "$built" ]; then
        "$venv/bin/python" -m pip install -qq build
        "$venv/bin/python" -m build --sdist -o "$dist" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
        sdist=$(ls -t "$dist"/mlxq-*.tar.gz | head -n 1)
        echo "sdist: $(basename "$sdist")"
    fi
    step="the wheel for $python"
    rm -rf "$work/wheel"
    (cd "$work" && "$venv/bin/python" -m pip wheel -qq --no-deps -w "$work/wheel" "$sdist")
    step="installing the wheel for $python"
    (cd "$work" && "$venv/bin/python" -m pip install -qq "$work"/wheel/mlxq-*.whl)
    step="mlxq doctor on $python"
    (cd "$work" && "$venv/bin/mlxq" doctor >"$work/log" 2>&1) || { cat "$work/log"; exit 1; }
    mv "$work"/wheel/mlxq-*.whl "$dist/"
    echo "$python: $(ls -t "$dist" | head -n 1): installs, and mlxq doctor passes"
    built=yes
done
[ -n "$built" ] || { echo "mlxq: none of these interpreters is here: $*" >&2; exit 1; }
