"""What the documents say holds: examples run, commands and versions agree, links exist."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

import clae_fast

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SET_UP = "python3 -m venv .venv && .venv/bin/pip install "
MAIN_JOB = SET_UP + ". && .venv/bin/python -m clae_fast.train"
TESTS = SET_UP + "'.[test]' && .venv/bin/python -m pytest"


def blocks(language: str) -> list[str]:
    """The README's fenced blocks in `language`, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_readme_examples_run() -> None:
    generator = torch.Generator().manual_seed(0)
    x_p, x_q = torch.rand(2, 4, 3, 32, 32, generator=generator)
    names = {"loader": [(x_p, x_q)]}
    step, twin, loss = blocks("python")

    exec(step, names)
    result, encoder = names["result"], names["encoder"]
    assert torch.isfinite(result.loss)
    assert torch.isfinite(result.adv_loss)
    assert 0 < (result.x_adv - x_q).abs().max() <= 8 / 255

    encoder.zero_grad()
    exec(twin, names)
    assert all(weight.grad.abs().sum() > 0 for weight in encoder.parameters())
    assert 0 < (names["twin"].x_adv - x_q).abs().max() <= 8 / 255

    exec(loss, names)
    assert names["loss"].requires_grad


def test_readme_step_example_is_short() -> None:
    assert len(blocks("python")[0].splitlines()) <= 15


def test_readme_commands_are_those_that_ci_runs() -> None:
    commands = [block.strip() for block in blocks("sh")]
    assert MAIN_JOB in commands
    assert TESTS in commands
    ci = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for command in TESTS.split(" && "):
        assert command.replace(".venv", ".venv-ci") in ci


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_citation_names_the_papers_and_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == clae_fast.__version__
    papers = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert "arXiv:2010.12050" in papers
    assert len(papers) == len(set(papers))


def test_versions_agree() -> None:
    released = re.findall(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.M)
    packaged = re.findall(r'^version = "(.*)"$', read("pyproject.toml"), re.M)
    assert released[0] == clae_fast.__version__
    assert packaged == [clae_fast.__version__]


def test_no_tracked_file_names_a_machines_path() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    path = re.compile(rb"(?<![\w.])/(?:home|root|tmp|work|Users)/\w")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert [file for file in files if file.is_file() and path.search(file.read_bytes())] == []


def read(name: str) -> str:
    """The text of a file in the root."""
    return (ROOT / name).read_text()
