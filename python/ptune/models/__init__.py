"""Model classes with prompts: ``PTuneLlamaForCausalLM`` is ``LlamaForCausalLM`` with `PTuneMixin`, and so on.

``DistributedLlamaForCausalLM``, and so on, have their blocks on servers (`ptune.remote`). All are made when first
asked for, once each, and can be imported and pickled by name.
"""

from typing import Any

import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..generation import PromptGeneration
from ..mixin import PTuneMixin
from ..pooling import pooled_forward

_PREFIX = "PTune"
_DISTRIBUTED = "Distributed"
_classes: dict[tuple[str, type], type] = {}


def ptune_class(base: type) -> type:
    """The class of ``base`` with prompts."""
    return class_of(base, _PREFIX, PTuneMixin, f"`{base.__name__}` with prompts.")


def class_of(base: type, prefix: str, mixin: type, doc: str) -> type:
    """``base`` with ``mixin``: made when it is first asked for."""
    name = prefix + base.__name__
    if (made := _classes.get((name, base))) is None:
        bases = (PromptGeneration, mixin, base) if issubclass(base, GenerationMixin) else (mixin, base)
        namespace = {"__module__": __name__, "__doc__": doc, "base_class": base}
        if base.__name__.endswith("ForSequenceClassification"):
            namespace["forward"] = pooled_forward(base)
        made = _classes[name, base] = type(name, bases, namespace)
        # transformers finds what a model can record (output_hidden_states, …) by its class's name, noted in __init__;
        # dict's own method, for the key that the registry makes of a model differs between its versions
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(made), getattr(base, "_can_record_outputs", None))
    return made


def __getattr__(name: str) -> Any:
    for made in _classes.values():
        if made.__name__ == name:
            return made
    for prefix in (_PREFIX, _DISTRIBUTED):
        base = getattr(transformers, name.removeprefix(prefix), None) if name.startswith(prefix) else None
        if isinstance(base, type) and issubclass(base, PreTrainedModel):
            return ptune_class(base) if prefix == _PREFIX else _distributed_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _distributed_class(base: type) -> type:
    from ..remote import distributed_class  # Ray is asked for by those who use it

    return distributed_class(base)
