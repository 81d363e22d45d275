"""The specification: every op in eager PyTorch, any dtype and device, differentiated by autograd.

Nothing here is fast. Where an implementation differs from it by more than rounding, the
implementation is wrong. Each module defines the function that it is named after.
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...


for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        _function = getattr(import_module(f"{__name__}.{_module.name}"), _module.name)
        globals()[_module.name] = _function
