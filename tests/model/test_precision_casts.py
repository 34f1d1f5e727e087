"""Models in half precision, and modules of theirs in float32, beside compositions written out."""

import copy
import pickle
from functools import partial

import pytest
import torch
import transformers
from torch.utils._pytree import register_pytree_node
from transformers import AutoModelForCausalLM

from ptune.precision import audit, keep_fp32, to_half
from ptune.precision.casts import loaded_in

from .common import close
from .test_precision_audit import BF16, FP16, inputs, states, t5


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
    assert to_half(model, dtype) is model
    assert all(p is before[n] for n, p in model.named_parameters())
    assert {n: p.dtype for n, p in before.items()} == {n: p.dtype for n, p in loaded.named_parameters()}
    assert torch.equal(states(model, batch), got)


def test_half_is_one_of_two(base_of):
    model = base_of("llama").stock()
    with pytest.raises(ValueError, match=r"dtype: expected torch.float16 or torch.bfloat16, got torch.float32"):
        to_half(model, torch.float32)


def test_prompts_stay_in_float32(base_of):
    model = base_of("llama").tuned(tuning_mode="deep_ptune", pre_seq_len=3)
    with loaded_in(model, FP16):
        within = {p.requires_grad: p.dtype for p in model.parameters()}
    assert {p.requires_grad: p.dtype for p in to_half(model, FP16).parameters()} == within
    assert within == {True: torch.float32, False: FP16}


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
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        exact = states(model, batch)
        with torch.no_grad():
            model.encoder.layer[1].output.dense.weight.zero_()
        assert all(torch.equal(states(copied, batch), exact) for copied in copies)
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

    def test_blocks_that_look_at_the_dtype_of_weights(self, tmp_path):
        """T5's ``wo`` is in float32 by its class, and so are the states that come to the norms then."""
        t5().save_pretrained(tmp_path)
        model, other = (transformers.T5EncoderModel.from_pretrained(tmp_path, **d) for d in ({}, {"dtype": FP16}))
        norms = [name for name, _ in other.named_modules() if name.endswith("layer_norm")]
        for name in norms:
            whole = copy.deepcopy(model.get_submodule(name))
            other.get_submodule(name).forward = partial(lambda norm, hidden: norm(hidden.float()).half(), whole)
        batch = inputs()
        got = states(to_half(keep_fp32(model.eval(), norms), FP16), batch)
        assert torch.equal(got, states(other.eval(), batch))

    def test_one_within_another(self, base_of):
        """The border is around the outer one, whichever comes first."""
        batch, outcomes = inputs(), []
        inner, outer = ["layers.1.mlp.up_proj"], ["layers.1.mlp"]
        for calls in ([outer], [inner, outer], [outer, inner], [inner + outer], [outer, outer]):
            model = base_of("llama").stock().eval()
            for names in calls:
                keep_fp32(model, names)
            outcomes.append(states(model.half(), batch))
        assert all(torch.equal(states, outcomes[0]) for states in outcomes)

    @pytest.mark.parametrize("sharing", ["auto", False])
    def test_an_embedding_beside_prompts(self, base_of, sharing):
        """Prompt rows take the dtype in which text comes out of it."""
        model = base_of("gemma3").tuned(tuning_mode="deep_ptune", pre_seq_len=3, prefix_sharing=sharing).eval()
        batch = inputs()
        exact = states(model, batch)
        got = states(to_half(keep_fp32(model, ["embed_tokens"]), FP16), batch)
        assert (got.dtype, model.prefix_plan.path) == (FP16, "prefix" if sharing else "concat")
        assert model.embed_tokens.weight.dtype == torch.float32
        real = batch["attention_mask"].bool()
        assert (got[real] - exact[real]).norm() <= 0.02 * exact[real].norm()
        audit(base_of("gemma3").tuned(tuning_mode="deep_ptune", pre_seq_len=3, prefix_sharing=sharing), [batch])

    def test_autocast_has_no_say(self, base_of):
        model, seen = keep_fp32(base_of("llama").stock().eval(), ["layers.1.mlp"]), []
        whole = copy.deepcopy(base_of("llama").stock().layers[1].mlp)
        model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        with torch.autocast("cpu", BF16):
            states(model)
        ((hidden, output),) = seen
        with torch.no_grad():
            assert torch.equal(output, whole(hidden.float()))

    @pytest.mark.parametrize("names", [[], "layers.0", ["layers.7"], ["layers.0.mlp", "layers"]])
    def test_errors_come_first(self, base_of, names):
        model = base_of("llama").stock(dtype=FP16)
        with pytest.raises(ValueError, match="names: "):
            keep_fp32(model, names)
        assert {p.dtype for p in model.parameters()} == {FP16}
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_cache_is_filled_where_torch_export_knows_it(base_of):
    class Cache(transformers.DynamicCache):
        """As `register_dynamic_cache_export_support` makes that of all of the process."""

    def made_again(layers, _):
        cache = Cache()
        for depth, (key, value) in enumerate(layers):
            cache.update(key, value, depth)
        return cache

    register_pytree_node(Cache, lambda cache: ([(its.keys, its.values) for its in cache.layers], None), made_again)
    model, cache = base_of("llama").stock(AutoModelForCausalLM), Cache()
    keep_fp32(model, ["model.layers.0", "model.layers.1.self_attn"])
    ids = torch.randint(3, 61, (1, 6))
    expected = model(ids, use_cache=False).logits
    model(ids[:, :4], past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [4] * len(cache.layers)
    close(model(ids[:, 4:], past_key_values=cache).logits, expected[:, 4:])
