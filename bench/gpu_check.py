"""``python -m bench.gpu_check``: all that wants a CUDA GPU, in one command, in under nine minutes.

Installs the newest wheel of ``dist/`` beside the torch, triton, transformers and peft that this Python has, without
touching these, and runs each step in a process of its own, so that one that fails or hangs does not keep the others
from running: the tests marked ``cuda``, CUDA graphs among them, compute-sanitizer over op tests, and `bench.gpu`. What
needs no GPU comes first; without one, the check stops there.

Writes ``gpu-check.json`` (each step, whether it passed, and the end of what it said), and what `bench.gpu` writes.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from .timing import RESULTS

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf"]
# compilers, Triton's among them, have more cores there than one process of tests keeps busy
WORKERS = ["-n", "4"] if importlib.util.find_spec("xdist") else []
# enough to pass every kernel once: the sanitizers slow them down a hundred times
SANITIZED = ["tests/ops", "-m", "cuda", "-k", "(equals_oracle or equals_autograd) and (2x3x5x7 or 2x5x3x123)"]


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: int
    needs_gpu: bool = True


def steps(out: Path) -> list[Step]:
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    python = sys.executable
    return [
        Step("libraries", [python, "-m", "ptune_kernels"], 30, needs_gpu=False),
        Step(
            "collect",
            [*PYTEST, "tests/ops", "tests/model/test_devices.py", "-m", "cuda", "--collect-only"],
            60,
            needs_gpu=False,
        ),
        Step("compile", [python, "-m", "bench.aot", "--out", str(out)], 300, needs_gpu=False),
        Step("rehearse", [python, "-m", "bench.gpu", "--rehearse"], 120, needs_gpu=False),
        Step("tests", [*PYTEST, *WORKERS, "tests/ops", "-m", "cuda"], 100),
        Step("models", [*PYTEST, *WORKERS, "tests/model/test_devices.py", "-m", "cuda"], 80),
        Step("memcheck", [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *PYTEST, *SANITIZED], 60),
        Step("racecheck", [sanitizer, "--tool", "racecheck", "--error-exitcode", "9", *PYTEST, *SANITIZED], 60),
        Step("benchmarks", [python, "-m", "bench.gpu", "--out", str(out)], 210),
    ]


def run(step: Step, environment: dict[str, str]) -> dict[str, Any]:
    print(f"{step.name} …", flush=True)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            step.command, cwd=ROOT, env=environment, timeout=step.seconds, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        passed, said = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout or ""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        passed, said = False, f"{said}\nstopped after {step.seconds} s"
    except OSError as missing:
        passed, said = False, str(missing)
    seconds = round(time.monotonic() - begin, 1)
    print(f"{step.name}: {'passed' if passed else 'FAILED'} in {seconds} s\n{said[-2000:]}", flush=True)
    return {"step": step.name, "passed": passed, "seconds": seconds, "output": said[-4000:]}


def has_gpu(environment: dict[str, str]) -> bool:
    asked = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked], env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    out = parser.parse_args().out.absolute()
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    if not wheels:
        parser.error("expected a wheel in dist/, got none; `make wheel` builds it")
    with tempfile.TemporaryDirectory() as site:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site]
        subprocess.run([*install, str(wheels[-1])], check=True)
        environment = os.environ | {"PYTHONPATH": site, "PYTHONUNBUFFERED": "1"}
        results, gpu = [], has_gpu(environment)
        for step in steps(out):
            if step.needs_gpu and not gpu:
                break
            # on a GPU machine the time is the GPU's
            if gpu and not step.needs_gpu and step.name != "libraries":
                continue
            results.append(run(step, environment))
    passed = all(result["passed"] for result in results)
    if not gpu:
        print("no CUDA device: stopped before the first step that needs one" + ("" if passed else "; see above"))
        return 1
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu-check.json").write_text(json.dumps({"wheel": wheels[-1].name, "steps": results}, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
