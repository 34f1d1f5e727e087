"""A shallow prompt teaches a language model the prose of Python's docstrings.

Run: ``python examples/generation.py --model MODEL --out prompts/prose``. MODEL: a decoder.
"""

import argparse
import math
import random
import tempfile
from typing import Any

from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from ptune import AutoPTuneModelForCausalLM
from ptune.corpora import topics


def main(base: str, out: str, steps: int = 100) -> tuple[float, float]:
    """Returns the perplexity on modules that training never saw: of the base alone, and of the prompt."""
    train, held_out = topics()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(examples: list[Any]) -> list[dict[str, Any]]:
        rows = tokenizer([example.text for example in examples], truncation=True, max_length=64)["input_ids"]
        return [{"input_ids": ids} for ids in rows]

    model = AutoPTuneModelForCausalLM.from_pretrained(
        base,
        tuning_mode="ptune",
        pre_seq_len=16,
        prompt_init="text",
        prompt_init_text=[example.text for example in train],
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch,
                max_steps=steps,
                per_device_train_batch_size=16,
                learning_rate=3e-2,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=encode(train),
            eval_dataset=encode(random.Random(0).sample(held_out, 300)),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        with model.disable_prompts():
            before = math.exp(trainer.evaluate()["eval_loss"])
        trainer.train()
        after = math.exp(trainer.evaluate()["eval_loss"])
    model.save_prompts(out)
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", default="prompts/prose")
    arguments = parser.parse_args()
    before, after = main(arguments.model, arguments.out)
    print(f"perplexity {before:.1f} without the prompt, {after:.1f} with it")
