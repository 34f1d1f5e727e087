"""Prompts learn real tasks on real models: SMS spam and WNUT17 on MiniLM, stories on stories260K."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from ptune.data import Passage, read_labelled, read_tagged
from ptune.runs import LEARNING_RATES, new_model
from ptune.tasks import TASKS, Generation
from ptune.tokenizer import load_tokenizer
from ptune.train import evaluate, fit


def tuned_score(base, name, mode, train, test, *, steps, max_length=64, seed=0):
    kind = TASKS[name]
    task = kind(load_tokenizer(str(base), name), max_length, kind.label_names([*train, *test]))
    texts = [task.text_of(example) for example in train]
    set_seed(seed)
    model = new_model(name, str(base), task.labels, tuning_mode=mode, pre_seq_len=16, init_text=texts)
    fit(model, task, train, steps=steps, learning_rate=LEARNING_RATES[mode], seed=seed, quiet=True)
    return evaluate(model, task, test)


def test_deep_prompts_learn_sms_spam(minilm, data_folder):
    messages = list(dict.fromkeys(read_labelled(data_folder / "sms_spam" / "sms_spam.tsv")))
    random.Random(0).shuffle(messages)
    train, test = messages[:1200], messages[1200:1900]
    scores = tuned_score(minilm, "classification", "deep_ptune", train, test, steps=111)
    assert scores["accuracy"] >= 0.97


def test_prompts_tag_wnut17_better_than_a_head_alone(minilm, data_folder):
    train = random.Random(0).sample(read_tagged(data_folder / "wnut17" / "train.conll"), 800)
    test = random.Random(0).sample(read_tagged(data_folder / "wnut17" / "dev.conll"), 250)
    head, prompted = (
        tuned_score(minilm, "tagging", mode, train, test, steps=45, max_length=48)["entity_f1"]
        for mode in (None, "ptune")
    )
    assert prompted > head + 0.1


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_a_prompt_learns_stories_of_one_kind(data_folder, mode):
    base = str(data_folder / "stories260K")
    task = Generation(load_tokenizer(base, "generation"), 64)
    opening = "Once upon a time, there was a little cat named Tom. Tom was very sad because he lost his red ball."
    bare = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    told = task.predict(bare, [opening] * 128, do_sample=True, top_k=0, max_new_tokens=48)
    stories = [Passage("", story["completion"]) for story in told]
    train, held_out = stories[:96], stories[96:]
    before = evaluate(bare, task, held_out)["perplexity"]
    model = new_model("generation", base, tuning_mode=mode, pre_seq_len=8, init_text=[s.completion for s in train])
    fit(model, task, train, steps=60, learning_rate=LEARNING_RATES[mode], batch_size=16, quiet=True)
    after = evaluate(model, task, held_out)["perplexity"]
    assert after < 0.9 * before
    with model.disable_prompts():
        assert evaluate(model, task, held_out)["perplexity"] == pytest.approx(before, rel=1e-5)
