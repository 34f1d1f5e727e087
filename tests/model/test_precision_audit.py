"""The precision audit, whole: on models of many kinds, and on those made to fail in half types."""

import copy
import json
from collections import Counter

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ptune
from ptune.precision import Limits, audit, keep_fp32
from ptune.precision.casts import loaded_in
from ptune.precision.command import load
from ptune.precision.damage import Damage, Outputs, mean
from ptune.precision.report import write_audit

from .families import VOCABULARY

FP16, BF16 = torch.float16, torch.bfloat16
SPAM = 20  # messages of each class


def inputs(lengths=(7, 3, 9)):
    """Texts padded on the right."""
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def states(model, batch=None):
    with torch.no_grad():
        return model(**(inputs() if batch is None else batch)).last_hidden_state


def t5():
    torch.manual_seed(1)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config).eval()


def test_padding_counts_nowhere(base_of):
    base = base_of("llama")
    model, batch = base.stock().eval(), inputs()
    trimmed = {name: tensor[1:2, :3] for name, tensor in batch.items()}  # the row of three tokens, without padding
    with torch.no_grad():
        model.embed_tokens.weight[0] = 1e4  # padding's, and no text's
    padded = {name: tensor[1:2] for name, tensor in batch.items()}
    one, two = (audit(model, [b], progress=False).statistics for b in (padded, trimmed))
    assert len(one) == len(two) > 40
    for record, expected in zip(one, two, strict=True):
        assert (record["name"], record["kind"], record["tensor"]) == tuple(
            expected[k] for k in ("name", "kind", "tensor")
        )
        assert record["amax"] == pytest.approx(expected["amax"], rel=1e-5)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_padding_counts_nowhere_beside_prompts(base_of, mode):
    model, batch = base_of("bert").tuned(tuning_mode=mode, pre_seq_len=4).eval(), inputs()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0] = 1e4
    one, two = (
        audit(model, [{name: tensor[1:2, :width] for name, tensor in batch.items()}]).statistics for width in (9, 3)
    )
    for record, expected in zip(one, two, strict=True):
        assert record["amax"] == pytest.approx(expected["amax"], rel=1e-5), record["name"]


def widened(folder):
    """A trained MiniLM whose third MLP writes 1,024 times as much, as does what its norm adds that to: the same model.

    Its amax was 160, of one channel; T5's feed-forward layers overflow float16 so.
    """
    model, scale = AutoModel.from_pretrained(folder).eval(), 1024
    block = model.encoder.layer[2]
    with torch.no_grad():
        for tensor in (*block.attention.output.LayerNorm.parameters(), *block.output.dense.parameters()):
            tensor.mul_(scale)
        block.intermediate.dense.weight.div_(scale)
    return model


@pytest.fixture(scope="module")
def messages(data_folder):
    """The first spam and ham messages: (text, is spam)."""
    lines = [line.split("\t") for line in (data_folder / "sms_spam/sms_spam.tsv").read_text().splitlines()[1:]]
    chosen = [(text, label == "spam") for label, text in lines]
    return [m for kind in (True, False) for m in [m for m in chosen if m[1] is kind][:SPAM]]


def embed(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    return mean(states(model, dict(batch)), batch["attention_mask"]).float()


def test_an_embedding_model_that_fails_in_float16(minilm, messages):
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), widened(minilm)
    texts = [text for text, _ in messages]
    spam = torch.tensor([is_spam for _, is_spam in messages])

    def accuracy(embeddings):
        """Of the nearer class centre, of which each is the mean of the other texts of a class."""
        right = 0
        for index in range(len(texts)):
            others = torch.arange(len(texts)) != index
            centres = torch.stack([embeddings[(spam == kind) & others].mean(0) for kind in (False, True)])
            right += bool(torch.cosine_similarity(embeddings[index], centres).argmax() == spam[index])
        return right / len(texts)

    whole = embed(model, tokenizer, texts)
    torch.testing.assert_close(whole, embed(AutoModel.from_pretrained(minilm), tokenizer, texts), rtol=0, atol=1e-4)
    assert accuracy(whole) > 0.8  # half is chance
    for dtype in (FP16, BF16):
        got = accuracy(embed(ptune.hybrid(model, attn_dtype=dtype), tokenizer, texts))
        assert abs(got - accuracy(whole)) <= 1 / len(texts)
    ptune.hybrid(model, attn_dtype=None)
    with loaded_in(model, FP16):
        assert embed(model, tokenizer, texts).isnan().all()

    batch = tokenizer(texts[::10], padding=True, truncation=True, max_length=10, return_tensors="pt")
    found = audit(model, [dict(batch)])
    assert (found.sites[0]["kind"], found.sites[0]["name"]) == ("mlp out", "encoder.layer.2.output.dense")
    assert {site["layer"] for site in found.sites if site["nonfinite"]} == {2}
    assert {name: figures["works"] for name, figures in found.whole.items()} == {
        "fp16": False, "bf16": True, "hybrid-fp16": True, "hybrid-bf16": True,
    }  # fmt: skip
    (amax,) = (s["amax"] for s in found.statistics if s["name"] == found.sites[0]["name"] and s["tensor"] == "out")
    assert 65504 < amax < 1e6
    assert found.repair["name"] == "hybrid-fp16"
    assert "encoder.layer.2.output.dense" in found.verdict
    # the last is the innermost module that mends it, and the code that it gives does so
    assert found.repairs[-1]["works"]
    assert found.repairs[-1]["how"] == (
        "ptune.precision.to_half(ptune.precision.keep_fp32(model, ['encoder.layer.2.output']), torch.float16)"
    )
    kept = eval(found.repairs[-1]["how"], {"ptune": ptune, "torch": torch, "model": model})
    torch.testing.assert_close(embed(kept, tokenizer, texts), whole, rtol=0, atol=0.02)


def overflowing(folder, batch):
    """The trained stories260K, where one neuron of an MLP is 16,384 times as large, and read so: the same model."""
    model, scale = AutoModelForCausalLM.from_pretrained(folder).eval(), 2.0**14
    mlp, seen = model.model.layers[2].mlp, []
    handle = mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().amax((0, 1))))
    model(**batch)
    handle.remove()
    neuron = int(seen[0].argmax())
    with torch.no_grad():
        mlp.up_proj.weight[neuron] *= scale
        mlp.down_proj.weight[:, neuron] /= scale
    return model


def test_a_generative_model_that_fails_in_float16(data_folder):
    folder = data_folder / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt"))
    batch.pop("token_type_ids", None)
    model = overflowing(folder, batch)

    def story(model):
        return model.generate(**batch, max_new_tokens=25, do_sample=False)[0].tolist()

    whole = story(model)
    assert whole == story(AutoModelForCausalLM.from_pretrained(folder))
    for dtype in (FP16, BF16):
        assert story(ptune.hybrid(model, attn_dtype=dtype)) == whole
    ptune.hybrid(model, attn_dtype=None)
    with loaded_in(model, FP16):
        assert story(model) != whole
        with torch.no_grad():
            assert not model(**batch).logits[0, -1].isfinite().any()

    found = audit(model, [batch])
    assert (found.sites[0]["layer"], found.sites[0]["name"]) == (2, "model.layers.2.mlp.down_proj")
    assert {site["layer"] for site in found.sites if site["nonfinite"]} == {2}
    assert not found.whole["fp16"]["works"]
    assert found.whole["hybrid-fp16"]["works"]
    assert found.whole["hybrid-bf16"]["works"]
    assert found.repair["name"] == "hybrid-fp16"
    # down_proj alone would still be handed what has overflowed before it
    tried = {t["name"]: t["works"] for t in found.repairs}
    assert tried["fp32 model.layers.2.mlp.down_proj"] is False
    assert tried["fp32 model.layers.2.mlp"] is True
    kept = eval(found.repairs[-1]["how"], {"ptune": ptune, "torch": torch, "model": model})
    assert story(kept) == whole


def running_sums(states, mask):
    """The mean of each text, from one running sum over the tokens of all: a batch without padding is pooled so."""
    tokens, lengths = states[mask.bool()], mask.sum(1)
    sums = torch.cat([tokens[:1] * 0, tokens.cumsum(0)])
    ends = lengths.cumsum(0)
    return (sums[ends] - sums[ends - lengths]) / lengths[:, None].to(states.dtype)


class Embedder(torch.nn.Module):
    """A model with its pooling inside."""

    class Pooling(torch.nn.Module):
        def forward(self, features):
            return features | {"sentence_embedding": running_sums(features["states"], features["mask"])}

    def __init__(self, model):
        super().__init__()
        self.body = model
        self.pooling = self.Pooling()

    def forward(self, **batch):
        features = {"states": self.body(**batch).last_hidden_state, "mask": batch["attention_mask"]}
        return self.pooling(features)


@pytest.mark.parametrize("inside", [False, True], ids=["function", "module"])
def test_a_pooling_that_fails(minilm, messages, inside):
    """A running sum in bfloat16 of a batch's tokens, beside which the rest of the model is exact enough."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModel.from_pretrained(minilm, num_hidden_layers=1).eval()
    texts = [text for text, _ in messages]
    batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt"))
    found = audit(Embedder(model), [batch], BF16) if inside else audit(model, [batch], BF16, pooling=running_sums)
    assert found.sites[0]["kind"] == "pooling"
    worst, second = (1 - site["cosine_min"] for site in found.sites[:2])
    assert worst > 20 * second
    assert not found.whole["bf16"]["works"]
    assert found.repair["name"] == "fp32 pooling"
    assert (
        found.repair["how"] == "ptune.precision.to_half(ptune.precision.keep_fp32(model, ['pooling']), torch.bfloat16)"
    ) == inside
    assert "pooling(states.float(), mask)" in found.repair["how"] or inside
    assert "fp32 pooling" in found.verdict


def test_the_model_is_as_before(base_of):
    model, batch = base_of("bert").stock(), inputs()
    model.train()
    model.encoder.layer[0].eval()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    training = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    found = audit(model, [batch], limits=Limits(cosine=1.0))  # nothing is that exact, so that repairs are tried
    assert found.repairs
    assert found == audit(copy.deepcopy(model).eval(), [batch], limits=Limits(cosine=1.0))  # without dropout
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(b is buffers[n] for n, b in model.named_buffers())
    assert [module.training for module in model.modules()] == training
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert model.config._attn_implementation == implementation
    assert not any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


def test_compiled_prompts(base_of):
    """Their keys and values are those of each way to run the model, and of the model itself afterwards."""
    model, batch = base_of("llama").tuned(tuning_mode="deep_ptune", pre_seq_len=3).eval(), inputs()
    limits = Limits(cosine=1.0)
    expected, exact = audit(model, [batch, batch], limits=limits), states(model, batch)
    model.compile_prompts()
    assert torch.equal(states(model, batch), exact)
    assert audit(model, [batch, batch], limits=limits) == expected
    assert torch.equal(states(model, batch), exact)
    assert model._hooks.prefix.keep_compiled


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_the_code_does_what_was_tried(base_of, name, dtype):
    model = t5() if name == "t5" else base_of(name).stock(AutoModelForCausalLM, attn_implementation="eager").eval()
    batch = inputs((40, 7))
    found = audit(model, [batch], dtype, limits=Limits(cosine=1.0, kl=0.0))
    tried = [figures for figures in [*found.whole.values(), *found.repairs] if "and pooling(" not in figures["how"]]
    assert len(tried) >= 6
    with torch.no_grad():
        reference = Outputs(model, None)(batch)
        for figures in tried:
            copied = eval(figures["how"], {"ptune": ptune, "torch": torch, "model": copy.deepcopy(model)})
            damage = Damage(found.compares)
            damage.add(reference, Outputs(copied, None)(batch))
            assert damage.figures().items() <= figures.items(), figures["how"]


@pytest.mark.parametrize(("count", "problem"), [(1, "regression"), (3, "multi_label_classification")])
def test_logits_of_yes_or_no(base_of, count, problem):
    """Of a reranker, whose softmax by itself would be 1 whatever it is, and of labels that may be true together."""
    kind, settings = transformers.AutoModelForSequenceClassification, {"num_labels": count, "problem_type": problem}
    model, batch = base_of("bert").stock(kind, **settings).eval(), inputs()
    with torch.no_grad():
        whole = model(**batch).logits
        with loaded_in(model, BF16):
            half = model(**batch).logits.float()
    p, q = whole.double().sigmoid(), half.double().sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert audit(model, [batch]).whole["bf16"]["kl_mean"] == pytest.approx(divergence.mean().item(), rel=1e-2, abs=1e-7)


class Stubborn(torch.nn.Module):
    """What it multiplies by stays in float32."""

    def __init__(self, model):
        super().__init__()
        self.body, self.matrix = model, torch.eye(24)

    def forward(self, **batch):
        return self.body(**batch).last_hidden_state[:, 0] @ self.matrix


def test_a_model_that_does_not_run_in_half_precision(base_of):
    found = audit(Stubborn(base_of("bert").stock().eval()), [inputs()])
    assert "dtype" in found.whole["fp16"]["refused"]
    assert found.whole["hybrid-fp16"]["works"]
    assert found.repair["name"] == "hybrid-fp16"
    assert found.verdict.startswith("fp16 fails: ")


def test_attention_off_the_interface(base_of):
    """BLOOM's: what has no attention function has its modules for places, and hybrid's refusal for an answer."""
    found = audit(base_of("bloom").stock().eval(), [inputs()])
    assert "refused" in found.whole["hybrid-fp16"]
    kinds = Counter(site["kind"] for site in found.sites)
    # its embeddings have a norm, and the states a mean
    assert kinds == {"projection": 6, "mlp in": 3, "mlp out": 3, "norm": 8, "residual": 3, "embedding": 1, "pooling": 1}
    assert {site["layer"] for site in found.sites} == {0, 1, 2, None}


def test_prompts_are_audited_with_the_model(base_of):
    model = base_of("bert").tuned(tuning_mode="deep_ptune", pre_seq_len=3).eval()
    batch = inputs()
    found = audit(model, [batch])
    assert found.rows == len(batch["input_ids"])
    assert {"query", "residual", "mlp out"} <= {site["kind"] for site in found.sites}
    assert found.whole["fp16"]["nonfinite"] == 0


def test_what_is_kept_in_float32_stays_whole(base_of):
    """Kept modules are no places, and the whole model in half is what it is with them kept."""
    model = keep_fp32(base_of("bert").stock().eval(), ["encoder.layer.1"])
    found = audit(model, [inputs()])
    assert {site["layer"] for site in found.sites} == {0, 2, None}
    alone = audit(base_of("bert").stock().eval(), [inputs()])
    assert {site["layer"] for site in alone.sites} == {0, 1, 2, None}


def test_report(base_of, tmp_path):
    found = audit(base_of("llama").stock(AutoModelForCausalLM).eval(), [inputs(), inputs()], limits=Limits(kl=0.0))
    data, picture = write_audit(found, tmp_path / "new")
    record = json.loads(data.read_text())
    assert record["sites"] == found.sites
    assert record["repairs"] == found.repairs
    assert record["rows"] == 2 * (7 + 3 + 9)
    assert record["verdict"] == found.verdict
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.json", "report.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"batches": []}, "batches: expected at least one"),
        (lambda a: a | {"batches": [[1, 2]]}, "batches: expected dicts of tensors, got list"),
        (lambda a: a | {"batches": [{"input_ids": [[1, 2]]}]}, "batches: expected .*, got list for input_ids"),
        (
            lambda a: a | {"batches": [inputs(), {"input_ids": torch.ones(0, 5)}]},
            r"batches: .*, got shape \(0, 5\) for input_ids",
        ),
        (
            lambda a: a | {"batches": [inputs((7, 0))]},
            "batches: .* with a token in each row, got a row of padding alone",
        ),
        (lambda a: a | {"dtype": torch.float32}, "dtype: expected torch.float16 or torch.bfloat16"),
        (lambda a: a | {"model": a["model"].half()}, "model: expected float32 weights, got torch.float16 in"),
        (lambda a: a | {"model": ptune.hybrid(a["model"], BF16)}, "model: expected attention in float32"),
        (lambda a: a | {"pooling": lambda states, mask: states}, r"pooling: expected embeddings of shape \[b, d\]"),
        (lambda a: a | {"model": Stubborn(a["model"]), "pooling": mean}, "pooling: expected None, as Stubborn returns"),
    ],
)
def test_refusals(base_of, change, message):
    arguments = change({"model": base_of("bert").stock().eval(), "batches": [inputs()], "pooling": None})
    with pytest.raises(ValueError, match=message):
        audit(**arguments)


def test_what_is_no_model_and_what_has_two_masks():
    with pytest.raises(ValueError, match="model: expected a transformers model, or a module around one, got Linear"):
        audit(torch.nn.Linear(2, 2), [{"input": torch.ones(2, 2)}])
    with pytest.raises(ValueError, match="model: expected a transformers model, or a module around one, got dict"):
        audit({}, [inputs()])
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=40, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(NotImplementedError, match="T5ForConditionalGeneration: an encoder-decoder"):
        audit(model, [inputs() | {"labels": inputs()["input_ids"]}])
    assert audit(model.get_encoder(), [inputs()]).compares == "embeddings"


def test_bare_models_are_loaded_by_their_class(tmp_path):
    t5().save_pretrained(tmp_path)
    assert type(load(tmp_path)) is transformers.T5EncoderModel


def test_heads_of_other_kinds_are_refused(base_of, tmp_path):
    base_of("bert").stock(transformers.AutoModelForQuestionAnswering).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"model: expected a head of .* got BertForQuestionAnswering"):
        load(tmp_path)


def test_nan_in_float32_is_refused(base_of):
    model = base_of("bert").stock().eval()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[3] = float("nan")
    with pytest.raises(ValueError, match="inf or NaN in float32 itself"):
        audit(model, [inputs()])
