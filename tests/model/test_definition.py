"""Every family, mode and padding against the oracle, which runs each row alone."""

from functools import cache

import pytest
import torch
import transformers

import ptune

from .common import COUNT, MODES, PADDINGS, all_close, close, moved_by_a_bit, set_prompts, settings_for, texts_for
from .families import FAMILIES, LAYERS
from .oracle import Prompt, pad, real, run_row

CORE = [name for name, family in FAMILIES.items() if family.core]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, base_of):
    base = base_of(request.param)
    return base.family, base.stock(), base.tuned(**settings_for("shallow"))


@pytest.fixture(params=["auto", False], ids=["shared", "concat"])
def sharing(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["cached", "uncached"])
def how(request, pair):
    """Prompt rows go through the cache, or, as in training, through the attention."""
    if not pair[0].causal:
        return {} if request.param else pytest.skip("an encoder has no cache")
    return {"use_cache": request.param}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_states_and_gradients(pair, mode, padding, sharing, how):
    family, stock, model = pair
    prompt, texts = set_prompts(model, mode, prefix_sharing=sharing), texts_for(padding)
    if sharing and model.prefix_plan.path == "concat":
        pytest.skip(f"nothing is shared: {model.prefix_plan.reason}")
    ids, mask = pad(texts, padding, model.config.pad_token_id)
    expected = [run_row(stock, family.blocks(stock), prompt, text).states for text in texts]
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **how)

    weights = [torch.randn_like(states[-1]) for states in expected]

    @cache
    def nudged():
        """Every row's states and the prompt's gradients, from weights and prompts moved by a bit."""
        leaves = [None if t is None else moved_by_a_bit(t).requires_grad_() for t in (prompt.shallow, prompt.deep)]
        twin, moved = moved_by_a_bit(stock), Prompt(*leaves, prompt.mode)
        made = [run_row(twin, family.blocks(twin), moved, text).states for text in texts]
        sum((states[-1] * w).sum() for states, w in zip(made, weights, strict=True)).backward()
        return made, moved

    assert len(output.hidden_states) == LAYERS + 1
    # what is recorded last lies before or after the last norm, as the family has it: the body's output stands for it
    for depth, states in enumerate([*output.hidden_states[:-1], output.last_hidden_state]):
        assert states.shape[:2] == ids.shape
        for row, got in enumerate(real(states, mask)):
            close(got, expected[row][depth], nudged=lambda row=row, depth=depth: nudged()[0][row][depth])

    sum((row * w).sum() for row, w in zip(real(output.last_hidden_state, mask), weights, strict=True)).backward()
    sum((states[-1] * w).sum() for states, w in zip(expected, weights, strict=True)).backward()
    close(model.prompt_embeddings.weight.grad, prompt.shallow.grad, nudged=lambda: nudged()[1].shallow.grad)
    if prompt.deep is not None:
        got = model.intermediate_prompt_embeddings.weight.grad.view_as(prompt.deep)
        close(got, prompt.deep.grad, nudged=lambda: nudged()[1].deep.grad)
        reading = LAYERS - getattr(model.config, "num_kv_shared_layers", 0)  # keys of prompt rows of their own
        assert all(layer.abs().sum() > 0 for layer in prompt.deep.grad[:reading])
    assert all(p.grad is None for name, p in model.named_parameters() if "prompt_embeddings" not in name)


@pytest.mark.parametrize("loader", [ptune.AutoPTuneModel, ptune.AutoPTuneModelForSequenceClassification])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_any_mask_value_but_0_is_a_real_token(base_of, name, loader, sharing):
    model = base_of(name).tuned(loader, pad_token_id=0, **settings_for("overwrite", prefix_sharing=sharing))
    ids, mask = pad(texts_for("left"), "left", 0)
    expected = model(ids, attention_mask=mask)[0]
    marked = mask * torch.randint(1, 5, mask.shape)
    marked[:, -1] = 9
    for given in (marked, mask.bool(), mask.float() * 0.3):
        assert torch.equal(model(ids, attention_mask=given)[0], expected)


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_no_more_than_twice_torch(base_of, name, dtype, sharing):
    base = base_of(name)
    exact, rough = base.stock(), base.stock(dtype=dtype)
    model = base.tuned(dtype=dtype, **settings_for("overwrite"))
    prompt, texts = set_prompts(model, "overwrite", prefix_sharing=sharing), texts_for("left", (12, 7, 9, 3, 11, 5))
    ids, mask = pad(texts, "left", model.config.pad_token_id)
    output = real(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    assert output[0].dtype == dtype

    def rows(body):
        with torch.no_grad():
            return torch.cat(
                [run_row(body, base.family.blocks(body), prompt, text).states[-1].float() for text in texts]
            )

    truth = rows(exact)
    ours, torchs = ((got - truth).norm(dim=1) for got in (torch.cat(output).float(), rows(rough)))
    # the errors of a few steep tokens outweigh all others, and are of one sample each
    assert ours.median() <= 2 * torchs.median()
    assert ours.max() <= 8 * torchs.max()


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("mode", ["overwrite", "add"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "modernbert"])
def test_eager_attention_records_text_queries(base_of, name, mode, cached):
    """Attentions have the text's queries only, over all keys: prompt columns included."""
    base = base_of(name)
    stock, model = (
        make(attn_implementation="eager", **kw) for make, kw in ((base.stock, {}), (base.tuned, settings_for(mode)))
    )
    how = {"use_cache": cached} if base.family.causal else {}
    assert model.config._attn_implementation in ("eager", "ptune_eager")
    prompt, texts = set_prompts(model, mode), texts_for("left")
    ids, mask = pad(texts, "left", 0)
    output = model(input_ids=ids, attention_mask=mask, output_attentions=True, **how)
    assert {got.shape[2:] for got in output.attentions} == {(ids.shape[1], ids.shape[1] + COUNT)}
    for row, text in enumerate(texts):

        def run(stock, text=text):
            whole = run_row(stock, base.family.blocks(stock), prompt, text, output_attentions=True).output.attentions
            return [each[0, :, COUNT:] for each in whole]

        all_close([got[row, :, -len(text) :, -len(text) - COUNT :] for got in output.attentions], run, stock)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_embeddings_and_positions_of_the_users_own(base_of, name):
    """``inputs_embeds`` is the text; positions given with it are the text's, and move up by m."""
    base = base_of(name)
    model = base.tuned(**settings_for("overwrite"))
    texts = texts_for("right")
    ids, mask = pad(texts, "right", model.config.pad_token_id)
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    embedded = model.get_input_embeddings()(ids)
    first = model.config.pad_token_id + 1 if name == "roberta" else 0
    positions = (torch.arange(ids.shape[1]) + first)[None]
    close(
        model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions).last_hidden_state[mask.bool()],
        expected[mask.bool()],
    )
    alone = model(input_ids=ids[2:3]).last_hidden_state
    close(model(input_ids=ids[2:3], position_ids=positions).last_hidden_state, alone)
    moved = model(input_ids=ids[2:3], position_ids=positions + 3).last_hidden_state
    assert (moved - alone).abs().max() > 1e-3


def test_token_types(base_of):
    """Prompt rows have the type of the token that they stand before."""
    base = base_of("bert")
    stock, model = base.stock(), base.tuned(**settings_for("shallow"))
    prompt, texts = set_prompts(model, "shallow"), texts_for("left")
    ids, mask = pad(texts, "left", 0)
    types = torch.randint(0, 2, ids.shape)
    output = model(input_ids=ids, attention_mask=mask, token_type_ids=types)
    for row, text in enumerate(texts):
        own = types[row, -len(text) :]
        extended = torch.cat([own[:1].expand(COUNT), own])[None]
        expected = run_row(stock, base.family.blocks(stock), prompt, text, token_type_ids=extended)
        close(output.last_hidden_state[row, -len(text) :], expected.states[-1])


def test_router_logits_and_their_loss(base_of):
    base = base_of("mixtral")
    stock = base.stock(transformers.AutoModelForCausalLM)
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("overwrite"))
    prompt, texts = set_prompts(model, "overwrite"), texts_for("right")
    ids, mask = pad(texts, "right", 0)
    output = model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
    rows = [
        run_row(stock.model, stock.model.layers, prompt, text, output_router_logits=True).output.router_logits
        for text in texts
    ]
    for layer, got in enumerate(output.router_logits):
        assert got.shape[0] == ids.numel()
        expected = torch.cat([row[layer][COUNT:] for row in rows])
        close(got[mask.flatten().bool()], expected)
    assert output.aux_loss > 0


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_pooler_reads_the_first_real_token(base_of, name):
    base = base_of(name)
    model = base.tuned(**settings_for("overwrite"))
    texts = texts_for("left")
    ids, mask = pad(texts, "left", model.config.pad_token_id)
    output = model(input_ids=ids, attention_mask=mask)
    for row, text in enumerate(texts):
        dense = model.pooler.dense
        first = output.last_hidden_state[row, -len(text)]
        close(output.pooler_output[row], torch.tanh(dense.weight @ first + dense.bias))


def test_a_row_depends_neither_on_padding_nor_on_other_rows(base_of):
    model = base_of("gemma3").tuned(**settings_for("overwrite"))
    text = torch.randint(3, 61, (6,))
    alone = model(input_ids=text[None]).last_hidden_state[0]
    others = [torch.randint(3, 61, (n,)) for n in (11, 2)]
    for side in ("right", "left"):
        ids, mask = pad([others[0], text, others[1]], side, 0)
        close(real(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)[1], alone)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_tuple_outputs(base_of, name):
    model = base_of(name).tuned(**settings_for("shallow"))
    ids = torch.randint(3, 61, (2, 5))
    output = model(input_ids=ids)
    as_tuple = model(input_ids=ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.last_hidden_state)


@pytest.mark.parametrize("name", CORE)
def test_disabled_prompts_are_the_bare_base(base_of, name):
    base = base_of(name)
    stock, model = base.stock(), base.tuned(**settings_for("overwrite"))
    ids, mask = pad(texts_for("right"), "right", model.config.pad_token_id)
    with model.disable_prompts():
        assert torch.equal(model(input_ids=ids, attention_mask=mask)[0], stock(input_ids=ids, attention_mask=mask)[0])
    assert not torch.equal(model(input_ids=ids, attention_mask=mask)[0], stock(input_ids=ids, attention_mask=mask)[0])


def test_a_call_that_failed_leaves_nothing_behind(base_of):
    base = base_of("llama")
    stock, model = base.stock(), base.tuned(**settings_for("overwrite"))
    ids = torch.randint(3, 61, (2, 5))
    failing = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids)
    failing.remove()
    with model.disable_prompts():
        assert torch.equal(model(input_ids=ids)[0], stock(input_ids=ids)[0])


def test_oracle_hears_every_prompt(base_of):
    """The oracle itself: each of its prompt rows moves its output."""
    base = base_of("llama")
    stock = base.stock()
    prompt = Prompt(
        torch.randn(COUNT, 24, requires_grad=True), torch.randn(LAYERS, COUNT, 24, requires_grad=True), "add"
    )
    run_row(stock, base.family.blocks(stock), prompt, torch.randint(3, 61, (6,))).states[-1].square().sum().backward()
    assert prompt.shallow.grad.abs().sum(-1).min() > 0
    assert prompt.deep.grad.abs().sum(-1).min() > 0
