"""What is not supported is refused by name, with the reason, before anything changes."""

import numpy as np
import pytest
import torch
import transformers as hf

import ptune
from ptune.inputs import BEFORE_5_24
from ptune.pooling import pool

from .common import COUNT, settings_for

SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"tuning_mode": "prefix"}, "tuning_mode: expected one of None, 'ptune', 'deep_ptune', got 'prefix'"),
        ({"tuning_mode": "ptune", "pre_seq_len": 0}, "pre_seq_len: expected at least 1"),
        ({"tuning_mode": "ptune", "pre_seq_len": -3}, "pre_seq_len: expected at least 1"),
        ({"pre_seq_len": 4}, "pre_seq_len: expected 0 with tuning_mode=None"),
        ({"deep_prompt_mode": "replace"}, "deep_prompt_mode: expected one of 'overwrite', 'add'"),
        ({"prefix_sharing": 0}, "prefix_sharing: expected one of 'auto', True, False, got 0"),
        ({"prompt_init": "zeros"}, "prompt_init: expected one of 'random', 'vocab', 'text'"),
        ({"prompt_init": "text"}, "prompt_init_text: expected with prompt_init='text'"),
        ({"prompt_init": "vocab", "prompt_init_text": "a"}, "prompt_init_text: expected with prompt_init='text'"),
        ({"prompt_init_text": ""}, "prompt_init_text: expected a text or texts, got an empty one"),
        ({"prompt_init_text": []}, "prompt_init_text: expected a text or texts, got an empty one"),
    ],
)
def test_settings(values, error):
    with pytest.raises(ValueError, match=error):
        ptune.PTuneConfig(**values)
    with pytest.raises(TypeError, match=r"pre_seq_len: expected an int, got 4\.0"):
        ptune.PTuneConfig(tuning_mode="ptune", pre_seq_len=4.0)
    with pytest.raises(TypeError, match="base_dropout: expected a bool, got 'no'"):
        ptune.PTuneConfig(base_dropout="no")


@pytest.mark.parametrize("text", [5, torch.tensor(3), {"input_ids": [3, 4]}], ids=str)
def test_texts_to_start_from(text):
    with pytest.raises(TypeError, match="prompt_init_text: expected a string, its token ids, or a list of either, got"):
        ptune.PTuneConfig(tuning_mode="ptune", pre_seq_len=2, prompt_init_text=text)


@pytest.mark.parametrize("text", [[1.5], [1, "a"], [[3, 4], [5.0]], [[3, 4], 3], [3, 61]], ids=str)
def test_tokens_to_start_from(base_of, text):
    with pytest.raises(ValueError, match="prompt_init_text: expected token ids from 0 to 60, got"):
        base_of("gpt2").tuned(**settings_for("shallow", prompt_init_text=text))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            lambda: hf.LEDConfig(vocab_size=61, d_model=16, encoder_layers=2, decoder_layers=2, attention_window=4),
            "it is an encoder-decoder, and of these only t5, mt5,",
        ),
        (lambda: hf.ViTConfig(**SMALL), "multimodal"),
        (lambda: hf.FNetConfig(**SMALL), "FNetModel.forward takes no attention_mask"),
        (lambda: hf.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2), "no key-value cache"),
        (lambda: hf.XLNetConfig(vocab_size=61, d_model=16, n_layer=2, n_head=2, d_inner=16), "sequence before"),
        (lambda: hf.ConvBertConfig(**SMALL, embedding_size=16, head_ratio=1), "mixes neighbouring columns"),
        (lambda: hf.MobileBertConfig(**SMALL, embedding_size=16, intra_bottleneck_size=16), "mixes neighbouring"),
        (lambda: hf.NystromformerConfig(**SMALL), "approximates attention over all columns"),
        (lambda: hf.YosoConfig(**SMALL), "approximates attention over all columns"),
        (lambda: hf.MraConfig(**SMALL), "approximates attention over all columns"),
        (lambda: hf.RwkvConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2), "its state takes in padding"),
        (lambda: hf.BigBirdConfig(**SMALL), "cuts texts by column; load it with attention_type='original_full'"),
        (lambda: hf.IBertConfig(**SMALL), "scaling factors"),
        (lambda: hf.DPRConfig(**SMALL), "no states of its tokens"),
        (
            lambda: hf.Gemma3nTextConfig(
                **SMALL | {"intermediate_size": [16, 16]}, num_key_value_heads=1, head_dim=8, num_kv_shared_layers=0,
                hidden_size_per_layer_input=4, vocab_size_per_layer_input=61, laurel_rank=2, altup_num_inputs=2,
                layer_types=["full_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0],
            ),
            r"inputs are not \[b, n, d\]",
        ),
    ],
    ids=[
        "LED", "ViT", "FNet", "Mamba", "XLNet", "ConvBERT", "MobileBERT", "Nystromformer", "YOSO", "MRA", "RWKV",
        "BigBird", "I-BERT", "DPR", "Gemma 3n",
    ],
)  # fmt: skip
def test_bases(config, reason):
    with pytest.raises(NotImplementedError, match=reason):
        ptune.AutoPTuneModel.from_config(config(), **settings_for("shallow"))


def test_encoder_decoders_that_do_not_generate():
    config = hf.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    for loader in (ptune.AutoPTuneModelForSequenceClassification, ptune.AutoPTuneModelForQuestionAnswering):
        with pytest.raises(NotImplementedError, match="only the model that generates has been tried"):
            loader.from_config(config, **settings_for("shallow"))


def test_bases_quantised_by_other_means(base_of):
    base = base_of("llama")
    model = base.stock()
    model.is_quantized = True
    model.__class__ = ptune.models.ptune_class(type(model))
    with pytest.raises(
        NotImplementedError, match="PTuneLlamaModel: prompts are not supported, because it was quantised by other"
    ):
        model.adopt([])


@pytest.fixture(scope="module")
def model(base_of):
    return base_of("gpt2").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("overwrite"))


@pytest.mark.parametrize(
    ("inputs", "kind", "error"),
    [
        (
            {"input_ids": torch.ones(2, 0, dtype=torch.long)},
            ValueError,
            r"input_ids: expected \[b, n\] with at least one",
        ),
        (
            {"input_ids": torch.ones(0, 2, dtype=torch.long)},
            ValueError,
            r"input_ids: expected \[b, n\] with at least one",
        ),
        ({"input_ids": np.ones((2, 5), int)}, TypeError, r"input_ids: expected a tensor \[b, n\], got ndarray"),
        ({"inputs_embeds": torch.ones(2, 5)}, ValueError, r"inputs_embeds: expected \[b, n, d\]"),
        (
            {"input_ids": torch.ones(1, 2, dtype=torch.long), "position_ids": [[0, 1]]},
            TypeError,
            r"position_ids: expected a tensor \[b, n\], got list",
        ),
        *(
            (
                {"input_ids": torch.ones(3, 5, dtype=torch.long), name: torch.arange(shape[1]).expand(shape)},
                ValueError,
                rf"{name}: expected shape \(3, 5\), as the text has, got \({shape[0]}, {shape[1]}\)",
            )
            for name in ("position_ids", "token_type_ids")
            for shape in ((3, 4), (1, 9), (2, 5))
        ),
        ({}, ValueError, "exactly one of input_ids or inputs_embeds"),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 1, 5, 5)},
            NotImplementedError,
            r"attention_mask: expected \[b, n\], got shape \(2, 1, 5, 5\)",
        ),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": {"full_attention": None}},
            NotImplementedError,
            r"attention_mask: expected \[b, n\], got dict",
        ),
        (
            {"input_ids": torch.ones(1, 5, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
            NotImplementedError,
            "position_ids: packed batches",
        ),
        *(
            (
                {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(shape)},
                ValueError,
                rf"attention_mask: expected shape \(2, 5\), got \({shape[0]}, {shape[1]}\)",
            )
            for shape in ((1, 5), (2, 4), (2, 6))
        ),
        (
            {"input_ids": torch.ones(1, 5, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 3, 5])},
            NotImplementedError,
            "cu_seq_lens_q: packed batches",
        ),
        (
            {"input_ids": torch.ones(1, 61, dtype=torch.long)},
            ValueError,
            "input too long: 4 prompt rows and the text need 65 positions, but PTuneGPT2LMHeadModel has only 64",
        ),
    ],
    ids=[
        "no token",
        "no row",
        "array",
        "embeddings",
        "list of positions",
        *(f"{name}, {wrong}" for name in ("position_ids", "token_type_ids") for wrong in ("short", "long", "two rows")),
        "nothing",
        "4-D mask",
        "mask mapping",
        "packed",
        "one mask for all",
        "short mask",
        "long mask",
        "cu_seq_lens",
        "too long",
    ],
)
def test_inputs(model, inputs, kind, error):
    with pytest.raises(kind, match=error):
        model(**inputs)
    if "attention_mask" in inputs:
        with pytest.raises(kind, match=error):
            model(**inputs, labels=inputs["input_ids"])
    ids = torch.randint(3, 61, (1, 60))
    model(input_ids=ids)  # the longest that fits, and no state left over


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (hf.XLMConfig(vocab_size=61, emb_dim=16, n_layers=2, n_heads=2), "langs", torch.ones(2, 5, dtype=torch.long)),
        (hf.XLMConfig(vocab_size=61, emb_dim=16, n_layers=2, n_heads=2), "lengths", torch.tensor([5, 3])),
        (hf.LongformerConfig(**SMALL, attention_window=4), "global_attention_mask", torch.ones(2, 5)),
        (hf.LayoutLMConfig(**SMALL), "bbox", torch.ones(2, 5, 4, dtype=torch.long)),
    ],
    ids=["langs", "lengths", "global_attention_mask", "bbox"],
)
def test_what_describes_the_text_alone(config, name, value):
    model = ptune.AutoPTuneModel.from_config(config, **settings_for("shallow"))
    ids = torch.randint(3, 61, (2, 5))
    model(ids)
    with pytest.raises(NotImplementedError, match=f"{name}: not supported"):
        model(ids, **{name: value})


def test_what_is_for_the_loss_alone(base_of):
    """The head hands the loss's arguments to its body too, which ignores them."""
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))
    ids = torch.randint(3, 61, (2, 5))
    later = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, labels=ids, shift_labels=later).loss, model(ids, labels=ids).loss)


def test_bodies_that_pool_in_their_forward():
    with pytest.raises(NotImplementedError, match=r"Identity: .* because it pools in its forward"):
        pool(torch.nn.Identity(), torch.ones(2, 3))


def test_generating_past_the_learned_positions(model):
    with pytest.raises(ValueError, match="input too long: 4 prompt rows and the text need 65 positions"):
        model.generate(torch.randint(3, 61, (1, 58)), max_new_tokens=8, min_new_tokens=8, pad_token_id=0)


def test_learned_positions_of_roberta(base_of):
    """64 rows in the table, of which the first two are no positions."""
    model = base_of("roberta").tuned(**settings_for("shallow"))
    model(input_ids=torch.randint(3, 61, (1, 62 - COUNT)))
    with pytest.raises(ValueError, match="63 positions, but PTuneRobertaModel has only 62"):
        model(input_ids=torch.randint(3, 61, (1, 63 - COUNT)))


def test_a_static_cache_past_the_learned_positions(model):
    """Said before anything is generated; padding takes none."""
    ids, how = torch.randint(3, 61, (2, 58)), {"cache_implementation": "static", "pad_token_id": 0}
    with pytest.raises(ValueError, match=r"input too long: 4 prompt rows, the text and .* need 65 positions"):
        model.generate(ids, max_new_tokens=4, **how)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    new = {"max_new_tokens": 4, "min_new_tokens": 4}
    assert model.generate(ids, attention_mask=mask, **new, **how).shape == (2, 62)


def test_a_cache_of_another_name_is_refused(base_of, monkeypatch):
    """Were transformers to rename it again, prompts would be run with every token."""
    monkeypatch.setattr("ptune.support.CACHE", "memory")
    with pytest.raises(NotImplementedError, match=r"LlamaModel.forward keeps something else than memory"):
        base_of("llama").tuned(**settings_for("shallow"))


@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
def test_generating_in_training_with_checkpoints(base_of, mode):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for(mode)).eval()
    ids, how = torch.randint(3, 61, (2, 6)), {"max_new_tokens": 4, "pad_token_id": 0}
    expected = model.generate(ids, **how)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, **how), expected)
    model.train()
    if BEFORE_5_24:
        with pytest.raises(ValueError, match=r"generate: gradient checkpointing keeps no cache .* use_cache=False"):
            model.generate(ids, **how)
    else:
        assert torch.equal(model.generate(ids, **how), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **how), expected)


@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta"])
def test_padding_takes_no_learned_positions(base_of, name, mode):
    """Texts that a tokenizer has padded to the greatest length."""
    model = base_of(name).tuned(**settings_for(mode)).eval()
    ids = torch.randint(3, 61, (2, 8))
    for pad in ((0, 54), (54, 0)):
        full, mask = (torch.nn.functional.pad(tensor, pad) for tensor in (ids, torch.ones_like(ids)))
        output = model(full, attention_mask=mask).last_hidden_state[mask.bool()].view(2, 8, -1)
        torch.testing.assert_close(output, model(ids).last_hidden_state)
    full, mask = torch.randint(3, 61, (2, 62)), torch.ones(2, 62, dtype=torch.long)
    mask[0, 5:] = 0
    with pytest.raises(ValueError, match="input too long: 4 prompt rows and the text need 66 positions"):
        model(full, attention_mask=mask)


@pytest.mark.parametrize(
    "text", [[3, 99], [[3], []], [-1], ["a"]], ids=["unknown", "empty", "negative", "no tokenizer"]
)
def test_initial_texts(base_of, text):
    model = base_of("llama").tuned(**settings_for("shallow"))
    before = model.prompt_embeddings.weight.clone()
    with pytest.raises((ValueError, OSError)):
        model.init_prompts(ptune.PTuneConfig(**settings_for("overwrite", prompt_init_text=text)))
    assert torch.equal(model.prompt_embeddings.weight, before)
    assert model.intermediate_prompt_embeddings is None
    assert model.ptune_config.tuning_mode == "ptune"


def test_a_base_without_weights(base_of):
    """As accelerate's init_empty_weights makes one, and its FSDP all but one of several processes."""
    for settings in (settings_for("shallow"), settings_for("overwrite")):
        with torch.device("meta"), pytest.raises(ValueError, match=r"tuning_mode: .* got one on the meta device"):
            ptune.AutoPTuneModel.from_config(base_of("llama").family.config(), **settings)


@pytest.mark.parametrize("where", ["ptune.hooks.find_blocks", "ptune.plan._reach"])
def test_what_goes_wrong_midway_changes_nothing(base_of, monkeypatch, where):
    """The prompts that the model had are the very ones, as an optimizer may hold them."""
    model = base_of("llama").tuned(**settings_for("overwrite")).eval()
    model.compile_prompts()
    model.intermediate_prompt_embeddings.requires_grad_(False)
    ids = torch.randint(3, 61, (2, 5))
    expected = model(ids)[0]

    def described():
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        trains = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
        return trains, hooks, model.ptune_config, model.prefix_plan, model._hooks.prefix.keep_compiled

    def fail(*_):
        monkeypatch.undo()
        raise MemoryError

    before = described()
    monkeypatch.setattr(where, fail)
    with pytest.raises(MemoryError):
        model.init_prompts(ptune.PTuneConfig(**settings_for("add", count=COUNT + 1)))
    assert described() == before
    assert torch.equal(model(ids)[0], expected)


def test_heads_that_go_past_the_body(base_of):
    """A forward that never calls the body would bear no prompts, silently."""
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))
    body = model.model
    body.forward = type(body).forward.__get__(body)
    model.model.__class__ = type("Elusive", (type(body),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})
    with pytest.raises(NotImplementedError, match="its forward goes past the body"):
        model(torch.randint(3, 61, (1, 5)))


def test_auto_classes_are_not_made():
    with pytest.raises(TypeError, match="from_pretrained"):
        ptune.AutoPTuneModelForCausalLM()


def test_prompts_by_row_are_refused(base_of):
    """PEFT takes ``adapter_names=`` and gives every row the same prompt."""
    model = base_of("llama").tuned(**settings_for("shallow"))
    with pytest.raises(NotImplementedError, match="adapter_names: not supported"):
        model(torch.randint(3, 61, (2, 5)), adapter_names=["one", "two"])


def test_blocks_that_are_not_called():
    """SqueezeBERT's hand a dict on; what is compiled calls no hooks."""
    sizes = {"embedding_size": 24, "q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1}
    config = hf.SqueezeBertConfig(**SMALL | sizes | {"hidden_size": 24, "intermediate_groups": 1, "output_groups": 1})
    with pytest.raises(NotImplementedError, match="deep prompts need blocks whose hooks are called"):
        ptune.AutoPTuneModel.from_config(config, tuning_mode="deep_ptune", pre_seq_len=3)


def test_sharded_prompts_are_not_replaced(base_of, tmp_path):
    model = base_of("llama").tuned(**settings_for("shallow"))
    model.save_prompts(tmp_path)
    model.prompt_embeddings.weight.full_tensor = None  # as those have that FSDP2 has sharded
    for change in (lambda: model.load_prompts(tmp_path), lambda: model.init_prompts(ptune.PTuneConfig())):
        with pytest.raises(ValueError, match="prompts: expected a model that is not sharded yet"):
            change()


def test_replicas(base_of):
    """Those of nn.DataParallel, whose hooks would be the original's."""
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))
    replica = model._replicate_for_data_parallel()
    replica.model = model.model._replicate_for_data_parallel()
    with pytest.raises(NotImplementedError, match=r"expected no replicas of nn\.DataParallel"):
        replica(torch.ones(1, 3, dtype=torch.long))
