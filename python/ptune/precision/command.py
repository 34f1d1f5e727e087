"""The command `ptune audit`: from a model's folder and a file of texts to a report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel

from ..data import Columns, DataError, read_passages, read_text, split_lines
from ..runs import load_tokenizer
from ..support import find_body, position_limit
from ..tasks import Generation
from .passes import Audit, audit

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_HEADS = ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification")


def audit_files(
    model: str, data: Path, out: Path, dtype: str, text_column: str | None, max_length: int, batch_size: int, count: int
) -> Audit:
    """Audit a model by the first ``count`` batches of the texts of ``data``. Raises: ValueError or OSError."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file")
    texts = read_texts(data, text_column)[: batch_size * count]
    tokenizer = load_tokenizer(model, "classification")
    loaded = load(model)
    out.mkdir(parents=True, exist_ok=True)  # what forbids it should be known before the work
    _, positions = position_limit(find_body(loaded))
    length = max_length if positions is None else min(max_length, positions)

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(texts), batch_size):
            chosen = texts[start : start + batch_size]
            encoded = tokenizer(chosen, padding=True, truncation=True, max_length=length, return_tensors="pt")
            yield {name: encoded[name] for name in ("input_ids", "attention_mask")}

    return audit(loaded, batches(), DTYPES[dtype])


def load(path: str) -> Any:
    """The float32 model that a checkpoint's ``architectures`` name: with its head, or a bare one, for embeddings.

    Raises `NotImplementedError` for an architecture whose head is of no kind known here.
    """
    architecture = next(iter(AutoConfig.from_pretrained(path).architectures or ()), "")
    for head in _HEADS:
        if architecture.endswith((f"For{head}", *(("LMHeadModel",) if head == "CausalLM" else ()))):
            return getattr(transformers, f"AutoModelFor{head}").from_pretrained(path, dtype=torch.float32)
    if "For" in architecture:
        raise NotImplementedError(f"model: expected a head of {', '.join(_HEADS)}, or none, got {architecture}")
    # the class itself, for AutoModel takes T5's encoder for both of its halves
    return getattr(transformers, architecture, AutoModel).from_pretrained(path, dtype=torch.float32)


def read_texts(path: Path, column: str | None) -> list[str]:
    """The texts of a CSV, TSV or JSONL file (a prompt and its completion are one), or the lines of a .txt file."""
    if path.suffix.lower() != ".txt":
        return [Generation.text_of(passage) for passage in read_passages(path, Columns(text=column))]
    if column is not None:
        raise DataError(path, None, "a .txt file has no columns; leave --text-column out")
    return [line for line in split_lines(read_text(path)) if line.strip()]
