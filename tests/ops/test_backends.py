"""Which backend serves, choosing another, and what `python -m ptune_kernels` says of it."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ptune_kernels
from ptune_kernels import backend_for, backends, native, use_backend
from ptune_kernels.__main__ import report

from .cases import OPS, TARGETS


def test_the_compiled_library_serves_the_cpu():
    assert native.loaded("cpu"), "these tests need the compiled library: install the wheel"
    assert backend_for("cpu") == backend_for(torch.device("cpu")) == "native"


def test_an_unknown_device_gets_the_reference():
    assert backend_for("meta") == "reference"


@pytest.mark.parametrize(
    ("built", "capabilities", "backend"),
    [
        ("80-real 90a-real 100-real 120", [], "native"),
        ("80-real 90a-real 100-real 120", [(8, 6)], "native"),
        ("80-real 90a-real 100-real 120", [(9, 0), (10, 3)], "native"),
        ("80-real 90a-real 100-real 120", [(12, 1)], "native"),
        ("80-real 90a-real 100-real 120", [(13, 0)], "native"),
        ("80-real 90a-real 100-real 120", [(7, 5)], "triton"),
        ("80-real 90a-real 100-real 120", [(11, 0)], "triton"),
        ("80-real 90a-real 100-real 120", [(9, 0), (7, 5)], "triton"),
        ("80-real 90-real", [(8, 9), (9, 0)], "native"),
        ("80-real 90-real", [(10, 0)], "triton"),
        ("90a", [(9, 0)], "native"),
        ("90a", [(12, 0)], "triton"),
        ("90-virtual", [(8, 0)], "triton"),
        ("90-virtual", [(10, 0)], "native"),
        ("native", [(7, 5)], "native"),
    ],
)
def test_gpus_are_served_by_the_compiled_library_where_it_holds_code_for_them(
    monkeypatch, built, capabilities, backend
):
    code = SimpleNamespace(ptune_driver_is_old=lambda: 0)
    monkeypatch.setitem(native.libraries, "cuda", native.Library(Path("libptune_cuda.so"), built, code))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(backends, "_serving", {})
    assert backend_for("cuda") == backend
    said = dict(report())["native cuda library"]
    assert said.endswith("; not used, as it holds no code for every GPU here") == (backend == "triton")
    # the same library on a driver that its runtime does not run on
    code.ptune_driver_is_old = lambda: 1
    monkeypatch.setattr(backends, "_serving", {})
    assert backend_for("cuda") == ("triton" if capabilities else backend)
    said = dict(report())["native cuda library"]
    assert said.endswith("as the driver is older than the CUDA runtime that is in it") == bool(capabilities)


def test_use_backend_nests_and_restores():
    before = backend_for("cpu")
    with use_backend("reference"):
        assert backend_for("cpu") == "reference"
        with use_backend(None):
            assert backend_for("cpu") == before
        with pytest.raises(ValueError, match="mode"), use_backend("triton"):
            ptune_kernels.overwrite(torch.zeros(1, 1, 1), torch.zeros(1, 1), mode="an error on the way out")
        assert backend_for("cpu") == "reference"
    assert backend_for("cpu") == before


@pytest.mark.parametrize("target", [t for t in TARGETS if t.device == "cpu"], ids=lambda t: t.backend)
def test_the_chosen_backend_is_the_one_that_runs(target):
    """In forward, and in backward even when the choice has ended by then."""
    called = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            called.append(op.namespace)
            return op(*args, **(kwargs or {}))

    op = next(op for op in OPS if op.name == "prepend")
    (prompts, hidden), _ = op.case((2, 3, 4, 5), torch.float32, "cpu", placed=False)
    with Recorder():
        with use_backend(target.backend):
            out = ptune_kernels.prepend(prompts.requires_grad_(), hidden)
        out.sum().backward()
    assert [name for name in called if name.startswith("ptune_")] == [f"ptune_{target.backend}"] * 2


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The tests of arithmetic again, with one of the sets of row functions forced on the compiled library."""
    if native.libraries["cpu"].build == build_of(isa):
        pytest.skip("served the other tests")
    if build_of(isa) != isa:
        pytest.skip(f"this CPU has no {isa}")
    files = [f"{Path(__file__).parent}/test_{name}.py" for name in ("casts", "backward")]
    arguments = ["-q", "-p", "no:cacheprovider", "-k", "native-cpu and not autograd_on_oracle"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *files],
        env={**os.environ, "PTUNE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout


def test_an_instruction_set_that_is_none_is_refused():
    program = [sys.executable, "-c", "import ptune_kernels"]
    run = subprocess.run(program, env={**os.environ, "PTUNE_CPU_ISA": "AVX2"}, capture_output=True, text=True)
    assert run.returncode == 1
    assert "PTUNE_CPU_ISA: expected plain, avx2 or avx512, as far as this CPU has it, got 'AVX2'" in run.stderr


def build_of(isa):
    """What the compiled library says of itself with PTUNE_CPU_ISA set."""
    program = "import ptune_kernels; print(ptune_kernels.native.libraries['cpu'].build)"
    environment = {**os.environ, "PTUNE_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    ).stdout.strip()


def test_many_threads_at_once():
    """Ops called from several Python threads do not disturb each other."""
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        prompts, hidden = torch.randn(5, 64, generator=generator), torch.randn(4, 33, 64, generator=generator)
        for _ in range(50):
            out = ptune_kernels.prepend(prompts.requires_grad_(), hidden)
            (grad,) = torch.autograd.grad(out.sum(), prompts)
            if not (torch.equal(out, torch.cat([prompts.expand(4, 5, 64), hidden], 1)) and (grad == 4).all()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_command_line(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "ptune_kernels"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = [" ".join(line.split()) for line in run.stdout.splitlines()]
    assert f"ptune-kernels {ptune_kernels.__version__}" in lines
    assert f"ops on cpu {backend_for('cpu')}" in lines
    assert any(line.startswith(f"torch {torch.__version__}") for line in lines)
    library = native.libraries["cpu"]
    assert any(line.startswith("native cpu library") and library.build in line for line in lines)


def test_a_library_that_does_not_load_is_an_error(tmp_path):
    """Not a silent fallback: the package copied beside a library that is not one."""
    source = Path(ptune_kernels.__file__).parent
    shutil.copytree(source, tmp_path / "ptune_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "ptune_kernels" / "libptune_cpu.so").write_bytes(b"not a library")
    run = subprocess.run(
        [sys.executable, "-c", "import ptune_kernels"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode != 0
    assert "libptune_cpu.so is present but does not load" in run.stderr
