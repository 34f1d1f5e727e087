"""Prompt tuning of frozen transformers models: soft prompts, their training and their use."""

from . import precision
from .auto import (
    AutoPTuneModel,
    AutoPTuneModelForCausalLM,
    AutoPTuneModelForSeq2SeqLM,
    AutoPTuneModelForSequenceClassification,
    AutoPTuneModelForTokenClassification,
)
from .bank import PromptBank
from .config import PTuneConfig
from .half_attention import hybrid
from .mixin import PTuneMixin

__all__ = [
    "AutoPTuneModel",
    "AutoPTuneModelForCausalLM",
    "AutoPTuneModelForSeq2SeqLM",
    "AutoPTuneModelForSequenceClassification",
    "AutoPTuneModelForTokenClassification",
    "PTuneConfig",
    "PTuneMixin",
    "PromptBank",
    "hybrid",
    "precision",
]
