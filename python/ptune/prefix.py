"""The prefix path: prompt rows run once for the whole batch, and all texts attend to their keys and values.

They run packed with the text, in one pass (see `Packed`), or apart, before it (see `Capture`). That is what the concat
path computes where prompt rows never read the text: in a causal model, and where every block overwrites them.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ptune_kernels import prepend

from .anatomy import device_of, per_layer_input
from .attention import KEYWORD, Behind, Prefix, autocast_dtype, cache_dtype_of
from .bridge import bridge, unshard_for_backward
from .cache import PackedCache, PrefixedCache
from .call import Call, running, set_call
from .capture import Capture
from .concat import matching
from .inputs import CACHE
from .layout import Layout, positions_of
from .packed import Packed
from .plan import Plan
from .userhooks import UserHooks
from .watched import Watched


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
        self._compiled: tuple[Watched, Prefix] | None = None
        self._products: list[tuple[nn.Module, Any]] = []
        self.user_hooks = UserHooks(body)

    def __getstate__(self) -> dict[str, Any]:
        # the weights of a copy count their versions anew
        return vars(self) | {"_compiled": None}

    def serves(self, arguments: dict[str, Any], layout: Layout, text: Tensor) -> bool:
        """Whether this call takes the prefix path."""
        if layout.mixture is not None:
            return layout.mixture.prefix is not None
        if (reason := self._hindrance(arguments, layout, text)) is None:
            return True
        if self.model.compiled_prefix is not None:
            raise ValueError(f"this call cannot be served by a compiled prefix: {reason}")
        return False

    def _hindrance(self, arguments: dict[str, Any], layout: Layout, text: Tensor) -> str | None:
        plan = self.plan
        if plan.path != "prefix":
            return plan.reason
        if not plan.holds_for(self.body):
            return "the attention implementation was changed on the config; call set_attn_implementation"
        if arguments.get("encoder_hidden_states") is not None:
            return "its cross-attention gives every row other keys"
        if plan.limit is not None:
            positions = arguments.get("position_ids")
            length = text.shape[1] if positions is None else max(text.shape[1], int(positions.max()) + 1)
            if (length := length + self.num_prompts) > plan.limit:
                return f"prompt and text have {length} positions, and the rotary embedding changes after {plan.limit}"
        if arguments.get("token_type_ids") is not None:
            if torch.compiler.is_compiling():
                return "a compiler cannot tell whether token_type_ids are the same where the rows begin"
            token_type = self._type(arguments, layout)
            if token_type is None:
                return "token_type_ids differ where the rows begin"
            if self.model.compiled_prefix is not None and (token_type != 0 or plan.causal):
                return "token_type_ids are not those that it was compiled with"
        return None

    def enter(self, body: Any, arguments: dict[str, Any], layout: Layout, text: Tensor) -> tuple[Call, dict[str, Any]]:
        """The call, and the body's arguments for the text alone."""
        mixture, token_type = layout.mixture, self._type(arguments, layout)
        arguments = arguments | self._placed(layout, arguments, text)
        mask = arguments["attention_mask"]
        recomputing = self.recomputed()
        cache = None if recomputing else self._cache(body, arguments)
        if cache is None:
            if CACHE in self.parameters:
                arguments[CACHE] = None
            if "use_cache" in self.parameters:
                arguments["use_cache"] = False
        if self._packs(layout, text):
            return self._pack(body, arguments, layout, text, token_type, cache)
        prefix = self.prefix(token_type) if mixture is None else mixture.prefix
        if cache is not None:
            padded = mixture is not None or (layout.padded and _holds_padding(mask))
            call = Call(layout, text.shape[1], layout.placement(), prefix=True, padded=padded, cache=cache)
            dtype = cache_dtype_of(body.config._attn_implementation)
            cached = PrefixedCache(cache, prefix.placed(call.placement), dtype)
            return call, arguments | {CACHE: cached, "attention_mask": layout.extend_mask(mask), KEYWORD: Behind()}
        if not torch.compiler.is_compiling() and any(_is_reentrant(module) for module in recomputing):
            embeds = arguments.get("inputs_embeds")
            if embeds is None:
                embeds = body.get_input_embeddings()(arguments["input_ids"])
            if per_layer_input(body) is not None:
                arguments["per_layer_inputs"] = body.get_per_layer_inputs(arguments.get("input_ids"), embeds)
            embeds, prefix = bridge(embeds, prefix)
            arguments |= {"input_ids": None, "inputs_embeds": embeds}
        call, mask = injected_call(layout, mask)
        if mixture is not None:
            prefix = prefix.placed(layout.placement())
        return call, arguments | {"attention_mask": mask, KEYWORD: prefix}

    def recomputed(self) -> list[nn.Module]:
        """The modules whose blocks checkpoints will run again in backward."""
        if not torch.is_grad_enabled():
            return []
        return [module for module in self.recomputing if module.gradient_checkpointing and module.training]

    def leave(self, call: Call, output: Any) -> None:
        """Give the caller the text's states, the cache that was given, and attentions by the concat path's columns."""
        if call.packed is not None:
            call.packed.leave(output)
        if call.cache is not None and output.get(CACHE) is not None:
            output[CACHE] = call.cache
        if call.columns is not None and (attentions := output.get("attentions")) is not None:
            output["attentions"] = tuple(a if a is None else _in_columns(a, call.columns) for a in attentions)

    def prefix(self, token_type: int | None = None) -> Prefix:
        """The keys and values of the prompt rows: compiled ones where these are kept and nothing trains, else anew."""
        if self.model.compiled_prefix is not None:
            return self.model.compiled_prefix.prefix(self.body.get_input_embeddings().weight.dtype)
        if self._runs_anew():
            return self._capture(token_type).prefix()
        prompts, config = self.model.prompt_parameters(), self.body.config
        # the number of layers is lowered for drafts
        how = token_type, autocast_dtype(prompts[0].device.type), config._attn_implementation, config.num_hidden_layers
        kept = self._compiled  # read once: other threads write it too
        if kept is None or not kept[0].is_still(how, prompts):
            watched = Watched(how, prompts, self.body)
            # not inference tensors: they may be read where gradients are enabled
            with torch.inference_mode(False), torch.no_grad():
                kept = self._compiled = watched, self._capture(token_type).prefix()
        return kept[1]

    def _runs_anew(self) -> bool:
        """Whether prompt rows are run in every call: unless keys and values are compiled and nothing trains."""
        if self.model.compiled_prefix is not None:
            return False
        if not self.keep_compiled or torch.compiler.is_compiling():
            return True
        return torch.is_grad_enabled() and any(
            weight.requires_grad for weight in (*self.model.prompt_parameters(), *self.body.parameters())
        )

    def _packs(self, layout: Layout, text: Tensor) -> bool:
        """Whether this call runs prompt rows and text in one pass."""
        packs = self.plan.packs
        if packs is None:
            # Of rows that are overwritten, and run by themselves, only keys and values are computed: less work, which a
            # CPU notices, in two passes to launch, which a GPU waits for.
            packs = not self._overwrites or text.device.type != "cpu"
        return packs and layout.mixture is None and self._runs_anew() and not self.user_hooks.present()

    @property
    def _overwrites(self) -> bool:
        settings = self.model.ptune_config
        return settings.deep and settings.deep_prompt_mode == "overwrite"

    def _pack(
        self, body: Any, arguments: dict[str, Any], layout: Layout, text: Tensor, token_type: int | None, cache: Any
    ) -> tuple[Call, dict[str, Any]]:
        """The call, and the body's arguments for prompt rows and text as one sequence; ``cache``: that it fills."""
        mask, prompts = arguments["attention_mask"], self.model.prompt_embeddings.weight
        if cache is None:
            (call, keys), cached = injected_call(layout, mask), None
        else:  # which has each prompt in its place, and not before all
            padded = layout.padded and _holds_padding(mask)
            call = Call(layout, text.shape[1], prefix=True, padded=padded, cache=cache)
            keys = layout.extend_mask(mask)
            dtype = cache_dtype_of(body.config._attn_implementation)
            cached = arguments[CACHE] = PackedCache(cache, self.num_prompts, text.shape[:2], layout.placement(), dtype)
        call.packed = Packed(self.num_prompts, keys, call.padded, self._overwrites, cached)
        return call, call.packed.arguments(body, arguments, prompts, self.first_position, token_type)

    def keep_anew(self) -> None:
        """From the next call on, keep the keys and values until they change."""
        self.keep_compiled = True
        self.forget()

    def forget(self) -> None:
        """Drop the kept keys and values."""
        self._compiled = None

    def discover(self) -> list[nn.Module]:
        """The attentions that prompt rows pass, which are given their number in that order."""
        with torch.enable_grad():
            capture = self._capture(None, probing=True)
            capture.mark_unread()
        self._products = [(m, m.weight) for m in self.body.modules() if isinstance(m, nn.Linear)]
        chunked = getattr(self.body.config, "chunk_size_feed_forward", 0)  # which divides the length
        # prompt rows have one mask in all blocks
        narrow = capture.window is not None and capture.window < self.num_prompts and not capture.overwritten
        if chunked or narrow:
            self.plan.run_apart(
                "its feed-forward is cut into chunks" if chunked else "the prompt is longer than its window"
            )
        modules = capture.modules
        for depth, module in enumerate(modules):
            vars(module)["ptune_depth"] = depth
        return modules

    def _capture(self, token_type: int | None, probing: bool = False) -> Capture:
        weight, device = self.body.get_input_embeddings().weight, device_of(self.body.get_input_embeddings())
        table, layers = self.model.prompt_embeddings, self.model.intermediate_prompt_embeddings
        # where a compiled prefix was loaded, rows are run to find the attentions alone
        prompts = torch.zeros(self.num_prompts, weight.shape[1], device=device) if table is None else table.weight
        deep = None if layers is None else layers.weight
        return self.capture(prompts, deep, self.model.ptune_config.deep_prompt_mode, token_type, probing)

    def capture(
        self, prompts: Tensor, deep: Tensor | None, mode: str, token_type: int | None = None, probing: bool = False
    ) -> Capture:
        """Run prompt rows alone: ``prompts`` [m, d], and ``deep`` [L·m, d] at the blocks, in ``mode``."""
        body, count = self.body, prompts.shape[0]
        embedding = body.get_input_embeddings()
        weight, device = embedding.weight, device_of(embedding)
        none = torch.empty(1, 0, weight.shape[1], dtype=weight.dtype, device=device)
        if "forward" in vars(embedding) and not hasattr(embedding, "_hf_hook"):  # it may cast (see `keep_fp32`)
            none = none.to(embedding(torch.empty(1, 0, dtype=torch.long, device=device)).dtype)
        blocks = () if deep is None else deep.view(-1, count, deep.shape[1]).unbind(0)
        capture = Capture(blocks, len(blocks) > 0 and mode == "overwrite")
        if probing:
            capture.products = []
        # a weight that was tied to another since it was marked may be read by now
        capture.marked = capture.overwritten and all(
            module._parameters.get("weight") is weight for module, weight in self._products
        )
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
        if (own := per_layer_input(body)) is not None:
            arguments["per_layer_inputs"] = own.expand(1, count, *own.shape)
        outer = running()
        set_call(Call(Layout(count, 1, None, device), 0, capture=capture, body=body, outer=outer))
        try:
            # a hook may multiply matrices of its own
            with nullcontext() if self.user_hooks.present() else capture.skipping():
                body(**arguments)
        finally:
            set_call(outer)
        unshard_for_backward(body, capture)
        return capture

    def _type(self, arguments: dict[str, Any], layout: Layout) -> int | None:
        """The token type of prompt rows, where it is given and the same in every row of the batch."""
        types = arguments.get("token_type_ids")
        if types is None or torch.compiler.is_compiling():
            return None
        column = layout.column.to(types.device)[:, None].long()
        first = types.expand(len(column), -1).gather(1, column)
        return int(first[0, 0]) if bool((first == first[0]).all()) else None

    def _placed(self, layout: Layout, arguments: dict[str, Any], text: Tensor) -> dict[str, Any]:
        """The mask and the positions of the text."""
        batch_size, length = text.shape[:2]
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        placed: dict[str, Any] = {}
        if "position_ids" in self.parameters:
            if positions is None:
                positions = torch.arange(length, device=text.device)[None] if mask is None else positions_of(mask)
                positions = positions + self.first_position
            placed["position_ids"] = positions.to(text.device) + layout.lengths
        if mask is None:
            mask = torch.ones(batch_size, length, dtype=torch.long, device=text.device)
        placed["attention_mask"] = mask.to(text.device)
        return placed

    def _cache(self, body: Any, arguments: dict[str, Any]) -> Any:
        """The empty cache that this call is to fill, if any."""
        if CACHE not in self.parameters:
            return None
        if (past := arguments.get(CACHE)) is not None:
            return past
        wanted = arguments.get("use_cache")
        if wanted is None:
            # a training step has no use for one
            wanted = getattr(body.config, "use_cache", False) and not (torch.is_grad_enabled() and body.training)
        return DynamicCache(config=body.config) if wanted and self.plan.causal else None


def injected_call(layout: Layout, mask: Tensor) -> tuple[Call, Tensor]:
    """The call of a text under ``mask`` [b, n], before which attentions set the prompts, and its mask of all keys.

    The one prompt of all rows stands first, as an op writes [prefix ; text] without looking at the mask.
    """
    call = Call(layout, mask.shape[1], prefix=True, injected=layout.num_prompts)
    if layout.mixture is not None:
        call.padded = True
        return call, layout.extend_mask(mask)
    call.padded = layout.padded and _holds_padding(mask)
    call.columns = layout.columns_of_keys(mask.shape[1]) if call.padded else None
    return call, torch.cat([mask.new_ones(mask.shape[0], layout.num_prompts), mask], 1)


def _is_reentrant(module: Any) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    checkpoint = getattr(checkpoint, "checkpoint", checkpoint)
    return getattr(checkpoint, "keywords", {}).get("use_reentrant", True)


def _holds_padding(mask: Tensor) -> bool:
    """Whether any token is masked; taken for granted where a compiler cannot know."""
    return torch.compiler.is_compiling() or not bool(mask.all())


def _in_columns(attention: Tensor, columns: Tensor) -> Tensor:
    """[b, h, n, m + n], its keys in the order of ``[prefix ; text]``, by ``columns`` [b, m + n]."""
    index = columns[:, None, None].expand_as(attention)
    return torch.zeros_like(attention).scatter(3, index, attention)
