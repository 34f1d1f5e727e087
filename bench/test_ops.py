"""``pytest bench --benchmark-only``: the same cases under pytest-benchmark."""

import pytest

from .cases import cases

CASES = {case.name: case for case in cases()}


@pytest.mark.parametrize(("name", "way"), [(name, way) for name, case in CASES.items() for way in case.ways])
def test_way(benchmark, name, way):
    CASES[name].check()
    benchmark.group = name
    benchmark(CASES[name].run, way)
