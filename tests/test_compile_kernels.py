import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def compile_kernels(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_kernels", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_compiles_for_a_gpu_that_is_not_there():
    result = compile_kernels("--targets", "90", "--kernels", "linf_step")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("linf_step")]
    assert len(rows) == 4
    for *_, registers, spilled, _ in rows:
        assert int(registers) > 0
        assert int(spilled) == 0


def test_a_failure_is_named_and_exits_1():
    result = compile_kernels("--targets", "1", "--kernels", "mean")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "_nt_xent_mean_kernel, fp16 D=16 T=0.01, sm_1: " in result.stdout
    assert "Traceback" not in result.stderr
