"""The language model alone of a multimodal checkpoint: its config, and how it is loaded."""

import copy
import re
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# Those whose text has been held to what the whole model makes of it (tests/model/test_language.py): the same states,
# and the same logits but where transformers' multimodal class leaves out a scale that the language model has.
MULTIMODAL = (
    "gemma3", "gemma4", "gemma4_unified", "idefics2", "idefics3", "internvl", "lfm2_vl", "llama4", "llava",
    "llava_next", "llava_onevision", "mistral3", "qwen3_5", "qwen3_5_moe", "smolvlm",
)  # fmt: skip
_WITHIN = r"^model\.(?:language_model|text_model)\."
# How its weights are called in the checkpoints of transformers' multimodal classes, older ones first; and alone.
_RENAMED = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    _WITHIN: "model.",
}
_NOT_OF_A_CONFIG = ("dtype", "torch_dtype", "quantization_config", "attn_implementation")
_LEFT_WHOLE = ("llm_int8_skip_modules", "modules_to_not_convert")


def is_multimodal(config: Any) -> bool:
    return not config.is_encoder_decoder and config.get_text_config() is not config


def text_config(config: Any) -> Any:
    """A copy of the language model's part of a ``config`` in `MULTIMODAL`; ``None`` of any other."""
    if config.model_type not in MULTIMODAL or type(config.get_text_config()) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return take_over(copy.deepcopy(config.get_text_config()), config)


def take_over(own: Any, whole: Any) -> Any:
    """``own`` with what holds for the language model of a multimodal config, ``whole``, and is said in that alone."""
    own.name_or_path = whole.name_or_path
    own.tie_word_embeddings = whole.tie_word_embeddings
    own.dtype = whole.dtype or own.dtype
    if own.id2label == type(own)().id2label:
        own.id2label, own.label2id, own.problem_type = whole.id2label, whole.label2id, whole.problem_type
    if (quantised := getattr(whole, "quantization_config", None)) is not None:
        own.quantization_config = _quantised_alone(quantised)
    return own


def _quantised_alone(config: Any) -> Any:
    """A ``quantization_config``, in which modules are called as they are in the language model alone."""
    own = copy.deepcopy(config)
    settings = own if isinstance(own, dict) else vars(own)
    for kind in _LEFT_WHOLE:
        if names := settings.get(kind):
            settings[kind] = [re.sub(_WITHIN, "model.", name) for name in names]
    return own


def config_of(name: str, kind: type | None = None, **options: Any) -> Any:
    """The config of the base that is called ``name``: the language model's, if it is multimodal.

    ``kind``: the class of the config that is wanted, where it is known. ``options``: transformers', for the hub.
    """
    config = AutoConfig.from_pretrained(name, **options)
    if kind is not None and isinstance(config, kind):
        return config
    return text_config(config) or config


def keywords(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained`` that load the model of ``config``, a `text_config`, out of a multimodal checkpoint.

    What is ``given`` is meant for a class that would make the config itself. Raises `NotImplementedError` for a
    checkpoint whose weights transformers cannot rename.
    """
    own, rest = given.get("config"), {name: value for name, value in given.items() if name != "config"}
    if isinstance(own, PreTrainedConfig):
        config = text_config(own) or copy.deepcopy(own)
    else:
        config = copy.deepcopy(config)
        for name in [n for n in rest if n not in _NOT_OF_A_CONFIG and hasattr(config, n)]:
            setattr(config, name, rest.pop(name))
    saved = getattr(config, "quantization_config", None)
    if isinstance(saved, dict) and saved.get("quant_method") == "torchao":
        raise NotImplementedError(
            f"{config.name_or_path}: expected a multimodal checkpoint that is not quantised by torchao, or is so on "
            "loading, with quantization_config="
        )
    if rest.get("quantization_config") is not None:
        rest["quantization_config"] = _quantised_alone(rest["quantization_config"])
    if isinstance(attention := rest.get("attn_implementation"), dict):
        rest["attn_implementation"] = attention.get("text_config", attention.get(""))
    return {"key_mapping": _RENAMED} | rest | {"config": config}


def name_as_alone(model: Any) -> None:
    """Have a model that was loaded with `keywords` saved by its own names, and not by the checkpoint's."""
    renamings = getattr(model, "_weight_conversions", None) or ()
    model._weight_conversions = [its for its in renamings if not set(its.source_patterns) <= set(_RENAMED)]
