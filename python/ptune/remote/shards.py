"""Some tensors of a checkpoint, read from the safetensors shards that hold them, and from no others."""

import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip


def read_tensors(path: str | os.PathLike[str], wanted: Callable[[str], bool], **hub: Any) -> dict[str, Tensor]:
    """The tensors of the checkpoint ``path`` (a folder, or a name on the hub) whose names are ``wanted``, on the CPU.

    ``hub``: those of `HUB_OPTIONS`. Raises `FileNotFoundError` or `OSError` without safetensors files, and `ValueError`
    for malformed ones.
    """
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    names: dict[str, list[str] | None] = {SAFE_WEIGHTS_NAME: None}
    if index is not None:
        names = defaultdict(list)
        for name, file in json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"{index}: expected names of files beside it, got {file!r}")
            if wanted(name):
                names[file].append(name)  # type: ignore[union-attr]
    tensors: dict[str, Tensor] = {}
    for file, inside in names.items():
        found = cached_file(path, file, _raise_exceptions_for_missing_entries=False, **hub)
        if found is None:
            raise FileNotFoundError(f"{path}: expected {file}; blocks are served from safetensors checkpoints alone")
        try:
            with safe_open(found, framework="pt", device="cpu") as shard:
                for name in filter(wanted, shard.keys()) if inside is None else inside:
                    tensors[name] = shard.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{found}: not a safetensors file with all that it should hold: {error}") from None
    return tensors
