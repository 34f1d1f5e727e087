"""A few numbers of a base's weights, by which prompts know the base that they were trained on from its likes.

The same weights in another dtype are the same; those that were tuned but a little may pass for what they came from.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import find_blocks, find_body

_COUNT = 16
_RELATIVE, _ABSOLUTE = 2**-6, 1e-6  # what is rounded twice differs by 2^-8, and in float16 by a few 2^-24

_logger = logging.getLogger(__name__)


def sample(model: Any) -> list[str]:
    """Of the table of tokens, and of the first and the last block's first matrix: bfloat16, in hexadecimal.

    Empty where a weight is quantised, sharded or elsewhere; blocks on servers say theirs.
    """
    body = find_body(model)
    modules = [body.get_input_embeddings()]
    if not model.blocks_are_here:
        return [numbers_of(modules[0]), *model.remote.link.weights]
    with suppress(NotImplementedError):
        modules += [find_blocks(body, model.config)[i] for i in (0, -1)]
    return [numbers_of(module) for module in modules]


def warn_of_other_weights(model: Any, saved: dict[str, Any], folder: Any) -> None:
    """Say so where prompts of ``folder``, whose ``ptune_config.json`` is ``saved``, had a base of other weights."""
    if not _are_alike(saved["base"].get("weights") or (), sample(model)):
        _logger.warning("%s: these prompts were trained on a base like this one, but of other weights", folder)


def warn_of_changed_weights(model: Any, folder: Any) -> None:
    """Say so where ``folder``, which holds prompts alone, would lose what the base has learnt or was merged into it."""
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
    pairs = [pair for pair in zip(one, other, strict=False) if all(pair)]
    return all(torch.allclose(_read(a), _read(b), _RELATIVE, _ABSOLUTE, equal_nan=True) for a, b in pairs)


def numbers_of(module: nn.Module) -> str:
    """Of a module's first matrix."""
    weight = next((parameter.detach() for parameter in module.parameters() if parameter.dim() == 2), None)
    if weight is None or type(weight) is not Tensor or weight.is_meta or not weight.is_floating_point():
        return ""
    chosen = torch.arange(_COUNT, device=weight.device) * (weight.numel() - 1) // (_COUNT - 1)
    numbers = weight[chosen // weight.shape[1], chosen % weight.shape[1]].to("cpu", torch.bfloat16)
    return numbers.view(torch.uint8).numpy().tobytes().hex()


def _read(numbers: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(numbers), dtype=torch.bfloat16).float()
