"""The layers that a run's settings come from; each wins over the ones before it.

1. the defaults of the fields of `Config`, which make the run on scikit-learn's digits
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
        settings: Values by name, which win over everything else.
        preset: A name in `PRESETS`.
        recipe: A name in `RECIPES`.
        file: A YAML file with the names of settings as keys. It may also have `preset` and
            `recipe`, which count where the arguments are not given.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A name is unknown, a value is out of range, or the file cannot be used.
    """
    chosen: dict[str, Any] = {}
    # each layer may set some of the method's own settings
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
    """What each layer says, by the layer's name; arguments and errors are those of `resolve`."""
    given = read(file) if file else {}
    # these two are no settings
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
    """Reads 3e-4 as a number, as JSON and YAML 1.2 do; YAML 1.1 takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, each of the right type.

    Raises:
        ValueError: The file is missing, empty or no YAML, or a key is unknown, given twice or of
            the wrong type; the message is one line with the file and the number of the line.
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
        # the file has characters that YAML does not allow
        raise ValueError(f"{path}: {str(error).partition(chr(10))[0]}") from error
    return settings


def scalar(text: str) -> Any:
    """A number, true, false or text, as a YAML file would have it."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _value(loader: _Loader, name: str, node: yaml.Node) -> Any:
    # YAML 1.1 reads yes and no as true and false, but some settings take the words
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
