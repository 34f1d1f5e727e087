"""What every op test shares: the backend under test, and memory that is NaN until written."""

import pytest
import torch

import ptune_kernels


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA or ROCm GPU")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty, from C++ too, comes filled with NaN (or the largest integer): what an op forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def chosen_backend(request):
    """Runs a test that has a `target` parameter on that target's backend."""
    target = getattr(request.node, "callspec", None) and request.node.callspec.params.get("target")
    if target is None:
        yield
        return
    with ptune_kernels.use_backend(target.backend):
        yield
