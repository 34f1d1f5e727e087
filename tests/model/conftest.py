"""Bases: one folder for each family, of a stock model with random weights."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ptune

from .families import FAMILIES, Family

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@dataclass
class Base:
    """A saved body, the stock model of it, and how to put prompts on it."""

    family: Family
    folder: Path

    def stock(self, loader: Any = transformers.AutoModel, **kwargs: Any) -> Any:
        return loader.from_pretrained(self.folder, **kwargs)

    def tuned(self, loader: Any = ptune.AutoPTuneModel, **kwargs: Any) -> Any:
        return loader.from_pretrained(self.folder, **kwargs)


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """``base_of(name)``: the base of a family, made once."""
    made: dict[str, Base] = {}

    def make(name: str) -> Base:
        if name not in made:
            family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
            loader = transformers.AutoModelForCausalLM if family.causal else transformers.AutoModelForMaskedLM
            with torch.random.fork_rng():
                torch.manual_seed(len(name))
                model = loader.from_config(family.config())
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which hide mistakes
                            parameter.add_(torch.randn_like(parameter) * 0.2)
                    if (table := getattr(model.base_model, "embed_tokens_per_layer", None)) is not None:
                        table.weight[table.padding_idx].normal_(std=0.3)  # it is zero, and prompt rows have it
            model.save_pretrained(folder)
            made[name] = Base(family, folder)
        return made[name]

    return make


@pytest.fixture
def reports():
    """What transformers reports of what it loads."""
    handler, records = logging.Handler(), []
    handler.emit = records.append
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()
    yield records
    transformers.logging.set_verbosity_error()
    logger.removeHandler(handler)
