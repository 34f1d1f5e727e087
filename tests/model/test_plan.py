"""Which models share their prompts: those known to, each held to its concat path, and those that must not."""

from functools import cache, partial

import pytest
import torch
import transformers as hf
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto

import ptune
from ptune.plan import KNOWN, rope_limit
from ptune.prefix import PrefixPath

from .common import COUNT, MODES, PADDINGS, SHARED, close, moved_by_a_bit, set_prompts, settings_for, take, texts_for
from .families import FAMILIES, VOCABULARY
from .oracle import pad

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3, "max_position_embeddings": 64,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GROUPED_EXPERTS = _EXPERTS | {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOW = {"sliding_window": 5}
_GROUPED_WINDOW = _GROUPED_EXPERTS | _WINDOW
SPECIAL = {
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "beam": _WINDOW,
    "cohere2": _WINDOW,
    "cohere2_moe": _GROUPED_WINDOW,
    "cwm": _WINDOW,
    "dots1": _GROUPED_EXPERTS,
    "ernie4_5_moe": _GROUPED_EXPERTS,
    "exaone4": _WINDOW,
    "exaone_moe": _GROUPED_WINDOW,
    "flint": _GROUPED_WINDOW | {"layer_types": _MIXED},
    "gemma2": _WINDOW | {"query_pre_attn_scalar": 6},
    "gemma3_text": _WINDOW | {"query_pre_attn_scalar": 6},
    "gemma4_text": _WINDOW
    | {
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 1,
        "global_head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma4_unified_text": _WINDOW | {"layer_types": _MIXED},
    "glm4_moe": _GROUPED_EXPERTS,
    "gpt_oss": _EXPERTS | _WINDOW,
    "granite_swa": _WINDOW,
    "granitemoe": _EXPERTS,
    "granitemoe_swa": _EXPERTS | _WINDOW,
    "granitemoeshared": _EXPERTS | {"shared_intermediate_size": 16},
    "hunyuan_v1_moe": _EXPERTS,
    "hy_v3": _GROUPED_EXPERTS,
    "kolibri1": _GROUPED_WINDOW | {"layer_types": _MIXED},
    "laguna": _GROUPED_WINDOW | {"layer_types": _MIXED},
    "mellum": _GROUPED_WINDOW | {"layer_types": _MIXED},
    "mimo_v2_flash": _GROUPED_WINDOW,
    "minimax_m2": _GROUPED_EXPERTS,
    "ministral": _WINDOW,
    "ministral3": _WINDOW,
    "mistral": _WINDOW,
    "mixtral": _EXPERTS,
    "olmo3": _WINDOW,
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32, "init_std": 0.3},
    "phimoe": _EXPERTS,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": _EXPERTS,
    "solar_open": _GROUPED_EXPERTS,
    "starcoder2": _WINDOW,
    "ultrabert": {"sliding_window": 4},
}


def config_of(kind):
    if kind not in hf.CONFIG_MAPPING:
        pytest.skip(f"transformers {hf.__version__} has no {kind}")
    return hf.CONFIG_MAPPING[kind](**SIZES | SPECIAL.get(kind, {}))


def tiny(kind, mode="add", **rest):
    return ptune.AutoPTuneModel.from_config(config_of(kind), **settings_for(mode, **rest)).eval()


def gradients(model, ids, mask, weights, **how):
    model.zero_grad()
    states = model(input_ids=ids, attention_mask=mask, **how).last_hidden_state
    (states * weights).sum().backward()
    tables = (model.prompt_embeddings, model.intermediate_prompt_embeddings)
    return states[weights.bool().any(-1)].detach(), [table.weight.grad.clone() for table in tables]


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_known_models_share_and_agree_with_concat(kind):
    model = tiny(kind, "overwrite")
    assert model.prefix_plan.path == "prefix", model.prefix_plan.reason
    assert model.prefix_plan.packs is None  # nothing stands against it
    modes = ("overwrite", "add") if model.prefix_plan.causal else ("overwrite",)
    texts = texts_for("left", (13, 3, 9, 1))
    for mode in modes:
        set_prompts(model, mode)
        for padding in ("left", "right"):
            ids, mask = pad(texts, padding, model.config.pad_token_id)
            weights = torch.randn(*ids.shape, 32) * mask[..., None]
            how = {"use_cache": padding == "right"} if model.prefix_plan.causal else {}
            runs = []
            for path in SHARED:
                take(model, path)
                runs.append(gradients(model, ids, mask, weights, **how))
            take(model, "concat")
            whole, expected = gradients(model, ids, mask, weights)

            @cache
            def nudged(inputs=(ids, mask, weights)):
                states, tables = gradients(moved_by_a_bit(model), *inputs)
                return [states, *tables]

            for shared, own in runs:
                close(shared, whole, nudged=lambda nudged=nudged: nudged()[0])
                for i, (got, want) in enumerate(zip(own, expected, strict=True), 1):
                    close(got, want, 2e-5, nudged=lambda nudged=nudged, i=i: nudged()[i], least=0)


@pytest.mark.parametrize("kind", sorted(KNOWN - set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)))
def test_known_decoders_answer_and_generate_in_a_bank(kind):
    base = hf.AutoModelForCausalLM.from_config(config_of(kind))
    model = ptune.with_prompts(base, ptune.PTuneConfig(**settings_for("overwrite")))
    set_prompts(model, "overwrite")
    bank = ptune.PromptBank(base)
    bank.add("own", model)
    ids, mask = pad(texts_for("left", (7, 3)), "left", model.config.pad_token_id)
    logits = bank(ids, mask, prompt_names=["own", None]).logits
    close(logits[0], model(input_ids=ids, attention_mask=mask).logits[0])
    ids, mask = ids[:1].repeat(2, 1), mask[:1].repeat(2, 1)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, **how)
    assert torch.equal(bank.generate(ids, mask, prompt_names=["own", "own"], **how), expected)


@pytest.mark.parametrize("sharing", ["auto", False])
@pytest.mark.parametrize("mode", MODES)
def test_generates_where_layers_read_the_keys_of_others(mode, sharing):
    """These run on the last token alone in a stock prefill, as nothing else of them is read."""
    config = config_of("gemma4_unified_text")
    config.num_kv_shared_layers = 1
    model = ptune.AutoPTuneModelForCausalLM.from_config(config, **settings_for(mode, prefix_sharing=sharing)).eval()
    set_prompts(model, mode)
    ids, mask = pad(texts_for("left", (7, 3)), "left", config.pad_token_id)
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for column in range(7, made.shape[1]):
        mask = torch.nn.functional.pad(mask, (0, column - mask.shape[1]), value=1)
        scores = model(input_ids=made[:, :column], attention_mask=mask, use_cache=False).logits[:, -1]
        going = ~(made[:, 7:column] == config.eos_token_id).any(1)
        assert torch.equal(scores.argmax(-1)[going], made[going, column])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["shallow", "overwrite", "add"])
def test_plans_of_the_families(base_of, name, mode):
    family = FAMILIES[name]
    plan = base_of(name).tuned(**settings_for(mode)).prefix_plan
    shares = name not in ("bloom", "albert") and (family.causal or mode == "overwrite")
    assert plan.path == ("prefix" if shares else "concat"), plan.reason
    assert plan.packs is None, plan.reason  # nothing stands against it
    assert plan.reason
    off = base_of(name).tuned(**settings_for(mode, prefix_sharing=False))
    assert off.prefix_plan.path == "concat"
    assert not off.config._attn_implementation.startswith("ptune")


HYBRIDS = {
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **_EXPERTS,
        "shared_expert_intermediate_size": 16,
    },
    "bamba": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "attn_layer_indices": [1],
        "mamba_expand": 2,
    },
    "llama4_text": {"attention_chunk_size": 4, **_EXPERTS, "intermediate_size_mlp": 40},
    "stablelm": {},
    "nemotron": {},
    "minimax": _EXPERTS,
    "recurrent_gemma": {"lru_width": 32},
}  # fmt: skip
INTERFACELESS = {
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon": {"alibi": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "mpnet": {},
    "deberta-v2": {},
}


@pytest.mark.parametrize("kind", [*HYBRIDS, *INTERFACELESS])
def test_models_that_would_go_wrong_do_not_share(kind):
    """Nor when they are made to: the error says why."""
    sizes = (
        SIZES if kind in HYBRIDS else {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    )
    config = hf.CONFIG_MAPPING[kind](**sizes | {**HYBRIDS, **INTERFACELESS}[kind])
    model = ptune.AutoPTuneModel.from_config(config, **settings_for("shallow"))
    assert model.prefix_plan.path == "concat"
    before = model.prompt_embeddings.weight.clone()
    with pytest.raises(ValueError, match=r"prefix_sharing: True, but .* cannot share prompts: "):
        model.init_prompts(ptune.PTuneConfig(**settings_for("add", prefix_sharing=True)))
    assert torch.equal(model.prompt_embeddings.weight, before)
    assert model.ptune_config.tuning_mode == "ptune"
    assert not model.config._attn_implementation.startswith("ptune")
    ids = torch.randint(3, VOCABULARY, (2, 5))
    assert model(input_ids=ids)[0].shape == (2, 5, model.config.hidden_size)


def test_barts_decoder_has_no_positions_to_move():
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=40,
        encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=40, max_position_embeddings=64,
        is_encoder_decoder=False, is_decoder=True,
    )  # fmt: skip
    with pytest.raises((ValueError, NotImplementedError), match=r"position_ids|encoder-decoder|Bart"):
        ptune.AutoPTuneModelForCausalLM.from_config(config, **settings_for("shallow", prefix_sharing=True))


def test_an_unknown_model_is_tried_when_asked():
    class NewConfig(hf.LlamaConfig):
        model_type = "llama_of_tomorrow"

    class NewModel(hf.LlamaModel):
        config_class = NewConfig

    torch.manual_seed(0)
    NewModel = ptune.models.ptune_class(NewModel)
    config = NewConfig(**SIZES, **settings_for("shallow"))
    assert "not among the models known to share" in NewModel(config).prefix_plan.reason
    config.prefix_sharing = True
    assert NewModel(config).prefix_plan.path == "prefix"


def test_a_failure_that_passes_is_not_remembered(base_of, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def lacking(self, states):
        if states.shape[0] == 1:  # prompt rows alone
            return forward(self, states)
        raise torch.OutOfMemoryError("for now")

    monkeypatch.setattr("ptune.plan._exact", set())
    with monkeypatch.context() as patched:
        patched.setattr(LlamaMLP, "forward", lacking)
        model = base_of("llama").tuned(**settings_for("add"))
    assert (model.prefix_plan.path, model.prefix_plan.reason) == (
        "concat", "a check on random rows failed with OutOfMemoryError: for now"
    )  # fmt: skip
    assert base_of("llama").tuned(**settings_for("add")).prefix_plan.path == "prefix"


def longrope(limit):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return hf.Phi3Config(
        **SIZES | {"original_max_position_embeddings": limit, "max_position_embeddings": 64},
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )


def test_longrope_is_shared_below_its_switch_alone():
    model = ptune.AutoPTuneModel.from_config(longrope(12), **settings_for("shallow")).eval()
    assert model.prefix_plan.path == "prefix"
    assert model.prefix_plan.limit == rope_limit(model.config) == 12
    off = ptune.AutoPTuneModel.from_config(longrope(12), **settings_for("shallow", prefix_sharing=False)).eval()
    off.load_state_dict(model.state_dict())
    rows = []
    model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape[:2])))
    for length, expected in ((8, [(1, 4), (3, 8)]), (9, [(3, 13)])):
        ids = torch.randint(3, VOCABULARY, (3, length))
        close(model(ids)[0], off(ids)[0])
        assert rows == expected
        rows.clear()
    # by the positions that are given, too
    ids = torch.randint(3, VOCABULARY, (3, 5))
    positions = torch.arange(5)[None] + 4
    close(model(ids, position_ids=positions)[0], off(ids, position_ids=positions)[0])
    assert rows == [(3, 9)]


def test_the_check_finds_a_model_that_mixes_rows():
    """What admission could miss: rows that mix outside attention."""
    model = tiny("llama", "shallow", prefix_sharing=False)
    model.layers[1].mlp.register_forward_hook(lambda module, args, output: output + args[0].cumsum(1))
    with pytest.raises(ValueError, match=r"a check on random rows found it .* off the concat path"):
        model.init_prompts(ptune.PTuneConfig(**settings_for("shallow", count=5, prefix_sharing=True)))
    # prompts off, both paths would be the bare base
    with model.disable_prompts(), pytest.raises(ValueError, match="a check on random rows found it"):
        model.init_prompts(ptune.PTuneConfig(**settings_for("shallow", count=6, prefix_sharing=True)))
    assert model.ptune_config.pre_seq_len == COUNT


@pytest.mark.parametrize("padding", PADDINGS)
def test_attention_may_be_changed_later(base_of, padding):
    model = base_of("gemma3").tuned(**settings_for("add"))
    ids, mask = pad(texts_for(padding), padding, 0)
    real = slice(None) if mask is None else mask.bool()
    expected = model(input_ids=ids, attention_mask=mask)[0][real]
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.prefix_plan.path == "prefix"
        assert model.config._attn_implementation.startswith("ptune_")
        close(model(input_ids=ids, attention_mask=mask)[0][real], expected)
    # changed behind the model's back, it falls back to the path that needs no attention of ours
    model.config._attn_implementation = "sdpa"
    close(model(input_ids=ids, attention_mask=mask)[0][real], expected)


def test_attention_that_cannot_share_is_refused_where_sharing_is_demanded(base_of, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "own", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model = base_of("llama").tuned(**settings_for("overwrite", prefix_sharing=True))
    with pytest.raises(ValueError, match="attn_implementation 'own' has no counterpart that takes a prefix"):
        model.set_attn_implementation("own")
    assert model.config._attn_implementation == "ptune_torch"
    assert model.prefix_plan.path == "prefix"


def test_what_breaks_a_trial_leaves_the_attention(base_of, monkeypatch):
    """Such as a lack of memory."""
    fresh, shared = (base_of("llama").tuned(**rest) for rest in ({}, settings_for("overwrite")))
    before = fresh.config._attn_implementation

    def fail(path):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PrefixPath, "discover", fail)
    with pytest.raises(torch.OutOfMemoryError):
        fresh.init_prompts(ptune.PTuneConfig(**settings_for("overwrite")))
    assert fresh.config._attn_implementation == before
    assert fresh.prefix_plan.path == "none"
    with pytest.raises(torch.OutOfMemoryError):
        shared.set_attn_implementation("eager")
    assert shared.config._attn_implementation == "ptune_torch"
    assert shared.prefix_plan.path == "prefix"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["gemma3", "modernbert"])
def test_flex_masks_are_those_of_sdpa(base_of, name, padding, monkeypatch):
    """Flex attention has no backward on a CPU, and compiles for a minute: its masks are compared, of full and windowed
    layers."""
    model = base_of(name).tuned(**settings_for("overwrite"))
    ids, mask = pad(texts_for(padding), padding, model.config.pad_token_id)
    seen: dict[str, list] = {"sdpa": [], "flex_attention": []}

    def note(stock, module, query, key, value, attention_mask, **kwargs):
        rows, columns = query.shape[2], key.shape[2]
        if kwargs.get("ptune_prefix") is not None and query.shape[0] > 1:
            columns += COUNT
            if isinstance(attention_mask, BlockMask):
                attention_mask = create_mask(attention_mask.mask_mod, len(ids), 1, rows, columns, device="cpu")
            seen[stock].append(attention_mask)
        return torch.zeros_like(query).transpose(1, 2), None

    for stock, ours in (("sdpa", "ptune_torch"), ("flex_attention", "ptune_flex")):
        model.set_attn_implementation(stock)
        assert model.config._attn_implementation == ours
        with monkeypatch.context() as patch:
            patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, ours, partial(note, stock))
            patch.setattr(
                masking_utils, "create_block_mask", lambda **kwargs: create_block_mask(**kwargs | {"_compile": False})
            )
            model(input_ids=ids, attention_mask=mask, **{"use_cache": False} if name == "gemma3" else {})
    for dense, flexible in zip(seen["sdpa"], seen["flex_attention"], strict=True):
        if dense is None:  # all keys, or the lower right triangle of them
            dense = torch.ones(flexible.shape[2:], dtype=torch.bool)
            dense = dense.tril(COUNT) if model.prefix_plan.causal else dense
        rows = flexible & torch.ones_like(dense)
        assert torch.equal(rows, dense.expand_as(rows))
