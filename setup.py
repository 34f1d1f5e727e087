"""Builds the compiled libraries with CMake, beside the Python files; everything else is in pyproject.toml."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = ROOT / "ptune_kernels"


class BuildWithNative(build_py):
    """Puts the libraries into the source tree, from where they are packaged: it then works as the wheel does."""

    def run(self):
        for stale in PACKAGE.glob("libptune_*.so"):
            stale.unlink()
        build, torch_dir = ROOT / "build" / "cmake", Path(torch.__file__).parent
        for command in (
            ["cmake", "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DTORCH_DIR={torch_dir}"],
            ["cmake", "--build", build],
            ["cmake", "--install", build, "--prefix", PACKAGE, "--strip"],
        ):
            subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
        super().run()


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


class AnyPythonWheel(bdist_wheel):
    """The libraries link neither Python nor one torch, so one wheel serves every Python on this platform."""

    def get_tag(self):
        platform = super().get_tag()[2]
        if platform.startswith("linux_"):
            # The oldest glibc that has the symbols these libraries ask for.
            needed = [
                int(minor)
                for library in Path(self.bdist_dir).rglob("libptune_*.so")
                for minor in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())
            ]
            platform = platform.replace("linux", f"manylinux_2_{max([28, *needed])}", 1)
        return "py3", "none", platform


setup(distclass=BinaryDistribution, cmdclass={"build_py": BuildWithNative, "bdist_wheel": AnyPythonWheel})
