"""What the documents say holds: examples run, commands and versions agree, links exist."""

import ast
import dataclasses
import doctest
import functools
import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torchvision import models

import clae_fast
from clae_fast import ops
from clae_fast.config import hints
from clae_fast.config.layers import resolve
from clae_fast.config.presets import PRESETS
from clae_fast.methods import METHODS
from clae_fast.training import checkpoint
from clae_fast.training.build import build_method
from clae_fast.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SET_UP = "python3 -m venv .venv && .venv/bin/pip install "
MAIN_JOB = SET_UP + ". && .venv/bin/python -m clae_fast.train"
TESTS = SET_UP + "'.[test]' && .venv/bin/python -m pytest -n auto --dist loadfile"
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
PAGES = sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.*") if page.suffix != ".py")
COMMANDS = sorted(
    file.stem for file in (ROOT / "clae_fast").glob("*.py") if "\ndef _parser(" in file.read_text()
)
# of torchrun, pip, docker, tensorboard and sphinx-build
OTHERS_FLAGS = {
    "--dist", "--keep-going", "--logdir", "--nnodes", "--no-build-isolation", "--no-deps",
    "--no-index", "--nproc-per-node", "--only-binary", "--rdzv-backend", "--rdzv-endpoint",
    "--rdzv-id", "--shm-size",
}  # fmt: skip


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks in `language`, in order; the README's by default."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x_p, x_q = torch.rand(2, 4, 3, 32, 32, generator=generator)
    names = {"loader": [(x_p, x_q)]}
    step, twin, loss, trained = blocks("python")

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

    monkeypatch.chdir(tmp_path)
    config = resolve({"image_size": 8})
    run = RunFolder.create(Path("runs/cifar10"), config)
    checkpoint.save(run.checkpoint, {"step": 1, "method": build_method(config).state_dict()})
    names["images"] = [Image.new("L", (9, 12))] * 3
    exec(trained, names)
    assert names["h"].shape == (3, 64)


def test_readme_step_example_is_short() -> None:
    assert len(blocks("python")[0].splitlines()) <= 15


def test_readme_commands_are_those_that_ci_runs() -> None:
    commands = [block.strip() for block in blocks("sh")]
    assert MAIN_JOB in commands
    assert TESTS in commands
    ci = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for command in TESTS.split(" && "):
        assert command.replace(".venv", ".venv-ci") in ci


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_the_site_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # weights are not fetched
    monkeypatch.setattr(
        "torchvision.models.get_model", lambda name, weights: getattr(models, name)()
    )
    names = {"torch": torch}
    for block in blocks("python", read(page)):
        exec(block, names)


@pytest.mark.parametrize("name", [*ops.__all__, "augment_params"])
def test_examples_of_contracts_run(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(getattr(clae_fast, name).__doc__)
    assert examples
    names = {"torch": torch, "clae_fast": clae_fast, "dataclasses": dataclasses}
    importlib.import_module("clae_fast.data")
    for example in examples:
        exec(example.source, names)


@functools.cache
def parser(command: str) -> object:
    return importlib.import_module(f"clae_fast.{command}")._parser()


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of the package in shell blocks: name and arguments."""
    for block in blocks("sh", text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for at, word in enumerate(words):
                if word.startswith("clae_fast.") and words[at - 1] == "-m":
                    arguments = words[at + 1 :]
                    end = arguments.index(">") if ">" in arguments else len(arguments)
                    yield word.removeprefix("clae_fast."), arguments[:end]


@pytest.mark.parametrize("page", DOCUMENTS + PAGES)
def test_commands_are_accepted(page: str) -> None:
    for command, arguments in commands(read(page)):
        if "--help" in arguments:
            continue
        settings = parser(command).parse(arguments)
        if command == "train":
            layers = {name: settings[name] for name in ("preset", "recipe")}
            resolve({name: settings[name] for name in hints() if name in settings}, **layers)


@functools.cache
def known_flags() -> set[str]:
    actions = [action for name in COMMANDS for action in parser(name)._actions]
    flags = {flag for action in actions for flag in action.option_strings}
    for file in (*(ROOT / "benchmarks").rglob("*.py"), ROOT / "tests" / "conftest.py"):
        flags |= set(re.findall(r'"(--[a-z-]+)"', file.read_text()))
    return flags | OTHERS_FLAGS


@pytest.mark.parametrize("page", DOCUMENTS + PAGES)
def test_flags_exist(page: str) -> None:
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", read(page)))
    assert sorted(said - known_flags()) == []


@pytest.mark.parametrize("page", DOCUMENTS + PAGES)
def test_names_exist(page: str) -> None:
    for name in set(re.findall(r"\bclae_fast(?:\.[A-Za-z]\w*)+", read(page))):
        place = clae_fast
        for part in name.split(".")[1:]:
            if not hasattr(place, part):
                importlib.import_module(f"{place.__name__}.{part}")
            place = getattr(place, part)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_included_is_one_section(page: str) -> None:
    included = r'{include} \.\./README\.md\n:start-after: "(.*)\\n"\n:end-before: "(.*)"'
    for start, end in re.findall(included, read(page)):
        _, found, rest = README.partition(start + "\n")
        text, found_end, _ = rest.partition(end)
        assert found
        assert found_end
        assert "\n## " not in text, (start, end)


def test_every_command_has_its_flags_listed() -> None:
    assert sorted(re.findall(r"^\.\. command:: (\w+)$", read("docs/cli.rst"), re.M)) == COMMANDS


def test_every_op_is_named() -> None:
    for name in ops.__all__:
        assert f"`{name}`" in README or f"clae_fast.{name}" in README, name


def test_the_table_of_methods() -> None:
    """A row a method: its paper, presets, units, and the accuracy that was recorded last."""
    link = r"\[`(\w+)`\]\(https://arxiv\.org/abs/(\S+)\)"
    rows = re.findall(
        rf"^\| {link} \| (.*) \| (\d+), (\d+) \| (\S+), (\S+) \|$", README, re.MULTILINE
    )
    assert [name for name, *_ in rows] == list(METHODS)
    files = (ROOT / "benchmarks" / "results").glob("methods-digits-*.json")
    recorded = {
        (found["method"], found["attack"]): f"{found['knn']:.1f}"
        for file in sorted(files, key=lambda file: file.stem)
        for found in json.loads(file.read_text())["rows"]
    }
    citation = (ROOT / "CITATION.cff").read_text()
    for name, paper, presets, none, pair, *accuracies in rows:
        assert f"arXiv:{paper}" in citation, name
        assert (int(none), int(pair)) == tuple(METHODS[name].units[k] for k in ("none", "pair"))
        assert accuracies == [recorded[name, "none"], recorded[name, "pair"]], name
        if name not in ("simclr", "plain", "uel"):
            own = {preset for preset, given in PRESETS.items() if given["method"] == name}
            assert set(re.findall("`(.*?)`", presets)) == own, name
    assert f"untrained it is {recorded['untrained', 'none']}" in README


def test_errors_in_the_faq_are_raised() -> None:
    files = [ROOT / "setup.py", *(ROOT / "clae_fast").rglob("*.py")]
    templates = [
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    said = [
        message
        for terms in re.findall(r"^(`.*)\n: ", read("docs/faq.md"), re.M)
        for message in re.findall(r"`([^`]*)`", terms)
        if not message.startswith("--")
    ]
    assert len(said) > 30
    lost = [
        message
        for message in said
        if not any(
            (len(piece.strip()) >= 10 and piece.strip() in message)
            or max(message.split("..."), key=len).strip() in piece
            for piece in templates
        )
    ]
    assert not lost, lost


@pytest.mark.parametrize("page", DOCUMENTS)
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
