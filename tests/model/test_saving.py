"""Folders of prompts: what they hold, what loads them, and what they do not fit."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ptune
from ptune.checkpoint import CONFIG_NAME, WEIGHTS_NAME, MisfitError, read_config

from .common import COUNT, close, set_prompts, settings_for
from .families import FAMILIES, LAYERS

CLASSIFIER = ptune.AutoPTuneModelForSequenceClassification


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def edit(folder, change):
    config = json.loads((folder / CONFIG_NAME).read_text())
    change(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


@pytest.fixture(params=["shallow", "overwrite", "add", None])
def model(request, base_of):
    labels = {"id2label": {0: "ham", 1: "spam", 2: "?"}, "label2id": {"ham": 0, "spam": 1, "?": 2}}
    settings = {} if request.param is None else settings_for(request.param)
    model = base_of("bert").tuned(CLASSIFIER, **labels, **settings)
    if request.param is not None:
        set_prompts(model, request.param)
    return model


def test_round_trip(model, tmp_path, base_of):
    model.save_prompts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, "README.md"}
    loaded = CLASSIFIER.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.ptune_config == model.ptune_config
    assert loaded.config.id2label == {0: "ham", 1: "spam", 2: "?"}
    assert loaded.config.label2id == {"ham": 0, "spam": 1, "?": 2}
    assert same(state(loaded), state(model))
    assert not loaded.training
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, loaded)]
    assert trained[0] == trained[1]
    ids = torch.randint(3, 61, (2, 5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_the_folder_says(base_of, tmp_path):
    model = base_of("bert").tuned(CLASSIFIER, num_labels=2, **settings_for("overwrite"))
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config["base"]["name"] == str(base_of("bert").folder)
    assert (config["tuning_mode"], config["pre_seq_len"], config["deep_prompt_mode"]) == (
        "deep_ptune",
        COUNT,
        "overwrite",
    )
    assert (config["hidden_size"], config["num_layers"], config["model_class"]) == (
        24,
        LAYERS,
        "BertForSequenceClassification",
    )
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert tensors.keys() == {"prompt_embeddings.weight", "intermediate_prompt_embeddings.weight", *config["head"]}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_with_the_base_inside(model, tmp_path):
    (tmp_path / "first").mkdir()
    model.save_pretrained(tmp_path / "first", save_base=True)
    os.rename(tmp_path / "first", tmp_path / "moved")
    loaded = CLASSIFIER.from_pretrained(tmp_path / "moved")
    assert same(state(loaded), state(model))
    assert model.ptune_config == loaded.ptune_config
    assert model._keys_to_ignore_on_save
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "moved" / "base")
    assert stock.config.architectures == ["BertForSequenceClassification"]
    with model.disable_prompts():
        ids = torch.randint(3, 61, (2, 5))
        assert torch.equal(stock(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("given", "change"),
    [
        ({}, lambda model: setattr(model.config, "pad_token_id", 7)),
        ({"rms_norm_eps": 0.5}, lambda model: None),
        ({}, lambda model: model.resize_token_embeddings(70)),
    ],
    ids=["set later", "set on loading", "resized"],
)
def test_a_changed_base_inside(base_of, tmp_path, given, change):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **given, **settings_for("overwrite")).eval()
    change(model)
    model.save_pretrained(tmp_path, save_base=True)
    loaded = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path)
    assert same(state(loaded), state(model))
    assert (loaded.config.pad_token_id, loaded.config.rms_norm_eps) == (
        model.config.pad_token_id,
        model.config.rms_norm_eps,
    )
    ids = torch.randint(3, model.config.vocab_size, (2, 5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_prompts(tmp_path / "again")
    assert same(state(ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "again")), state(model))
    model.load_prompts(tmp_path)


def test_a_resized_vocabulary_is_not_dropped(base_of, tmp_path):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))
    model.resize_token_embeddings(70)
    for save in (model.save_prompts, model.save_prefix, model.save_pretrained):
        with pytest.raises(ValueError, match="vocab_size: expected 61, as it was loaded, got 70"):
            save(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["prompts", "prefix"])
def test_an_optimizer_goes_on_with_prompts_that_are_loaded(base_of, tmp_path, kind):
    auto = ptune.AutoPTuneModelForSequenceClassification
    model = base_of("llama").tuned(auto, **settings_for("overwrite"))
    model.save_prompts(tmp_path) if kind == "prompts" else model.save_prefix(tmp_path)
    ids = torch.randint(3, 61, (2, 5))
    set_prompts(model, "overwrite")
    model.load_prompts(tmp_path)
    expected = model(ids).logits
    held = {id(p): p for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in held.values():
            parameter.mul_(1.5)
    model.compile_prompts()
    assert not torch.equal(model(ids).logits, expected)
    model.load_prompts(tmp_path)
    assert {id(p) for p in model.parameters() if p.requires_grad} == held.keys()
    assert torch.equal(model(ids).logits, expected)
    optimizer = torch.optim.AdamW(held.values(), lr=0.1)
    model(ids, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert not torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
def test_prompts_go_on_to_another_task(base_of, tmp_path, mode):
    """Without their head, and whatever its labels are: the one that is here stays."""
    base, ids = base_of("llama"), torch.randint(3, 61, (2, 5))
    taught = base.tuned(ptune.AutoPTuneModelForSequenceClassification, num_labels=3, **settings_for(mode))
    set_prompts(taught, mode)
    taught.save_prompts(tmp_path)
    for loader, labels in (
        (ptune.AutoPTuneModelForSequenceClassification, 5),
        (ptune.AutoPTuneModelForTokenClassification, 3),
        (ptune.AutoPTuneModelForCausalLM, 2),
    ):
        model = loader.from_pretrained(base.folder, num_labels=labels)
        head = {name: model.get_parameter(name).clone() for name in model._head}
        with pytest.raises(MisfitError, match=r"load_prompts\(…, head=False\) takes the prompts alone"):
            model.load_prompts(tmp_path)
        model.load_prompts(tmp_path, head=False)
        assert model.ptune_config.pre_seq_len == COUNT
        assert all(torch.equal(model.get_parameter(name), value) for name, value in head.items())
        assert {n for n, p in model.named_parameters() if p.requires_grad and "prompt" not in n} == head.keys()
        close(model.base_model(ids).last_hidden_state, taught.base_model(ids).last_hidden_state)
    other = base_of("qwen3").tuned(ptune.AutoPTuneModelForCausalLM)
    with pytest.raises(MisfitError, match="model_type"):
        other.load_prompts(tmp_path, head=False)


def test_a_base_that_has_changed_is_said_to_be_lost(base_of, tmp_path, caplog):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))
    model.half().save_prompts(tmp_path / "half")
    assert not caplog.records
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.add_(0.1)
    for save in (model.save_prompts, model.save_pretrained, model.save_prefix):
        caplog.clear()
        save(tmp_path / "prompts")
        assert "weights have changed since it was loaded, and are not in this folder" in caplog.text
    caplog.clear()
    model.save_pretrained(tmp_path / "whole", save_base=True)
    assert not caplog.records


def test_a_base_that_trains_is_said_to_be_lost(base_of, tmp_path, caplog):
    model = base_of("roberta").tuned(ptune.AutoPTuneModelForSequenceClassification, **settings_for("overwrite"))
    model.save_prompts(tmp_path)
    assert not caplog.records
    for name, parameter in model.roberta.named_parameters():
        if name.endswith("output.dense.bias"):  # BitFit, in part
            parameter.requires_grad_()
    for save in (model.save_prompts, model.save_pretrained, model.save_prefix):
        caplog.clear()
        save(tmp_path)
        (said,) = (record.message for record in caplog.records)
        first = ("attention.output", "output", "attention.output")
        names = ", ".join(f"roberta.encoder.layer.{i // 2}.{its}.dense.bias" for i, its in enumerate(first))
        assert said.startswith(f"{tmp_path}: {names}, … train, but are of the base, and not in this folder")
    caplog.clear()
    model.save_pretrained(tmp_path / "whole", save_base=True)
    assert not caplog.records


def test_a_base_without_a_name(tmp_path):
    model = ptune.AutoPTuneModel.from_config(FAMILIES["llama"].config(), **settings_for("shallow"))
    model.save_prompts(tmp_path)
    with pytest.raises(ValueError, match="base_model: expected one"):
        ptune.AutoPTuneModel.from_pretrained(tmp_path)


def test_a_head_that_replaced_the_checkpoints(base_of, tmp_path, reports):
    trained = base_of("bert").stock(transformers.AutoModelForSequenceClassification, num_labels=2)
    trained.save_pretrained(tmp_path / "base")
    settings = settings_for("shallow", num_labels=3, ignore_mismatched_sizes=True)
    model = CLASSIFIER.from_pretrained(tmp_path / "base", **settings)
    assert model.classifier.weight.requires_grad
    model.save_prompts(tmp_path / "prompts")
    reports.clear()
    assert same(state(CLASSIFIER.from_pretrained(tmp_path / "prompts")), state(model))
    assert not reports


def test_a_head_from_the_folder_is_not_reported_as_new(base_of, tmp_path, reports):
    base = base_of("bert")
    base.tuned(CLASSIFIER, **settings_for("shallow")).save_prompts(tmp_path / "prompts")
    assert "classifier.weight" in reports.pop().getMessage()
    CLASSIFIER.from_pretrained(tmp_path / "prompts")
    assert not reports
    # but all else that is new is reported
    base.stock().save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS_NAME)
    del tensors["encoder.layer.0.output.dense.bias"]
    save_file(tensors, tmp_path / "base" / WEIGHTS_NAME, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacking or of other shapes: bert\.encoder\.layer\.0\.output\.dense\.bias$"):
        CLASSIFIER.from_pretrained(tmp_path / "prompts", base_model=tmp_path / "base")
    assert "encoder.layer.0.output.dense.bias" in reports.pop().getMessage()


def without(stock, folder, part):
    """A checkpoint that lacks all whose name holds ``part``."""
    stock.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS_NAME)
    kept = {name: its for name, its in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return folder


def test_tables_that_are_computed_may_be_lacking(tmp_path):
    """As in the hub's Pegasus. They are neither refused nor trained."""
    distilbert = transformers.DistilBertConfig(vocab_size=61, dim=32, n_heads=4, n_layers=2, sinusoidal_pos_embds=True)
    stock = transformers.DistilBertForMaskedLM(distilbert)
    folder = without(stock, tmp_path / "distilbert", "position_embeddings")
    model = CLASSIFIER.from_pretrained(folder, **settings_for("shallow"))
    assert not any("position" in name for name in model._head)
    names = ("distilbert.embeddings.position_embeddings.weight",) * 2
    assert torch.equal(*(its.get_parameter(name) for its, name in zip((stock, model), names, strict=True)))


@pytest.mark.parametrize("part", ["encoder.layers.1.", "decoder.layers.1.", "shared"])
def test_layers_that_are_lacking_are_not_a_head(tmp_path, part):
    config = transformers.BartConfig(
        vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64,
    )  # fmt: skip
    folder = without(transformers.BartForConditionalGeneration(config), tmp_path / "bart", part)
    with pytest.raises(ValueError, match=f"expected all weights of BartModel, .*model.{part}"):
        ptune.AutoPTuneModelForSeq2SeqLM.from_pretrained(folder, **settings_for("shallow"))


def test_what_kind_of_labels(base_of, tmp_path):
    kind = "multi_label_classification"
    model = base_of("bert").tuned(CLASSIFIER, num_labels=3, problem_type=kind, **settings_for("shallow"))
    model.save_prompts(tmp_path)
    loaded = CLASSIFIER.from_pretrained(tmp_path)
    assert loaded.config.problem_type == kind
    assert CLASSIFIER.from_pretrained(tmp_path, problem_type="regression").config.problem_type == "regression"
    ids, labels = torch.randint(3, 61, (2, 5)), torch.randint(2, (2, 3)).float()
    assert torch.equal(loaded(ids, labels=labels).loss, model.eval()(ids, labels=labels).loss)


def test_the_bases_dtype(base_of, tmp_path):
    model = base_of("bert").tuned(CLASSIFIER, dtype=torch.bfloat16, **settings_for("overwrite"))
    model.save_prompts(tmp_path)
    loaded = CLASSIFIER.from_pretrained(tmp_path)
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: p.dtype for name, p in model.named_parameters()
    }
    assert same(state(loaded), state(model))
    exact = CLASSIFIER.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}


def test_a_folder_of_before(base_of, tmp_path):
    """One that does not say the base's dtype, nor the kind of its labels."""
    model = base_of("bert").tuned(CLASSIFIER, **settings_for("overwrite"))
    model.save_prompts(tmp_path)
    edit(tmp_path, lambda c: (c.pop("problem_type"), c["base"].pop("dtype")))
    assert same(state(CLASSIFIER.from_pretrained(tmp_path)), state(model))


def test_base_elsewhere(base_of, tmp_path):
    base = base_of("llama")
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("add"))
    elsewhere = tmp_path / "elsewhere"
    base.stock(transformers.AutoModelForCausalLM).save_pretrained(elsewhere)
    model.save_prompts(tmp_path / "prompts")
    path = tmp_path / "prompts" / CONFIG_NAME
    path.write_text(path.read_text().replace(str(base.folder), str(tmp_path / "gone")))
    loaded = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "prompts", base_model=elsewhere)
    assert same(state(loaded), state(model))
    with pytest.raises(ValueError, match="base_model: expected with a folder of prompts"):
        ptune.AutoPTuneModelForCausalLM.from_pretrained(elsewhere, base_model=elsewhere)


def test_settings_of_a_folder_cannot_be_overruled(base_of, tmp_path):
    base_of("llama").tuned(**settings_for("overwrite")).save_prompts(tmp_path)
    assert ptune.AutoPTuneModel.from_pretrained(tmp_path, tuning_mode="deep_ptune").ptune_config.pre_seq_len == COUNT
    with pytest.raises(ValueError, match="pre_seq_len: this folder of prompts has 4, got 8"):
        ptune.AutoPTuneModel.from_pretrained(tmp_path, pre_seq_len=8)
    with pytest.raises(ValueError, match="prompt_init_text: this folder of prompts has None"):
        ptune.AutoPTuneModel.from_pretrained(tmp_path, prompt_init_text="begin here")


def test_the_bases_changed_settings_are_kept(base_of, tmp_path):
    model = base_of("modernbert").tuned(CLASSIFIER, classifier_pooling="mean", num_labels=2, **settings_for("shallow"))
    model.save_prompts(tmp_path)
    loaded = CLASSIFIER.from_pretrained(tmp_path)
    assert loaded.config.classifier_pooling == "mean"
    ids = torch.randint(3, 61, (2, 5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


OTHER_SETTINGS = "these prompts were trained with other settings of the base"


def test_changed_settings_are_said_of_a_base_without_them(base_of, tmp_path, caplog):
    base, load = base_of("llama"), ptune.AutoPTuneModelForCausalLM
    changed = base.tuned(load, rms_norm_eps=0.5, **settings_for("shallow"))
    changed.save_prompts(tmp_path / "prompts")
    stock = base.stock(transformers.AutoModelForCausalLM, rms_norm_eps=0.5)
    stock.save_pretrained(tmp_path / "baked in")
    load.from_pretrained(tmp_path / "prompts")
    baked = load.from_pretrained(tmp_path / "prompts", base_model=tmp_path / "baked in")
    other = base.tuned(load, **settings_for("overwrite"))
    baked.config.pad_token_id = 7  # set for a tokenizer
    for model in (baked, changed):
        model.load_prompts(tmp_path / "prompts")
    assert OTHER_SETTINGS not in caplog.text
    other.load_prompts(tmp_path / "prompts")
    baked.save_prompts(tmp_path / "of baked")
    load.from_pretrained(tmp_path / "of baked", rms_norm_eps=0.25)
    assert [record.message for record in caplog.records if OTHER_SETTINGS in record.message] == [
        f"{tmp_path / folder}: {OTHER_SETTINGS}: rms_norm_eps: 0.5 in the base of the prompts, {here} here"
        for folder, here in (("prompts", other.config.rms_norm_eps), ("of baked", 0.25))
    ]


def test_a_folder_cannot_slip_in_keywords(base_of, tmp_path, monkeypatch):
    base_of("llama").tuned(**settings_for("shallow")).save_prompts(tmp_path)
    edit(
        tmp_path,
        lambda c: c["base"]["overrides"].update(trust_remote_code=True, torch_dtype="float16", rms_norm_eps=0.5),
    )
    seen = []
    load = transformers.AutoModel.from_pretrained
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *a, **k: seen.append(k) or load(*a, **k))
    assert ptune.AutoPTuneModel.from_pretrained(tmp_path).config.rms_norm_eps == 0.5
    assert "trust_remote_code" not in seen[0]
    assert "torch_dtype" not in seen[0]


def test_the_base_is_found_from_another_directory(base_of, tmp_path, monkeypatch):
    folder = base_of("llama").folder
    monkeypatch.chdir(folder.parent)
    ptune.AutoPTuneModel.from_pretrained(folder.name, **settings_for("shallow")).save_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert ptune.AutoPTuneModel.from_pretrained(".").origin.name == str(folder)


def test_loading_into_a_model_takes_over_mode_and_length(base_of, tmp_path):
    saved = base_of("llama").tuned(**settings_for("overwrite"))
    saved.save_prompts(tmp_path)
    for present in ({}, settings_for("shallow", 7)):
        model = base_of("llama").tuned(**present)
        model.load_prompts(tmp_path)
        assert model.ptune_config == saved.ptune_config
        ids = torch.randint(3, 61, (2, 5))
        assert torch.equal(model(ids)[0], saved(ids)[0])


@pytest.mark.parametrize(
    ("other", "loader", "settings", "reason"),
    [
        ("qwen3", CLASSIFIER, {"num_labels": 3}, "model_type: 'llama' in the base of the prompts, 'qwen3' here"),
        ("llama", CLASSIFIER, {"num_labels": 2}, r"score.weight: expected \(2, 24\), got \(3, 24\)"),
        ("llama", CLASSIFIER, {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}, "labels: expected"),
        ("llama", ptune.AutoPTuneModelForCausalLM, {}, "head: trained on LlamaForSequenceClassification"),
        ("llama", CLASSIFIER, {"num_labels": 3, "num_hidden_layers": 2}, r"num_layers: expected 3.*got 2"),
    ],
    ids=["another base", "fewer labels", "other labels", "no head", "fewer layers"],
)
def test_a_misfit_says_why_and_changes_nothing(base_of, tmp_path, other, loader, settings, reason):
    base_of("llama").tuned(CLASSIFIER, num_labels=3, **settings_for("overwrite")).save_prompts(tmp_path)
    model = base_of(other).tuned(loader, **settings, **settings_for("shallow"))
    before, config, trained = (
        state(model),
        model.ptune_config,
        {n for n, p in model.named_parameters() if p.requires_grad},
    )
    with pytest.raises(MisfitError, match=reason) as raised:
        model.load_prompts(tmp_path)
    assert str(raised.value).count(" in the base of the prompts") <= 1  # of another model each setting is another
    assert same(state(model), before)
    assert model.ptune_config == config
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_a_head_for_sequences_is_none_for_tokens(base_of, tmp_path):
    """BERT's have the same names and shapes."""
    base_of("bert").tuned(CLASSIFIER, num_labels=3, **settings_for("overwrite")).save_prompts(tmp_path)
    with pytest.raises(MisfitError, match="head: trained on BertForSequenceClassification, got BertForTokenClass"):
        ptune.AutoPTuneModelForTokenClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c.update(format_version=2), "expected format_version 1, got 2"),
        (lambda c: c.update(pre_seq_len="4"), "pre_seq_len: expected"),
        (lambda c: c.pop("head"), "head: expected"),
        (lambda c: c.pop("tuning_mode"), "tuning_mode: expected"),
        (lambda c: c.pop("id2label"), "id2label: expected"),
        (lambda c: c["base"].pop("name"), "name: expected"),
        (lambda c: c.update(pre_seq_len=5), r"prompt_embeddings.weight: expected \(5, 24\), got \(4, 24\)"),
        (lambda c: c.update(tuning_mode="ptune"), r"intermediate_prompt_embeddings.weight: expected nothing"),
        (lambda c: c.update(tuning_mode="best"), f"{CONFIG_NAME}: tuning_mode: expected one of"),
        (lambda c: c.update(pre_seq_len=True), f"{CONFIG_NAME}: pre_seq_len: expected an int"),
        (lambda c: c.update(prompt_init="zeros"), f"{CONFIG_NAME}: prompt_init: expected one of"),
        (lambda c: c.update(problem_type="guess"), f"{CONFIG_NAME}: problem_type: expected one of"),
        (lambda c: c["base"].update(dtype="int8"), f"{CONFIG_NAME}: dtype: expected one of"),
        (lambda c: c.update(head=[3]), f"{CONFIG_NAME}: head: expected names"),
        (lambda c: c.update(id2label={"ham": 0}), f"{CONFIG_NAME}: id2label: expected labels"),
        (lambda c: c.update(id2label={"0": ["ham"]}), f"{CONFIG_NAME}: id2label: expected labels"),
    ],
)
def test_a_folder_that_was_tampered_with(base_of, tmp_path, change, error):
    model = base_of("llama").tuned(**settings_for("overwrite"))
    model.save_prompts(tmp_path)
    edit(tmp_path, change)
    before = state(model)
    with pytest.raises(ValueError, match=error):
        model.load_prompts(tmp_path)
    assert same(state(model), before)


def test_broken_files(base_of, tmp_path):
    model = base_of("llama").tuned(**settings_for("shallow"))
    model.save_prompts(tmp_path)
    weights = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(weights[:50])
    with pytest.raises(ValueError, match="not a safetensors file"):
        model.load_prompts(tmp_path)
    save_file({"prompt_embeddings.weight": torch.full((COUNT, 24), 2)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=rf"{WEIGHTS_NAME}: prompt_embeddings.weight: expected float32, got int64"):
        model.load_prompts(tmp_path)
    save_file({"prompt_embeddings.weight": torch.full((COUNT, 24), 2.0)}, tmp_path / WEIGHTS_NAME)
    for broken in (b"{", b'{"head": "\xff"}', b"[" * 100_000):
        (tmp_path / CONFIG_NAME).write_bytes(broken)
        with pytest.raises(ValueError, match=f"{CONFIG_NAME}: not JSON"):
            model.load_prompts(tmp_path)
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").touch()
    for folder, got in (
        (tmp_path, f"one without {CONFIG_NAME}"),
        (tmp_path / "none", "no such folder"),
        (tmp_path / "peft", "one of PEFT's: `ptune convert` makes it ours"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{folder}: expected a folder of prompts, got {got}"):
            model.load_prompts(folder)
    assert not (model.prompt_embeddings.weight == 2).any()


def test_a_model_is_not_written_over(base_of, tmp_path):
    base_of("llama").stock().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path, **settings_for("shallow"))
    for save in (
        model.save_prompts,
        model.save_pretrained,
        lambda folder: model.save_pretrained(folder, save_base=True),
        model.save_prefix,
    ):
        with pytest.raises(ValueError, match="expected a folder for prompts, got one of a model"):
            save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("label", [0.5, None])
def test_labels_that_nothing_could_read(base_of, tmp_path, label):
    model = base_of("bert").tuned(CLASSIFIER, num_labels=2, **settings_for("shallow"))
    model.config.id2label[1] = label
    with pytest.raises(ValueError, match="id2label: expected labels by their numbers"):
        model.save_prompts(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_labels_are_kept_where_the_base_has_a_head_for_as_many(base_of, tmp_path):
    base, prompts = tmp_path / "base", tmp_path / "prompts"
    base_of("bert").tuned(CLASSIFIER, num_labels=2).save_pretrained(prompts, save_base=True)
    (prompts / "base").rename(base)
    labels = {"id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}}
    model = CLASSIFIER.from_pretrained(base, **labels, **settings_for("shallow"))
    assert not any("classifier" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_prompts(prompts)
    loaded = CLASSIFIER.from_pretrained(prompts)
    assert loaded.config.id2label == {0: "ham", 1: "spam"}
    assert same(state(loaded), state(model))


def test_a_failed_save_leaves_the_old_files(base_of, tmp_path, monkeypatch):
    model = base_of("llama").tuned(**settings_for("shallow"))
    model.save_prompts(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    set_prompts(model, "shallow")

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("ptune.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_prompts(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_have_the_permissions_of_new_ones(base_of, tmp_path, monkeypatch):
    """Without a look at the process's mask of them, which can only be had by setting it for all threads."""
    mask = os.umask(0o027)
    monkeypatch.setattr(os, "umask", None)
    try:
        base_of("llama").tuned(**settings_for("shallow")).save_prompts(tmp_path / "prompts")
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "prompts").iterdir()}
    finally:
        monkeypatch.undo()
        os.umask(mask)
    assert modes == {0o640}


@pytest.mark.parametrize("change", [lambda t: t[:1], lambda t: t[..., :3]], ids=["heads", "width"])
def test_a_compiled_prefix_of_another_shape(base_of, tmp_path, change):
    model = base_of("llama").tuned(CLASSIFIER, num_labels=2, **settings_for("overwrite")).eval()
    model.save_prefix(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    tensors["compiled_prefix.value_1"] = change(tensors["compiled_prefix.value_1"]).contiguous()
    tensors["score.weight"] += 1
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    before = state(model)
    with pytest.raises(MisfitError, match=r"compiled_prefix.value_1: expected \(2, 4, 6\), got"):
        model.load_prompts(tmp_path)
    assert same(state(model), before)


def test_a_refused_prefix_leaves_what_trains_as_it_was(base_of, tmp_path):
    """The folder trained a head, and the model's own came with its base."""
    model = base_of("llama").tuned(CLASSIFIER, num_labels=2, **settings_for("overwrite")).eval()
    model.save_prefix(tmp_path / "prefix")
    tensors = load_file(tmp_path / "prefix" / WEIGHTS_NAME)
    tensors["compiled_prefix.key_0"] = tensors["compiled_prefix.key_0"][:1].contiguous()
    save_file(tensors, tmp_path / "prefix" / WEIGHTS_NAME)
    whole = base_of("llama").stock(transformers.AutoModelForSequenceClassification, num_labels=2)
    whole.save_pretrained(tmp_path / "whole")
    whole = CLASSIFIER.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16, **settings_for("overwrite"))

    def described():
        return {name: (p.dtype, p.requires_grad) for name, p in whole.named_parameters()}

    before, kinds = state(whole), described()
    with pytest.raises(MisfitError, match=r"compiled_prefix.key_0: expected"):
        whole.load_prompts(tmp_path / "prefix")
    assert described() == kinds
    assert same(state(whole), before)


OTHER_WEIGHTS = "were trained on a base like this one, but of other weights"


def test_the_same_weights_in_another_dtype(base_of, tmp_path, caplog):
    """As they come from a checkpoint, are cast, saved in between, or small for float16."""
    base, load = base_of("llama"), ptune.AutoPTuneModel.from_pretrained
    stock = base.stock()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter *= 10.0 ** torch.randint(-9, 2, parameter.shape)
    stock.save_pretrained(tmp_path / "base")
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        model = load(tmp_path / "base", dtype=dtype, **settings_for("shallow"))
        model.save_pretrained(tmp_path / "with base", save_base=True)
        load(tmp_path / "with base")
        for other in dtypes:
            load(tmp_path / "with base", dtype=other).to(dtype).load_prompts(tmp_path / "with base")
        bank = ptune.PromptBank(transformers.AutoModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))
        bank.add("a", tmp_path / "with base")
    assert OTHER_WEIGHTS not in caplog.text


@pytest.mark.parametrize(
    "part", ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight", "norm.weight"]
)
def test_other_weights_are_said(base_of, tmp_path, caplog, part):
    base, load = base_of("llama"), ptune.AutoPTuneModel.from_pretrained
    base.tuned(**settings_for("overwrite")).save_prompts(tmp_path / "prompts")
    stock = base.stock()
    stock.get_parameter(part).data *= 1.05
    stock.save_pretrained(tmp_path / "base")
    bank = ptune.PromptBank(stock)

    def said():
        caplog.clear()
        load(tmp_path / "prompts", base_model=tmp_path / "base")
        load(tmp_path / "base", dtype=torch.bfloat16).load_prompts(tmp_path / "prompts")
        bank.add(f"a{len(bank.names)}", tmp_path / "prompts")
        return [record.message for record in caplog.records if OTHER_WEIGHTS in record.message]

    assert said() == [f"{tmp_path / 'prompts'}: these prompts {OTHER_WEIGHTS}"] * 3
    edit(tmp_path / "prompts", lambda config: config["base"].pop("weights"))  # as folders were once
    assert said() == []
    edit(tmp_path / "prompts", lambda config: config["base"].update(weights=["0g"]))
    with pytest.raises(ValueError, match="weights: expected numbers of 16 bits in hexadecimal, got"):
        load(tmp_path / "prompts")
