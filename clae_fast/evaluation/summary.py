"""Presents results: lines for one run, means and a table for several."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clae_fast.config import MAY_CHANGE, Config
from clae_fast.evaluation.intervals import mean_and_interval, with_interval

# the other numbers are accuracies in percent
NOT_PER_CENT = ("alignment", "uniformity", "cosine_attacked", "cosine_random")
# runs that differ only in these settings repeat one training with several seeds
_SAME = {"seed", *MAY_CHANGE} - {"epochs"}


def flat(values: Mapping[str, Any], *above: str) -> Iterator[tuple[str, Any]]:
    """Values by name; the names of nested values begin with those above them."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, *above, name)
        else:
            yield " ".join((*above, name)), value


def flatten(results: dict[str, Any]) -> dict[str, float]:
    """The measured numbers of a results.json by name, such as "robust pgd20 8/255"."""
    # whole numbers are counts, such as steps
    return {name: value for name, value in flat(results) if isinstance(value, float)}


def report(results: dict[str, Any]) -> str:
    """The results of one run, one in each line."""
    lines = []
    if results["checkpoint"] != "last.pt":
        lines.append(f"checkpoint: {results['checkpoint']}, step {results['step']}")
    for name, value in flatten(results).items():
        accuracy = _is_accuracy(name)
        lines.append(f"{name} accuracy: {value:.1f} %" if accuracy else f"{name}: {value:.3f}")
    return "\n".join(lines)


def summarize(runs: Sequence[tuple[str, Config, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means over runs that differ in nothing but their seed.

    Args:
        runs: The name, the settings and the results of each run.

    Returns:
        A dictionary for each group of such runs. It has the "settings" that differ between groups,
        the names of its "runs", and the "metrics" that all its runs have. A metric has a "mean" and
        "ci95", half the width of the 95 % interval by Student's t, which is None for a single run.
    """
    groups: dict[str, list[tuple[str, Config, dict[str, Any]]]] = {}
    for run in runs:
        groups.setdefault(repr(_settings(run[1])), []).append(run)
    settings = [_settings(members[0][1]) for members in groups.values()]
    differ = [name for name in settings[0] if any(s[name] != settings[0][name] for s in settings)]
    means = []
    for own, members in zip(settings, groups.values(), strict=True):
        numbers = [flatten(results) for _, _, results in members]
        metrics = {}
        for metric in numbers[0]:
            if all(metric in found for found in numbers):
                mean, half = mean_and_interval([found[metric] for found in numbers])
                metrics[metric] = {"mean": mean, "ci95": half}
        means.append(
            {
                "settings": {name: own[name] for name in differ},
                "runs": [name for name, _, _ in members],
                "metrics": metrics,
            }
        )
    return means


def table(groups: Sequence[dict[str, Any]]) -> str:
    """The means as a table in Markdown, with a column for each group."""
    names = list(dict.fromkeys(metric for group in groups for metric in group["metrics"]))
    lines = [f"| | {' | '.join(map(_title, groups))} |", "|---" * (1 + len(groups)) + "|"]
    for name in names:
        accuracy = _is_accuracy(name)
        cells = []
        for group in groups:
            found = group["metrics"].get(name)
            form = ".1f" if accuracy else ".3f"
            cells.append(with_interval(found["mean"], found["ci95"], form) if found else "")
        lines.append(f"| {name}{' accuracy, %' if accuracy else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_accuracy(name: str) -> bool:
    return name.split()[-1] not in NOT_PER_CENT


def _settings(config: Config) -> dict[str, Any]:
    settings = config.to_dict()
    return {name: value for name, value in settings.items() if name not in _SAME}


def _title(group: dict[str, Any]) -> str:
    runs = group["runs"]
    settings = ", ".join(f"{name} {value}" for name, value in group["settings"].items())
    return f"{settings}, n = {len(runs)}" if settings else f"n = {len(runs)}"


def repeated_seeds(runs: Sequence[tuple[str, Config, dict[str, Any]]]) -> list[tuple[str, str]]:
    """Pairs of runs with the same settings and the same seed, which are not two samples."""
    first: dict[str, str] = {}
    pairs = []
    for name, config, _ in runs:
        key = repr(_settings(config) | {"seed": config.run.seed})
        if key in first:
            pairs.append((first[key], name))
        first.setdefault(key, name)
    return pairs
