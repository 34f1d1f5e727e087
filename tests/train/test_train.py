"""What an optimizer step does."""

import pytest
from transformers import set_seed

from ptune.data import Labelled
from ptune.runs import load_tokenizer, new_model
from ptune.tasks import Classification
from ptune.train import fit

EXAMPLES = [Labelled("good one two", "yes"), Labelled("bad red", "no")] * 4


@pytest.mark.parametrize("mode", [None, "ptune", "deep_ptune"])
def test_prompts_and_head_move_at_their_own_rates(tiny_bert, mode):
    task = Classification(load_tokenizer(str(tiny_bert), "classification"), 16, ["no", "yes"])
    texts = [example.text for example in EXAMPLES]
    set_seed(0)
    model = new_model("classification", str(tiny_bert), task.labels, tuning_mode=mode, pre_seq_len=3, init_text=texts)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    fit(model, task, EXAMPLES, steps=1, warmup=0, learning_rate=1e-3, head_learning_rate=1e-2, quiet=True)
    for name, old in before.items():
        # Adam's first step is as long as its rate wherever there is a gradient
        moved = (model.get_parameter(name) - old).abs().max().item()
        rate = 1e-2 if mode and "prompt" not in name else 1e-3
        assert moved == pytest.approx(rate, rel=1e-3), name
    assert any("prompt" in name for name in before) == (mode is not None)
