import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="the sizes of benchmarks/results too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a benchmark its small sizes, and with --large its large ones."""
    if "size" in metafunc.fixturenames:
        small, large = metafunc.module.SIZES[metafunc.function.__name__]
        chosen = small + large * metafunc.config.getoption("--large", default=False)
        metafunc.parametrize("size", chosen, ids=str)
