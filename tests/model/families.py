"""Tiny random models of every family under test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as hf
from torch import nn

VOCABULARY = 61
LAYERS = 3
PAD = 0

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "head_dim": 6}


@dataclass
class Family:
    """A model family: its config, where its blocks are, and whether text is read from left to right."""

    name: str
    config: Callable[[], Any]
    blocks: Callable[[Any], nn.ModuleList]
    causal: bool = True
    core: bool = True

    def body_class(self) -> Any:
        return hf.MODEL_MAPPING[type(self.config())]


def _family(name: str, config: type, sizes: dict[str, Any], blocks: str, **rest: Any) -> Family:
    def find(body: Any) -> nn.ModuleList:
        for step in blocks.split("."):
            body = getattr(body, step)
        return body

    return Family(name, lambda: config(**sizes), find, **rest)


FAMILIES = {
    family.name: family
    for family in [
        _family("llama", hf.LlamaConfig, _GROUPED, "layers"),
        # flex_attention on a GPU wants heads of 16 at least
        _family("llama-wide", hf.LlamaConfig, _GROUPED | {"head_dim": 16}, "layers", core=False),
        _family("qwen3", hf.Qwen3Config, _GROUPED | {"tie_word_embeddings": True}, "layers"),
        _family("mistral", hf.MistralConfig, _GROUPED | {"sliding_window": 5}, "layers"),
        _family(
            "gemma3",
            hf.Gemma3TextConfig,
            _GROUPED
            | {
                "sliding_window": 4,
                "query_pre_attn_scalar": 6,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "layers",
        ),
        # its layers look tokens up again, the last reads the keys of the first, and between them heads are narrower
        _family(
            "gemma4",
            hf.Gemma4TextConfig,
            _GROUPED
            | {
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "num_kv_shared_layers": 1,
                "global_head_dim": 12,
                "hidden_size_per_layer_input": 16,
                "vocab_size_per_layer_input": VOCABULARY,
            },
            "layers",
            core=False,
        ),
        _family("gpt2", hf.GPT2Config, _SIZES, "h"),
        _family("bert", hf.BertConfig, _SIZES, "encoder.layer", causal=False),
        _family("roberta", hf.RobertaConfig, _SIZES | {"pad_token_id": 1}, "encoder.layer", causal=False),
        _family(
            "modernbert",
            hf.ModernBertConfig,
            _SIZES | {"global_attn_every_n_layers": 2, "local_attention": 8, "initializer_range": 0.2},
            "layers",
            causal=False,
        ),
        _family(
            "distilbert",
            hf.DistilBertConfig,
            {
                "vocab_size": VOCABULARY,
                "dim": 24,
                "hidden_dim": 40,
                "n_layers": LAYERS,
                "n_heads": 4,
                "pad_token_id": PAD,
                "initializer_range": 0.3,
                "max_position_embeddings": 64,
            },
            "transformer.layer",
            causal=False,
            core=False,
        ),
        _family(
            "mixtral",
            hf.MixtralConfig,
            _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
            "layers",
            core=False,
        ),
        _family(
            "opt",
            hf.OPTConfig,
            _SIZES
            | {
                "ffn_dim": 40,
                "word_embed_proj_dim": 24,
                "init_std": 0.3,
                "dropout": 0.1,
                "layerdrop": 0.2,
            },
            "decoder.layers",
            core=False,
        ),
        _family(
            "electra", hf.ElectraConfig, _SIZES | {"embedding_size": 16}, "encoder.layer", causal=False, core=False
        ),
        _family(
            "albert",
            hf.AlbertConfig,
            _SIZES | {"embedding_size": 16, "num_hidden_groups": 1},
            "encoder.albert_layer_groups",
            causal=False,
            core=False,
        ),
        _family("gpt_neox", hf.GPTNeoXConfig, _SIZES, "layers", core=False),
        _family(
            "bloom",
            hf.BloomConfig,
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 24,
                "n_layer": LAYERS,
                "n_head": 4,
                "initializer_range": 0.3,
                "pad_token_id": PAD,
            },
            "h",
            core=False,
        ),
    ]
}
