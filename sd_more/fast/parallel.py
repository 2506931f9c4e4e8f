"""Work on all cores, and what that asks of OpenBLAS and of malloc."""

import contextlib
import ctypes
import functools
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

# %% OpenBLAS --------------------------------------------------------------------------------------
# NumPy brings this library along for its matrix products. It has threads of its own; two of its
# functions say how many it may use. They are reached through the file that NumPy has loaded.


@functools.cache
def openblas(name):
    """OpenBLAS's function of that name, such as get_num_threads; None with another library."""
    try:
        library = ctypes.CDLL(sys.modules["numpy._core._multiarray_umath"].__file__)
    except (KeyError, OSError):
        return None
    for prefix, suffix in itertools.product(("scipy_openblas", "openblas"), ("64_", "")):
        if hasattr(library, full := f"{prefix}_{name}{suffix}"):
            return getattr(library, full)
    return None


def kernels():
    """What OpenBLAS calls the kernels that it chose for this processor, such as "Haswell"."""
    if get := openblas("get_corename"):
        get.restype = ctypes.c_char_p
        return get().decode()
    return None


@functools.cache
def cores():
    """How many threads compute: as many as OpenBLAS was told to use, by default one per core.

    1 with another library: then it is this that uses the cores, inside each product.
    """
    return (
        openblas("get_num_threads")()
        if openblas("get_num_threads") and openblas("set_num_threads")
        else 1
    )


class OneBlasThread:
    """A context: while any thread is inside, each product is computed by the thread that asks."""

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, 1

    def __enter__(self):
        with self.lock:
            if self.inside == 0 and cores() > 1:
                self.before = openblas("get_num_threads")()
                openblas("set_num_threads")(1)
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and cores() > 1:
                openblas("set_num_threads")(self.before)


ONE_BLAS_THREAD = OneBlasThread()


# %% Threads ---------------------------------------------------------------------------------------


@functools.cache
def executor():
    return ThreadPoolExecutor(max(1, cores() - 1), "sd_more.fast")


SMALL = 1 << 23  # products of two numbers; to wake the other cores takes longer


def parallel_for(f, *jobs, work):
    """Call f(*job) for each combination of jobs, on all cores; little work in this thread alone.

    work: how many products of two numbers it is, roughly; to go over an array once counts as 16 a
    number. OpenBLAS has one thread either way: its own cost more than they give for little work,
    and far more where other programs use the cores.
    """
    jobs = list(itertools.product(*jobs))
    left = iter(jobs)

    def take():
        with np.errstate(all="ignore"):  # a thread's own; what is not finite is seen in the end
            for job in left:
                f(*job)

    helpers = min(len(jobs), cores()) - 1 if work >= SMALL else 0
    with ONE_BLAS_THREAD:
        helpers = [executor().submit(take) for _ in range(helpers)]
        try:
            take()
        finally:  # nothing is left: those that have not begun need not, others may be at a job
            helpers = [helper for helper in helpers if not helper.cancel()]
            wait(helpers)
    for helper in helpers:
        helper.result()  # raises what was raised there


def parallel_map(f, jobs, work):
    """-> [f(job) for job in jobs], on all cores."""
    results = [None] * len(jobs)

    def put(i):
        results[i] = f(jobs[i])

    parallel_for(put, range(len(jobs)), work=work)
    return results


def slices(n, size):
    """0 ... n in slices of that size; the last may be smaller."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


# %% Memory ----------------------------------------------------------------------------------------


@functools.cache
def keep_memory():
    """Ask glibc, once, to keep the memory that one array leaves for the next one.

    Large arrays it would get from the system and give back each time, and the system clears every
    page. With this np.empty costs next to nothing, so that kernels ask for memory where they need
    it. It counts for the whole process: up to 2 GB that is not in use stays, until release_memory.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    call_glibc("mallopt", M_TRIM_THRESHOLD, (1 << 31) - 1)
    call_glibc("mallopt", M_MMAP_MAX, 0)
    call_glibc("mallopt", M_ARENA_MAX, 1)  # memory for all threads in one place


def release_memory():
    """Give back to the system what keep_memory keeps."""
    call_glibc("malloc_trim", 0)


def call_glibc(name, *arguments):
    """Does nothing where there is another C library."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), name)(*arguments)
