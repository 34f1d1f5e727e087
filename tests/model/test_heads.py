"""Task heads see the text alone: losses, pooling and labels against the oracle's states."""

import inspect

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import ptune

from .common import all_close, close, set_prompts, settings_for, texts_for
from .oracle import pad, real, run_row

LABELS = 3


def states_of(stock, family, prompt, texts):
    body = stock.base_model
    return [run_row(body, family.blocks(body), prompt, text).states[-1] for text in texts]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3"])
def test_causal_language_model(base_of, name, padding):
    """The loss is the text's own next-token loss: its first token is not predicted."""
    base = base_of(name)
    stock = base.stock(transformers.AutoModelForCausalLM)
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("overwrite"))
    prompt, texts = set_prompts(model, "overwrite"), texts_for(padding)
    ids, mask = pad(texts, padding, 0)
    labels = ids.masked_fill(mask == 0, -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)

    def run(stock):
        return [stock.lm_head(row) for row in states_of(stock, base.family, prompt, texts)]

    all_close(real(output.logits, mask), run, stock)
    predicted = torch.cat([logits[:-1] for logits in run(stock)])
    close(output.loss, cross_entropy(predicted, torch.cat([text[1:] for text in texts])))
    marked = mask * torch.arange(1, ids.shape[1] + 1)
    assert torch.equal(model(input_ids=ids, attention_mask=marked, labels=labels).loss, output.loss)
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    names = list(inspect.signature(model.forward).parameters)
    by_place = [given.get(name) for name in names[: names.index("labels") + 1]]
    assert torch.equal(model(*by_place).loss, output.loss)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(**given, shift_labels=shifted).loss, output.loss)
    kept = model(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits
    close(kept, output.logits[:, -2:])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
@pytest.mark.parametrize(
    ("name", "pad_token"),
    [("llama", None), ("llama", 2), ("llama", 7), ("gpt2", None), ("gpt2", 2), ("opt", 2)],
)
def test_decoders_classify_by_the_last_real_token(base_of, name, mode, padding, pad_token):
    """Whether there is a pad token, and whether it ends the text too, makes no difference."""
    base = base_of(name)
    settings = settings_for(mode, num_labels=LABELS, pad_token_id=pad_token)
    model = base.tuned(ptune.AutoPTuneModelForSequenceClassification, **settings)
    model.config.pad_token_id = pad_token
    prompt, texts = set_prompts(model, mode), texts_for(padding)
    texts = [torch.where(text == 7, 8, text) for text in texts]
    texts[0][-1] = 2 if pad_token is None else pad_token
    ids, mask = pad(texts, padding, 0)
    labels = torch.randint(LABELS, (len(texts),))
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    stock = base.stock()
    weight = model.score.weight
    expected = torch.stack(
        [weight @ run_row(stock, base.family.blocks(stock), prompt, text).states[-1][-1] for text in texts]
    )
    close(output.logits, expected)
    close(output.loss, cross_entropy(expected, labels))
    close(model(input_ids=ids[-2:-1, -len(texts[-2]) :] if padding == "left" else ids[-2:-1]).logits[0], expected[-2])
    embedded = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embedded, attention_mask=mask).logits, expected)


def test_padding_without_a_mask_is_warned_of(base_of, monkeypatch):
    """A stock decoder would take it for padding; here it is text."""
    warnings = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", warnings.append)
    settings = settings_for("overwrite", pad_token_id=7)
    model = base_of("llama").tuned(ptune.AutoPTuneModelForSequenceClassification, **settings)
    ids, mask = pad(texts_for("right"), "right", 7)
    model(input_ids=ids, attention_mask=mask)
    assert not warnings
    model(input_ids=ids)
    assert "recommend passing in an `attention_mask`" in warnings[0]


def test_disabled_prompts_bring_the_stock_pooling_back(base_of):
    base = base_of("llama")
    model = base.tuned(ptune.AutoPTuneModelForSequenceClassification, pad_token_id=None, **settings_for("overwrite"))
    with model.disable_prompts(), pytest.raises(ValueError, match="no padding token is defined"):
        model(torch.randint(3, 61, (2, 5)))


def test_a_head_alone_pools_by_the_mask_too(base_of):
    base = base_of("llama")
    model = base.tuned(ptune.AutoPTuneModelForSequenceClassification, num_labels=LABELS, pad_token_id=None)
    texts = texts_for("right")
    ids, mask = pad(texts, "right", 0)
    stock = base.stock()
    expected = torch.stack(
        [model.score.weight @ stock(input_ids=text[None]).last_hidden_state[0, -1] for text in texts]
    )
    close(model(input_ids=ids, attention_mask=mask).logits, expected)


def pooled_by(name, model, states):
    """The stock head of ``model`` on one text's states [n, d]."""
    if name == "bert":
        return model.classifier(model.bert.pooler(states[None]))[0]
    if name in ("roberta", "electra"):
        return model.classifier(states[None])[0]
    if name == "distilbert":
        return model.classifier(torch.relu(model.pre_classifier(states[0])))
    pooled = states[0] if model.config.classifier_pooling == "cls" else states.mean(0)
    return model.classifier(model.head(pooled))


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert", {}),
        ("roberta", {}),
        ("electra", {}),
        ("distilbert", {}),
        ("modernbert", {"classifier_pooling": "cls"}),
        ("modernbert", {"classifier_pooling": "mean"}),
    ],
    ids=["bert", "roberta", "electra", "distilbert", "modernbert-cls", "modernbert-mean"],
)
def test_encoders_classify_by_their_own_pooling(base_of, name, config, mode, padding):
    base = base_of(name)
    settings = settings_for(mode, num_labels=LABELS, **config)
    model = base.tuned(ptune.AutoPTuneModelForSequenceClassification, **settings)
    prompt, texts = set_prompts(model, mode), texts_for(padding)
    ids, mask = pad(texts, padding, model.config.pad_token_id)
    labels = torch.randint(LABELS, (len(texts),))
    output = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    stock = base.stock()
    rows = [run_row(stock, base.family.blocks(stock), prompt, text).states for text in texts]
    expected = torch.stack([pooled_by(name, model, states[-1]) for states in rows])
    close(output.logits, expected)
    close(output.loss, cross_entropy(expected, labels))
    for got, states in zip(real(output.hidden_states[1], mask), rows, strict=True):
        close(got, states[1])
    output.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for name, p in model.named_parameters() if "prompt" not in name)


def test_encoder_classifier_rolls_attentions_back(base_of):
    base = base_of("roberta")
    settings = settings_for("shallow", num_labels=LABELS, attn_implementation="eager")
    model = base.tuned(ptune.AutoPTuneModelForSequenceClassification, **settings)
    body = base.tuned(**settings_for("shallow"), attn_implementation="eager")
    body.load_state_dict(model.roberta.state_dict(), strict=False)
    body.prompt_embeddings.load_state_dict(model.prompt_embeddings.state_dict())
    ids, mask = pad(texts_for("left"), "left", 1)
    got = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    expected = body(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    for row, length in enumerate(mask.sum(-1)):
        for one, other in zip(got, expected, strict=True):
            close(one[row, :, -length:], other[row, :, -length:])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
@pytest.mark.parametrize("name", ["llama", "bert", "modernbert"])
def test_token_classification(base_of, name, mode, padding):
    base = base_of(name)
    model = base.tuned(ptune.AutoPTuneModelForTokenClassification, **settings_for(mode, num_labels=LABELS))
    prompt, texts = set_prompts(model, mode), texts_for(padding)
    ids, mask = pad(texts, padding, 0)
    labels = torch.randint(LABELS, ids.shape).masked_fill(mask == 0, -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    stock = base.stock()
    head = model.score if name == "llama" else model.classifier

    def run(stock):
        rows = states_of(stock, base.family, prompt, texts)
        return [head(model.head(row) if name == "modernbert" else row) for row in rows]

    all_close(real(output.logits, mask), run, stock)
    close(output.loss, cross_entropy(torch.cat(run(stock)), labels[mask.bool()]))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "distilbert", "gpt2"])
def test_question_answering(base_of, tmp_path, name, mode, padding):
    """Starts and ends of answers are columns of the text, whatever stands before it."""
    base = base_of(name)
    model = base.tuned(ptune.AutoPTuneModelForQuestionAnswering, **settings_for(mode))
    prompt, texts = set_prompts(model, mode), texts_for(padding)
    ids, mask = pad(texts, padding, model.config.pad_token_id or 0)
    spans = torch.stack([mask[i].nonzero()[:, 0][torch.randint(len(text), (2,))] for i, text in enumerate(texts)])
    output = model(input_ids=ids, attention_mask=mask, start_positions=spans[:, 0], end_positions=spans[:, 1])
    head = model.classifier if name == "modernbert" else model.qa_outputs

    def run(stock):
        rows = states_of(stock, base.family, prompt, texts)
        logits = [head(model.head(row) if name == "modernbert" else row) for row in rows]
        return [each[:, kind] for kind in range(2) for each in logits]

    all_close(real(output.start_logits, mask) + real(output.end_logits, mask), run, base.stock())
    assert output.start_logits.shape == ids.shape
    close(
        output.loss,
        (cross_entropy(output.start_logits, spans[:, 0]) + cross_entropy(output.end_logits, spans[:, 1])) / 2,
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "prompt" not in name}
    assert trained == {name for name, p in model.named_parameters() if any(p is its for its in head.parameters())}
    model.save_prompts(tmp_path)
    loaded = ptune.AutoPTuneModelForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids, attention_mask=mask).end_logits, output.end_logits)


@pytest.mark.parametrize("mode", [None, "shallow"])
@pytest.mark.parametrize("name", ["llama", "bert", "roberta", "modernbert"])
def test_only_prompts_and_what_the_checkpoint_lacked_train(base_of, name, mode):
    """These checkpoints lack the classifier; BERT's lacks the pooler too, ModernBERT's has half of its head."""
    settings = {} if mode is None else settings_for(mode)
    model = base_of(name).tuned(ptune.AutoPTuneModelForSequenceClassification, num_labels=LABELS, **settings)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {
        "llama": {"score.weight"},
        "bert": {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"},
        "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
        "modernbert": {"classifier.weight", "classifier.bias"},
    }
    assert trained - {"prompt_embeddings.weight"} == heads[name]
    assert ("prompt_embeddings.weight" in trained) == (mode is not None)
    assert model.num_trainable_parameters() == sum(p.numel() for n, p in model.named_parameters() if n in trained)


def test_language_models_have_no_head_to_train(base_of):
    for name in ("llama", "qwen3", "gpt2"):  # untied, tied, tied by default
        model = base_of(name).tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompt_embeddings.weight"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_forward_has_the_base_signature(base_of, name):
    """Trainer drops the columns of a data set that forward does not name."""
    for loader, stock in [
        (ptune.AutoPTuneModelForSequenceClassification, transformers.AutoModelForSequenceClassification),
        (ptune.AutoPTuneModelForTokenClassification, transformers.AutoModelForTokenClassification),
    ]:
        tuned, plain = base_of(name).tuned(loader, **settings_for("shallow")), base_of(name).stock(stock)
        assert inspect.signature(tuned.forward) == inspect.signature(plain.forward)
        assert tuned.loss_type == plain.loss_type
