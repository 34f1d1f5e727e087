"""Folders of prompts: ``model.safetensors`` (prompts and head, float32) and ``ptune_config.json``, and no base.

There is no ``config.json``: a plain ``AutoModel`` must not load such a folder and silently ignore the prompts.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import PROMPT_INITS, PTuneConfig
from .half_attention import CACHES, HALVES

FORMAT_VERSION = 1
CONFIG_NAME = "ptune_config.json"
WEIGHTS_NAME = "model.safetensors"  # Trainer's resume and best-model reload look for this name
BASE_FOLDER = "base"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPTS = ("prompt_embeddings.weight", "intermediate_prompt_embeddings.weight")
COMPILED = "compiled_prefix."
PROMPT_MODULES = tuple(name.partition(".")[0] for name in (*PROMPTS, COMPILED))  # in the order that models have

# What may differ between two copies of one base, or is the task's.
_NOT_THE_BASE = {
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "quantization_config",
}  # fmt: skip
_KEYS: dict[str, type | tuple[type, ...]] = {
    "format_version": int, "base": dict, "model_class": str, "tuning_mode": (str, type(None)), "pre_seq_len": int,
    "deep_prompt_mode": str, "prompt_init": str, "base_dropout": bool, "embedding_size": int, "hidden_size": int,
    "num_layers": int, "head": list, "id2label": (dict, type(None)), "problem_type": (str, type(None)),
}  # fmt: skip
_BASE_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str, "fingerprint": str, "config": dict, "overrides": dict, "dtype": (str, type(None)),
    "quantization": (dict, type(None)), "attn_dtype": (str, type(None)), "kv_cache_dtype": (str, type(None)),
    "weights": (list, type(None)),
}  # fmt: skip
_ADDED_LATER = ("problem_type", "dtype", "quantization", "attn_dtype", "kv_cache_dtype", "weights")
_NUMBERS = re.compile("([0-9a-f]{4})*")  # of `ptune.likeness`
# None: a folder of before these were saved
_DTYPES = (None, "float64", "float32", "float16", "bfloat16")
_PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


class MisfitError(ValueError):
    """Prompts that do not fit the base they were to be put on; the message says why."""


def base_config(config: Any) -> dict[str, Any]:
    """What of a transformers config makes the base that prompts were trained on."""
    return _comparable(json.loads(json.dumps(config.to_dict(), default=str)))


def _comparable(described: Any) -> Any:
    """Without what two copies of one base may differ in, in the configs inside a config too."""
    if not isinstance(described, dict):
        return described
    kept = {name: value for name, value in described.items() if name not in _NOT_THE_BASE and "drop" not in name}
    return {name: _comparable(value) for name, value in sorted(kept.items())}


def fingerprint(described: dict[str, Any]) -> str:
    """sha256 of what `base_config` returns."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def trained_config(saved: dict[str, Any]) -> dict[str, Any]:
    """The base's config in the training of prompts that a ``ptune_config.json`` describes."""
    return saved["base"]["config"] | saved["base"]["overrides"]


def differences(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Where two bases differ, as sentences; a setting that only one version of transformers knows is no difference."""
    return [
        f"{name}: {saved[name]!r} in the base of the prompts, {present[name]!r} here"
        for name in saved.keys() & present.keys()
        if saved[name] != present[name]
    ]


def is_prompt_folder(path: Any) -> bool:
    # one whose config is no file is damaged, and not a base
    return isinstance(path, str | os.PathLike) and os.path.lexists(os.path.join(path, CONFIG_NAME))


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed ``ptune_config.json`` of a folder.

    Raises `FileNotFoundError` without one, and `ValueError` for one that is malformed or of another format version.
    """
    path = Path(folder, CONFIG_NAME)
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        got = f"one without {CONFIG_NAME}" if Path(folder).is_dir() else "no such folder"
        if Path(folder, PEFT_CONFIG).is_file():
            got = "one of PEFT's: `ptune convert` makes it ours"
        raise FileNotFoundError(f"{folder}: expected a folder of prompts, got {got}") from None
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        found = config.get("format_version") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {found!r}")
    for part, kinds in ((config, _KEYS), (config.get("base", {}), _BASE_KEYS)):
        for name, kind in kinds.items():
            if (name not in part and name not in _ADDED_LATER) or not isinstance(part.get(name), kind):
                raise ValueError(f"{path}: {name}: expected {kind}, got {part.get(name)!r}")
    for part, name, choices in (
        (config, "prompt_init", PROMPT_INITS),
        (config, "problem_type", _PROBLEM_TYPES),
        (config["base"], "dtype", _DTYPES),
        (config["base"], "attn_dtype", (None, *HALVES)),
        (config["base"], "kv_cache_dtype", (None, *CACHES)),
    ):
        if part.get(name) not in choices:
            raise ValueError(f"{path}: {name}: expected one of {', '.join(map(repr, choices))}, got {part[name]!r}")
    if not all(isinstance(name, str) for name in config["head"]):
        raise ValueError(f"{path}: head: expected names of parameters, got {config['head']!r}")
    if not all(isinstance(its, str) and _NUMBERS.fullmatch(its) for its in config["base"].get("weights") or ()):
        raise ValueError(
            f"{path}: weights: expected numbers of 16 bits in hexadecimal, got {config['base']['weights']!r}"
        )
    _check_labels(path, config)
    for name in ("config", "overrides"):
        config["base"][name] = _comparable(config["base"][name])  # which was once cleared at its top alone
    try:
        settings_of(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _check_labels(path: Any, config: dict[str, Any]) -> None:
    labels = config.get("id2label") or {}  # PEFT's have none
    if not all(number.isdecimal() and isinstance(label, str | int) for number, label in labels.items()):
        raise ValueError(f"{path}: id2label: expected labels by their numbers, got {labels!r}")


def read_json(path: Path) -> Any:
    """What the file says. Raises `ValueError` for one that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def settings_of(saved: dict[str, Any]) -> PTuneConfig:
    """The settings of the prompts that a ``ptune_config.json`` describes, without the text that they started from."""
    names = ("tuning_mode", "pre_seq_len", "deep_prompt_mode", "base_dropout")
    settings = PTuneConfig(**{name: saved[name] for name in names})
    settings.prompt_init = saved["prompt_init"]
    return settings


def compiled_names(settings: PTuneConfig, num_layers: int) -> list[str]:
    """The names of a compiled prefix's tensors: the key of layer 0, its value, the key of layer 1, …"""
    if settings.tuning_mode is None:
        return []
    return [f"{COMPILED}{kind}_{depth}" for depth in range(num_layers) for kind in ("key", "value")]


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The prompts and head of a folder, on the CPU.

    Raises `FileNotFoundError` without them, and `ValueError` for a damaged file, or for what is not finite float32.
    """
    path = Path(folder, WEIGHTS_NAME)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # copies: what the file gives lies in it, and would go with it when it is written over
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path}: {name}: expected float32, got {str(tensor.dtype).removeprefix('torch.')}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name}: expected finite numbers, got NaN or infinity among them")
    return tensors


def write(
    folder: str | os.PathLike[str],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    names: tuple[str, str] = (CONFIG_NAME, WEIGHTS_NAME),
) -> None:
    """Write both files, each whole or not at all; the config last, so that a folder which has one is complete.

    Raises what `check_free` does, and `ValueError` for labels that are neither text nor numbers.
    """
    _check_labels(folder, config)
    if names[1] == WEIGHTS_NAME:
        check_free(folder)
    os.makedirs(folder, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    replace_file(Path(folder, names[1]), lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    replace_file(Path(folder, names[0]), lambda path: path.write_text(text, encoding="utf-8"))


def check_free(folder: str | os.PathLike[str]) -> None:
    """Raises `ValueError` for the folder of a whole model, whose weights prompts would be written over."""
    if Path(folder, "config.json").exists():
        raise ValueError(
            f"{folder}: expected a folder for prompts, got one of a model, which they would be written over"
        )


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    replace_file(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Make the file at ``path`` what ``write_to`` writes to the scratch path it is given, whole or not at all."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    scratch.touch(exist_ok=False)  # with the permissions that new files have here, which ``write_to`` may not keep
    mode = scratch.stat().st_mode
    try:
        write_to(scratch)
        scratch.chmod(mode)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
