"""`audit`: where a model loses precision, whether it matters, and what mends it."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..anatomy import evaluating
from ..attention import attention_of
from ..language import is_multimodal
from ..mixin import PTuneMixin
from .candidates import SHORT, Candidate, layers, repairs, whole
from .damage import DEFAULT_LIMITS, POOLING, Damage, Limits, Outputs, passes, severity
from .sites import ATTENTION, QKV, Parts, Site, attention_calls, find_sites
from .statistics import Tally, without_padding

Batch = Mapping[str, Tensor]
Figures = dict[str, Any]


@dataclass
class Audit:
    """What an audit found; every list is of JSON-able records.

    Attributes:
        dtype: the low precision, "fp16" or "bf16".
        compares: "embeddings" or "logits".
        rows: how many of these.
        limits: the damage up to which outputs count as right.
        statistics: for each site and each tensor that it reads ("in") or makes ("out"), in the order of execution:
            `Tally.figures` in float32.
        sites: each place rounded alone, the worst first, with `Damage.figures`.
        whole: the whole model in fp16, bf16, hybrid-fp16 and hybrid-bf16, with ``works``; or ``refused``, the reason.
        repairs: what was tried where ``dtype`` fails, the cheapest first, as in ``whole``; ``how`` is the code.
    """

    dtype: str
    compares: str
    rows: int
    limits: dict[str, float]
    statistics: list[Figures] = field(default_factory=list)
    sites: list[Figures] = field(default_factory=list)
    whole: dict[str, Figures] = field(default_factory=dict)
    repairs: list[Figures] = field(default_factory=list)

    @property
    def repair(self) -> Figures | None:
        """The cheapest repair that works, of those that were tried."""
        return next((tried for tried in self.repairs if tried["works"]), None)

    @property
    def verdict(self) -> str:
        """What it comes to, in a few sentences."""
        result = self.whole[self.dtype]
        if result["works"]:
            return f"{self.dtype} works: {shown(result)}. No repair is needed."
        worst = self.sites[0]
        place = f"{worst['kind']} of layer {worst['layer']}" if worst["layer"] is not None else worst["kind"]
        words = [
            f"{self.dtype} fails: {shown(result)}.",
            f"The worst place, rounded alone, is {place} ({worst['name']}): {shown(worst)}.",
        ]
        if self.repair is None:
            return " ".join([*words, "No repair that was tried works: stay in float32, or use the other half type."])
        words.append(f"The cheapest repair that works is {self.repair['name']}: {self.repair['how']}.")
        return " ".join(words)


def shown(figures: Figures) -> str:
    """The figures of a `Damage` in words, or why there are none."""
    if "refused" in figures:
        return figures["refused"]
    if figures["nonfinite"] == 1:
        return "every output is inf or NaN"
    parts = [f"{figures['nonfinite']:.1%} of the outputs are inf or NaN"] if figures["nonfinite"] else []
    if "cosine_min" in figures:
        parts.append(f"cosine at least {figures['cosine_min']:.5f}, on average {figures['cosine_mean']:.5f}")
    else:
        parts.append(f"KL divergence {figures['kl_mean']:.2g}, same top-1 {figures['same_top1']:.2%}")
    return ", ".join(parts)


def audit(
    model: nn.Module,
    batches: Iterable[Batch],
    dtype: torch.dtype = torch.float16,
    *,
    pooling: Callable[[Tensor, Tensor], Tensor] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: bool = True,
) -> Audit:
    """Find where ``model`` loses precision in ``dtype``, whether that harms its outputs, and what mends it.

    Passes: one in float32, which records magnitudes; one for each site (see `Site`), rounded alone; the whole model in
    half precision and in hybrid; and where it fails in ``dtype``, repairs. A batch costs as many forward passes as
    there are sites, and a few more. The model's weights and settings are the same objects afterwards.

    Args:
        model: a transformers model with float32 weights, or a module around one that returns embeddings [b, d].
        batches: keyword arguments of the model, as tensors; a few suffice. Padding by ``attention_mask`` [b, n] counts
            nowhere.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
        pooling: makes embeddings [b, d] of states [b, n, d] and the mask [b, n]. Without it, what is compared is the
            model's logits, or else its states' mean.
        limits: the damage up to which outputs count as right.
        progress: show a bar on a terminal.

    Raises `ValueError` for arguments that do not fit, and for a model that gives inf or NaN in float32;
    `NotImplementedError` for an encoder-decoder.
    """
    found = list(batches)
    _check(model, found, dtype)
    device = next(model.parameters()).device
    moved = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in found]
    outputs = Outputs(model, pooling)
    with torch.no_grad(), evaluating(outputs), _prompts_run_anew(outputs), _bar(progress) as bar:
        return _Passes(outputs, moved, limits, bar).run(dtype)


class _Passes:
    def __init__(self, outputs: Outputs, batches: list[dict[str, Tensor]], limits: Limits, bar: Progress) -> None:
        self.outputs = outputs
        self.batches = batches
        self.limits = limits
        self.bar = bar

    def run(self, dtype: torch.dtype) -> Audit:
        sites = self.sites()
        statistics, rows = self.statistics(sites)
        found = Audit(SHORT[dtype], self.outputs.kind, rows, asdict(self.limits), statistics)
        alone = [partial(site.rounded, self.outputs, dtype) for site in sites]
        damages = dict(zip(sites, self.damages(alone, "each place alone"), strict=True))
        ranked = sorted(sites, key=lambda site: severity(damages[site]), reverse=True)
        found.sites = [_described(site) | damages[site] for site in ranked]
        found.whole = {candidate.name: self.tried(candidate) for candidate in whole(self.outputs)}
        if not found.whole[found.dtype]["works"]:
            faulty = [site for site in ranked if not passes(damages[site], self.limits)]
            # where none fails alone, errors add up
            faulty = faulty or ranked[: math.ceil(len(ranked) / 4)]
            # a model's own pooler may be there without being used
            reaching = [site for site in sites if damages[site]["changed"]]
            for candidate in repairs(self.outputs, reaching, dtype):
                figures = found.whole.get(candidate.name) or self.tried(candidate)
                found.repairs.append({"name": candidate.name} | figures)
            for candidate in layers(self.outputs, faulty, dtype):
                found.repairs.append({"name": candidate.name} | self.tried(candidate))
                if found.repairs[-1]["works"]:
                    break
        return found

    def sites(self) -> list[Site]:
        """By the names that they have in the user's model."""

        def own(name: str) -> str:
            return POOLING if name == "pooling" else name.removeprefix("model").removeprefix(".")

        sites = find_sites(self.outputs, lambda: self.outputs(self.batches[0]))
        return [replace(site, name=own(site.name), block=site.block and own(site.block)) for site in sites]

    def statistics(self, sites: Sequence[Site]) -> tuple[list[Figures], int]:
        """The records of `Audit.statistics`, and how many rows the outputs have."""
        tallies: dict[tuple[nn.Module, str], tuple[Tally, Tally]] = {}  # of what goes in, and of what comes out
        for site in sites:
            tallies[site.module, _tensor_of(site)] = Tally(), Tally()
        # that of the body's rows, prompts perhaps among them; and that of the text
        masks: list[Tensor | None] = [None, None]

        def note_mask(body: nn.Module, args: Any, kwargs: Any) -> None:
            masks[0] = kwargs.get("attention_mask")

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for tally, values in zip(tallies[module, ""], ((args, kwargs), output), strict=True):
                if (tensor := _first_floating(values)) is not None:
                    tally.add(without_padding(tensor, *masks))

        def note_attention(stock: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = stock(module, *args, **kwargs)
            tensors = [tensor.transpose(1, 2) for tensor in args[: len(QKV)]]
            for kind, tensor in zip(ATTENTION, (*tensors, result[0]), strict=True):
                if (module, kind) in tallies:
                    tallies[module, kind][1].add(without_padding(tensor, *masks))
            return result

        rows = 0
        with ExitStack() as stack:
            body = Parts(self.outputs).body
            stack.enter_context(_removed(body.register_forward_pre_hook(note_mask, with_kwargs=True)))
            for module in dict.fromkeys(site.module for site in sites if site.kind not in ATTENTION):
                stack.enter_context(_removed(module.register_forward_hook(note, with_kwargs=True)))
            stack.enter_context(attention_calls(self.outputs, note_attention))
            for batch in self.bar.track(self.batches, description="magnitudes in float32"):
                masks[1] = batch.get("attention_mask")
                rows += self.reference(batch).shape[0]
        records = [
            _described(site) | {"tensor": direction} | tally.figures()
            for site in sites
            for direction, tally in zip(("in", "out"), tallies[site.module, _tensor_of(site)], strict=True)
            if tally.values
        ]
        return records, rows

    def reference(self, batch: Batch) -> Tensor:
        rows = self.outputs(batch)
        if not rows.isfinite().all():
            raise ValueError(f"model: {type(self.outputs.model).__name__} gives inf or NaN in float32 itself")
        return rows

    def damages(self, ways: Sequence[Callable[[], AbstractContextManager[Any]]], what: str) -> list[Figures]:
        """`Damage.figures` of the model within each of ``ways``."""
        damages = [Damage(self.outputs.kind) for _ in ways]
        task = self.bar.add_task(what, total=len(ways) * len(self.batches))
        for batch in self.batches:  # outermost, so that one batch's reference is held at a time
            reference = self.reference(batch)
            for damage, way in zip(damages, ways, strict=True):
                with way():
                    damage.add(reference, self.outputs(batch))
                self.bar.advance(task)
        return [damage.figures() for damage in damages]

    def tried(self, candidate: Candidate) -> Figures:
        figures: Figures = {"how": candidate.how}
        try:
            (damage,) = self.damages([candidate.applied], candidate.name)
        except RuntimeError as refusal:  # hybrid's, or what a model meets that does not run in half precision
            return figures | {"works": False, "refused": str(refusal)}
        return figures | {"works": passes(damage, self.limits)} | damage


def _check(model: nn.Module, batches: list[Batch], dtype: torch.dtype) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a transformers model, or a module around one, got {type(model).__name__}")
    if dtype not in SHORT:
        raise ValueError(f"dtype: expected {' or '.join(map(str, SHORT))}, got {dtype}")
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(f"batches: expected dicts of tensors, got {type(batch).__name__}")
        for name, tensor in batch.items():
            if not isinstance(tensor, Tensor) or not tensor.numel():
                got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"batches: expected dicts of tensors that hold something, got {got} for {name}")
        mask = batch.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or not mask.bool().any(1).all()):
            got = f"shape {tuple(mask.shape)}" if mask.dim() != 2 else "a row of padding alone"
            raise ValueError(f"batches: expected an attention_mask [b, n] with a token in each row, got {got}")
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not parts:
        raise ValueError(f"model: expected a transformers model, or a module around one, got {type(model).__name__}")
    if is_multimodal(parts[0].config):
        raise NotImplementedError(
            f"model: expected a model of text alone, got {type(parts[0]).__name__}; audit the language model in it"
        )
    if "decoder_input_ids" in inspect.signature(parts[0].forward).parameters:
        name = type(parts[0]).__name__
        raise NotImplementedError(
            f"{name}: an encoder-decoder, and its two masks, is not audited; its get_encoder() is"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(f"model: expected float32 weights, got {parameter.dtype} in {name}; load it in float32")
    for part in parts:
        attention = attention_of(part.config._attn_implementation)
        if attention is not None and attention.dtype is not None:
            raise ValueError(f"model: expected attention in float32, got {attention.dtype}; ptune.hybrid(model, None)")


@contextmanager
def _prompts_run_anew(outputs: Outputs) -> Iterator[None]:
    """Within it, no keys and values of prompt rows are kept, which would be of another precision than the call."""
    hooks = [part._hooks for part in outputs.modules() if isinstance(part, PTuneMixin) and part._hooks is not None]
    kept = [each.prefix for each in hooks if each.prefix.keep_compiled]
    for prefix in kept:
        prefix.keep_compiled = False
    try:
        yield
    finally:
        for prefix in kept:
            prefix.keep_compiled = True


def _described(site: Site) -> Figures:
    return {"kind": site.kind, "layer": site.layer, "name": site.name}


def _tensor_of(site: Site) -> str:
    """Which tensor at an attention a site is; nothing for a module."""
    return site.kind if site.kind in ATTENTION else ""


def _first_floating(values: Any) -> Tensor | None:
    return next((x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()), None)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _bar(shown: bool) -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
