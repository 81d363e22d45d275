"""What a run would do: its settings, its steps and their cost. A dry run writes nothing."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clae_fast import data, distributed
from clae_fast.cli.parser import columns, shown
from clae_fast.config import Config, groups
from clae_fast.data.memory import readable
from clae_fast.distributed.device import pick_device
from clae_fast.training import cost
from clae_fast.training.build import build_method, build_schedule, hold_out, load_data


def plan(config: Config, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What would be trained, in plain values.

    Args:
        config: The settings of the run.
        layers: Where they come from, as `clae_fast.config.layers.layers` has it.

    Returns:
        "config"; "sources" of the settings that differ from the defaults; "images" and
        "steps_per_epoch", None where the data is not there yet; "units" of a step; "parameters"
        that are trained, and those of the "encoder" alone; and estimates of "memory" in bytes.

    Raises:
        DataError: The data set cannot be used.
        ValueError: The settings do not fit the data or this machine, or several processes run.
    """
    if distributed.started_by_torchrun():
        raise ValueError("--dry-run describes one process: start it without torchrun")
    device = pick_device(config.engine.device)
    method = build_method(config)
    images = steps = resident = None
    split = _training_images(config)
    if split is not None:
        images = len(split)
        steps = build_schedule(config, images).steps_per_epoch
        resident = data.resident_bytes(split, config.data.resident, device=device)
    memory = cost.step_memory(config, method, device)
    if resident is not None:
        memory["images"] = resident
    return {
        "config": config.to_dict(),
        "sources": _sources(config, layers),
        "device": str(device),
        "images": images,
        "steps_per_epoch": steps,
        "units": cost.step_units(config),
        "parameters": cost.parameters(method),
        "encoder": cost.parameters(method.encoder),
        "memory": memory | {"total": sum(memory.values())},
    }


def _training_images(config: Config) -> data.Split | None:
    """The training images; None where they would have to be fetched first."""
    if config.data.dataset.startswith("hf/"):
        return None
    try:
        splits = load_data(replace(config.data, download=False))
    except data.DataError:
        if config.data.download:
            return None
        raise
    return hold_out(config.run, splits)[0].train


def _sources(config: Config, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The layer that decides each setting that differs from the defaults."""
    named = {name: layer for layer, values in layers.items() for name in values}
    settings = config.to_dict()
    changed = [
        field.name
        for group in groups().values()
        for field in group
        if field.default not in (dataclasses.MISSING, settings[field.name])
    ]
    changed += ["options"] * ("options" in named)
    # what no layer says is the method's own
    return {name: named.get(name, f"method {config.objective.method}") for name in changed}


def text(plan: Mapping[str, Any]) -> str:
    """A plan as text."""
    config, units = plan["config"], plan["units"]
    changed = {
        f"{name:<18} {shown(config[name])}": f"({source})"
        for name, source in plan["sources"].items()
    }
    facts = {
        "training images": _number(plan["images"]),
        "steps an epoch": _number(plan["steps_per_epoch"]),
        "epochs": f"{config['epochs']:,}",
        "units a step": _units(config, units),
        "parameters": f"{plan['parameters']:,}, {plan['encoder']:,} of them the encoder's",
    }
    sizes = {_MEMORY[name]: readable(size) for name, size in plan["memory"].items()}
    tables = {
        "settings that differ from the defaults": changed,
        "training": facts,
        f"memory on {plan['device']}, estimated": sizes,
    }
    return "\n\n".join(f"{title}:\n{columns(lines)}" for title, lines in tables.items() if lines)


_MEMORY = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "optimizer": "state of the optimizer",
    "views": "views of a batch",
    "activations": "activations kept for backward passes",
    "images": "training images, decoded",
    "total": "together, and what libraries need besides",
}


def _number(count: int | None) -> str:
    return "not known before they are fetched" if count is None else f"{count:,}"


def _units(config: Mapping[str, Any], units: Mapping[str, float]) -> str:
    mean, plain = units["mean"], units["plain"]
    if config["attack"] == "none":
        return f"{plain:g}"
    ratio = f"{mean:.4g}, {mean / plain:.2f} times those of plain training"
    if config["adv_every"] == 1:
        return ratio
    every = config["adv_every"]
    return f"{ratio}: {units['attacked']:.4g} in one of {every}, {plain:g} in the others"
