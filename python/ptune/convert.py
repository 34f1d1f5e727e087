"""Prompts of other libraries made into folders of ours, and ours written for PEFT."""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, hub
from .anatomy import evaluating
from .auto import MODELS, AutoPTuneModel
from .checkpoint import MisfitError
from .foreign import read_foreign, shape_of
from .inputs import CACHE
from .kinds import kind_of

_LOADERS: dict[Any, Any] = {**MODELS, None: AutoPTuneModel}
_OUTPUT_LAYERS = ("out_proj.weight", "score.weight", "classifier.weight")

_logger = logging.getLogger(__name__)


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
        task: ``"classification"``, ``"tagging"``, ``"answering"``, ``"generation"`` or ``"seq2seq"``, where ``source``
            does not say.
        task_id: which task of a multitask prompt.

    Raises `ValueError`, and writes nothing, for what is no such prompt, holds pickled code, or does not fit the base
    (`MisfitError`). Where PEFT pools a prompt row or a padding token (classification by encoders), outputs are ours.
    """
    foreign = read_foreign(source, task_id, base_model)
    base = base_model or foreign.base
    if not base:
        raise ValueError(f"base_model: expected one, for {source} does not name its base")
    task = task or foreign.task
    if task not in _LOADERS:
        raise ValueError(f"task: expected one of {', '.join(repr(name) for name in _LOADERS if name)}, got {task!r}")
    rows = foreign.prefix if foreign.prompts is None else foreign.prompts
    if rows.shape[0] == 0:
        raise ValueError(f"{source}: expected prompts of at least one row, got {shape_of(rows)}")
    shallow = foreign.prefix is None and foreign.deep is None
    settings = {
        "tuning_mode": "ptune" if shallow else "deep_ptune",
        "deep_prompt_mode": "overwrite" if foreign.deep is None else "add",
        "pre_seq_len": rows.shape[0],
    }
    labels: dict[str, Any] = {}
    if foreign.head and task in ("classification", "tagging"):
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
    if task == "classification" and shallow and not all(getattr(its, "is_causal", True) for its in model.modules()):
        _logger.warning("%s: classifies by the text's first token, where PEFT does by a prompt row: scores differ", out)
    _fill(model.prompt_embeddings, foreign.prompts)
    if foreign.deep is not None:
        deep = _layer_major(foreign.deep, rows.shape[0], model.config.num_hidden_layers)
        _fill(model.intermediate_prompt_embeddings, deep)
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
    kind = kind_of(saved["model_class"])
    if kind is None:
        raise ValueError(f"{folder}: model_class: expected one of a task that PEFT has, got {saved['model_class']}")
    model = _LOADERS[kind.task].from_pretrained(folder, base_model=base_model)
    settings, config = model.ptune_config, model.config
    if settings.tuning_mode is None:
        raise ValueError(f"{folder}: expected prompts, and it holds a head alone")
    described = {
        "task_type": kind.peft,
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
        tensors = _keys_and_values(model, folder)
        heads, width = tensors[0].shape[1:]
        prompts = torch.stack(tensors, 1).flatten(1)
        described |= {
            "peft_type": "PREFIX_TUNING", "token_dim": heads * width, "num_attention_heads": heads,
            "encoder_hidden_size": heads * width, "prefix_projection": False,
        }  # fmt: skip
    own = set(model._head)
    if kind.task in ("classification", "tagging", "answering"):  # of which PEFT wants the base's too
        wanted = ("classifier", "score", "pre_classifier", "qa_outputs")
        own |= {name for name, _ in model.named_parameters() if name.partition(".")[0] in wanted}
    head = {f"base_model.{name}": model.get_parameter(name) for name in sorted(own)}
    checkpoint.write(
        out, described, head | {"prompt_embeddings": prompts}, (checkpoint.PEFT_CONFIG, checkpoint.PEFT_WEIGHTS)
    )
    if changed := model.origin.overrides:
        _logger.warning("%s: PEFT's folder does not say that its base was loaded with %s", out, changed)


def _keys_and_values(model: Any, folder: str | os.PathLike[str]) -> list[Tensor]:
    """The key of layer 0, its value, the key of layer 1, … of the prompt rows, [m, h, w] each."""
    if model.prefix_plan.path != "prefix":
        raise ValueError(f"{folder}: PEFT has no deep prompts but keys and values: {model.prefix_plan.reason}")
    if CACHE not in model._hooks.parameters:
        raise ValueError(f"{folder}: PEFT hands over past_key_values, which {model.base_class.__name__} takes none of")
    with torch.no_grad(), evaluating(model):
        tensors = [tensor.transpose(0, 1).float() for tensor in model._hooks.prefix.prefix().tensors()]
    if len({tensor.shape for tensor in tensors}) != 1:
        raise ValueError(f"{folder}: PEFT holds keys and values of one shape, and these have several")
    return tensors


def _fill(table: nn.Embedding, values: Tensor) -> None:
    if table.weight.shape != values.shape:
        raise MisfitError(f"prompts: expected {tuple(table.weight.shape)} for this base, got {shape_of(values)}")
    table.weight.data.copy_(values)


def _num_labels(head: dict[str, Tensor]) -> int:
    for ending in _OUTPUT_LAYERS:
        for name, tensor in head.items():
            if name.endswith(ending) and tensor.dim() == 2:
                return tensor.shape[0]
    raise ValueError(f"head: expected one of {', '.join(_OUTPUT_LAYERS)}, got {', '.join(head)}")


def _set_head(model: Any, head: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))  # PEFT may save a table under both its names
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
        kind = kind_of(model.base_class.__name__)
        hint = "" if kind and kind.task else "; task (--task on the command line) says what it is for"
        raise MisfitError(
            f"head: does not fit {model.base_class.__name__} (no such parameters: {wrong or 'none'}, "
            f"missing: {lacking or 'none'}){hint}"
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
            f"got {shape_of(deep)}"
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
        raise MisfitError(f"keys and values: expected [m, {sum(sizes)}] for this base, got {shape_of(prefix)}")
    return [
        part.view(prefix.shape[0], tensor.shape[0], tensor.shape[2]).transpose(0, 1)
        for part, tensor in zip(prefix.split(sizes, 1), own, strict=True)
    ]
