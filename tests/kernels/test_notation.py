"""The constants that all kernels share are what their comments say."""

import numpy as np
import pytest

from fastwkv.kernels import notation

PARTS = {
    np.float32: (notation.LN2_HIGH_FLOAT32, notation.LN2_LOW_FLOAT32, notation.EXP_FLOAT32, 2.6e-9),
    np.float64: (notation.LN2_HIGH_FLOAT64, notation.LN2_LOW_FLOAT64, notation.EXP_FLOAT64, 6.8e-17),
}


@pytest.mark.parametrize("dtype", PARTS)
def test_parts_of_ln_2_add_up_to_it(dtype):
    high, low, *_ = PARTS[dtype]
    assert abs(np.longdouble(high) + np.longdouble(low) - np.log(np.longdouble(2))) < np.finfo(dtype).eps ** 2


@pytest.mark.parametrize("dtype", PARTS)
def test_first_part_of_ln_2_times_any_exponent_is_exact(dtype):
    high, exponents = PARTS[dtype][0], np.arange(np.finfo(dtype).minexp, np.finfo(dtype).maxexp + 1)
    assert dtype(high) == high
    products = exponents.astype(dtype) * dtype(high)
    assert (products.astype(np.longdouble) == exponents.astype(np.longdouble) * np.longdouble(high)).all()


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs numbers of more than 64 bits")
@pytest.mark.parametrize("dtype", PARTS)
def test_polynomial_is_as_exact_as_stated(dtype):
    *_, coefficients, bound = PARTS[dtype]
    half = np.log(np.longdouble(2)) / 2
    r = np.linspace(-half, half, 10**5, dtype=np.longdouble)
    p = np.polynomial.polynomial.polyval(r, np.array(coefficients, np.longdouble))
    assert np.abs((1 + p * r) / np.exp(r) - 1).max() <= bound


def test_other_constants():
    assert np.float32(notation.NO_PAST) == np.finfo(np.float32).min == notation.NO_PAST
    assert float(np.exp(np.longdouble(64))) == notation.E64
    assert float(np.log(np.longdouble(2))) == notation.LN2
    assert float(1 / np.log(np.longdouble(2))) == notation.LOG2_E
