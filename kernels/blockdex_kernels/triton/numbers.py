"""Numbers inside kernels: e4m3 as bits, queries scaled into its range, scores as integers that sort alike.

e4m3 is converted by integer arithmetic: chips before Hopper, and the interpreter, have no other way, and the same bits
come out everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_to_float(bits):
    """uint8 holding e4m3 to float32, exactly."""
    bits = bits.to(tl.int32)
    magnitude = bits & 0x7F
    # The exponent is biased by 7 and float32's by 127; a product brings subnormal numbers along.
    value = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    # The sign as a bit: Triton 3.6 negates by subtracting from zero, which loses that of a zero.
    return (value.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def float_to_e4m3(value):
    """float32 to uint8 holding e4m3: to nearest even, saturating at 448 (infinities too); NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    normal = tl.minimum(rounded - (120 << 3), 0x7E)
    # Below 2^-6 the step is 2^-9: adding 1.5 * 2^14 leaves the number of steps in the lowest bits.
    steps = magnitude.to(tl.float32, bitcast=True) + 24576.0
    subnormal = steps.to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_float(values):
    """Any element that callers may hand in, to float32; uint8 stands for e4m3."""
    if values.dtype == tl.uint8:
        return e4m3_to_float(values)
    else:
        return values.to(tl.float32)


@triton.jit
def scale_to_e4m3(rows):
    """Rows `[N, D]` of float32 as uint8 holding e4m3, and float32 `[N]`: what undoes the scale of each.

    The scale is the power of two that brings the greatest finite magnitude into [128, 256), at most 2^126.
    """
    magnitude = tl.abs(rows)
    largest = tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), 1)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    shift = tl.where(largest == 0.0, 8, tl.minimum(134 - exponent, 126))
    scale = ((127 + shift) << 23).to(tl.float32, bitcast=True)
    undo = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    return float_to_e4m3(rows * scale[:, None]), undo


@triton.jit
def ordered(scores):
    """float32 to int32 of the same order: NaN as -inf, both zeros alike. The least int32 is left for what is none."""
    scores = tl.where(scores == scores, scores, float("-inf"))
    bits = tl.where(scores == 0.0, 0, scores.to(tl.int32, bitcast=True))
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
