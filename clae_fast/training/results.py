"""The evaluation of a checkpoint, and the file results.json that it leaves in the run's folder.

The encoder of the checkpoint, in eval mode with its clean BatchNorm, computes the features h of the
labeled training images and of the whole test set once, and the probes use these features. Images
that were held out for validation are in neither set. What a probe has to choose, such as the
penalty of the linear one, it chooses on training images. results.json has

"knn" "linear"             accuracies in percent: a weighted vote, and logistic regression
"alignment" "uniformity"   of projections of the run's own views of the test images
"protocol"                 "clean": the numbers came about as described here
"step" "checkpoint"        the checkpoint that the numbers belong to
"corrupt"                  how many images were skipped
"finetune"                 {"0.01", "0.1": accuracy after fine-tuning on this part of the labels}
"robust"                   {"fgsm", "pgd20", "autoattack": {"8/255", "4/255": that of "linear"}}
"susceptibility"           {"cosine_attacked", "cosine_random"} of projections with those before
"released"                 numbers by the protocol of CLAE's released code, `evaluation.released`
"transfer"                 {data set: accuracies and measures of projections on it}

A later call with the same checkpoint at the same step adds to the file; any other call replaces it.
"""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clae_fast import data
from clae_fast.config import Config
from clae_fast.distributed.device import pick_device
from clae_fast.errors import RunFolderError
from clae_fast.evaluation import (
    accuracy,
    extract_features,
    fit_linear,
    knn_accuracy,
    view_geometry,
)
from clae_fast.evaluation.features import batches
from clae_fast.evaluation.finetune import finetune_accuracies
from clae_fast.evaluation.released import released_protocol
from clae_fast.evaluation.robust import (
    autoattack_accuracies,
    require_autoattack,
    robust_accuracies,
)
from clae_fast.evaluation.susceptibility import susceptibility
from clae_fast.nn import Encoder
from clae_fast.training import encoders
from clae_fast.training.build import build_attack, hold_out, load_data
from clae_fast.training.run_folder import RunFolder

_FILE = "results.json"


def evaluate(
    folder: RunFolder,
    path: Path | None = None,
    *,
    splits: data.Splits | None = None,
    transfer: tuple[str, data.Splits] | None = None,
    extras: Collection[str] = (),
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run and writes the run's results.json.

    Args:
        folder: The run.
        path: The checkpoint; by default the best one in validation, or the last one without
            validation.
        splits: The run's data set, if it is loaded already.
        transfer: The name of another data set and the set itself, to evaluate on. The run's own is
            then evaluated only where results.json has nothing of this checkpoint.
        extras: What to measure besides the quick probes: "finetune", "robust", "autoattack",
            "susceptibility", "released".

    Returns:
        What results.json has now, as the module says.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged or of another run.
        DataError: The data set cannot be used.
        ValueError: AutoAttack is not installed, or the data set has too few classes for it.
    """
    if "autoattack" in extras:
        require_autoattack()
    config = folder.config
    path = path or folder.best_or_last
    device = pick_device(config.engine.device)
    encoder, step = encoders.restore(folder, path, device)
    identity = {"step": step, "checkpoint": path.name}
    results = _read(folder, identity)
    if transfer is None or "knn" not in results:
        own, _ = hold_out(config.run, splits or load_data(config.data))
        asked = extras if transfer is None else ()
        measured = _measure(encoder, own, config, device, asked)
        results = _merge(results, measured | identity | {"corrupt": len(own.test.corrupt)})
    if transfer is not None:
        name, others = transfer
        measured = _measure(encoder, others, config, device, extras)
        results = _merge(results, {"transfer": {name: measured}})
    folder.write_json(_FILE, results)
    return results


def _measure(
    encoder: Encoder,
    splits: data.Splits,
    config: Config,
    device: torch.device,
    extras: Collection[str],
) -> dict[str, Any]:
    train = extract_features(encoder, splits.labeled, config, device)
    test = extract_features(encoder, splits.test, config, device)
    probe = fit_linear(*train, seed=config.run.seed)
    results: dict[str, Any] = {
        "protocol": "clean",
        "knn": knn_accuracy(*train, *test),
        "linear": accuracy(probe, *test),
        **view_geometry(encoder, splits.test, config, device),
    }
    if "released" in extras:
        results["released"] = released_protocol(encoder, config, train, test)
    if "susceptibility" in extras:
        found = susceptibility(encoder, splits.test, config, device, build_attack(config))
        results["susceptibility"] = found
    if "finetune" in extras:
        results["finetune"] = finetune_accuracies(encoder, splits, config, device)
    classifier = nn.Sequential(encoder.backbone, probe)
    attacks: dict[str, Any] = {}
    if "robust" in extras:
        images = batches(splits.test, config, device)
        attacks |= robust_accuracies(classifier, images, seed=config.run.seed)
    if "autoattack" in extras:
        images = batches(splits.test, config, device)
        attacks["autoattack"] = autoattack_accuracies(classifier, images, seed=config.run.seed)
    if attacks:
        results["robust"] = attacks
    return results


def _read(folder: RunFolder, identity: dict[str, Any]) -> dict[str, Any]:
    """What results.json has of this checkpoint; nothing if it is damaged or of another one."""
    with contextlib.suppress(RunFolderError):
        results = folder.read_json(_FILE)
        if identity.items() <= results.items():
            return results
    return {}


def _merge(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`before` with what is new, also inside the dictionaries that both have."""
    both = {
        name: _merge(before[name], value)
        for name, value in new.items()
        if isinstance(value, dict) and isinstance(before.get(name), dict)
    }
    return before | new | both
