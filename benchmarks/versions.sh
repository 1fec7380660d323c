#!/usr/bin/env bash
# The fast tests under four sets of versions, each in an environment of its own; prints a table in the end, and fails
# where a test has failed.
#
#     benchmarks/versions.sh [--build] FOLDER [ENVIRONMENT...] [-- PYTEST-ARGUMENTS]
#
# --build only creates the environments, and runs no tests.
# Environments: oldest, axolotl, today, newest. FOLDER keeps them, and the output of the tests as ENVIRONMENT.log.
# PYTHON (3.11 or 3.12) and PYTHON_NEWEST (the newest there is) name the interpreters, TORCH the build to install: an
# unpinned torch brings gigabytes of CUDA.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
only_build=""
[ "${1:-}" = --build ] && only_build=1 && shift
folder=$(realpath -m "${1:?a folder for the environments}")
shift
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
python=${PYTHON:-python3.11}
newest=${PYTHON_NEWEST:-$python}
for each in python3.14 python3.13; do
  [ -n "${PYTHON_NEWEST:-}" ] || ! "$each" -V >/dev/null 2>&1 || { newest=$each && break; }
done
torch=${TORCH:-$(grep '^torch==' "$root/constraints.txt")}

declare -A pins=(
  [oldest]="transformers==4.57.6 trl==1.8.0 datasets==4.7.0 peft==0.18.0 accelerate==1.12.0 huggingface_hub==0.34.0
    pyarrow==21.0.0 numpy==1.26.4 pandas==2.1.4 filelock==3.16.0"
  [axolotl]="transformers==5.16.1 trl==1.9.0 datasets==4.8.4 peft==0.20.0 accelerate==1.13.0 huggingface_hub==1.17.0"
  [today]="-c $root/constraints.txt"
  [newest]=""
)
tools="pytest pytest-xdist hypothesis scikit-learn"

asked=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  [ -n "${pins[$1]+known}" ] || { echo "There is no environment '$1': ${!pins[*]}." >&2; exit 2; }
  asked+=("$1")
  shift
done
[ "${1:-}" = -- ] && shift
[ ${#asked[@]} -gt 0 ] || asked=(oldest axolotl today newest)
[ $# -gt 0 ] || set -- tests

build() {
  local name=$1 with=$python
  [ "$name" = newest ] && with=$newest
  [ -x "$folder/$name/bin/pytest" ] && return
  "$with" -m venv "$folder/$name"
  # shellcheck disable=SC2086  # the pins are words
  "$folder/$name/bin/pip" install -q $torch ${pins[$name]} -e "$root[compare]" $tools
}

mkdir -p "$folder"
failed=0
for name in "${asked[@]}"; do
  build "$name"
  [ -z "$only_build" ] || continue
  export HF_DATASETS_CACHE="$folder/$name/datasets"  # no version reads what another has cached
  (cd "$root" && "$folder/$name/bin/python" -m pytest -p no:cacheprovider -rs "$@" >"$folder/$name.log" 2>&1) ||
    { failed=1 && tail -n 100 "$folder/$name.log"; }
done
[ -z "$only_build" ] || exit 0

echo "| environment | Python | transformers | TRL | datasets | peft | accelerate | torch | result |"
echo "|---|---|---|---|---|---|---|---|---|"
for name in "${asked[@]}"; do
  "$folder/$name/bin/python" - "$name" "$folder/$name.log" <<'PY'
import importlib.metadata, platform, re, sys

name, log = sys.argv[1:]
packages = ("transformers", "trl", "datasets", "peft", "accelerate", "torch")
versions = [importlib.metadata.version(package) for package in packages]
text = open(log).read()
found = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed).*?)(?: in [\d.]+s.*)?$", text, flags=re.M)
print("|", " | ".join([name, platform.python_version(), *versions, found[-1] if found else "did not finish"]), "|")
PY
done
exit $failed
