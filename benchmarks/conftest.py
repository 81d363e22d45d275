import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="the sizes of benchmarks/results too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a benchmark its module's SMALL sizes, and with --large its LARGE ones."""
    if "size" in metafunc.fixturenames:
        sizes = metafunc.module.SMALL
        if metafunc.config.getoption("--large", default=False):
            sizes = sizes + metafunc.module.LARGE
        metafunc.parametrize("size", sizes, ids=str)


@pytest.fixture(autouse=True)
def _random_numbers() -> None:
    torch.manual_seed(0)
