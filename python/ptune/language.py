"""The language model alone of a multimodal checkpoint, or of a multimodal model in memory."""

import copy
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .anatomy import find_body
from .quantised import is_quantised

# Those whose text has been held to what the whole model makes of it (tests/model/test_language.py).
MULTIMODAL = (
    "gemma3", "gemma4", "gemma4_unified", "idefics2", "idefics3", "internvl", "lfm2_vl", "llama4", "llava",
    "llava_next", "llava_onevision", "mistral3", "qwen3_5", "qwen3_5_moe", "smolvlm",
)  # fmt: skip
# How its weights are called in the checkpoints of transformers' multimodal classes, older ones first; and alone.
_RENAMED = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.(?:language_model|text_model)\.": "model.",
}
_NOT_OF_A_CONFIG = ("dtype", "torch_dtype", "quantization_config", "attn_implementation")


def text_config(config: Any) -> Any:
    """A copy of the language model's part of a ``config`` in `MULTIMODAL`; ``None`` of any other."""
    if config.model_type not in MULTIMODAL or type(config.get_text_config()) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    own = copy.deepcopy(config.get_text_config())
    own.name_or_path = config.name_or_path
    own.tie_word_embeddings = config.tie_word_embeddings  # by which the whole model goes
    own.dtype = own.dtype or config.dtype
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        own.quantization_config = quantised
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

    What is ``given`` is meant for a class that would make the config itself.
    """
    own, rest = given.get("config"), {name: value for name, value in given.items() if name != "config"}
    if isinstance(own, PreTrainedConfig):
        config = text_config(own) or copy.deepcopy(own)
    else:
        config = copy.deepcopy(config)
        for name in [n for n in rest if n not in _NOT_OF_A_CONFIG and hasattr(config, n)]:
            setattr(config, name, rest.pop(name))
    return {"key_mapping": _RENAMED} | rest | {"config": config}


def name_as_alone(model: Any) -> None:
    """Have a model that was loaded with `keywords` saved by its own names, and not by the checkpoint's."""
    renamings = getattr(model, "_weight_conversions", None) or ()
    model._weight_conversions = [its for its in renamings if not set(its.source_patterns) <= set(_RENAMED)]


def language_model_of(model: Any) -> Any:
    """The language model in a multimodal ``model`` of transformers', on the same weights; any other model itself."""
    config = text_config(model.config) if isinstance(model, PreTrainedModel) else None
    if config is None or type(config) is type(model.config) or is_quantised(model):
        return model
    theirs, output = find_body(model.get_decoder()), model.get_output_embeddings()
    with init_empty_weights(include_buffers=False):
        alone = AutoModelForCausalLM.from_config(config)
    body = find_body(alone)
    if output is None or type(body) is not type(theirs):
        return model
    body.load_state_dict(theirs.state_dict(keep_vars=True), assign=True)
    alone.set_output_embeddings(output)
    for name, buffer in theirs.named_buffers():
        owner, _, own = name.rpartition(".")
        setattr(body.get_submodule(owner), own, buffer)  # where the weights are, in their dtype
    alone.generation_config = model.generation_config
    return alone.train(model.training)
