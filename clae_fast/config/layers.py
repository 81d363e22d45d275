"""Where a run's settings come from, later ones winning.

1. the defaults of the fields of `Config`: the run on scikit-learn's digits
2. what the data set needs, `presets.dataset_defaults`
3. a preset, `presets.PRESETS`
4. a recipe of augmentation, `data.RECIPES`
5. a YAML file
6. the caller, such as the command line
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clae_fast.config.config import Config, convert, groups, nearest, require_known
from clae_fast.config.presets import PRESETS, dataset_defaults
from clae_fast.data import RECIPES

_LAYERS = ("preset", "recipe")
_CHOICES = {
    field.name: field.metadata["choices"] or () for group in groups().values() for field in group
}


def resolve(
    settings: Mapping[str, Any],
    preset: str | None = None,
    *,
    recipe: str | None = None,
    file: Path | None = None,
) -> Config:
    """Completes `settings` from the other layers.

    Args:
        settings: values by field name; they win over everything else.
        preset: a name in `PRESETS`.
        recipe: a name in `RECIPES`.
        file: a YAML file with the names of fields as keys, and perhaps `preset` and `recipe`, which
            stand for the arguments where those are not given.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: an unknown name, a value out of range, or a file that cannot be used.
    """
    chosen: dict[str, Any] = {}
    # of the method's own settings each layer has some
    options: dict[str, Any] = {}
    for layer in layers(settings, preset, recipe=recipe, file=file).values():
        options |= convert("options", layer.get("options", {}))
        chosen |= layer
    return Config.from_dict(chosen | {"options": options})


def layers(
    settings: Mapping[str, Any],
    preset: str | None = None,
    *,
    recipe: str | None = None,
    file: Path | None = None,
) -> dict[str, Mapping[str, Any]]:
    """Where settings come from: what each layer says, by its name, the later winning.

    Arguments and errors are those of `resolve`.
    """
    given = read(file) if file else {}
    # taken out of the file's settings in any case
    in_file = {name: given.pop(name, None) for name in _LAYERS}
    preset, recipe = preset or in_file["preset"], recipe or in_file["recipe"]
    found: dict[str, Mapping[str, Any]] = {}
    if preset is not None:
        found[f"preset {preset}"] = PRESETS[_known("preset", preset, PRESETS)]
    if recipe is not None:
        known = RECIPES[_known("recipe", recipe, RECIPES)]
        found[f"recipe {recipe}"] = dataclasses.asdict(known)
    if file is not None:
        found[str(file)] = given
    found["flags"] = settings
    datasets = [layer["dataset"] for layer in found.values() if "dataset" in layer]
    dataset = datasets[-1] if datasets else "digits"
    return {f"data set {dataset}": dataset_defaults(dataset), **found}


def _known(what: str, name: str, names: Mapping[str, Any]) -> str:
    if name not in names:
        raise ValueError(
            f"{what} must be one of {', '.join(names)}, got {name!r}: "
            f"the nearest is {nearest(name, names)!r}"
        )
    return name


class _Loader(yaml.SafeLoader):
    """Reads 3e-4 as a number, which YAML 1.1 takes for text; JSON and YAML 1.2 agree with us."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, checked one by one but not against each other.

    Raises:
        ValueError: the file is missing, empty or no YAML, or a key is unknown, given twice or of
            the wrong type; one line with the file and the number of the line.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None or node.tag == "tag:yaml.org,2002:null":
            raise ValueError(f"{path} holds no settings")
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}, line {_line(node)}: wanted `name: value`, a line a setting")
        settings: dict[str, Any] = {}
        for key, value in node.value:
            name = str(loader.construct_object(key, deep=True))
            try:
                _add(settings, name, _value(loader, name, value))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {_line(key)}: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: {error.problem}") from error
    except yaml.YAMLError as error:
        # characters that no YAML may hold
        raise ValueError(f"{path}: {str(error).partition(chr(10))[0]}") from error
    return settings


def scalar(text: str) -> Any:
    """A number, true, false or text, as a YAML file would say it."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _value(loader: _Loader, name: str, node: yaml.Node) -> Any:
    # to YAML 1.1 the words yes and no are true and false, where a setting may mean the words
    if node.value in _CHOICES.get(name, ()):
        return node.value
    return loader.construct_object(node, deep=True)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _add(settings: dict[str, Any], name: str, value: Any) -> None:
    if name in settings:
        raise ValueError(f"{name} is given twice")
    if name not in _LAYERS:
        require_known(name)
        settings[name] = convert(name, value)
    elif isinstance(value, str):
        settings[name] = value
    else:
        raise TypeError(f"{name} must be text, got {value!r}")
