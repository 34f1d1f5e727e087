"""What prompts cannot be put on, refused by name with the reason, before anything changes."""

import inspect
from typing import Any, NoReturn

from .anatomy import find_body, lacks, position_limit
from .inputs import CACHE
from .language import MULTIMODAL, is_multimodal
from .quantised import is_quantised
from .quantised import refusal as quantised_refusal

_MIXES = "it mixes neighbouring columns outside attention, padding with text"
_APPROXIMATE = "it approximates attention over all columns, padding included"
_NO_CACHE = "its state is no key-value cache"
_UNSUITED = {
    "mamba": _NO_CACHE,
    "mamba2": _NO_CACHE,
    "falcon_mamba": _NO_CACHE,
    "xlstm": _NO_CACHE,
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
# Encoder-decoders that prompts can be put on; the encoders of the first number distances, of the others columns.
BY_DISTANCE = ("t5", "mt5", "umt5")
_BY_COLUMN = ("bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small", "m2m_100")
ENCODER_DECODERS = BY_DISTANCE + _BY_COLUMN
_POOLS_BY_PAD_ID = ("CTRLForSequenceClassification", "ModernBertDecoderForSequenceClassification")


def check_base(model: Any) -> None:
    """Raises `NotImplementedError` for a base whose prompts could not follow the definition."""
    config, name = model.config, type(model).__name__
    if is_quantised(model) and (reason := quantised_refusal(model)) is not None:
        _refuse(name, reason)
    if config.is_encoder_decoder and config.model_type not in ENCODER_DECODERS:
        _refuse(name, f"it is an encoder-decoder, and of these only {', '.join(ENCODER_DECODERS)} have been tried")
    if config.is_encoder_decoder and not model.can_generate() and (model.base_model is not model or "For" in name):
        _refuse(name, "of an encoder-decoder only the model that generates has been tried")
    if model.main_input_name != "input_ids" or is_multimodal(config):
        refuse_multimodal(name, config)
    if config.model_type in _UNSUITED:
        _refuse(name, _UNSUITED[config.model_type])
    if config.model_type == "big_bird" and config.attention_type == "block_sparse":
        _refuse(name, "its block-sparse attention cuts texts by column; load it with attention_type='original_full'")
    if name.removeprefix("PTune") in _POOLS_BY_PAD_ID:
        _refuse(name, "it pools by pad_token_id, inside its own forward")
    body = find_body(model)
    parameters = inspect.signature(body.forward).parameters
    if (needed := lacks(body)) is not None:
        _refuse(name, f"{type(body).__name__}.forward takes no {needed}")
    if "use_cache" in parameters and CACHE not in parameters:
        _refuse(name, f"{type(body).__name__}.forward keeps something else than {CACHE}")
    if "per_layer_inputs" in parameters and config.model_type != "gemma4_text":
        _refuse(name, "its blocks look the token ids up again, and their inputs are not [b, n, d]")


def refuse_multimodal(name: str, config: Any) -> NoReturn:
    """Raises `NotImplementedError` for a base that is no language model, nor one that this can be taken from."""
    if config.model_type in MULTIMODAL:
        remedy = "AutoPTuneModelForCausalLM.from_pretrained and its like load the language model alone"
    else:
        remedy = f"the language model is taken of {', '.join(MULTIMODAL)}"
    _refuse(name, f"a multimodal model ({config.model_type}) builds its input from more than token ids; {remedy}")


def lack_of_positions(model: Any, count: int) -> str | None:
    """Why ``count`` prompt rows are too many for ``model``; ``None`` where they leave positions to text."""
    _, learned = position_limit(find_body(model))
    if learned is None or count < learned:
        return None
    return (
        f"pre_seq_len: expected less than the {learned} positions that {type(model).__name__} has learned, got {count}"
    )


def _refuse(name: str, reason: str) -> NoReturn:
    raise NotImplementedError(f"{name}: prompts are not supported, because {reason}")
