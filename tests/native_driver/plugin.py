"""A pytest plugin that runs impl="native" in a driver compiled with sanitizers.

PYTHONPATH=tests python -m pytest -p native_driver.plugin --sanitize=address,undefined FILE...
"""

from contextlib import ExitStack

import pytest

import native_driver


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the sanitizers' names, as the compiler knows them."""
    parser.addoption("--sanitize", default="address,undefined", metavar="KINDS")


def pytest_configure(config: pytest.Config) -> None:
    """Replace the compiled module before tests are collected."""
    toolchain = native_driver.sanitized(config.getoption("--sanitize"))
    program = native_driver.build(toolchain, config.cache.mkdir("native_driver"))
    stack = ExitStack()
    config.add_cleanup(stack.close)
    module = native_driver.Module(program)
    stack.callback(module.close)
    stack.enter_context(native_driver.in_place_of_compiled(module))
