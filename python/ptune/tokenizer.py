"""The tokenizer of a base, as a task needs it."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .tasks import WRITING


def load_tokenizer(base: str, task: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token, and what else the task needs of it. Raises: ValueError without."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **({"add_prefix_space": True} if task == "tagging" else {}))
    except (OSError, ValueError):
        raise
    except Exception as error:  # reading damaged files may fail in any way
        raise ValueError(f"model: the tokenizer of {base} cannot be read: {error}") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made from the config alone
        raise ValueError(
            f"model: expected a tokenizer in {base}, got one without a vocabulary; save it beside the base"
        )
    if task == "tagging" and not tokenizer.is_fast:
        raise ValueError(f"model: tagging needs a fast tokenizer, and {base} has none")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(f"model: the tokenizer of {base} has no token to pad with; save one with a pad_token")
    if task in WRITING and tokenizer.eos_token_id is None:
        raise ValueError(f"model: generation learns where to end, and the tokenizer of {base} has no eos_token")
    if task == "seq2seq" and getattr(tokenizer, "tgt_lang", "") is None:
        raise ValueError(f"model: the tokenizer of {base} must be told languages; save one with src_lang and tgt_lang")
    return tokenizer
