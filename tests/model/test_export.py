"""Prompts as embeddings: the bare base, fed with them, says what the tuned model does."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ptune
from ptune.export import export_prompt_embeds, prompt_embeds

from .common import COUNT, close, moved_by_a_bit, set_prompts, settings_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_base_goes_on_as_the_tuned_model(base_of, tmp_path, name, dtype):
    base = base_of(name)
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, dtype=dtype, **settings_for("shallow"))
    set_prompts(model, "shallow")
    export_prompt_embeds(model, tmp_path / "prompt.safetensors")
    rows = load_file(tmp_path / "prompt.safetensors")["prompt_embeds"]
    assert rows.shape == (COUNT, 24)
    assert rows.dtype == dtype
    stock = base.stock(transformers.AutoModelForCausalLM, dtype=dtype)
    ids = torch.randint(3, 61, (7,))
    embeds = prompt_embeds(rows, stock.get_input_embeddings(), ids)
    logits = stock(inputs_embeds=embeds[None]).logits[:, COUNT:]
    moved = moved_by_a_bit(model)
    close(logits, model(ids[None]).logits, torch.finfo(dtype).eps * 8, lambda: moved(ids[None]).logits)


def test_deep_prompts_and_batches_are_refused(base_of, tmp_path):
    model = base_of("llama").tuned(**settings_for("overwrite"))
    with pytest.raises(ValueError, match="tuning_mode: expected 'ptune', got 'deep_ptune'"):
        export_prompt_embeds(model, tmp_path / "prompt.safetensors")
    with pytest.raises(TypeError, match="model: expected one with prompts, got LlamaModel"):
        export_prompt_embeds(base_of("llama").stock(), tmp_path / "prompt.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"input_ids: expected \[n\]"):
        prompt_embeds(torch.zeros(2, 24), model.get_input_embeddings(), torch.zeros(1, 3, dtype=torch.long))
