"""A second model on the weights of a base, which may be changed while the base stays as it is."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .config import take_settings
from .language import is_multimodal, take_over, text_config
from .mixin import BORROWED, PTuneMixin
from .models import ptune_class


def check_stock(base: Any) -> None:
    """Raises `TypeError`, `ValueError` or `NotImplementedError` for what can have no twin."""
    if isinstance(base, PTuneMixin) or not isinstance(base, PreTrainedModel):
        remedy = "; give the base that it was made of" if isinstance(base, PTuneMixin) else ""
        raise TypeError(f"base: expected a stock transformers model, got {type(base).__name__}{remedy}")
    if "forward" in vars(base) and not hasattr(base, "_hf_hook"):
        raise ValueError(
            "base: expected its class's own forward, got one that was set on the object, as Trainer does for mixed "
            "precision, and TRL; `del base.forward`, or load it anew"
        )
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        raise NotImplementedError("base: expected a model on one device, got one spread over several")


def prompted_twin(base: Any, head: Iterable[str] = ()) -> Any:
    """A twin that can bear prompts, and has none yet."""
    twin = twin_of(base)
    take_settings(twin.config)
    twin.__class__ = ptune_class(type(twin))
    twin.adopt(head)
    return twin


def twin_of(base: Any) -> Any:
    """A model of the same class and weights, whose modules are its own."""
    weights = {id(parameter): _sharing_memory(parameter) for parameter in base.parameters()}
    shared = {id(tensor): tensor for tensor in (*base.buffers(), *_taken_scales(base))}
    twin = copy.deepcopy(base, weights | shared).eval()
    for name in ("_compiled_call", "_last_compile_config"):
        vars(twin).pop(name, None)  # generate's, once it has compiled: a call of the base
    for module in twin.modules():
        # LLM.int8's modules take the scales from their weights at the first call, which threads would race for
        if getattr(getattr(module, "weight", None), "CB", None) is not None:
            module.init_8bit_state()
    return twin


def _sharing_memory(parameter: Any) -> nn.Parameter:
    """A frozen parameter of the same values, in the same memory."""
    if hasattr(parameter, "SCB"):  # LLM.int8's scales are on the parameter until its module takes them
        return type(parameter)(parameter.data, requires_grad=False, CB=parameter.CB, SCB=parameter.SCB)
    shared = nn.Parameter(parameter.detach(), requires_grad=False)
    if type(shared.data) is Tensor:
        setattr(shared, BORROWED, shared.data_ptr())
    return shared


def _taken_scales(model: Any) -> Iterator[Tensor]:
    """What LLM.int8's modules took from their weights."""
    for module in model.modules():
        if hasattr(getattr(module, "state", None), "SCB"):
            yield from (tensor for tensor in (module.state.CB, module.state.SCB) if tensor is not None)


def language_model_of(model: Any) -> Any:
    """The language model in a multimodal ``model`` of transformers', a twin on its weights; any other model itself."""
    if not isinstance(model, PreTrainedModel) or not is_multimodal(model.config) or text_config(model.config) is None:
        return model
    whole = twin_of(model)
    config = take_over(whole.config.get_text_config(), whole.config)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        alone = kind(config)
    name, own = next((name, its) for name, its in alone.named_children() if isinstance(its, PreTrainedModel))
    body = next((its for its in whole.modules() if type(its) is type(own)), None)
    output = whole.get_output_embeddings()
    if body is None or body.config is not config or (output is None and whole.base_model is not whole):
        return model
    if output is None:
        return body
    setattr(alone, name, body)
    alone.set_output_embeddings(output)
    mine = vars(alone)
    mine |= {name: its for name, its in vars(whole).items() if name not in mine and not name.startswith("_")}
    alone.generation_config = whole.generation_config
    return alone.eval()
