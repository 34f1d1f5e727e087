"""Every op on shapes, memory layouts, dtypes, placements and values that hypothesis draws, against the oracle.

300 cases of each op; ``make fuzz`` runs 10,000.
"""

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ptune_kernels

from . import test_backward, test_forward
from .cases import FLOATS, TEXT_DTYPES, Target, on_ops
from .compare import assert_same

CASES = int(os.environ.get("PTUNE_FUZZ_CASES", "300"))
NATIVE = Target("native", "cpu")

# vectorised code changes its course at some widths, which are drawn more often than others
widths = st.one_of(st.integers(1, 70), st.sampled_from([63, 64, 65, 127, 128, 129, 255, 256, 257, 384, 1000]))
sizes = st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9), widths)
# of float16 (largest, rounded to infinity, subnormal), of float32, and ties that are rounded to even
EXTREMES = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65520.0, 6e-8, 3e38, 1e-40, 1 + 2**-11, 1 + 2**-8]


@st.composite
def layouts(draw, dims):
    """The order of dimensions in memory, the gaps between their elements, which are expanded, and where they begin."""
    gaps = st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=dims, max_size=dims)
    expanded = st.sampled_from([(), (), (), (0,), (dims - 1,), tuple(range(dims))])
    return draw(st.permutations(range(dims))), draw(gaps), draw(expanded), draw(st.integers(0, 17))


def lay_out(tensor, layout):
    """``tensor`` in such memory; an expanded dimension has its first element's values."""
    order, gaps, expanded, offset = layout
    strides, extent = [0] * tensor.dim(), 1
    for dim in reversed(order):
        if dim not in expanded:
            strides[dim] = extent * gaps[dim]
            extent = strides[dim] * max(1, tensor.shape[dim])
    first = tensor[tuple(slice(0, 1) if dim in expanded else slice(None) for dim in range(tensor.dim()))]
    memory = tensor.new_empty(offset + extent)
    memory.as_strided(first.shape, strides, offset).copy_(first)
    return memory.as_strided(tensor.shape, strides, offset)


def with_extremes(tensor):
    if not tensor.is_floating_point():
        return tensor
    values = torch.tensor(EXTREMES, dtype=torch.float64)[torch.randint(len(EXTREMES), tensor.shape)]
    return torch.where(torch.rand(tensor.shape) < 0.2, values.to(tensor.dtype), tensor)


@on_ops
@settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(), sizes=sizes, dtype=st.sampled_from(TEXT_DTYPES), placed=st.booleans(), seed=st.integers(0, 2**31)
)
def test_native_equals_oracle(op, data, sizes, dtype, placed, seed):
    torch.manual_seed(seed)
    tensors, keywords = op.case(sizes, dtype, "cpu", placed)
    if op.name == "cast_qkv":
        keywords = {"dtype": torch.float64 if dtype == torch.float64 else data.draw(st.sampled_from(FLOATS))}
    memory = [data.draw(layouts(tensor.dim())) for tensor in tensors]
    extreme = [lay_out(with_extremes(tensor), layout) for tensor, layout in zip(tensors, memory, strict=True)]
    with ptune_kernels.use_backend("native"):
        test_forward.check(op, NATIVE, extreme, keywords)
        test_backward.check(op, NATIVE, [lay_out(*pair) for pair in zip(tensors, memory, strict=True)], keywords)
        if op.name == "overwrite":
            # expanded rows cannot be written one by one
            hidden = extreme[0].clone(memory_format=torch.contiguous_format)
            expected = op.expected(hidden.clone(), extreme[1], **keywords)
            assert_same(ptune_kernels.overwrite_(hidden, extreme[1], **keywords), expected)
