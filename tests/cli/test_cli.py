"""The commands as a shell runs them: help, and one line for bad input."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(command: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `python -m clae_fast.COMMAND` in `cwd`."""
    module = f"clae_fast.{command}"
    return subprocess.run(
        [sys.executable, "-m", module, *flags], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "embed"])
def test_help_names_the_command(command: str, tmp_path: Path) -> None:
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m clae_fast.{command}")
    assert done.stderr == ""
    examples = re.findall(rf"^  python -m clae_fast\.{command}", done.stdout, re.M)
    assert "examples:" in done.stdout
    assert examples
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", ["--dataset", "parquet", "--data-dir", "nowhere"]),
        ("evaluate", ["nowhere"]),
        ("report", ["nowhere"]),
        ("embed", ["nowhere", "photos", "-o", "features.npz"]),
    ],
)
def test_bad_input_gets_one_line(command: str, flags: list[str], tmp_path: Path) -> None:
    done = run(command, *flags, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nowhere" in line
    assert list(tmp_path.iterdir()) == []
