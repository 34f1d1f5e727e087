"""Prompt tuning of frozen transformers models: soft prompts, their training and their use."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptune_kernels import __version__

    from . import precision
    from .auto import (
        AutoPTuneModel,
        AutoPTuneModelForCausalLM,
        AutoPTuneModelForQuestionAnswering,
        AutoPTuneModelForSeq2SeqLM,
        AutoPTuneModelForSequenceClassification,
        AutoPTuneModelForTokenClassification,
        with_prompts,
    )
    from .bank import PromptBank
    from .config import PTuneConfig
    from .half_attention import hybrid
    from .mixin import PTuneMixin
else:

    def __getattr__(name):
        """What is asked for is imported then: `ptune --help` should not wait for torch and transformers."""
        from importlib import import_module

        if name == "__version__":
            return import_module("ptune_kernels").__version__
        homes = {"PromptBank": "bank", "PTuneConfig": "config", "hybrid": "half_attention", "PTuneMixin": "mixin"}
        if name in __all__ and name != "precision":
            return getattr(import_module(f".{homes.get(name, 'auto')}", __name__), name)
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "AutoPTuneModel",
    "AutoPTuneModelForCausalLM",
    "AutoPTuneModelForQuestionAnswering",
    "AutoPTuneModelForSeq2SeqLM",
    "AutoPTuneModelForSequenceClassification",
    "AutoPTuneModelForTokenClassification",
    "PTuneConfig",
    "PTuneMixin",
    "PromptBank",
    "__version__",
    "hybrid",
    "precision",
    "with_prompts",
]
