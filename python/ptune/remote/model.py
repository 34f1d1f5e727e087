"""Model classes whose blocks run on servers: ``DistributedLlamaForCausalLM`` and so on, with prompts or without."""

import copy
import inspect
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.auto_factory import _get_model_class

from .. import checkpoint
from ..anatomy import find_body
from ..attention import KEYWORD, Prefix
from ..cache import PrefixedCache
from ..call import current_call
from ..capture import Capture
from ..hooks import PromptHooks
from ..hub import OPTIONS
from ..inputs import CACHE, check_unpacked, named
from ..layout import Layout
from ..loading import load_model
from ..mixin import PTuneMixin
from ..models import class_of
from ..prefix import PrefixPath
from .relay import Retries
from .sequential import RemoteSequential
from .serve import Servers, connect
from .session import InferenceSession
from .shards import read_tensors
from .span import block_pattern, find_remote_blocks
from .standin import StandIn, cache_in, rows_in

_thread = threading.local()
# settings that may be others here than on the servers
_OF_NO_BLOCK = re.compile(r".*_token_id|tie_word_embeddings|initializer_range|summary_.*")
_RECORDS = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass
class _Running:
    """A running call of a body: what its stand-ins send beside hidden states."""

    mask: Tensor | None
    positions: Tensor | None
    prompts: Tensor | None
    starts: Tensor | None
    mode: str
    one_by_one: bool


class _SharedPath(PrefixPath):
    """The prefix path of a body whose blocks are on servers: these run the prompt rows that reach the first block."""

    def _hindrance(self, arguments: dict[str, Any], layout: Layout, text: Tensor) -> str | None:
        if any(map(_is_watched, self.model._blocks)):
            return "hooks on its blocks watch what each is given"
        return super()._hindrance(arguments, layout, text)

    def _packs(self, layout: Layout, text: Tensor) -> bool:
        return False  # servers are sent prompt rows once, and keep their keys and values for a session

    def _cache(self, body: Any, arguments: dict[str, Any]) -> Any:
        embeds = arguments.get("inputs_embeds")
        given = [*self.model.prompt_parameters(), *([] if embeds is None else [embeds])]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            _refuse_cache(arguments)
            return None
        return super()._cache(body, arguments)


class RemoteBlock(StandIn):
    """Stands for one block; the first runs them all, unless somebody watches what each is given."""

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__(block, index)
        self.blocks: RemoteSequential | None = None
        self.sessions: WeakKeyDictionary[Any, InferenceSession] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"sessions": WeakKeyDictionary()}  # a copy has none of the caches

    @torch.compiler.disable  # servers are asked by no graph
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        running: _Running | None = getattr(_thread, "running", None)
        if running is None or self.blocks is None:
            raise RuntimeError("remote blocks: expected a call of the model that they are of")
        cache, shared = cache_in(args, kwargs), kwargs.get(KEYWORD)
        if isinstance(shared, Capture):
            if self.blocks.link.unshared is not None:
                raise NotImplementedError(f"its servers share no prompt rows: {self.blocks.link.unshared}")
            # servers make keys and values of the rows, which are all that is known of them here
            shared.modules.append(self)
            shared.layers.append((hidden_states, hidden_states))
        elif running.one_by_one or self.index == 0:
            which = slice(self.index, self.index + 1) if running.one_by_one else slice(None)
            blocks, prompts = self.blocks[which], None if running.prompts is None else running.prompts[which]
            given = hidden_states, prompts, running.mask, running.positions
            how: dict[str, Any] = {"starts": running.starts, "mode": running.mode}
            if cache is not None:
                hidden_states = self._continue(blocks, cache, *given, **how)
            else:
                hidden_states = blocks(*given, **how, shared=None if shared is None else _rows_of(shared))
        return super().forward(hidden_states, *args, **kwargs)

    def _continue(self, blocks: RemoteSequential, cache: Any, *given: Any, **how: Any) -> Tensor:
        """The next columns of the session of ``blocks`` that ``cache`` stands for."""
        shared = None
        if isinstance(cache, PrefixedCache):
            cache, shared = cache.cache, _rows_of(cache.prefix)
        rows = rows_in(cache, self.index)
        session = self.sessions.get(cache)
        if rows is None:
            session = self.sessions[cache] = blocks.inference_session()
        elif (
            session is None
            or session.length != cache.get_seq_length(self.index)
            or (session.first, session.last) != (blocks.first, blocks.last)
        ):
            raise ValueError(
                f"{CACHE}: expected a cache as an earlier call of this model left it, its blocks watched or not "
                "as now, or an empty one; what remote blocks keep cannot be cropped or filled"
            )
        elif len(rows) == session.rows and torch.equal(rows.cpu(), torch.arange(len(rows))):
            rows = None
        return session.step(*given, **how, rows=rows, shared=shared)


def _rows_of(prefix: Prefix) -> Tensor:
    """The prompt rows [1, m, d] that stand-ins took for keys and values."""
    return prefix.layers[0][0]


class DistributedMixin(PTuneMixin):
    """A `PTuneMixin` whose blocks are on servers, and the rest of it here."""

    blocks_are_here: ClassVar[bool] = False

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__}: expected a call of from_pretrained(path)")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """See `AutoDistributedModel.from_pretrained`."""
        return load_distributed(cls.base_class, path, *args, **kwargs)

    @property
    def remote(self: Any) -> RemoteSequential:
        """The blocks."""
        return self._blocks[0].blocks

    @property
    def blocks_dtype(self: Any) -> torch.dtype:
        return self.remote.link.dtype

    def save_pretrained(self: Any, *args: Any, save_base: bool = False, **kwargs: Any) -> None:
        if save_base:
            raise ValueError("save_base: expected False, as the base's blocks are not here")
        super().save_pretrained(*args, **kwargs)

    @property
    def _blocks(self: Any) -> Any:
        return find_remote_blocks(find_body(self), self.config)

    def adopt(self: Any, head: Iterable[str]) -> None:
        super().adopt(head)
        self._remote_hooks: list[Any] = []
        self._hook_body()

    def _hook_body(self: Any) -> None:
        """See what the body is given after the hooks of prompts have changed it."""
        for handle in self._remote_hooks:
            handle.remove()
        body = find_body(self)
        self._remote_hooks = [
            body.register_forward_pre_hook(self._before_remote, with_kwargs=True),
            body.register_forward_hook(_after_remote, always_call=True),
        ]

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, but for what crops caches."""
        settings = kwargs.get("generation_config") or self.generation_config
        for name in ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"):
            if kwargs.get(name, getattr(settings, name, None)) is not None:
                raise NotImplementedError(f"{name}: expected None, as what remote blocks keep cannot be cropped")
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def compile_prompts(self: Any) -> None:
        raise ValueError("compile_prompts: expected blocks that are here; servers make keys and values for each call")

    def save_prefix(self: Any, folder: str | os.PathLike[str]) -> None:
        raise ValueError("save_prefix: expected blocks that are here, and not on servers; use save_prompts")

    def _new_hooks(self: Any) -> PromptHooks:
        hooks = super()._new_hooks()
        hooks.prefix = _SharedPath(self, hooks.body, hooks.parameters, hooks.first_position)
        self._hook_body()
        return hooks

    def _plan(self: Any) -> None:
        if self.ptune_config.base_dropout:
            raise ValueError("base_dropout: expected False, as servers run without dropout")
        if self.compiled_prefix is not None:
            raise ValueError("a compiled prefix: expected prompts, of which servers make keys and values by themselves")
        remote, wire_dtype = self.remote, self.remote.wire_dtype
        remote.wire_dtype = None  # what is rounded on the way says nothing of the paths
        try:
            super()._plan()
        finally:
            remote.wire_dtype = wire_dtype

    def _before_remote(self: Any, body: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        parameters = tuple(inspect.signature(body.forward).parameters)
        arguments = named(parameters, args, kwargs)
        for name in _RECORDS:
            wanted = arguments.get(name)
            if getattr(body.config, name, False) if wanted is None else wanted:
                raise NotImplementedError(f"{name}: expected False, as what remote blocks do is not recorded")
        mask = arguments.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise NotImplementedError("attention_mask: expected [b, n], from which servers make what blocks are given")
        call, table = current_call(), self.intermediate_prompt_embeddings
        prompts = starts = None
        if call is not None and table is not None:
            prompts = table.weight.view(self.config.num_hidden_layers, -1, table.weight.shape[1])
            starts = call.layout.column if call.placement is not None else None
            call.depth = self.config.num_hidden_layers
        check_unpacked(arguments.get("position_ids"), mask, "servers would let the texts read one another")
        watched = any(map(_is_watched, self._blocks))
        mode = self.ptune_config.deep_prompt_mode
        _thread.running = _Running(mask, arguments.get("position_ids"), prompts, starts, mode, watched)
        if "use_cache" in parameters and torch.is_grad_enabled():
            embeds = arguments.get("inputs_embeds")
            if any(t is not None and t.requires_grad for t in (embeds, prompts)):
                _refuse_cache(arguments)
                arguments |= {"use_cache": False, CACHE: None}
        return (), arguments


def _refuse_cache(arguments: dict[str, Any]) -> None:
    """Raises `NotImplementedError` for a cache that was asked for, where gradients are wanted."""
    if arguments.get(CACHE) is not None or arguments.get("use_cache"):
        raise NotImplementedError(
            f"{CACHE}, use_cache: expected none where gradients are wanted, which sessions are without; call "
            "the model under torch.no_grad()"
        )


def _is_watched(block: nn.Module) -> bool:
    hooks = block._forward_pre_hooks, block._forward_hooks, block._backward_pre_hooks, block._backward_hooks
    return any(hooks)


def _after_remote(body: nn.Module, args: tuple, output: Any) -> None:
    _thread.running = None


def distributed_class(base: type) -> type:
    """The class of ``base`` with its blocks on servers."""
    return class_of(base, "Distributed", DistributedMixin, f"`{base.__name__}` on servers.")


def load_distributed(
    loader: Any,
    path: str | os.PathLike[str],
    *args: Any,
    servers: Servers | str | None = None,
    retries: Retries | None = None,
    wire_dtype: str | None = None,
    micro_batch: int | None = None,
    **kwargs: Any,
) -> Any:
    """`ptune.loading.load_model` of a model whose blocks are served."""
    if servers is not None and not isinstance(servers, Servers | str):
        raise TypeError(f"servers: expected Servers or their name, got {servers!r}")
    if retries is not None and not isinstance(retries, Retries):
        raise TypeError(f"retries: expected Retries, got {retries!r}")
    if kwargs.get("quantization_config") is not None:
        raise NotImplementedError("quantization_config: expected None, as servers hold the blocks as they are")
    name = servers.name if isinstance(servers, Servers) else servers
    client = _Client(loader, name, retries, wire_dtype, micro_batch)
    return load_model(client, path, client.class_for, *args, **kwargs)


class _Client:
    """Loads what of a model is not in its blocks, as transformers would."""

    def __init__(
        self,
        loader: Any,
        servers: str | None,
        retries: Retries | None,
        wire_dtype: str | None,
        micro_batch: int | None,
    ) -> None:
        self.loader = loader
        self.servers = servers
        self.retries = retries
        self.wire_dtype, self.micro_batch = wire_dtype, micro_batch
        self.stock: Any = None

    def class_for(self, _: type) -> type:
        return distributed_class(self.stock)

    def from_pretrained(self, path: str, *, output_loading_info: bool, config: Any = None, **kwargs: Any) -> Any:
        """The model and transformers' loading info."""
        hub = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
        else:
            source = path if config is None else config
            config, kwargs = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **hub, **kwargs)
        kind = self.stock = self._stock_class(config)
        link = connect(self.servers or path, self.retries)
        own = checkpoint.base_config(AutoConfig.from_pretrained(path, **hub))
        if checkpoint.fingerprint(own) != link.fingerprint:
            raise ValueError(f"servers: expected those of {path}, got those of a model of another config")
        wanted = checkpoint.base_config(config).items()
        if changed := [n for n, value in wanted if own.get(n) != value and not _OF_NO_BLOCK.fullmatch(n)]:
            raise ValueError(
                f"{', '.join(changed)}: expected as in the config of {path}, with which its blocks are served"
            )
        with torch.device("meta"):
            body = find_body(kind(config))
            pattern = block_pattern(body, find_remote_blocks(body, config))
        state = read_tensors(path, lambda name: pattern.search(name) is None, **hub)
        model, info = _without_blocks(kind).from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **kwargs
        )
        model.config.name_or_path = model.name_or_path = path
        if model.can_generate():
            model.generation_config = _generation_config(path, model.generation_config, hub)
        remote = RemoteSequential(link, wire_dtype=self.wire_dtype, micro_batch=self.micro_batch)
        blocks: Any = find_remote_blocks(find_body(model), model.config)
        for block in blocks:
            block.blocks, block.is_causal = remote, link.causal
        return model, info

    def _stock_class(self, config: Any) -> Any:
        mapping = getattr(self.loader, "_model_mapping", None)
        if mapping is None:
            return self.loader
        if type(config) not in mapping:
            raise ValueError(f"{type(config).__name__}: {self.loader.__name__} has no class for it")
        return _get_model_class(config, mapping)


def _without_blocks(kind: Any) -> Any:
    """``kind`` with stand-ins for its blocks, under its name, by which transformers looks things up."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        blocks = find_remote_blocks(find_body(self), config)
        for index, block in enumerate(blocks):
            blocks[index] = RemoteBlock(block, index)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def _generation_config(path: str, default: Any, hub: dict[str, Any]) -> Any:
    try:
        return GenerationConfig.from_pretrained(path, **hub)
    except OSError:  # it is optional
        return default


class AutoDistributedModel:
    """A frozen base without a task head, whose blocks are on servers (transformers' ``AutoModel``)."""

    _loader: ClassVar[Any] = transformers.AutoModel

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__}: expected a call of from_pretrained(path)")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """`ptune.AutoPTuneModel.from_pretrained`, but for the blocks, which servers of ``path`` run.

        Reads nothing of the blocks. Raises `RemoteError` where they are not served.

        Args:
            servers: what `serve_blocks` returned, or the name that it was given; by default ``path``.
            retries: see `Retries`.
            wire_dtype, micro_batch: see `RemoteSequential`.
        """
        return load_distributed(cls._loader, path, *args, **kwargs)


class AutoDistributedModelForCausalLM(AutoDistributedModel):
    """Text generation (transformers' ``AutoModelForCausalLM``)."""

    _loader = transformers.AutoModelForCausalLM


class AutoDistributedModelForSequenceClassification(AutoDistributedModel):
    """Sequence classification (transformers' ``AutoModelForSequenceClassification``)."""

    _loader = transformers.AutoModelForSequenceClassification


class AutoDistributedModelForTokenClassification(AutoDistributedModel):
    """Token classification (transformers' ``AutoModelForTokenClassification``)."""

    _loader = transformers.AutoModelForTokenClassification
