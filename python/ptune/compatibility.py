"""Whether the prompts of a folder fit a model, and what does not."""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from . import checkpoint
from .support import lack_of_positions

_logger = logging.getLogger(__name__)


def check_fit(model: Any, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises `MisfitError` for a folder's config and tensors that do not fit ``model`` (a `PTuneMixin`), saying why."""
    here = model._description(model.origin)
    base, head = list(_of_the_base(model, saved, here)), list(_of_the_head(model, saved, here))
    if reasons := [*base, *head, *_of_shapes(model, saved, tensors)]:
        hint = "; load_prompts(…, head=False) takes the prompts alone" if head and not base else ""
        raise checkpoint.MisfitError(f"these prompts do not fit this model: {'; '.join(reasons)}{hint}")


def warn_of_other_settings(model: Any, saved: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Say so where the config of ``model``, into which the prompts of ``folder`` fit, is not that of their training."""
    if changed := _changes(model, saved):
        _logger.warning(
            "%s: these prompts were trained with other settings of the base: %s", folder, "; ".join(changed)
        )


def check_compiled(names: Sequence[str], compiled: Sequence[Tensor], own: Sequence[Tensor]) -> None:
    """Raises `MisfitError` for keys and values [h, m, head_dim] whose heads are not those of a model's ``own``."""
    for name, got, mine in zip(names, compiled, own, strict=True):
        expected = mine.shape[0], got.shape[1], mine.shape[2]
        if got.shape != expected:
            raise checkpoint.MisfitError(f"{name}: expected {expected}, got {tuple(got.shape)}")


def _changes(model: Any, saved: dict[str, Any]) -> list[str]:
    """What of the config of ``model`` is not as it was in training; users set its tokens to those of a tokenizer."""
    changes = checkpoint.differences(checkpoint.trained_config(saved), checkpoint.base_config(model.config))
    return [change for change in changes if not change.partition(":")[0].endswith("token_id")]


def _of_the_base(model: Any, saved: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    for name in ("embedding_size", "hidden_size", "num_layers"):
        if saved[name] != here[name]:
            yield f"{name}: expected {saved[name]} (the prompts'), got {here[name]} (the base's)"
    if (lack := lack_of_positions(model, saved["pre_seq_len"])) is not None:
        yield lack
    base, own = saved["base"], here["base"]
    now = checkpoint.fingerprint(checkpoint.base_config(model.config))
    if base["fingerprint"] in (own["fingerprint"], now):
        return
    if _changes(model, saved):
        changes = checkpoint.differences(base["config"], own["config"])
        # of another kind of model, each setting is another
        yield from [change for change in changes if change.startswith("model_type: ")] or changes


def _of_the_head(model: Any, saved: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    parameters = {name for name, _ in model.named_parameters()}
    only_there = [name for name in saved["head"] if name not in parameters]
    only_here = [name for name in here["head"] if name not in saved["head"]]
    there, kind = (its["model_class"].partition("For")[2] for its in (saved, here))
    # heads for sequences and for tokens may have the same names and shapes
    if only_there or only_here or (saved["head"] and there != kind):
        yield (
            f"head: trained on {saved['model_class']}, got {here['model_class']}"
            f" (only there: {only_there or 'nothing'}, only here: {only_here or 'nothing'})"
        )
    if saved["head"] and here["head"] and saved["id2label"] != here["id2label"]:
        yield f"labels: expected {here['id2label']}, got {saved['id2label']}"


def _of_shapes(model: Any, saved: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[str]:
    parameters = dict(model.named_parameters())
    expected = {name: tuple(parameters[name].shape) for name in saved["head"] if name in parameters}
    count, mode = saved["pre_seq_len"], saved["tuning_mode"]
    compiled = checkpoint.compiled_names(checkpoint.settings_of(saved), model.config.num_hidden_layers)
    if any(name in tensors for name in compiled):
        for name in compiled:
            shape = tensors[name].shape if name in tensors else ()
            # as many rows; what the heads must be like is known once they are run, to `check_compiled`
            expected[name] = (shape[0], count, shape[2]) if len(shape) == 3 else (1, count, 1)
    elif mode is not None:
        expected[checkpoint.PROMPTS[0]] = count, saved["embedding_size"]
        if mode == "deep_ptune":
            expected[checkpoint.PROMPTS[1]] = saved["num_layers"] * count, saved["hidden_size"]
    lacking = set(saved["head"]) - parameters.keys()  # which is told of with the head
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in lacking}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield f"{name}: expected {expected.get(name, 'nothing')}, got {found.get(name, 'nothing')}"
