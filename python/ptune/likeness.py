"""A few numbers of a base's weights, by which prompts know the base that they were trained on from its likes.

The same weights in another dtype are the same; those that were tuned but a little may pass for what they came from.
"""

import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import find_blocks, find_body
from .checkpoint import PROMPT_MODULES

_COUNT = 16
_RELATIVE, _ABSOLUTE = 2**-6, 1e-6  # what is rounded twice differs by 2^-8, and in float16 by a few 2^-24

_logger = logging.getLogger(__name__)


def sample(model: Any) -> list[str]:
    """Of the table of tokens and of the first and the last block's first matrix; then one of each weight of the body.

    In bfloat16 and hexadecimal; where a weight is quantised, sharded or elsewhere, they are empty, or the one is NaN.
    Blocks on servers say theirs.
    """
    body = find_body(model)
    modules = [body.get_input_embeddings()]
    if not model.blocks_are_here:
        return [numbers_of(modules[0]), *model.remote.link.weights]
    with suppress(NotImplementedError):
        modules += [find_blocks(body, model.config)[i] for i in (0, -1)]
    own = {id(model._found(name)) for name in model._head}
    ones = [
        math.nan if id(weight) in own else _middle(weight)
        for name, weight in body.named_parameters()
        # of which the same base may have none
        if {"pooler", *PROMPT_MODULES}.isdisjoint(name.split("."))
    ]
    return [*map(numbers_of, modules), _written(torch.tensor(ones, device="cpu"))]


def warn_of_other_weights(model: Any, saved: dict[str, Any], folder: Any) -> None:
    """Say so where prompts of ``folder``, whose ``ptune_config.json`` is ``saved``, had a base of other weights."""
    if not _are_alike(saved["base"].get("weights") or (), sample(model)):
        _logger.warning("%s: these prompts were trained on a base like this one, but of other weights", folder)


def warn_of_changed_weights(model: Any, folder: Any) -> None:
    """Say so where ``folder``, which holds prompts alone, would lose what the base has learnt or was merged into it."""
    own = set(model._own_names().values())
    trained = [name for name, its in model.named_parameters() if its.requires_grad and name not in own]
    if trained and not getattr(model, "peft_config", None):  # PEFT saves its adapters itself
        _logger.warning(
            "%s: %s train, but are of the base, and not in this folder; save_pretrained(…, save_base=True) saves them "
            "too", folder, ", ".join(trained[:3]) + ", …" * (len(trained) > 3)
        )  # fmt: skip
        return
    # a head within the body is in the folder
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    if model.base_model is not model and any(id(model.get_parameter(name)) in inside for name in model._head):
        return
    if not _are_alike(model.loaded_sample, sample(model)):
        _logger.warning(
            "%s: the base's weights have changed since it was loaded, and are not in this folder; "
            "save_pretrained(…, save_base=True) saves them too", folder
        )  # fmt: skip


def _are_alike(one: Iterable[str], other: Iterable[str]) -> bool:
    pairs = [(_read(a), _read(b)) for a, b in zip(one, other, strict=False) if len(a) == len(b) > 0]
    known = [~(a.isnan() | b.isnan()) for a, b in pairs]
    return all(
        torch.allclose(a[both], b[both], _RELATIVE, _ABSOLUTE) for (a, b), both in zip(pairs, known, strict=True)
    )


def numbers_of(module: nn.Module) -> str:
    """Of a module's first matrix."""
    weight = next((parameter.detach() for parameter in module.parameters() if parameter.dim() == 2), None)
    if weight is None or not _is_readable(weight):
        return ""
    chosen = torch.arange(_COUNT, device=weight.device) * (weight.numel() - 1) // (_COUNT - 1)
    return _written(weight[chosen // weight.shape[1], chosen % weight.shape[1]].cpu())


def _middle(parameter: Tensor) -> float:
    weight = parameter.detach()
    if not _is_readable(weight):
        return math.nan
    return float(weight[tuple(size // 2 for size in weight.shape)])


def _is_readable(weight: Tensor) -> bool:
    return type(weight) is Tensor and not weight.is_meta and weight.is_floating_point() and weight.numel() > 0


def _written(numbers: Tensor) -> str:
    return numbers.bfloat16().view(torch.uint8).numpy().tobytes().hex()


def _read(numbers: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(numbers), dtype=torch.bfloat16).float()
