"""Prompts of other libraries, as their files hold them: PEFT's, those of P-tuning v2, and Petals'.

The formats, m rows, L layers, h key heads of width w:

- PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``. ``prompt_embeddings`` [m, d] are rows before the
  text; of prefix tuning and cartridges [m, 2L·h·w], the keys (2l) and values (2l + 1) of layer l, rotated already.
- P-tuning v2 (Liu et al. 2022): ``prefix_encoder.embedding.weight`` [m, 2L·h·w] in the same order, or what an MLP
  (``prefix_encoder.trans``) makes that of; with the head, or with the whole model.
- Petals: ``prompt_embeddings.weight`` [m, d], and ``intermediate_prompt_embeddings.weight`` [m, L·d] that is added at
  the blocks.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import PEFT_CONFIG, PEFT_WEIGHTS, read_json
from .kinds import KINDS

_TASK_TYPES = {None: None} | {kind.peft: kind.task for kind in KINDS}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROWS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
_KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")


@dataclass
class Foreign:
    """A prompt of another library: `prompts` with or without `deep`, or `prefix`, as our folders have them."""

    base: str | None = None
    task: str | None = None
    prompts: Any = None  # [m, d]
    deep: Any = None  # [m, L·d]
    prefix: Any = None  # [m, 2L·h·w]
    head: dict[str, Tensor] = field(default_factory=dict)


def read_foreign(source: str | os.PathLike[str], task_id: int | None, base_model: Any) -> Foreign:
    """What a folder of PEFT's holds, or a file of P-tuning v2 or Petals; see `ptune.convert.convert`."""
    return _read_peft(Path(source), task_id, base_model) if os.path.isdir(source) else _read_file(Path(source))


def _read_peft(folder: Path, task_id: int | None, base_model: Any) -> Foreign:
    path = folder / PEFT_CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: expected PEFT's {PEFT_CONFIG} in it")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    kind, task_type, base = (config.get(key) for key in ("peft_type", "task_type", "base_model_name_or_path"))
    if kind not in _ROWS + _KEYS_AND_VALUES:
        raise ValueError(f"{path}: peft_type: expected one of {', '.join(_ROWS + _KEYS_AND_VALUES)}, got {kind!r}")
    if not isinstance(task_type, str | None) or task_type not in _TASK_TYPES:
        known = ", ".join(name for name in _TASK_TYPES if name)
        raise ValueError(f"{path}: task_type: expected one of {known}, got {task_type!r}")
    if not isinstance(base, str | None):
        raise ValueError(f"{path}: base_model_name_or_path: expected a name, got {base!r}")
    if task_type == "SEQ_2_SEQ_LM" and (kind not in _ROWS or config.get("num_transformer_submodules") != 1):
        raise ValueError(
            f"{path}: expected a prompt of the encoder alone (num_transformer_submodules 1), got {kind} with "
            f"{config.get('num_transformer_submodules')!r}"
        )
    weights, pickled = folder / PEFT_WEIGHTS, folder / "adapter_model.bin"
    tensors = _tensors(pickled if pickled.is_file() and not weights.is_file() else weights)
    prompts = tensors.pop("prompt_embeddings", None)
    if prompts is None or prompts.dim() != 2 or prompts.shape[0] != config.get("num_virtual_tokens"):
        expected = f"[{config.get('num_virtual_tokens')}, …]"
        raise ValueError(f"{folder}: prompt_embeddings: expected {expected}, got {shape_of(prompts)}")
    if kind == "MULTITASK_PROMPT_TUNING":
        prompts = _of_task(folder, prompts, tensors, task_id)
    elif task_id is not None:
        raise ValueError(f"task_id: expected with a multitask prompt alone, got one with {kind}")
    if config.get("revision") not in (None, "main") and not base_model and not os.path.isdir(base or ""):
        raise ValueError(
            f"{path}: revision: expected the base's own, for a folder of prompts does not name another, got "
            f"{config['revision']!r}; download that of {base} and give it as base_model"
        )
    head = {name.removeprefix("base_model."): tensor for name, tensor in tensors.items()}
    held = {"prompts" if kind in _ROWS else "prefix": prompts}
    return Foreign(base, _TASK_TYPES[task_type], head=head, **held)


def _of_task(folder: Path, prompts: Tensor, tensors: dict[str, Tensor], task_id: int | None) -> Tensor:
    """The shared rows times the low-rank matrix of a task (Wang et al. 2023)."""
    columns, rows = (tensors.pop(f"prefix_task_{part}", torch.empty(0)) for part in ("cols", "rows"))
    fits = columns.dim() == rows.dim() == 3 and columns.shape[0] == rows.shape[0]
    if not fits or (columns.shape[1], rows.shape[2], columns.shape[2]) != (*prompts.shape, rows.shape[1]):
        raise ValueError(
            f"{folder}: prefix_task_cols, prefix_task_rows: expected [tasks, {prompts.shape[0]}, rank] and "
            f"[tasks, rank, {prompts.shape[1]}], got {shape_of(columns)} and {shape_of(rows)}"
        )
    if task_id is None and columns.shape[0] == 1:
        task_id = 0
    if type(task_id) is not int or not 0 <= task_id < columns.shape[0]:
        raise ValueError(f"task_id: expected 0 to {columns.shape[0] - 1}, got {task_id!r}")
    return prompts * (columns[task_id] @ rows[task_id])


def _read_file(path: Path) -> Foreign:
    tensors = _tensors(path)
    if any("prefix_encoder." in name for name in tensors):
        encoder = {name.partition("prefix_encoder.")[2]: t for name, t in tensors.items() if "prefix_encoder." in name}
        head = {name: tensor for name, tensor in tensors.items() if "prefix_encoder." not in name}
        return Foreign(prefix=_encoded(path, encoder), head=head)
    prompts = deep = None
    head = {}
    for name, tensor in tensors.items():
        if name.endswith("intermediate_prompt_embeddings.weight"):
            deep = tensor
        elif name.endswith("prompt_embeddings.weight"):
            prompts = tensor
        else:
            head[name] = tensor
    if prompts is None or prompts.dim() != 2:
        raise ValueError(
            f"{path}: expected prefix_encoder.embedding.weight (P-tuning v2) or prompt_embeddings.weight [m, d] "
            f"(Petals) in it, got {', '.join(list(tensors)[:5]) or 'nothing'}"
        )
    return Foreign(prompts=prompts, deep=deep, head=head)


def _encoded(path: Path, encoder: dict[str, Tensor]) -> Tensor:
    names = ("embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
    missing = [name for name in (names if len(encoder) > 1 else names[:1]) if name not in encoder]
    if missing or len(encoder) not in (1, len(names)):
        raise ValueError(
            f"{path}: prefix_encoder: expected {', '.join(names)} (or the first alone), got {list(encoder)}"
        )
    prefix = encoder["embedding.weight"]
    try:
        for layer in ("trans.0", "trans.2") if len(encoder) > 1 else ():
            prefix = nn.functional.linear(prefix, encoder[f"{layer}.weight"], encoder[f"{layer}.bias"])
            prefix = prefix.tanh() if layer == "trans.0" else prefix
    except RuntimeError as error:
        raise ValueError(f"{path}: prefix_encoder: its layers do not fit one another: {error}") from None
    if prefix.dim() != 2:
        raise ValueError(f"{path}: prefix_encoder.embedding.weight: expected two dimensions, got {shape_of(prefix)}")
    return prefix


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, float32. Never runs code that a file may hold."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tensors = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except UnpicklingError:
        raise ValueError(f"{path}: holds pickled code, or is no file of tensors; it was not read") from None
    except Exception as error:  # reading damaged bytes may fail in any way
        raise ValueError(f"{path}: not a file of tensors: {error}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path}: expected tensors by their names, got {type(tensors).__name__}")
    # a buffer of 0, 1, …, which older versions of transformers wrote
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name}: expected floating-point numbers of 16 bits or more, got {tensor.dtype}")
        if not _is_whole(tensor):
            raise ValueError(f"{path}: {name}: expected all of its numbers, got a sparse, nested or repeated tensor")
        tensors[name] = tensor.float()
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{path}: {name}: expected finite numbers, got NaN or infinity among them")
    return tensors


def _is_whole(tensor: Tensor) -> bool:
    """Whether it is a plain tensor that has a number in memory for each of its elements."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def shape_of(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))
