"""From a base, or from a folder of prompts, to a model with prompts."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from . import checkpoint
from .config import PTuneConfig, take_settings

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class Origin:
    """The base that prompts were put on: its name or path, its own config, and what was changed of that on loading."""

    name: str
    config: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)


def origin_of(config: Any) -> Origin:
    """The origin of a base that was made from ``config`` alone."""
    return Origin(config.name_or_path, checkpoint.base_config(config))


def tokenizer_of(name: str) -> Any:
    """The tokenizer saved with a base."""
    return AutoTokenizer.from_pretrained(name)


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
    settings = take_settings(kwargs)
    saved = checkpoint.read_config(path) if checkpoint.is_prompt_folder(path) else None
    if saved is not None:
        _check_same(settings, saved)
        base = _base_of(Path(path), saved) if base_model is None else base_model
        kwargs = _saved_overrides(saved) | kwargs
    elif base_model is not None:
        raise ValueError(f"base_model: expected with a folder of prompts, and {path} holds no {checkpoint.CONFIG_NAME}")
    else:
        base = path
    model, info = loader.from_pretrained(base, *args, output_loading_info=True, **kwargs)
    settings = take_settings(model.config) | settings
    model.__class__ = class_for(type(model))
    model.adopt(_missing(info))
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    model.origin = _origin(os.fspath(base), model.config, type(model.config).from_pretrained(base, **hub))
    if saved is None:
        model.init_prompts(PTuneConfig(**settings), tokenizer)
    else:
        model.load_prompts(path)
    return (model, info) if output_loading_info else model


def _missing(info: dict[str, Any]) -> set[str]:
    """Parameters that the checkpoint did not have, or had in another shape."""
    return set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}


def _origin(name: str, used: Any, own: Any) -> Origin:
    take_settings(own)
    before, after = checkpoint.base_config(own), checkpoint.base_config(used)
    overrides = {name: value for name, value in after.items() if before.get(name) != value}
    return Origin(name, before, overrides)


def _base_of(folder: Path, saved: dict[str, Any]) -> str:
    """Where the base of a folder of prompts is: in the folder itself, or where it was when they were trained."""
    name = saved["base"]["name"]
    inside = folder / name
    return str(inside) if name == checkpoint.BASE_FOLDER and inside.is_dir() else name


def _saved_overrides(saved: dict[str, Any]) -> dict[str, Any]:
    overrides = dict(saved["base"]["overrides"])
    if saved["id2label"] is not None:
        overrides["id2label"] = {int(i): label for i, label in saved["id2label"].items()}
        overrides["label2id"] = {label: i for i, label in overrides["id2label"].items()}
    return overrides


def _check_same(settings: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in settings.items():
        if name in saved and saved[name] != value:
            raise ValueError(f"{name}: this folder of prompts has {saved[name]!r}, got {value!r}; leave it out")
