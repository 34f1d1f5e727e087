"""What PyTorch asks of an op: truthful schemas and fakes, exact gradients, no break under torch.compile."""

import pytest
import torch
from torch.autograd import gradcheck

import ptune_kernels
from ptune_kernels import Placement, prepend

from .cases import OPS, on_ops, on_targets
from .compare import assert_same
from .test_forward import as_tuple

B, M, N, D = 2, 3, 4, 5


def low_level_calls(device, placed):
    """(op, arguments) for every op of a backend's namespace."""
    where = (None, None, None, M)
    if placed:
        numbers = torch.tensor([[0, 3, 1], [1, 1, 0]], dtype=torch.int32, device=device)
        where = (*numbers.unbind(1), 4)
    hidden, prompts = torch.randn(B, 2 * M + N, D, device=device), torch.randn(M, D, device=device)
    ids, table = torch.randint(0, 7, (B, N), device=device), torch.randn(7, D, device=device, dtype=torch.bfloat16)
    prefix, key = torch.randn(2, M, D, device=device), torch.randn(B, 2, N, D, device=device, dtype=torch.float16)
    return {
        "embed_and_prepend": (prompts, ids, table, *where, 2.0),
        "prepend": (prompts, hidden, *where),
        "strip": (hidden, *where, torch.bfloat16),
        "overwrite": (hidden, prompts, *where, True),
        "overwrite_": (hidden, prompts, *where, False),
        "prepend_kv": (prefix, prefix, key, key.transpose(2, 3).transpose(2, 3), *where, None),
        "sum_prompts": (hidden.transpose(0, 1).contiguous().transpose(0, 1), M, *where, True, torch.float32),
        "cast_qkv": (key, key, key, torch.bfloat16),
        "spread_kv": (key[:1], key[:1].transpose(2, 3).contiguous().transpose(2, 3), N % 2, 2, torch.bfloat16),
        "unspread_kv": (prefix.transpose(0, 1), prefix.mT.contiguous().mT.transpose(0, 1), 1, M, torch.bfloat16),
        "join_qkv": (key[:, :, M:], key, key, None, prefix[None], prefix[None], M, torch.float32),
    }


@on_targets
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
@pytest.mark.parametrize("name", ptune_kernels.schema.SCHEMAS)
def test_opcheck(target, name, placed):
    torch.library.opcheck(target.op(name), low_level_calls(target.device, placed)[name])


def with_default_dtype(op, keywords, dtype):
    return {**keywords, "dtype": dtype} if op.name == "cast_qkv" else keywords


@on_targets
@on_ops
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
def test_gradcheck(target, op, placed):
    tensors, keywords = op.case((2, 2, 3, 2), torch.float64, target.device, placed)
    keywords = with_default_dtype(op, keywords, torch.float64)
    leaves = [t.requires_grad_(i in op.differentiable) if t.is_floating_point() else t for i, t in enumerate(tensors)]
    assert gradcheck(lambda *leaves: op(*leaves, **keywords), leaves, nondet_tol=0.0, fast_mode=target.interpreted)


@on_targets
@pytest.mark.parametrize("mode", ["overwrite", "add"])
def test_gradcheck_in_place(target, mode):
    hidden = torch.randn(2, 3, 2, dtype=torch.float64, device=target.device, requires_grad=True)
    prompts = torch.randn(2, 2, dtype=torch.float64, device=target.device, requires_grad=True)
    assert gradcheck(lambda h, p: ptune_kernels.overwrite_(h.clone(), p, mode=mode), (hidden, prompts), nondet_tol=0.0)


# --- torch.compile ---


def trained(function, tensors, which, keywords=None):
    """Outputs and gradients of one forward and backward."""
    leaves = [
        t.detach().clone().requires_grad_(i in which) if t.is_floating_point() else t for i, t in enumerate(tensors)
    ]
    outputs = as_tuple(function(*leaves, **(keywords or {})))
    sum((output.float() * (1 + i)).square().sum() for i, output in enumerate(outputs)).backward()
    return [*(o.detach() for o in outputs), *(leaves[i].grad for i in which)]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@on_targets
@on_ops
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole(target, op, placed):
    """fullgraph=True, forward and backward, and again with other sizes (which makes them symbolic)."""

    compiled = torch.compile(lambda *tensors, **keywords: op(*tensors, **keywords), fullgraph=True, backend="aot_eager")
    for sizes in ((2, 3, 4, 5), (3, 2, 5, 6)):
        tensors, keywords = op.case(sizes, torch.bfloat16, target.device, placed)
        keywords = with_default_dtype(op, keywords, torch.float32)
        actual = trained(compiled, tensors, op.differentiable, keywords)
        expected = trained(op, tensors, op.differentiable, keywords)
        for got, want in zip(actual, expected, strict=True):
            assert_same(got, want)


@on_targets
@pytest.mark.parametrize("mode", ["overwrite", "add"])
@pytest.mark.usefixtures("fresh_compiler")
def test_overwrite_in_place_compiles_whole(target, mode):
    def block(hidden, prompts):
        hidden = hidden * 2
        out = ptune_kernels.overwrite_(hidden, prompts, mode=mode)
        return out + 1, hidden  # hidden is what was overwritten

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    tensors = torch.randn(2, 4, 3, device=target.device), torch.randn(2, 3, device=target.device)
    for got, want in zip(trained(compiled, tensors, (0, 1)), trained(block, tensors, (0, 1)), strict=True):
        assert_same(got, want)
    with torch.no_grad():
        for got, want in zip(compiled(*tensors), block(*tensors), strict=True):
            assert_same(got, want)


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor():
    """The default compiler, on the device's default backend: a tuned embedding and one block, in one graph."""

    def model(prompts, deep, table, ids, weight, placement):
        hidden = ptune_kernels.embed_and_prepend(prompts, ids, table, placement)
        hidden = torch.tanh(hidden @ weight)
        hidden = ptune_kernels.overwrite_(hidden * 1.5, deep)
        hidden = ptune_kernels.overwrite(hidden @ weight, deep, mode="add")
        return ptune_kernels.strip(hidden, placement.max_length, placement)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [
        torch.randn(3, 8),
        torch.randn(3, 8),
        torch.randn(11, 8),
        torch.randint(0, 11, (2, 5)),
        torch.randn(8, 8) / 3,
    ]
    tensors = [t.to(device) for t in tensors]
    placement = Placement.of([0, 1], [3, 2], [0, 2], pool_rows=3, device=device)
    compiled = torch.compile(model, fullgraph=True)
    actual = trained(lambda *t: compiled(*t, placement), tensors, (0, 1))
    expected = trained(lambda *t: model(*t, placement), tensors, (0, 1))
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_placement_is_made_in_a_graph():
    prompts, hidden = torch.randn(8, 5), torch.randn(2, 4, 5)

    def model(prompts, hidden):
        return prepend(prompts, hidden, Placement.of([0, 1], [2, 3], [0, 1], pool_rows=8))

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(prompts, hidden), model(prompts, hidden))


# --- how autograd is used ---


@on_targets
@on_ops
def test_no_gradient_no_graph(target, op):
    tensors, keywords = op.case((2, 3, 4, 5), torch.float32, target.device, placed=False)
    keywords = with_default_dtype(op, keywords, torch.float16)
    leaves = [t.requires_grad_() if i in op.differentiable else t for i, t in enumerate(tensors)]
    assert all(o.requires_grad for o in as_tuple(op(*leaves, **keywords)))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = as_tuple(op(*leaves, **keywords))
            # torch says of views that they require what their base does
            assert not any(o.requires_grad for i, o in enumerate(outputs) if i not in op.views)


@on_targets
def test_gradient_checkpointing(target):
    """Recomputed in backward, the functional forms give the same gradients."""
    op = next(op for op in OPS if str(op) == "overwrite")
    tensors, keywords = op.case((2, 3, 4, 5), torch.float32, target.device, placed=True)

    def block(hidden, prompts):
        return op(hidden.sin(), prompts, **keywords).cos()

    def checkpointed(hidden, prompts):
        return torch.utils.checkpoint.checkpoint(block, hidden, prompts, use_reentrant=False)

    for got, want in zip(trained(checkpointed, tensors, (0, 1)), trained(block, tensors, (0, 1)), strict=True):
        assert_same(got, want)
