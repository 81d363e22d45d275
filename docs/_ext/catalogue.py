"""Directives that write parts of the site from the package itself.

`methods`, `ops` and `examples` each write one section for every method, op or example.
`method-table`, `op-table` and `presets` write a table, and `command NAME` writes what
`python -m clae_fast.NAME --help` prints.
"""

import argparse
import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

import clae_fast
from clae_fast import methods, ops
from clae_fast.config.layers import resolve
from clae_fast.config.presets import PRESETS
from clae_fast.methods import METHODS, Method

_RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
_KINDS = {"none": "plain", "pair": "pair attack", "self": "self attack", "released": "as released"}


class _Written(SphinxDirective):
    """A directive that writes lines of reStructuredText."""

    def run(self) -> list[nodes.Node]:
        lines = StringList(list(self.lines()), source=self.get_source_info()[0])
        parent = nodes.container()
        parent.document = self.state.document
        nested_parse_with_titles(self.state, lines, parent)
        return parent.children

    def lines(self) -> Iterable[str]:
        raise NotImplementedError


class _MethodTable(_Written):
    """What each method costs, and the accuracy that was recorded for it last."""

    def lines(self) -> Iterable[str]:
        file = max(_RESULTS.glob("methods-digits-*.json"), key=lambda file: file.stem[-10:])
        self.env.note_dependency(str(file))
        knn = {
            (row["method"], row["attack"]): f"{row['knn']:.1f}"
            for row in json.loads(file.read_text())["rows"]
        }
        plain, pair = "units of a plain step", "units with the pair attack"
        accuracies = ("digits, kNN in %", "with the pair attack")
        yield from _row(("method", plain, pair, *accuracies, "presets"), first=True)
        for name, method in METHODS.items():
            units = [str(method.units[attack]) for attack in ("none", "pair")]
            learned = [knn.get((name, attack), "") for attack in ("none", "pair")]
            link = f":ref:`{name} <method-{name}>`"
            yield from _row((link, *units, *learned, _presets_of(name)))
        yield from _row(("untrained", "", "", knn["untrained", "none"], "", ""))


class _Methods(_Written):
    def lines(self) -> Iterable[str]:
        for name, method in METHODS.items():
            yield from _section(method.__name__, f"method-{name}")
            yield from _facts(_method_facts(name, method))
            yield from ("", ".. code-block:: sh", "", f"   {_command(name, method)}", "")
            yield from (f".. autoclass:: {_path(method)}", "")
            yield from _settings(method)


class _OpTable(_Written):
    """What each op computes, in the first sentence of its contract."""

    def lines(self) -> Iterable[str]:
        yield from _row(("op", "what it computes"), first=True)
        for name in ops.__all__:
            about, *_ = (inspect.getdoc(getattr(clae_fast, name)) or "").splitlines()
            yield from _row((f":func:`clae_fast.{name}`", about))


class _Ops(_Written):
    def lines(self) -> Iterable[str]:
        for name in ops.__all__:
            yield from _section(name, f"op-{name}")
            yield from (f".. autofunction:: clae_fast.{name}", "")


class _Examples(_Written):
    def lines(self) -> Iterable[str]:
        for file in sorted((Path(self.env.srcdir).parent / "examples").glob("*.py")):
            about, *_ = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")
            yield from _section(file.name, f"example-{file.stem}")
            yield from (_help(about), "", f".. literalinclude:: ../examples/{file.name}", "")


class _Presets(_Written):
    columns: ClassVar[dict[str, str]] = {
        "method": "method",
        "attack": "attack",
        "dataset": "data set",
        "arch": "encoder",
        "optimizer": "optimizer",
        "lr": "rate",
        "batch_size": "batch",
        "epochs": "epochs",
        "temperature": "T",
    }

    def lines(self) -> Iterable[str]:
        yield from _row(("preset", *self.columns.values()), first=True)
        for name in PRESETS:
            settings = resolve({}, name).to_dict()
            values = (_value(settings[column]) for column in self.columns)
            yield from _row((f"`{name}`", *values))


class _Command(_Written):
    required_arguments = 1

    def lines(self) -> Iterable[str]:
        (name,) = self.arguments
        parser = importlib.import_module(f"clae_fast.{name}")._parser()
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=96)
        yield from _section(parser.prog, f"command-{name}")
        about, *examples = (parser.description or "").split("\n\n")
        yield from (_help(about), "")
        formatter = parser._get_formatter()
        required = [
            formatter._format_args(action, action.dest)
            for action in parser._get_positional_actions()
        ]
        yield from _block(" ".join((parser.prog, *required, "[--flag ...]")))
        for text in examples:
            yield from _block(text)
        for group in parser._action_groups:
            if group._group_actions:
                yield from (f".. rubric:: {group.title}", "")
            for action in group._group_actions:
                text = formatter._expand_help(action) if action.help else ""
                yield f"``{formatter._format_action_invocation(action)}``"
                yield from (f"   {_help(text)}", "")
        if parser.epilog:
            yield from _block(parser.epilog)


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directives."""
    app.add_directive("methods", _Methods)
    app.add_directive("method-table", _MethodTable)
    app.add_directive("ops", _Ops)
    app.add_directive("op-table", _OpTable)
    app.add_directive("presets", _Presets)
    app.add_directive("command", _Command)
    app.add_directive("examples", _Examples)
    return {"parallel_read_safe": True}


def _section(title: str, target: str) -> tuple[str, ...]:
    return (f".. _{target}:", "", title, "-" * len(title), "")


def _facts(facts: Mapping[str, str]) -> Iterable[str]:
    return (f":{name}: {text}" for name, text in facts.items() if text)


def _row(cells: Iterable[str], *, first: bool = False) -> Iterable[str]:
    """A row of a list-table. The first row also opens the table."""
    if first:
        yield from (".. list-table::", "   :header-rows: 1", "   :class: wide", "")
    for column, cell in enumerate(cells):
        yield f"   {'  -' if column else '* -'} {cell}"


def _method_facts(name: str, method: type[Method]) -> dict[str, str]:
    kinds = ", ".join(f"{_KINDS[kind]} {units}" for kind, units in method.units.items())
    needs = ["labels of the training images"] * method.needs_labels
    needs += ["a frozen teacher, ``--teacher``"] * method.needs_teacher
    return {
        "Units of a step": kinds,
        "Needs": ", ".join(needs),
        "Takes": "small crops, ``--small-crops``" * method.small_crops,
        "Temperature": f"{method.own_temperature():g}, ``--temperature``",
        "Presets": _presets_of(name),
    }


def _presets_of(name: str) -> str:
    """The presets that train a method."""
    found = (preset for preset, settings in PRESETS.items() if settings["method"] == name)
    return ", ".join(f"``{preset}``" for preset in found)


def _settings(method: type[Method]) -> Iterable[str]:
    """The settings of a method's own, with default and bounds, and what each means."""
    meanings: dict[str, str] = {}
    for options in reversed(method.Options.__mro__[:-1]):
        _, _, fields = inspect.cleandoc(options.__doc__ or "").partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", fields, re.M):
            meanings[name] = text
    hints = get_type_hints(method.Options, include_extras=True)
    own = method.own_options()
    if own:
        yield from ("   Settings, ``--options NAME=VALUE``:", "")
    for name, (_, default) in own.items():
        bounds = [f", {each.wanted}" for each in getattr(hints[name], "__metadata__", ())]
        yield f"   ``{name}={_value(default)}``{''.join(bounds)}"
        yield from (f"      {' '.join(meanings[name].split())}", "")


def _command(name: str, method: type[Method]) -> str:
    teacher = " --teacher RUN" * method.needs_teacher
    return f"python -m clae_fast.train --method {name}{teacher}"


def _block(text: str) -> Iterable[str]:
    """Lines that are shown as they are."""
    return (".. code-block:: text", "", *(f"   {line}" for line in text.splitlines()), "")


def _help(text: str) -> str:
    """The help of a flag as reStructuredText, with the flags in it as code."""
    escaped = re.sub(r"([\\*`|_])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)--[a-z][a-z-]*", lambda found: f"``{found[0]}``", escaped)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _path(method: type[Method]) -> str:
    """The name to import a method by."""
    public = hasattr(methods, method.__name__)
    return f"{'clae_fast.methods' if public else method.__module__}.{method.__name__}"
