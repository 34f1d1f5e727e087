"""The compiled libraries: found beside this file, loaded once, and asked what they hold.

Each registers its ops with torch when it is loaded. A library that is here but does not load is an error: falling back
in silence would hide a broken installation.
"""

import ctypes
import os
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import schema


class Library(NamedTuple):
    path: Path
    build: str  # what it was compiled for, in its own words
    code: ctypes.CDLL


libraries: dict[str, Library] = {}  # by device type


def path(device_type: str) -> Path:
    return Path(__file__).with_name(f"libptune_{device_type}.so")


def _load(device_type: str) -> None:
    library = path(device_type)
    try:
        torch.ops.load_library(library)
        code = ctypes.CDLL(str(library))
        describe = code.ptune_build
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"{library} is present but does not load on torch {torch.__version__} ({error}); reinstall ptune-kernels, "
            "or delete that file to go on without it"
        ) from error
    describe.restype = ctypes.c_char_p
    libraries[device_type] = Library(library, describe().decode(), code)
    if device_type == "cpu" and (forced := os.environ.get("PTUNE_CPU_ISA")) not in (None, "", describe().decode()):
        raise ImportError(f"PTUNE_CPU_ISA: expected plain, avx2 or avx512, as far as this CPU has it, got {forced!r}")


def loaded(device_type: str) -> bool:
    return device_type in libraries


def hindrance() -> str | None:
    """Why the CUDA library, which is loaded, does not serve the GPUs here: all of them, or none.

    What is compiled for one architecture (``-real``) runs on later ones of its major version, and with PTX on all that
    are later; with a letter it runs on that one alone.
    """
    built = re.findall(r"(\d+)([a-z]?)(-real)?", libraries["cuda"].build)  # of "80-real 90a-real 120"

    def runs_on(here: int, number: int, letter: str, real: str) -> bool:
        return here == number if letter else here >= number and (not real or here // 10 == number // 10)

    found = [
        10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    ]
    if found and libraries["cuda"].code.ptune_driver_is_old():
        return "the driver is older than the CUDA runtime that is in it"
    if built and not all(any(runs_on(here, int(one), *rest) for one, *rest in built) for here in found):
        return "it holds no code for every GPU here"
    return None


def absence(device_type: str) -> str:
    """Why there is no library for ``device_type``."""
    if not path(device_type).exists():
        return "not built"
    return "built, but this torch has no CUDA"


def _refuse(name: str, *arguments) -> None:
    """Serves every device and layout that no library does: says what is wrong with the arguments, or which kernel is
    missing."""
    schema.CHECKS[name](*arguments)
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    raise RuntimeError(f"{name}: the native backend has no kernel for device {device}")


schema.register("native", {name: partial(_refuse, name) for name in schema.SCHEMAS})
if path("cpu").exists():
    _load("cpu")
# The CUDA library needs symbols that only a CUDA build of torch has.
if path("cuda").exists() and torch.version.cuda is not None:
    _load("cuda")
