import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from numba import njit

from fastwkv.kernels.cpu import numerics
from fastwkv.kernels.cpu.numerics import TAGS, exp, exp_sum, load, store
from fastwkv.kernels.cpu.vectors import VECTOR_BYTES
from fastwkv.kernels.cpu.wkv import _wkv_fwd_kernel


@njit
def _exp(x_ptr, y_ptr, count, lanes, tag):
    for i in range(0, count, lanes):
        store(y_ptr, i, exp(load(x_ptr, i, tag)), tag)


@njit
def _exp_sum(x_ptr, y_ptr, low_ptr, count, lanes, tag):
    for i in range(0, count, lanes):
        y, low = exp_sum(load(x_ptr, i, tag))
        store(y_ptr, i, y, tag)
        store(low_ptr, i, low, tag)


@njit
def _convert(x_ptr, y_ptr, count, lanes, from_tag, to_tag):
    for i in range(0, count, lanes):
        store(y_ptr, i, load(x_ptr, i, from_tag), to_tag)


def _lanes(dtype):
    return VECTOR_BYTES // dtype.itemsize


def exponential(x):
    y = torch.empty_like(x)
    _exp(x.data_ptr(), y.data_ptr(), len(x), _lanes(x.dtype), TAGS[x.dtype])
    return y


def convert(x, dtype):
    y = torch.empty_like(x, dtype=dtype)
    _convert(x.data_ptr(), y.data_ptr(), len(x), _lanes(torch.float32), TAGS[x.dtype], TAGS[dtype])
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_is_accurate_to_two_units_in_the_last_place(dtype):
    smallest, largest = (-87, 80) if dtype == torch.float32 else (-708, 700)
    x = torch.cat((torch.linspace(smallest, largest, 2**16, dtype=dtype), -torch.logspace(-40, 0, 2**12, dtype=dtype)))
    exact = x.numpy().astype(np.longdouble)
    error = np.abs(exponential(x).numpy() - np.exp(exact)) / np.exp(exact)
    assert error.max() < 1.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pair_of_an_exponential_has_digits_beyond_its_dtype(dtype):
    x = torch.cat([sign * torch.logspace(-12, 1, 2**12, dtype=dtype) for sign in (1, -1)])
    y, low = torch.empty_like(x), torch.empty_like(x)
    _exp_sum(x.data_ptr(), y.data_ptr(), low.data_ptr(), len(x), _lanes(dtype), TAGS[dtype])
    exact, eps = np.exp(x.numpy().astype(np.longdouble)), torch.finfo(dtype).eps
    assert (np.abs(y.numpy() - exact) <= 1.5 * eps * exact).all()
    error = np.abs(y.numpy().astype(np.longdouble) + low.numpy() - exact)
    assert (error <= eps * np.minimum(4.5 * np.abs(x.numpy()), 0.7) * exact + 2 * np.finfo(np.longdouble).eps).all()
    x = torch.tensor([-torch.inf, -1e9, torch.nan]).to(dtype).repeat(16)
    y, low = torch.empty_like(x), torch.empty_like(x)
    _exp_sum(x.data_ptr(), y.data_ptr(), low.data_ptr(), len(x), _lanes(dtype), TAGS[dtype])
    assert torch.equal(y[:2], torch.zeros(2, dtype=dtype))
    assert torch.equal(low[:2], torch.zeros(2, dtype=dtype))
    assert y[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_at_the_ends(dtype):
    x = torch.zeros(16, dtype=dtype)
    x[:6] = torch.tensor([0.0, -0.0, -1e9, -torch.inf, torch.nan, torch.finfo(dtype).min], dtype=dtype)
    assert exponential(x)[:6].tolist()[:4] == [1, 1, 0, 0]
    assert exponential(x)[4].isnan()
    assert exponential(x)[5] == 0


def test_exponential_keeps_nan_with_any_payload():
    bits = torch.randint(1, 2**23, (4096,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    assert exponential((bits | 0x7F800000).view(torch.float32)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_written_as_torch_does(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(convert(patterns, torch.float32), patterns.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(convert(patterns.float(), dtype), patterns, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_that_of_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (2**20,), dtype=torch.int64, generator=generator)
    x = anything.to(torch.int32).view(torch.float32)
    between = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    x = torch.cat((x, (between + between.roll(-1)) / 2))  # halfway: ties go to the even neighbour
    torch.testing.assert_close(convert(x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not llvm.get_host_cpu_features().get("avx2"), reason="looks for the instructions of AVX")
def test_kernel_runs_in_vector_registers():
    # Compiled here, not taken from the cache on disk: that keeps no assembly.
    compiled = njit(nogil=True, error_model="numpy")(_wkv_fwd_kernel.py_func)
    tag, shape, no_work = TAGS[torch.float32], (1, 16, 1), (16, 0, 0)
    compiled(0, 0, 0, 0, 0, 0, 0, 0, np.array((0, 1)), shape, no_work, tag, tag)
    (assembly,) = compiled.inspect_asm().values()
    register = "%zmm" if VECTOR_BYTES == 64 else "%ymm"
    lines = [line for line in assembly.splitlines() if register in line]
    assert sum("vdivps" in line for line in lines) >= 1
    assert sum("vfm" in line or "vfnm" in line for line in lines) >= 20  # the polynomial of two exponentials
    assert not [line for line in assembly.splitlines() if "vdivss" in line or "expf" in line]


def test_a_change_of_inlined_code_compiles_kernels_anew():
    stamp = _wkv_fwd_kernel._cache._cache_file._source_stamp
    assert numerics._sources() in stamp
