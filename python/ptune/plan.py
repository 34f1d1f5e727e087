"""Which path prompts take through a model, and why: the prefix path where it is known, and found, to be exact."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .attention import sharing_name, stock_name, unshared_name
from .config import PTuneConfig
from .inputs import CACHE
from .quantised import rounds_by_batch

# Models whose tokens mix in their attentions alone, which hand keywords to these and honour position_ids.
# tests/model/test_plan.py holds the two paths of each to one another.
KNOWN = frozenset({
    "afmoe", "apertus", "arcee", "aria_text", "beam", "bert", "biogpt", "bitnet", "camembert", "cohere", "cohere2",
    "cohere2_moe", "cwm", "data2vec-text", "distilbert", "dots1", "electra", "ernie", "ernie4_5", "ernie4_5_moe",
    "eurobert", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma4_text",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "gte", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jina_embeddings_v3", "kolibri1",
    "laguna", "llama", "mellum", "mimo_v2_flash", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral",
    "modernbert", "modernbert-decoder", "nanochat", "nomic_bert", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon",
    "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta", "roberta-prelayernorm", "seed_oss",
    "smollm3", "solar_open", "starcoder2", "ultrabert", "vaultgemma", "xlm-roberta", "xlm-roberta-xl",
})  # fmt: skip

_STATIC_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}


@dataclass
class Plan:
    """How calls of a model bear its prompts.

    Attributes:
        path: ``"prefix"`` or ``"concat"``.
        reason: why.
        causal: whether text is read from left to right.
        limit: how many positions, prompt and text together, the path serves; longer calls take the concat path.
        packs: whether prompt rows and text run in one pass, where keys and values need not be kept; ``None``: where
            that pays, as `PrefixPath` decides for each call.
    """

    path: str
    reason: str
    causal: bool = True
    limit: int | None = None
    packs: bool | None = None

    def run_apart(self, why: str) -> None:
        """Never run prompt rows and text in one pass."""
        self.packs = False
        self.reason += f"; they run apart from it, as {why}"

    def holds_for(self, body: Any) -> bool:
        """Whether the model still has the attention that the plan was made with."""
        return sharing_name(body.config._attn_implementation) == body.config._attn_implementation


def obstacle(model: Any, settings: PTuneConfig) -> str | None:
    """Why prompts of ``settings`` on ``model`` cannot be shared, as far as its config tells."""
    config = model.config
    if config.is_encoder_decoder:
        return "prompt rows of an encoder-decoder are read by its decoder"
    if settings.base_dropout:
        return "the base's dropout is on, and differs from row to row"
    if rounds_by_batch(config):
        return "LLM.int8 looks for outliers over all rows of a call, unless llm_int8_threshold=0"
    if getattr(config, "is_causal", True) is False:
        return "its attention was made bidirectional"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "its masks are cut into chunks by column"
    if getattr(config, "reorder_and_upcast_attn", False):
        return "its upcast attention is chosen by the name 'eager'"
    if getattr(config, "alibi", False):
        return "its attention adds a bias for the distance of columns (ALiBi)"
    if sharing_name(config._attn_implementation) is None:
        return f"attn_implementation {config._attn_implementation!r} has no counterpart that takes a prefix"
    if not model._can_set_attn_implementation():
        return "its attention is not on transformers' attention interface"
    return None


def rope_kinds(config: Any) -> list[dict[str, Any]]:
    """The parameters of a model's rotary embeddings, of which kinds of layers may have their own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]


def rope_limit(config: Any) -> int | None:
    """How many positions a rotary embedding serves before its frequencies change; ``None`` if they never do."""
    limits = [
        p.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for p in rope_kinds(config)
        if p.get("rope_type", "default") not in _STATIC_ROPE
    ]
    return min(limits, default=None)


def _set_attention(model: Any, name: str | None) -> None:
    model.base_class.set_attn_implementation(model, name)  # the mixin's own would plan again


_exact: set[tuple] = set()  # what `_agree` need not compare again


def make_plan(hooks: Any) -> Plan:
    """The plan for the prompts that ``hooks`` (`PromptHooks`) are for; where these share, the attention is set to ours.

    Raises `ValueError` where ``prefix_sharing=True`` cannot be had.
    """
    model = hooks.model
    settings, kind = model.ptune_config, model.config.model_type
    compiled = model.compiled_prefix is not None
    if settings.prefix_sharing is False and not compiled:
        return Plan("concat", "prefix_sharing=False")
    reason = obstacle(model, settings)
    if reason is None and settings.prefix_sharing == "auto" and kind not in KNOWN and not compiled:
        reason = f"{kind!r} is not among the models known to share; prefix_sharing=True tries it"
    if reason is None:
        reason = _try(hooks)
    if reason is None:
        return hooks.prefix.plan
    if settings.prefix_sharing is True or compiled:
        wanted = "a compiled prefix" if compiled else "prefix_sharing: True"
        raise ValueError(f"{wanted}, but {type(model).__name__} cannot share prompts: {reason}")
    return Plan("concat", reason)


def _try(hooks: Any) -> str | None:
    """Why both paths do not agree, and all is as it was; or ``None``, and attention and plan are those of sharing."""
    model, path = hooks.model, hooks.prefix
    config = model.config
    implementation = config._attn_implementation
    path.plan = Plan("prefix", "prompt rows never read the text", limit=rope_limit(config))
    exact = stock_name(implementation)  # what half precision rounds away, the check would not see
    reason: str | None = "it could not be tried"
    try:
        with torch.no_grad():
            # flex attention would be compiled for the check alone
            _set_attention(model, sharing_name("eager" if "flex" in exact else exact))
            reason = _reach(hooks) or _agree(hooks)
    finally:
        _set_attention(model, sharing_name(implementation) if reason is None else unshared_name(implementation))
        if reason is not None:
            path.plan = Plan("concat", reason)
    return reason


def _reach(hooks: Any) -> str | None:
    """Number the attentions, if the prefix reaches each of them, once, and does not depend on the text there."""
    if "position_ids" not in hooks.parameters:
        return "its forward takes no position_ids"
    if not hooks.prefix.plan.holds_for(hooks.body):
        return "its attention implementation cannot be set"
    try:
        modules = hooks.prefix.discover()
    except (TypeError, NotImplementedError) as error:
        return f"its forward does not hand the prefix to its attention ({error})"
    if (reason := disorder(modules, 0, hooks.model.config.num_hidden_layers)) is not None:
        return reason
    hooks.prefix.plan.causal = all(getattr(module, "is_causal", True) for module in modules)
    settings = hooks.model.ptune_config
    if not hooks.prefix.plan.causal and not (settings.deep and settings.deep_prompt_mode == "overwrite"):
        return "in an encoder prompt rows read the text, unless deep prompts overwrite them"
    return None


def disorder(modules: list[Any], first: int, last: int) -> str | None:
    """Why ``modules``, which prompt rows passed, are not the attentions of blocks ``first`` … ``last - 1`` in turn."""
    count = last - first
    if len({id(module) for module in modules}) != count or len(modules) != count:
        return f"the prefix reached {len(modules)} attentions, of {count} layers"
    if any(getattr(module, "layer_idx", depth) not in (None, depth) for depth, module in enumerate(modules, first)):
        return "its layers do not run in the order of layer_idx"
    return None


def _agree(hooks: Any) -> str | None:
    """Compare the paths on two random rows, one of them padded; once for each kind of model and of prompts."""
    model, settings = hooks.model, hooks.model.ptune_config
    weight = model.get_input_embeddings().weight
    if weight.is_meta or model.compiled_prefix is not None:
        return None
    described = checkpoint.fingerprint(checkpoint.base_config(model.config))
    key = (
        type(model), described, settings.tuning_mode, settings.deep_prompt_mode, settings.pre_seq_len,
        model.config._attn_implementation, weight.dtype, model.blocks_dtype, weight.device.type,
    )  # fmt: skip
    length = min(6, (hooks.position_limit or 6 + hooks.num_prompts) - hooks.num_prompts)
    if length < 2:
        return None
    if key in _exact:
        return None
    reason, why_apart = _compare(hooks, length, weight)
    if why_apart is not None:
        hooks.prefix.plan.run_apart(why_apart)
    elif reason is None:  # it may have failed for a lack of memory, which passes
        _exact.add(key)
    return reason


def _compare(hooks: Any, length: int, weight: Tensor) -> tuple[str | None, str | None]:
    """Why prompt rows that run apart from the text disagree with the concat path, and why they must run apart."""
    plan = hooks.prefix.plan
    ids = torch.randint(weight.shape[0], (2, length), generator=torch.Generator().manual_seed(0)).to(weight.device)
    mask = torch.ones_like(ids)
    mask[1, 0 if plan.causal else -1] = 0
    bound = 1e-3 if {weight.dtype, hooks.model.blocks_dtype} <= {torch.float32, torch.float64} else 0.1

    def error(states: Tensor) -> float:
        return ((states - whole).norm(dim=-1) / whole.norm(dim=-1)).max().item()

    try:
        whole = _states(hooks, replace(plan, path="concat"), ids, mask)
        apart = _states(hooks, replace(plan, packs=False), ids, mask)
        if not (off := error(apart)) <= bound:
            return f"a check on random rows found it {off:.1e} off the concat path", None
    except ConnectionError:
        raise  # blocks on servers that cannot be reached say nothing of the paths
    except Exception as failure:
        return f"a check on random rows failed with {_said(failure)}", None
    finally:
        hooks.prefix.plan = plan
    if plan.packs is False:
        return None, None
    try:
        off = error(_states(hooks, replace(plan, packs=True), ids, mask))
        return None, None if off <= bound else f"a check on random rows found one pass {off:.1e} off the concat path"
    except Exception as failure:
        return None, f"a check on random rows in one pass failed with {_said(failure)}"
    finally:
        hooks.prefix.plan = plan


def _said(failure: Exception) -> str:
    first_line = str(failure).partition("\n")[0]
    return f"{type(failure).__name__}: {first_line}"


def _states(hooks: Any, plan: Plan, ids: Tensor, mask: Tensor) -> Tensor:
    """The text's, under ``plan``, and those of a last token that a cache resumes."""
    hooks.prefix.plan = plan
    states = hooks.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
    if not plan.causal:
        return states.float()
    past = hooks.body(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)[CACHE]
    last = hooks.body(input_ids=ids[:, -1:], attention_mask=mask, **{CACHE: past}).last_hidden_state
    return torch.cat([states, last[:, 0]]).float()
