"""`PromptBank`: many prompts on one base, and batches whose rows name different ones."""

import os
import re
import threading
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, hub
from .attention import Prefix
from .compatibility import check_compiled
from .config import PTuneConfig
from .entry import CompiledEntries, Entry
from .heads import Head, Heads
from .layout import first_column, ones_and_zeros
from .likeness import warn_of_other_weights
from .loading import base_inside
from .mixin import PTuneMixin
from .mixture import Mixture, Overwriting, mixing
from .plan import Plan
from .quantised import rounds_by_batch
from .twin import check_stock, language_model_of, prompted_twin, twin_of

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


class PromptBank:
    """Many prompts on one base: each row of a batch names its own, and the base runs once for all.

    Where prompts can be shared (see ``ptune info``) they are compiled to keys and values when first used, and again
    when the base has changed in place, though not where that was done through ``.data``. Rows whose prompts cannot be,
    shallow ones on an encoder, are run together in a second call of the base.

    Args:
        base: a stock transformers model, ``AutoModelForCausalLM`` where prompts are to generate; of a multimodal one
            the language model is taken. Its weights are shared and it is not changed; move or cast it first.
        max_bytes: how much memory compiled prompts may take; the least recently used are dropped for others, and
            compiled again from their float32 rows when next used. By default all are kept.

    `add` and `remove` may be called while other threads run batches. Raises `TypeError`, `ValueError` or
    `NotImplementedError` for a base that prompts cannot be put on.
    """

    def __init__(self, base: Any, max_bytes: int | None = None) -> None:
        if max_bytes is not None and (not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0):
            raise ValueError(f"max_bytes: expected None or an int of at least 0, got {max_bytes!r}")
        self.max_bytes = max_bytes
        _check_base(base)
        base = language_model_of(base)
        self._stock = twin_of(base)
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._runner = prompted_twin(self._stock)
        try:
            self._runner.init_prompts(_to_plan_with(base, tuning_mode="deep_ptune", pre_seq_len=1))
        except NotImplementedError:  # it has no list of blocks, so prompts are shallow
            self._runner.init_prompts(_to_plan_with(base, tuning_mode="ptune", pre_seq_len=1))
        self._nothing: Any = None  # no prompt, compiled, where prompts are shared
        if self._runner.prefix_plan.path == "prefix":
            one_row = self._runner._hooks.prefix.prefix()
            self._nothing = Prefix([(key[:, :0], value[:, :0]) for key, value in one_row.layers])
        self._heads = Heads(self._runner, self._stock.config)
        self._bare = Entry(self._heads.of_base(), PTuneConfig(), saved={})
        self._compiled = CompiledEntries(self._runner)

    def __repr__(self) -> str:
        base, mib = type(self._stock).__name__, self.compiled_bytes / 2**20
        return f"PromptBank({base}; prompts: {', '.join(self.names) or 'none'}; compiled: {mib:.1f} MiB)"

    @property
    def names(self) -> list[str]:
        """The names of the prompts, in the order in which they were added."""
        return list(self._entries)

    @property
    def compiled_bytes(self) -> int:
        """How much memory compiled prompts take."""
        return self._compiled.nbytes

    def add(self, name: str, folder: Any, *, replace: bool = False, **options: Any) -> None:
        """Take in the prompts and head of ``folder`` (of `save_prompts`, `save_prefix` or a Trainer) as ``name``.

        ``folder`` may be the name of a repository on the hub, with the ``options`` of `ptune.hub.download`, or a model
        with prompts, of which the bank has a copy of its own. ``replace``: in place of the prompts that have the name,
        if any do, which batches that are running go on with. Raises `ValueError`, or `FileNotFoundError`, that names it
        where that is not possible: a name that is taken or is not one of letters, digits, ``_``, ``.`` and ``-``, a
        folder that is damaged, or one that does not fit (`ptune.checkpoint.MisfitError`). The bank is then as it was.
        """
        check_name(name)
        if isinstance(folder, PTuneMixin):
            if options:
                raise TypeError(f"expected no keywords with a model, got {', '.join(options)}")
            folder._check_adapters()
            saved, tensors = folder.described()
            folder = type(folder).__name__
        else:
            here = hub.folder_of(folder, **options)
            saved, tensors = checkpoint.read_config(here), checkpoint.read_tensors(here)
            if (inside := base_inside(here, saved)) is not None:
                saved["base"]["name"] = str(inside.absolute())  # for `save`, to a folder without it
        with self._lock, torch.inference_mode(False):  # heads may train later
            if (before := self._entries.get(name)) is not None and not replace:
                raise ValueError(f"name: {name!r} is taken; remove it first, or replace=True")
            try:
                entry = self._entry(saved, tensors)
            except (ValueError, NotImplementedError) as error:
                raise type(error)(f"{name!r} ({os.fspath(folder)}): {error}") from None
            self._entries = self._entries | {name: entry}
            if before is not None:
                self._forget(before)
        warn_of_other_weights(self._runner, saved, folder)

    def remove(self, name: str) -> None:
        """Forget a prompt. Raises `ValueError` for a name that the bank does not have."""
        with self._lock:
            entry = self._named(name)
            self._entries = {other: kept for other, kept in self._entries.items() if other != name}
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        entry.removed = True
        self._compiled.drop(entry)

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
        heads = {name: entries[rows[0]].head for name, rows in rows_of.items()}
        _check_labels(labels, rows_of, heads)
        labels = labels or {}
        column = first_column(mask)
        trains = any(entry.trains for entry in entries)
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
        ``.eval()``; the base's is off.
        """
        with self._lock:
            entry = self._named(name)
            if not entry.trains:
                self._compiled.drop(entry)
                entry.trains = True
                device = self._runner.device
                entry.prompts, entry.deep = (
                    rows if rows is None else nn.Parameter(rows.to(device, copy=True))
                    for rows in (entry.prompts, entry.deep)
                )
                entry.compiled = [nn.Parameter(tensor.to(device, copy=True)) for tensor in entry.compiled]
        return entry.tables | entry.head.unfreeze()

    def head(self, name: str) -> nn.Module:
        """The head of ``name``, as a model of its class that is without the body."""
        return self._named(name).head.model

    def save(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write the prompt and head of ``name`` to a folder like the one that it came from."""
        entry = self._named(name)
        checkpoint.write(folder, entry.saved, entry.head.own() | entry.tables)

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
            if entry.head.model_class is not runner.base_class:
                raise ValueError(
                    f"prompt_names: {name!r} was trained on {entry.head.model_class.__name__}, which does not generate"
                )
            if entry.head.own():
                raise NotImplementedError(f"prompt_names: {name!r} has an output layer of its own; load it by itself")
        ((_, mixture),) = self._parts(entries, input_ids.device, together=True)
        with mixing(runner, mixture):
            return runner.generate(input_ids, attention_mask=mask, **kwargs)

    def _entry(self, saved: dict[str, Any], tensors: dict[str, Tensor]) -> Entry:
        settings = checkpoint.settings_of(saved)
        head = self._heads.of(saved, tensors)
        names = checkpoint.compiled_names(settings, saved["num_layers"])
        compiled = [tensors[name] for name in names if name in tensors]
        prompts, deep = (tensors.get(name) for name in checkpoint.PROMPTS)
        plan = self._plan_of(settings)
        # where a rotary embedding changes with the length, prompt rows must see how long the text is
        shared = self._nothing is not None and plan.path == "prefix" and plan.limit is None
        if compiled and not shared:
            raise checkpoint.MisfitError(f"a compiled prefix, and prompts cannot be shared here: {plan.reason}")
        if compiled:
            check_compiled(names, compiled, self._nothing.tensors())
        return Entry(head, settings, saved, prompts, deep, compiled, shared)

    def _plan_of(self, settings: PTuneConfig) -> Plan:
        """The path of prompts of this kind."""
        if settings.tuning_mode is None:
            return self._runner.prefix_plan
        kind = settings.tuning_mode, settings.deep and settings.deep_prompt_mode
        if kind not in self._plans:
            planner = prompted_twin(self._stock)
            names = ("tuning_mode", "pre_seq_len", "deep_prompt_mode")
            planner.init_prompts(_to_plan_with(planner, **{name: getattr(settings, name) for name in names}))
            self._plans[kind] = planner.prefix_plan
        return self._plans[kind]

    def _named(self, name: str) -> Entry:
        if not isinstance(name, str) or name not in self._entries:
            known = ", ".join(map(repr, list(self._entries)[:10])) or "none"
            raise ValueError(f"no prompt {name!r} in this bank, which has {len(self._entries)}: {known}")
        return self._entries[name]

    def _named_rows(self, names: Iterable[str | None], input_ids: Tensor) -> tuple[list[str | None], list[Entry]]:
        """The name of each row of a batch, and its prompt."""
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"input_ids: expected a tensor of int32 or int64, got {_said(input_ids)}")
        if input_ids.dim() != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids: expected [b, n] with at least one token, got shape {tuple(input_ids.shape)}")
        given = [] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
        if len(given) != input_ids.shape[0]:
            got = f"{len(given)}: {given!r}" if given else repr(names)
            raise ValueError(f"prompt_names: expected {input_ids.shape[0]} names, one for each row, got {got}")
        with self._lock:
            return given, [self._bare if name is None else self._named(name) for name in given]

    def _check_types(self, types: Any, input_ids: Tensor) -> None:
        if "token_type_ids" not in self._runner._hooks.parameters:
            raise ValueError(f"token_type_ids: {type(self._stock).__name__} takes none")
        if not isinstance(types, Tensor) or types.shape != input_ids.shape or types.is_floating_point():
            raise ValueError(f"token_type_ids: expected integers of shape {tuple(input_ids.shape)}, got {_said(types)}")

    def _parts(
        self, entries: list[Entry], device: torch.device, together: bool = False, typed: Container[int] = ()
    ) -> list[tuple[Any, Mixture]]:
        """The calls of the base that a batch takes: which rows, and what stands before them.

        ``together``: in one call. ``typed``: rows whose prompts take another token type than the one that they are
        compiled with.
        """
        prompted = [row for row, entry in enumerate(entries) if entry.count]
        apart = [row for row in prompted if not entries[row].shared or row in typed]
        if self._nothing is not None and not apart:
            return [(slice(None), self._shared_mixture(entries, device))]
        if together or len(apart) == len(prompted):
            return [(slice(None), self._mixture(entries, device))]
        rest = sorted(set(range(len(entries))) - set(apart))
        return [
            (rest, self._shared_mixture([entries[row] for row in rest], device)),
            (apart, self._mixture([entries[row] for row in apart], device)),
        ]

    def _states(
        self, entries: list[Entry], input_ids: Tensor, mask: Tensor, types: Tensor | None, column: Tensor
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

    def _shared_mixture(self, entries: list[Entry], device: torch.device) -> Mixture:
        """The prompts of ``entries``, compiled."""
        distinct, start, length = _pooled(entries, device)
        with self._lock:
            prefixes = [self._compiled.prefix_of(entry, self.max_bytes) for entry in distinct]
        longest = max(entry.count for entry in entries)
        return Mixture(start, length, longest, prefix=Prefix.joined(prefixes or [self._nothing]))

    def _mixture(self, entries: list[Entry], device: torch.device) -> Mixture:
        """The prompts of ``entries``, to run with the text."""
        distinct, start, length = _pooled(entries, device)
        if any(entry.prompts is None for entry in distinct):
            raise NotImplementedError("a compiled prefix is without its rows, which have to run with the text here")
        nothing = torch.zeros(0, self._runner.get_input_embeddings().weight.shape[1])
        prompts = torch.cat([rows.to(device) for rows in (nothing, *(entry.prompts for entry in distinct))])
        deep = []
        for mode in dict.fromkeys(entry.deep_mode for entry in distinct if entry.deep_mode):
            of_mode, *where = _pooled(entries, device, mode)
            pools = torch.cat([e.deep.view(-1, e.count, e.deep.shape[1]) for e in of_mode], 1).to(device)
            deep.append(Overwriting(mode, pools.unbind(0), *where))
        return Mixture(start, length, max(entry.count for entry in entries), prompts=prompts, deep=deep)

    def _run(self, given: dict[str, Tensor], mixture: Mixture) -> Tensor:
        hooks = self._runner._hooks
        no_cache = {"use_cache": False} if "use_cache" in hooks.parameters else {}
        with mixing(self._runner, mixture):
            return hooks.body(**given, return_dict=True, **no_cache).last_hidden_state


def check_name(name: Any) -> None:
    """Raises `ValueError` for what a prompt cannot be called: names may become those of folders."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"name: expected up to 100 letters, digits, '_' and, but for the first, '.' and '-', got {name!r}"
        )


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
            raise ValueError(f"labels: expected none for {name!r}, as {heads[name].model_class.__name__} takes none")
        if getattr(heads[name].model.config, "output_router_logits", False) and heads[name].model.can_generate():
            raise NotImplementedError(
                "labels: the loss of routers (output_router_logits=True) is of all rows, and not of one task's"
            )
        count = len(rows_of[name])
        if not isinstance(its, Tensor) or its.shape[:1] != (count,):
            raise ValueError(f"labels: expected a tensor of {count} rows for {name!r}, got {_said(its)}")


def _said(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _pooled(
    entries: Sequence[Entry], device: torch.device, deep_mode: str | None = None
) -> tuple[list[Entry], Tensor, Tensor]:
    """The distinct prompts among ``entries``, which make a pool; with a ``deep_mode``, those whose deep ones have it.

    And where in the pool the prompt of each row begins, and how long it is: int32 [b] each.
    """
    counts = [entry.count if deep_mode in (None, entry.deep_mode) else 0 for entry in entries]
    first: dict[Entry, int] = {}
    rows = 0
    for entry, count in zip(entries, counts, strict=True):
        if count and entry not in first:
            first[entry] = rows
            rows += count
    starts = [first.get(entry, 0) for entry in entries]
    start, length = torch.tensor([starts, counts], dtype=torch.int32).to(device).unbind()
    return list(first), start, length


def _to_plan_with(model: Any, **settings: Any) -> PTuneConfig:
    """Prompts for `make_plan` to try, of real tokens: random ones would be drawn from what a sampling thread draws."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [(vocabulary // 2 + i) % vocabulary for i in range(settings["pre_seq_len"])]
    return PTuneConfig(**settings, prompt_init_text=ids)


def _check_base(base: Any) -> None:
    check_stock(base)
    if base.config.is_encoder_decoder:
        raise NotImplementedError(
            f"base: expected an encoder or a decoder, got the encoder-decoder {type(base).__name__}"
        )
    if type(base).__name__.endswith("ForMultipleChoice"):
        raise NotImplementedError(f"base: expected one whose rows are texts by themselves, got {type(base).__name__}")
    if rounds_by_batch(base.config):
        raise NotImplementedError(
            "base: LLM.int8 chooses the columns that it rounds over all rows of a batch, so that a row would depend on "
            "the others; load it with llm_int8_threshold=0, or in 4 bits"
        )
