#!/usr/bin/env bash
# Runs tests of csrc/ under sanitizers: for addresses and undefined behavior every test of an op's
# native implementation, for races the tests that use several threads. It needs g++, and the package
# installed with its test extra.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sanitized() {  # sanitized KINDS PYTEST_ARGUMENT...
  PYTHONPATH=tests python -m pytest -q --maxfail=1 -p native_driver.plugin --sanitize="$1" "${@:2}"
}

ops=$(cd csrc && ls ./*_simd.cpp | sed -E 's|./(.*)_simd.cpp|tests/ops/test_\1.py|')
# shellcheck disable=SC2086
sanitized address,undefined $ops tests/ops/test_properties.py -k "not triton and not reference"
sanitized thread tests/ops/test_threads.py -k number_of_threads
