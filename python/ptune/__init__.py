"""Prompt tuning of frozen transformers models: soft prompts, their training and their use."""

from .config import PTuneConfig

__all__ = ["PTuneConfig"]
