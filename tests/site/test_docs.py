"""What the documents say holds: examples run, commands, figures and versions agree, links exist."""

import ast
import dataclasses
import doctest
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from sklearn.datasets import load_digits
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


# what a row of the README's measurements is called in the recorded results
MEASURED = {
    "NT-Xent, 512 rows": {"n": 512},
    "NT-Xent, 8,192 rows": {"n": 8192},
    "InfoNCE, 256 queries against 65,536 keys": {"case": "queue"},
    "UEL, 4,096 rows": {"case": "uel"},
    "HCL, 4,096 rows": {"case": "hard"},
    "SupCon, 4,096 rows": {"case": "classes"},
    "update of a bank of 65,536 keys": {"case": "bank"},
    "gradient for the self attack, 4,096 rows": {"case": "tied"},
}


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks in `language`, in order; the README's by default."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def before_and_after() -> list[str]:
    """The README's loop without the attack, and with it."""
    (diff,) = blocks("diff")
    lines = diff.splitlines()
    return ["\n".join(line[1:] for line in lines if line[:1] != mark) for mark in "+-"]


def views() -> torch.Tensor:
    """Two views of four images."""
    return torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("loop", before_and_after(), ids=["before", "after"])
def test_readme_loops_run(loop: str) -> None:
    torch.manual_seed(0)
    names = {"torch": torch, "torchvision": torchvision, "loader": [views()]}
    exec(loop, names)
    weights = list(names["encoder"].parameters())
    assert all(torch.isfinite(weight.grad).all() for weight in weights)
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


def test_library_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x_p, x_q = views()
    names = {"loader": [(x_p, x_q)]}
    step, twin, loss, trained, *others = blocks("python", read("docs/library.md"))

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

    # weights are not fetched
    monkeypatch.setattr(
        "torchvision.models.get_model", lambda name, weights: getattr(models, name)()
    )
    for block in others:
        exec(block, names)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130
    assert all(len(loop.splitlines()) <= 15 for loop in before_and_after())


@pytest.mark.parametrize("document", ["README.md", "docs/install.md"])
def test_set_up_commands_are_given(document: str) -> None:
    commands = [block.strip() for block in blocks("sh", read(document))]
    assert MAIN_JOB in commands
    assert TESTS in commands


def test_readme_commands_are_those_that_ci_runs() -> None:
    ci = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for command in TESTS.split(" && "):
        assert command.replace(".venv", ".venv-ci") in ci


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/library.md"])
def test_examples_of_the_site_run(page: str) -> None:
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


def test_every_command_has_its_flags_listed() -> None:
    assert sorted(re.findall(r"^\.\. command:: (\w+)$", read("docs/cli.rst"), re.M)) == COMMANDS


def test_readme_table_of_methods() -> None:
    """Methods with their papers, and the units that their classes give; the site lists them all."""
    row = r"^\| [^|]* \| (\[`.*) \| (\d+) \| (\d+) \|$"
    citation = read("CITATION.cff")
    named = []
    for methods, none, pair in re.findall(row, README, re.M):
        for name, paper in re.findall(r"\[`(\w+)`\]\(https://arxiv\.org/abs/(\S+)\)", methods):
            named.append(name)
            assert f"arXiv:{paper}" in citation, name
            assert (int(none), int(pair)) == tuple(METHODS[name].units[k] for k in ("none", "pair"))
    assert len(named) == len(set(named)) >= 17


def test_readme_table_of_measurements() -> None:
    """Every number is the one that was recorded last."""
    peers = ("clae_fast", "lightly", "torch_eager", "torch_compile", "torch_blocks")
    rows = re.findall(r"^\| (\S.*) \| `(nt_xent|losses)` \|$", README, re.M)
    assert [row.split("|")[0].strip() for row, _ in rows] == list(MEASURED)
    for row, command in rows:
        label, *cells = (cell.strip() for cell in row.split("|"))
        file = max((ROOT / "benchmarks" / "results").glob(f"{command}-epyc-avx512-*.json"))
        found = {
            record["impl"].replace("torch_chunked_symmetric", "torch_blocks"): record
            for record in json.loads(file.read_text())["rows"]
            if MEASURED[label].items() <= record.items()
        }
        assert float(cells[0]) == float(f"{found['clae_fast']['ms']:.3g}"), label
        for peer, cell in zip(peers[1:], cells[1:], strict=True):
            assert bool(cell) == (peer in found), (label, peer)
            if cell:
                assert float(cell) == float(f"{found[peer]['over_clae_fast']:.2g}"), (label, peer)


def extension(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of docs/_ext, which needs Sphinx."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    return importlib.import_module(name)


def test_readme_picture_is_what_its_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, svg in extension("schedule_figure", monkeypatch).files().items():
        assert path.read_text() == svg
        assert path.relative_to(ROOT).as_posix() in README


def test_site_tables_have_every_method_and_op(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = extension("catalogue", monkeypatch)
    directive = SimpleNamespace(env=SimpleNamespace(note_dependency=lambda file: None))
    files = (ROOT / "benchmarks" / "results").glob("methods-digits-*.json")
    recorded = {
        (found["method"], found["attack"]): f"{found['knn']:.1f}"
        for file in sorted(files, key=lambda file: file.stem[-10:])
        for found in json.loads(file.read_text())["rows"]
    }
    _, _, *rows = "\n".join(catalogue._MethodTable.lines(directive)).split("   * - ")
    for (name, method), row in zip(METHODS.items(), rows, strict=False):
        link, none, pair, *accuracies, presets = row.rstrip("\n").split("\n     - ")
        assert f"method-{name}" in link
        assert (int(none), int(pair)) == tuple(method.units[k] for k in ("none", "pair"))
        assert accuracies == [recorded.get((name, kind), "") for kind in ("none", "pair")]
        own = {preset for preset, given in PRESETS.items() if given.get("method") == name}
        assert name == "simclr" or set(re.findall("``(.*?)``", presets)) == own
    assert recorded["untrained", "none"] in rows[len(METHODS)]
    ops_table = "\n".join(catalogue._OpTable.lines(directive))
    assert all(f"`clae_fast.{name}`" in ops_table for name in ops.__all__)


def photos(folder: Path) -> None:
    """Digits as photos of two classes, 36 to train on and 18 to test on of each."""
    digits = load_digits()
    for label, name in enumerate(("cat", "dog")):
        images = digits.images[digits.target == label][:54]
        for number, image in enumerate(images):
            path = folder / ("train" if number < 36 else "test") / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((image * 15).astype("uint8"))
            picture.convert("RGB").resize((48, 40)).save(path)


def test_tutorial_runs(tmp_path: Path) -> None:
    """Its commands succeed, and print the lines that stand below them, up to the numbers."""
    page = read("docs/tutorial.md")
    photos(tmp_path / "photos")
    (settings,) = blocks("yaml", page)
    (tmp_path / "small.yaml").write_text(settings)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
    said = None
    for language, block in re.findall(r"^```(sh|text)\n(.*?)^```$", page, re.M | re.S):
        if language == "sh":
            done = subprocess.run(
                ["bash", "-ec", block],
                cwd=tmp_path, env=environment, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            said = " ".join(done.stdout.split())
        elif said is not None:
            for line in block.splitlines():
                assert " ".join(re.split(r"\d|\.\.\.", line)[0].split()) in said
    assert (tmp_path / "report.html").is_file()
    features = np.load(tmp_path / "features.npz")
    assert len(features["features"]) == len(features["names"]) == 36


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
    assert released[0] == clae_fast.__version__
    assert 'version = { attr = "clae_fast._version.__version__" }' in read("pyproject.toml")


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
