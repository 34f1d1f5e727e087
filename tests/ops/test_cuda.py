"""What only a GPU can show: nothing synchronises, and CUDA graphs capture every op, forward and backward."""

import pytest
import torch

from ptune_kernels import native, use_backend

from .cases import on_ops
from .compare import assert_same
from .test_forward import as_tuple

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(params=["triton", "native"])
def backend(request):
    if request.param == "native" and not native.loaded("cuda"):
        pytest.skip("no compiled cuda library")
    with use_backend(request.param):
        yield request.param


def step_of(op, placed):
    """A function of no arguments that runs the op forward and backward, and the tensors that it reads."""
    tensors, keywords = op.case((3, 4, 5, 64), torch.bfloat16, "cuda", placed)
    if op.name == "cast_qkv":
        keywords = {"dtype": torch.float16}
    leaves = [t.requires_grad_(i in op.differentiable) if t.is_floating_point() else t for i, t in enumerate(tensors)]
    grads = [torch.randn_like(o) for o in as_tuple(op(*leaves, **keywords))]

    def step():
        outputs = as_tuple(op(*leaves, **keywords))
        return *outputs, *torch.autograd.grad(outputs, [leaves[i] for i in op.differentiable], grads)

    return step, [*(leaves[i] for i in op.differentiable), *grads]


@on_ops
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
@pytest.mark.usefixtures("backend")
def test_nothing_synchronises(op, placed):
    step, _ = step_of(op, placed)
    step()  # the first call compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_ops
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
@pytest.mark.usefixtures("backend")
def test_cuda_graph(op, placed):
    """Captured once, and replayed on new numbers in the same tensors."""
    step, inputs = step_of(op, placed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in inputs:
            t.normal_()
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert_same(got.detach(), want.detach())
