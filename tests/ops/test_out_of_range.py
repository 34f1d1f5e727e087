"""Placements and ids out of range, which on a GPU nobody checks: they become NaN, and nothing is read through them.

Runs the kernels themselves: Triton's (in the interpreter without a GPU) and CUDA's (on the CPU without one).
"""

from types import SimpleNamespace

import pytest
import torch

from ptune_kernels import Placement, native, reference, schema

from .compare import assert_same
from .cuda_on_host import kernels
from .test_forward import as_tuple

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, M, N, D = 3, 4, 5, 24
WRONG = 1  # the row of the batch whose placement is out of range
FAR = 2**31 - 1


@pytest.fixture(params=["triton", "cuda"])
def ops(request, monkeypatch):
    if request.param == "cuda" and DEVICE == "cpu":
        return kernels()
    if request.param == "cuda" and not native.loaded("cuda"):
        pytest.skip("no compiled cuda library")
    pytest.importorskip("triton")
    from ptune_kernels import triton_kernels  # noqa: F401  (registers itself)

    monkeypatch.setattr(schema, "check_values", lambda *args, **kwargs: None)
    monkeypatch.setattr(schema, "check_ids", lambda *args: None)
    namespace = torch.ops.ptune_triton if request.param == "triton" else torch.ops.ptune_native
    return SimpleNamespace(**{name: getattr(namespace, name).default for name in schema.SCHEMAS})


def placement(**wrong):
    """A placement, and the same with some fields of row WRONG replaced."""
    right = {"start": [0, 1, 2], "length": [3, 2, 0], "column": [1, 0, 4]}
    changed = {
        name: [*values[:WRONG], wrong.get(name, values[WRONG]), *values[WRONG + 1 :]] for name, values in right.items()
    }
    return [
        Placement(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in fields.values()), 3)
        for fields in (right, changed)
    ]


OUT_OF_RANGE = [
    {"start": -1},
    {"start": M - 1},  # its two rows end beyond the pool
    {"start": FAR},
    {"length": -1},
    {"length": 4, "start": 0},  # more than max_length
    {"length": FAR},
    {"column": -1},
    {"column": FAR},
    {"column": -FAR - 1},
]
out_of_range = pytest.mark.parametrize("wrong", OUT_OF_RANGE, ids=str)


def others(tensor):
    return torch.cat([tensor[:WRONG], tensor[WRONG + 1 :]])


def calls(wrong):
    """(op, its arguments for a placement) of the ops that make rows out of prompts and text."""
    heads, half = 2, torch.float16
    prompts, prefix = torch.randn(M, D, device=DEVICE), torch.randn(heads, M, D, device=DEVICE)
    text, table = torch.randn(B, N, D, device=DEVICE), torch.randn(7, D, device=DEVICE)
    ids, key = torch.randint(0, 7, (B, N), device=DEVICE), torch.randn(B, heads, N, D, device=DEVICE).to(half)
    yield "prepend", lambda where: (prompts, text, *where)
    yield "embed_and_prepend", lambda where: (prompts, ids, table, *where, 1.5)
    yield "prepend_kv", lambda where: (prefix, prefix, key, key, *where, None)
    if "start" not in wrong:  # what the pool held does not matter
        longer = torch.randn(B, heads, N + 3, D, device=DEVICE)
        yield "strip", lambda where: (longer, *where, half)


@out_of_range
def test_the_row_is_nan_and_the_others_are_right(ops, wrong):
    right, changed = placement(**wrong)
    for name, arguments in calls(wrong):
        actual, expected = getattr(ops, name)(*arguments(changed)), getattr(reference, name)(*arguments(right))
        for one, other in zip(as_tuple(actual), as_tuple(expected), strict=True):
            assert one[WRONG].isnan().all()
            assert_same(others(one), others(other))


def test_a_column_beyond_the_text(ops):
    """The last column that is right, and the first that is not; for `overwrite` the prompt must end within hidden."""
    prompts, text = torch.randn(M, D, device=DEVICE), torch.randn(B, N, D, device=DEVICE)
    for column, length, op, is_right in (
        (N, 2, "prepend", True),
        (N + 1, 2, "prepend", False),
        (N - 2, 2, "overwrite", True),
        (N - 1, 2, "overwrite", False),
    ):
        _, where = placement(column=column, length=length)
        arguments = (prompts, text, *where) if op == "prepend" else (text, prompts, *where, False)
        assert getattr(ops, op)(*arguments)[WRONG].isnan().any() == (not is_right)


@out_of_range
@pytest.mark.parametrize("add", [False, True])
def test_overwrite_poisons_what_it_would_have_written(ops, wrong, add):
    right, changed = placement(**wrong)
    hidden, prompts = torch.randn(B, N, D, device=DEVICE).bfloat16().float(), torch.randn(M, D, device=DEVICE)
    expected = reference.overwrite(hidden, prompts, *right, add)
    expected[WRONG] = hidden[WRONG]
    expected[WRONG, : right.max_length] = torch.nan
    assert_same(ops.overwrite(hidden, prompts, *changed, add), expected)
    ops.overwrite_(hidden, prompts, *changed, add)
    assert_same(hidden, expected)


@out_of_range
@pytest.mark.parametrize("prepended", [False, True])
def test_sums_are_nan(ops, wrong, prepended):
    right, changed = placement(**wrong)
    grad = torch.randn(B, 2, N + 3, D, device=DEVICE)
    assert not ops.sum_prompts(grad, M, *right, prepended, torch.float32).isnan().any()
    assert ops.sum_prompts(grad, M, *changed, prepended, torch.float32).isnan().all()


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (-1, torch.int64),
        (7, torch.int64),
        (2**32, torch.int64),
        (-(2**63), torch.int64),
        (7, torch.int32),
        (-1, torch.int32),
    ],
)
def test_a_wrong_id_is_a_row_of_nan(ops, wrong, dtype):
    prompts, table = torch.randn(M, D, device=DEVICE), torch.randn(7, D, device=DEVICE)
    ids = torch.randint(0, 7, (B, N), device=DEVICE).to(dtype)
    expected = reference.embed_and_prepend(prompts, ids, table, None, None, None, 0, 1.0)
    expected[WRONG, M + 2] = torch.nan
    ids[WRONG, 2] = wrong
    assert_same(ops.embed_and_prepend(prompts, ids, table, None, None, None, 0, 1.0), expected)
