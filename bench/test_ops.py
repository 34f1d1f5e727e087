"""``pytest bench --benchmark-only``: the same cases under pytest-benchmark."""

import pytest
import torch

from .cases import cases
from .timing import THREADS

CASES = {case.name: case for case in cases()}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "way"), [(name, way) for name, case in CASES.items() for way in case.ways])
def test_way(benchmark, name, way):
    CASES[name].check()
    benchmark.group = name
    benchmark(CASES[name].run, way)
