"""A frozen encoder's blocks run on two servers of a local Ray cluster, one of which is killed while prompts train.

Run: ``python examples/remote_classification.py --model MODEL --data sms_spam.tsv``. The data: a line for each message,
label, tab, text. Prints the accuracy, and that of the same training with all blocks here.
"""

import argparse
import os
import random
import signal
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import AutoTokenizer

from ptune import AutoPTuneModelForSequenceClassification
from ptune.remote import AutoDistributedModelForSequenceClassification, serve_blocks
from ptune.train import HEAD_LEARNING_RATE, parameter_groups

LABELS = ("ham", "spam")
BATCH = 32


def read(data: str, count: int, held_out: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """So many training and other messages, with the numbers of their labels."""
    lines = [line.split("\t", 1) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    examples = [(text, LABELS.index(label)) for label, text in lines if label in LABELS]
    random.Random(0).shuffle(examples)
    return examples[:count], examples[count : count + held_out]


def train(
    model: Any, tokenizer: Any, train_on: list[tuple[str, int]], held_out: list[tuple[str, int]], at: dict[int, Any]
) -> float:
    """Accuracy on ``held_out`` after a pass over ``train_on``; before step i, ``at[i]()`` is called."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, HEAD_LEARNING_RATE), weight_decay=0.0)

    def encode(examples: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*examples, strict=True)
        batch = tokenizer(list(texts), truncation=True, max_length=64, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor(labels)}

    model.train()
    for i in range(0, len(train_on), BATCH):
        if i // BATCH in at:
            at[i // BATCH]()
        loss = model(**encode(train_on[i : i + BATCH])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for i in range(0, len(held_out), 100):
            batch = encode(held_out[i : i + 100])
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(held_out)


def main(base: str, data: str, steps: int = 40, held_out: int = 500) -> tuple[float, float]:
    """Accuracies with the blocks on servers and here."""
    train_on, others = read(data, steps * BATCH, held_out)
    servers = serve_blocks(model=base, servers=2, cpus=0.5)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def kill() -> None:
        os.kill(ray.get(servers.actors[1].status.remote())["pid"], signal.SIGKILL)

    accuracies = []
    for loader, where, at in (
        (AutoDistributedModelForSequenceClassification, {"servers": servers}, {steps // 2: kill}),
        (AutoPTuneModelForSequenceClassification, {}, {}),
    ):
        torch.manual_seed(0)
        model = loader.from_pretrained(
            base,
            num_labels=2,
            tuning_mode="deep_ptune",
            pre_seq_len=16,
            prompt_init="text",
            prompt_init_text=[text for text, _ in train_on],
            **where,
        )
        accuracies.append(train(model, tokenizer, train_on, others, at))
    servers.stop()
    return accuracies[0], accuracies[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    far, here = main(arguments.model, arguments.data, arguments.steps)
    print(f"accuracy {far:.1%} with its blocks on servers, {here:.1%} with all here")
