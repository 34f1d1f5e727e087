"""Every family, mode and padding against the oracle, which runs each row alone."""

import pytest
import torch
import transformers

import ptune

from .families import FAMILIES, LAYERS, PAD, VOCABULARY
from .oracle import Prompt, pad, real, run_rows

MODES = ["shallow", "overwrite", "add"]
PADDINGS = ["none", "right", "left"]
COUNT = 4


def close(got, expected, tolerance=1e-5):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


def texts_for(padding, lengths=(7, 3, 9, 1)):
    return [torch.randint(3, VOCABULARY, (5 if padding == "none" else n,)) for n in lengths]


def settings_for(mode):
    if mode == "shallow":
        return ptune.PTuneConfig(tuning_mode="ptune", pre_seq_len=COUNT)
    return ptune.PTuneConfig(tuning_mode="deep_ptune", pre_seq_len=COUNT, deep_prompt_mode=mode)


def set_prompts(model, mode):
    """Fresh random prompts on ``model``, and the same as the oracle's leaves."""
    model.init_prompts(settings_for(mode))
    with torch.no_grad():
        for table in (model.prompt_embeddings, model.intermediate_prompt_embeddings):
            if table is not None:
                table.weight.normal_(std=0.7)
    shallow = model.prompt_embeddings.weight.detach().clone().requires_grad_()
    if mode == "shallow":
        return Prompt(shallow)
    deep = model.intermediate_prompt_embeddings.weight.detach().clone().view(LAYERS, COUNT, -1).requires_grad_()
    return Prompt(shallow, deep, mode)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, base_of):
    base = base_of(request.param)
    return base.family, base.stock(), base.tuned(tuning_mode="ptune", pre_seq_len=1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_hidden_states_and_gradients(pair, mode, padding):
    family, stock, model = pair
    prompt, texts = set_prompts(model, mode), texts_for(padding)
    ids, mask = pad(texts, padding, model.config.pad_token_id)
    expected = run_rows(stock, family.blocks(stock), prompt, texts)
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)

    assert len(output.hidden_states) == LAYERS + 1
    # stock models record the last state after or before their last norm; the body's output is compared itself
    for depth, states in enumerate([*output.hidden_states[:-1], output.last_hidden_state]):
        assert states.shape[:2] == ids.shape
        for row, got in enumerate(real(states, mask)):
            close(got, expected[row][depth])

    weights = [torch.randn_like(row[-1]) for row in expected]
    loss = sum((got * w).sum() for got, w in zip(real(output.last_hidden_state, mask), weights, strict=True))
    sum((row[-1] * w).sum() for row, w in zip(expected, weights, strict=True)).backward()
    loss.backward()
    close(model.prompt_embeddings.weight.grad, prompt.shallow.grad)
    if prompt.deep is not None:
        close(model.intermediate_prompt_embeddings.weight.grad, prompt.deep.grad.flatten(0, 1))
        assert all(layer.abs().sum() > 0 for layer in prompt.deep.grad)
    assert all(p.grad is None for name, p in model.named_parameters() if "prompt_embeddings" not in name)
