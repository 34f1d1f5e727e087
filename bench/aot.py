"""Looks into every kernel for GPUs that need not be at hand, and says what the compilers made of it.

``python -m bench.aot`` does so for all targets, ``python -m bench.aot sm_90 gfx942`` for some.

Triton's kernels are compiled here, as a launch on that GPU would, one for each op with and without a placement; the
CUDA kernels are read from the library that is installed. One line for each: registers of a thread, bytes spilled, bytes
of shared memory, and how many loads and stores of each width, in bits, the machine code holds. Fails if a kernel
spills, or if what it moves in bulk does not go 128 bits at a time.
"""

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

import ptune_kernels
from ptune_kernels import native, triton_kernels

from .timing import RESULTS, write_table

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ELEMENTS = {"f": ("float32", 32), "d": ("float64", 64), "6__half": ("float16", 16), "13__nv_bfloat16": ("bfloat16", 16)}


class Binary(NamedTuple):
    registers: int
    spilled: int  # bytes on a thread's stack: no kernel here has an array that it indexes
    shared: int
    loads: Counter  # by width in bits
    stores: Counter


class Kernel(NamedTuple):
    name: str
    target: str
    binary: Binary
    narrow: set[tuple[str, int]]  # what else than 128 bits it may load or store, and why is said where it is made

    def good(self) -> bool:
        found = {("load", bits) for bits in self.binary.loads} | {("store", bits) for bits in self.binary.stores}
        bulk = {("load", 128), ("store", 128)}
        return self.binary.spilled == 0 and bulk <= found <= bulk | self.narrow


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
    texts, prompts = (heads(n), heads(m + n), heads(m + n)), (heads(m)[:1] for _ in range(3))
    packed = (half(1, m + b * n, h, d // h).transpose(1, 2) for _ in range(2))
    yield "spread_kv", ops.spread_kv, (*packed, m, b)
    yield "join_qkv", ops.join_qkv, (*texts, *prompts, m, torch.bfloat16)


def triton_binaries(targets: Iterable[str]) -> Iterator[Kernel]:
    """Compiles each op for each target as its launches on that GPU would; for a process that launches nothing."""
    compiled: dict[str, dict] = {}

    def compile_only(kernel, grid, *arguments, **constants):
        kernel.device_caches.clear()  # it knows the last target's binaries under the same device
        binary = kernel.warmup(*arguments, grid=grid, **triton_kernels.OPTIONS, **constants)
        compiled[kernel.__name__] = binary.asm

    triton_kernels._launch = compile_only
    for name in targets:
        target = TARGETS[name]
        triton.runtime.driver.set_active(_NoDriver(target))
        for op, call, arguments in _calls():
            compiled.clear()
            call(*arguments)
            ids = {("load", 64)} if op.startswith("embed") else set()
            placements = {("load", 32)} if "placed" in op else set()
            for function, asm in compiled.items():
                binary = _of_cubin(asm["cubin"]) if target.backend == "cuda" else _of_amdgcn(asm["amdgcn"])
                which = f"{op}, {function.strip('_')}" if len(compiled) > 1 else op
                yield Kernel(f"triton {which}", name, binary, ids | placements)


def cuda_binaries(targets: Iterable[str]) -> Iterator[Kernel]:
    """The kernels of the installed CUDA library: one for each kind of rows and dtype of what it writes (or sums)."""
    library = native.path("cuda")
    if not library.exists():
        print(f"no CUDA library was built ({library}), so there are no CUDA kernels to look into")
        return
    for (target, symbol), binary in _of_nvidia(library).items():
        if target not in targets:
            continue
        entry, code, parts = re.search(
            r"(Assemble|Plain|Strip|Overwrite|Sum)RowsI(f|d|6__half|13__nv_bfloat16)(?:Li(\d)E)?E", symbol
        ).groups()
        dtype, bits = ELEMENTS[code]
        narrow = {("load", 32)}  # ids and placements
        if entry in ("Assemble", "Plain"):
            narrow |= {("load", 64)}
        if entry != "Plain":  # rows that are not aligned go element by element
            narrow |= {("load", bits), ("load", 16), ("store", bits)}
        if entry == "Sum":  # float32 sums may become half, or have it added, of which a pack has 64 bits
            narrow |= {("load", 64), ("store", 16), ("store", 32), ("store", 64)}
        one = ", one part" if parts == "1" else ""
        yield Kernel(f"cuda {entry.lower()} {dtype}{one}", target, binary, narrow)


def _of_cubin(cubin: bytes) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        (binary,) = _of_nvidia(path).values()
    return binary


def _of_nvidia(path: Path) -> dict[tuple[str, str], Binary]:
    """By target and symbol, what NVIDIA's disassembler, which Triton brings along, finds in a cubin or a library."""

    def lines(flag: str) -> Iterator[tuple[tuple[str, str], str]]:
        """What it says, each line with the target (which a cubin does not name) and the symbol it is about."""
        tool = triton.knobs.nvidia.cuobjdump.path
        target = symbol = ""
        for line in subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout.splitlines():
            if found := re.search(r"arch = (sm_\d+)", line):
                target = found[1]
            elif found := re.search(r"Function(?: :)? (\w+)", line):
                symbol = found[1]
            yield (target, symbol), line

    resources, accesses = {}, defaultdict(list)
    for key, line in lines("-res-usage"):
        if found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            resources[key] = tuple(map(int, found.groups()))
    for key, line in lines("-sass"):
        if found := re.search(r"\b(LD|ST)G\.E([.\w]*)", line):
            bits = re.search(r"\.[US]?(8|16|64|128|256)\b", found[2])
            accesses[key].append(("load" if found[1] == "LD" else "store", int(bits[1]) if bits else 32))
    return {key: Binary(*found, *_by_width(accesses[key])) for key, found in resources.items()}


def _of_amdgcn(text: str) -> Binary:
    def number(what: str) -> int:
        return int(re.search(rf"\.{what}:\s+(\d+)", text)[1])

    widths = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    accesses = [
        (kind, widths.get(what, 16 if "short" in what else 8))
        for kind, what in re.findall(r"\b(?:buffer|global)_(load|store)_(dwordx?\d?|[us]?(?:byte|short))", text)
    ]
    spilled = number("private_segment_fixed_size")
    return Binary(number("vgpr_count"), spilled, number("group_segment_fixed_size"), *_by_width(accesses))


def _by_width(accesses: list[tuple[str, int]]) -> list[Counter]:
    return [Counter(bits for kind, bits in accesses if kind == wanted) for wanted in ("load", "store")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    chosen = parser.parse_args()
    targets = chosen.targets or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"target: expected some of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    rows, failed = [], 0
    for kernels in (cuda_binaries, triton_binaries):
        for kernel in kernels(targets):
            binary = kernel.binary
            loads, stores = (
                " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True))
                for widths in (binary.loads, binary.stores)
            )
            failed += not kernel.good()
            rows.append({
                "kernel": kernel.name, "target": kernel.target, "registers": str(binary.registers),
                "spilled": str(binary.spilled), "shared": str(binary.shared), "loads": loads, "stores": stores,
            })  # fmt: skip
            print(
                f"{kernel.name:<42} {kernel.target:<7} {binary.registers:>3} registers, {binary.spilled} bytes "
                f"spilled, {binary.shared} shared, load {loads}, store {stores}"
                + ("" if kernel.good() else "   <- spills or narrow accesses")
            )
    date = datetime.date.today().isoformat()
    about = f"triton {triton.__version__}, ptune-kernels {ptune_kernels.__version__}, {date}"
    write_table(chosen.out / f"aot-{date}.csv", about, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
