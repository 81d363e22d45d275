"""Every native op on every instruction set: this processor's, and others' by emulation."""

import augment_cases
import native_driver
import pytest
import topk_cases as topk
import torch
from op_cases import check, run, searched_cases

import clae_fast
from clae_fast import _impl, _native, reference
from clae_fast.testing import assert_bitwise_equal

ISAS = list(dict.fromkeys([*native_driver.isas(), "neon"]))

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    pytest.mark.skipif(not _native.has_cpu(), reason="built with CLAE_FAST_BUILD=none"),
]
CASES = searched_cases()
every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def driver(request):
    """A function that runs the driver of a toolchain, and ends it after the module's tests."""
    modules = {}

    def start(toolchain):
        if missing := toolchain.missing():
            pytest.skip(missing)
        if toolchain.compiler not in modules:
            program = native_driver.build(toolchain, request.config.cache.mkdir("native_driver"))
            modules[toolchain.compiler] = native_driver.Module(program, toolchain.runner)
        return modules[toolchain.compiler]

    yield start
    for module in modules.values():
        module.close()


@pytest.fixture(scope="module", params=ISAS, autouse=True)
def isa(request, driver):
    """Runs impl="native" with an instruction set."""
    name = request.param
    if name in _native.isas():
        with _native.force_isa(name):
            yield name
        return
    toolchain = native_driver.cross() if name == "neon" else native_driver.emulated()
    with native_driver.in_place_of_compiled(driver(toolchain), name):
        yield name


def test_what_runs(isa):
    assert _native.isa() == isa
    assert _impl.describe(torch.device("cpu")).startswith(f"native, {isa}, ")


@every_op
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02])
# vectors and tiles of every width end inside, at and beside these sizes; the largest has blocks
@pytest.mark.parametrize(("N", "D"), [(1, 2), (2, 3), (7, 5), (17, 16), (33, 70), (131, 33)])
def test_against_fp64(case, N, D, temperature):
    tensors = case.tensors(N, D, noise=0.3)
    check(case, tensors, temperature, run(case, tensors, temperature=temperature, impl="native"))


@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("N", "D"), [(5, 2), (21, 35), (67, 32)])
def test_half_precision(case, N, D, dtype):
    tensors = case.tensors(N, D, dtype=dtype)
    check(case, tensors, 0.1, run(case, tensors, temperature=0.1, impl="native"))


@every_op
def test_rows_around_the_norm_floor(case):
    tensors = case.tensors(19, 6)
    for first, name in enumerate(case.rows):
        z = tensors[name]
        z[2 * first], z[2 * first + 1], z[2 * first + 2] = 0, 1e-13, z[2 * first + 2] * 1e-6
    check(case, tensors, 0.5, run(case, tensors, temperature=0.5, impl="native"))


@every_op
def test_nan(case):
    tensors = case.tensors(19, 6)
    tensors[case.rows[0]][3, 1] = torch.nan
    first, *_ = run(case, tensors, temperature=0.1, impl="native")
    assert first.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("N", "M", "D", "k"), [(7, 97, 5, 3), (33, 131, 70, 65)])
def test_topk_similarity(N, M, D, k, dtype):
    topk.check("native", *topk.rows(N, M, D, dtype), k)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 7, 11), (2, 300)])
def test_linf_step(shape, dtype, grad_dtype):
    x, x0, grad = torch.randn(3, *shape)
    x, x0, grad = x.to(dtype), (x + 0.02 * x0).to(dtype), grad.to(grad_dtype)
    for eps in (0.03, [0.03 + 0.001 * c for c in range(shape[1])]):
        options = {"alpha": 0.02, "eps": eps, "x0": x0, "lo": -1.0, "hi": 1.1}
        actual = clae_fast.linf_step(x, grad, impl="native", **options)
        assert_bitwise_equal(actual, reference.linf_step(x, grad, **options))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(23, 41, 17), (7, 5, 20), (50, 60, 41)])
def test_augment_each_step(height, width, size, interpolation):
    augment_cases.check_native(height, width, size, interpolation=interpolation)
