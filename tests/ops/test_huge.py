"""Addresses beyond 2^31 elements, in views of memory that is reserved but hardly touched."""

import os

import pytest
import torch

import ptune_kernels

from . import oracle
from .cases import on_targets
from .compare import assert_same

FAR = 2**31 + 11  # a stride that no int32 holds
GIGABYTE = 2**30


def free_memory(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def far_apart(shape, dim, device, dtype=torch.bfloat16):
    """Random values whose neighbours along `dim` lie FAR elements apart."""
    strides = [0] * len(shape)
    near = 1
    for d in reversed([d for d in range(len(shape)) if d != dim]):
        strides[d] = near
        near *= shape[d]
    strides[dim] = FAR
    elements = FAR * (shape[dim] - 1) + near
    if free_memory(device) < elements * dtype.itemsize + GIGABYTE:
        pytest.skip(f"needs {elements * dtype.itemsize / GIGABYTE:.1f} GB of free memory")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling would touch every page
    try:
        memory = torch.empty(elements, dtype=dtype, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    return memory.as_strided(shape, strides).copy_(torch.randn(shape, device=device))


@on_targets
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "width"])
def test_hidden(target, dim):
    shape = [2, 2, 2]
    hidden = far_apart(shape, dim, target.device)
    prompts = torch.randn(1, 2, device=target.device)
    assert_same(ptune_kernels.prepend(prompts, hidden), oracle.prepend(prompts, hidden), target.ulps(hidden.dtype))
    assert_same(ptune_kernels.strip(hidden, 1), oracle.strip(hidden, 1))
    grad = target.op("sum_prompts")(hidden, 2, None, None, None, 0, False, torch.float32)
    torch.testing.assert_close(grad, hidden.float().sum(0))
    expected = oracle.overwrite(hidden, prompts)
    assert_same(ptune_kernels.overwrite(hidden, prompts), expected, target.ulps(hidden.dtype))
    assert_same(ptune_kernels.overwrite_(hidden, prompts), expected, target.ulps(hidden.dtype))


@on_targets
def test_keys(target):
    key = far_apart([2, 1, 2, 2], 0, target.device)
    prefix = torch.randn(1, 1, 2, device=target.device)
    for actual in ptune_kernels.prepend_kv(prefix, prefix, key, key):
        assert_same(actual, oracle.prepend(prefix, key), target.ulps(key.dtype))
    for actual in ptune_kernels.cast_qkv(key, key, key, torch.float32):
        assert_same(actual, key.float())


@on_targets
def test_pool_and_table(target):
    prompts = far_apart([2, 3], 0, target.device, torch.float32)
    table = far_apart([2, 3], 0, target.device, torch.float32)
    ids = torch.tensor([[1, 0], [0, 1]], device=target.device)
    actual = ptune_kernels.embed_and_prepend(prompts, ids, table)
    assert_same(actual, oracle.embed_and_prepend(prompts, ids, table))


@on_targets
def test_output(target):
    """The output itself holds more than 2^31 elements; its last rows are what is looked at."""
    if target.interpreted or target.backend == "reference":
        pytest.skip("the reference has no addresses of its own, and Triton's interpreter is too slow")
    b, n, d = 2, 2**15, 2**15 + 3
    if free_memory(target.device) < 2.5 * b * n * d:
        pytest.skip(f"needs {2.5 * b * n * d / GIGABYTE:.1f} GB of free memory")
    row = torch.randn(d, device=target.device).to(torch.bfloat16)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        out = ptune_kernels.prepend(torch.ones(1, d, device=target.device), row.expand(b, n, d))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert out.numel() > 2**31
    for i in range(b):
        assert (out[i, 0] == 1).all()
        for r in (1, n // 2, n):
            assert_same(out[i, r], row)
