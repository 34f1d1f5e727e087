"""Some consecutive blocks of a checkpoint, run by the stock forward of its model's body."""

import hashlib
import inspect
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ptune_kernels import Placement, overwrite

from .. import checkpoint
from ..anatomy import find_blocks, find_body
from ..attention import KEYWORD, Prefix, sharing_name
from ..cache import PrefixedCache
from ..call import set_call
from ..capture import Capture
from ..concat import matching
from ..config import PTuneConfig
from ..inputs import CACHE
from ..layout import Layout
from ..likeness import numbers_of
from ..plan import KNOWN, disorder, obstacle, rope_kinds
from ..prefix import injected_call
from ..support import check_base
from .shards import read_tensors
from .standin import StandIn


class Span:
    """Blocks ``first`` … ``last - 1`` of the checkpoint ``path``, without the rest of its weights.

    The body's own forward makes masks, rotary embeddings and whatever else its blocks are given, so that these are the
    whole model's to the bit. It runs on zeros that take no memory, up to the first block, which is given the hidden
    states; all other blocks are stand-ins.

    Args:
        path: a folder that the machine can read, or a name on the hub, with safetensors files.
        dtype: of the weights: ``"float32"`` or the like, or ``"auto"`` for the checkpoint's.
        device: where they lie.

    Attributes:
        unshared: why prompt rows cannot run once for a batch here; ``None`` where they can.
        identity: of config, dtype and `weights`.
        weights: a few numbers of the first and the last of these blocks (see `ptune.likeness`).
        causal: whether text is read from left to right, as far as `unshared` is ``None``.

    Raises `ValueError` or `NotImplementedError` for blocks that there are not, or a body that cannot be run so.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        first: int,
        last: int,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        **hub: Any,
    ) -> None:
        config = AutoConfig.from_pretrained(path, **hub)
        if getattr(config, "quantization_config", None) is not None:
            raise NotImplementedError(f"{path}: expected weights as they are, got quantised ones; serve the original")
        if any(parameters.get("rope_type") == "dynamic" for parameters in rope_kinds(config)):
            raise NotImplementedError(
                f"{path}: its rotary embeddings follow the longest text of a call (rope_type 'dynamic'), and what "
                "passes servers is split into calls as it comes"
            )
        if not 0 <= first < last <= config.num_hidden_layers:
            raise ValueError(f"blocks: expected some of 0 to {config.num_hidden_layers - 1}, got {first} to {last - 1}")
        wanted = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
            raise ValueError(f"dtype: expected 'auto' or the name of a floating-point dtype, got {dtype!r}")
        self.path = path
        self.first, self.last = first, last
        self.dtype, self.device = wanted, torch.device(device)
        self.width = config.hidden_size
        self.num_layers = config.num_hidden_layers
        self.fingerprint = checkpoint.fingerprint(checkpoint.base_config(config))
        with init_empty_weights(include_buffers=False):
            whole = AutoModel.from_config(config)
        check_base(whole)
        self.body = find_body(whole).requires_grad_(False).eval()
        if getattr(self.body, "pooler", None) is not None:
            self.body.pooler = None
        self._parameters = {*inspect.signature(self.body.forward).parameters, "return_dict"}
        self._run: _Run | None = None
        blocks = find_remote_blocks(self.body, config)
        self._load(path, blocks, **hub)
        for index, block in enumerate(blocks):
            inside = first <= index < last
            blocks[index] = _Slot(block, index, self) if inside else StandIn(block, index)
        for module in self.body.modules():
            for name, weight in module._parameters.items():
                if weight is not None and weight.is_meta:
                    zero = torch.zeros((), dtype=wanted, device=self.device)
                    module._parameters[name] = nn.Parameter(zero.expand(weight.shape), requires_grad=False)
        self.body.to(self.device)
        self.weights = [numbers_of(blocks[index]) for index in (first, last - 1)]
        served = self.fingerprint, self.weights, str(self.dtype)
        self.identity = hashlib.sha256(repr(served).encode()).hexdigest()
        self.causal = True
        self.unshared = self._try_sharing()
        with torch.no_grad():  # what cannot run should not seem to be served
            self(torch.zeros(1, 1, self.width, device=self.device), first, last)

    def __call__(
        self,
        hidden: Tensor,
        first: int,
        last: int,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        prompts: Tensor | None = None,
        starts: Tensor | None = None,
        mode: str = "overwrite",
        cache: Any = None,
        shared: Capture | Prefix | None = None,
    ) -> Tensor:
        """Run blocks ``first`` … ``last - 1`` on ``hidden`` [b, S, d], which is returned in its dtype.

        ``mask`` [b, N] (1 for tokens), ``positions`` [b, S], ``prompts`` [blocks, m, d] float32 and ``starts`` int32
        [b]: see `Request`. ``cache``: a `DynamicCache` that already holds N - S columns. ``shared``: what takes the
        blocks' keys and values of prompt rows, ``hidden`` [1, m, d]; or these, for text under a mask [b, m + S], which
        are written into an empty ``cache`` where there is one.
        """
        embedding = self.body.get_input_embeddings().weight
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        arguments: dict[str, Any] = {
            "inputs_embeds": zero.expand(*hidden.shape[:2], embedding.shape[1]),
            "attention_mask": mask,
            "use_cache": cache is not None,
            CACHE: cache,
            "return_dict": True,
        }
        if positions is not None:
            arguments["position_ids"] = positions
            if mask is None:
                # positions without a mask would be read as packed texts
                past = 0 if cache is None else cache.get_seq_length()
                columns = past + hidden.shape[1]
                arguments["attention_mask"] = torch.ones(hidden.shape[0], columns, dtype=torch.long, device=self.device)
        placement = None
        if prompts is not None and starts is not None:
            length = torch.full_like(starts, prompts.shape[1])
            placement = Placement(torch.zeros_like(starts), length, starts, prompts.shape[1])
        call = capture = None
        if isinstance(shared, Prefix):
            assert mask is not None
            text = mask[:, shared.num_columns :]
            layout = Layout(shared.num_columns, hidden.shape[0], text, self.device)
            # attentions look theirs up by the numbers of their blocks
            shared = Prefix([shared.layers[0]] * first + shared.layers)
            if cache is None:
                call, arguments["attention_mask"] = injected_call(layout, text)
            else:
                arguments[CACHE] = PrefixedCache(cache, shared.placed(layout.placement()))
                arguments["attention_mask"] = layout.extend_mask(text)
        elif shared is not None:
            capture = shared
        arguments = {name: value for name, value in arguments.items() if name in self._parameters}
        if shared is not None and cache is None:
            arguments[KEYWORD] = shared
        run = self._run = _Run(hidden.to(self.dtype), first, last, prompts, placement, mode, capture)
        set_call(call)
        try:
            with nullcontext() if capture is None else capture.skipping():
                self.body(**arguments)
        finally:
            self._run = None
            set_call(None)
        assert run.output is not None
        return run.output.to(hidden.dtype)

    def _try_sharing(self) -> str | None:
        """Set the attention that takes a prefix and number the blocks' attentions; or say why not, and leave all."""
        kind, implementation = self.body.config.model_type, self.body.config._attn_implementation
        if kind not in KNOWN:
            return f"{kind!r} is not among the models known to share"
        if (reason := obstacle(self.body, PTuneConfig())) is not None:
            return reason
        self.body.set_attn_implementation(sharing_name(implementation))
        capture = Capture((), False)
        try:
            with torch.no_grad():
                self(torch.zeros(1, 1, self.width, device=self.device), self.first, self.last, shared=capture)
            reason = disorder(capture.modules, self.first, self.last)
        except (TypeError, NotImplementedError) as error:
            reason = f"its forward does not hand the prefix to its attention ({error})"
        if reason is not None:
            self.body.set_attn_implementation(implementation)
        for depth, module in enumerate(capture.modules, self.first):
            vars(module)["ptune_depth"] = depth
        self.causal = all(getattr(module, "is_causal", True) for module in capture.modules)
        return reason

    def _load(self, path: Any, blocks: nn.ModuleList, **hub: Any) -> None:
        pattern = block_pattern(self.body, blocks)

        def wanted(name: str) -> bool:
            found = pattern.search(name)
            return found is not None and self.first <= int(found[1]) < self.last

        inside: dict[int, dict[str, Tensor]] = {index: {} for index in range(self.first, self.last)}
        for name, tensor in read_tensors(path, wanted, **hub).items():
            found = pattern.search(name)
            assert found is not None
            if tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
            inside[int(found[1])][_modern(found[2])] = tensor.to(self.device)
        for index, state in inside.items():
            missing, unexpected = blocks[index].load_state_dict(state, strict=False, assign=True)
            missing = [name for name in missing if name in dict(blocks[index].named_parameters())]
            if missing:
                raise NotImplementedError(
                    f"{path}: expected the parameters of block {index} under their own names, and lacks {missing} (of "
                    f"block {index} it has {sorted(state)}, of which {unexpected} belong to no parameter)"
                )


@dataclass
class _Run:
    """A running call: read and filled by the slots."""

    hidden: Tensor
    first: int
    last: int
    prompts: Tensor | None
    placement: Placement | None
    mode: str
    capture: Capture | None = None
    output: Tensor | None = None


class _Slot(StandIn):
    """A block in its place, which is skipped where a call does not want it."""

    def __init__(self, block: nn.Module, index: int, span: Span) -> None:
        super().__init__(block, index)
        self.block = block
        self._span = span

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = self._span._run
        assert run is not None
        if not run.first <= self.index < run.last:
            return super().forward(hidden_states, *args, **kwargs)
        hidden = run.hidden if self.index == run.first else hidden_states
        if run.capture is not None:
            hidden = run.capture.before_block(hidden)
        if run.prompts is not None:
            rows = matching(run.prompts[self.index - run.first], hidden)
            # the model's first block adds, as everywhere
            hidden = overwrite(hidden, rows, run.placement, "add" if self.index == 0 else run.mode)
        hidden = self.block(hidden, *args, **kwargs)
        if not isinstance(hidden, Tensor):
            raise NotImplementedError(
                f"{type(self.block).__name__}: expected hidden states, got {type(hidden).__name__}"
            )
        if self.index == run.last - 1:
            run.output = hidden
        return hidden


def find_remote_blocks(body: nn.Module, config: Any) -> nn.ModuleList:
    """The blocks of ``body``. Raises `NotImplementedError` where they cannot run apart from one another."""
    if config.is_encoder_decoder:
        raise NotImplementedError(
            f"{type(body).__name__}: expected blocks of one text, got those of an encoder-decoder"
        )
    if getattr(config, "hidden_size_per_layer_input", 0) or getattr(config, "num_kv_shared_layers", 0):
        raise NotImplementedError(
            f"{type(body).__name__}: its blocks cannot run elsewhere, as they read tokens or the keys of other blocks"
        )
    if hasattr(config, "num_hidden_groups"):
        raise NotImplementedError(f"{type(body).__name__}: its blocks cannot run elsewhere, as it calls one many times")
    return find_blocks(body, config)


def block_pattern(body: nn.Module, blocks: nn.ModuleList) -> re.Pattern[str]:
    """Finds the names of the blocks' tensors in a checkpoint: groups are the number of the block and the rest."""
    name = next(name for name, module in body.named_modules() if module is blocks)
    return re.compile(rf"(?:^|\.){re.escape(name)}\.(\d+)\.(.+)$")


def _modern(name: str) -> str:
    """Checkpoints of the first BERTs have TensorFlow's names, which transformers renames too."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
