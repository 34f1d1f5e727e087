"""Casts and fused arithmetic against torch's own, over every kind of number there is."""

import pytest
import torch

import ptune_kernels

from . import oracle
from .cases import FLOATS, on_targets
from .compare import assert_same

HALVES = (torch.float16, torch.bfloat16)


# Lower halves of a float32 at and beside the ties of both half dtypes.
TIES = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)


def upper_halves(target):
    """Every upper half of a float32, which is every bfloat16; a random few for Triton's slow interpreter."""
    halves = torch.arange(2**16, device=target.device)
    return halves[torch.randperm(2**16, device=target.device)[: 2**11]] if target.interpreted else halves


def every(dtype, target):
    """Every number of a half dtype; for float32 each upper half, with random lower halves and those around a tie."""
    upper = upper_halves(target)
    if dtype != torch.float32:
        return torch.where(upper >= 2**15, upper - 2**16, upper).to(torch.int16).view(dtype)
    lower = [torch.randint(0, 2**16, upper.shape, device=target.device), *(torch.full_like(upper, x) for x in TIES)]
    bits = torch.cat([upper << 16 | x for x in lower])
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def expressible(numbers, target, *dtypes):
    """Without what Triton's interpreter gets wrong in bfloat16: NaN may become infinite, and subnormals are lost."""
    if not (target.interpreted and torch.bfloat16 in dtypes):
        return numbers
    return numbers[(numbers.float().abs() >= torch.finfo(torch.bfloat16).tiny) | (numbers == 0)]


def assert_rounded(actual, expected, target):
    """assert_same, except where the result is too small for the interpreter's bfloat16."""
    if target.interpreted and expected.dtype == torch.bfloat16:
        normal = expected.abs() >= torch.finfo(torch.bfloat16).tiny
        actual, expected = actual[normal], expected[normal]
    assert_same(actual, expected, target.ulps(expected.dtype))


def rows_of(numbers, width):
    """The numbers as rows, the last one filled with zeros."""
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % width)).view(-1, width)


@on_targets
@pytest.mark.parametrize("to", HALVES)
@pytest.mark.parametrize("width", [1021, 1024])
def test_prompts_are_cast_as_torch_does(target, to, width):
    prompts = rows_of(expressible(every(torch.float32, target), target, to), width)
    empty = torch.empty(1, 0, width, dtype=to, device=target.device)
    assert_same(ptune_kernels.prepend(prompts, empty)[0], prompts.to(to), target.ulps(to))
    hidden = torch.zeros(1, *prompts.shape, dtype=to, device=target.device)
    assert_same(ptune_kernels.overwrite(hidden, prompts)[0], prompts.to(to), target.ulps(to))


@on_targets
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_tensors_are_cast_as_torch_does(target, source, to):
    numbers = rows_of(expressible(every(source, target), target, source, to), 1021)[None, None]
    outputs = ptune_kernels.cast_qkv(numbers, numbers[..., 1:], numbers[..., ::2, :], to)
    for actual, given in zip(outputs, (numbers, numbers[..., 1:], numbers[..., ::2, :]), strict=True):
        assert_same(actual, given.to(to), target.ulps(to))
    k, v = ptune_kernels.prepend_kv(numbers[0, :, :3], numbers[0, :, :3], numbers, numbers, dtype=to)
    for actual in (k, v):
        assert_same(actual, torch.cat([numbers[:, :, :3], numbers], dim=2).to(to), target.ulps(to))


@on_targets
@pytest.mark.parametrize("dtype", FLOATS)
def test_text_is_moved_untouched(target, dtype):
    """Bit for bit where nothing is cast: a NaN keeps its payload."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    text = rows_of(every(dtype, target), 1021)
    prompts = torch.empty(0, 1021, device=target.device)
    ids = torch.arange(len(text), device=target.device)[None]
    for actual in (
        ptune_kernels.prepend(prompts, text[None]),
        ptune_kernels.embed_and_prepend(prompts, ids, text),
        ptune_kernels.overwrite(text[None], prompts),
        ptune_kernels.strip(torch.cat([text, text])[None], len(text)),
    ):
        assert torch.equal(actual[0].view(bits), text.view(bits))


@on_targets
@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_is_rounded_before_and_after(target, dtype):
    table = rows_of(expressible(every(dtype, target), target, dtype), 1021)
    prompts = torch.empty(0, 1021, device=target.device)
    ids = torch.arange(len(table), device=target.device)[None]
    for scale in (2304**0.5, 5376**0.5, 1 / 3, -0.0, 1e-30, 3e38):
        expected = oracle.embed_and_prepend(prompts, ids, table, scale=scale)
        actual = ptune_kernels.embed_and_prepend(prompts, ids, table, scale=scale)
        assert_rounded(actual, expected, target)


@on_targets
@pytest.mark.parametrize("dtype", FLOATS)
def test_add_rounds_once(target, dtype):
    hidden = rows_of(expressible(every(dtype, target), target, dtype), 1021)
    prompts = torch.randn_like(hidden, dtype=torch.float32) * hidden.float().nan_to_num(1, 1, 1).abs().clamp(max=1e38)
    expected = (hidden.float() + prompts).to(dtype)
    assert_rounded(ptune_kernels.overwrite(hidden[None], prompts, mode="add")[0], expected, target)


@on_targets
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_follow_ieee(target, dtype):
    """Infinite and NaN gradients sum to what torch's sum makes of them; an overflow is an infinity, not NaN."""
    inf, nan = torch.inf, torch.nan
    columns = [[inf, 1, 2], [1, -inf, 2], [inf, 1, -inf], [nan, 1, 2], [0.0, 1, 2], [-0.0, -0.0, -0.0]]
    if dtype == torch.float32:
        columns.append([3e38, 3e38, 1])
    grad = torch.tensor(columns, device=target.device).t().reshape(3, 1, -1).to(dtype)
    actual = target.op("sum_prompts")(grad, 1, None, None, None, 0, False, torch.float32)
    torch.testing.assert_close(actual, grad.float().sum(0), rtol=0, atol=0, equal_nan=True)
