"""The emulator that runs CUDA C++ kernels where there is no GPU: its layouts, barriers, errors."""

import ctypes

import cuda_emulator
import pytest
import torch


@pytest.fixture(scope="module")
def kernels():
    library = ctypes.CDLL(str(cuda_emulator.build_test("selftest")))

    def call(name, *arguments):
        pointers = (
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments
        )
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        return function(*pointers).decode()

    return call


@pytest.fixture(params=["up", "down"])
def _order(request, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", request.param)


@pytest.mark.usefixtures("_order")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("matmul_fp16", torch.float16),
        ("matmul_bf16", torch.bfloat16),
        ("staged_matmul", torch.float16),
    ],
)
def test_fragments_make_a_matrix_product(kernels, name, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.empty(16, 8)
    assert kernels(name, a, b, c) == "no error"
    torch.testing.assert_close(c, a.float() @ b.float())


@pytest.mark.usefixtures("_order")
def test_barriers_and_shuffles(kernels):
    x, sums, out = torch.randn(3, 128), torch.empty(3), torch.empty(3, 128)
    assert kernels("sums", x, sums, out, 3, 128, True) == "no error"
    torch.testing.assert_close(sums, x.sum(1))
    torch.testing.assert_close(out, x.sum() + x[:, :32].sum(1, keepdim=True).expand(3, 128))


def test_what_would_hang_or_be_undefined_is_an_error(kernels):
    out = torch.empty(64)
    assert "63 of 64 threads of a block wait at __syncthreads" in kernels("exits", out)
    assert "threads of a block diverge between __syncthreads" in kernels("diverges", out)
    assert "past the end of the dynamic shared memory" in kernels("overruns", out)
    sums = kernels("sums", out, out, out, 1, 64, False)
    assert "grid.sync() in a launch that is not cooperative" in sums
    too_large = kernels("sums", out, out, out, 1000, 64, True)
    assert too_large == "too many blocks in cooperative launch"


def test_a_race_depends_on_the_order(kernels, monkeypatch):
    outs = []
    for order in ("up", "down"):
        monkeypatch.setenv("CUDA_EMULATOR_ORDER", order)
        outs.append(torch.empty(32))
        assert kernels("races", outs[-1]) == "no error"
    assert outs[0].isnan().sum() == 16
    assert outs[1].isnan().sum() == 15
