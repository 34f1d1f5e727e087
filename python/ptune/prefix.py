"""The prefix path: prompt rows run once for the whole batch, and the text alone attends to their keys and values.

It equals the concat path where prompt rows never read the text: in a causal model, and where every block overwrites
them (see `plan`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from transformers import Cache, DynamicCache

from ptune_kernels import Placement, prepend

from .attention import KEYWORD, Prefix
from .call import Call, current_call, set_call
from .capture import Capture
from .concat import matching
from .layout import Layout, positions_of
from .plan import Plan


class PrefixPath:
    """What goes into the body of ``model`` (a `PTuneMixin` with prompts), and what comes out."""

    def __init__(self, model: Any, body: Any, parameters: tuple[str, ...], first_position: int) -> None:
        self.model = model
        self.body = body
        self.parameters = parameters
        self.first_position = first_position
        self.num_prompts = model.ptune_config.pre_seq_len
        self.plan = Plan("concat", "not planned yet")
        self.recomputing = [module for module in body.modules() if hasattr(module, "gradient_checkpointing")]
        self.keep_compiled = False
        self._compiled: tuple[tuple, Prefix] | None = None

    def serves(self, arguments: dict[str, Any], layout: Layout, text: Tensor) -> bool:
        """Whether this call takes the prefix path."""
        if (reason := self._hindrance(arguments, layout, text)) is None:
            return True
        if self.model.compiled_prefix is not None:
            raise ValueError(f"this call cannot be served by a compiled prefix: {reason}")
        return False

    def _hindrance(self, arguments: dict[str, Any], layout: Layout, text: Tensor) -> str | None:
        plan, length = self.plan, self.num_prompts + text.shape[1]
        if plan.path != "prefix":
            return plan.reason
        if not plan.holds_for(self.body):
            return "the attention implementation was changed on the config; call set_attn_implementation"
        if plan.limit is not None and length > plan.limit:
            return f"prompt and text have {length} positions, and the rotary embedding changes after {plan.limit}"
        if arguments.get("token_type_ids") is not None:
            token_type = self._type(arguments, layout)
            if token_type is None:
                return "token_type_ids differ where the rows begin"
            if self.model.compiled_prefix is not None and (token_type != 0 or plan.causal):
                return "token_type_ids are not those that it was compiled with"
        return None

    def enter(self, body: Any, arguments: dict[str, Any], layout: Layout, text: Tensor) -> tuple[Call, dict[str, Any]]:
        """The call, and the body's arguments for the text alone."""
        length = text.shape[1]
        call = Call(layout, length, prefix=True)
        prefix = self.prefix(self._type(arguments, layout))
        arguments = arguments | self._placed(layout, arguments, text)
        recomputing = torch.is_grad_enabled() and any(m.gradient_checkpointing and m.training for m in self.recomputing)
        if (cache := None if recomputing else self._cache(body, arguments)) is not None:
            call.cache, call.placement = cache, layout.placement()
            mask = arguments["attention_mask"][:, self.num_prompts :]
            arguments |= {
                "past_key_values": PrefixedCache(cache, prefix, call.placement),
                "attention_mask": layout.extend_mask(mask),
            }
            return call, arguments
        if recomputing:
            embeds = arguments.get("inputs_embeds")
            if embeds is None:
                embeds = body.get_input_embeddings()(arguments["input_ids"])
            embeds, prefix = _bridge(embeds, prefix)
            arguments |= {"input_ids": None, "inputs_embeds": embeds}
        if "past_key_values" in self.parameters:
            arguments["past_key_values"] = None
        if "use_cache" in self.parameters:
            arguments["use_cache"] = False
        call.injected, call.padded = self.num_prompts, layout.padded and _holds_padding(arguments["attention_mask"])
        call.columns = layout.columns_of_keys(length) if call.padded else None
        return call, arguments | {KEYWORD: prefix}

    def leave(self, call: Call, output: Any) -> None:
        """Give the caller the cache that was given, and attentions by the columns that the concat path has."""
        if call.cache is not None and output.get("past_key_values") is not None:
            output["past_key_values"] = call.cache
        if call.columns is not None and (attentions := output.get("attentions")) is not None:
            output["attentions"] = tuple(a if a is None else _in_columns(a, call.columns) for a in attentions)

    def prefix(self, token_type: int | None = None) -> Prefix:
        """The keys and values of the prompt rows: compiled ones where these are kept and nothing trains, else anew."""
        if self.model.compiled_prefix is not None:
            return self.model.compiled_prefix.prefix()
        weights = [
            table.weight
            for table in (self.model.prompt_embeddings, self.model.intermediate_prompt_embeddings)
            if table is not None
        ]
        if not self.keep_compiled or (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
            return self._capture(token_type).prefix()
        dtype = self.body.get_input_embeddings().weight.dtype
        state = (token_type, dtype, torch.is_autocast_enabled(weights[0].device.type), weights[0].device)
        stamp = (*state, *((w.data_ptr(), w._version) for w in weights))
        if self._compiled is None or self._compiled[0] != stamp:
            # not inference tensors: they may be read where gradients are enabled
            with torch.inference_mode(False), torch.no_grad():
                self._compiled = stamp, self._capture(token_type).prefix()
        return self._compiled[1]

    def discover(self) -> list[nn.Module]:
        """The attentions that prompt rows pass, which are given their number in that order."""
        with torch.enable_grad():
            capture = self._capture(None, probing=True)
            capture.mark_unread()
        modules = capture.modules
        for depth, module in enumerate(modules):
            vars(module)["ptune_depth"] = depth
        return modules

    def _capture(self, token_type: int | None, probing: bool = False) -> Capture:
        body, count = self.body, self.num_prompts
        weight = body.get_input_embeddings().weight
        device = weight.device
        none = torch.empty(1, 0, weight.shape[1], dtype=weight.dtype, device=device)
        table = self.model.prompt_embeddings
        # where a compiled prefix was loaded, rows are run to find the attentions alone
        prompts = torch.zeros(count, weight.shape[1], device=device) if table is None else table.weight
        layers = self.model.intermediate_prompt_embeddings
        deep = () if layers is None else layers.weight.view(-1, count, layers.weight.shape[1]).unbind(0)
        capture = Capture(deep, bool(deep) and self.model.ptune_config.deep_prompt_mode == "overwrite")
        if probing:
            capture.products = []
        arguments: dict[str, Any] = {
            "inputs_embeds": prepend(matching(prompts, none), none),
            "attention_mask": torch.ones(1, count, dtype=torch.long, device=device),
            "output_hidden_states": False,
            "output_attentions": False,
            "return_dict": True,
            KEYWORD: capture,
        }
        if "position_ids" in self.parameters:
            arguments["position_ids"] = torch.arange(count, device=device)[None] + self.first_position
        if token_type is not None:
            arguments["token_type_ids"] = torch.full((1, count), token_type, dtype=torch.long, device=device)
        if "use_cache" in self.parameters:
            arguments["use_cache"] = False
        outer = current_call()
        set_call(Call(Layout(count, 1, None, device), 0, capture=capture))
        try:
            with capture.skipping():
                body(**arguments)
        finally:
            set_call(outer)
        if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            _unshard_for_backward(body, capture)
        return capture

    def _type(self, arguments: dict[str, Any], layout: Layout) -> int | None:
        """The token type of prompt rows, where it is given and the same in every row of the batch."""
        types = arguments.get("token_type_ids")
        if types is None or torch.compiler.is_compiling():
            return None
        first = types.gather(-1, layout.column.to(types.device)[: types.shape[0], None].long())
        return int(first[0, 0]) if bool((first == first[0]).all()) else None

    def _placed(self, layout: Layout, arguments: dict[str, Any], text: Tensor) -> dict[str, Any]:
        """The mask of ``[prefix ; text]`` and the positions of the text."""
        batch_size, length = text.shape[:2]
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        placed: dict[str, Any] = {}
        if "position_ids" in self.parameters:
            if positions is None:
                positions = torch.arange(length, device=text.device)[None] if mask is None else positions_of(mask)
                positions = positions + self.first_position
            placed["position_ids"] = positions.to(text.device) + self.num_prompts
        if mask is None:
            mask = torch.ones(batch_size, length, dtype=torch.long, device=text.device)
        mask = mask.to(text.device)
        placed["attention_mask"] = torch.cat([mask.new_ones(batch_size, self.num_prompts), mask], 1)
        return placed

    def _cache(self, body: Any, arguments: dict[str, Any]) -> Any:
        """The empty cache that this call is to fill, if any."""
        if "past_key_values" not in self.parameters:
            return None
        if (past := arguments.get("past_key_values")) is not None:
            return past
        wanted = arguments.get("use_cache")
        if wanted is None:
            # a training step has no use for one
            wanted = getattr(body.config, "use_cache", False) and not (torch.is_grad_enabled() and body.training)
        return DynamicCache(config=body.config) if wanted and self.plan.causal else None


def _holds_padding(mask: Tensor) -> bool:
    """Whether any token is masked; taken for granted where a compiler cannot know."""
    return torch.compiler.is_compiling() or not bool(mask.all())


def _in_columns(attention: Tensor, columns: Tensor) -> Tensor:
    """[b, h, n, m + n], its keys in the order of ``[prefix ; text]``, by ``columns`` [b, m + n]."""
    index = columns[:, None, None].expand_as(attention)
    return torch.zeros_like(attention).scatter(3, index, attention)


class CompiledPrefix(nn.Module):
    """The keys and values of prompt rows, as buffers ``key_l`` and ``value_l`` [h, m, head_dim] of each layer l."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.num_layers = len(prefix.layers)
        for depth, (key, value) in enumerate(prefix.layers):
            self.register_buffer(f"key_{depth}", key)
            self.register_buffer(f"value_{depth}", value)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], like: Tensor) -> "CompiledPrefix":
        """From what `tensors` returns, where ``like`` lies and in its dtype."""
        moved = [tensor.to(like.device, like.dtype) for tensor in tensors]
        return cls(Prefix(list(zip(moved[::2], moved[1::2], strict=True))))

    def tensors(self) -> list[Tensor]:
        """The key of layer 0, its value, the key of layer 1, …"""
        return [getattr(self, f"{kind}_{depth}") for depth in range(self.num_layers) for kind in ("key", "value")]

    def prefix(self) -> Prefix:
        tensors = self.tensors()
        return Prefix(list(zip(tensors[::2], tensors[1::2], strict=True)))


class PrefixedCache(Cache):
    """Stands in for an empty cache while text is run, and writes the prefix with it, in its place in each row."""

    def __init__(self, cache: Any, prefix: Prefix, placement: Placement | None) -> None:
        self.cache, self.prefix, self.placement = cache, prefix, placement
        self.num_prompts = prefix.layers[0][0].shape[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self.prefix.before(layer_idx, key_states, value_states, self.placement)
        return self.cache.update(key, value, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.cache.get_seq_length(layer_idx) + self.num_prompts

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length + self.num_prompts, layer_idx)

    def __getattr__(self, name: str) -> Any:
        if name == "cache":
            raise AttributeError(name)
        return getattr(self.cache, name)


def _unshard_for_backward(body: nn.Module, capture: Capture) -> None:
    """Gather sharded weights (FSDP2) before a gradient enters a block by its keys and values.

    FSDP does so where it enters by the block's output, which is the only way that it knows.
    """
    owners: dict[nn.Module, FSDPModule] = {}
    for module in body.modules():
        if isinstance(module, FSDPModule):
            owners |= dict.fromkeys(module.modules(), module)  # the innermost comes last
    for attention, tensors in zip(capture.modules, capture.layers, strict=True):
        if (owner := owners.get(attention)) is not None:
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(partial(_unshard, owner))


def _unshard(owner: FSDPModule, grad: Tensor) -> None:
    owner.unshard()


def _bridge(embeds: Tensor, prefix: Prefix) -> tuple[Tensor, Prefix]:
    """The text and the prefix, such that each layer's recomputation reaches leaves of its own, and no further.

    A reentrant checkpoint runs a backward for each layer, which must not free what the layers share: the graph behind
    the prefix. So the layers get detached leaves, and what these gather reaches that graph through the text, whose
    backward is the last of all.
    """
    tensors = [tensor for layer in prefix.layers for tensor in layer]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
    return _Bridge.apply(embeds, leaves, *tensors), Prefix(pairs)


class _Bridge(Function):
    @staticmethod
    def forward(ctx: Any, embeds: Tensor, leaves: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.leaves = leaves
        return embeds.view_as(embeds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return (grad if ctx.needs_input_grad[0] else None, None, *gathered)
