"""GPU kernels where there is no GPU: what compilers made of them, and that Triton's refuse tensors on a CPU."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ptune_kernels import native

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*arguments):
    """Python without Triton's interpreter, which these tests' own process may have switched on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_without_spills_and_moves_128_bits(tmp_path):
    result = run("-m", "bench.aot", "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (table,) = tmp_path.iterdir()
    kernels = Counter(line.split(",")[0].split()[0].strip('"') for line in table.read_text().splitlines()[2:])
    # ops and placements on five targets; kinds of rows (plain ones twice) and dtypes on four
    assert kernels.pop("triton") == 24 * 5
    assert kernels == ({"cuda": 24 * 4} if native.path("cuda").exists() else {})


def test_spills_are_seen(tmp_path):
    program = """
import sys
from bench import aot
aot.triton_kernels.OPTIONS["maxnreg"] = 24
sys.exit(aot.main())
"""
    result = run("-c", program, "sm_80", "--out", tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "<- spills" in result.stdout


def test_cpu_tensors_need_the_interpreter():
    program = """
import torch, ptune_kernels
with ptune_kernels.use_backend("triton"):
    ptune_kernels.prepend(torch.zeros(1, 2), torch.zeros(1, 1, 2))
"""
    result = run("-c", program)
    assert result.returncode == 1
    assert "set TRITON_INTERPRET=1" in result.stderr
