"""What a task is called: here, on the hub, by PEFT, and in the names of transformers' classes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers.models.auto import modeling_auto


class Kind(NamedTuple):
    """A kind of task.

    Attributes:
        task: its name here; ``None`` without a head.
        tag: the hub's name of it.
        peft: PEFT's ``task_type``.
        loader: what follows ``AutoModel`` and ``AutoPTuneModel``.
        classes: transformers' classes for it, by type of model.
    """

    task: str | None
    tag: str
    peft: str
    loader: str
    classes: Mapping[str, Any]


KINDS = (
    Kind(
        "classification", "text-classification", "SEQ_CLS", "ForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    Kind(
        "tagging", "token-classification", "TOKEN_CLS", "ForTokenClassification",
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    Kind(
        "answering", "question-answering", "QUESTION_ANS", "ForQuestionAnswering",
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
    Kind(
        "generation", "text-generation", "CAUSAL_LM", "ForCausalLM",
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    Kind(
        "seq2seq", "text2text-generation", "SEQ_2_SEQ_LM", "ForSeq2SeqLM",
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
    Kind(None, "feature-extraction", "FEATURE_EXTRACTION", "", modeling_auto.MODEL_MAPPING_NAMES),
)  # fmt: skip


def kind_of(model_class: str) -> Kind | None:
    """The kind of task that a class of transformers' is for; ``None`` of another."""
    return next((kind for kind in KINDS if model_class in kind.classes.values()), None)
