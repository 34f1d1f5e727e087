"""The command `ptune audit`: from a model's folder and a file of texts to a report."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..anatomy import find_body, position_limit
from ..checkpoint import read_json
from ..data import Columns, DataError, read_passages, read_text, split_lines
from ..half_attention import HALVES
from ..hub import cached
from ..language import keywords, text_config
from ..loading import check_base_path
from ..tasks import Generation
from ..tokenizer import load_tokenizer
from .damage import first, greatest, last, mean
from .passes import Audit, audit

POOLINGS = {"cls": first, "lasttoken": last, "max": greatest, "mean": mean}  # as sentence-transformers names them
_HEADS = ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification")


def audit_files(
    model: str, data: Path, out: Path, dtype: str, text_column: str | None, max_length: int, batch_size: int, count: int
) -> Audit:
    """Audit a model by the first ``count`` batches of the texts of ``data``. Raises: ValueError or OSError."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file")
    check_base_path(model)
    texts = read_texts(data, text_column)[: batch_size * count]
    tokenizer = load_tokenizer(model, "classification")
    pooling = pooling_of(model)
    loaded = load(model, bare=pooling is not None)
    out.mkdir(parents=True, exist_ok=True)  # what forbids it should be known before the work
    _, positions = position_limit(find_body(loaded))
    length = max_length if positions is None else min(max_length, positions)

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(texts), batch_size):
            chosen = texts[start : start + batch_size]
            encoded = tokenizer(chosen, padding=True, truncation=True, max_length=length, return_tensors="pt")
            yield {name: encoded[name] for name in ("input_ids", "attention_mask")}

    return audit(loaded, batches(), HALVES[dtype], pooling=pooling)


def pooling_of(model: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """How a model of sentence-transformers makes an embedding of token states; ``None`` for another model.

    What may come after the pooling is left out. Raises `NotImplementedError` for a pooling that is not known here.
    """
    modules = _read_json(model, "modules.json")
    if modules is None:
        return None
    entries = [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    folder = next((its.get("path") for its in entries if str(its.get("type")).endswith("Pooling")), None)
    config = None if folder is None else _read_json(model, f"{folder}/config.json")
    if not isinstance(config, dict):
        raise NotImplementedError(f"model: expected a Pooling among the modules of {model}, got {modules}")
    modes = config.get("pooling_mode") or [  # as older versions have it
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, chosen in config.items()
        if key.startswith("pooling_mode_") and chosen
    ]
    names = [modes] if isinstance(modes, str) else list(modes)
    if not names or not set(names) <= POOLINGS.keys():
        raise NotImplementedError(
            f"model: expected a pooling of {', '.join(POOLINGS)}, got {', '.join(names) or config}"
        )
    return lambda states, mask: torch.cat([POOLINGS[name](states, mask) for name in names], 1)


def _read_json(model: str, name: str) -> Any:
    found = cached(model, name, {})
    return None if found is None else read_json(Path(found))


def load(path: str, bare: bool = False) -> Any:
    """The float32 model that a checkpoint's ``architectures`` name, with its head unless it is to be ``bare``.

    Of a multimodal one it is the language model.
    Raises `NotImplementedError` for an architecture whose head is of no kind known here.
    """
    config = AutoConfig.from_pretrained(path)
    if (text := text_config(config)) is not None:
        kind = AutoModel if bare else AutoModelForCausalLM
        return kind.from_pretrained(path, **keywords(text, {"dtype": torch.float32}))
    architecture = next(iter(config.architectures or ()), "")
    for head in () if bare else _HEADS:
        if architecture.endswith((f"For{head}", *(("LMHeadModel",) if head == "CausalLM" else ()))):
            return getattr(transformers, f"AutoModelFor{head}").from_pretrained(path, dtype=torch.float32)
    if "For" in architecture and not bare:
        raise NotImplementedError(f"model: expected a head of {', '.join(_HEADS)}, or none, got {architecture}")
    # the class itself, for AutoModel takes T5's encoder for both of its halves
    kind = AutoModel if "For" in architecture else getattr(transformers, architecture, AutoModel)
    return kind.from_pretrained(path, dtype=torch.float32)


def read_texts(path: Path, column: str | None) -> list[str]:
    """The texts of a CSV, TSV or JSONL file (a prompt and its completion are one), or the lines of a .txt file."""
    if path.suffix.lower() != ".txt":
        return [Generation.text_of(passage) for passage in read_passages(path, Columns(text=column))]
    if column is not None:
        raise DataError(path, None, "a .txt file has no columns; leave --text-column out")
    return [line for line in split_lines(read_text(path)) if line.strip()]
