"""`generate` against the oracle, which runs the whole of each row again for every token."""

import copy
import inspect
from unittest.mock import Mock

import pytest
import torch
import transformers
from transformers.generation import CompileConfig

import ptune
from ptune.inputs import CACHE

from .common import COUNT, all_close, close, moved_by_a_bit, set_prompts, settings_for, texts_for
from .oracle import pad, run_row

NEW = 7
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def continued(stock, family, prompt, text, count=NEW):
    """Greedy tokens after ``text`` and their logits."""
    logits = []
    for _ in range(count):
        body = stock.base_model
        last = stock.lm_head(run_row(body, family.blocks(body), prompt, text).states[-1][-1])
        last[2] = -torch.inf if len(logits) < count else last[2]  # min_new_tokens forbids the end of text
        logits.append(last)
        text = torch.cat([text, last.argmax()[None]])
    return text[-count:], torch.stack(logits)


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral", "gemma3", "opt", "bloom"])
def pair(request, base_of):
    base = base_of(request.param)
    stock = base.stock(transformers.AutoModelForCausalLM)
    return base.family, stock, base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite", "add"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("sharing", ["auto", False], ids=["shared", "concat"])
@torch.no_grad()
def test_greedy(pair, mode, padding, cache, sharing):
    family, stock, model = pair
    if sharing and family.name == "bloom":
        pytest.skip("Bloom shares nothing")
    if family.name == "bloom" and cache == "static":
        cache = "dynamic"  # stock Bloom cannot take a static one
    prompt, texts = set_prompts(model, mode, prefix_sharing=sharing), texts_for(padding)
    ids, mask = pad(texts, padding, 0)
    how = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    output = model.generate(
        ids, attention_mask=mask, **GREEDY, **how, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    assert output.sequences.shape == (len(texts), ids.shape[1] + NEW)
    ended = torch.tensor([2])  # forbidden until the last token
    for row, text in enumerate(texts):
        tokens, logits = continued(stock, family, prompt, text)
        got = torch.stack([step[row] for step in output.logits])

        def nudged(text=text):
            return continued(moved_by_a_bit(stock), family, prompt, text)[1].index_fill(1, ended, 0)

        close(got.index_fill(1, ended, 0), logits.index_fill(1, ended, 0), nudged=nudged)
        assert output.sequences[row, -NEW:].tolist() == tokens.tolist()


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def prompted(request, base_of):
    """A stock model and one whose prompts are a text: the second must do as the first with that text before its own."""
    base, words = base_of(request.param), torch.randint(3, 61, (COUNT,))
    stock = base.stock(transformers.AutoModelForCausalLM)
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("overwrite", prompt_init_text=words.tolist()))
    return stock, model, words


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "do_sample": False, "length_penalty": 1.5},
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2, "cache_implementation": "static"},
        {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
        {"do_sample": False, "prefill_chunk_size": 2},
        {"do_sample": False, "repetition_penalty": 1.0},
    ],
    ids=["beams", "static beams", "sampling", "prompt lookup", "chunked prefill", "plain"],
)
@pytest.mark.parametrize("sharing", ["auto", False], ids=["shared", "concat"])
def test_every_way_of_generating_follows_the_text(prompted, how, sharing):
    stock, model, words = prompted
    settings = settings_for("overwrite", prompt_init_text=words.tolist(), prefix_sharing=sharing)
    model.init_prompts(ptune.PTuneConfig(**settings))
    text = torch.randint(3, 61, (1 if "prompt_lookup_num_tokens" in how else 3, 5))
    common = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, **how}
    torch.manual_seed(5)
    expected = stock.generate(torch.cat([words.expand(len(text), -1), text], 1), **common)
    torch.manual_seed(5)
    assert model.generate(text, **common).tolist() == expected[:, COUNT:].tolist()


@pytest.mark.parametrize("length", [1, 2, COUNT, 12])
@pytest.mark.parametrize("sharing", ["auto", False], ids=["shared", "concat"])
@pytest.mark.parametrize("drafter", ["early exit", "prompted", "prompted for stock"])
def test_drafting_with_prompts(base_of, drafter, sharing, length):
    """Of texts shorter than the prompt too, whose cache is cut back for every draft."""
    base, words, text = base_of("llama"), torch.randint(3, 61, (COUNT,)), torch.randint(3, 61, (1, length))
    stock = base.stock(transformers.AutoModelForCausalLM)
    settings = settings_for("overwrite", prompt_init_text=words.tolist(), prefix_sharing=sharing)
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings)
    how = {**GREEDY, "max_new_tokens": 2 * NEW, "min_new_tokens": 2 * NEW, "pad_token_id": 0}
    expected = stock.generate(torch.cat([words[None], text], 1), **how)[:, COUNT:]
    if drafter == "early exit":
        assert model.generate(text, **how, assistant_early_exit=2).tolist() == expected.tolist()
        return
    helper = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings)
    if drafter == "prompted for stock":
        model, expected = stock, stock.generate(text, **how)
    assert model.generate(text, **how, assistant_model=helper).tolist() == expected.tolist()
    if drafter == "prompted":  # as good a drafter as the stock model is for itself
        assert steps_of(model, text, helper) == steps_of(stock, torch.cat([words[None], text], 1), copy.deepcopy(stock))


def steps_of(model, text, helper):
    """How often the model runs to write after ``text`` what ``helper`` drafts."""
    steps = []
    handle = model.register_forward_pre_hook(lambda *call: steps.append(call))
    how = {**GREEDY, "max_new_tokens": 2 * NEW, "min_new_tokens": 2 * NEW, "pad_token_id": 0}
    model.generate(text, **how, assistant_model=helper)
    handle.remove()
    return len(steps)


@pytest.mark.parametrize("sharing", ["auto", False], ids=["shared", "concat"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
@torch.no_grad()
def test_steps_that_transformers_compiles_are_one_graph(base_of, mode, sharing):
    """As it does by itself on GPUs where the cache is static."""
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for(mode))
    set_prompts(model, mode, prefix_sharing=sharing)
    ids, mask = pad(texts_for("left"), "left", 0)
    how = {**GREEDY, "attention_mask": mask, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}

    def run(model, **rest):
        ended = torch.tensor([2])  # whose logits are minus infinity
        return [logits.index_fill(1, ended, 0) for logits in model.generate(ids, **how, **rest).logits]

    compiled = CompileConfig(mode=None, backend="eager", fullgraph=True)
    compiled._compile_all_devices = True
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    got = run(model, cache_implementation="static", compile_config=compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    all_close(got, run, model)


def test_chunked_prefill_of_a_padded_batch_is_refused(prompted):
    stock, model, _ = prompted
    ids, mask = pad(texts_for("left"), "left", 0)
    how = {**GREEDY, "attention_mask": mask, "pad_token_id": 0, "prefill_chunk_size": 2}
    with pytest.raises(NotImplementedError, match="prefill_chunk_size: not supported for padded batches"):
        model.generate(ids, **how)
    with model.disable_prompts():
        assert torch.equal(model.generate(ids, **how), stock.generate(ids, **how))


@pytest.mark.parametrize("chunk", [None, 1, 2, 9])
@pytest.mark.parametrize("given", ["all text", "new text"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_a_conversation_goes_on_from_its_cache(pair, given, padded, chunk):
    family, stock, model = pair
    prompt, texts = set_prompts(model, "overwrite"), texts_for("left" if padded else "none")
    ids, mask = pad(texts, "left" if padded else "none", 0)
    mask = torch.ones_like(ids) if mask is None else mask
    first = model.generate(ids, attention_mask=mask, **GREEDY, return_dict_in_generate=True, pad_token_id=0)
    added = torch.randint(3, 61, (len(texts), COUNT + 1))
    whole = torch.cat([first.sequences, added], 1)
    mask = torch.cat([mask, mask.new_ones(len(texts), NEW + COUNT + 1)], 1)
    seen = first.past_key_values.get_seq_length() - COUNT
    assert seen == ids.shape[1] + NEW - 1
    second = model.generate(
        whole if given == "all text" else whole[:, seen:],
        attention_mask=mask,
        past_key_values=first.past_key_values,
        prefill_chunk_size=chunk,
        pad_token_id=0,
        **GREEDY,
    )
    for row, text in enumerate(texts):
        tokens, _ = continued(stock, family, prompt, torch.cat([text, whole[row, ids.shape[1] :]]))
        assert second[row, -NEW:].tolist() == tokens.tolist()


@pytest.mark.parametrize("sharing", ["auto", False], ids=["shared", "concat"])
@torch.no_grad()
def test_a_cache_that_another_model_filled(base_of, monkeypatch, sharing):
    """Which may hold no prompt, or another, or one where there is to be none: columns alone do not tell."""
    warned = Mock()
    monkeypatch.setattr(ptune.hooks._logger, "warning_once", warned)
    base = base_of("llama")
    stock = base.stock(transformers.AutoModelForCausalLM)
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("add", prefix_sharing=sharing)).eval()
    ids = torch.randint(3, 61, (2, 7))
    how = {**GREEDY, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def filled(model):
        return model(ids[:, :4], use_cache=True).past_key_values

    own = filled(model)
    expected = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, past_key_values=copy.deepcopy(own), **how), expected)
    warned.assert_not_called()
    model.generate(ids, past_key_values=filled(stock), **how)
    assert f"taken to hold {COUNT} prompt rows" in warned.call_args.args[0]
    with model.disable_prompts():
        with pytest.raises(ValueError, match=f"expected text alone, as prompts are disabled, got it behind {COUNT}"):
            model.generate(ids, past_key_values=own, **how)
        expected = model.generate(ids, **how)
        own.crop(-own.get_seq_length())  # and then it is like a new one
        assert torch.equal(model.generate(ids, past_key_values=own, **how), expected)
        bare = filled(model)
    warned.reset_mock()
    model.generate(ids, past_key_values=bare, **how)
    warned.assert_called()
    own = filled(model)
    set_prompts(model, "add", count=COUNT + 2, prefix_sharing=sharing)
    with pytest.raises(ValueError, match=f"expected text behind {COUNT + 2} prompt rows, got it behind {COUNT}"):
        model.generate(ids, past_key_values=own, **how)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids, settings: model.generate_batch(ids.tolist(), generation_config=settings),
        lambda model, ids, settings: model.generate(ids, generation_config=settings, cache_implementation="paged"),
    ],
    ids=["generate_batch", "paged"],
)
def test_continuous_batching_is_refused(base_of, call):
    """It fails in a thread, and gives back texts without a new token."""
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow", prefix_sharing=False))
    ids = torch.randint(3, 61, (2, 5))
    settings = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=2, pad_token_id=0)
    with pytest.raises(NotImplementedError, match=r"continuous batching .*: not supported with prompts"):
        call(model, ids, settings)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_static_cache_without_room_for_the_prompt_is_refused(base_of, name):
    """One that is long enough for the text, with layers of which some slide."""
    model = base_of(name).tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))
    ids = torch.randint(3, 61, (2, 5))
    needed = 5 + NEW - 1 + COUNT
    for length in (needed - 1, needed):
        cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        if length < needed:
            with pytest.raises(ValueError, match=f"{CACHE}: .* at least {needed} columns, {COUNT} .*, got {length}"):
                model.generate(ids, past_key_values=cache, pad_token_id=0, **GREEDY)
        else:
            expected = model.generate(ids, pad_token_id=0, **GREEDY)
            assert model.generate(ids, past_key_values=cache, pad_token_id=0, **GREEDY).tolist() == expected.tolist()


def test_a_static_cache_serves_again(base_of):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("overwrite"))
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    for padding in ("left", "none"):
        ids, mask = pad(texts_for(padding), padding, 0)
        how = {"attention_mask": mask, "pad_token_id": 0, **GREEDY}
        assert model.generate(ids, past_key_values=cache, **how).tolist() == model.generate(ids, **how).tolist()
        cache.reset()


def test_steps_by_hand_need_no_positions(pair):
    """A caller's own loop: the cache and the text's mask are enough, or no mask at all."""
    family, stock, model = pair
    prompt, texts = set_prompts(model, "overwrite"), texts_for("left")
    ids, mask = pad(texts, "left", 0)
    output = model(input_ids=ids, attention_mask=mask, use_cache=True)
    token = torch.randint(3, 61, (len(texts), 1))
    mask = torch.cat([mask, mask.new_ones(len(texts), 1)], 1)
    output = model(input_ids=token, attention_mask=mask, past_key_values=output.past_key_values)
    for row, text in enumerate(texts):
        body = stock.base_model
        states = run_row(body, family.blocks(body), prompt, torch.cat([text, token[row]])).states[-1]
        close(output.logits[row, -1], stock.lm_head(states[-1]))
    cache = model(input_ids=ids[2:3], use_cache=True).past_key_values
    alone = model(input_ids=token[2:3], past_key_values=cache).logits
    close(alone, output.logits[2:3])


@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE}))
@pytest.mark.parametrize("auto", [ptune.AutoPTuneModel, ptune.AutoPTuneModelForSequenceClassification])
def test_a_cache_is_taken_by_its_old_name(base_of, auto, name):
    """By a body, whose own forward comes after its hooks, and by a classifier, whose forward is ours."""
    model = base_of("llama").tuned(auto, **settings_for("overwrite")).eval()
    ids, mask = torch.randint(3, 61, (2, 6)), torch.ones(2, 6)
    cache = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)[CACHE]
    resumed = model(input_ids=ids[:, 4:], attention_mask=mask, **{name: cache})
    close(resumed[0][:, -1], model(input_ids=ids, attention_mask=mask)[0][:, -1])


def test_a_mask_that_does_not_cover_the_past_is_refused(base_of):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))
    ids = torch.randint(3, 61, (2, 5))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask: expected 6 columns.*got 1"):
        model(input_ids=ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_bare_base_generates_as_stock(base_of):
    base = base_of("llama")
    stock = base.stock(transformers.AutoModelForCausalLM)
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("overwrite"))
    for padding in ("none", "left"):
        ids, mask = pad(texts_for(padding), padding, 0)
        for cache in ("dynamic", "static"):
            how = {"attention_mask": mask, "cache_implementation": cache, "pad_token_id": 0, **GREEDY}
            with model.disable_prompts():
                got = model.generate(ids, **how)
            assert got.tolist() == stock.generate(ids, **how).tolist()


@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
def test_a_draft_of_fewer_layers_keeps_no_prefix(base_of, mode):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for(mode)).eval()
    ids = torch.randint(3, 61, (1, 6))
    how = GREEDY | {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    expected = model.generate(ids, **how).tolist()
    model.compile_prompts()
    assert model.generate(ids, **how, assistant_early_exit=1).tolist() == expected
    assert model.generate(ids, **how).tolist() == expected


@pytest.mark.parametrize("sharing", ["auto", False], ids=["shared", "concat"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
def test_a_cache_ends_where_rotary_embeddings_change(mode, sharing):
    """Prompt and text reach position 14 within the tokens that are generated.

    In float64: in float32 a steep model's twelve steps may differ by more than their last bits.
    """
    factors = {"short_factor": [1.0] * 6, "long_factor": [8.0] * 6, "original_max_position_embeddings": 14}
    config = transformers.Phi3Config(
        vocab_size=61, hidden_size=24, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, initializer_range=0.3, original_max_position_embeddings=14,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )  # fmt: skip
    model = ptune.AutoPTuneModelForCausalLM.from_config(config, **settings_for(mode, prefix_sharing=sharing))
    model = model.double().eval()
    set_prompts(model, mode, prefix_sharing=sharing)
    ids, mask = pad(texts_for("left"), "left", 0)
    how = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
    }
    cached, anew = (model.generate(ids, **how, use_cache=use, return_dict_in_generate=True) for use in (True, False))
    assert cached.sequences.tolist() == anew.sequences.tolist()
    close(torch.stack(cached.logits), torch.stack(anew.logits), 1e-9)


@pytest.mark.parametrize("padding", ["left", "none"])
def test_bloom_and_static_caches(base_of, tmp_path, padding):
    """It makes its bias of the mask, which must be as wide as the cache: without prompts it does so by itself."""
    base = base_of("bloom")
    stock, model = base.stock(transformers.AutoModelForCausalLM), base.tuned(ptune.AutoPTuneModelForCausalLM)
    ids, mask = pad(texts_for(padding), padding, 0)
    mask = torch.ones_like(ids) if mask is None else mask
    how = {"attention_mask": mask, "cache_implementation": "static", "pad_token_id": 0, **GREEDY}
    expected = stock.generate(ids, **how)
    assert torch.equal(model.generate(ids, **how), expected)
    set_prompts(model, "shallow")
    with model.disable_prompts():
        assert torch.equal(model.generate(ids, **how), expected)
    if padding == "none" and "StaticCache" in inspect.getsource(type(stock).prepare_inputs_for_generation):
        # until 5.17 it widens the mask by itself, the prompt's columns included
        with pytest.raises(ValueError, match="attention_mask: expected shape"):
            model.generate(ids, **how)
    elif padding == "none":
        dynamic = model.generate(ids, **how | {"cache_implementation": "dynamic"})
        assert torch.equal(model.generate(ids, **how), dynamic)
    else:
        with pytest.raises(NotImplementedError, match="static caches are not supported for padded batches with"):
            model.generate(ids, **how)
    bank = ptune.PromptBank(stock)
    with pytest.raises(NotImplementedError, match="nor in banks"):
        bank.generate(ids, prompt_names=[None] * len(ids), **how)
