"""``python -m bench.gpu_check``: all that wants a CUDA GPU, in one command, in under nine minutes.

Installs the newest wheel of ``dist/`` beside the torch, triton, transformers and peft that this Python has, without
touching these, in a folder of its own with copies of the tests and benchmarks (beside the sources, those would shadow
it). Runs each step in a process of its own, so that one that fails or hangs does not keep the others from running: the
tests marked ``cuda``, CUDA graphs among them, and compute-sanitizer over op tests, all at once; then, alone,
`bench.gpu`. What needs no GPU comes first; without one, the check stops there.

Writes ``gpu-check.json`` (each step, whether it passed, and the end of what it said), and what `bench.gpu` writes.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .timing import RESULTS

ROOT = Path(__file__).resolve().parents[1]
MODELS = ["tests/model/test_devices.py"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", "--tb=line"]


def workers(count: int) -> list[str]:
    """Compilers, Triton's among them, have more cores there than one process of tests keeps busy."""
    return ["-n", str(count)] if importlib.util.find_spec("xdist") else []


def sanitized(sizes: str) -> list[str]:
    """Enough to pass every kernel once: the sanitizers slow them down a hundred times."""
    return ["tests/ops", "-m", "cuda", "-k", f"equals_autograd and ({sizes})"]


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: int
    needs_gpu: bool = True
    alone: bool = False


def steps(out: Path) -> list[Step]:
    sanitizer = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--error-exitcode", "9", "--tool"]
    python = sys.executable
    return [
        Step("libraries", [python, "-m", "ptune_kernels"], 30, needs_gpu=False),
        Step(
            "collect",
            [*PYTEST, "tests/ops", *MODELS, "-m", "cuda", "--collect-only"],
            60,
            needs_gpu=False,
        ),
        Step("compile", [python, "-m", "bench.aot", "--out", str(out)], 300, needs_gpu=False),
        Step("rehearse", [python, "-m", "bench.gpu", "--rehearse"], 120, needs_gpu=False),
        Step("tests", [*PYTEST, *workers(8), "tests/ops", "-m", "cuda"], 205),
        Step("models", [*PYTEST, *workers(5), *MODELS, "-m", "cuda"], 205),
        Step("memcheck", [*sanitizer, "memcheck", *PYTEST, *sanitized("2x1x2x384 or 2x5x3x123")], 205),
        Step("racecheck", [*sanitizer, "racecheck", *PYTEST, *sanitized("2x5x3x123 and placed and native")], 205),
        Step("benchmarks", [python, "-m", "bench.gpu", "--out", str(out)], 330, alone=True),
    ]


def run(step: Step, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    print(f"{step.name} …", flush=True)
    begin = time.monotonic()
    try:
        with subprocess.Popen(
            step.command, cwd=folder, env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                said = process.communicate(timeout=step.seconds)[0]
                passed = process.returncode == 0
            except subprocess.TimeoutExpired:
                # its workers, and what a sanitizer runs, too: they would go on beside the benchmarks
                os.killpg(process.pid, signal.SIGKILL)
                passed, said = False, f"{process.communicate()[0]}\nstopped after {step.seconds} s"
    except OSError as missing:
        passed, said = False, str(missing)
    seconds = round(time.monotonic() - begin, 1)
    said = said.replace(f"{folder}/", "")
    print(f"{step.name}: {'passed' if passed else 'FAILED'} in {seconds} s\n{said[-2000:]}", flush=True)
    return {"step": step.name, "passed": passed, "seconds": seconds, "output": said[-4000:]}


def has_gpu(environment: dict[str, str]) -> bool:
    asked = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked], env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="the steps to run, by name; default: all")
    options = parser.parse_args()
    out, names = options.out.absolute(), [step.name for step in steps(options.out)]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    if not wheels:
        parser.error("expected a wheel in dist/, got none; `make wheel` builds it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", name]
        subprocess.run([*install, str(wheels[-1])], check=True)
        for part in ("bench", "tests", "csrc"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        environment = os.environ | {"PYTHONPATH": name, "PYTHONUNBUFFERED": "1"}
        results: list[dict[str, Any]] = []
        gpu, writing = has_gpu(environment), threading.Lock()

        def note(step: Step) -> None:
            result = run(step, folder, environment)
            with writing:
                results.append(result)
                if not gpu:
                    return
                # as soon as it is known: a check that is broken off has shown something
                out.mkdir(parents=True, exist_ok=True)
                report = {"wheel": wheels[-1].name, "steps": sorted(results, key=lambda result: result["step"])}
                (out / "gpu-check.json").write_text(json.dumps(report, indent=1))

        # on a GPU machine the time is the GPU's
        chosen = [step for step in steps(out) if step.needs_gpu == gpu or step.name == "libraries"]
        chosen = [step for step in chosen if not options.only or step.name in options.only]
        with ThreadPoolExecutor() as pool:
            list(pool.map(note, [step for step in chosen if not step.alone]))
        for step in chosen:
            if step.alone:
                note(step)
    passed = all(result["passed"] for result in results)
    if not gpu:
        print("no CUDA device: stopped before the first step that needs one" + ("" if passed else "; see above"))
        return 1
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
