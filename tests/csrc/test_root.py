"""The installed package, imported in the checkout's root and elsewhere, runs compiled code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CODE = """
import torch
import clae_fast._C
import clae_fast.kernels.nt_xent
from clae_fast import _impl, _native
assert _native.has_cpu()
print(_impl.describe(torch.device("cpu")))
"""


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_compiled_code_and_kernels_are_found(where: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "CLAE_FAST_IMPL"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT if where == "root" else tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("native, ")
