"""The watch over a model that runs, beside plain hooks."""

import warnings
from collections import Counter

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptune.precision import watch

from .families import LAYERS
from .test_precision_audit import inputs, states


class TestWatch:
    def by_key(self, handle):
        return {(record["name"], record["tensor"]): record for record in handle.report()}

    def test_amax(self, base_of):
        """Over two calls, beside plain hooks."""
        model = base_of("gpt2").stock().eval()
        seen = {}

        def note(name):
            def hook(module, args, output):
                seen[name] = max(seen.get(name, 0.0), output.abs().max().item())

            return hook

        names = ["h.1", "h.0.mlp.c_proj", "h.2.ln_2"]
        handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
        split = []
        handles.append(model.h[1].attn.c_attn.register_forward_hook(lambda m, a, out: split.append(out.chunk(3, -1))))
        watching = watch(model, every=1)
        for _ in range(2):
            states(model)
        found = self.by_key(watching)
        for name in names:
            assert found[name, "output"]["amax"] == seen[name]
        for index, kind in enumerate(("query", "key", "value")):
            assert found["h.1.attn", kind]["amax"] == max(parts[index].abs().max().item() for parts in split)
        assert all(record["finite"] and record["share"] == record["amax"] / 65504 for record in found.values())
        for handle in handles:
            handle.remove()
        watching.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_modules_are_sampled_and_blocks_are_not(self, base_of):
        model = base_of("bert").stock().eval()
        watching = watch(model, every=3)
        calls = Counter()
        original = watching._note

        def note(module, what, values):
            calls[watching.calls, module in set(model.encoder.layer)] += 1
            original(module, what, values)

        watching._note = note
        for _ in range(7):
            states(model)
        watching.remove()
        assert {call: calls[call, True] for call in range(1, 8)} == dict.fromkeys(range(1, 8), LAYERS)
        assert [call for call in range(1, 8) if calls[call, False]] == [1, 4, 7]

    @pytest.mark.parametrize(("first", "named"), [(True, r"layers\.1\.mlp\.up_proj"), (False, r"layers\.1")])
    def test_warns_once_of_the_layer(self, base_of, first, named):
        """In a sampled call by the module; between two of these, by the block."""
        model, batch = base_of("llama").stock(dtype=torch.float16).eval(), inputs()
        watching = watch(model)
        if not first:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                states(model, batch)
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight.fill_(6e4)
        with pytest.warns(RuntimeWarning, match=rf"^{named}: inf or NaN in its output \(torch.float16\)"):
            states(model, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            states(model, batch)
        finite = {name: record["finite"] for (name, what), record in self.by_key(watching).items() if what == "output"}
        assert finite["layers.0"]
        assert not finite["layers.1"]
        watching.remove()

    def test_a_call_that_fails_leaves_nothing_open(self, base_of):
        model = base_of("llama").stock().eval()
        watching = watch(model, every=1)
        with pytest.raises(IndexError):
            states(model, {"input_ids": torch.tensor([[10**6]])})
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
        watching.remove()

    def test_two_on_one_model(self, base_of):
        model, batch = base_of("bert").stock().eval(), inputs()
        one, two = watch(model, every=1), watch(model, every=1)
        states(model, batch)
        assert one.report() == two.report()
        one.remove()
        states(model, batch)
        two.remove()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
        assert (one.calls, two.calls) == (1, 2)

    def test_in_training(self, base_of):
        """Gradients are as without it."""
        batch, base = inputs(), base_of("bert")
        gradients = []
        for watched in (False, True):
            model = base.stock().eval()
            if watched:
                watch(model, every=1)
            model(**batch).last_hidden_state.square().sum().backward()
            gradients.append(model.encoder.layer[0].output.dense.weight.grad)
        assert torch.equal(*gradients)

    def test_refusals(self, base_of):
        for wrong in (0, 1.5, "a"):
            with pytest.raises(ValueError, match=f"every: expected an integer of at least 1, got {wrong!r}"):
                watch(base_of("bert").stock(), every=wrong)
        with pytest.raises(ValueError, match="model: Linear has no list of blocks"):
            watch(torch.nn.Linear(2, 2))
