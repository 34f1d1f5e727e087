"""Every op's outputs against the oracle, to the bit."""

import re
from pathlib import Path

import pytest
import torch

import ptune_kernels

from . import oracle
from .cases import (
    FLOATS,
    KV_DTYPES,
    LAYOUTS,
    OPS,
    TEXT_DTYPES,
    Target,
    dtypes_for,
    lay_out,
    on_ops,
    on_targets,
    on_targets_and_sizes,
)
from .compare import assert_same


def native_cpu():
    target = Target("native", "cpu")
    if reason := target.missing():
        pytest.skip(reason)
    return target


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(op, target, tensors, keywords):
    outputs = as_tuple(op(*tensors, **keywords))
    expected = as_tuple(op.expected(*tensors, **keywords))
    for i, (actual, wanted) in enumerate(zip(outputs, expected, strict=True)):
        assert actual.is_contiguous() or i in op.views
        assert_same(actual, wanted, target.ulps(wanted.dtype))


@on_targets_and_sizes
@on_ops
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
def test_equals_oracle(target, sizes, op, placed):
    for dtype in dtypes_for(target, sizes):
        tensors, keywords = op.case(sizes, dtype, target.device, placed)
        if op.name == "cast_qkv":
            for to in [torch.float64] if dtype == torch.float64 else FLOATS:
                check(op, target, tensors, {"dtype": to})
        else:
            check(op, target, tensors, keywords)


@on_targets
@pytest.mark.parametrize("dtypes", KV_DTYPES, ids=lambda pair: "-".join(str(x).removeprefix("torch.") for x in pair))
def test_prepend_kv_takes_every_pair_of_dtypes(target, dtypes):
    op = next(op for op in OPS if op.name == "prepend_kv")
    prefix_dtype, text_dtype = dtypes
    for to in [None, *([torch.float64] if text_dtype == torch.float64 else FLOATS)]:
        (*prefixes, key, value), keywords = op.case((2, 3, 2, 5), text_dtype, target.device, placed=True)
        check(op, target, [*(p.to(prefix_dtype) for p in prefixes), key, value], {**keywords, "dtype": to})


@on_targets
@on_ops
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(target, op, layout):
    options = {"dtype": torch.float16} if op.name == "cast_qkv" else {}
    for sizes in [(3, 4, 6, 9)] if target.interpreted else [(3, 4, 6, 9), (2, 3, 5, 64), (2, 2, 3, 259)]:
        for dtype in FLOATS:
            tensors, keywords = op.case(sizes, dtype, target.device, placed=True)
            check(op, target, [lay_out(t, layout) for t in tensors], keywords | options)


@on_ops
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
@pytest.mark.parametrize("layout", ["contiguous", "offset", "heads"])
def test_native_outputs_that_are_written_past_the_caches(op, placed, layout):
    """The CPU library writes outputs of 16 MB and more so, keys and values of 4; rows begin at every alignment."""
    target = native_cpu()
    for dtype in (torch.float32, torch.bfloat16):
        tensors, keywords = op.case((3, 7, 2400, 1231), dtype, target.device, placed)
        options = {"dtype": dtype} if op.name == "cast_qkv" else {}
        with ptune_kernels.use_backend("native"):
            check(op, target, [lay_out(t, layout) for t in tensors], keywords | options)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages")
def test_native_outputs_ask_for_large_pages():
    native_cpu()
    out = ptune_kernels.prepend(torch.randn(1, 1024), torch.randn(1, 4095, 1024))
    middle = out.data_ptr() + out.nbytes // 2
    mapping = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            mapping = range(*(int(address, 16) for address in found.groups()))
        elif line.startswith("VmFlags:") and middle in mapping:
            assert "hg" in line.split()  # as madvise(MADV_HUGEPAGE) leaves it
            return
    raise AssertionError("the output lies in no mapping")


@on_targets
def test_every_misalignment(target):
    """Prompts and hidden begin 0 to 15 elements past an aligned address; the widths are around that of a vector."""
    for width in (31, 32, 33):
        for offset in (1, 5) if target.interpreted else range(16):
            for dtype in (torch.float32, torch.bfloat16):
                prompts = torch.randn(2 * width + offset, device=target.device)[offset:].view(2, width)
                text = torch.randn(4 * width + 15, device=target.device).to(dtype)[15 - offset :][: 4 * width]
                text = text.view(2, 2, width)
                actual = ptune_kernels.prepend(prompts, text)
                assert_same(actual, oracle.prepend(prompts, text), target.ulps(dtype))


@on_targets
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["contiguous", "offset", "transposed", "stepped", "expanded"])
def test_ids_of_any_integer_and_strides(target, ids_dtype, layout):
    prompts, table = torch.randn(2, 5, device=target.device), torch.randn(13, 5, device=target.device)
    ids = lay_out(torch.randint(0, 13, (3, 4), device=target.device).to(ids_dtype), layout)
    assert_same(ptune_kernels.embed_and_prepend(prompts, ids, table), oracle.embed_and_prepend(prompts, ids, table))


@on_targets
def test_placement_of_any_strides(target):
    prompts, hidden = torch.randn(6, 3, device=target.device), torch.randn(3, 4, 3, device=target.device)
    numbers = torch.tensor([[0, 1, 4], [3, 0, 2], [6, 0, 0]], dtype=torch.int32, device=target.device)
    placement = ptune_kernels.Placement(*numbers.unbind(dim=1), max_length=3)
    assert_same(ptune_kernels.prepend(prompts, hidden, placement), oracle.prepend(prompts, hidden, placement))
    one_for_all = ptune_kernels.Placement(*(x[:1].expand(3) for x in numbers.unbind(dim=1)), max_length=1)
    assert_same(ptune_kernels.prepend(prompts, hidden, one_for_all), oracle.prepend(prompts, hidden, one_for_all))


@on_targets
def test_strip_undoes_prepend(target):
    op = next(op for op in OPS if op.name == "prepend")
    (prompts, hidden), keywords = op.case((4, 5, 6, 3), torch.bfloat16, target.device, placed=True)
    placement = keywords["placement"]
    prepended = ptune_kernels.prepend(prompts, hidden, placement)
    assert_same(ptune_kernels.strip(prepended, placement.max_length, placement), hidden)


@on_targets
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
@pytest.mark.parametrize("mode", ["overwrite", "add"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
def test_overwrite_in_place_touches_only_its_rows(target, mode, placed, layout):
    op = next(op for op in OPS if op.name == "overwrite" and dict(op.options).get("mode", "overwrite") == mode)
    for dtype in TEXT_DTYPES:
        (hidden, prompts), keywords = op.case((3, 4, 5, 6), dtype, target.device, placed)
        hidden = lay_out(hidden, layout)
        expected = op.expected(hidden, prompts, **keywords)
        memory = hidden.as_strided((hidden.untyped_storage().nbytes() // hidden.element_size(),), (1,), 0)
        before = memory.clone()
        assert ptune_kernels.overwrite_(hidden, prompts, **keywords) is hidden
        assert_same(hidden, expected, target.ulps(dtype))
        # What lies between the elements of the view stays as it was.
        hidden.copy_(torch.zeros_like(hidden))
        before.as_strided(hidden.shape, hidden.stride(), hidden.storage_offset()).zero_()
        assert_same(memory, before)


@on_targets
@on_ops
def test_outputs_never_alias_inputs(target, op):
    """Not even where nothing is prepended or cast: writing into the output of an op must not reach its inputs."""
    for sizes in ((2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 4)):
        tensors, keywords = op.case(sizes, torch.float32, target.device, placed=False)
        if op.name == "cast_qkv":
            keywords = {"dtype": torch.float32}
        storages = {t.untyped_storage().data_ptr() for t in tensors}
        for i, output in enumerate(as_tuple(op(*tensors, **keywords))):
            if i in op.views:
                continue
            assert output.numel() == 0 or output.untyped_storage().data_ptr() not in storages
