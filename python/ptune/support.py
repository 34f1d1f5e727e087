"""What prompts cannot be put on, refused by name with the reason, before anything changes."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .quantised import is_quantised
from .quantised import refusal as quantised_refusal

_MIXES = "it mixes neighbouring columns outside attention, padding with text"
_APPROXIMATE = "it approximates attention over all columns, padding included"
_UNSUITED = {
    "xlnet": "its blocks take the sequence before the batch",
    "reformer": "it hashes and chunks the sequence by column",
    "funnel": "it shortens the sequence between blocks",
    "convbert": _MIXES,
    "mobilebert": _MIXES,
    "nystromformer": _APPROXIMATE,
    "yoso": _APPROXIMATE,
    "mra": _APPROXIMATE,
    "rwkv": "its state takes in padding, whatever the attention_mask",
    "ibert": "its modules hand on scaling factors beside states",
    "tipsv2_text_model": "it pools inside its own forward",
    "dpr": "it returns no states of its tokens",
}
_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
# Encoder-decoders that prompts can be put on; the encoders of the first number distances, of the others columns.
BY_DISTANCE = ("t5", "mt5", "umt5")
_BY_COLUMN = ("bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small", "m2m_100")
ENCODER_DECODERS = BY_DISTANCE + _BY_COLUMN
_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "positions_embed")
_POOLS_BY_PAD_ID = ("CTRLForSequenceClassification", "ModernBertDecoderForSequenceClassification")


def find_body(model: Any) -> Any:
    """The submodel of ``model`` that turns token ids into states; heads may call one in ``base_model`` (OPT's do).

    Of an encoder-decoder it is the encoder.
    """
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    body = model.base_model
    while True:
        inner = [child for child in body.children() if isinstance(child, PreTrainedModel) and _lacks(child) is None]
        if len(inner) != 1:
            return body
        body = inner[0]


def _lacks(body: nn.Module) -> str | None:
    parameters = inspect.signature(body.forward).parameters
    return next((needed for needed in ("inputs_embeds", "attention_mask") if needed not in parameters), None)


def check_base(model: Any) -> None:
    """Raises `NotImplementedError` for a base whose prompts could not follow the definition."""
    config, name = model.config, type(model).__name__
    if is_quantised(model) and (reason := quantised_refusal(model)) is not None:
        _refuse(name, reason)
    if config.is_encoder_decoder and config.model_type not in ENCODER_DECODERS:
        _refuse(name, f"it is an encoder-decoder, and of these only {', '.join(ENCODER_DECODERS)} have been tried")
    if config.is_encoder_decoder and not (model.can_generate() or model.base_model is model):
        _refuse(name, "of an encoder-decoder only the model that generates has been tried")
    if model.main_input_name != "input_ids" or config.get_text_config() is not config:
        _refuse(name, f"a multimodal model ({config.model_type}) builds its input from more than token ids")
    if config.model_type in _UNSUITED:
        _refuse(name, _UNSUITED[config.model_type])
    if config.model_type == "big_bird" and config.attention_type == "block_sparse":
        _refuse(name, "its block-sparse attention cuts texts by column; load it with attention_type='original_full'")
    if name.removeprefix("PTune") in _POOLS_BY_PAD_ID:
        _refuse(name, "it pools by pad_token_id, inside its own forward")
    body = find_body(model)
    parameters = inspect.signature(body.forward).parameters
    if (needed := _lacks(body)) is not None:
        _refuse(name, f"{type(body).__name__}.forward takes no {needed}")
    if "per_layer_inputs" in parameters:
        _refuse(name, "its blocks look the token ids up again, and their inputs are not [b, n, d]")
    if "cache_params" in parameters:
        _refuse(name, "its state is no key-value cache")


def find_blocks(body: nn.Module, config: Any) -> nn.ModuleList:
    """The list of transformer blocks of ``body``, in order (ALBERT's groups, each called several times).

    Raises `NotImplementedError` where there is no such list.
    """
    count = getattr(config, "num_hidden_groups", config.num_hidden_layers)
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(block) for block in module}) == 1:
            return module
    _refuse(type(body).__name__, f"found no list of its {count} blocks, which deep prompts need")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that is sharded (a DTensor), what all processes together have."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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


def lack_of_positions(model: Any, count: int) -> str | None:
    """Why ``count`` prompt rows are too many for ``model``; ``None`` where they leave positions to text."""
    _, learned = position_limit(find_body(model))
    if learned is None or count < learned:
        return None
    return (
        f"pre_seq_len: expected less than the {learned} positions that {type(model).__name__} has learned, got {count}"
    )


def check_inputs(arguments: dict[str, Any], parameters: tuple[str, ...]) -> None:
    """Raises `TypeError`, `ValueError` or `NotImplementedError` for a call of the body that prompts do not cover.

    ``parameters``: the names of the body's own; others in ``arguments`` are for the loss.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    for name, text, shape in (("input_ids", ids, "[b, n]"), ("inputs_embeds", embeds, "[b, n, d]")):
        if text is not None and not isinstance(text, Tensor):
            raise TypeError(f"{name}: expected a tensor {shape}, got {type(text).__name__}")
        if text is not None and (text.dim() != shape.count(",") + 1 or 0 in text.shape[:2]):
            raise ValueError(f"{name}: expected {shape} with at least one token, got shape {tuple(text.shape)}")
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"attention_mask: expected [b, n], got {got}; a mask made for text has no prompt columns"
        )
    check_mask(arguments)
    if isinstance(positions, Tensor) and positions.dim() != 2:
        raise NotImplementedError(f"position_ids: expected [b, n], got shape {tuple(positions.shape)}")
    size = (arguments["inputs_embeds"] if ids is None else ids).shape[:2]
    for name in ("position_ids", "token_type_ids"):
        given = arguments.get(name)
        if name not in parameters or given is None:
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor [b, n], got {type(given).__name__}")
        if tuple(given.shape) not in (tuple(size), (1, size[1])):
            raise ValueError(f"{name}: expected shape {tuple(size)}, as the text has, got {tuple(given.shape)}")
    for name in parameters:
        value = arguments.get(name)
        # the sequence of a cross-attention may be as long by chance
        if not isinstance(value, Tensor) or name in _TEXT or name.startswith("encoder_"):
            continue
        if value.shape[:2] == size or name == "lengths":
            raise NotImplementedError(f"{name}: not supported, because it describes the text, and not the prompt")
    if arguments.get("adapter_names") is not None:
        raise NotImplementedError(
            "adapter_names: not supported, as all rows have the one prompt of the model; use a PromptBank"
        )
    packed = [name for name in arguments if name.startswith("cu_seq_lens") and arguments[name] is not None]
    if packed:
        raise NotImplementedError(
            f"{packed[0]}: packed batches are not supported, for each packed text needs its own prompt"
        )
    check_unpacked(positions, mask, "each packed text needs its own prompt")


def check_unpacked(positions: Tensor | None, mask: Tensor | None, reason: str) -> None:
    """Raises `NotImplementedError`, with the ``reason``, for what transformers reads as packed texts."""
    if positions is not None and mask is None and _restarts(positions):
        raise NotImplementedError(
            "position_ids: packed batches (positions that restart, without an attention_mask) are not supported, for "
            + reason
        )


def check_mask(arguments: dict[str, Any]) -> None:
    """Raises `ValueError` for a two-dimensional attention_mask of another shape than the text's."""
    mask, past = arguments.get("attention_mask"), arguments.get("past_key_values")
    ids = arguments.get("input_ids")
    text = arguments.get("inputs_embeds") if ids is None else ids
    if mask is None or text is None:
        return
    # with text in a cache (or in a static one, perhaps) the mask covers that too: see the hooks
    seen = 0 if past is None else past.get_seq_length()
    resumed = not isinstance(seen, int) or seen > 0
    if mask.shape[0] != text.shape[0] or (not resumed and mask.shape[1] != text.shape[1]):
        columns = "at least " * resumed + str(text.shape[1])
        raise ValueError(f"attention_mask: expected shape ({text.shape[0]}, {columns}), got {tuple(mask.shape)}")


def _restarts(positions: Tensor) -> bool:
    if positions.shape[1] == 1 or torch.compiler.is_compiling():
        return False
    return bool((positions[:, 1:] <= positions[:, :-1]).any())


def _refuse(name: str, reason: str) -> NoReturn:
    raise NotImplementedError(f"{name}: prompts are not supported, because {reason}")
