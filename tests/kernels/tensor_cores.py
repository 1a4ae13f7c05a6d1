"""Products as tensor cores compute them, for Triton's interpreter: what they cut off, the interpreter's numpy keeps.

A tensor core multiplies a block of fp16 pairs without rounding. It aligns the products and the accumulator to the
largest exponent among them, cuts each off some bits below it, and adds what is left; the sum is cut to float32. Block
lengths and bits are those that were measured on devices: Fasi, Higham, Mikaitis, Pranesh 2021 (doi
10.7717/peerj-cs.330).
"""

from typing import NamedTuple

import numpy as np

__all__ = ["MODELS", "TensorCore", "install", "product"]

FP16_LEAST = -14
"""Exponent to which tensor cores align numbers that are subnormal in fp16."""
NOTHING = -400
"""Exponent of zeros, below that of any product."""


class TensorCore(NamedTuple):
    """How the tensor cores of a device add."""

    block: int
    """Products that are added at once."""
    bits: int
    """Bits that are kept below the largest exponent."""


MODELS = {"A100": TensorCore(8, 24), "H100": TensorCore(16, 25)}


def product(a, b, accumulator, core):
    """Return ``accumulator + a @ b``: fp16 ``(M, K)``, ``(K, N)`` and float32 ``(M, N)``."""
    total = accumulator.astype(np.float64)
    exponents_a, exponents_b = _exponents(a, FP16_LEAST), _exponents(b, FP16_LEAST)
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(all="ignore"):
        for start in range(0, a.shape[1], core.block):
            part = slice(start, start + core.block)
            products = a[:, part, None] * b[None, part, :]
            exponents = np.where(products == 0, NOTHING, exponents_a[:, part, None] + exponents_b[None, part, :])
            largest = np.maximum(exponents.max(1), np.where(total == 0, NOTHING, _exponents(total, -126)))
            unit = np.ldexp(1.0, largest - core.bits)
            aligned = (np.trunc(products / unit[:, None]).sum(1) + np.trunc(total / unit)) * unit
            # What overflows, and NaN, has no exponent to align to.
            plain = products.sum(1) + total
            total = _toward_zero(np.where(np.isfinite(plain), aligned, plain))
    return total.astype(np.float32)


def _exponents(x, least):
    x = np.asarray(x, np.float64)
    return np.maximum(np.where(x == 0, least, np.frexp(x)[1] - 1), least)


def _toward_zero(x):
    """Round to float32 towards zero; the result is float64."""
    rounded = x.astype(np.float32)
    beyond = np.abs(rounded.astype(np.float64)) > np.abs(x)
    return np.where(beyond, np.nextafter(rounded, np.float32(0)), rounded).astype(np.float64)


def install(name):
    """Let the interpreter multiply fp16 as the tensor cores of a device do."""
    from triton.runtime import interpreter

    core, plain = MODELS[name], interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.data.dtype != np.float16:
            return plain(self, a, b, d, *options)
        return interpreter.TensorHandle(product(a.data, b.data, d.data, core), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
