"""What is trained on a frozen base, and how it starts: `PTuneConfig`."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

TUNING_MODES = (None, "ptune", "deep_ptune")
DEEP_PROMPT_MODES = ("overwrite", "add")
PREFIX_SHARINGS = ("auto", True, False)
PROMPT_INITS = ("random", "vocab", "text")
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # as commands and their files take them too

InitText = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]


@dataclass(kw_only=True)
class PTuneConfig:
    """The soft prompt of a model.

    Args:
        pre_seq_len: rows m of the prompt; 0 without one.
        tuning_mode: ``None`` (only the task head trains), ``"ptune"`` (prompt rows before the text) or ``"deep_ptune"``
            (prompt rows before the text and at the input of every block).
        deep_prompt_mode: ``"overwrite"`` (from block 1 on, the prompt rows become the block's own) or ``"add"``.
        prompt_init: ``"random"``, ``"vocab"`` or ``"text"``; by default ``"text"`` where a text is given, else
            ``"random"``.
        prompt_init_text: what ``"text"`` starts from. One text (a string, or its token ids) is read row by row; several
            (a list of either: the training data) are sampled.
        base_dropout: keep the frozen base's dropout in training.
        prefix_sharing: ``"auto"`` (prompt rows are computed once for the whole batch, where that is exact), ``False``
            (with every row), or ``True`` (as ``"auto"``, but an error where they cannot be shared).

    Raises `ValueError` or `TypeError`, naming the argument, for anything else.
    """

    pre_seq_len: int = 0
    tuning_mode: str | None = None
    deep_prompt_mode: str = "overwrite"
    prompt_init: str | None = None
    prompt_init_text: InitText | None = None
    base_dropout: bool = False
    prefix_sharing: str | bool = "auto"

    def __post_init__(self) -> None:
        _check_choice("tuning_mode", self.tuning_mode, TUNING_MODES)
        _check_choice("deep_prompt_mode", self.deep_prompt_mode, DEEP_PROMPT_MODES)
        _check_choice("prefix_sharing", self.prefix_sharing, PREFIX_SHARINGS)
        if not isinstance(self.base_dropout, bool):
            raise TypeError(f"base_dropout: expected a bool, got {self.base_dropout!r}")
        if isinstance(self.pre_seq_len, bool) or not isinstance(self.pre_seq_len, int):
            raise TypeError(f"pre_seq_len: expected an int, got {self.pre_seq_len!r}")
        if self.tuning_mode is None and self.pre_seq_len != 0:
            raise ValueError(
                f"pre_seq_len: expected 0 with tuning_mode=None, got {self.pre_seq_len}; "
                "set tuning_mode to 'ptune' or 'deep_ptune'"
            )
        if self.tuning_mode is not None and self.pre_seq_len < 1:
            raise ValueError(
                f"pre_seq_len: expected at least 1 with tuning_mode={self.tuning_mode!r}, got {self.pre_seq_len}"
            )
        if self.prompt_init_text is not None:
            _check_text(self.prompt_init_text)
        if self.prompt_init is None:
            self.prompt_init = "random" if self.prompt_init_text is None else "text"
        _check_choice("prompt_init", self.prompt_init, PROMPT_INITS)
        if (self.prompt_init == "text") != (self.prompt_init_text is not None):
            raise ValueError(
                f"prompt_init_text: expected with prompt_init='text' (its default) and only there, got "
                f"prompt_init={self.prompt_init!r} and {'no text' if self.prompt_init_text is None else 'a text'}"
            )

    @property
    def deep(self) -> bool:
        """Whether every block has prompt rows of its own."""
        return self.tuning_mode == "deep_ptune"

    @classmethod
    def of(cls, config: Any) -> "PTuneConfig":
        """``config`` itself, or the settings that were put on a transformers config as attributes of these names."""
        if isinstance(config, cls):
            return config
        if not hasattr(config, "model_type"):
            raise TypeError(f"config: expected a PTuneConfig or a transformers config, got {type(config).__name__}")
        return cls(**settings_on(config))


_SETTINGS = tuple(field.name for field in fields(PTuneConfig))


def settings_on(config: Any) -> dict[str, Any]:
    """The prompt's settings among the attributes of a transformers config."""
    return {name: value for name, value in vars(config).items() if name in _SETTINGS}


def take_settings(source: Any) -> dict[str, Any]:
    """Remove the prompt's settings from a dict of keywords, or from a transformers config, and return them.

    A transformers config must not keep them: saved in ``config.json``, they would promise prompts to a plain
    ``AutoModel``, which knows none.
    """
    attributes = source if isinstance(source, dict) else vars(source)
    return {name: attributes.pop(name) for name in _SETTINGS if name in attributes}


def _check_text(text: Any) -> None:
    try:
        length = None if isinstance(text, Mapping) or not hasattr(text, "__getitem__") else len(text)
    except TypeError:  # a tensor without dimensions
        length = None
    if length is None:
        raise TypeError(
            f"prompt_init_text: expected a string, its token ids, or a list of either, got {reprlib.repr(text)}"
        )
    if length == 0:
        raise ValueError("prompt_init_text: expected a text or texts, got an empty one")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices or type(value) is int:  # to Python, 0 is among False and 1 among True
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
