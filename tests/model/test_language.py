"""Text of multimodal checkpoints: the language model alone is loaded, and is what the whole model has."""

import pytest
import torch
import transformers as hf
from safetensors import safe_open

import ptune
from ptune import AutoPTuneModelForCausalLM, AutoPTuneModelForSequenceClassification, PromptBank
from ptune.anatomy import find_body
from ptune.language import MULTIMODAL
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
    parts = {"text_config": text, "tie_word_embeddings": text.tie_word_embeddings}
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


@pytest.mark.parametrize("saved", ["gemma3"], indirect=True)
def test_the_command_line_takes_it_for_a_decoder(saved):
    assert _task_on(str(saved[1]), "generation") == "generation"


@pytest.mark.parametrize("saved", ["gemma3"], indirect=True)
def test_images_are_refused(saved):
    model = ptune.with_prompts(saved[0], ptune.PTuneConfig(**settings_for("shallow")))
    with pytest.raises(NotImplementedError, match="pixel_values: not supported, as prompts are put on language models"):
        model(input_ids=tokens(), pixel_values=torch.randn(3, 3, 28, 28))


def test_others_are_refused():
    with pytest.raises(NotImplementedError, match=r"multimodal model \(paligemma\) .* of gemma3, .* is taken"):
        ptune.with_prompts(whole_model("paligemma"), ptune.PTuneConfig(**settings_for("shallow")))
