"""Tiny random models, saved as the folders that a command is given."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from .tiny import SPECIAL, WORDS, word_tokenizer


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        initializer_range=0.3,  # at the usual 0.02 a random model hardly looks at its text
    )
    return _saved(BertModel(config), word_tokenizer(), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return _saved(LlamaForCausalLM(config), word_tokenizer("[CLS] $A"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    """Has a table of 24 positions, where rotary embeddings know no end."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(SPECIAL + WORDS),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=24,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return _saved(GPT2LMHeadModel(config), word_tokenizer("[CLS] $A"), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(SPECIAL + WORDS),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    return _saved(T5ForConditionalGeneration(config), word_tokenizer("$A [SEP]"), tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def tiny_bart(tmp_path_factory) -> Path:
    """Has tables of 24 positions, one for the encoder and one for the decoder."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(SPECIAL + WORDS),
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=24,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    )
    return _saved(BartForConditionalGeneration(config), word_tokenizer(), tmp_path_factory.mktemp("bart"))


def _saved(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
