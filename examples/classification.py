"""A deep prompt learns which area of Python's standard library a docstring is from.

Run: ``python examples/classification.py --model MODEL --out prompts/topics``. MODEL: a decoder or an encoder.
"""

import argparse
import random
import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from ptune import AutoPTuneModelForSequenceClassification
from ptune.corpora import topics
from ptune.train import HEAD_LEARNING_RATE, parameter_groups


def main(base: str, out: str, steps: int = 100) -> float:
    """Returns the accuracy on modules that training never saw."""
    train, held_out = topics()
    labels = sorted({example.label for example in train})
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(examples: list[Any]) -> list[dict[str, Any]]:
        texts = [example.text for example in examples]
        rows = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
        return [{"input_ids": ids, "labels": labels.index(e.label)} for ids, e in zip(rows, examples, strict=True)]

    model = AutoPTuneModelForSequenceClassification.from_pretrained(
        base,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        tuning_mode="deep_ptune",
        pre_seq_len=16,
        prompt_init="text",
        prompt_init_text=[example.text for example in train],
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch, max_steps=steps, per_device_train_batch_size=16, save_strategy="no", report_to="none"
            ),
            train_dataset=encode(train),
            eval_dataset=encode(random.Random(0).sample(held_out, 300)),
            processing_class=tokenizer,
            optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-2, HEAD_LEARNING_RATE), weight_decay=0.0), None),
            compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        )
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    model.save_prompts(out)
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", default="prompts/topics")
    arguments = parser.parse_args()
    print(f"accuracy {main(arguments.model, arguments.out):.1%}")
