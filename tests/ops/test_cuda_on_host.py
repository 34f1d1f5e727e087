"""The CUDA kernels, run on the CPU, against the reference, to the bit. With a GPU the other tests run them there."""

import pytest
import torch

from ptune_kernels import reference, schema

from .cases import FLOATS, LAYOUTS, lay_out, random_placement
from .compare import assert_same
from .cuda_on_host import kernels
from .test_forward import as_tuple

# batch, prompt rows, text rows, width: widths for packs and lanes that come out even, that do not, and of one element;
# a batch that is summed in several rounds
SIZES = [
    (2, 3, 5, 7),
    (19, 2, 1, 33),
    (3, 5, 2, 1),
    (2, 4, 3, 64),
    (2, 2, 3, 72),
    (1, 3, 1, 384),
    (2, 1, 2, 1100),
    (3, 0, 2, 8),
]
EMPTY = [(0, 2, 3, 8), (2, 0, 0, 8), (2, 2, 3, 0), (2, 2, 0, 8)]


def choice(options):
    return options[int(torch.randint(len(options), ()))]


def fresh(*shape, dtype=torch.float32, layouts=LAYOUTS):
    return lay_out(
        torch.randn(shape, dtype=torch.float64).to(dtype), choice(layouts) if 0 not in shape else "contiguous"
    )


def calls(sizes, placed, wide):
    """(op, arguments) of every op, in random dtypes (`wide`: in float64) and layouts."""
    b, m, n, d = sizes
    heads, rows = 3, m + n

    def dtype():
        return torch.float64 if wide else choice(FLOATS)

    where = within = (None, None, None, m)
    if placed:
        where, within = random_placement(b, m, n, "cpu"), random_placement(b, m, rows, "cpu", within=True)
    prompts = fresh(m, d, dtype=torch.float64 if wide else torch.float32)
    hidden, longer = fresh(b, n, d, dtype=dtype()), fresh(b, rows, d, dtype=dtype())
    ids = lay_out(
        torch.randint(0, 9, (b, n)).to(choice((torch.int32, torch.int64))), choice(LAYOUTS) if b * n else None
    )
    table, text = fresh(9, d, dtype=dtype()), dtype()
    keys = [fresh(b, heads, n, width, dtype=text) for width in (d, d + 8)]
    prefixes = [fresh(heads, m, width, dtype=dtype()) for width in (d, d + 8)]
    padded = [fresh(*shape, where[3] + n, d, dtype=dtype()) for shape in ((b,), (b, heads))]
    yield "embed_and_prepend", (prompts, ids, table, *where, choice((1.0, 2304**0.5)))
    yield "prepend", (prompts, hidden, *where)
    yield "prepend_kv", (*prefixes, *keys, *where, dtype())
    yield "cast_qkv", (*keys, fresh(b, 1, rows, d, dtype=dtype()), dtype())
    packed = [fresh(1, heads, m + b * n, width, dtype=text) for width in (d, d + 8)]
    if b:
        yield "spread_kv", (*packed, m, b, dtype())
        yield "unspread_kv", (*(fresh(b * rows, heads, width, dtype=text) for width in (d, d + 8)), m, b, dtype())
    yield "join_qkv", (*joined(sizes, dtype), m, dtype())
    for t in padded:
        yield "strip", (t, *where, dtype())
        yield "sum_prompts", (t, m, *where, True, dtype())
    yield "sum_prompts", (longer, m, *within, False, dtype())
    for add in (False, True):
        yield "overwrite", (longer, prompts, *within, add)
        separate = lay_out(longer.clone(), choice([x for x in LAYOUTS if x != "expanded"]))
        yield "overwrite_", (separate, prompts, *within, add)


def joined(sizes, dtype):
    """Gradients of what a packed sequence was parted into; some of the prompt's are missing."""
    b, m, n, d = sizes
    keys = dtype()
    for heads, rows, width, kind in ((4, n, d + 2, dtype()), (2, m + n, d + 2, keys), (2, m + n, d, keys)):
        yield fresh(b, heads, rows, width, dtype=kind)
    for heads, width in ((4, d + 2), (2, d + 2), (2, d)):
        yield choice((None, fresh(1, heads, m, width, dtype=dtype())))


@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
@pytest.mark.parametrize("sizes", SIZES + EMPTY, ids=lambda sizes: "x".join(map(str, sizes)))
def test_equals_reference(sizes, placed):
    ops = kernels()
    for wide in (False, False, False, True):
        for name, arguments in calls(sizes, placed, wide):
            if name == "overwrite_":
                hidden, *rest = arguments
                expected = hidden.clone()
                reference.overwrite_(expected, *rest)
                ops.overwrite_(hidden, *rest)
                assert_same(hidden, expected)
                continue
            actual, expected = getattr(ops, name)(*arguments), getattr(reference, name)(*arguments)
            for one, other in zip(as_tuple(actual), as_tuple(expected), strict=True):
                assert_same(one, other)


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("text", FLOATS, ids=str)
@pytest.mark.parametrize("prompt", FLOATS, ids=str)
def test_plain_rows_of_any_dtypes(prompt, text, out):
    prefixes = [torch.randn(2, 5, width).to(prompt) for width in (16, 24)]
    keys = [torch.randn(3, 2, 7, width).to(text) for width in (16, 24)]
    arguments = (*prefixes, *keys, None, None, None, 5, out)
    for actual, expected in zip(kernels().prepend_kv(*arguments), reference.prepend_kv(*arguments), strict=True):
        assert_same(actual, expected)


def test_every_op_is_run():
    assert {name for name, _ in calls((2, 3, 5, 7), True, False)} == set(schema.SCHEMAS)
