"""A tokenizer with a token per word, for tiny random models."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [
    "good",
    "bad",
    "red",
    "blue",
    "one",
    "two",
    "three",
    "the",
    "a",
    "is",
    "was",
    "Ann",
    "Bob",
    "Rome",
    "Oslo",
    "in",
]


def word_tokenizer(template: str = "[CLS] $A [SEP]") -> PreTrainedTokenizerFast:
    """A token per word of WORDS and per run of punctuation; SPECIAL frame it as `template` says."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
