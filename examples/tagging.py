"""A deep prompt learns which words of Python's reference manual are code.

Run: ``python examples/tagging.py --model MODEL --out prompts/code``. MODEL: a decoder or an encoder.
"""

import argparse
import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorForTokenClassification, Trainer, TrainingArguments

from ptune import AutoPTuneModelForTokenClassification
from ptune.corpora import code
from ptune.train import HEAD_LEARNING_RATE, parameter_groups

LABELS = ["O", "B-code", "I-code"]


def main(base: str, out: str, steps: int = 100) -> float:
    """Returns the F1 of code, word by word, on chapters that training never saw."""
    train, held_out = code()
    tokenizer = AutoTokenizer.from_pretrained(base, add_prefix_space=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(examples: list[Any]) -> list[dict[str, Any]]:
        rows = []
        for example in examples:
            encoded = tokenizer(list(example.words), is_split_into_words=True, truncation=True, max_length=64)
            words = encoded.word_ids()
            first = [i for i, word in enumerate(words) if word is not None and word not in words[:i]]
            tags = [-100] * len(words)  # a word is judged by its first token
            for i in first:
                tags[i] = LABELS.index(example.tags[words[i]])
            rows.append({"input_ids": encoded["input_ids"], "labels": tags})
        return rows

    model = AutoPTuneModelForTokenClassification.from_pretrained(
        base,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        tuning_mode="deep_ptune",
        pre_seq_len=16,
        prompt_init="text",
        prompt_init_text=[" ".join(example.words) for example in train],
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch, max_steps=steps, per_device_train_batch_size=16, save_strategy="no", report_to="none"
            ),
            train_dataset=encode(train),
            eval_dataset=encode(held_out),
            data_collator=DataCollatorForTokenClassification(tokenizer),
            optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-2, HEAD_LEARNING_RATE), weight_decay=0.0), None),
            compute_metrics=f1,
        )
        trainer.train()
        score = trainer.evaluate()["eval_f1"]
    model.save_prompts(out)
    return score


def f1(prediction: Any) -> dict[str, float]:
    gold, said = prediction.label_ids > 0, (prediction.predictions.argmax(-1) > 0) & (prediction.label_ids >= 0)
    return {"f1": 2 * (gold & said).sum() / max(1, gold.sum() + said.sum())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", default="prompts/code")
    arguments = parser.parse_args()
    print(f"F1 {main(arguments.model, arguments.out):.1%}")
