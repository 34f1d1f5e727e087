"""Prompt rows and text in one pass: what goes in, what comes out, and where two passes are taken."""

import pickle
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.integrations.neftune import neftune_post_forward_hook

import ptune
from ptune import attention, varlen
from ptune.inputs import CACHE

from .common import COUNT, LAYERS, MODES, PADDINGS, SHARED, all_close, close, set_prompts, settings_for, take, texts_for
from .families import FAMILIES, VOCABULARY
from .oracle import pad
from .test_plan import tiny


@pytest.fixture
def shapes(monkeypatch):
    """The rows that each attention of Llama is given from now on."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    seen, forward = [], LlamaAttention.forward

    def noting(self, hidden_states, *args, **kwargs):
        seen.append(tuple(hidden_states.shape[:2]))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", noting)
    return seen


@pytest.mark.parametrize("mode", ["shallow", "overwrite", "add"])
def test_a_step_is_one_pass_unless_rows_are_overwritten(base_of, shapes, mode):
    model = base_of("llama").tuned(**settings_for(mode)).train()
    shapes.clear()
    model(torch.randint(3, VOCABULARY, (3, 7))).last_hidden_state.sum().backward()
    layers = model.config.num_hidden_layers
    if mode == "overwrite":  # on a CPU
        assert shapes == [(1, COUNT)] * layers + [(3, 7)] * layers
    else:
        assert shapes == [(1, COUNT + 3 * 7)] * layers


@pytest.mark.parametrize("mode", ["shallow", "add"])
def test_a_pass_keeps_no_more_for_its_backward_than_two(base_of, mode):
    model = base_of("llama").tuned(**settings_for(mode) | {"pre_seq_len": 2}).train()
    ids = torch.randint(3, VOCABULARY, (8, 24))
    kept = {}

    def noted(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    for path in SHARED:
        take(model, path)
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
            output = model(ids)  # held, so that no storage is freed and its address taken by another
        kept[path] = sum(held.values())
        del output
    # the first of three blocks, whose input trains then, keeps some more
    assert kept["packed"] <= 1.08 * kept["apart"]


def test_compiled_prompts_are_not_run_again(base_of, shapes):
    model = base_of("llama").tuned(**settings_for("shallow")).train()
    model.compile_prompts()
    ids = torch.randint(3, VOCABULARY, (3, 7))
    for use_cache in (True, False):
        with torch.no_grad():
            model(ids)
            shapes.clear()
            model(ids, use_cache=use_cache)
        assert set(shapes) == {(3, 7)}
    shapes.clear()
    model(ids)
    assert set(shapes) == {(1, COUNT + 3 * 7)}


def test_hooks_of_users_are_given_the_batch(base_of, shapes):
    model = base_of("llama").tuned(**settings_for("shallow")).train()
    ids = torch.randint(3, VOCABULARY, (3, 7))
    expected = model(ids).last_hidden_state
    for register in ("register_forward_hook", "register_full_backward_hook"):
        handle = getattr(model.layers[1].mlp, register)(lambda *_: None)
        for _ in range(2):
            shapes.clear()
            close(model(ids).last_hidden_state, expected)
            assert set(shapes) == {(1, COUNT), (3, 7)}
        handle.remove()
    shapes.clear()
    model.enable_input_require_grads()  # a hook of transformers'
    close(model(ids).last_hidden_state, expected)
    assert set(shapes) == {(1, COUNT + 3 * 7)}


@pytest.mark.parametrize("path", SHARED)
def test_noise_is_that_of_the_batch(base_of, path):
    """NEFTune's depends on the length of a text."""
    model = base_of("llama").tuned(**settings_for("shallow")).train()
    model.embed_tokens.neftune_noise_alpha = 5.0
    model.embed_tokens.register_forward_hook(neftune_post_forward_hook)
    ids, runs = torch.randint(3, VOCABULARY, (3, 7)), []
    for each in (path, "concat"):
        take(model, each)
        torch.manual_seed(0)
        runs.append(model(ids).last_hidden_state)
    close(*runs)
    torch.manual_seed(1)
    assert (model(ids).last_hidden_state - runs[1]).abs().max() > 1e-2


def test_hooks_on_all_modules_are_given_the_batch(base_of, shapes):
    model = base_of("llama").tuned(**settings_for("shallow")).train()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        shapes.clear()
        model(torch.randint(3, VOCABULARY, (3, 7)))
        assert set(shapes) == {(1, COUNT), (3, 7)}
    finally:
        handle.remove()


def test_what_was_seen_of_hooks_is_not_pickled(base_of):
    model = base_of("llama").tuned(**settings_for("shallow")).train()
    model(torch.randint(3, VOCABULARY, (3, 7)))
    assert model._hooks.prefix.user_hooks._none_before is not None
    assert pickle.loads(pickle.dumps(model))._hooks.prefix.user_hooks._none_before is None


@pytest.mark.parametrize(("name", "mode"), [("llama", "add"), ("gpt2", "shallow"), ("bert", "overwrite")])
def test_a_graph_of_gradients_can_be_made(base_of, name, mode):
    model = base_of(name).tuned(**settings_for(mode)).train()
    model.set_attn_implementation("eager")
    set_prompts(model, mode)
    ids = torch.randint(3, VOCABULARY, (3, 7))
    weights = torch.randn(*ids.shape, 24)

    def run(model, path="concat"):
        take(model, path)
        loss = (model(ids).last_hidden_state * weights).sum()
        gradients = torch.autograd.grad(loss, list(model.prompt_parameters()), create_graph=True)
        return [gradient.detach() for gradient in gradients]

    all_close(run(model, "packed"), run, model, 2e-5)


@pytest.mark.parametrize("mode", ["shallow", "add"])
def test_cross_attention_takes_the_concat_path(mode):
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    config.add_cross_attention = True
    model = ptune.AutoPTuneModel.from_config(config, **settings_for(mode)).eval()
    set_prompts(model, mode)
    ids, states = torch.randint(3, VOCABULARY, (3, 7)), torch.randn(3, 5, 32)
    given = {"encoder_hidden_states": states, "use_cache": False}
    got = model(ids, **given).last_hidden_state
    take(model, "concat")
    close(got, model(ids, **given).last_hidden_state)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("name", "mode"), [("llama", "add"), ("gemma3", "overwrite"), ("bert", "overwrite")])
def test_recorded_outputs_are_the_texts(base_of, name, mode, padding):
    model = base_of(name).tuned(**settings_for(mode))
    model.set_attn_implementation("eager")
    set_prompts(model, mode)
    ids, mask = pad(texts_for(padding), padding, 0)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    given = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    if FAMILIES[name].causal:
        given["use_cache"] = False
    outputs = {}
    for path in ("packed", "concat"):
        take(model, path)
        outputs[path] = model(**given)
    packed, whole = outputs["packed"], outputs["concat"]
    assert packed.keys() == whole.keys()
    for got, expected in zip(packed.hidden_states, whole.hidden_states, strict=True):
        close(got[real], expected[real])
    for got, expected in zip(packed.attentions, whole.attentions, strict=True):
        close(got.transpose(1, 2)[real], expected.transpose(1, 2)[real])


def of_text(model, path, ids, mask):
    """States of the text, and the gradients of prompts."""
    take(model, path)
    model.zero_grad()
    states = model(ids, attention_mask=mask, return_dict=False)[0][mask.bool()]
    torch.manual_seed(0)
    (states * torch.randn_like(states)).sum().backward()
    return [states.detach(), *(p.grad.clone() for p in model.prompt_parameters())]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 1), (5, 12)], ids=str)
@pytest.mark.parametrize(("name", "mode"), [("mistral", "add"), ("gpt2", "shallow"), ("distilbert", "overwrite")])
def test_batches_of_odd_shapes(base_of, name, mode, shape, dtype):
    model = base_of(name).tuned(**settings_for(mode)).train()
    set_prompts(model, mode)
    ids = torch.randint(3, VOCABULARY, shape, dtype=torch.int32)
    mask = torch.ones(shape, dtype=dtype)
    mask[0, : shape[1] // 3] = 0
    if shape[0] > 1:
        mask[-1] = 0  # a row without a text
    all_close(of_text(model, "packed", ids, mask), lambda model: of_text(model, "concat", ids, mask), model, 2e-5)


def one_by_one(queries, keys, values, lengths, causal, scaling):
    """What `ptune.varlen.flash` makes of each sequence."""
    ends = lengths.queries.tolist(), lengths.keys.tolist()
    outputs = []
    for first, last, begin, end in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        assert max(last - first, end - begin) <= lengths.longest
        assert (last > first) == (end > begin)
        query, key, value = (t.transpose(0, 1) for t in (queries[first:last], keys[begin:end], values[begin:end]))
        key, value = (t.repeat_interleave(len(query) // len(key), 0) for t in (key, value))
        scores = query @ key.mT * (query.shape[2] ** -0.5 if scaling is None else scaling)
        if causal:
            scores += torch.full_like(scores, -torch.inf).triu(end - begin - (last - first) + 1)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    assert len(queries) == ends[0][-1]
    assert len(keys) == len(values) == ends[1][-1]
    return torch.cat(outputs)


@pytest.mark.parametrize("padding", ["none", "right", "left", "within"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 1), (4, 7)], ids=str)
@pytest.mark.parametrize(
    ("name", "mode"),
    [("llama", "shallow"), ("llama", "overwrite"), ("gemma3", "add"), ("gpt2", "add"), ("distilbert", "overwrite")],
)
def test_one_attention_over_all_sequences(base_of, monkeypatch, name, mode, shape, padding):
    """As on a GPU, in plain arithmetic; `test_devices.test_half_precision` has the kernel itself."""
    served = []

    def flash(*arguments):
        served.append(arguments)
        return one_by_one(*arguments)

    model = base_of(name).tuned(**settings_for(mode)).train()
    set_prompts(model, mode)
    monkeypatch.setattr(varlen, "serves", lambda *arguments: True)
    monkeypatch.setattr(varlen, "flash", flash)
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling *= 1.5  # of the width of a head otherwise, which is the default
    ids = torch.randint(3, VOCABULARY, shape)
    # one row is whole, and another may hold no text at all
    lengths = torch.tensor([shape[1], 0, *torch.randint(shape[1] + 1, (2,))])[: shape[0]].flip(0)
    real = torch.arange(shape[1]) < (shape[1] if padding == "none" else lengths[:, None])
    real = real.flip(1) if padding == "left" else real.expand(shape).clone()
    real[:, 1 : shape[1] // 2] &= padding != "within"
    all_close(of_text(model, "packed", ids, real), lambda model: of_text(model, "concat", ids, real), model, 2e-5)
    behind = torch.equal(real, real.sort(1, descending=True)[0])
    assert len(served) == behind * (1 if name == "gemma3" else LAYERS)  # whose other layers have a window


@pytest.mark.parametrize("wrong", ["", "causality", "scale", "heads", "arguments", "gradient", "ends"])
def test_a_kernel_is_tried_before_it_serves(monkeypatch, wrong):
    def flash(queries, keys, values, lengths, causal, scaling):
        if wrong == "causality":
            causal = False
        if wrong == "arguments":
            raise TypeError
        if wrong == "heads":
            keys = keys.flip(1)
        if wrong == "gradient":
            values = values.detach() + 0 * values
        if wrong == "ends":
            lengths = varlen.Lengths(*(ends[[0, 2, 4]] for ends in (lengths.queries, lengths.keys)), 5)
        return one_by_one(queries, keys, values, lengths, causal, None if wrong == "scale" else scaling)

    monkeypatch.setattr(varlen, "flash", flash)
    varlen.is_right_on.cache_clear()
    try:
        assert varlen.is_right_on(torch.device("cpu")) == (not wrong)
    finally:
        varlen.is_right_on.cache_clear()


def test_a_kernel_is_not_judged_by_a_lack_of_memory(monkeypatch):
    monkeypatch.setattr(varlen, "flash", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        varlen.is_right_on(torch.device("cpu"))


@pytest.mark.parametrize("mode", ["shallow", "add"])
def test_routing_is_reported_for_the_text(mode):
    config = AutoConfig.for_model(
        "mixtral", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4,
    )  # fmt: skip
    model = ptune.AutoPTuneModelForCausalLM.from_config(config, **settings_for(mode)).train()
    set_prompts(model, mode)
    ids, mask = pad(texts_for("left"), "left", 0)
    losses = []
    for path in ("packed", "concat"):
        take(model, path)
        output = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        assert all(logits.shape == (ids.numel(), 4) for logits in output.router_logits)
        losses.append(output.aux_loss)
    close(*losses)


@pytest.mark.parametrize("path", SHARED)
def test_given_embeddings_get_their_gradients(base_of, path):
    model = base_of("gpt2").tuned(**settings_for("add")).train()
    set_prompts(model, "add")
    ids, mask = pad(texts_for("left"), "left", 0)
    weights = torch.randn(*ids.shape, 24) * mask[..., None]
    # rows of every other column of a wider batch: strided
    wide = model.get_input_embeddings()(ids.repeat_interleave(2, 1)).detach()
    gradients = []
    for each in (path, "concat"):
        take(model, each)
        embeds = wide.clone().requires_grad_()
        output = model(inputs_embeds=embeds[:, ::2], attention_mask=mask).last_hidden_state
        (output * weights).sum().backward()
        gradients.append(embeds.grad)
    close(*gradients, 1e-5)


def test_a_window_narrower_than_the_prompt_is_run_apart(base_of, monkeypatch):
    base = base_of("mistral")
    monkeypatch.setattr("ptune.plan._agree", lambda hooks: None)  # which would notice too, in float32
    for count, packs in ((5, None), (6, False)):  # the window is 5
        model = base.tuned(**settings_for("add") | {"pre_seq_len": count})
        assert (model.prefix_plan.path, model.prefix_plan.packs) == ("prefix", packs)
        assert ("the prompt is longer than its window" in model.prefix_plan.reason) is (packs is False)
        set_prompts(model, "add")
        ids = torch.randint(3, VOCABULARY, (3, 9))
        shared = model(ids, use_cache=False).last_hidden_state
        take(model, "concat")
        close(shared, model(ids, use_cache=False).last_hidden_state)


def test_a_window_that_no_block_has_is_none():
    assert tiny("qwen2_moe", "add").prefix_plan.packs is None  # its config says 0


def test_prompt_rows_have_the_type_of_the_text(base_of):
    model = base_of("bert").tuned(**settings_for("overwrite"))
    set_prompts(model, "overwrite")
    ids, mask = pad(texts_for("left"), "left", 0)
    for kind in (0, 1):
        states = []
        for path in ("packed", "concat"):
            take(model, path)
            given = {"attention_mask": mask, "token_type_ids": torch.full_like(ids, kind)}
            states.append(model(ids, **given).last_hidden_state[mask.bool()])
        close(*states)


def test_feed_forwards_in_chunks_are_run_apart(base_of):
    config = base_of("bert").stock().config
    config.chunk_size_feed_forward = 2
    model = ptune.AutoPTuneModel.from_config(config, **settings_for("overwrite"))
    assert (model.prefix_plan.path, model.prefix_plan.packs) == ("prefix", False)
    assert model.prefix_plan.reason.endswith("as its feed-forward is cut into chunks")


def test_what_fails_packed_alone_is_run_apart(base_of, monkeypatch, shapes):
    from transformers.models.llama.modeling_llama import LlamaMLP

    base, forward = base_of("llama"), LlamaMLP.forward
    longest = COUNT + 6  # of the rows that the check has

    def refusing(self, states):
        if states.shape[1] > longest:
            raise ValueError("too long")
        return forward(self, states)

    monkeypatch.setattr(LlamaMLP, "forward", refusing)
    monkeypatch.setattr("ptune.plan._exact", set())
    model = base.tuned(**settings_for("shallow"))
    assert (model.prefix_plan.path, model.prefix_plan.packs) == ("prefix", False)
    assert model.prefix_plan.reason.endswith("in one pass failed with ValueError: too long")
    shapes.clear()
    model(torch.randint(3, VOCABULARY, (3, 5)), use_cache=False)
    assert set(shapes) == {(1, COUNT), (3, 5)}


@pytest.mark.parametrize("kept", ["dynamic", "static"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "opt"])  # of full, sliding and mixed windows
@torch.no_grad()
def test_a_cache_is_filled_in_the_same_pass(base_of, name, mode, padding, kept):
    """With what two passes write to it; and what comes next reads it alike."""
    model = base_of(name).tuned(ptune.AutoPTuneModelForCausalLM, **settings_for(mode)).eval()
    set_prompts(model, mode)
    ids, mask = pad(texts_for(padding), padding, 0)
    mask = torch.ones_like(ids) if mask is None else mask
    width = COUNT + ids.shape[1] + 1
    found = []
    for path in SHARED:
        take(model, path)
        config = model.config
        cache = DynamicCache(config=config) if kept == "dynamic" else StaticCache(config=config, max_cache_len=width)
        output = model(ids, attention_mask=mask, use_cache=True, **{CACHE: cache})
        assert output[CACHE] is cache
        states = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        further = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        step = model(ids[:, :1], attention_mask=further, **{CACHE: cache})
        found.append((output.logits[mask.bool()], states, step.logits))
    (whole, ours, next_ours), (expected, theirs, next_theirs) = found[1], found[0]
    close(whole, expected)
    if padding != "right":  # a column of padding, which the next token's would follow
        close(next_ours, next_theirs)
    here = torch.cat([torch.ones_like(mask[:, :COUNT]), mask], 1).bool()
    if padding == "left":
        here = torch.cat([mask, torch.ones_like(mask[:, :COUNT])], 1).bool()  # and before it the prompt
    for one, other in zip(ours, theirs, strict=True):
        for got, want in zip(one, other, strict=True):
            if got.shape[2] == width - 1:  # a window has lost some, and a static cache has room
                close(got.transpose(1, 2)[here], want.transpose(1, 2)[here])


@pytest.mark.parametrize("mode", ["shallow", "overwrite", "add"])
@torch.no_grad()
def test_the_first_token_takes_one_pass(base_of, shapes, mode):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for(mode)).eval()
    ids = torch.randint(3, VOCABULARY, (3, 7))
    how = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    shapes.clear()
    model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    first = [(1, COUNT)] * LAYERS + [(3, 7)] * LAYERS if mode == "overwrite" else [(1, COUNT + 3 * 7)] * LAYERS
    assert shapes == first + [(3, 1)] * LAYERS


def test_gradients_flow_through_what_a_cache_keeps(base_of):
    model = base_of("llama").tuned(**settings_for("add")).eval()
    set_prompts(model, "add")
    ids, mask = pad(texts_for("left"), "left", 0)
    weights = torch.randn(*ids.shape, 24) * mask[..., None]
    further = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)

    def run(model, path="apart"):
        take(model, path)
        model.zero_grad()
        output = model(ids, attention_mask=mask, use_cache=True)
        last = model(ids[:, -1:], attention_mask=further, **{CACHE: output[CACHE]}).last_hidden_state
        ((output.last_hidden_state * weights).sum() + last.sum()).backward()
        return [parameter.grad.clone() for parameter in model.prompt_parameters()]

    all_close(run(model, "packed"), run, model, 2e-5)


@pytest.mark.parametrize("way", ["packed", "apart", "compiled"])
@torch.no_grad()
def test_no_mask_is_made_where_it_would_hide_nothing(base_of, monkeypatch, way):
    """Nor given to an attention whose fused kernels refuse it, while a cache is filled."""
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow")).eval()
    take(model, "packed" if way == "packed" else "apart")
    if way == "compiled":
        model.compile_prompts()
    given, attend = [], attention._sdpa

    def noting(module, query, key, value, mask, *args, **kwargs):
        given.append(mask is None)
        return attend(module, query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(attention, "_sdpa", noting)
    ids = torch.randint(3, VOCABULARY, (2, 6))
    masks = [torch.ones_like(ids) for _ in range(2)]
    masks[1][0, :2] = 0
    for mask in (None, *masks):
        for static in (False, True):
            kind = {"max_cache_len": 20} if static else {}
            cache = (StaticCache if static else DynamicCache)(config=model.config, **kind)
            given.clear()
            model(ids, attention_mask=mask, use_cache=True, **{CACHE: cache})
            assert given == [mask is not masks[1] and not static] * LAYERS
