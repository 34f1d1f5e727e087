"""Where soft prompts start: what the frozen base itself has at real tokens.

Initialisation decides whether prompts learn: rows far from the scale of real embeddings and hidden states do not. Every
choice is drawn from torch's global generator.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import device_of, find_blocks, find_body, position_limit
from .config import InitText, PTuneConfig
from .support import lack_of_positions

_SAMPLE = 256  # tokens whose norms are measured
_CONTEXT = 512  # tokens of a sampled text that are read

Tokenise = Callable[[str, bool], list[int]]


@torch.no_grad()
def initial_prompts(model: Any, settings: PTuneConfig, tokenise: Tokenise) -> tuple[Tensor, Tensor | None]:
    """The first values of the prompts of ``model`` (prompts off, in evaluation mode), on the CPU in float32.

    Returns ``prompt_embeddings`` [m, d] and ``intermediate_prompt_embeddings`` [L·m, d] or ``None``. ``tokenise(text,
    special_tokens)`` turns a string into token ids. Raises `ValueError` for more rows than learned positions leave room
    for, and for a base without values.
    """
    if device_of(model.get_input_embeddings()).type == "meta":
        raise ValueError(
            "tuning_mode: expected a base whose weights prompts can start from, got one on the meta device; leave out "
            "init_empty_weights, and fsdp_cpu_ram_efficient_loading"
        )
    if (lack := lack_of_positions(model, settings.pre_seq_len)) is not None:
        raise ValueError(lack)
    if settings.prompt_init == "random":
        shallow, layers = _random(model, settings)
    elif settings.prompt_init == "vocab":
        shallow, layers = _states(model, _real_tokens(model, settings.pre_seq_len), settings.deep)
    else:
        shallow, layers = _from_text(model, settings, settings.prompt_init_text, tokenise)
    if not settings.deep:
        return shallow, None
    if settings.deep_prompt_mode == "add":
        layers = torch.zeros_like(layers)
    # block 0 adds its rows to what the shallow ones became there
    layers[0] = 0
    return shallow, layers.flatten(0, 1)


def tokenise_with(tokenizer: Any) -> Tokenise:
    """By a tokenizer, or by the one that a function returns when it is first needed."""

    def tokenise(text: str, special_tokens: bool) -> list[int]:
        nonlocal tokenizer
        if not hasattr(tokenizer, "encode"):
            tokenizer = tokenizer()
        return tokenizer.encode(text, add_special_tokens=special_tokens)

    return tokenise


def _random(model: Any, settings: PTuneConfig) -> tuple[Tensor, Tensor]:
    ids = _real_tokens(model, _readable(model, _SAMPLE))
    shallow, layers = _states(model, ids, settings.deep)
    count = settings.pre_seq_len
    rows = [_of_norm(shallow, count)] + [_of_norm(layer, count) for layer in layers]
    return rows[0], torch.stack(rows[1:]) if settings.deep else layers


def _of_norm(real: Tensor, count: int) -> Tensor:
    """Random directions, each as long as the median row of ``real``: a few massive activations dominate a mean."""
    rows = torch.randn(count, real.shape[-1])
    return rows * (real.norm(dim=-1).median() / rows.norm(dim=-1, keepdim=True))


def _from_text(model: Any, settings: PTuneConfig, texts: InitText | None, tokenise: Tokenise) -> tuple[Tensor, Tensor]:
    count = settings.pre_seq_len
    assert texts is not None  # PTuneConfig sees to it
    if hasattr(texts, "tolist"):
        texts = texts.tolist()  # a pandas Series is indexed by its labels
    if isinstance(texts, str) or isinstance(_number(texts[0]), int):
        ids = _token_ids(model, texts, tokenise, special_tokens=False)
        return _states(model, torch.tensor([ids[i % len(ids)] for i in range(count)]), settings.deep)
    # one token of each of m sampled texts, in the context of its own text
    order = torch.cat([torch.randperm(len(texts)) for _ in range(-(-count // len(texts)))])[:count]
    rows = []
    for index in order.tolist():
        ids = _token_ids(model, texts[index], tokenise, special_tokens=True)
        shallow, layers = _states(model, torch.tensor(ids), settings.deep)
        position = int(torch.randint(len(ids), ()))
        rows.append((shallow[position], layers[:, position]))
    return torch.stack([shallow for shallow, _ in rows]), torch.stack([layers for _, layers in rows], dim=1)


def _token_ids(model: Any, text: Any, tokenise: Tokenise, *, special_tokens: bool) -> list[int]:
    if isinstance(text, str):
        ids = tokenise(text, special_tokens)
    else:
        ids = [_number(token) for token in text] if hasattr(text, "__len__") else text
    if isinstance(ids, list) and not ids:
        raise ValueError(f"prompt_init_text: expected at least one token, got {text!r}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if not isinstance(ids, list) or not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
        raise ValueError(f"prompt_init_text: expected token ids from 0 to {vocabulary - 1}, got {ids!r}")
    return ids[: _readable(model, _CONTEXT)]


def _number(token: Any) -> Any:
    """What an array or a tensor holds, if ``token`` is of one."""
    return token.tolist() if hasattr(token, "tolist") else token


def _readable(model: Any, count: int) -> int:
    """``count``, or as many tokens as the model has positions for, learned or computed in advance."""
    _, learned = position_limit(find_body(model))
    limits = [learned, getattr(model.config, "max_position_embeddings", None)]
    return min([count, *(limit for limit in limits if limit is not None and limit > 0)])


def _real_tokens(model: Any, count: int) -> Tensor:
    """``count`` token ids, without the special ones that the config names."""
    config = model.config
    special: set[int] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
        value = getattr(config, name, None)
        special |= set(value if isinstance(value, Sequence) else [] if value is None else [value])
    real = torch.tensor([i for i in range(model.get_input_embeddings().num_embeddings) if i not in special])
    return real[torch.randint(len(real), (count,))]


def _states(model: Any, ids: Tensor, deep: bool) -> tuple[Tensor, Tensor]:
    """Embeddings [n, d] of one text, and the input of every block on it [L, n, d] ([0, n, 0] if not ``deep``)."""
    embedding = model.get_input_embeddings()
    ids = ids.to(device_of(embedding))[None]
    shallow = embedding(ids)[0].float().cpu()
    if not deep:
        return shallow, torch.empty(0, ids.shape[1], 0)
    states: list[Tensor] = []

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
            raise NotImplementedError(
                f"{type(block).__name__}: deep prompts need block inputs of shape [b, n, d], got {tuple(hidden.shape)}"
            )
        states.append(hidden[0].float().cpu())

    body = find_body(model)
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in find_blocks(body, model.config)]
    try:
        body(input_ids=ids, attention_mask=torch.ones_like(ids), **no_cache)
    finally:
        for handle in handles:
            handle.remove()
    if not states:
        raise NotImplementedError(
            f"{type(body).__name__}: deep prompts need blocks whose hooks are called, and none was"
        )
    return shallow, torch.stack(states)
