import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def run_python(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_compiles_for_a_gpu_that_is_not_there():
    result = run_python(
        "-m", "benchmarks.compile_kernels", "--targets", "90", "--kernels", "linf_step"
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("linf_step")]
    compiled_by_nvcc = 18 if shutil.which("nvcc") else 0
    assert len(rows) == 8 + compiled_by_nvcc
    for *_, registers, spilled, _ in rows:
        assert int(registers) > 0
        assert int(spilled) == 0


def test_what_does_not_fit_exits_1():
    command = (
        "from benchmarks import compile_kernels as module; module.SHARED_LIMIT = -1;"
        "raise SystemExit(module.main(['--targets', '90', '--kernels', 'mean']))"
    )
    result = run_python("-c", command)
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines()[-1].startswith("some failed")
