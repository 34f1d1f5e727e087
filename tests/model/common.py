"""What the tests of the model side share: texts, prompts and a comparison."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import ptune
from ptune.inputs import BEFORE_5_24

from .families import LAYERS, VOCABULARY
from .oracle import Prompt

SHARED = ("apart", "packed")
MODES = ("shallow", "overwrite", "add")
PADDINGS = ("none", "right", "left")
COUNT = 4


def close(
    got: Tensor,
    expected: Tensor,
    tolerance: float = 1e-5,
    nudged: Callable[[], Tensor] | None = None,
    least: float = 1.0,
) -> None:
    """Equal to within ``tolerance`` of the larger of ``least`` and the greatest expected magnitude.

    Random models are now and then so steep that float32 cannot tell better. ``nudged`` computes what is expected with
    its inputs moved by their last bit (see `moved_by_a_bit`): four times what that changes is allowed too.
    """
    scale = max(least, expected.abs().max().item())
    allowed = tolerance * scale
    if nudged is not None and not bool((got - expected).abs().max() <= allowed):
        allowed = max(allowed, 4 * (nudged() - expected).abs().max().item())
    torch.testing.assert_close(got, expected, rtol=0, atol=allowed)


def moved_by_a_bit(values: Any) -> Any:
    """A copy of a tensor or module, each number times 1 ± 2^-23."""
    if isinstance(values, Tensor):
        return values.detach() * (1 + torch.randn_like(values).sign() * 2**-23)
    twin = copy.deepcopy(values)
    for parameter in twin.parameters():
        parameter.data = moved_by_a_bit(parameter)
    return twin


def all_close(
    got: Sequence[Tensor], run: Callable[[Any], Sequence[Tensor]], model: Any, tolerance: float = 1e-5
) -> None:
    """Each of ``got`` is `close` to what ``run(model)`` makes in its place."""
    nudged = cache(lambda: run(moved_by_a_bit(model)))
    for i, (one, expected) in enumerate(zip(got, run(model), strict=True)):
        close(one, expected, tolerance, nudged=lambda i=i: nudged()[i])


def texts_for(padding: str, lengths: tuple[int, ...] = (7, 3, 9, 1)) -> list[Tensor]:
    """Random texts without special tokens, of equal length where there is to be no padding."""
    return [torch.randint(3, VOCABULARY, (5 if padding == "none" else n,)) for n in lengths]


def settings_for(mode: str, count: int = COUNT, **rest: Any) -> dict[str, Any]:
    if mode == "shallow":
        return {"tuning_mode": "ptune", "pre_seq_len": count, **rest}
    return {"tuning_mode": "deep_ptune", "pre_seq_len": count, "deep_prompt_mode": mode, **rest}


def set_prompts(model: Any, mode: str, **rest: Any) -> Prompt:
    """Fresh random prompts on ``model``, returned as the oracle's leaves."""
    model.init_prompts(ptune.PTuneConfig(**settings_for(mode, **rest)))
    with torch.no_grad():
        for table in (model.prompt_embeddings, model.intermediate_prompt_embeddings):
            if table is not None:
                table.weight.normal_(std=0.7)
    shallow = model.prompt_embeddings.weight.detach().clone().requires_grad_()
    if mode == "shallow":
        return Prompt(shallow)
    deep = model.intermediate_prompt_embeddings.weight.detach().clone().view(LAYERS, COUNT, -1).requires_grad_()
    return Prompt(shallow, deep, mode)


def take(model, path):
    """Have calls take ``"concat"``, ``"apart"`` (prompt rows run before the text), ``"packed"`` (they run with it), or
    ``"prefix"``, which is the one of the last two that is thought to pay.
    """
    plan = model._hooks.prefix.plan
    plan.path = "concat" if path == "concat" else "prefix"
    plan.packs = {"apart": False, "packed": True}.get(path)


def skip_without_peft_of_now() -> None:
    """For what PEFT up to 0.21 refuses, which looks for the names of before transformers 5.24."""
    if not BEFORE_5_24 and Version(version("peft")) < Version("0.22"):
        pytest.skip("this peft does not know this transformers")
