"""The examples run as they are, and are short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# the packages that an example needs besides clae_fast, and the last line that it prints
EXAMPLES = {
    "adversarial_step.py": ((), r"epoch 2: loss \d\.\d+, adversarial \d\.\d+"),
    "export_encoder.py": (("timm", "safetensors"), r".*encoder\.pt2: .* -> \[N, 512\], S = 32"),
    "lightly_simclr.py": (("lightly",), r"epoch 2: loss \d\.\d+"),
    "lightning_simclr.py": (("pytorch_lightning",), r"adv_loss: \d\.\d+"),
    "timm_encoder.py": (("timm",), r"step 4: loss \d\.\d+, adversarial \d\.\d+"),
    "torchrun_ddp.py": ((), r"step 6: loss \d\.\d+, adversarial \d\.\d+"),
}


def run(*command: str, cwd: Path) -> str:
    """The last line that a command prints; it must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs(name, tmp_path):
    packages, last = EXAMPLES[name]
    for package in packages:
        pytest.importorskip(package)
    assert re.fullmatch(last, run(str(ROOT / "examples" / name), cwd=tmp_path))


def test_processes_equal_one(tmp_path):
    path = str(ROOT / "examples" / "torchrun_ddp.py")
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path]
    assert run(*several, cwd=tmp_path) == run(path, cwd=tmp_path)


@pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="no checkout")
def test_none_is_forgotten_or_long():
    paths = list((ROOT / "examples").glob("*.py"))
    assert {path.name for path in paths} == set(EXAMPLES)
    assert all(len(path.read_text().splitlines()) <= 80 for path in paths)
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in EXAMPLES)
