"""Where the parts of a model are that prompts need: its body, blocks, positions, and devices."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "positions_embed")


def find_body(model: Any) -> Any:
    """The submodel of ``model`` that turns token ids into states; heads may call one in ``base_model`` (OPT's do).

    Of an encoder-decoder it is the encoder.
    """
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    body = model.base_model
    while True:
        inner = [child for child in body.children() if isinstance(child, PreTrainedModel) and lacks(child) is None]
        if len(inner) != 1:
            return body
        body = inner[0]


def lacks(body: nn.Module) -> str | None:
    """A parameter that a body's forward must have, and this one has not."""
    parameters = inspect.signature(body.forward).parameters
    return next((needed for needed in ("inputs_embeds", "attention_mask") if needed not in parameters), None)


def find_blocks(body: nn.Module, config: Any) -> nn.ModuleList:
    """The list of transformer blocks of ``body``, in order (ALBERT's groups, each called several times).

    Raises `NotImplementedError` where there is no such list.
    """
    count = getattr(config, "num_hidden_groups", config.num_hidden_layers)
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(block) for block in module}) == 1:
            return module
    reason = f"found no list of its {count} blocks, which deep prompts need"
    raise NotImplementedError(f"{type(body).__name__}: prompts are not supported, because {reason}")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that is sharded (a DTensor), what all processes together have."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def per_layer_input(body: Any) -> Tensor | None:
    """What the layers of ``body`` get beside the state of a prompt row [L, p]; ``None`` where they get nothing.

    They do in some of Gemma 4, by the token. A soft token has there what the padding token has, as an image's do.
    """
    if not getattr(body.config, "hidden_size_per_layer_input", 0):
        return None
    device = device_of(body.embed_tokens_per_layer)
    padding = torch.full((1, 1), body.config.pad_token_id or 0, device=device)  # filled there: no copy to wait for
    return body.get_per_layer_inputs(padding, None)[0, 0]


def device_of(embedding: Any) -> torch.device:
    """Where ``embedding`` looks tokens up; accelerate keeps the weight of an offloaded one elsewhere between calls."""
    device = embedding.weight.device
    if device.type == "meta" and hasattr(embedding, "_hf_hook"):
        return torch.device(embedding._hf_hook.execution_device)
    return device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block no module is in training, and autocast rounds nothing."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with ExitStack() as exact:
            for kind in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
                exact.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for module in training:
            module.training = True


def position_limit(body: nn.Module) -> tuple[int, int | None]:
    """The first position number, and how many a learned table holds (``None`` without a table).

    RoBERTa and its kin number positions from ``padding_idx + 1``.
    """
    for name, module in body.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return first, module.num_embeddings - first - getattr(module, "offset", 0)
    return 0, None
