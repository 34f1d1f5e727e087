"""Quantised bases: the quantisers whose gradients prompts may rely on, and what else of these needs care.

Each that is admitted has the gradients of its dequantised weights (in training; see tests/model/test_quantised.py).
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig

# Where torchao rounds activations too, hardly any gradient passes the rounding.
_TORCHAO = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
_WITHIN = ("PerRow", "PerTensor", "PerGroup", "torch.dtype")


def is_quantised(model: Any) -> bool:
    return getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False)


def refusal(model: Any) -> str | None:
    """Why prompts cannot be put on a quantised base; ``None`` where they can."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return "it was quantised by other means than a quantization_config"
    config = quantizer.quantization_config
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if method == "torchao":
        kind = type(config.quant_type).__name__
        if kind not in _TORCHAO:
            return f"of torchao's, only {' and '.join(_TORCHAO)} hand gradients through, and it has {kind}"
        if config.include_input_output_embeddings:
            return "its embeddings are quantised (include_input_output_embeddings)"
        return None
    if method != "bitsandbytes":
        return f"gradients through {method} have not been checked; bitsandbytes' and torchao's have"
    if config.llm_int8_has_fp16_weight:
        return "its weights are quantised anew at every call (llm_int8_has_fp16_weight)"
    holders = (*model.parameters(), *model.modules())
    if any(getattr(getattr(holder, "quant_state", None), "packing_format_for_cpu", False) for holder in holders):
        return "a call has packed its weights for inference on a CPU, which has no gradient; load it anew"
    return None


def prepare(model: Any) -> None:
    """Let a quantised base that was not refused bear prompts, and Trainer train them."""
    # transformers' word for parameters that train on top of a base which does not: Trainer refuses one without
    model._hf_peft_config_loaded = True
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would pack 4-bit weights at the first call without gradients, and then has none
            module.support_avx512bf16_for_cpu = False


def unquantised_head(model: Any, names: Iterable[str]) -> None:
    """Make the modules that parameters of a new head, ``names``, are in plain ones.

    bitsandbytes has put its own in their place, which fail on weights that no checkpoint had. Raises
    `NotImplementedError` where one has weights of the checkpoint, quantised.
    """
    modules = sorted({name.rpartition(".")[0] for name, _ in model.named_parameters() if name in set(names)})
    quantised = [
        name
        for name in modules
        if any(type(parameter) is not nn.Parameter for parameter in model.get_submodule(name).parameters(recurse=False))
    ]
    if quantised:
        config = model.hf_quantizer.quantization_config
        argument = "modules_to_not_convert" if hasattr(config, "modules_to_not_convert") else "llm_int8_skip_modules"
        raise NotImplementedError(
            f"{type(model).__name__}: prompts are not supported, because a part of its head is new, and another was "
            f"quantised; name {quantised} in the quantization_config's {argument}"
        )
    for name in modules:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and holds_quantised(module):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight, plain.bias = module.weight, module.bias
            model.set_submodule(name, plain.train(module.training))


def holds_quantised(module: nn.Module) -> bool:
    """Whether ``module`` itself is a quantiser's, and not its parameters alone."""
    return type(module).__module__.startswith("bitsandbytes.")


def rounds_by_batch(config: Any) -> bool:
    """Whether how a row is rounded depends on the rows beside it: LLM.int8 looks for outliers over all of them."""
    quantisation = getattr(config, "quantization_config", None)
    return bool(getattr(quantisation, "load_in_8bit", False) and getattr(quantisation, "llm_int8_threshold", 0.0) > 0)


def described(config: Any) -> dict[str, Any] | None:
    """How a base of this transformers config is quantised, for a ``ptune_config.json``."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return None
    return json.loads(json.dumps(quantisation if isinstance(quantisation, dict) else quantisation.to_dict()))


def config_from(description: dict[str, Any]) -> Any:
    """The ``quantization_config`` that `described` was given. Raises `ValueError` for one that is not admitted."""
    method = description.get("quant_method")
    if method not in ("bitsandbytes", "torchao"):
        raise ValueError(f"quantization: expected bitsandbytes or torchao, got {method!r}")
    # torchao calls whatever of its own a type names
    unknown = sorted({str(kind) for kind in _types(description)} - {*_TORCHAO, *_WITHIN})
    if unknown:
        raise ValueError(f"quantization: expected types among {[*_TORCHAO, *_WITHIN]}, got {unknown}")
    try:
        return AutoQuantizationConfig.from_dict(dict(description))
    except Exception as error:
        raise ValueError(f"quantization: {error}") from None


def _types(value: Any) -> Iterable[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _types(item)
    elif isinstance(value, dict):
        if "_type" in value:
            yield value["_type"]
            if value["_type"] == "torch.dtype" and not isinstance(
                getattr(torch, str(value.get("_data")), None), torch.dtype
            ):
                yield value.get("_data")
        for item in value.values():
            yield from _types(item)
