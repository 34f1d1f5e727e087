"""``python -m bench.wheel_check``: whether the newest wheel of ``dist/`` can be installed where it says it can.

It must be small, ask for nothing but torch and what manylinux_2_28 systems have, and load and compute on builds of
torch of several releases. These are CUDA builds, which load without a GPU too, of some gigabytes each, put into
``build/wheel-check`` and left there.
"""

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = "manylinux_2_28"
LARGEST = 5 * 2**20  # bytes
TORCHES = ("2.10.0", "2.11.0", "2.14.1")
PROGRAM = """
import torch, ptune_kernels
from ptune_kernels import native

if not (native.loaded("cpu") and (native.loaded("cuda") or torch.version.cuda is None)):
    raise SystemExit("expected the native libraries to be loaded; see above")
prompts, hidden = torch.randn(3, 33), torch.randn(2, 5, 33).bfloat16()
with ptune_kernels.use_backend("reference"):
    expected = ptune_kernels.prepend(prompts, hidden)
with ptune_kernels.use_backend("native"):
    torch.testing.assert_close(ptune_kernels.prepend(prompts, hidden), expected, rtol=0, atol=0)
packed = torch.randn(2, 1, 4, 3 + 2 * 5, 8).unbind()  # its op takes a symbolic size
with ptune_kernels.use_backend("reference"):
    expected = ptune_kernels.spread_kv(*packed, 3, 2)
with ptune_kernels.use_backend("native"):
    torch.testing.assert_close(ptune_kernels.spread_kv(*packed, 3, 2), expected, rtol=0, atol=0)
"""


def audit(wheel: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", "--json", wheel], check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(said)
    if foreign := {name for name in found["external_libs"] if not name.startswith("libtorch")}:
        raise SystemExit(f"{wheel.name}: expected no libraries but torch's, got {', '.join(sorted(foreign))}")
    glibc = [int(part) for part in found["sym_tag"].split("_")[1:3]]
    if glibc > [int(part) for part in PLATFORM.split("_")[1:]] or PLATFORM not in wheel.name:
        raise SystemExit(f"{wheel.name}: expected symbols and a name of {PLATFORM}, got symbols of {found['sym_tag']}")
    print(
        f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MB, symbols of {found['sym_tag']}, torch's libraries alone"
    )


def load(wheel: Path, torch: str) -> None:
    home = ROOT / "build" / "wheel-check" / f"torch-{torch}"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*pip, f"torch=={torch}", "numpy"], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)
    # from a folder where the source tree is not found
    subprocess.run([python, "-m", "ptune_kernels"], check=True, cwd=home)
    subprocess.run([python, "-c", PROGRAM], check=True, cwd=home)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.wheel_check", description=__doc__.splitlines()[0])
    parser.add_argument("torches", nargs="*", default=TORCHES, metavar="torch", help="releases; default: %(default)s")
    chosen = parser.parse_args()
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    if not wheels:
        parser.error("expected a wheel in dist/, got none; `make wheel` builds it")
    wheel = wheels[-1]
    if wheel.stat().st_size > LARGEST:
        raise SystemExit(f"{wheel.name}: expected at most {LARGEST} bytes, got {wheel.stat().st_size}")
    audit(wheel)
    for torch in chosen.torches:
        load(wheel, torch)


if __name__ == "__main__":
    main()
