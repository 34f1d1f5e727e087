"""Every op's gradients against autograd on the oracle in float64, and the sums over the batch on their own."""

import pytest
import torch
from torch.autograd import forward_ad

import ptune_kernels

from .cases import (
    FLOATS,
    KV_DTYPES,
    LAYOUTS,
    OPS,
    dtypes_for,
    lay_out,
    on_ops,
    on_targets,
    on_targets_and_sizes,
)
from .compare import assert_same, assert_within
from .test_forward import as_tuple
from .test_forward import check as check_forward


def gradients(function, tensors, which, keywords, grads):
    """The gradients of the inputs numbered `which`; zeros for those that no output depends on."""
    leaves = [t.detach().requires_grad_(i in which) if t.is_floating_point() else t for i, t in enumerate(tensors)]
    pairs = [(o, g) for o, g in zip(as_tuple(function(*leaves, **keywords)), grads, strict=True) if o.requires_grad]
    wanted = [leaves[i] for i in which]
    if not pairs:
        return [torch.zeros_like(t) for t in wanted]
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, wanted, grads, materialize_grads=True, allow_unused=True)


def doubles(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check(op, target, tensors, keywords, layout="contiguous"):
    """Text gradients to the bit; prompt gradients within the bound of a compensated sum."""
    grads = [torch.randn_like(o) for o in as_tuple(op(*tensors, **keywords))]
    grads = [lay_out(g, layout) for g in grads]
    actual = gradients(op, tensors, op.differentiable, keywords, grads)
    exact = gradients(op.expected, doubles(tensors), op.differentiable, keywords, doubles(grads))
    sizes = gradients(op.expected, doubles(tensors), op.differentiable, keywords, [g.double().abs() for g in grads])
    for i, got, want, size in zip(op.differentiable, actual, exact, sizes, strict=True):
        if i in op.pools:
            assert (got.shape, got.dtype) == (tensors[i].shape, tensors[i].dtype)
            assert_within(got, want, sum_bound(want, size, max(map(len, grads)), got.dtype, target.ulps(got.dtype)))
        else:
            assert_same(got, want.to(tensors[i].dtype), target.ulps(tensors[i].dtype))


def sum_bound(exact, size, batch, dtype, ulps):
    """A compensated sum is within 2u of the sum of magnitudes (u = 2^-24); a half result is then rounded once more."""
    if dtype == torch.float64:  # the oracle itself sums in float64
        return (batch + 2) * 2.0**-53 * size
    info = torch.finfo(dtype)
    once_more = 0 if dtype == torch.float32 else exact.abs() * info.eps * (0.5 + ulps) + info.tiny
    return (2 + 1e-3) * 2.0**-24 * size + once_more


@on_targets_and_sizes
@on_ops
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
def test_equals_autograd_on_oracle(target, sizes, op, placed):
    for dtype in dtypes_for(target, sizes):
        tensors, keywords = op.case(sizes, dtype, target.device, placed)
        if op.name == "cast_qkv":
            keywords = {"dtype": torch.float64 if dtype == torch.float64 else torch.float16}
        check(op, target, tensors, keywords)


@on_targets
@pytest.mark.parametrize("dtypes", KV_DTYPES, ids=lambda pair: "-".join(str(x).removeprefix("torch.") for x in pair))
def test_prepend_kv_takes_every_pair_of_dtypes(target, dtypes):
    op = next(op for op in OPS if op.name == "prepend_kv")
    prefix_dtype, text_dtype = dtypes
    for placed in (False, True):
        for to in (None, torch.float64 if text_dtype == torch.float64 else torch.float32):
            (*prefixes, key, value), keywords = op.case((3, 3, 2, 5), text_dtype, target.device, placed)
            check(op, target, [*(p.to(prefix_dtype) for p in prefixes), key, value], {**keywords, "dtype": to})


@on_targets
@pytest.mark.parametrize("dtype", FLOATS)
def test_part_qkv_casts_keys_and_values(target, dtype):
    """As in half-precision attention; their gradients are summed before they are rounded, back to what came."""
    op = next(op for op in OPS if op.name == "part_qkv")
    for to in FLOATS:
        tensors, keywords = op.case((3, 3, 2, 5), dtype, target.device, placed=False)
        check_forward(op, target, tensors, {**keywords, "dtype": to})
        if to == torch.bfloat16 and target.interpreted:
            continue  # whose rounding is a unit off where the oracle's gradients pass through none
        check(op, target, tensors, {**keywords, "dtype": to})


@on_targets
@pytest.mark.parametrize("unused", [(0, 1, 2), (1,), (3,), (4, 5), (0, 3, 4)], ids=str)
def test_part_qkv_of_which_not_all_is_used(target, unused):
    op = next(op for op in OPS if op.name == "part_qkv")
    tensors, keywords = op.case((3, 4, 5, 6), torch.float32, target.device, placed=False)
    outputs = op(*(t.requires_grad_() for t in tensors), **keywords)
    grads = [torch.randn_like(o) for o in outputs]
    used = [i for i in range(len(outputs)) if i not in unused]
    actual = torch.autograd.grad([outputs[i] for i in used], tensors, [grads[i] for i in used])
    zeroed = [torch.zeros_like(g) if i in unused else g for i, g in enumerate(grads)]
    for got, want in zip(actual, gradients(op, tensors, (0, 1, 2), keywords, zeroed), strict=True):
        assert_same(got, want)


@on_targets
def test_part_qkv_keeps_the_order_of_rows(target):
    """A projection reads its gradient as [m + b·n, h·hd]; there is nothing to copy."""
    op = next(op for op in OPS if op.name == "part_qkv")
    tensors, keywords = op.case((3, 4, 5, 6), torch.float32, target.device, placed=False)
    grads = [torch.randn_like(o) for o in op(*tensors, **keywords)]
    for grad in gradients(op, tensors, (0, 1, 2), keywords, grads):
        assert grad.transpose(1, 2).is_contiguous()


@on_targets
@on_ops
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_strides(target, op, layout):
    for dtype in (torch.float32, torch.bfloat16):
        tensors, keywords = op.case((3, 4, 6, 9), dtype, target.device, placed=True)
        if op.name == "cast_qkv":
            keywords = {"dtype": torch.float16}
        check(op, target, tensors, keywords, layout)


@on_targets
@on_ops
def test_only_what_is_asked_for(target, op):
    """With one input that needs a gradient at a time, it gets the same bits, and the others get none."""
    tensors, keywords = op.case((2, 3, 4, 5), torch.float32, target.device, placed=True)
    if op.name == "cast_qkv":
        keywords = {"dtype": torch.bfloat16}
    grads = [torch.randn_like(o) for o in as_tuple(op(*tensors, **keywords))]
    together = gradients(op, tensors, op.differentiable, keywords, grads)
    for i, expected in zip(op.differentiable, together, strict=True):
        (alone,) = gradients(op, tensors, (i,), keywords, grads)
        assert_same(alone, expected)


@on_targets
def test_trained_embedding_gets_its_gradient(target):
    prompts, table = torch.randn(2, 3, device=target.device), torch.randn(7, 3, device=target.device)
    ids = torch.tensor([[1, 1, 4], [0, 4, 1]], device=target.device)
    grad = torch.randn(2, 5, 3, device=target.device)
    op = next(op for op in OPS if str(op) == "embed_and_prepend-scaled")
    tensors, keywords = (prompts, ids, table), dict(op.options)
    actual = gradients(op, tensors, (0, 2), keywords, [grad])
    exact = gradients(op.expected, doubles(tensors), (0, 2), keywords, doubles([grad]))
    magnitude = gradients(op.expected, doubles(tensors), (0, 2), keywords, doubles([grad.abs()]))
    for got, want, size in zip(actual, exact, magnitude, strict=True):
        assert_within(got, want, 5 * 2.0**-24 * size)  # torch's sum of up to 4 rounded products


@on_targets
@pytest.mark.parametrize("mode", ["overwrite", "add"])
def test_overwrite_in_place_under_autograd(target, mode):
    """The gradients of overwrite_ are those of overwrite, and what it overwrote is known to have changed."""
    op = next(op for op in OPS if op.name == "overwrite" and dict(op.options).get("mode", "overwrite") == mode)
    tensors, keywords = op.case((3, 4, 5, 6), torch.bfloat16, target.device, placed=True)
    grad = torch.randn_like(tensors[0])

    def in_place(hidden, prompts, **keywords):
        copy = hidden.clone()
        version = copy._version
        out = ptune_kernels.overwrite_(copy, prompts, **keywords)
        assert out is copy
        assert copy._version > version
        return out

    expected = gradients(op, tensors, (0, 1), keywords, [grad])
    for got, want in zip(gradients(in_place, tensors, (0, 1), keywords, [grad]), expected, strict=True):
        assert_same(got, want)
    hidden = tensors[0].clone()
    version = hidden._version
    ptune_kernels.overwrite_(hidden, tensors[1], **keywords)
    assert hidden._version > version, "without autograd too"


@on_targets
def test_overwrite_in_place_of_what_backward_needs_is_an_error(target):
    x = torch.randn(2, 3, 4, device=target.device, requires_grad=True)
    saved = x.exp()  # exp's backward reads its own result
    prompts = torch.randn(2, 4, device=target.device, requires_grad=True)
    ptune_kernels.overwrite_(saved, prompts)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    before = x.detach().clone()
    for leaf in (x, x[:, 1:], x.view(3, 2, 4)):
        with pytest.raises(RuntimeError, match="hidden: expected no leaf that requires grad, nor a view of one"):
            ptune_kernels.overwrite_(leaf, prompts)
    assert torch.equal(x, before)


# --- sums over the batch ---

POOL_ROWS, WIDTH = 5, 37


def summed(target, grad, placement, dtype=torch.float32):
    if placement is None:
        return target.op("sum_prompts")(grad, grad.shape[1], None, None, None, 0, False, dtype)
    return target.op("sum_prompts")(grad, POOL_ROWS, *placement, False, dtype)


def batch_of(target, batch, dtype):
    """Gradients of a wide range of magnitudes, with a bank of prompts whose rows overlap."""
    grad = torch.randn(batch, POOL_ROWS, WIDTH, device=target.device) * torch.logspace(
        -3, 3, WIDTH, device=target.device
    )
    start = torch.randint(0, 3, (batch,), device=target.device, dtype=torch.int32)
    length = torch.randint(0, 3, (batch,), device=target.device, dtype=torch.int32)
    column = torch.randint(0, 3, (batch,), device=target.device, dtype=torch.int32)
    return grad.to(dtype), ptune_kernels.Placement(start, length, column, 2)


def terms(grad, placement):
    """For each pool row, the stacked gradient rows that it got."""
    if placement is None:
        return list(grad.unbind(1))
    terms = [[] for _ in range(POOL_ROWS)]
    for row, s, m, c in zip(grad, *(x.tolist() for x in placement[:3]), strict=True):
        for r in range(m):
            terms[s + r].append(row[c + r])
    return [torch.stack(t) if t else grad.new_zeros(0, WIDTH) for t in terms]


@on_targets
@pytest.mark.parametrize("batch", [1, 2, 3, 63, 123, 257])
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
def test_sum_is_at_least_as_good_as_torch(target, batch, placed):
    """Error against float64, element by element: at most that of torch's own float32 sum of these rows, plus one ulp.

    Kahan's summation does not do it: it loses the low bits of a partial sum that is smaller than the next term. Sums
    that keep the exact error of every addition (Knuth's TwoSum, or Neumaier's variant) end within half an ulp.
    """
    for dtype in FLOATS:
        grad, placement = batch_of(target, batch, dtype)
        placement = placement if placed else None
        actual = summed(target, grad, placement)
        parts = terms(grad, placement)
        exact = torch.stack([t.double().sum(0) for t in parts])
        torchs = torch.stack([t.float().sum(0) for t in parts])
        ulp = torch.finfo(torch.float32).eps * 2.0 ** exact.abs().log2().floor()
        assert_within(actual, exact, (torchs.double() - exact).abs() + ulp)


@on_targets
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
def test_sum_is_compensated(target, placed):
    """A plain float32 sum of 1 and many small terms loses every one of them."""
    batch = 257
    grad = torch.full((batch, POOL_ROWS, WIDTH), 2.0**-25, device=target.device)
    grad[0] = 1.0
    numbers = torch.tensor([0, POOL_ROWS, 0], dtype=torch.int32, device=target.device).expand(batch, 3)
    placement = ptune_kernels.Placement(*numbers.unbind(1), POOL_ROWS) if placed else None
    exact = 1 + (batch - 1) * 2.0**-25
    assert_within(summed(target, grad, placement), torch.tensor(exact).double().to(target.device), 2.0**-23)


@on_targets
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
def test_sum_has_the_same_bits_on_every_run_and_thread_count(target, placed):
    grad, placement = batch_of(target, 123, torch.float32)
    placement = placement if placed else None
    first = summed(target, grad, placement)
    threads = torch.get_num_threads()
    try:
        for count in (1,) if target.interpreted else (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert_same(summed(target, grad, placement), first)
    finally:
        torch.set_num_threads(threads)


@on_targets
@on_ops
def test_forward_mode_is_refused(op, target):
    """Outside reverse mode too: an op by itself would drop the tangent in silence."""
    tensors, keywords = op.case((2, 3, 5, 8), torch.float32, target.device, placed=False)
    if op.name == "cast_qkv":
        keywords = {"dtype": torch.bfloat16}
    with forward_ad.dual_level():
        first = op.differentiable[0]
        tensors = [forward_ad.make_dual(t, torch.ones_like(t)) if i == first else t for i, t in enumerate(tensors)]
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="forward mode AD"):
                op(*tensors, **keywords)
