"""Comparisons in units in the last place."""

import torch

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def _ordered(tensor):
    """Integers that count the representable numbers from zero, with their sign."""
    bits = tensor.contiguous().view(_BITS[tensor.dtype]).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(_BITS[tensor.dtype]).min - bits, bits)


def assert_same(actual, expected, ulps=0):
    """Same shape and dtype, NaN where expected is NaN, and the same bits (or, for ulps > 0, at most that far apart)."""
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan), f"NaN in {actual.isnan().sum()} places, expected {nan.sum()}"
    if ulps:
        far = (_ordered(actual) - _ordered(expected)).abs() > ulps
    else:
        bits = _BITS[expected.dtype]
        far = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    far &= ~nan
    assert not far.any(), (
        f"{far.sum()} of {far.numel()} differ by more than {ulps} ulp, first at {far.nonzero()[0].tolist()}: "
        f"got {actual[far][0].item()!r}, expected {expected[far][0].item()!r}"
    )


def assert_within(actual, exact, bound):
    """|actual - exact| <= bound, element by element, in float64; a NaN is outside every bound."""
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), f"off by {error.max()}, allowed {bound.max()}"
