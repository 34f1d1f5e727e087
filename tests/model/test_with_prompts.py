"""`ptune.with_prompts`: prompts on the weights of a model that is loaded already."""

import copy
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import ptune

from .common import MODES, close, set_prompts, settings_for, texts_for
from .oracle import pad, real, run_row

LABELS = 3
CLASSIFIER = transformers.AutoModelForSequenceClassification
WRITER = transformers.AutoModelForCausalLM


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def train_a_step(model, ids, labels):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(ids, labels=labels).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_it_is_the_definition(base_of, name, mode):
    base = base_of(name)
    body = base.stock()
    model = ptune.with_prompts(body, ptune.PTuneConfig(**settings_for(mode)))
    assert type(model) is ptune.models.ptune_class(type(body))
    prompt, texts = set_prompts(model, mode), texts_for("left")
    ids, mask = pad(texts, "left", 0)
    states = real(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    for got, text in zip(states, texts, strict=True):
        close(got, run_row(body, base.family.blocks(body), prompt, text).states[-1])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_base_goes_on_as_it_was(base_of, name):
    """Through the training of several models on its weights, each with a head and prompts of its own."""
    stock = base_of(name).stock(CLASSIFIER, num_labels=LABELS, pad_token_id=0).train()
    kinds, before, config = [type(module) for module in stock.modules()], state_of(stock), stock.config.to_dict()
    requires = [p.requires_grad for p in stock.parameters()]
    ids, labels = torch.randint(3, 61, (4, 6)), torch.randint(LABELS, (4,))
    one = ptune.with_prompts(stock, ptune.PTuneConfig(**settings_for("shallow")))
    other = ptune.with_prompts(stock, ptune.PTuneConfig(**settings_for("overwrite")))
    expected = other(ids).logits
    train_a_step(one, ids, labels)
    assert torch.equal(other(ids).logits, expected)
    train_a_step(other, ids, labels)
    assert not torch.equal(other(ids).logits, expected)
    assert unchanged(stock, before)
    assert [type(module) for module in stock.modules()] == kinds
    assert stock.config.to_dict() == config
    assert stock.training
    assert [p.requires_grad for p in stock.parameters()] == requires
    assert not any(module._forward_pre_hooks for module in stock.modules())
    shared = {p.data_ptr() for p in stock.parameters()}
    assert {n for n, p in one.named_parameters() if p.data_ptr() not in shared} == {
        n for n, p in one.named_parameters() if p.requires_grad
    }


def test_what_trains(base_of, tmp_path):
    prompts = ptune.PTuneConfig(**settings_for("shallow"))

    def trained(stock, **kwargs):
        model = ptune.with_prompts(stock, prompts, **kwargs)
        return {name for name, p in model.named_parameters() if p.requires_grad} - {"prompt_embeddings.weight"}

    classifier = base_of("bert").stock(CLASSIFIER)
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trained(classifier) == pooler | {"classifier.weight", "classifier.bias"}
    assert trained(classifier, head=[]) == set()
    assert trained(copy.deepcopy(classifier)) == trained(classifier)
    classifier.save_pretrained(tmp_path)
    assert trained(CLASSIFIER.from_pretrained(tmp_path)) == {"classifier.weight", "classifier.bias"}
    assert trained(classifier, head=["classifier.bias", "classifier"]) == {"classifier.weight", "classifier.bias"}
    assert ptune.with_prompts(classifier).num_trainable_parameters() == 0
    assert trained(base_of("llama").stock(WRITER)) == set()
    assert trained(base_of("llama").stock(WRITER), head=["lm_head"]) == {"lm_head.weight"}
    assert trained(base_of("bert").stock(transformers.AutoModelForMaskedLM)) == set()
    with pytest.raises(TypeError, match="head: expected a list of names, got 'classifier'"):
        trained(classifier, head="classifier")
    for wrong in ("classifie", "classifier.weights", "bert.pooler."):
        with pytest.raises(ValueError, match=f"head: expected parameters of .*, got '{wrong}'"):
            trained(classifier, head=[wrong])


def test_folders_are_those_of_from_pretrained(base_of, tmp_path, monkeypatch):
    """Written by either and read by either; what is read into a model leaves its base alone."""
    base = base_of("llama")
    stock = base.stock(CLASSIFIER, num_labels=LABELS, rms_norm_eps=0.01)
    ids = torch.randint(3, 61, (2, 5))
    model = ptune.with_prompts(stock, ptune.PTuneConfig(**settings_for("overwrite")))
    set_prompts(model, "overwrite")
    model.save_prompts(tmp_path)
    loaded = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.rms_norm_eps == 0.01
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again = ptune.with_prompts(other := base.stock(CLASSIFIER, num_labels=LABELS, rms_norm_eps=0.01))
    assert again.prefix_plan.path == "none"
    before = state_of(other)
    again.load_prompts(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not torch.equal(other.score.weight, model.score.weight)
    assert unchanged(other, before)
    again.init_prompts(ptune.PTuneConfig(**settings_for("shallow")))
    sharing = ptune.with_prompts(other, ptune.PTuneConfig(**settings_for("shallow")), head=[])
    with monkeypatch.context() as patch:
        plans = Mock(side_effect=[ValueError("no plan"), sharing.prefix_plan])
        patch.setattr(ptune.mixin, "make_plan", plans)
        with pytest.raises(ValueError, match="no plan"):
            sharing.load_prompts(tmp_path)
    sharing.load_prompts(tmp_path)  # into a head of its own, though the first did not come to it
    assert torch.equal(sharing(ids).logits, model(ids).logits)
    assert unchanged(other, before)


def test_prompts_without_a_head_for_a_base_with_one(base_of, tmp_path):
    """A classifier of its own, in its checkpoint."""
    base_of("llama").stock(CLASSIFIER, num_labels=LABELS).save_pretrained(tmp_path / "base")
    tuned = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(tmp_path / "base", **settings_for("shallow"))
    tuned.save_prompts(tmp_path / "prompts")
    model = ptune.with_prompts(CLASSIFIER.from_pretrained(tmp_path / "base"))
    model.load_prompts(tmp_path / "prompts")
    ids = torch.randint(3, 61, (2, 5))
    assert torch.equal(model(ids).logits, tuned(ids).logits)


def test_a_base_that_generate_has_compiled(base_of):
    """The call that it compiled is of the base, and is no twin's."""
    stock = base_of("llama").stock(WRITER)
    stock._compiled_call = stock.__call__
    model = ptune.with_prompts(stock, ptune.PTuneConfig(**settings_for("shallow")))
    assert "_compiled_call" not in vars(model)
    assert stock._compiled_call == stock.__call__


def test_settings_on_the_bases_config_count(base_of):
    stock = base_of("llama").stock()
    stock.config.tuning_mode, stock.config.pre_seq_len = "ptune", 3
    model = ptune.with_prompts(stock)
    assert model.prompt_embeddings.weight.shape[0] == 3
    assert not hasattr(model.config, "pre_seq_len")
    assert stock.config.pre_seq_len == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_and_moves_are_the_models_own(base_of, dtype):
    stock = base_of("llama").stock(WRITER, dtype=dtype)
    model = ptune.with_prompts(stock, ptune.PTuneConfig(**settings_for("shallow")), head=["lm_head"])
    assert model.lm_head.weight.dtype == model.prompt_embeddings.weight.dtype == torch.float32
    stock.double()
    assert model.model.norm.weight.dtype == dtype
    model.half()
    assert model.model.norm.weight.dtype == torch.float16
    assert model.lm_head.weight.dtype == torch.float32
    assert stock.lm_head.weight.dtype == torch.float64


def test_a_base_in_hybrid_dtype_gives_a_model_in_it(base_of):
    stock, plain = (base_of("llama").stock(WRITER) for _ in range(2))
    ptune.hybrid(stock, torch.bfloat16)
    ids, config = torch.randint(3, 61, (2, 5)), ptune.PTuneConfig(**settings_for("overwrite"))
    model, expected = ptune.with_prompts(stock, config), ptune.hybrid(ptune.with_prompts(plain, config), torch.bfloat16)
    expected.intermediate_prompt_embeddings.load_state_dict(model.intermediate_prompt_embeddings.state_dict())
    expected.prompt_embeddings.load_state_dict(model.prompt_embeddings.state_dict())
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not torch.equal(model(ids).logits, ptune.hybrid(expected, None)(ids).logits)
    kept = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    assert kept.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_base_that_checkpoints_already(base_of, mode, reentrant):
    stock = base_of("llama").stock(CLASSIFIER, num_labels=LABELS, pad_token_id=0)
    plain = ptune.with_prompts(stock, ptune.PTuneConfig(**settings_for(mode)))
    stock.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = ptune.with_prompts(stock, ptune.PTuneConfig(**settings_for(mode))).train()
    assert model.is_gradient_checkpointing
    for part in (model, plain.train()):
        part.load_state_dict(copy.deepcopy(plain.state_dict()))
    ids, labels = torch.randint(3, 61, (3, 6)), torch.randint(LABELS, (3,))
    for part in (model, plain):
        part(ids, labels=labels).loss.backward()
    for got, expected in zip(model.prompt_parameters(), plain.prompt_parameters(), strict=True):
        close(got.grad, expected.grad)


def test_refusals_leave_the_base_alone(base_of):
    stock = base_of("llama").stock(WRITER)
    before, made = state_of(stock), ptune.with_prompts(stock)
    prompts = ptune.PTuneConfig(**settings_for("shallow"))
    for wrong, error, message in [
        (
            (made, prompts),
            TypeError,
            "got PTuneLlamaForCausalLM; give the base that it was made of",
        ),
        ((torch.nn.Linear(2, 2), prompts), TypeError, "base: expected a stock transformers model, got Linear"),
        ((stock, {"pre_seq_len": 3}), TypeError, "config: expected a PTuneConfig or a transformers config, got dict"),
        ((stock, ptune.PTuneConfig(**settings_for("shallow"), prompt_init_text=[[99]])), ValueError, "99"),
    ]:
        with pytest.raises(error, match=message):
            ptune.with_prompts(*wrong)
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM; ptune\.with_prompts takes a model that is loaded"):
        ptune.AutoPTuneModelForCausalLM.from_pretrained(stock)
    stock.forward = stock.forward
    with pytest.raises(ValueError, match=r"base: expected its class's own forward, .*`del base\.forward`"):
        ptune.with_prompts(stock, prompts)
    del stock.forward
    stock.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}
    with pytest.raises(NotImplementedError, match="expected a model on one device"):
        ptune.with_prompts(stock, prompts)
    mamba = transformers.MambaConfig(vocab_size=61, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(NotImplementedError, match="MambaModel: prompts are not supported"):
        ptune.with_prompts(transformers.MambaModel(mamba), prompts)
    assert unchanged(stock, before)
    assert type(stock) is transformers.LlamaForCausalLM


def test_another_head_than_those_with_a_loader(base_of):
    """Multiple choice: each choice is a row of its own."""
    base = base_of("bert")
    stock = base.stock(transformers.AutoModelForMultipleChoice).eval()
    model = ptune.with_prompts(stock, ptune.PTuneConfig(**settings_for("overwrite")))
    prompt, texts = set_prompts(model, "overwrite"), texts_for("right")
    ids, mask = pad(texts, "right", 0)
    labels = torch.randint(2, (2,))
    output = model(ids.view(2, 2, -1), attention_mask=mask.view(2, 2, -1), labels=labels)
    body = stock.bert
    rows = [run_row(body, base.family.blocks(body), prompt, text).states[-1] for text in texts]
    expected = torch.cat([stock.classifier(body.pooler(row[None]))[0] for row in rows]).view(2, 2)
    close(output.logits, expected)
    close(output.loss, cross_entropy(expected, labels))
