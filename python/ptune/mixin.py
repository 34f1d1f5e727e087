"""`PTuneMixin`: a transformers model whose base is frozen and whose prompts and head train."""

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptune_kernels import prepend

from .anatomy import device_of, evaluating, find_blocks, find_body, whole
from .cache import CompiledPrefix
from .call import CheckpointWithCall
from .config import PTuneConfig, take_settings
from .dropout import FrozenDropout
from .hooks import PromptHooks
from .initialise import initial_prompts, tokenise_with
from .likeness import sample
from .loading import fresh_head, load_model, origin_of, tokenizer_of
from .mixture import current_mixture
from .plan import Plan, make_plan, obstacle
from .quantised import is_quantised, prepare, unquantised_head
from .saving import PromptSaving
from .seq2seq import EncoderHooks
from .support import check_base

BORROWED = "lies_in_another_model_at"  # where parameters lie that must not be written to


class PTuneMixin(PromptSaving):
    """Put before a transformers model class by `ptune.models`; see `AutoPTuneModel` for how to load one.

    Attributes:
        ptune_config: the `PTuneConfig` of the prompts.
        compiled_prefix: a `CompiledPrefix` that was loaded in place of prompts, and trains as they do, or ``None``.
        prompt_embeddings: `nn.Embedding` with weight [m, d], float32, or ``None``.
        intermediate_prompt_embeddings: `nn.Embedding` with weight [L·m, d], float32, row l·m + i, or ``None``.
    """

    base_class: ClassVar[type]
    blocks_are_here: ClassVar[bool] = True

    # TRL rounds what trains to bfloat16 where a model says that it was loaded so
    is_loaded_in_8bit = is_loaded_in_4bit = property(lambda self: False)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        config = copy.deepcopy(config)
        settings = take_settings(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.adopt(fresh_head(self))
        self.init_prompts(PTuneConfig(**settings))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """See `AutoPTuneModel.from_pretrained`."""
        return load_model(cls.base_class, path, lambda _: cls, *args, **kwargs)

    def init_prompts(self: Any, config: Any, tokenizer: Any = None) -> None:
        """Begin anew with the prompts of ``config``: a `PTuneConfig`, or a transformers config that bears its fields.

        ``tokenizer``, or a function that returns one, reads a ``prompt_init_text`` of strings; by default the base's
        own is loaded. Raises `TypeError`, `ValueError` or `NotImplementedError`, and then changes nothing.
        """
        self._check_unwrapped()
        settings = PTuneConfig.of(config)
        shallow = deep = None
        if settings.tuning_mode is not None:
            if settings.deep:
                find_blocks(find_body(self), self.config)
            if settings.prefix_sharing is True and (reason := obstacle(self, settings)) is not None:
                raise ValueError(f"prefix_sharing: True, but {type(self).__name__} cannot share prompts: {reason}")
            tokenise = tokenise_with(tokenizer or partial(tokenizer_of, self.origin.name))
            with self.disable_prompts(), evaluating(self):
                shallow, deep = initial_prompts(self, settings, tokenise)
        self._install(settings, shallow, deep)

    def get_prompt(self: Any, batch_size: int) -> tuple[Tensor | None, Tensor | None]:
        """The prompts for a batch, ``([b, m, d], [b, L·m, d] or None)`` in the base's dtype; ``(None, None)`` without.

        Their gradients are summed over the batch in float32. Raises `ValueError` where a compiled prefix was loaded.
        """
        if self.compiled_prefix is not None:
            raise ValueError("get_prompt: a compiled prefix was loaded, which is without its prompts")
        if self.prompt_embeddings is None:
            return None, None
        dtype = self.get_input_embeddings().weight.dtype
        shallow, deep = (
            None if table is None else _expanded(table.weight, batch_size, dtype) for table in self._tables()
        )
        return shallow, deep

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss is divided by a ``num_items_in_batch``, which Trainer asks before it passes one.

        Unasked, it takes the ``**kwargs`` of a classifier's forward for a yes, and trains on the sum of what it
        accumulates.
        """
        forward = inspect.unwrap(self.base_class.forward)  # type: ignore[attr-defined]
        return self.can_generate() and "loss_function" in forward.__code__.co_names

    @property
    def prompts_disabled(self) -> bool:
        """Whether a `disable_prompts` block is open."""
        return self._disabled > 0

    @property
    def prompts_enabled(self: Any) -> bool:
        """Whether calls bear prompt rows."""
        return self._hooks is not None and not self.prompts_disabled

    @property
    def prompt_columns(self: Any) -> int:
        """How many columns before the text a call takes, and a cache holds."""
        if (mixture := current_mixture(self)) is not None:
            return mixture.max_length
        # an encoder's prompt is in no cache of the text that the decoder writes
        return self.ptune_config.pre_seq_len if self.prompts_enabled and not self.config.is_encoder_decoder else 0

    @contextmanager
    def disable_prompts(self: Any) -> Iterator[None]:
        """Inside the block the model is its bare base, dropout included; not thread-safe, as modules are changed.

        The backward of a checkpointed forward belongs inside too: it runs that again, dropout and all.
        """
        self._disabled += 1
        self._set_dropout()
        try:
            yield
        finally:
            self._disabled -= 1
            self._set_dropout()

    @property
    def blocks_dtype(self: Any) -> torch.dtype:
        """That in which the blocks compute."""
        return self.get_input_embeddings().weight.dtype

    @property
    def prefix_plan(self: Any) -> Plan:
        """Which path prompts take through the model, and why."""
        return Plan("none", "no prompts") if self._hooks is None else self._hooks.prefix.plan

    def compile_prompts(self: Any) -> None:
        """Keep the keys and values of the prompt rows, so that calls without gradients no longer run these rows.

        They are computed at the next such call, and again when prompts or weights have changed. What changes neither
        (an edit through ``.data``, an adapter that is switched) needs another `compile_prompts`. Raises `ValueError`
        where the prompts are not shared.
        """
        if self.prefix_plan.path != "prefix":
            raise ValueError(f"compile_prompts: prompts are not shared here: {self.prefix_plan.reason}")
        self._hooks.prefix.keep_anew()

    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """transformers' own; where prompts are shared, the model then has the counterpart that takes a prefix."""
        before, plan = self.config._attn_implementation, self.prefix_plan
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        try:
            self._plan()
        except Exception:
            super().set_attn_implementation(before)  # type: ignore[misc]
            self._hooks.prefix.plan = plan
            raise

    def num_trainable_parameters(self: Any) -> int:
        """How many numbers train: prompts and head."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def adopt(self: Any, head: Iterable[str]) -> None:
        """Make a stock model that has just become one of this class ready for prompts, with ``head`` to train."""
        check_base(self)
        if is_quantised(self):
            unquantised_head(self, head := list(head))
            prepare(self)
        self.origin = origin_of(self.config)
        self.ptune_config = PTuneConfig()
        self._loaded_vocabulary = self.get_input_embeddings().num_embeddings
        self._disabled = 0
        self._hooks: PromptHooks | None = None
        self._dropout = FrozenDropout(self.base_model)
        self.prompt_embeddings = self.intermediate_prompt_embeddings = self.compiled_prefix = None
        if "_old_forward" in vars(self):
            # accelerate, which spreads a model over devices, kept the forward of the class it was loaded as
            self._old_forward = type(self).forward.__get__(self)
        self._set_head(head)
        self.loaded_sample = sample(self)
        self._cast_to_head()
        self._checkpoint_with_call()

    def _install(
        self: Any,
        settings: PTuneConfig,
        shallow: Tensor | None,
        deep: Tensor | None,
        compiled: Sequence[Tensor] = (),
        head: Iterable[str] | None = None,
    ) -> None:
        """Take these prompts, and ``head`` to train beside them; or, where they do not fit, none of it."""
        embedding = self.get_input_embeddings()
        before = self.ptune_config, *self._tables(), self.compiled_prefix
        own, found = self._head, [(p, p.data, p.requires_grad) for p in self.parameters()]
        try:
            self._set_head(own if head is None else head)
            made = CompiledPrefix.of(compiled, device_of(embedding)) if compiled else None
            self._put(settings, _table(shallow, embedding), _table(deep, embedding), made)
            self._check_compiled()
        except Exception:  # such as that they were to be shared, and the check found that they cannot be
            self._head = own
            self._put(*before)
            for parameter, data, trains in found:
                parameter.data = data  # a head's became float32
                parameter.requires_grad_(trains)
            raise

    def _tables(self: Any) -> tuple[nn.Embedding | None, nn.Embedding | None]:
        return self.prompt_embeddings, self.intermediate_prompt_embeddings

    def prompt_parameters(self: Any) -> list[nn.Parameter]:
        """The tables of prompts that the model has: shallow, then deep."""
        return [table.weight for table in self._tables() if table is not None]

    def _put(
        self: Any,
        settings: PTuneConfig,
        shallow: nn.Embedding | None,
        deep: nn.Embedding | None,
        compiled: CompiledPrefix | None,
    ) -> None:
        if (hooks := self._hooks) is not None:
            hooks.remove()
        self.ptune_config = settings
        self.prompt_embeddings, self.intermediate_prompt_embeddings, self.compiled_prefix = shallow, deep, compiled
        self._hooks = self._new_hooks() if settings.tuning_mode is not None else None
        if hooks is not None and self._hooks is not None:
            self._hooks.prefix.keep_compiled = hooks.prefix.keep_compiled
        own = set(self._own_names().values())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in own)
        # Trainer, which loads a checkpoint of prompts into the whole model, expects exactly these to be missing
        self._keys_to_ignore_on_save = set(self.load_state_dict({}, strict=False).missing_keys) - own
        self._set_dropout()
        self._plan()

    def _new_hooks(self: Any) -> PromptHooks:
        return (EncoderHooks if self.config.is_encoder_decoder else PromptHooks)(self)

    def _set_dropout(self: Any) -> None:
        if self.prompts_disabled or self.ptune_config.base_dropout:
            self._dropout.restore()
        else:
            self._dropout.freeze()

    def _plan(self: Any) -> None:
        if self._hooks is None:
            return
        disabled, self._disabled = self._disabled, 0  # the plan is made by trying calls with prompts
        try:
            with evaluating(self):
                self._hooks.prefix.plan = make_plan(self._hooks)
        finally:
            self._disabled = disabled

    def _set_head(self: Any, names: Iterable[str]) -> None:
        parameters = dict(self.named_parameters())
        self._head = sorted(name for name in names if name in parameters)  # a tied weight goes by its first name alone
        for name in self._head:
            parameter = parameters[name]
            borrowed = hasattr(parameter, BORROWED) and getattr(parameter, BORROWED) == parameter.data_ptr()
            parameter.data = parameter.data.to(torch.float32, copy=borrowed)

    def _cast_to_head(self: Any) -> None:
        """Let float32 head modules take what a half-precision body gives, and give it to those that stayed half."""
        pooler = getattr(self.base_model, "pooler", None)
        inside = {id(module) for module in self.base_model.modules()}
        if isinstance(pooler, nn.Module):
            inside -= {id(module) for module in pooler.modules()}
        for module in self.modules():
            if id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(_cast_inputs)

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move everything, cast the base; prompts, head and their gradients keep their dtype bit for bit."""
        own = set(self._own_names().values())
        kept = {
            id(tensor)
            for name, its in (*self.named_parameters(), *self.named_buffers())
            if name in own or ".modules_to_save." in name or ".original_module." in name  # PEFT's, active or not
            for tensor in (its, its.grad)
            if tensor is not None
        }

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in kept or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[misc]
        if self._hooks is not None:
            self._hooks.prefix.forget()
        return self

    def _set_gradient_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]
        self._checkpoint_with_call()

    def _checkpoint_with_call(self: Any) -> None:
        for module in self.modules():
            checkpoint_with = vars(module).get("_gradient_checkpointing_func")
            if checkpoint_with is not None and not isinstance(checkpoint_with, CheckpointWithCall):
                module._gradient_checkpointing_func = CheckpointWithCall(checkpoint_with)

    # What transformers asks of a class by reading its module's source, or its bases, is asked of the stock class.

    def _get_name(self) -> str:
        """By which Trainer knows whether its label smoother is to shift the labels."""
        return self.base_class.__name__

    @classmethod
    def can_generate(cls) -> bool:
        return cls.base_class.can_generate()  # type: ignore[attr-defined]

    @classmethod
    def is_custom_code(cls) -> bool:
        return cls.base_class.is_custom_code()  # type: ignore[attr-defined]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.base_class._can_set_attn_implementation()  # type: ignore[attr-defined]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.base_class._can_set_experts_implementation()  # type: ignore[attr-defined]


def _table(rows: Tensor | None, embedding: Any) -> nn.Embedding | None:
    if rows is None:
        return None
    table = nn.Embedding.from_pretrained(rows.to(device_of(embedding), torch.float32, copy=True), freeze=False)
    table._is_hf_initialized = True  # type: ignore[assignment]
    return table


def _expanded(rows: Tensor, batch_size: int, dtype: torch.dtype) -> Tensor:
    rows = whole(rows)
    if dtype == torch.float64:
        rows = rows.double()
    return prepend(rows, torch.empty(batch_size, 0, rows.shape[1], dtype=dtype, device=rows.device))


def _cast_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters(recurse=False)).dtype
    if not dtype.is_floating_point:  # quantised, and casts by itself
        return args
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
