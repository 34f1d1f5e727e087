"""Compiles every Triton kernel for GPUs that need not be at hand, and says what came out.

``python -m bench.aot`` compiles for all of them, ``python -m bench.aot sm_90 gfx942`` for some.

One line for each op, placement and target: registers and spills of a thread (from the binary), and how many global
loads and stores of each width, in bits, its code holds. Fails if a kernel spills, or if the bulk of an op does not move
128 bits at a time.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from ptune_kernels import triton_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Compiled(NamedTuple):
    op: str
    target: str
    registers: int
    spills: int
    loads: Counter  # by width in bits
    stores: Counter


class _NoDriver:
    """Stands in for Triton's driver, which would ask a GPU what it is; enough to compile, not to run."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def _calls() -> Iterator[tuple[str, object, tuple]]:
    """(name, op, arguments) for each op, with and without a placement, in the dtypes and layouts of a bf16 model."""
    b, n, m, h, d = 8, 128, 16, 8, 4096

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def heads(rows: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(b, rows, h, d // h, dtype=dtype).transpose(1, 2)

    ops = triton_kernels
    prompts, prefix = torch.empty(m, d), torch.empty(h, m, d // h)
    ids, vector = torch.zeros(b, n, dtype=torch.int64), torch.zeros(b, dtype=torch.int32)
    hidden, longer, table = half(b, n, d), half(b, m + n, d), half(1000, d)
    for suffix, where in (("", (None, None, None, m)), (", placed", (vector, vector, vector, m))):
        yield "embed_and_prepend" + suffix, ops.embed_and_prepend, (prompts, ids, table, *where, 1.0)
        yield "embed_and_prepend, scaled" + suffix, ops.embed_and_prepend, (prompts, ids, table, *where, 64.0)
        yield "prepend" + suffix, ops.prepend, (prompts, hidden, *where)
        yield "prepend_kv" + suffix, ops.prepend_kv, (prefix, prefix, heads(n), heads(n), *where, None)
        yield "strip" + suffix, ops.strip, (longer, *where, None)
        yield "overwrite" + suffix, ops.overwrite, (longer, prompts, *where, False)
        yield "overwrite, add" + suffix, ops.overwrite, (longer, prompts, *where, True)
        yield "overwrite_" + suffix, ops.overwrite_, (longer, prompts, *where, False)
        yield "sum_prompts" + suffix, ops.sum_prompts, (longer, m, *where, True, torch.float32)
        yield "sum_prompts, heads" + suffix, ops.sum_prompts, (heads(m + n), m, *where, True, torch.float32)
    yield "cast_qkv", ops.cast_qkv, (*(heads(n, torch.float32) for _ in range(3)), torch.bfloat16)


def compile_all(targets: Sequence[GPUTarget]) -> list[Compiled]:
    """Compiles each op for each target as a launch on that GPU would; for a process that launches nothing."""
    results: list[Compiled] = []
    for target in targets:
        triton.runtime.driver.set_active(_NoDriver(target))
        for name, op, arguments in _calls():

            def compile_only(kernel, grid, *args, _name=name, _target=target, **constants):
                kernel.device_caches.clear()  # it knows the last target's binaries under the same device
                kernel = kernel.warmup(*args, grid=grid, **triton_kernels.OPTIONS, **constants)
                results.append(_describe(_name, _target, kernel.asm))

            triton_kernels._launch = compile_only
            op(*arguments)
    return results


def _describe(name: str, target: GPUTarget, asm: dict) -> Compiled:
    if target.backend == "cuda":
        registers, spills = _cuda_resources(asm["cubin"])
        accesses = re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", asm["ptx"])
        widths = [(kind, int(count or 1) * int(bits)) for kind, count, bits in accesses]
        return Compiled(name, f"sm_{target.arch}", registers, spills, *_counters(widths, "ld", "st"))
    text = asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.vgpr_{what}:\s+(\d+)", text)[1]) for what in ("count", "spill_count"))
    accesses = re.findall(r"\b(?:buffer|global)_(load|store)_(dwordx?\d?|[us]?(?:byte|short))", text)
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    widths = [(kind, bits.get(what, 16 if "short" in what else 8)) for kind, what in accesses]
    return Compiled(name, str(target.arch), registers, spilled, *_counters(widths, "load", "store"))


def _counters(widths: list[tuple[str, int]], *kinds: str) -> list[Counter]:
    return [Counter(bits for kind, bits in widths if kind == wanted) for wanted in kinds]


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory: nothing here has an array of its own, so that is what was spilled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"LOCAL:(\d+)", text)[1])


def _has_narrow_accesses(kernel: Compiled) -> bool:
    """Whether anything but ids (64 bits) and placements (32 bits) is loaded or stored in less than 128 bits."""
    allowed = {128} | ({64} if kernel.op.startswith("embed") else set()) | ({32} if "placed" in kernel.op else set())
    return not set(kernel.loads) <= allowed or set(kernel.stores) != {128}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; default: all")
    chosen = parser.parse_args().targets or list(TARGETS)
    if unknown := set(chosen) - set(TARGETS):
        parser.error(f"target: expected some of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    results = compile_all([TARGETS[name] for name in chosen])
    failed = 0
    print(f"triton {triton.__version__}")
    for r in results:
        good = r.spills == 0 and not _has_narrow_accesses(r)
        failed += not good
        accesses = ", ".join(
            f"{kind} " + " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True))
            for kind, widths in (("load", r.loads), ("store", r.stores))
        )
        print(
            f"{r.op:<36} {r.target:<7} {r.registers:>4} registers {r.spills:>2} spilled   {accesses}"
            + ("" if good else "   <- spills or narrow accesses")
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
