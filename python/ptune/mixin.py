"""`PTuneMixin`: a transformers model whose base is frozen and whose prompts and head train."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptune_kernels import prepend

from . import checkpoint
from .cache import CompiledPrefix
from .call import CheckpointWithCall
from .config import PTuneConfig, take_settings
from .dropout import FrozenDropout
from .half_attention import dtypes_of
from .hooks import PromptHooks
from .initialise import Tokenise, initial_prompts
from .loading import Origin, load_model, origin_of, tokenizer_of
from .mixture import current_mixture
from .plan import Plan, make_plan, obstacle
from .support import check_base, device_of, find_blocks


class PTuneMixin:
    """Put before a transformers model class by `ptune.models`; see `AutoPTuneModel` for how to load one.

    Attributes:
        ptune_config: the `PTuneConfig` of the prompts.
        compiled_prefix: a `CompiledPrefix` that was loaded in place of prompts, or ``None``.
        prompt_embeddings: `nn.Embedding` with weight [m, d], float32, or ``None``.
        intermediate_prompt_embeddings: `nn.Embedding` with weight [L·m, d], float32, row l·m + i, or ``None``.
    """

    base_class: ClassVar[type]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        config = copy.deepcopy(config)
        settings = take_settings(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.adopt(self.fresh_head())
        self.init_prompts(PTuneConfig(**settings))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """See `AutoPTuneModel.from_pretrained`."""
        return load_model(cls.base_class, path, lambda _: cls, *args, **kwargs)

    def init_prompts(self: Any, config: Any, tokenizer: Any = None) -> None:
        """Begin anew with the prompts of ``config``: a `PTuneConfig`, or a transformers config that bears its fields.

        ``tokenizer`` reads a ``prompt_init_text`` of strings; by default the base's own is loaded. Raises `ValueError`
        or `NotImplementedError`, and then changes nothing.
        """
        settings = PTuneConfig.of(config)
        shallow = deep = None
        if settings.tuning_mode is not None:
            if settings.deep:
                find_blocks(self.base_model, self.config)
            if settings.prefix_sharing is True and (reason := obstacle(self, settings)) is not None:
                raise ValueError(f"prefix_sharing: True, but {type(self).__name__} cannot share prompts: {reason}")
            tokenise = _tokenise_with(tokenizer or (lambda: tokenizer_of(self.origin.name)))
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
        return self.ptune_config.pre_seq_len if self.prompts_enabled else 0

    @contextmanager
    def disable_prompts(self: Any) -> Iterator[None]:
        """Inside the block the model is its bare base, dropout included; not thread-safe, as modules are changed."""
        self._disabled += 1
        self._set_dropout()
        try:
            yield
        finally:
            self._disabled -= 1
            self._set_dropout()

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
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        self._plan()

    def num_trainable_parameters(self: Any) -> int:
        """How many numbers train: prompts and head."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def save_prompts(self: Any, folder: str | os.PathLike[str]) -> None:
        """Write prompts and head, float32, with what they fit, to ``folder``; each file atomically."""
        self.save_pretrained(folder)

    def save_prefix(self: Any, folder: str | os.PathLike[str]) -> None:
        """Write the keys and values of the prompt rows, and the head, to ``folder``: all that inference needs.

        `load_prompts` and ``from_pretrained`` read it as they do a folder of prompts, but there is nothing in it to
        train but the head. Raises `ValueError` where the prompts are not shared.
        """
        if self.prefix_plan.path != "prefix":
            raise ValueError(f"save_prefix: prompts are not shared here: {self.prefix_plan.reason}")
        with torch.no_grad(), evaluating(self):
            compiled = CompiledPrefix(self._hooks.prefix.prefix())
        state = self.state_dict()
        tensors = {name: state[name] for name in self._head} | compiled.state_dict(prefix=checkpoint.COMPILED)
        checkpoint.write(folder, self._description(self.origin), tensors)

    def load_prompts(self: Any, folder: str | os.PathLike[str]) -> None:
        """Take over the prompts and head of ``folder``, or what `save_prefix` wrote there, with their mode and length.

        Raises `ptune.checkpoint.MisfitError` where they do not fit this base, saying why; nothing is changed then.
        """
        saved, tensors = checkpoint.read_config(folder), checkpoint.read_tensors(folder)
        settings = checkpoint.settings_of(saved)
        settings.prefix_sharing = self.ptune_config.prefix_sharing
        self._check_fit(saved, tensors)
        self._set_head(saved["head"])
        with torch.no_grad():
            for name in saved["head"]:
                self.get_parameter(name).copy_(tensors[name])
        compiled = [
            tensors[name]
            for name in checkpoint.compiled_names(settings, self.config.num_hidden_layers)
            if name in tensors
        ]
        self._install(settings, *(tensors.get(name) for name in checkpoint.PROMPTS), compiled)

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        save_base: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """`save_prompts`, under the name that Trainer calls; ``save_base=True`` adds the base, in a folder of its own.

        ``state_dict`` is the whole model's, if not its present one. Further keywords are those of transformers'
        ``save_pretrained``, for the base.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: expected False; upload the saved folder instead")
        origin, vocabulary = self.origin, self.get_input_embeddings().num_embeddings
        if save_base:
            # as it is now: its config may have been changed since it was loaded
            origin = Origin(checkpoint.BASE_FOLDER, checkpoint.base_config(self.config))
        elif vocabulary != self._loaded_vocabulary:
            raise ValueError(
                f"vocab_size: expected {self._loaded_vocabulary}, as it was loaded, got {vocabulary}; a folder of "
                "prompts does not hold resized embeddings: save with save_base=True"
            )
        state = self.state_dict() if state_dict is None else state_dict
        if save_base:
            folder = os.path.join(save_directory, checkpoint.BASE_FOLDER)
            base_state = {
                n: t for n, t in state.items() if n not in checkpoint.PROMPTS and not n.startswith(checkpoint.COMPILED)
            }
            with self._as_base():
                self.save_pretrained(folder, is_main_process=is_main_process, state_dict=base_state, **kwargs)
        if is_main_process:
            tensors = {name: state[name] for name in self._own_names()}
            checkpoint.write(save_directory, self._description(origin), tensors)

    def adopt(self: Any, head: Iterable[str]) -> None:
        """Make a stock model that has just become one of this class ready for prompts, with ``head`` to train."""
        check_base(self)
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
        self._cast_to_head()

    def _install(
        self: Any, settings: PTuneConfig, shallow: Tensor | None, deep: Tensor | None, compiled: Sequence[Tensor] = ()
    ) -> None:
        tables = (t if t is None else t.weight.detach() for t in self._tables())
        before = (self.ptune_config, *tables, () if self.compiled_prefix is None else self.compiled_prefix.tensors())
        try:
            self._put(settings, shallow, deep, compiled)
        except ValueError:  # they were to be shared, and the check found that they cannot be
            self._put(*before)
            raise

    def _tables(self: Any) -> tuple[nn.Embedding | None, nn.Embedding | None]:
        return self.prompt_embeddings, self.intermediate_prompt_embeddings

    def prompt_parameters(self: Any) -> list[nn.Parameter]:
        """The tables of prompts that the model has: shallow, then deep."""
        return [table.weight for table in self._tables() if table is not None]

    def _put(
        self: Any, settings: PTuneConfig, shallow: Tensor | None, deep: Tensor | None, compiled: Sequence[Tensor]
    ) -> None:
        keep_compiled = False
        if self._hooks is not None:
            keep_compiled = self._hooks.prefix.keep_compiled
            self._hooks.remove()
        self.ptune_config = settings
        self.prompt_embeddings = _table(shallow, self.get_input_embeddings())
        self.intermediate_prompt_embeddings = _table(deep, self.get_input_embeddings())
        self.compiled_prefix = CompiledPrefix.of(compiled, self.get_input_embeddings().weight) if compiled else None
        self._hooks = PromptHooks(self) if settings.tuning_mode is not None else None
        own = set(self._own_names())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in own)
        # Trainer, which loads a checkpoint of prompts into the whole model, expects exactly these to be missing
        self._keys_to_ignore_on_save = set(self.state_dict()) - own
        self._set_dropout()
        self._plan()
        if self._hooks is not None:
            self._hooks.prefix.keep_compiled = keep_compiled and self.prefix_plan.path == "prefix"

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

    def fresh_head(self: Any) -> list[str]:
        """The head of a model made without a checkpoint: all outside the body, but for the table of output words."""
        inside = {id(p) for p in self.base_model.parameters()}
        if (output := self.get_output_embeddings()) is not None:
            inside |= {id(p) for p in output.parameters()}
        return [name for name, parameter in self.named_parameters() if id(parameter) not in inside]

    def _set_head(self: Any, names: Iterable[str]) -> None:
        parameters = dict(self.named_parameters())
        self._head = sorted(name for name in names if name in parameters)  # a tied weight goes by its first name alone
        for name in self._head:
            parameters[name].data = parameters[name].data.float()

    def _cast_to_head(self: Any) -> None:
        """Let float32 head modules take what a half-precision body gives, and give it to those that stayed half."""
        pooler = getattr(self.base_model, "pooler", None)
        inside = {id(module) for module in self.base_model.modules()}
        if isinstance(pooler, nn.Module):
            inside -= {id(module) for module in pooler.modules()}
        for module in self.modules():
            if id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(_cast_inputs)

    def _own_names(self: Any) -> list[str]:
        prompts = zip(checkpoint.PROMPTS, self._tables(), strict=True)
        compiled = (
            []
            if self.compiled_prefix is None
            else checkpoint.compiled_names(self.ptune_config, self.config.num_hidden_layers)
        )
        return [name for name, table in prompts if table is not None] + compiled + self._head

    def _description(self: Any, origin: Origin) -> dict[str, Any]:
        settings = self.ptune_config
        return {
            "format_version": checkpoint.FORMAT_VERSION,
            "base": {
                "name": origin.name,
                "fingerprint": checkpoint.fingerprint(origin.config),
                "config": origin.config,
                "overrides": origin.overrides,
                "dtype": str(self.get_input_embeddings().weight.dtype).removeprefix("torch."),
                **dtypes_of(self),
            },
            "model_class": self.base_class.__name__,
            "tuning_mode": settings.tuning_mode,
            "pre_seq_len": settings.pre_seq_len,
            "deep_prompt_mode": settings.deep_prompt_mode,
            "prompt_init": settings.prompt_init,
            "base_dropout": settings.base_dropout,
            "embedding_size": self.get_input_embeddings().weight.shape[1],
            "hidden_size": self.config.hidden_size,
            "num_layers": self.config.num_hidden_layers,
            "head": list(self._head),
            "id2label": {str(i): label for i, label in self.config.id2label.items()} if self._head else None,
            "problem_type": self.config.problem_type if self._head else None,
        }

    def _check_fit(self: Any, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        here = self._description(self.origin)
        reasons = [
            f"{name}: expected {saved[name]} (the prompts'), got {here[name]} (the base's)"
            for name in ("embedding_size", "hidden_size", "num_layers")
            if saved[name] != here[name]
        ]
        now = checkpoint.fingerprint(checkpoint.base_config(self.config))
        if saved["base"]["fingerprint"] not in (here["base"]["fingerprint"], now):
            reasons += checkpoint.differences(saved["base"]["config"], here["base"]["config"])
        parameters = dict(self.named_parameters())
        lacking = [name for name in saved["head"] if name not in parameters]
        unsaved = [name for name in self._head if name not in saved["head"]]
        if lacking or unsaved:
            reasons.append(
                f"head: trained on {saved['model_class']}, got {here['model_class']}"
                f" (only there: {lacking or 'nothing'}, only here: {unsaved or 'nothing'})"
            )
        if saved["head"] and self._head and saved["id2label"] != here["id2label"]:
            reasons.append(f"labels: expected {saved['id2label']}, got {here['id2label']}")
        count, layers = saved["pre_seq_len"], saved["num_layers"]
        shapes = {name: parameters[name].shape for name in saved["head"] if name in parameters}
        names = checkpoint.compiled_names(checkpoint.settings_of(saved), self.config.num_hidden_layers)
        if any(name in tensors for name in names):
            for name in names:
                heads, _, width = tensors[name].shape if name in tensors and tensors[name].dim() == 3 else (1, 1, 1)
                shapes[name] = torch.Size((heads, count, width))
        elif saved["tuning_mode"] is not None:
            shapes[checkpoint.PROMPTS[0]] = torch.Size((count, saved["embedding_size"]))
        if saved["tuning_mode"] == "deep_ptune" and checkpoint.PROMPTS[0] in shapes:
            shapes[checkpoint.PROMPTS[1]] = torch.Size((layers * count, saved["hidden_size"]))
        found = {name: tensor.shape for name, tensor in tensors.items() if name not in lacking}
        reasons += [
            f"{name}: expected {_shape(shapes.get(name))}, got {_shape(found.get(name))}"
            for name in sorted(shapes.keys() | found.keys())
            if shapes.get(name) != found.get(name)
        ]
        if reasons:
            raise checkpoint.MisfitError("these prompts do not fit this model: " + "; ".join(reasons))

    @contextmanager
    def _as_base(self: Any) -> Iterator[None]:
        """Be the stock class, with the config it came with, for as long as it takes to save it."""
        own, ignored = type(self), self._keys_to_ignore_on_save
        self.__class__ = self.base_class
        self._keys_to_ignore_on_save = set()
        self._dropout.restore()
        try:
            yield
        finally:
            self.__class__ = own
            self._keys_to_ignore_on_save = ignored
            self._set_dropout()

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move everything, cast the base; prompts, head and their gradients keep their dtype bit for bit."""
        own = set(self._own_names())
        kept = {
            id(tensor)
            for name, parameter in self.named_parameters()
            if name in own
            for tensor in (parameter, parameter.grad)
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
        for module in self.modules():
            checkpoint_with = vars(module).get("_gradient_checkpointing_func")
            if checkpoint_with is not None and not isinstance(checkpoint_with, CheckpointWithCall):
                module._gradient_checkpointing_func = CheckpointWithCall(checkpoint_with)

    # What transformers asks of a class by reading its module's source, or its bases, is asked of the stock class.

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
    if dtype == torch.float64:
        rows = rows.double()
    return prepend(rows, torch.empty(batch_size, 0, rows.shape[1], dtype=dtype, device=rows.device))


def _cast_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def _tokenise_with(tokenizer: Any) -> Tokenise:
    def tokenise(text: str, special_tokens: bool) -> list[int]:
        nonlocal tokenizer
        if not hasattr(tokenizer, "encode"):
            tokenizer = tokenizer()
        return tokenizer.encode(text, add_special_tokens=special_tokens)

    return tokenise


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(tuple(shape))
