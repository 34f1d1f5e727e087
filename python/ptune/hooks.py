"""The hooks by which a stock model bears prompts: around its body, and before its blocks.

Each call of the body takes one of two paths, which mean the same: `ConcatPath` or `PrefixPath`.
"""

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, logging

from ptune_kernels import Placement, overwrite

from .anatomy import find_blocks, find_body, position_limit
from .call import Bare, Call, call_of, end_call, running, set_call, still_running
from .concat import ConcatPath, matching
from .inputs import CACHE, check_inputs, named
from .layout import Layout, first_column, ones_and_zeros, positions_of, states_at
from .mixture import Mixture, current_mixture
from .pooling import pool
from .prefix import PrefixPath

_thread = threading.local()
_logger: Any = logging.get_logger(__name__)
_BEHIND = "ptune_prompt_rows"  # of a cache: behind how many its text stands


class PromptHooks:
    """Hooks on the body of ``model`` (a `PTuneMixin` with prompts) and on its blocks, removable together."""

    def __init__(self, model: Any) -> None:
        body = find_body(model)
        deep = model.ptune_config.deep and model.blocks_are_here
        blocks = find_blocks(body, model.config) if deep else ()  # or it raises, before anything is hooked
        self.model = model
        self.body = body
        self.parameters = tuple(inspect.signature(body.forward).parameters)
        self.model_parameters = tuple(inspect.signature(model.forward).parameters)
        self.first_position, self.position_limit = position_limit(body)
        # each row has positions of its own, unless the body numbers columns by itself, or has a table of a causal mask
        tables = any(b.dim() == 4 and b.shape[-1] == b.shape[-2] > 1 for b in body.buffers())
        self.padding_has_no_positions = "position_ids" in self.parameters and not tables
        self.num_prompts = model.ptune_config.pre_seq_len
        self.concat = ConcatPath(model, self.parameters, self.first_position)
        self.prefix = PrefixPath(model, body, self.parameters, self.first_position)
        self.handles = [
            body.register_forward_pre_hook(self.before_body, with_kwargs=True),
            body.register_forward_hook(self.after_body),
            # even where an exception kept `after_body` from running
            body.register_forward_hook(self.end_body, always_call=True),
        ]
        if body is not model:
            self.handles += [
                model.register_forward_pre_hook(self.before_model, with_kwargs=True),
                model.register_forward_hook(self.after_model),
            ]
        self.handles += [block.register_forward_pre_hook(self.before_block, with_kwargs=True) for block in blocks]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        set_call(still_running())

    def before_body(self, body: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if getattr(body, "_is_replica", False):
            raise NotImplementedError(
                f"{type(self.model).__name__}: expected no replicas of nn.DataParallel, in which Trainer wraps a model "
                "where it finds several GPUs; make one visible (CUDA_VISIBLE_DEVICES=0), or start a process for each "
                "(torchrun)"
            )
        outer = running()
        if isinstance(outer, Call) and outer.capture is not None and outer.body is self.body and not outer.begun:
            outer.begun = True
            return None
        outer = still_running(self.body)
        set_call(Bare(self.body, outer))
        note_body(reached=True)
        mixture = current_mixture(self.model)
        arguments = named(self.parameters, args, kwargs)
        if mixture is None and not self.model.prompts_enabled:
            _check_bare(arguments.get(CACHE))
            return None
        check_inputs(arguments, self.parameters)
        text = arguments["inputs_embeds"] if arguments.get("input_ids") is None else arguments["input_ids"]
        past, length = arguments.get(CACHE), text.shape[1]
        mask = arguments["attention_mask"] = self._mask(arguments, text, mixture)
        of_rows = None if mixture is None else mixture.expanded(text.shape[0])
        layout = Layout(self.num_prompts, text.shape[0], mask, text.device, of_rows)
        if past is not None and _is_resumed(past, mask, length):
            # the prompt is in the cache: only what is said about the text's place changes
            self._check_resumed(layout, past, mask, length)
            return (), arguments | self._resumed(layout, mask, arguments.get("position_ids"), length)
        self._check_length(layout, length, mask)
        if (return_dict := arguments.get("return_dict")) is None:
            return_dict = getattr(body.config, "return_dict", True)
        if "logits_to_keep" in self.parameters:
            arguments["logits_to_keep"] = 0  # or it would drop rows that its head drops, if it was not done here
        path = self.prefix if self.prefix.serves(arguments, layout, text) else self.concat
        call, arguments = path.enter(body, arguments, layout, text)
        call.as_tuple, call.body, call.outer = not return_dict, self.body, outer
        call.recomputed = len(self.prefix.recomputed()) > 0
        set_call(call)
        return (), arguments | {"return_dict": True}

    def _mask(self, arguments: dict[str, Any], text: Tensor, mixture: Mixture | None) -> Tensor | None:
        """The caller's, of zeros and ones; of a mixture always one, as the prompts of its rows leave room unfilled."""
        mask, past = arguments.get("attention_mask"), arguments.get(CACHE)
        if mask is not None:
            return ones_and_zeros(mask)
        if mixture is None:
            return None
        # generate leaves out a mask of ones
        seen = 0 if past is None else int(past.get_seq_length())
        columns = text.shape[1] + max(0, seen - mixture.max_length)
        return torch.ones(text.shape[0], columns, dtype=torch.long, device=text.device)

    def before_block(
        self, block: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        call = call_of(self.body)
        if call is None and _in_backward() and self.model.prompts_enabled:
            raise NotImplementedError(
                f"{type(block).__name__}: recomputed by a checkpoint that knows nothing of deep prompts; use "
                "gradient_checkpointing_enable() in place of a wrapper around the blocks"
            )
        if not isinstance(call, Call) or (call.prefix and call.packed is None) or not self._is_deep(call):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        expected = (call.layout.column.shape[0], call.layout.num_prompts + call.length)
        if call.packed is not None:
            expected = (1, call.packed.rows)
        if hidden.dim() != 3 or hidden.shape[:2] != expected:
            raise NotImplementedError(
                f"{type(block).__name__}: deep prompts need block inputs of shape [{expected[0]}, {expected[1]}, d], "
                f"got {tuple(hidden.shape)}"
            )
        depth, layout = call.depth, call.layout
        call.depth += 1
        if call.capture is not None:
            hidden = call.capture.before_block(hidden)
            hidden = _overwrite(hidden, call.capture.deep[depth], None, depth, call.capture.mode)
        elif layout.mixture is not None:
            for deep in layout.mixture.deep:
                placement = layout.mixture.place_over(deep, layout.column)
                hidden = _overwrite(hidden, deep.pools[depth], placement, depth, deep.mode)
        else:
            mode, prompts = self.model.ptune_config.deep_prompt_mode, self._deep(call, hidden, depth)
            if call.packed is not None and mode == "overwrite" and depth > 0:
                # the prompt stands once, and so the op does no more than this, whose nodes cost the host less
                prompts = matching(prompts, hidden).to(hidden.dtype)
                hidden = torch.cat([prompts[None], hidden[:, self.num_prompts :]], 1)
            else:
                hidden = _overwrite(hidden, prompts, call.placement, depth, mode)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def _deep(self, call: Call, hidden: Tensor, depth: int) -> Tensor:
        """The deep prompts [m, d] of the block at ``depth``."""
        weight, count = self.model.intermediate_prompt_embeddings.weight, self.num_prompts
        if call.recomputed:
            # a checkpoint must see the parameter, not a view made outside it
            return weight[depth * count : (depth + 1) * count]
        if depth == 0:
            # all at once, or the table would get a gradient of its whole size from each block
            first, others = weight.split([count, len(weight) - count])
            if call.packed is not None and self.model.ptune_config.deep_prompt_mode == "overwrite":
                others = others.to(hidden.dtype)  # in which each becomes the one prompt row that there is
            call.deep = first, *others.view(len(others) // count, count, others.shape[1]).unbind()
        return call.deep[depth]

    def after_body(self, body: nn.Module, args: tuple, output: Any) -> Any:
        call = call_of(self.body)
        if not isinstance(call, Call) or call.capture is not None:
            return None
        if not isinstance(output, ModelOutput):
            raise NotImplementedError(f"{type(body).__name__}: expected a ModelOutput, got {type(output).__name__}")
        if call.prefix:
            self.prefix.leave(call, output)
        else:
            count = self.model.config.num_hidden_layers  # which assistant_early_exit lowers for a while
            if self._is_deep(call) and call.depth != count:
                raise RuntimeError(f"{type(body).__name__}: expected {count} blocks to run, {call.depth} did")
            self.leave_concat(call, output)
        if (cache := output.get(CACHE)) is not None:
            setattr(cache, _BEHIND, call.layout.num_prompts)
        if output.get("pooler_output") is not None:
            output["pooler_output"] = pool(body, states_at(call.layout.column, output["last_hidden_state"]))
        return output.to_tuple() if call.as_tuple else output

    def end_body(self, body: nn.Module, args: tuple, output: Any) -> None:
        call = call_of(self.body)
        if call is not None and not (isinstance(call, Call) and call.capture is not None):
            end_call(call)

    def leave_concat(self, call: Call, output: Any) -> None:
        self.concat.leave(call, output)

    def _is_deep(self, call: Call) -> bool:
        if call.capture is not None:
            return len(call.capture.deep) > 0
        if call.layout.mixture is not None:
            return len(call.layout.mixture.deep) > 0
        return self.model.intermediate_prompt_embeddings is not None

    def before_model(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        note_body(reached=False)
        arguments = named(self.model_parameters, args, kwargs)
        mask, labels = arguments.get("attention_mask"), arguments.get("labels")
        if labels is None or not isinstance(mask, Tensor) or not model.can_generate() or not model.prompts_enabled:
            return None
        if mask.dim() != 2 or mask.shape != labels.shape:
            return None  # the body refuses it
        # the column before a row's first token is the prompt's, or padding: nothing there predicts that token
        first = first_column(ones_and_zeros(mask).to(labels.device))[:, None]
        column = torch.arange(mask.shape[1], device=labels.device)
        arguments["labels"] = masked = labels.masked_fill(column == first, -100)
        if (count := arguments.get("num_items_in_batch")) is not None:
            # Trainer has counted a first token where padding stands before it: at a factor of 1, to the same bits
            counted, kept = ((its[:, 1:] != -100).sum() for its in (labels, masked))
            arguments["num_items_in_batch"] = count * (kept / counted.clamp_min(1))
        if (shifted := arguments.get("shift_labels")) is not None:
            arguments["shift_labels"] = shifted.masked_fill(column == first - 1, -100)
        return (), arguments

    def after_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        if not _thread.reached:
            raise NotImplementedError(
                f"{type(model).__name__}: its forward goes past the body, where prompts are put in"
            )

    def _resumed(self, layout: Layout, mask: Tensor | None, positions: Tensor | None, length: int) -> dict[str, Any]:
        """Mask and positions of text that follows what the cache holds."""
        resumed = {} if mask is None else {"attention_mask": layout.extend_mask(mask)}
        if "position_ids" in self.parameters:
            if positions is None and mask is not None:
                positions = positions_of(mask)[:, -length:] + self.first_position
            if positions is not None:
                resumed["position_ids"] = positions + layout.lengths
        return resumed

    def _check_resumed(self, layout: Layout, past: Any, mask: Tensor | None, length: int) -> None:
        behind = getattr(past, _BEHIND, None)
        if behind is None and not torch.compiler.is_compiling():
            _logger.warning_once(
                f"{CACHE}: taken to hold {layout.num_prompts} prompt rows before its text, as if this model had filled "
                "it, though nothing tells that it did"
            )
        elif behind not in (None, layout.num_prompts):
            raise ValueError(f"{CACHE}: expected text behind {layout.num_prompts} prompt rows, got it behind {behind}")
        seen, static = past.get_seq_length(), past.is_compileable
        if not isinstance(seen, int):
            return  # a static cache counts in a tensor, which is left alone: reading it would synchronise
        text_length = seen - layout.num_prompts + length
        self._check_length(layout, text_length, mask)
        # a static cache's mask may be as wide as the cache
        if mask is not None and mask.shape[1] != text_length and not (static and mask.shape[1] > text_length):
            raise ValueError(
                f"attention_mask: expected {text_length} columns, for {text_length - length} text tokens in "
                f"{CACHE} and {length} new ones, got {mask.shape[1]}"
            )

    def _check_length(self, layout: Layout, length: int, mask: Tensor | None) -> None:
        count, limit = layout.num_prompts, self.position_limit
        if limit is None or count + length <= limit:
            return
        if mask is not None and self.padding_has_no_positions:
            if torch.compiler.is_compiling():  # a graph would break here
                return
            lengths = mask.sum(-1)
            counts = torch.full_like(lengths, count) if layout.mixture is None else layout.mixture.length
            row = int((counts + lengths).argmax())
            count, length = int(counts[row]), int(lengths[row])
            if count + length <= limit:
                return
        raise ValueError(
            f"input too long: {count} prompt rows and the text need {count + length} positions, "
            f"but {type(self.model).__name__} has only {limit}"
        )


def _overwrite(hidden: Tensor, prompts: Tensor, placement: Placement | None, depth: int, mode: str) -> Tensor:
    """``hidden`` with a block's deep prompts; the first block's are added, so that no parameter is dead."""
    return overwrite(hidden, matching(prompts, hidden), placement, "add" if depth == 0 else mode)


def _check_bare(past: Any) -> None:
    """Raises `ValueError` for a cache that holds prompts, in a call without them."""
    behind = getattr(past, _BEHIND, None)
    if behind is None:
        return
    if past.get_seq_length() > 0:
        raise ValueError(f"{CACHE}: expected text alone, as prompts are disabled, got it behind {behind} prompt rows")
    delattr(past, _BEHIND)


def note_body(*, reached: bool) -> None:
    """Remember, for `PromptHooks.after_model`, whether the running call of the model came to what bears its prompts."""
    _thread.reached = reached


def _in_backward() -> bool:
    # a decoding step is compiled whole, and its graph would break here
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _is_resumed(past: Any, mask: Tensor | None, length: int) -> bool:
    """Whether the cache holds tokens already, and with them the prompt."""
    seen = past.get_seq_length()
    if isinstance(seen, int):
        return seen > 0
    # a static cache counts in a tensor: the mask, which covers the past, tells without a host synchronisation
    return mask.shape[1] > length if mask is not None else bool(seen > 0)
