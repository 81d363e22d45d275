"""Native ops beside threads and processes: how many run, and that they return."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_cases import run, searched_cases
from torch.utils.data import DataLoader

import clae_fast
from clae_fast import _native
from clae_fast.testing import assert_bitwise_equal, projections

CASES = searched_cases()
NATIVE = [*CASES, "augment", "linf_step", "topk_similarity"]
SECONDS = 60

pytestmark = [
    pytest.mark.skipif(not _native.has_cpu(), reason="built with CLAE_FAST_BUILD=none"),
    # what is tested here; Python 3.12 warns of it
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def compute(name="tied_nt_xent", threads=None):
    """The op's results on rows that are enough for more than three threads.

    That of the default goes without autograd, which refuses to run in a fork once it has threads of
    its own: for each GPU, and for those that fake tensors have pretended before it started.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "augment":
        images = torch.arange(5 * 3 * 9 * 9).view(5, 3, 9, 9).byte()
        row = [0, 0, 9, 9, 0, 3, 1, 0, 2, 1, 0.7, 1.2, 0.1, 0, 1, 0]
        params = torch.tensor(row).expand(2, 5, -1)
        return list(clae_fast.augment(images, params, size=7, impl="native"))
    if name == "linf_step":
        x, grad = projections(67, 997)
        return [clae_fast.linf_step(x, grad, alpha=0.1, eps=0.05, impl="native")]
    if name == "topk_similarity":
        return list(clae_fast.topk_similarity(*projections(203, 33), 5, impl="native"))
    case = CASES[name]
    return run(case, case.tensors(203, 33, noise=0.5), impl="native")


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_bitwise_equal(a, e)


def python(code, **environment):
    """What a process of its own prints that begins with this file's `compute`."""
    here = os.path.dirname(__file__)
    start = f"import os, sys; sys.path[:0] = [{here!r}, {os.path.dirname(here)!r}]\n"
    start += "import torch; from test_threads import *\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def tasks():
    """The threads of this process."""
    return len(os.listdir("/proc/self/task"))


def test_as_many_threads_as_torch_is_told():
    code = """
x = torch.rand(1 << 20)
for threads in (1, 3, 2, 1):
    before = tasks()
    compute(threads=threads)
    after = tasks()
    x.exp()
    print(after, tasks())
"""
    counts = list(map(int, python(code, OMP_NUM_THREADS="1")))
    ours, with_torch = counts[::2], counts[1::2]
    assert [count - ours[0] for count in ours[:2]] == [0, 2]
    assert ours[2] <= ours[1]
    # torch's own ops run on the same threads, not on others beside them
    assert with_torch == ours


def test_no_threads_below_an_openmp_region():
    code = """
import ctypes, re
names = re.findall(r"/\\S*lib(?:g|i)?omp\\S*", open("/proc/self/maps").read())
libraries = [ctypes.CDLL(name) for name in dict.fromkeys(names)]
libraries = [library for library in libraries if hasattr(library, "GOMP_parallel")]
expected, counts = compute(threads=3), [tasks()]
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    assert_same(compute(), expected)
    counts.append(tasks())
if libraries:
    libraries[0].GOMP_parallel(body, None, 2, 0)
    print(*counts)
"""
    counts = list(map(int, python(code)))
    if not counts:
        pytest.skip("torch was built without OpenMP")
    outside, *inside = counts
    assert len(inside) == 2
    assert max(inside) <= outside


def test_many_callers_at_once():
    expected = {name: compute(name, 2) for name in NATIVE}
    with ThreadPoolExecutor(4) as pool:
        futures = [(name, pool.submit(compute, name)) for name in NATIVE * 8]
        for name, future in futures:
            assert_same(future.result(SECONDS), expected[name])


def forked(check):
    """Whether `check` passes in a forked child, which is killed where it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            check()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_after_a_fork():
    expected = compute(threads=3)
    assert forked(lambda: assert_same(compute(), expected))
    assert forked(lambda: assert_same(compute(threads=2), expected))
    assert_same(compute(), expected)
    # a child's child
    assert forked(lambda: os._exit(not forked(lambda: assert_same(compute(), expected))))


def test_fork_before_the_first_use():
    code = """
torch.set_num_threads(3)
assert forked(compute)
compute()
assert forked(compute)
"""
    python(code)


def test_fork_while_another_thread_computes():
    expected = compute(threads=3)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            compute()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert all(forked(lambda: assert_same(compute(), expected)) for _ in range(5))
    finally:
        stop.set()
        worker.join(SECONDS)
    assert not worker.is_alive()
    assert_same(compute(), expected)


class Results(torch.utils.data.Dataset):
    """Item i is the result of the call, computed where the item is loaded."""

    def __init__(self, threads):
        self.threads = threads

    def __len__(self):
        return 4

    def __getitem__(self, index):
        # a worker runs with one thread unless it asks for more
        return compute(threads=self.threads)[0]


@pytest.mark.parametrize(("start", "threads"), [("fork", None), ("fork", 3), ("spawn", 3)])
def test_in_data_loader_workers(start, threads):
    expected = compute(threads=3)[0]
    context = multiprocessing.get_context(start)
    loader = DataLoader(
        Results(threads),
        batch_size=1,
        num_workers=2,
        multiprocessing_context=context,
        timeout=SECONDS,
    )
    for (result,) in loader:
        assert_bitwise_equal(result, expected)
        # the parent computes meanwhile
        assert_bitwise_equal(compute()[0], expected)


def test_exit_right_after_use():
    code = """
compute(threads=3)
threading.Thread(target=compute).start()
compute()
"""
    python(code)
