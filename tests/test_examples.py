"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, set_seed

from ptune import (
    AutoPTuneModelForCausalLM,
    AutoPTuneModelForSequenceClassification,
    AutoPTuneModelForTokenClassification,
)
from ptune.corpora import topics


@pytest.fixture(autouse=True)
def seeded():
    set_seed(0)


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_model_learns():
    before, after = example("own_model").main(pretrain_steps=100, tune_steps=50)
    assert after < before - 0.1


def test_classification_learns(minilm, tmp_path):
    labels = [each.label for each in topics()[1]]
    majority = max(map(labels.count, labels)) / len(labels)
    assert example("classification").main(str(minilm), str(tmp_path), steps=30) > majority + 0.1


def test_tagging_learns(minilm, tmp_path):
    assert example("tagging").main(str(minilm), str(tmp_path), steps=50) > 0.6


def test_three_prompts_answer_one_batch(data_folder, tmp_path):
    base = str(data_folder / "stories260K")
    example("classification").main(base, str(tmp_path / "topics"), steps=3)
    example("tagging").main(base, str(tmp_path / "code"), steps=3)
    before, after = example("generation").main(base, str(tmp_path / "prose"), steps=30)
    assert after < 0.7 * before

    mixed = example("mixed_batch")
    answers = mixed.main(base, str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = tokenizer(mixed.TEXT, return_tensors="pt")
    model = AutoPTuneModelForSequenceClassification.from_pretrained(tmp_path / "topics").eval()
    with torch.no_grad():
        assert answers["topics"] == model.config.id2label[model(**text).logits.argmax().item()]
    model = AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "prose").eval()
    start = tokenizer(mixed.TEXT[:24], return_tensors="pt")
    continued = model.generate(**start, max_new_tokens=24)[0]
    assert answers["prose"].endswith(tokenizer.decode(continued, skip_special_tokens=True))
    model = AutoPTuneModelForTokenClassification.from_pretrained(tmp_path / "code").eval()
    words = mixed.WORD.findall(mixed.TEXT)
    tokenizer = AutoTokenizer.from_pretrained(base, add_prefix_space=True)
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        tags = model(**encoded).logits[0].argmax(-1)
    of_words = encoded.word_ids()
    code = [word for i, word in enumerate(words) if tags[of_words.index(i)]]
    assert answers["code"] == (", ".join(code) or "(none)")
