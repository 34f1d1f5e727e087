"""``python -m ptune_kernels``: versions, what is loaded, and which backend serves each device."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, backend_for, native


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def report() -> list[tuple[str, str]]:
    lines = [
        ("ptune-kernels", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})"),
        ("triton", _version("triton")),
    ]
    for device_type, what in (("cpu", "instruction set"), ("cuda", "architectures")):
        library = native.libraries.get(device_type)
        found = f"{library.path} ({what}: {library.build})" if library else native.absence(device_type)
        if device_type == "cuda" and library and (reason := native.hindrance()) is not None:
            found += f"; not used, as {reason}"
        lines.append((f"native {device_type} library", found))
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device != "cpu" else ""
        lines.append((f"ops on {device}{name}", backend_for(device)))
    if not torch.cuda.is_available():
        lines.append(("ops on cuda", f"{backend_for('cuda')}, once there is a GPU"))
    return lines


if __name__ == "__main__":
    rows = report()
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
