"""What is Triton's alone: compilation for GPUs that are not here, and tensors that it cannot reach."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*arguments):
    """Python without Triton's interpreter, which these tests' own process may have switched on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_without_spills_and_moves_128_bits():
    result = run("-m", "bench.aot", "sm_90", "gfx942")
    assert result.returncode == 0, result.stdout + result.stderr
    for target in ("sm_90", "gfx942"):
        lines = [line for line in result.stdout.splitlines() if f" {target} " in line]
        assert len(lines) == 21
        assert all(" 0 spilled " in line for line in lines)


def test_cpu_tensors_need_the_interpreter():
    program = """
import torch, ptune_kernels
with ptune_kernels.use_backend("triton"):
    ptune_kernels.prepend(torch.zeros(1, 2), torch.zeros(1, 1, 2))
"""
    result = run("-c", program)
    assert result.returncode == 1
    assert "set TRITON_INTERPRET=1" in result.stderr
