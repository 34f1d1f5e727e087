"""Text of multimodal checkpoints: the language model alone is loaded, and is what the whole model has."""

import json

import pytest
import torch
import transformers as hf
from safetensors import safe_open

import ptune
from ptune import AutoPTuneModelForCausalLM, AutoPTuneModelForSequenceClassification, PromptBank
from ptune.anatomy import find_body
from ptune.language import MULTIMODAL
from ptune.precision import audit
from ptune.precision.command import load
from ptune.runs import _task_on

from .common import COUNT, close, settings_for
from .families import VOCABULARY
from .test_plan import _EXPERTS, SIZES

_SIGHT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "num_heads": 2, "out_hidden_size": 32,
}  # fmt: skip
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_value_heads": 2,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_TEXT = {
    "gemma3": {"sliding_window": 5},
    "gemma4": {"hidden_size_per_layer_input": 0, "sliding_window": 5},
    "gemma4_unified": {"sliding_window": 5},
    "llama4": {"intermediate_size_mlp": 40, **_EXPERTS},
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16},
}


def whole_model(kind):
    """A tiny multimodal model of random weights."""
    config = hf.CONFIG_MAPPING[kind]()
    text = type(config.get_text_config())(**SIZES | _TEXT.get(kind, {}))
    # by which the whole goes, and not by the text's; Llama 4 never ties
    parts = {"text_config": text, "tie_word_embeddings": kind != "llama4" and not text.tie_word_embeddings}
    if getattr(config, "vision_config", None) is not None:
        parts["vision_config"] = type(config.vision_config)(**_SIGHT)
    torch.manual_seed(0)
    return hf.AutoModelForImageTextToText.from_config(type(config)(**parts)).eval()


@pytest.fixture
def saved(request, tmp_path):
    """A multimodal model, and its folder."""
    if request.param not in hf.CONFIG_MAPPING:
        pytest.skip(f"transformers {hf.__version__} has no {request.param}")
    folder = tmp_path / "whole"
    whole_model(request.param).save_pretrained(folder)
    return hf.AutoModelForImageTextToText.from_pretrained(folder), folder


def tokens():
    return torch.randint(3, VOCABULARY, (3, 7))


@pytest.mark.parametrize("saved", MULTIMODAL, indirect=True)
def test_text_is_what_the_whole_model_makes_of_it(saved, tmp_path, reports, caplog):
    whole, folder = saved
    model = AutoPTuneModelForCausalLM.from_pretrained(folder, **settings_for("shallow"))
    assert not reports  # of what was left in the checkpoint
    assert type(model).__name__.endswith("ForCausalLM")
    assert sum(its.requires_grad for its in model.parameters()) == 1
    ids = tokens()
    if (whole.config.model_type, hf.__version__) != ("llama4", "5.24.0"):  # which fails on text, and does not here
        with torch.no_grad(), model.disable_prompts():
            close(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    rows = model.prompt_embeddings.weight.detach()
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
        behind = find_body(whole.get_decoder())(inputs_embeds=torch.cat([rows.expand(3, -1, -1), text], 1))
        close(find_body(model)(input_ids=ids).last_hidden_state, behind.last_hidden_state[:, COUNT:])
    expected = model(input_ids=ids).logits
    model.save_prompts(tmp_path / "prompts")
    for again in (
        AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "prompts"),
        ptune.with_prompts(whole),
    ):
        again.load_prompts(tmp_path / "prompts")
        assert torch.equal(again(input_ids=ids).logits, expected)
        assert again.origin.name == str(folder)
        assert again.origin.overrides == {}
    assert not reports
    assert not [record for record in caplog.records if record.name.startswith("ptune")]  # of what differs
    bank = PromptBank(whole)
    bank.add("own", tmp_path / "prompts")
    close(torch.stack(bank(ids, prompt_names=["own"] * 3).logits), expected)


@pytest.mark.parametrize("saved", ["gemma3", "llava", "smolvlm", "qwen3_5"], indirect=True)
def test_a_saved_base_is_the_language_model(saved, tmp_path):
    model = AutoPTuneModelForCausalLM.from_pretrained(saved[1], **settings_for("shallow"))
    model.save_pretrained(tmp_path / "all", save_base=True)
    with safe_open(tmp_path / "all" / "base" / "model.safetensors", "pt") as file:
        assert not any("vision" in name for name in file.keys())  # noqa: SIM118 (no mapping)
    ids = tokens()
    again = AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "all")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("saved", ["gemma3", "mistral3"], indirect=True)
def test_a_classifier_of_a_multimodal_checkpoint(saved, reports):
    whole, folder = saved
    model = AutoPTuneModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, dtype="bfloat16", **settings_for("add")
    )
    (report,) = [record.getMessage() for record in reports]
    assert "score.weight" in report
    assert "vision" not in report
    assert model.config.num_labels == 3
    assert model.dtype == torch.bfloat16
    assert model._head == ["score.weight"]
    assert torch.equal(model.get_input_embeddings().weight, whole.get_input_embeddings().weight.bfloat16())
    whole.config.get_text_config().num_labels = 5
    model = AutoPTuneModelForSequenceClassification.from_pretrained(folder, config=whole.config, **settings_for("add"))
    assert model.config.num_labels == 5


@pytest.mark.parametrize("saved", ["llava"], indirect=True)
def test_what_the_whole_config_says(saved):
    """Labels and dtype: there, and not in that of the text."""
    folder = saved[1]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["dtype"] = "float32"
    path.write_text(json.dumps(config | {"dtype": "float16", "id2label": {"0": "no", "1": "yes", "2": "who knows"}}))
    model = AutoPTuneModelForSequenceClassification.from_pretrained(folder, **settings_for("shallow"))
    assert model.config.id2label == {0: "no", 1: "yes", 2: "who knows"}
    assert model.get_input_embeddings().weight.dtype == torch.float16
    given = hf.AutoConfig.from_pretrained(folder, num_labels=4)
    model = AutoPTuneModelForSequenceClassification.from_pretrained(folder, config=given, **settings_for("shallow"))
    assert model.score.weight.shape == (4, 32)


@pytest.mark.parametrize("saved", ["mistral3"], indirect=True)
def test_what_is_said_of_the_parts_of_a_whole_model(saved):
    whole, folder = saved
    how = {"attn_implementation": {"text_config": "eager", "vision_config": "sdpa"}}
    model = AutoPTuneModelForCausalLM.from_pretrained(folder, **how, **settings_for("shallow"))
    assert model.config._attn_implementation == "ptune_eager"
    model = AutoPTuneModelForCausalLM.from_config(whole.config, **settings_for("shallow"))
    assert model.base_class is hf.MistralForCausalLM


@pytest.mark.parametrize("saved", ["gemma3", "llama4"], indirect=True)
def test_a_model_in_memory_is_left_as_it_was(saved):
    whole = saved[0].train().requires_grad_(False)
    whole.get_output_embeddings().weight.requires_grad = True
    whole.generation_config.max_new_tokens = 3
    layers = find_body(whole.get_decoder()).layers
    layers[1].mlp = torch.nn.Identity()  # what was done to it is taken along
    layers[0].register_forward_hook(lambda module, args, output: output * 0.5)
    layers[1].gradient_checkpointing = True
    trains = [its.requires_grad for its in whole.parameters()]
    model = ptune.with_prompts(whole, ptune.PTuneConfig(**settings_for("shallow")))
    bank = PromptBank(whole)
    bank.add("own", model)
    assert find_body(model).layers[1].gradient_checkpointing
    assert [its.requires_grad for its in whole.parameters()] == trains
    assert all(module.training for module in whole.modules())
    assert model.generate(tokens()).shape[1] <= 10
    ids = tokens()
    with torch.no_grad(), model.disable_prompts():
        expected = whole.eval().get_output_embeddings()(find_body(whole.get_decoder())(input_ids=ids).last_hidden_state)
        close(model(input_ids=ids).logits, expected)
    close(bank(ids, prompt_names=["own"] * 3).logits[0], model(input_ids=ids).logits[0])


def test_a_model_in_memory_without_a_head():
    whole = hf.AutoModel.from_config(whole_model("gemma3").config).eval()
    model = ptune.with_prompts(whole, ptune.PTuneConfig(**settings_for("shallow")))
    ids = tokens()
    with torch.no_grad(), model.disable_prompts():
        close(model(input_ids=ids).last_hidden_state, whole(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("saved", ["gemma3"], indirect=True)
def test_what_quantisation_leaves_out_has_its_name_alone(saved):
    settings = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.language_model.layers.1"]}
    model = AutoPTuneModelForCausalLM.from_pretrained(
        saved[1], quantization_config=hf.BitsAndBytesConfig(**settings), **settings_for("shallow")
    )
    found = [type(layer.mlp.up_proj).__name__ for layer in find_body(model).layers]
    assert found == ["Linear4bit", "Linear", "Linear4bit"]
    path = saved[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(NotImplementedError, match="expected a multimodal checkpoint that is not quantised by torchao"):
        AutoPTuneModelForCausalLM.from_pretrained(saved[1], **settings_for("shallow"))


@pytest.mark.parametrize("saved", ["mistral3"], indirect=True)
def test_the_command_line_takes_it_for_a_decoder(saved):
    whole, folder = saved
    assert _task_on(str(folder), "generation") == "generation"
    ids = tokens()
    with torch.no_grad():
        close(load(str(folder))(input_ids=ids).logits, whole(input_ids=ids).logits)
        states = find_body(whole.get_decoder())(input_ids=ids).last_hidden_state
        close(load(str(folder), bare=True)(input_ids=ids).last_hidden_state, states)
    with pytest.raises(NotImplementedError, match="expected a model of text alone, got Mistral3ForCond"):
        audit(whole, [{"input_ids": ids}])


@pytest.mark.parametrize("saved", ["gemma3"], indirect=True)
def test_images_are_refused(saved):
    model = ptune.with_prompts(saved[0], ptune.PTuneConfig(**settings_for("shallow")))
    with pytest.raises(NotImplementedError, match="pixel_values: not supported, as prompts are put on language models"):
        model(input_ids=tokens(), pixel_values=torch.randn(3, 3, 28, 28))


def test_others_are_refused(tmp_path):
    model = whole_model("paligemma")
    why = r"multimodal model \(paligemma\) .*; the language model is taken of gemma3, "
    with pytest.raises(NotImplementedError, match=why):
        ptune.with_prompts(model, ptune.PTuneConfig(**settings_for("shallow")))
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=why):
        AutoPTuneModelForCausalLM.from_pretrained(tmp_path, **settings_for("shallow"))
    model = hf.Gemma3ForSequenceClassification(whole_model("gemma3").config)
    with pytest.raises(NotImplementedError, match=r"\(gemma3\) .*; AutoPTuneModelForCausalLM.from_pretrained and its"):
        ptune.with_prompts(model, ptune.PTuneConfig(**settings_for("shallow")))
