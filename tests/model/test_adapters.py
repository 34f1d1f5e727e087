"""Prompts and an adapter of PEFT on one base: which of the two saves what."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import ptune
from ptune.checkpoint import PROMPTS
from ptune.train import parameter_groups

from .common import set_prompts, settings_for, skip_without_peft_of_now


def test_adapters_are_not_dropped(base_of, tmp_path):
    """Neither folder would hold them: of its base, not even one that loads."""
    skip_without_peft_of_now()
    model = base_of("llama").tuned(**settings_for("overwrite"))
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2), "style")
    for save in (
        model.save_prompts,
        model.save_prefix,
        model.save_pretrained,
        lambda folder: model.save_pretrained(folder, save_base=True),
    ):
        with pytest.raises(ValueError, match=r"adapters: style would be lost, .* get_peft_model"):
            save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    model.delete_adapter("style")
    model.save_prompts(tmp_path / "folder")


def test_prompts_are_saved_beside_an_adapter_of_peft(base_of, tmp_path):
    """Which freezes them, and is saved by itself."""
    auto = ptune.AutoPTuneModelForSequenceClassification
    model = base_of("llama").tuned(auto, num_labels=3, **settings_for("overwrite"))
    both = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    for parameter in model.prompt_parameters():
        parameter.requires_grad_()
    ids = torch.randint(3, 61, (2, 5))
    both(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad.any() for parameter in model.prompt_parameters())
    with pytest.raises(ValueError, match="adapters: expected none yet, got default; prompts come first"):
        set_prompts(model, "overwrite")
    with torch.no_grad():
        for parameter in model.prompt_parameters():
            parameter.normal_(std=0.7)
    expected = both.eval()(input_ids=ids).logits
    both.save_pretrained(tmp_path / "adapter")
    model.save_prompts(tmp_path / "prompts")
    with pytest.raises(ValueError, match="adapters: default would be lost"):
        model.save_prefix(tmp_path / "prefix")  # whose keys and values are of the adapter
    again = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "prompts"), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", ["llama", "roberta"])  # a head of one layer, and of two
def test_an_adapter_of_peft_may_hold_prompts_and_head(base_of, tmp_path, name):
    """Those that its modules_to_save name are trained, cast and saved as without it."""
    auto = ptune.AutoPTuneModelForSequenceClassification
    model = base_of(name).tuned(auto, num_labels=3, **settings_for("overwrite"))
    own = [key.rpartition(".")[0] for key, parameter in model.named_parameters() if parameter.requires_grad]
    targets = ["q_proj"] if name == "llama" else ["query"]
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False, modules_to_save=own)
    if name == "llama":
        config.task_type = "SEQ_CLS"  # which adds the head by itself
    both = peft.get_peft_model(model, config)
    prompts, others = (group["params"] for group in parameter_groups(both, 1e-2, 1e-1))
    assert {id(p) for p in prompts} == {id(p) for p in model.prompt_parameters()}
    assert len(others) == sum(p.requires_grad for p in both.parameters()) - 2
    ids, labels = torch.randint(3, 61, (2, 5)), torch.tensor([0, 2])
    started = [parameter.detach().clone() for parameter in both.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD([parameter for parameter in both.parameters() if parameter.requires_grad], lr=0.1)
    both.train()(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    trained = [parameter for parameter in both.parameters() if parameter.requires_grad]
    assert all(not torch.equal(now, before) for now, before in zip(trained, started, strict=True))
    expected = both.eval()(input_ids=ids).logits
    both.save_pretrained(tmp_path / "adapter")
    again = base_of(name).tuned(auto, num_labels=3, **settings_for("overwrite"))
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids).logits, expected)  # as Trainer resumes
    own = [*PROMPTS, *model._head]
    values = [model.get_parameter(key).clone() for key in own]
    with both.disable_adapter():
        untrained = model(input_ids=ids).logits  # the base and the prompts from before
        with pytest.raises(
            ValueError, match="expected one that is active, as it holds prompts or head; got it disabled"
        ):
            model.save_prompts(tmp_path / "prompts")
        both.half().float()
    assert all(map(torch.equal, (model.get_parameter(key) for key in own), values))
    model.save_prompts(tmp_path / "prompts")
    prompts = auto.from_pretrained(tmp_path / "prompts")
    assert not torch.equal(prompts(input_ids=ids).logits, untrained)
    for key, value in load_file(tmp_path / "prompts" / "model.safetensors").items():
        assert torch.equal(value, model.get_parameter(key)), key
        assert model.get_parameter(key).requires_grad, key
    bank = ptune.PromptBank(base_of(name).stock())
    with pytest.raises(ValueError, match="adapters: default would be lost"):
        bank.add("lora", model)
    both.half()
    assert {p.dtype for p in (*model.prompt_parameters(), *map(model.get_parameter, model._head))} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.float16
