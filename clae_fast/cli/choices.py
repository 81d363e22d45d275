"""What names a user of `clae_fast.train` can choose from, as the end of its help."""

from clae_fast.cli.parser import columns, shown
from clae_fast.config.layers import resolve
from clae_fast.config.presets import PRESETS
from clae_fast.data import RECIPES, Recipe
from clae_fast.methods import METHODS


def listed() -> str:
    """Presets, recipes and the settings that only one method has."""
    known = {name: method.own_options() for name, method in METHODS.items()}
    tables = {
        "presets": {name: _preset(name) for name in PRESETS},
        "recipes": {name: _recipe(recipe) for name, recipe in RECIPES.items()},
        "settings of one method, --options": {
            name: " ".join(f"{option}={shown(default)}" for option, (_, default) in own.items())
            for name, own in known.items()
            if own
        },
    }
    return "\n\n".join(f"{title}:\n{columns(lines)}" for title, lines in tables.items())


def _preset(name: str) -> str:
    config = resolve({}, name)
    kind, optimization = config.adversary.attack, config.optimization
    attack = "no attack" if kind == "none" else f"{kind} attack"
    size = f"{optimization.epochs} epochs of batch {optimization.batch_size}"
    return f"{attack}, {config.encoder.arch}, {size}"


def _recipe(recipe: Recipe) -> str:
    parts = [f"crops from {recipe.crop_min_scale:g}, {recipe.interpolation}"]
    parts.append(f"jitter {shown(recipe.color_jitter)}")
    for name, chances in (("blur", recipe.blur_prob), ("solarize", recipe.solarize_prob)):
        if any(chances):
            parts.append(f"{name} {shown(chances)}")
    return ", ".join(parts)
