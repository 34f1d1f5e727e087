"""Prompts of other libraries: PEFT, P-tuning v2 and Petals, read into folders of ours, and written for PEFT.

The formats, m rows, L layers, h key heads of width w:

- PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``. ``prompt_embeddings`` [m, d] are rows before the
  text; of prefix tuning and cartridges [m, 2L·h·w], the keys (2l) and values (2l + 1) of layer l, rotated already.
- P-tuning v2 (Liu et al. 2022): ``prefix_encoder.embedding.weight`` [m, 2L·h·w] in the same order, or what an MLP
  (``prefix_encoder.trans``) makes that of; with the head, or with the whole model.
- Petals: ``prompt_embeddings.weight`` [m, d], and ``intermediate_prompt_embeddings.weight`` [m, L·d] that is added at
  the blocks.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from . import checkpoint, hub
from .auto import AutoPTuneModel
from .checkpoint import MisfitError
from .runs import MODELS

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_LOADERS: dict[Any, Any] = {**MODELS, None: AutoPTuneModel}
_TASK_TYPES = {
    "SEQ_CLS": "classification", "TOKEN_CLS": "tagging", "CAUSAL_LM": "generation", "SEQ_2_SEQ_LM": "seq2seq",
    "FEATURE_EXTRACTION": None, None: None,
}  # fmt: skip
_CLASSES: dict[str, Any] = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
}
_OUTPUT_LAYERS = ("out_proj.weight", "score.weight", "classifier.weight")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROWS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
_KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")


@dataclass
class _Foreign:
    """A prompt of another library: `prompts` with or without `deep`, or `prefix`, as our folders have them."""

    base: str | None = None
    task: str | None = None
    prompts: Any = None  # [m, d]
    deep: Any = None  # [m, L·d]
    prefix: Any = None  # [m, 2L·h·w]
    head: dict[str, Tensor] = field(default_factory=dict)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    task: str | None = None,
    task_id: int | None = None,
) -> None:
    """Write the prompt of another library, and its head, to ``out``, a folder for `AutoPTuneModel` and `PromptBank`.

    Args:
        source: PEFT's folder; or a file of P-tuning v2 or Petals (safetensors, or torch's format of tensors alone).
        base_model: the base, where ``source`` does not name it, or no longer in its place.
        task: ``"classification"``, ``"tagging"``, ``"generation"`` or ``"seq2seq"``, where ``source`` does not say.
        task_id: which task of a multitask prompt.

    Raises `ValueError`, and writes nothing, for what is no such prompt, holds pickled code, or does not fit the base
    (`MisfitError`). Where PEFT pools a prompt row or a padding token (classification by encoders), outputs are ours.
    """
    foreign = _read_peft(Path(source), task_id, base_model) if os.path.isdir(source) else _read_file(Path(source))
    base = base_model or foreign.base
    if not base:
        raise ValueError(f"base_model: expected one, for {source} does not name its base")
    task = task or foreign.task
    if task not in _LOADERS:
        raise ValueError(f"task: expected one of {', '.join(repr(name) for name in _LOADERS if name)}, got {task!r}")
    rows = foreign.prefix if foreign.prompts is None else foreign.prompts
    if rows.shape[0] == 0:
        raise ValueError(f"{source}: expected prompts of at least one row, got {_shape(rows)}")
    shallow = foreign.prefix is None and foreign.deep is None
    settings = {
        "tuning_mode": "ptune" if shallow else "deep_ptune",
        "deep_prompt_mode": "overwrite" if foreign.deep is None else "add",
        "pre_seq_len": rows.shape[0],
    }
    labels: dict[str, Any] = {}
    if foreign.head and task is not None:
        labels = {"num_labels": _num_labels(foreign.head), "ignore_mismatched_sizes": True}
    model = _LOADERS[task].from_pretrained(base, **settings, **labels)
    _set_head(model, foreign.head)
    if foreign.prefix is not None:
        # a model takes keys and values from a folder alone
        names = checkpoint.compiled_names(model.ptune_config, model.config.num_hidden_layers)
        tensors = {name: model.get_parameter(name) for name in model._head}
        tensors |= dict(zip(names, _layers(model, foreign.prefix), strict=True))
        hub.write(out, model._description(model.origin), tensors)
        return
    tables = [(model.prompt_embeddings.weight, foreign.prompts)]
    if foreign.deep is not None:
        tables.append(
            (
                model.intermediate_prompt_embeddings.weight,
                _layer_major(foreign.deep, rows.shape[0], model.config.num_hidden_layers),
            )
        )
    for table, values in tables:
        if table.shape != values.shape:
            raise MisfitError(f"prompts: expected {tuple(table.shape)} for this base, got {_shape(values)}")
        table.data.copy_(values)
    model.save_prompts(out)


def to_peft(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base_model: str | os.PathLike[str] | None = None,
) -> None:
    """Write the prompts and head of our ``folder`` as PEFT's: shallow prompts as prompt tuning, others as a prefix.

    Raises `ValueError` for what PEFT has nothing for: deep prompts that cannot be shared, or whose base takes no keys
    and values, and model classes of other tasks.
    """
    saved = checkpoint.read_config(folder)
    task_type = next((kind for kind, names in _CLASSES.items() if saved["model_class"] in names.values()), None)
    if task_type is None:
        raise ValueError(f"{folder}: model_class: expected one of a task that PEFT has, got {saved['model_class']}")
    model = _LOADERS[_TASK_TYPES[task_type]].from_pretrained(folder, base_model=base_model)
    settings, config = model.ptune_config, model.config
    if settings.tuning_mode is None:
        raise ValueError(f"{folder}: expected prompts, and it holds a head alone")
    described = {
        "task_type": task_type,
        "base_model_name_or_path": model.origin.name,
        "num_virtual_tokens": settings.pre_seq_len,
        "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "inference_mode": True,
    }
    if model.prompt_embeddings is not None and not settings.deep:
        prompts = model.prompt_embeddings.weight
        described |= {"peft_type": "PROMPT_TUNING", "token_dim": prompts.shape[1], "prompt_tuning_init": "RANDOM"}
    else:
        if model.prefix_plan.path != "prefix":
            raise ValueError(f"{folder}: PEFT has no deep prompts but keys and values: {model.prefix_plan.reason}")
        if "past_key_values" not in model._hooks.parameters:
            raise ValueError(
                f"{folder}: PEFT hands over past_key_values, which {model.base_class.__name__} takes none of"
            )
        with torch.no_grad():
            tensors = model.eval()._hooks.prefix.prefix().tensors()
        tensors = [tensor.transpose(0, 1).float() for tensor in tensors]  # [m, h, w]
        if len({tensor.shape for tensor in tensors}) != 1:
            raise ValueError(f"{folder}: PEFT holds keys and values of one shape, and these have several")
        heads, width = tensors[0].shape[1:]
        prompts = torch.stack(tensors, 1).flatten(1)
        described |= {
            "peft_type": "PREFIX_TUNING", "token_dim": heads * width, "num_attention_heads": heads,
            "encoder_hidden_size": heads * width, "prefix_projection": False,
        }  # fmt: skip
    state = model.state_dict()
    written = {f"base_model.{name}": state[name] for name in model._head} | {"prompt_embeddings": prompts}
    written = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in written.items()}
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    os.makedirs(out, exist_ok=True)
    checkpoint.replace_file(Path(out, WEIGHTS_NAME), lambda path: save_file(written, path, metadata={"format": "pt"}))
    checkpoint.replace_file(Path(out, CONFIG_NAME), lambda path: path.write_text(text, encoding="utf-8"))


def _read_peft(folder: Path, task_id: int | None, base_model: Any) -> _Foreign:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: expected PEFT's {CONFIG_NAME} in it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
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
    weights, pickled = folder / WEIGHTS_NAME, folder / "adapter_model.bin"
    tensors = _tensors(pickled if pickled.is_file() and not weights.is_file() else weights)
    prompts = tensors.pop("prompt_embeddings", None)
    if prompts is None or prompts.dim() != 2 or prompts.shape[0] != config.get("num_virtual_tokens"):
        expected = f"[{config.get('num_virtual_tokens')}, …]"
        raise ValueError(f"{folder}: prompt_embeddings: expected {expected}, got {_shape(prompts)}")
    if kind == "MULTITASK_PROMPT_TUNING":
        prompts = _of_task(folder, prompts, tensors, task_id)
    elif task_id is not None:
        raise ValueError(f"task_id: expected with a multitask prompt alone, got one with {kind}")
    if config.get("revision") not in (None, "main") and not base_model and not os.path.isdir(base or ""):
        raise ValueError(
            f"{path}: revision: expected the base's own, for a folder of prompts does not name another, got "
            f"{config['revision']!r}; download that of {base} and give it as base_model"
        )
    foreign = _Foreign(base, _TASK_TYPES[task_type], head=_without("base_model.", tensors))
    if kind in _ROWS:
        foreign.prompts = prompts
    else:
        foreign.prefix = prompts
    return foreign


def _of_task(folder: Path, prompts: Tensor, tensors: dict[str, Tensor], task_id: int | None) -> Tensor:
    """The shared rows times the low-rank matrix of a task (Wang et al. 2023)."""
    columns, rows = (tensors.pop(f"prefix_task_{part}", torch.empty(0)) for part in ("cols", "rows"))
    fits = columns.dim() == rows.dim() == 3 and columns.shape[0] == rows.shape[0]
    if not fits or (columns.shape[1], rows.shape[2], columns.shape[2]) != (*prompts.shape, rows.shape[1]):
        raise ValueError(
            f"{folder}: prefix_task_cols, prefix_task_rows: expected [tasks, {prompts.shape[0]}, rank] and "
            f"[tasks, rank, {prompts.shape[1]}], got {_shape(columns)} and {_shape(rows)}"
        )
    if task_id is None and columns.shape[0] == 1:
        task_id = 0
    if type(task_id) is not int or not 0 <= task_id < columns.shape[0]:
        raise ValueError(f"task_id: expected 0 to {columns.shape[0] - 1}, got {task_id!r}")
    return prompts * (columns[task_id] @ rows[task_id])


def _read_file(path: Path) -> _Foreign:
    tensors = _tensors(path)
    if any("prefix_encoder." in name for name in tensors):
        encoder = {name.partition("prefix_encoder.")[2]: t for name, t in tensors.items() if "prefix_encoder." in name}
        head = {name: tensor for name, tensor in tensors.items() if "prefix_encoder." not in name}
        return _Foreign(prefix=_encoded(path, encoder), head=head)
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
    return _Foreign(prompts=prompts, deep=deep, head=head)


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
        raise ValueError(f"{path}: prefix_encoder.embedding.weight: expected two dimensions, got {_shape(prefix)}")
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


def _without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _num_labels(head: dict[str, Tensor]) -> int:
    for ending in _OUTPUT_LAYERS:
        for name, tensor in head.items():
            if name.endswith(ending) and tensor.dim() == 2:
                return tensor.shape[0]
    raise ValueError(f"head: expected one of {', '.join(_OUTPUT_LAYERS)}, got {', '.join(head)}")


def _set_head(model: Any, head: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    # of a whole model, what the base has already is no head
    head = {
        name: tensor
        for name, tensor in head.items()
        if name in model._head or name not in parameters or not _same(parameters[name], tensor)
    }
    found = {name: parameters[name].shape for name in head if name in parameters}
    wrong = [name for name, tensor in head.items() if found.get(name) != tensor.shape]
    lacking = [name for name in model._head if name not in head]
    if wrong or lacking:
        raise MisfitError(
            f"head: does not fit {model.base_class.__name__} (no such parameters: {wrong or 'none'}, "
            f"missing: {lacking or 'none'})"
        )
    model._set_head(head)
    for name, tensor in head.items():
        parameters[name].data.copy_(tensor)


def _same(own: Tensor, read: Tensor) -> bool:
    """Whether a tensor that was read, float32 by now, is the base's own, which either may have in half precision."""
    if own.shape != read.shape:
        return False
    halves = (own.to(dtype).float() for dtype in (torch.float16, torch.bfloat16))
    return torch.equal(own, read.to(own.dtype)) or any(torch.equal(half, read) for half in halves)


def _layer_major(deep: Tensor, count: int, layers: int) -> Tensor:
    """[m, L·d] → [L·m, d]."""
    if deep.dim() != 2 or deep.shape[0] != count or deep.shape[1] % layers:
        raise MisfitError(
            f"intermediate_prompt_embeddings.weight: expected [{count}, {layers} times the hidden size], "
            f"got {_shape(deep)}"
        )
    return deep.view(count, layers, -1).transpose(0, 1).flatten(0, 1)


def _layers(model: Any, prefix: Tensor) -> list[Tensor]:
    """[m, 2L·h·w] → key and value [h, m, w] of each layer, as many as the model's own rows have."""
    if model.prefix_plan.path != "prefix":
        raise MisfitError(f"keys and values, and prompts cannot be shared on this base: {model.prefix_plan.reason}")
    with torch.no_grad():
        own = model._hooks.prefix.prefix().tensors()
    sizes = [tensor.shape[0] * tensor.shape[2] for tensor in own]
    if prefix.shape[1] != sum(sizes) or len(set(sizes)) != 1:
        raise MisfitError(f"keys and values: expected [m, {sum(sizes)}] for this base, got {_shape(prefix)}")
    return [
        part.view(prefix.shape[0], tensor.shape[0], tensor.shape[2]).transpose(0, 1)
        for part, tensor in zip(prefix.split(sizes, 1), own, strict=True)
    ]


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))
