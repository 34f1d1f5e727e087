"""Prompts on whatever model class a checkpoint, or a model in memory, is of."""

import copy
import os
from collections.abc import Iterable
from typing import Any, ClassVar

import transformers

from .config import PTuneConfig, take_settings
from .half_attention import hybrid
from .language import text_config
from .loading import check_keywords, fresh_head, load_model, origin_in_memory, take_dtypes
from .models import ptune_class
from .twin import check_stock, language_model_of, prompted_twin


class AutoPTuneModel:
    """A frozen base without a task head, with prompts (transformers' ``AutoModel``)."""

    _loader: ClassVar[Any] = transformers.AutoModel

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__}: expected a call of from_pretrained(path) or from_config(config)")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load a base and give it prompts, or load a folder of prompts and the base that it names.

        Args:
            path: a base (a folder, or a name on the hub), or prompts (a folder that `save_prompts`, `save_pretrained`
                or Trainer wrote, or the name of a repository on the hub that holds one). Of a multimodal base it is the
                language model that is loaded, where that is one of `ptune.language.MULTIMODAL`.
            tuning_mode, pre_seq_len, deep_prompt_mode, prompt_init, prompt_init_text, base_dropout, prefix_sharing: see
                `PTuneConfig`. They may be attributes of the ``config=`` given instead; the model's own copy of it is
                rid of them.
            tokenizer: reads a ``prompt_init_text`` of strings; by default the base's own.
            base_model: the base of a folder of prompts, where it is no longer in its place.
            attn_dtype, kv_cache_dtype: half precision for the attention of a float32 base, and for its cache: see
                `hybrid`. Without an ``attn_dtype`` a folder of prompts has that of its training, if its base is
                float32 again.

        All other keywords are those of transformers' ``from_pretrained``; with prompts, ``dtype`` is by default the one
        that the base had in training, and ``revision`` and ``subfolder`` are those of the prompts' repository, if they
        come from one. Only prompts and the task head (what the base's checkpoint did not have) require gradients; both
        are float32, whatever the base's dtype.

        Raises `NotImplementedError` for a base that prompts cannot be put on, `ptune.checkpoint.MisfitError` for
        prompts that do not fit the base, and `TypeError` for a keyword that is nearly one of the above.
        """
        return load_model(cls._loader, path, ptune_class, *args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, *, tokenizer: Any = None, **kwargs: Any) -> Any:
        """A base of random weights, with the prompts that ``config`` or the keywords of `from_pretrained` describe."""
        check_keywords(kwargs, config)
        config = text_config(config) or copy.deepcopy(config)
        settings = take_settings(config) | take_settings(kwargs)
        dtypes = take_dtypes(kwargs)
        model = cls._loader.from_config(config, **kwargs)
        model.__class__ = ptune_class(type(model))
        model.adopt(fresh_head(model))
        hybrid(model, **{"attn_dtype": None} | dtypes)
        model.init_prompts(PTuneConfig(**settings), tokenizer)
        return model


class AutoPTuneModelForCausalLM(AutoPTuneModel):
    """Text generation with prompts (transformers' ``AutoModelForCausalLM``)."""

    _loader = transformers.AutoModelForCausalLM


class AutoPTuneModelForSequenceClassification(AutoPTuneModel):
    """Sequence classification with prompts (transformers' ``AutoModelForSequenceClassification``)."""

    _loader = transformers.AutoModelForSequenceClassification


class AutoPTuneModelForTokenClassification(AutoPTuneModel):
    """Token classification with prompts (transformers' ``AutoModelForTokenClassification``)."""

    _loader = transformers.AutoModelForTokenClassification


class AutoPTuneModelForQuestionAnswering(AutoPTuneModel):
    """Extractive question answering with prompts (transformers' ``AutoModelForQuestionAnswering``)."""

    _loader = transformers.AutoModelForQuestionAnswering


class AutoPTuneModelForSeq2SeqLM(AutoPTuneModel):
    """Generation by an encoder-decoder with prompts in its encoder (transformers' ``AutoModelForSeq2SeqLM``)."""

    _loader = transformers.AutoModelForSeq2SeqLM


def with_prompts(base: Any, config: Any = None, *, head: Iterable[str] | None = None, tokenizer: Any = None) -> Any:
    """A model with prompts on the weights of ``base``, a stock transformers model that is loaded already.

    The weights are the same memory, and ``base`` itself stays as it is: it runs without prompts, and further models can
    be made of it. Of a multimodal one (`ptune.language.MULTIMODAL`) the language model is taken. A head that trains is
    the new model's own copy. What is moved or cast later is copied too; what is changed in place is changed in all, as
    where an adapter is merged.

    Args:
        config: a `PTuneConfig`, or a transformers config that bears its fields; by default the base's own. Without
            prompts in it nothing trains until ``load_prompts`` brings prompts and a head.
        head: names of what trains beside the prompts, parameters or modules that hold them. By default all that is
            outside the body, and its pooler unless ``base`` was loaded with it; nothing in a model that predicts words.
        tokenizer: reads a ``prompt_init_text`` of strings; by default the one saved with the base.

    Raises what `AutoPTuneModel.from_pretrained` does, `TypeError` for what is no stock transformers model, and
    `ValueError` for names in ``head`` that it does not have.
    """
    check_stock(base)
    base = language_model_of(base)
    settings = PTuneConfig.of(base.config if config is None else config)
    if head is not None:
        names = _parameters_of(base, head)
    elif settings.tuning_mode is None or base.get_output_embeddings() is not None:
        names = []
    else:
        names = fresh_head(base)
        # a pooler may be as new as the head: transformers marks what it loads from a checkpoint
        pooler = {name: its for name, its in base.named_parameters() if names and "pooler" in name.split(".")}
        names += [name for name, its in pooler.items() if not getattr(its, "_is_hf_initialized", False)]
    model = prompted_twin(base, names)
    model.origin = origin_in_memory(base.config)
    model.init_prompts(settings, tokenizer)
    return model


def _parameters_of(base: Any, names: Iterable[str]) -> list[str]:
    """The parameters that ``names`` name, or that are in the modules that they name."""
    if isinstance(names, str):
        raise TypeError(f"head: expected a list of names, got {names!r}")
    own, found = [name for name, _ in base.named_parameters()], []
    for wanted in names:
        its = [name for name in own if name == wanted or name.startswith(f"{wanted}.")]
        if not its:
            raise ValueError(f"head: expected parameters of {type(base).__name__}, or modules of it, got {wanted!r}")
        found += its
    return list(dict.fromkeys(found))


MODELS = {
    "classification": AutoPTuneModelForSequenceClassification,
    "tagging": AutoPTuneModelForTokenClassification,
    "answering": AutoPTuneModelForQuestionAnswering,
    "generation": AutoPTuneModelForCausalLM,
    "seq2seq": AutoPTuneModelForSeq2SeqLM,
}
