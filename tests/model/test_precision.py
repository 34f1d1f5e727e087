"""Prompts and head are float32, and stay so bit for bit."""

import copy

import pytest
import torch

import ptune

from .common import COUNT, close, set_prompts, settings_for, texts_for
from .families import LAYERS
from .oracle import pad


def own(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=["llama", "bert", "modernbert"])
def classifier(request, base_of):
    model = base_of(request.param).tuned(
        ptune.AutoPTuneModelForSequenceClassification, num_labels=3, **settings_for("overwrite")
    )
    set_prompts(model, "overwrite")
    with torch.no_grad():
        for parameter in own(model).values():
            parameter.add_(torch.rand_like(parameter) * 1e-4)  # digits that no half type has
    return model


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.half().float(),
        lambda m: torch.nn.Sequential(m).half()[0],
    ],
    ids=["half", "bfloat16", "to dtype", "to device and dtype", "and back", "inside a module"],
)
def test_casts_leave_them_alone(classifier, cast):
    before = {name: p.detach().clone() for name, p in own(classifier).items()}
    classifier(torch.randint(3, 61, (2, 5))).logits.sum().backward()
    grads = {name: p.grad.clone() for name, p in own(classifier).items()}
    model = cast(classifier)
    for name, parameter in own(model).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
        assert torch.equal(parameter.grad, grads[name])
    assert len(own(model)) == len(before)


def test_casts_reach_the_base(classifier):
    classifier.bfloat16()
    trained = own(classifier)
    assert {p.dtype for name, p in classifier.named_parameters() if name not in trained} == {torch.bfloat16}
    assert classifier.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bert", "roberta", "modernbert", "distilbert"])
def test_half_bases_have_float32_heads_and_logits(base_of, name, dtype):
    for loader in (ptune.AutoPTuneModelForSequenceClassification, ptune.AutoPTuneModelForTokenClassification):
        model = base_of(name).tuned(loader, num_labels=3, dtype=dtype, **settings_for("overwrite"))
        assert {p.dtype for p in own(model).values()} == {torch.float32}
        ids, mask = pad(texts_for("left"), "left", model.config.pad_token_id)
        labels = torch.randint(3, ids.shape if "Token" in type(model).__name__ else ids.shape[:1])
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        assert output.logits.dtype == torch.float32
        output.loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in own(model).values())


def test_float64_bases_take_float64_prompts(base_of):
    model = base_of("llama").tuned(**settings_for("overwrite"))
    ids = torch.randint(3, 61, (2, 5))
    expected = model(input_ids=ids).last_hidden_state
    got = model.double()(input_ids=ids).last_hidden_state
    assert got.dtype == torch.float64
    close(got.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_get_prompt(base_of, dtype):
    model = base_of("llama").tuned(dtype=dtype, **settings_for("overwrite"))
    set_prompts(model, "overwrite")
    shallow, deep = model.get_prompt(5)
    assert shallow.dtype == deep.dtype == dtype
    assert torch.equal(shallow, model.prompt_embeddings.weight.to(dtype).expand(5, COUNT, -1))
    assert torch.equal(deep, model.intermediate_prompt_embeddings.weight.to(dtype).expand(5, LAYERS * COUNT, -1))
    weights = torch.randn(5, COUNT, shallow.shape[-1]).to(dtype)
    (shallow * weights).sum().backward()
    exact = weights.double().sum(0)
    close(model.prompt_embeddings.weight.grad.double(), exact, 1e-6)  # a sum in half would be off by a thousandth


def test_get_prompt_without(base_of):
    assert base_of("llama").tuned().get_prompt(2) == (None, None)
    shallow, deep = base_of("llama").tuned(**settings_for("shallow")).get_prompt(2)
    assert shallow.shape == (2, COUNT, 24)
    assert deep is None


def test_a_half_model_saves_the_float32_prompts(classifier, tmp_path):
    before = {name: p.detach().clone() for name, p in own(classifier).items()}
    classifier.half().save_pretrained(tmp_path)
    loaded = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert own(loaded).keys() == before.keys()
    for name, parameter in own(loaded).items():
        assert torch.equal(parameter, before[name])
    assert loaded.dtype == torch.bfloat16


def test_copies_keep_them(classifier):
    copied = copy.deepcopy(classifier).half()
    for name, parameter in own(copied).items():
        assert torch.equal(parameter, own(classifier)[name])
