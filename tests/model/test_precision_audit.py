"""The precision audit: each part against an oracle of plain hooks, then whole, on models made to fail in half types."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ptune
from ptune.precision import Limits, audit, keep_fp32
from ptune.precision.casts import loaded_in
from ptune.precision.damage import Damage, passes, severity
from ptune.precision.outputs import mean
from ptune.precision.report import write_audit
from ptune.precision.sites import attention_calls, find_sites
from ptune.precision.statistics import Tally

from .families import LAYERS, VOCABULARY

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


def sites_of(model, batch):
    with torch.no_grad():
        return find_sites(model, lambda: model(**batch))


def t5():
    torch.manual_seed(1)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config).eval()


# Places: what each family has in one block, and outside its blocks, counted by hand from its modules.
IN_ATTENTION = {"query": 1, "key": 1, "value": 1, "attention output": 1, "residual": 1}
PLACES = {
    "llama": ({"projection": 4, "mlp in": 2, "mlp out": 1, "norm": 2}, {"norm": 1, "embedding": 1}),
    "gemma3": ({"projection": 4, "mlp in": 2, "mlp out": 1, "norm": 6}, {"norm": 1, "embedding": 1}),
    "gpt2": ({"projection": 2, "mlp in": 1, "mlp out": 1, "norm": 2}, {"norm": 1, "embedding": 2}),
    "bert": (
        {"projection": 4, "mlp in": 1, "mlp out": 1, "norm": 2},
        {"norm": 1, "embedding": 3, "pooling": 1},
    ),
    "distilbert": ({"projection": 4, "mlp in": 1, "mlp out": 1, "norm": 2}, {"norm": 1, "embedding": 2}),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_are_found(base_of, name):
    sites = sites_of(base_of(name).stock().eval(), inputs())
    block, outside = PLACES[name]
    for layer in range(LAYERS):
        found = Counter(site.kind for site in sites if site.layer == layer)
        in_norms = 2 if name == "gemma3" else 0  # of queries and keys, in its attention
        assert found == IN_ATTENTION | block, layer
        assert sum(".attn" in s.name or "_attn." in s.name for s in sites if s.kind == "norm" and s.layer == layer) == (
            in_norms
        )
    assert Counter(site.kind for site in sites if site.layer is None) == outside


def test_places_of_t5():
    sites = sites_of(t5(), inputs())
    found = Counter(site.kind for site in sites if site.layer == 1)
    # on the interface, so its attention has the four tensors too; wi_0 and wi_1 read, wo writes
    assert found == IN_ATTENTION | {"projection": 4, "mlp in": 2, "mlp out": 1, "norm": 2}
    assert {site.name for site in sites if site.kind == "mlp out"} == {
        f"encoder.block.{layer}.layer.1.DenseReluDense.wo" for layer in range(2)
    }


def test_places_of_albert(base_of):
    """One block, called for each layer, with attention and MLP side by side in a list within it."""
    sites = sites_of(base_of("albert").stock().eval(), inputs())
    found = Counter(site.kind for site in sites if site.layer == 0)
    assert found == IN_ATTENTION | {"projection": 4, "mlp in": 1, "mlp out": 1, "norm": 2}


def test_the_head_is_a_place(base_of):
    sites = sites_of(base_of("llama").stock(AutoModelForCausalLM).eval(), inputs())
    assert [site.name for site in sites if site.kind == "head"] == ["lm_head"]


class TestRounding:
    """Each kind of place rounded alone, beside plain hooks on GPT-2, where no rotation follows the projection."""

    @pytest.fixture
    def model(self, base_of):
        return base_of("gpt2").stock().eval()

    @pytest.mark.parametrize("dtype", [FP16, BF16])
    @pytest.mark.parametrize("kind", ["query", "key", "value", "attention output", "residual", "norm", "mlp out"])
    def test_alone(self, model, kind, dtype):
        batch, block = inputs(), model.h[1]
        exact = states(model, batch)
        (site,) = [s for s in sites_of(model, batch) if s.kind == kind and s.layer == 1 and "ln_2" not in s.name]
        with site.rounded(model, dtype):
            got = states(model, batch)
        other = copy.deepcopy(model)
        block = other.h[1]

        def low(tensor):
            return tensor.to(dtype).float()

        def third(module, args, output):
            parts = list(output.chunk(3, dim=-1))
            index = ("query", "key", "value").index(kind)
            parts[index] = low(parts[index])
            return torch.cat(parts, -1)

        def alone(module):
            module.to(dtype)
            module.register_forward_pre_hook(lambda module, args: args[0].to(dtype))
            module.register_forward_hook(lambda module, args, output: output.float())

        if kind in ("query", "key", "value"):
            block.attn.c_attn.register_forward_hook(third)
        elif kind == "attention output":
            block.attn.c_proj.register_forward_pre_hook(lambda module, args: low(args[0]))
        elif kind == "residual":
            block.register_forward_hook(lambda module, args, output: low(output))
        else:
            alone(block.ln_1 if kind == "norm" else block.mlp.c_proj)
        assert torch.equal(got, states(other, batch))
        assert not torch.equal(got, exact)
        assert torch.equal(states(model, batch), exact)

    def test_of_one_model_alone(self, model, base_of):
        """Another model that runs meanwhile, by the same attention function, is not touched."""
        batch, bystander = inputs(), base_of("bert").stock().eval()
        exact, other = states(model, batch), states(bystander, batch)

        def nothing(stock, *args, **kwargs):
            output, *rest = stock(*args, **kwargs)
            return output * 0, *rest

        with attention_calls(model, nothing):
            assert torch.equal(states(bystander, batch), other)
            assert not torch.equal(states(model, batch), exact)
        assert torch.equal(states(model, batch), exact)

    def test_eager(self, base_of):
        batch = inputs()
        model = base_of("bert").stock(attn_implementation="eager").eval()
        exact = states(model, batch)
        (site,) = [s for s in sites_of(model, batch) if s.kind == "query" and s.layer == 2]
        with site.rounded(model, BF16):
            got = states(model, batch)
        model.encoder.layer[2].attention.self.query.register_forward_hook(lambda m, a, out: out.to(BF16).float())
        assert torch.equal(got, states(model, batch))
        assert not torch.equal(got, exact)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5"])
def test_half_is_what_from_pretrained_makes(base_of, tmp_path, name, dtype):
    if name == "t5":  # wo stays in float32 beside float16
        t5().save_pretrained(tmp_path)
        model, loaded = (transformers.T5EncoderModel.from_pretrained(tmp_path, **d) for d in ({}, {"dtype": dtype}))
    else:
        model, loaded = base_of(name).stock(), base_of(name).stock(dtype=dtype)
    model, loaded, batch = model.eval(), loaded.eval(), inputs()
    before = dict(model.named_parameters())
    with loaded_in(model, dtype):
        assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
        got = states(model, batch)
    assert torch.equal(got, states(loaded, batch))
    assert all(p is before[n] for n, p in model.named_parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_prompts_stay_in_float32(base_of):
    model = base_of("llama").tuned(tuning_mode="deep_ptune", pre_seq_len=3)
    with loaded_in(model, FP16):
        dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: FP16}


class TestKeepFp32:
    def test_borders(self, base_of):
        """One MLP in float32, in a half model: the composition written out."""
        model, batch = base_of("llama").stock(dtype=FP16).eval(), inputs()
        other = copy.deepcopy(model)
        mlp = copy.deepcopy(other.layers[1].mlp).float()
        other.layers[1].mlp.forward = lambda hidden: mlp(hidden.float()).half()
        assert keep_fp32(model, ["layers.1.mlp"]) is model
        assert torch.equal(states(model, batch), states(other, batch))
        assert states(model, batch).dtype == FP16

    @pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(BF16), lambda m: copy.deepcopy(m).half()])
    def test_casts_pass_them_by(self, base_of, cast):
        model = base_of("bert").stock().eval()
        names = ["encoder.layer.1.output", "embeddings.LayerNorm", "embeddings.word_embeddings"]
        before = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(tuple(names))}
        model = cast(keep_fp32(model, names))
        for name, parameter in model.named_parameters():
            kept = name in before
            assert (parameter.dtype == torch.float32) == kept, name
            assert not kept or torch.equal(parameter, before[name])
        assert states(model).dtype == model.encoder.layer[0].output.dense.weight.dtype

    def test_a_copy_runs_by_its_own_weights(self, base_of):
        model, batch = keep_fp32(base_of("bert").stock().eval(), ["encoder.layer.1.output"]).half(), inputs()
        copied = copy.deepcopy(model)
        exact = states(copied, batch)
        with torch.no_grad():
            model.encoder.layer[1].output.dense.weight.zero_()
        assert torch.equal(states(copied, batch), exact)
        assert not torch.equal(states(model, batch), exact)

    def test_a_tied_head(self, base_of):
        model, batch = base_of("qwen3").stock(AutoModelForCausalLM).eval(), inputs()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        whole = model.lm_head.weight.detach().clone()
        keep_fp32(model, ["lm_head"]).half()
        assert model.model.embed_tokens.weight.dtype == FP16
        assert torch.equal(model.lm_head.weight, whole)
        with torch.no_grad():
            logits = model(**batch).logits
            hidden = model.model(**batch).last_hidden_state
        assert torch.equal(logits, (hidden.float() @ whole.T).half())

    @pytest.mark.parametrize("names", [[], "layers.0", ["layers.7"], ["layers.0.mlp", "layers"]])
    def test_errors_come_first(self, base_of, names):
        model = base_of("llama").stock(dtype=FP16)
        with pytest.raises(ValueError, match="names: "):
            keep_fp32(model, names)
        assert {p.dtype for p in model.parameters()} == {FP16}
        assert not any("forward" in vars(module) for module in model.modules())

    def test_the_audit_leaves_them_whole(self, base_of):
        """Kept modules are no places, and the whole model in half is what it is with them kept."""
        model = keep_fp32(base_of("bert").stock().eval(), ["encoder.layer.1"])
        found = audit(model, [inputs()])
        assert {site["layer"] for site in found.sites} == {0, 2, None}
        alone = audit(base_of("bert").stock().eval(), [inputs()])
        assert {site["layer"] for site in alone.sites} == {0, 1, 2, None}


def test_statistics():
    tally = Tally()
    values = torch.ones(4, 5, 8)
    values[0, 0, 3] = -2000.0  # massive: beyond 100, and a thousand times the median
    values[1, 2, 3] = 1001.0
    values[1, 1, 4] = 900.0  # not a thousand times it
    values[2, 0, :2] = 65504 / 8 + 1  # and massive, too
    values[3, 0, :3] = torch.tensor([2.0**-25, 0.0, 2.0**-24])
    tally.add(values)
    tally.add(torch.full((2, 8), 3.0))
    assert tally.figures() == {
        "amax": 65504 / 8 + 1,
        "large": 2 / 176,
        "lost": 1 / 176,
        "massive": 4,
        "massive_channels": [3, 0, 1],
    }


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


class TestDamage:
    def test_of_embeddings(self):
        reference, got = (np.random.default_rng(seed).normal(size=(7, 5)) for seed in (0, 1))
        cosines = (reference * got).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(got, axis=1)
        damage = Damage("embeddings")
        for part in (slice(0, 3), slice(3, 7)):
            damage.add(torch.tensor(reference[part]), torch.tensor(got[part]))
        figures = damage.figures()
        assert figures["nonfinite"] == 0
        assert figures["cosine_min"] == pytest.approx(cosines.min(), abs=1e-6)
        assert figures["cosine_mean"] == pytest.approx(cosines.mean(), abs=1e-6)

    def test_of_logits(self):
        reference, got = (np.random.default_rng(seed).normal(size=(30, 4)) for seed in (2, 3))
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (reference, got))
        divergence = (p * np.log(p / q)).sum(1)
        damage = Damage("logits")
        damage.add(torch.tensor(reference), torch.tensor(got))
        figures = damage.figures()
        assert figures["kl_mean"] == pytest.approx(divergence.mean(), rel=1e-5)
        assert figures["kl_max"] == pytest.approx(divergence.max(), rel=1e-5)
        assert figures["same_top1"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())

    def test_inf_and_nan_are_the_worst(self):
        reference = torch.randn(4, 3)
        damages = {}
        for name, change in {
            "none": lambda x: x,
            "opposite": lambda x: -x,
            "one inf": lambda x: x.index_fill(0, torch.tensor([1]), float("inf")),
            "all NaN": lambda x: x * float("nan"),
        }.items():
            damage = Damage("embeddings")
            damage.add(reference, change(reference.clone()))
            damages[name] = damage.figures()
        assert sorted(damages, key=lambda name: severity(damages[name])) == ["none", "opposite", "one inf", "all NaN"]
        assert [name for name in damages if passes(damages[name], Limits())] == ["none"]


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
    assert found.repairs[-1]["how"] == "ptune.precision.keep_fp32(model, ['encoder.layer.2.output']).to(torch.float16)"
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
    assert (found.repair["how"] == "ptune.precision.keep_fp32(model, ['pooling']).to(torch.bfloat16)") == inside
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
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


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
        (lambda a: a | {"dtype": torch.float32}, "dtype: expected torch.float16 or torch.bfloat16"),
        (lambda a: a | {"model": a["model"].half()}, "model: expected float32 weights, got torch.float16 in"),
        (lambda a: a | {"model": ptune.hybrid(a["model"], BF16)}, "model: expected attention in float32"),
        (lambda a: a | {"pooling": lambda states, mask: states}, r"pooling: expected embeddings of shape \[b, d\]"),
    ],
)
def test_refusals(base_of, change, message):
    arguments = change({"model": base_of("bert").stock().eval(), "batches": [inputs()], "pooling": None})
    with pytest.raises(ValueError, match=message):
        audit(**arguments)


def test_nan_in_float32_is_refused(base_of):
    model = base_of("bert").stock().eval()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[3] = float("nan")
    with pytest.raises(ValueError, match="inf or NaN in float32 itself"):
        audit(model, [inputs()])
