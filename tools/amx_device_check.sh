#!/bin/sh
# Checks and times the AMX kernels on a machine that has AMX, without Python packages or MLX: needs g++ and python3.
#
#   tools/amx_device_check.sh [RESULTS_FOLDER [MILLISECONDS_PER_TIMING [CPUS]]]
#
# 1. the kernels' answers against float64; 2. the same bits as under emulation; 3. times of the AVX-512 and AMX families
# on two threads pinned to CPUS ("0,1"; default: the two whose cores are quietest, as virtual machines share cores).
# The int8 kernel of q8mm, where the CPU has it: 1. the bits of avx512_vnni's; 2. the times of both on one thread.
# Writes RESULTS_FOLDER/amx-<date>.json (default tools/results).
set -eu
cd "$(dirname "$0")/.."
results=${1:-tools/results}
budget=${2:-60}
cpus=${3:-}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

# As in metal/CMakeLists.txt.
common="-std=c++20 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math"
avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2"
compile() { # NAME SOURCE FLAGS...
  object=$build/$1.o source=$2
  shift 2
  g++ $common "$@" -c "$source" -o "$object"
}

compile amx metal/cpu/amx.cpp $avx512 -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 &
compile amx_int8 metal/cpu/amx_int8.cpp $avx512 -mavx512vnni -mamx-tile -mamx-int8 &
compile q8 tests/amx/q8.cpp &
compile emulated metal/cpu/amx.cpp $avx512 -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -DMLXQ_EMULATE_AMX &
compile scalar metal/cpu/scalar.cpp &
compile harness tests/amx/harness.cpp -mfma &
compile table metal/cpu/table.cpp -DMLXQ_HAS_AMX &
for family in avx512 avx512_vnni avx512_bf16; do
  case $family in
    avx512) flags=$avx512 ;;
    avx512_vnni) flags="$avx512 -mavx512vnni" ;;
    avx512_bf16) flags="$avx512 -mavx512vnni -mavx512bf16" ;;
  esac
  if [ -f metal/cpu/$family.cpp ]; then
    (compile $family metal/cpu/$family.cpp $flags || echo "left out: $family") &
  fi
done
wait
have="" others=""
for family in avx512 avx512_vnni avx512_bf16; do
  if [ -f "$build/$family.o" ]; then
    have="$have -DMLXQ_HAS_$(echo $family | tr a-z A-Z)"
    others="$others $build/$family.o"
  fi
done
compile all_table metal/cpu/table.cpp -DMLXQ_HAS_AMX $have
cd "$build"
g++ harness.o amx.o scalar.o table.o -o real -pthread
g++ harness.o emulated.o scalar.o table.o -o emulated -pthread
g++ harness.o amx.o scalar.o all_table.o $others -o timing -pthread
g++ q8.o amx_int8.o avx512_vnni.o scalar.o -o int8
cd - >/dev/null

lscpu | grep -E 'Model name|Thread|Core|L1d|L2|L3|^CPU\(s\)' || true
lscpu -e=CPU,CORE,SOCKET 2>/dev/null | head -6 || true
cpus=${cpus:-$("$build/real" quiet)}
touch "$build/int8_times"
int8=absent
if grep -qw amx_int8 /proc/cpuinfo; then
  "$build/int8" check && int8=true || int8=false
  taskset -c "${cpus%%,*}" "$build/int8" time "$build/int8_times" "$budget"
fi
"$build/real" check
"$build/emulated" check
"$build/real" digest >"$build/real.txt"
"$build/emulated" digest >"$build/emulated.txt"
# The emulated build takes fewer rows of x at a time, which changes no sum.
if cmp -s "$build/real.txt" "$build/emulated.txt"; then
  echo "the same bits as under emulation"
  same=true
else
  echo "not the same bits as under emulation:"
  diff "$build/real.txt" "$build/emulated.txt" | head -20
  same=false
fi
taskset -c "$cpus" "$build/timing" time "$build/times" "$budget"
mkdir -p "$results"
python3 - "$build/times" "$results" "$same" "$cpus" "$build/int8_times" "$int8" <<'PYTHON'
import datetime
import json
import pathlib
import platform
import re
import subprocess
import sys

times, results, same, cpus, int8_times, int8 = sys.argv[1:]


def first_line(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]


cpu = {k.strip(): v.strip() for k, v in (line.split(":", 1) for line in open("/proc/cpuinfo") if ":" in line)}
date = datetime.date.today().isoformat()
commit = first_line("git", "rev-parse", "HEAD")
report = {
    "command": "tools/amx_device_check.sh",
    "date": date,
    "cpu": cpu["model name"],
    "cores": subprocess.run(["lscpu"], capture_output=True, text=True).stdout,
    "pinned_to": cpus,
    "threads": 2,
    "kernel": platform.release(),
    "compiler": first_line("g++", "--version"),
    "commit": commit if re.fullmatch("[0-9a-f]{40}", commit) else "a copy without history",
    "same_bits_as_emulation": same == "true",
    "times": [json.loads(line) for line in open(times)],
    "int8_same_bits_as_avx512_vnni": int8 == "true",
    "int8_times_one_thread": [json.loads(line) for line in open(int8_times)],
}
path = pathlib.Path(results) / f"amx-{date}.json"
text = json.dumps(report, indent=1)
path.write_text(re.sub(r"\{\s*\"kernel\".*?\}", lambda one: re.sub(r"\n\s*", " ", one[0]), text, flags=re.S) + "\n")
print(path)
sys.exit(same != "true" or int8 == "false")
PYTHON
