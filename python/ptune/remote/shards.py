"""Some tensors of a checkpoint, read from the safetensors shards that hold them, and from no others."""

import os
import reprlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..checkpoint import read_json


def read_tensors(path: str | os.PathLike[str], wanted: Callable[[str], bool], **hub: Any) -> dict[str, Tensor]:
    """The tensors of the checkpoint ``path`` (a folder, or a name on the hub) whose names are ``wanted``, on the CPU.

    ``hub``: those of `ptune.hub.OPTIONS`. Raises `FileNotFoundError` or `OSError` without safetensors files, and
    `ValueError` for malformed ones.
    """
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    names: dict[str, list[str] | None] = {SAFE_WEIGHTS_NAME: None}
    if index is not None:
        names = defaultdict(list)
        content = read_json(Path(index))
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict):
            raise ValueError(f"{index}: expected a weight_map, got {reprlib.repr(content)}")
        for name, file in files.items():
            if not isinstance(file, str) or Path(file).name != file:
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
