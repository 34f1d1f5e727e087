"""From a base, or from a folder of prompts, to a model with prompts."""

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, modeling_utils

from . import checkpoint, hub
from .config import PTuneConfig, settings_on, take_settings
from .half_attention import SETTINGS, checked_dtypes, hybrid
from .language import config_of, is_multimodal, keywords, name_as_alone, text_config
from .quantised import config_from
from .support import refuse_multimodal

_FOR_CONFIG = (*hub.OPTIONS, "trust_remote_code", "code_revision")

_KEYWORDS = (*(field.name for field in fields(PTuneConfig)), *SETTINGS, "base_model", "tokenizer")
_OF_PEFT = {
    "num_virtual_tokens": "pre_seq_len",
    "prompt_tuning_init": "prompt_init",
    "prompt_tuning_init_text": "prompt_init_text",
    "tokenizer_name_or_path": "tokenizer",
}
_NEAR = 0.85  # as difflib measures; transformers' nearest keyword, tokenizer_type, is at 0.78

_logger = logging.getLogger(__name__)


@dataclass
class Origin:
    """The base that prompts were put on: its name or path, its own config, and what was changed of that on loading."""

    name: str
    config: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)


def origin_of(config: Any) -> Origin:
    """The origin of a base that was made from ``config`` alone."""
    return Origin(config.name_or_path, checkpoint.base_config(config))


def origin_in_memory(config: Any) -> Origin:
    """The origin of a base that was loaded by others: what was changed of its own config, where that is at hand."""
    if not (name := config.name_or_path):
        return origin_of(config)
    name = _absolute(name)
    try:
        own = config_of(name, type(config), local_files_only=True)
    except (OSError, ValueError):  # it has moved, or its code is not trusted here
        own = config
    return _origin(name, config, own)


def tokenizer_of(name: str, **options: Any) -> Any:
    """The tokenizer saved with a base, fetched with transformers' ``options`` for the hub."""
    if not name:
        raise ValueError("prompt_init_text: a string needs a tokenizer; pass tokenizer=, or token ids")
    return AutoTokenizer.from_pretrained(name, **options)


def load_model(
    loader: Any,
    path: str | os.PathLike[str],
    class_for: Callable[[type], type],
    *args: Any,
    base_model: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a base as ``loader`` does, make it a ``class_for(its class)``, and give it prompts.

    The base is loaded as its stock class, by whose name and module transformers looks things up, and becomes the other
    class afterwards.
    """
    if not isinstance(path, str | os.PathLike):
        hint = "; ptune.with_prompts takes a model that is loaded already" if isinstance(path, nn.Module) else ""
        raise TypeError(f"expected the name or folder of a base or of prompts, got {type(path).__name__}{hint}")
    settings, halves = take_settings(kwargs), take_dtypes(kwargs)
    found = hub.download(path, **{name: kwargs[name] for name in hub.OPTIONS if name in kwargs})
    if found is not None:
        path = found
        for name in hub.OF_THE_PROMPTS:
            kwargs.pop(name, None)
    saved = checkpoint.read_config(path) if checkpoint.is_prompt_folder(path) else None
    if saved is None:
        check_base_path(path)
    base = _base_of(path, saved, base_model)
    try:
        fetching = {name: kwargs[name] for name in _FOR_CONFIG if name in kwargs}
        own = AutoConfig.from_pretrained(base, **fetching)
    except (OSError, ValueError) as error:
        if saved is None:
            raise
        elsewhere = "base_model (--base-model on the command line) says where it is, if elsewhere"
        raise OSError(f"{path}: its base, {base!r}, cannot be loaded; {elsewhere}: {error}") from error
    if (text := text_config(own)) is None and is_multimodal(own):
        refuse_multimodal(base, own)
    own = text or own
    check_keywords(kwargs, own)
    carried = take_settings(own)
    if saved is None:
        given = kwargs.get("config")
        prompts = PTuneConfig(**(settings_on(given) if isinstance(given, PreTrainedConfig) else carried) | settings)
    else:
        sharing = settings.pop("prefix_sharing", PTuneConfig.prefix_sharing)
        _check_same(settings, saved)
        if "config" not in kwargs:
            kwargs = saved_overrides(saved, own) | kwargs
        kwargs = _saved_defaults(saved, own, kwargs) | kwargs
    if text is not None:
        kwargs = keywords(own, kwargs)
    with _reporting_all_but([] if saved is None else saved["head"], text is not None) as loading:
        model, info = loader.from_pretrained(base, *args, output_loading_info=True, **kwargs)
        loading.append(info)
    if text is not None:
        name_as_alone(model)
    missing = _missing(info)
    _check_whole(base, model, missing)
    take_settings(model.config)
    model.__class__ = class_for(type(model))
    model.adopt(missing - _body_of(model))
    model.origin = _origin(base, model.config, own)
    if not halves and saved is not None and model.dtype == torch.float32:
        halves = {name: saved["base"].get(name) for name in SETTINGS}
    hybrid(model, **{"attn_dtype": None} | halves)
    if saved is None:
        model.init_prompts(prompts, tokenizer or partial(tokenizer_of, base, **fetching))
        if model.num_trainable_parameters() == 0:
            _logger.warning(
                "%s: nothing will train, without prompts and without a new task head; set tuning_mode ('ptune' or "
                "'deep_ptune') and pre_seq_len",
                type(model).__name__,
            )
    else:
        model.ptune_config.prefix_sharing = sharing
        model.load_prompts(path)
    return (model, info) if output_loading_info else model


def check_base_path(path: str | os.PathLike[str]) -> None:
    """Raises `ValueError` for a folder that holds prompts, and `FileNotFoundError` for what can be no base at all."""
    if checkpoint.is_prompt_folder(path):
        raise ValueError(f"{path}: expected a base, got a folder of prompts")
    if os.path.isdir(path):
        files = os.listdir(path)
        if checkpoint.PEFT_CONFIG in files and "config.json" not in files:
            raise ValueError(f"{path}: expected a base or a folder of prompts, got one of PEFT's; see `ptune convert`")
    elif not hub.is_repo_id(os.fspath(path)):
        raise FileNotFoundError(f"{path}: expected a folder, or a name on the hub; there is no such folder")


def take_dtypes(keywords: dict[str, Any]) -> dict[str, Any]:
    """Remove what is for `hybrid` from ``keywords``, and return it. Raises `ValueError` as that does."""
    dtypes = {name: keywords.pop(name) for name in SETTINGS if name in keywords}
    checked_dtypes(*(dtypes.get(name) for name in SETTINGS))
    return dtypes


def check_keywords(keywords: Iterable[str], config: Any) -> None:
    """Raises `TypeError` for what can only be one of our keywords misspelt: a setting of ``config`` is none.

    transformers' own keywords are far from ours. Code that comes with a model may take others.
    """
    if "trust_remote_code" in keywords:
        return
    for name in keywords:
        near = [_OF_PEFT[name]] if name in _OF_PEFT else difflib.get_close_matches(name, _KEYWORDS, 1, _NEAR)
        if near and name not in _KEYWORDS and not hasattr(config, name):
            raise TypeError(f"{name}: unknown keyword; did you mean {near[0]}?")


def _missing(info: dict[str, Any]) -> set[str]:
    """Parameters that the checkpoint did not have, or had in another shape."""
    return set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}


def _check_whole(base: str, model: Any, missing: set[str]) -> None:
    """Raises `ValueError` where blocks or the table of tokens are not in the checkpoint: they would train as a head.

    Much else of a body is rightly missing, such as tables of positions that are computed.
    """
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    own = {id(its) for module in (*lists, model.get_input_embeddings()) for its in module.parameters()}
    random = sorted(name for name, its in model.named_parameters() if name in missing and id(its) in own)
    if random:
        raise ValueError(
            f"{base}: expected all weights of {type(model.base_model).__name__}, in the shapes of its config; lacking "
            f"or of other shapes: {', '.join(random[:3])}{', …' * (len(random) > 3)}"
        )


def fresh_head(model: Any) -> list[str]:
    """The head of a model made without a checkpoint: all outside the body, but for the table of output words."""
    inside = {id(p) for p in model.base_model.parameters()}
    if (output := model.get_output_embeddings()) is not None:
        inside |= {id(p) for p in output.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in inside]


def _body_of(model: Any) -> set[str]:
    """The names of what is no head; the pooler, which some models have in the body, is of the task."""
    inside = {id(its) for name, its in model.base_model.named_parameters() if "pooler" not in name.split(".")}
    return {name for name, its in model.named_parameters() if id(its) in inside}


def _origin(name: str, used: Any, own: Any) -> Origin:
    before, after = checkpoint.base_config(own), checkpoint.base_config(used)
    overrides = {name: value for name, value in after.items() if before.get(name) != value}
    return Origin(name, before, overrides)


def _base_of(path: Any, saved: dict[str, Any] | None, base_model: Any) -> str:
    """The base to load: ``path`` itself; or, of a folder of prompts, the one in it, or where it was in training."""
    if saved is None:
        if base_model is not None:
            raise ValueError(
                f"base_model: expected with a folder of prompts, and {path} has no {checkpoint.CONFIG_NAME}"
            )
        base = path
    elif base_model is not None:
        base = base_model
    else:
        base = saved["base"]["name"]
        if not base:
            raise ValueError(
                f"base_model: expected one, since the base of {path} was made from a config, and was not saved with it"
            )
        if (inside := base_inside(path, saved)) is not None:
            base = inside
    return _absolute(base)


def _absolute(base: Any) -> str:
    """A folder's path that is good from another directory too, where prompts may be saved; or a name on the hub."""
    return os.path.abspath(base) if os.path.isdir(base) else os.fspath(base)


def base_inside(folder: str | os.PathLike[str], saved: dict[str, Any]) -> Path | None:
    """The base that ``folder`` holds beside its prompts, if it does: see ``save_pretrained``."""
    inside = Path(folder, checkpoint.BASE_FOLDER)
    return inside if saved["base"]["name"] == checkpoint.BASE_FOLDER and inside.is_dir() else None


def saved_overrides(saved: dict[str, Any], own: Any) -> dict[str, Any]:
    """How the base's config was changed: its own settings alone, lest a folder slip in a keyword that trusts code."""
    known = checkpoint.base_config(own)
    return {name: value for name, value in saved["base"]["overrides"].items() if name in known} | saved_labels(saved)


def saved_labels(saved: dict[str, Any]) -> dict[str, Any]:
    """The task's part of a base's config: its labels, and of what kind they are."""
    labels: dict[str, Any] = {}
    if saved["id2label"] is not None:
        labels["id2label"] = {int(i): label for i, label in saved["id2label"].items()}
        labels["label2id"] = {label: i for i, label in labels["id2label"].items()}
    if saved.get("problem_type") is not None:
        labels["problem_type"] = saved["problem_type"]
    return labels


def _saved_defaults(saved: dict[str, Any], own: Any, given: dict[str, Any]) -> dict[str, Any]:
    """How a base is loaded for a folder of prompts, unless told otherwise."""
    defaults: dict[str, Any] = {}
    if saved["head"]:
        defaults["ignore_mismatched_sizes"] = True  # the head may have replaced one of the checkpoint's
    if (dtype := saved["base"].get("dtype")) is not None and "torch_dtype" not in given:
        defaults["dtype"] = getattr(torch, dtype)
    quantisation = saved["base"].get("quantization")
    if quantisation is not None and getattr(own, "quantization_config", None) is None:
        defaults["quantization_config"] = config_from(quantisation)
    return defaults


@contextmanager
def _reporting_all_but(head: list[str], in_part: bool) -> Iterator[list[dict[str, Any]]]:
    """Keep transformers from reporting that ``head`` is new and needs training: it comes from the folder of prompts.

    And what it did not expect, where a checkpoint is loaded ``in_part``. The loading information is to be appended to
    the list; where more than ``head`` is new, it is reported after all.
    """
    held: list[logging.LogRecord] = []
    loading: list[dict[str, Any]] = []

    def hold(record: logging.LogRecord) -> bool:
        report = (in_part or bool(head)) and "LOAD REPORT" in record.getMessage()
        if report and in_part:
            lines = record.getMessage().splitlines()
            record.msg, record.args = "\n".join(line for line in lines if "UNEXPECTED" not in line), ()
        if report:
            held.append(record)
        return not report

    logger = logging.getLogger(modeling_utils.__name__)
    logger.addFilter(hold)
    try:
        yield loading
    finally:
        logger.removeFilter(hold)
        new = _missing(loading[0]) if loading else {""}
        if not new <= set(head) or not (new or in_part):
            for record in held:
                logger.handle(record)


def _check_same(settings: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(f"{name}: this folder of prompts has {saved.get(name)!r}, got {value!r}; leave it out")
