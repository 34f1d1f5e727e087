"""`PromptBank`: many prompts on one base, and batches whose rows name different ones."""

import copy
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import checkpoint, hub
from .attention import Prefix
from .config import PTuneConfig, take_settings
from .heads import Head, Heads
from .layout import first_column, ones_and_zeros
from .likeness import warn_of_other_weights
from .mixin import PTuneMixin
from .mixture import Mixture, Overwriting, mixing
from .models import ptune_class
from .plan import Plan
from .quantised import kept_scales, rounds_by_batch, sharing_memory, take_scales

_PACKED = torch.contiguous_format
_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass
class TaskOutput:
    """What a task said to its rows of a batch.

    Attributes:
        rows: their numbers in the batch.
        output: what the task's model class returns for them: ``logits`` and so on.
    """

    rows: list[int]
    output: Any


@dataclass
class BankOutput:
    """The outputs of a mixed batch.

    Attributes:
        last_hidden_state: [b, n, d], of the text.
        tasks: by the name of the prompt; rows without one are under ``None``, with the base's own head.
        logits: the logits of each row, in the order of the batch; ``None`` where there was no head.
        loss: the sum of the tasks' losses, where labels were given.
    """

    last_hidden_state: Tensor
    tasks: dict[str | None, TaskOutput] = field(default_factory=dict)
    logits: list[Tensor | None] = field(default_factory=list)
    loss: Tensor | None = None


@dataclass(eq=False)
class _Entry:
    """A prompt of a bank: float32, on the CPU unless it trains, with its head and what its folder says."""

    saved: dict[str, Any]
    settings: PTuneConfig
    prompts: Any  # [m, d]; None where a compiled prefix was loaded
    deep: Any  # [L·m, d], or None
    compiled: list[Tensor]
    shared: bool
    head: Head
    trains: bool = False
    removed: bool = False

    @property
    def count(self) -> int:
        return self.settings.pre_seq_len


class PromptBank:
    """Many prompts on one base: each row of a batch names its own, and the base runs once for all.

    Where prompts can be shared (see ``ptune info``) they are compiled to keys and values when first used. Rows whose
    prompts cannot be, shallow ones on an encoder, are run together in a second call of the base.

    Args:
        base: a stock transformers model, ``AutoModelForCausalLM`` where prompts are to generate. Its weights are
            shared and it is not changed; move or cast it first.
        max_bytes: how much memory compiled prompts may take; the least recently used are dropped for others, and
            compiled again from their float32 rows when next used. By default all are kept.

    `add` and `remove` may be called while other threads run batches. Raises `TypeError`, `ValueError` or
    `NotImplementedError` for a base that prompts cannot be put on.
    """

    def __init__(self, base: Any, max_bytes: int | None = None) -> None:
        if max_bytes is not None and (not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0):
            raise ValueError(f"max_bytes: expected None or an int of at least 0, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self._stock = _sharing_weights(base)
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._kept: OrderedDict[_Entry, Prefix] = OrderedDict()
        self._kept_bytes = 0
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._runner = _with_prompts(self._stock)
        try:
            self._runner.init_prompts(PTuneConfig(tuning_mode="deep_ptune", pre_seq_len=1))
        except NotImplementedError:  # it has no list of blocks, so prompts are shallow
            self._runner.init_prompts(PTuneConfig(tuning_mode="ptune", pre_seq_len=1))
        self._nothing = None
        if self._runner.prefix_plan.path == "prefix":
            one_row = self._runner._hooks.prefix.prefix()
            self._nothing = Prefix([(key[:, :0], value[:, :0]) for key, value in one_row.layers])
        self._heads = Heads(self._runner, self._stock.config)
        self._base_head = self._heads.of_base()

    @property
    def names(self) -> list[str]:
        """The names of the prompts, in the order in which they were added."""
        return list(self._entries)

    @property
    def compiled_bytes(self) -> int:
        """How much memory compiled prompts take."""
        return self._kept_bytes

    def add(self, name: str, folder: str | os.PathLike[str], **options: Any) -> None:
        """Take in the prompts and head of ``folder`` (of `save_prompts`, `save_prefix` or a Trainer) as ``name``.

        ``folder`` may be the name of a repository on the hub, with the ``options`` of `ptune.hub.download`. Raises
        `ValueError`, or `FileNotFoundError`, that names it where that is not possible: a name that is taken or is not
        one of letters, digits, ``_``, ``.`` and ``-``, a folder that is damaged, or one that does not fit
        (`ptune.checkpoint.MisfitError`). The bank is then as it was.
        """
        check_name(name)
        here = hub.folder_of(folder, **options)
        saved, tensors = checkpoint.read_config(here), checkpoint.read_tensors(here)
        with self._lock, torch.inference_mode(False):  # heads may train later
            if name in self._entries:
                raise ValueError(f"name: {name!r} is taken; remove it first")
            try:
                entry = self._entry(saved, tensors)
            except (ValueError, NotImplementedError) as error:
                raise type(error)(f"{name!r} ({os.fspath(folder)}): {error}") from None
            self._entries = self._entries | {name: entry}
        warn_of_other_weights(self._runner, saved, folder)

    def remove(self, name: str) -> None:
        """Forget a prompt. Raises `ValueError` for a name that the bank does not have."""
        with self._lock:
            entry = self._named(name)
            self._entries = {other: kept for other, kept in self._entries.items() if other != name}
            entry.removed = True
            self._drop(entry)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_names: Iterable[str | None],
        labels: Mapping[Any, Tensor] | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BankOutput:
        """Run texts [b, n], row i with the prompt ``prompt_names[i]``; ``None`` is the base alone.

        Every row equals what its prompt alone would make of it. ``labels``: by name, those of its rows, as its model
        class takes them. ``token_type_ids`` [b, n]: where the base takes such. Gradients flow to prompts that train
        (see `unfreeze`) alone. Raises `ValueError` for names that the bank does not have, before anything is run.
        """
        names, entries = self._named_rows(prompt_names, input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else _mask(attention_mask, input_ids)
        if token_type_ids is not None:
            self._check_types(token_type_ids, input_ids)
        rows_of: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            rows_of.setdefault(name, []).append(row)
        heads = {name: self._base_head if (e := entries[rows[0]]) is None else e.head for name, rows in rows_of.items()}
        _check_labels(labels, rows_of, heads)
        labels = labels or {}
        column = first_column(mask)
        trains = any(entry is not None and entry.trains for entry in entries)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            states = self._states(entries, input_ids, mask, token_type_ids, column)
            output = BankOutput(states, logits=[None] * len(entries))
            for name, rows in rows_of.items():
                made = heads[name](states[rows], input_ids[rows], mask[rows], column[rows], labels.get(name))
                output.tasks[name] = TaskOutput(rows, made)
                if (logits := made.get("logits")) is not None:
                    for row, its in zip(rows, logits, strict=True):
                        output.logits[row] = its
                if (loss := made.get("loss")) is not None:
                    output.loss = loss if output.loss is None else output.loss + loss
        return output

    def unfreeze(self, name: str) -> dict[str, nn.Parameter]:
        """From now on the prompt and the head of ``name`` train: returns them by the names that their folder has.

        A prompt that trains is not kept compiled. A head's own dropout is on from ``bank.head(name).train()`` to
        ``.eval()``; the base's is off. Raises `ValueError` for a compiled prefix, which is without its rows.
        """
        with self._lock:
            entry = self._named(name)
            if entry.compiled:
                raise ValueError(f"{name!r} is a compiled prefix, without the rows that would train")
            if not entry.trains:
                self._drop(entry)
                entry.trains = True
                device = self._runner.device
                entry.prompts, entry.deep = (
                    rows if rows is None else nn.Parameter(rows.to(device, copy=True))
                    for rows in (entry.prompts, entry.deep)
                )
        tables = zip(checkpoint.PROMPTS, (entry.prompts, entry.deep), strict=True)
        return {name: rows for name, rows in tables if rows is not None} | entry.head.unfreeze()

    def head(self, name: str) -> nn.Module:
        """The head of ``name``, as a model of its class that is without the body."""
        return self._named(name).head.model

    def save(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write the prompt and head of ``name`` to a folder like the one that it came from."""
        entry = self._named(name)
        compiled = checkpoint.compiled_names(entry.settings, entry.saved["num_layers"])
        tensors = dict(zip(compiled, entry.compiled, strict=False)) | entry.head.own()
        tables = zip(checkpoint.PROMPTS, (entry.prompts, entry.deep), strict=True)
        checkpoint.write(folder, entry.saved, tensors | {n: rows for n, rows in tables if rows is not None})

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_names: Iterable[str | None],
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` for texts [b, n], row i with the prompt ``prompt_names[i]``.

        The base must be a model that generates, and so must those that the prompts were trained on.
        """
        runner = self._runner
        if not runner.can_generate():
            raise ValueError(f"{type(self._stock).__name__} cannot generate; load the base with AutoModelForCausalLM")
        if kwargs.get("token_type_ids") is not None:
            raise NotImplementedError("token_type_ids: not supported in generation with mixed prompts")
        names, entries = self._named_rows(prompt_names, input_ids)
        mask = attention_mask if attention_mask is None else _mask(attention_mask, input_ids)
        for name, entry in zip(names, entries, strict=True):
            if entry is not None and entry.head.model_class is not runner.base_class:
                raise ValueError(
                    f"prompt_names: {name!r} was trained on {entry.head.model_class.__name__}, which does not generate"
                )
            if entry is not None and entry.head.own():
                raise NotImplementedError(f"prompt_names: {name!r} has an output layer of its own; load it by itself")
        ((_, mixture),) = self._parts(entries, input_ids.device, together=True)
        with mixing(runner, mixture):
            return runner.generate(input_ids, attention_mask=mask, **kwargs)

    def _entry(self, saved: dict[str, Any], tensors: dict[str, Tensor]) -> _Entry:
        settings = checkpoint.settings_of(saved)
        head = self._heads.of(saved, tensors)
        names = checkpoint.compiled_names(settings, saved["num_layers"])
        compiled = [tensors[name] for name in names if name in tensors]
        prompts, deep = (tensors.get(name) for name in checkpoint.PROMPTS)
        plan = self._plan_of(settings)
        # where a rotary embedding changes with the length, prompt rows must see how long the text is
        shared = plan.path == "prefix" and plan.limit is None
        if compiled and not shared:
            raise checkpoint.MisfitError(f"a compiled prefix, and prompts cannot be shared here: {plan.reason}")
        if compiled and self._nothing is not None:
            for name, got, own in zip(names, compiled, self._nothing.tensors(), strict=True):
                expected = own.shape[0], settings.pre_seq_len, own.shape[2]
                if got.shape != expected:
                    raise checkpoint.MisfitError(f"{name}: expected {expected}, got {tuple(got.shape)}")
        return _Entry(saved, settings, prompts, deep, compiled, shared, head)

    def _plan_of(self, settings: PTuneConfig) -> Plan:
        """The path of prompts of this kind."""
        if settings.tuning_mode is None:
            return self._runner.prefix_plan
        kind = settings.tuning_mode, settings.deep and settings.deep_prompt_mode
        if kind not in self._plans:
            planner = _with_prompts(self._stock)
            planner.init_prompts(
                PTuneConfig(
                    tuning_mode=settings.tuning_mode,
                    pre_seq_len=settings.pre_seq_len,
                    deep_prompt_mode=settings.deep_prompt_mode,
                )
            )
            self._plans[kind] = planner.prefix_plan
        return self._plans[kind]

    def _named(self, name: str) -> _Entry:
        if not isinstance(name, str) or name not in self._entries:
            known = ", ".join(map(repr, list(self._entries)[:10])) or "none"
            raise ValueError(f"no prompt {name!r} in this bank, which has {len(self._entries)}: {known}")
        return self._entries[name]

    def _named_rows(
        self, names: Iterable[str | None], input_ids: Tensor
    ) -> tuple[list[str | None], list[_Entry | None]]:
        """The name of each row of a batch, and its prompt."""
        if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.is_complex():
            raise ValueError(f"input_ids: expected a tensor of integers, got {_said(input_ids)}")
        if input_ids.dim() != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids: expected [b, n] with at least one token, got shape {tuple(input_ids.shape)}")
        given = [] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
        if len(given) != input_ids.shape[0]:
            got = f"{len(given)}: {given!r}" if given else repr(names)
            raise ValueError(f"prompt_names: expected {input_ids.shape[0]} names, one for each row, got {got}")
        with self._lock:
            return given, [None if name is None else self._named(name) for name in given]

    def _check_types(self, types: Any, input_ids: Tensor) -> None:
        if "token_type_ids" not in self._runner._hooks.parameters:
            raise ValueError(f"token_type_ids: {type(self._stock).__name__} takes none")
        if not isinstance(types, Tensor) or types.shape != input_ids.shape or types.is_floating_point():
            raise ValueError(f"token_type_ids: expected integers of shape {tuple(input_ids.shape)}, got {_said(types)}")

    def _parts(
        self,
        entries: list[_Entry | None],
        device: torch.device,
        together: bool = False,
        typed: Container[int] = (),
    ) -> list[tuple[Any, Mixture]]:
        """The calls of the base that a batch takes: which rows, and what stands before them.

        ``typed``: rows whose prompts take another token type than the one that they are compiled with.
        """
        apart = [
            row
            for row, entry in enumerate(entries)
            if entry is not None and entry.count and (not entry.shared or row in typed)
        ]
        if self._nothing is not None and not apart:
            return [(slice(None), self._shared_mixture(entries, device))]
        rest = sorted(set(range(len(entries))) - set(apart))
        if self._nothing is None or together or not any(e is not None and e.count for e in (entries[r] for r in rest)):
            return [(slice(None), self._mixture(entries, device))]
        return [
            (rest, self._shared_mixture([entries[row] for row in rest], device)),
            (apart, self._mixture([entries[row] for row in apart], device)),
        ]

    def _states(
        self,
        entries: list[_Entry | None],
        input_ids: Tensor,
        mask: Tensor,
        types: Tensor | None,
        column: Tensor,
    ) -> Tensor:
        """[b, n, d], by one call of the base, or two."""
        typed: set[int] = set()
        if types is not None:
            # prompt rows have the type of the token they stand before; compiled ones were given none
            first = types.gather(1, column[:, None].long())[:, 0].tolist()
            typed = {row for row, kind in enumerate(first) if kind != 0 or self._runner.prefix_plan.causal}
        parts = self._parts(entries, input_ids.device, typed=typed)
        given = {"input_ids": input_ids, "attention_mask": mask} | ({} if types is None else {"token_type_ids": types})
        if len(parts) == 1:
            return self._run(given, parts[0][1])
        made = torch.cat([self._run({n: t[rows] for n, t in given.items()}, mixture) for rows, mixture in parts])
        order = torch.tensor([row for rows, _ in parts for row in rows], device=made.device)
        return made[order.argsort()]

    def _shared_mixture(self, entries: list[_Entry | None], device: torch.device) -> Mixture:
        distinct, start, length = _pooled(entries)
        pool = Prefix.joined([self._prefix_of(entry) for entry in distinct]) if distinct else self._nothing
        placed = torch.tensor([start, length], dtype=torch.int32).to(device)
        return Mixture(placed[0], placed[1], max(length), prefix=pool)

    def _mixture(self, entries: list[_Entry | None], device: torch.device) -> Mixture:
        for entry in entries:
            if entry is not None and entry.count and entry.prompts is None:
                raise NotImplementedError("a compiled prefix is without its rows, which have to run with the text here")
        distinct, start, length = _pooled(entries)
        nothing = torch.zeros(0, self._runner.get_input_embeddings().weight.shape[1])
        placed = torch.tensor([start, length], dtype=torch.int32).to(device)
        prompts = torch.cat([rows.to(device) for rows in (nothing, *(entry.prompts for entry in distinct))])
        deep = []
        for mode in dict.fromkeys(entry.settings.deep_prompt_mode for entry in distinct if entry.settings.deep):
            own = [
                e if e is not None and e.settings.deep and e.settings.deep_prompt_mode == mode else None
                for e in entries
            ]
            of_mode, deep_start, deep_length = _pooled(own)
            pools = torch.cat([e.deep.view(-1, e.count, e.deep.shape[1]) for e in of_mode], 1).to(device)
            where = torch.tensor([deep_start, deep_length], dtype=torch.int32).to(device)
            deep.append(Overwriting(mode, pools.unbind(0), where[0], where[1]))
        return Mixture(placed[0], placed[1], max(length), prompts=prompts, deep=deep)

    def _prefix_of(self, entry: _Entry) -> Prefix:
        """The keys and values of a prompt, which are kept as far as `max_bytes` goes."""
        with self._lock:
            if entry.trains:
                return Prefix(self._capture(entry))
            if (prefix := self._kept.get(entry)) is not None:
                self._kept.move_to_end(entry)
                return prefix
            prefix = self._compile(entry)
            limit = self.max_bytes
            if not entry.removed and (limit is None or prefix.nbytes <= limit):
                while limit is not None and self._kept_bytes + prefix.nbytes > limit:
                    self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
                self._kept[entry] = prefix
                self._kept_bytes += prefix.nbytes
            return prefix

    def _compile(self, entry: _Entry) -> Prefix:
        weight = self._runner.get_input_embeddings().weight
        # neither inference tensors nor rounded by autocast: they are kept for calls of any kind
        exact = torch.autocast(weight.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), exact:
            if entry.compiled:
                return Prefix.of([tensor.to(weight.device, weight.dtype, copy=True) for tensor in entry.compiled])
            layers = self._capture(entry)
            # copies: a view would keep the queries with it
            return Prefix(
                [(key.clone(memory_format=_PACKED), value.clone(memory_format=_PACKED)) for key, value in layers]
            )

    def _capture(self, entry: _Entry) -> list[tuple[Tensor, Tensor]]:
        mode = entry.settings.deep_prompt_mode
        return self._runner._hooks.prefix.capture(entry.prompts, entry.deep, mode).layers

    def _drop(self, entry: _Entry) -> None:
        if (prefix := self._kept.pop(entry, None)) is not None:
            self._kept_bytes -= prefix.nbytes

    def _run(self, given: dict[str, Tensor], mixture: Mixture) -> Tensor:
        hooks = self._runner._hooks
        no_cache = {"use_cache": False} if "use_cache" in hooks.parameters else {}
        with mixing(self._runner, mixture):
            return hooks.body(**given, return_dict=True, **no_cache).last_hidden_state


def check_name(name: Any) -> None:
    """Raises `ValueError` for what a prompt cannot be called: names may become those of folders."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name: expected up to 100 letters, digits, '_', '.' and '-', got {name!r}")


def _mask(attention_mask: Any, input_ids: Tensor) -> Tensor:
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        expected = f"a tensor of shape {tuple(input_ids.shape)}"
        raise ValueError(f"attention_mask: expected {expected}, got {_said(attention_mask)}")
    return ones_and_zeros(attention_mask)


def _check_labels(labels: Any, rows_of: Mapping[Any, list[int]], heads: Mapping[Any, Head]) -> None:
    if labels is not None and not isinstance(labels, Mapping):
        raise ValueError(f"labels: expected tensors by the names of prompts, got {_said(labels)}")
    for name, its in (labels or {}).items():
        if name not in rows_of:
            raise ValueError(f"labels: expected names that the batch has, got {name!r}")
        if not heads[name].takes_labels:
            raise ValueError(f"labels: expected none for {name!r}, for {heads[name].model_class.__name__} has no head")
        count = len(rows_of[name])
        if not isinstance(its, Tensor) or its.shape[:1] != (count,):
            raise ValueError(f"labels: expected a tensor of {count} rows for {name!r}, got {_said(its)}")


def _said(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _pooled(entries: Sequence[_Entry | None]) -> tuple[list[_Entry], list[int], list[int]]:
    """The distinct prompts among ``entries``, and of each row, where its rows begin in their pool, and how many."""
    start: dict[_Entry, int] = {}
    rows = 0
    for entry in entries:
        if entry is not None and entry.count and entry not in start:
            start[entry] = rows
            rows += entry.count
    starts = [0 if entry is None else start.get(entry, 0) for entry in entries]
    return list(start), starts, [0 if entry is None else entry.count for entry in entries]


def _sharing_weights(base: Any) -> Any:
    """A model of the same class and weights, whose modules are its own."""
    if isinstance(base, PTuneMixin) or not isinstance(base, PreTrainedModel):
        raise TypeError(f"base: expected a stock transformers model, got {type(base).__name__}")
    if base.config.is_encoder_decoder:
        raise NotImplementedError(
            f"base: expected an encoder or a decoder, got the encoder-decoder {type(base).__name__}"
        )
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        raise NotImplementedError("base: expected a model on one device, got one spread over several")
    if rounds_by_batch(base.config):
        raise NotImplementedError(
            "base: LLM.int8 chooses the columns that it rounds over all rows of a batch, so that a row would depend on "
            "the others; load it with llm_int8_threshold=0, or in 4 bits"
        )
    weights = {id(parameter): sharing_memory(parameter) for parameter in base.parameters()}
    shared = {id(tensor): tensor for tensor in (*base.buffers(), *kept_scales(base))}
    twin = copy.deepcopy(base, weights | shared).eval()
    take_scales(twin)
    return twin


def _with_prompts(stock: Any) -> Any:
    model = _sharing_weights(stock)
    take_settings(model.config)
    model.__class__ = ptune_class(type(model))
    model.adopt([])
    return model
