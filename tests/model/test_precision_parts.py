"""What an audit is made of, beside plain hooks and counts by hand: places, their rounding, statistics and damage."""

import copy
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, FunnelConfig, FunnelModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptune.precision import Limits
from ptune.precision.damage import Damage, passes, severity
from ptune.precision.sites import attention_calls, find_sites
from ptune.precision.statistics import Tally

from .families import LAYERS
from .test_precision_audit import BF16, FP16, inputs, states, t5


def sites_of(model, batch):
    with torch.no_grad():
        return find_sites(model, lambda: model(**batch))


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


def test_places_of_lists_in_lists():
    """Funnel's blocks stand in several lists, which stand in one."""
    sizes = {"d_model": 24, "n_head": 4, "d_head": 6, "d_inner": 40, "block_sizes": [2, 1], "num_decoder_layers": 1}
    model = FunnelModel(FunnelConfig(vocab_size=61, **sizes)).eval()
    layers = [site.layer for site in sites_of(model, inputs()) if site.kind == "residual"]
    assert layers == [0, 1, 2, 0]  # the decoder has a list of its own


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

    def test_left_in_any_order(self, model):
        batch, other = inputs(), copy.deepcopy(model)
        calls = Counter()

        def listen(name, stock, *args, **kwargs):
            calls[name] += 1
            return stock(*args, **kwargs)

        one, two = (attention_calls(m, partial(listen, name)) for m, name in ((model, "one"), (other, "two")))
        exact = states(model, batch)
        with one:
            two.__enter__()
            assert torch.equal(states(model, batch), exact)
        assert torch.equal(states(other, batch), exact)
        assert torch.equal(states(model, batch), exact)
        assert calls == {"one": LAYERS, "two": LAYERS}
        two.__exit__(None, None, None)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

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
