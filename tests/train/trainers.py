"""transformers' and TRL's trainers on tiny models; as a program, what each of several processes runs.

``accelerate launch … trainers.py BERT LLAMA OUT`` trains every kind once, and writes its losses and what it trained.
"""

import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from ptune import AutoPTuneModelForCausalLM, AutoPTuneModelForSequenceClassification

KINDS = ("classifier", "language model", "sft")
SHALLOW = {"tuning_mode": "ptune", "pre_seq_len": 3}
DEEP = {"tuning_mode": "deep_ptune", "pre_seq_len": 3}
_WORDS = ["red", "blue", "one", "two", "three", "the", "a", "is", "was", "Ann", "Bob", "Rome", "Oslo", "in"]


def make_model(kind: str, folder: Path, **settings: Any) -> Any:
    """The same at every call, and without a head's dropout, which each process draws by itself."""
    set_seed(11)
    if kind == "classifier":
        return AutoPTuneModelForSequenceClassification.from_pretrained(folder, classifier_dropout=0.0, **settings)
    return AutoPTuneModelForCausalLM.from_pretrained(folder, **settings)


def texts(count: int, seed: int) -> list[str]:
    """Of unequal lengths; every other begins with "good", the rest with "bad"."""
    chooser = random.Random(seed)
    words = (chooser.choices(_WORDS, k=chooser.randint(2, 12)) for _ in range(count))
    return [" ".join([("good", "bad")[index % 2], *sentence]) for index, sentence in enumerate(words)]


def make_trainer(kind: str, model: Any, base: Path, out: Path, **options: Any) -> Trainer:
    """On 24 texts, with 10 to evaluate on; ``options`` are for the arguments, or the trainer's ``optimizers``."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    given = {name: options.pop(name) for name in ("optimizers", "callbacks") if name in options}
    defaults: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 10,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 3,
    }  # fmt: skip
    rows = {"train_dataset": texts(24, 0), "eval_dataset": texts(10, 1)}
    if kind == "sft":
        defaults |= {"bf16": False, "gradient_checkpointing": False, "max_length": 32}
        given |= {name: Dataset.from_dict({"text": sentences}) for name, sentences in rows.items()}
        return SFTTrainer(model, SFTConfig(**defaults | options), processing_class=tokenizer, **given)
    for name, sentences in rows.items():
        given[name] = [
            {"input_ids": ids, **({"labels": index % 2} if kind == "classifier" else {})}
            for index, ids in enumerate(tokenizer(sentences)["input_ids"])
        ]
    if kind == "language model":
        given["data_collator"] = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model, TrainingArguments(**defaults | options), processing_class=tokenizer, **given)


class Losses(TrainerCallback):
    """Each step's loss as it was logged."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def loss_curve(
    kind: str, base: Path, out: Path, prompts: dict[str, Any], **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step, and what was trained."""
    model, losses = make_model(kind, base, **prompts), Losses()
    make_trainer(kind, model, base, out, callbacks=[losses], **options).train()
    return losses.values, trained(model)


if __name__ == "__main__":
    bert, llama, out = map(Path, sys.argv[1:])
    for kind in KINDS:
        losses, tensors = loss_curve(
            kind, bert if kind == "classifier" else llama, out, DEEP, per_device_train_batch_size=4
        )
        assert torch.distributed.get_world_size() == 2
        if torch.distributed.get_rank() == 0:
            save_file(tensors | {"losses": torch.tensor(losses, dtype=torch.float64)}, out / f"{kind}.safetensors")
    torch.distributed.destroy_process_group()
