"""Trains and evaluates a model on a task: transformers' Trainer does the loop, this file sets it up."""

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalPrediction

from .checkpoint import PROMPT_MODULES, read_json, write_json
from .tasks import IGNORED, Task

EVALUATIONS = 5  # of a run, by default
HEAD_LEARNING_RATE = 1e-1  # a head starts from nothing: at the rate of prompts, which start from real states, it lags
_OPTIMIZER, _RATES, _RNG = "optimizer.safetensors", "optimizer.json", "rng_state.safetensors"
BEGAN_WITH = "began_with.json"  # in a checkpoint, beside the prompts of a task


class _ByLength(LengthGroupedSampler):
    """Batches of like length, in an order of the seed and the epoch alone: a resumed run sees what it would have."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class OneDevice(TrainingArguments):
    """On a machine of several GPUs Trainer would wrap the model in DataParallel, and multiply the batch."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are tensors and JSON: resuming unpickles nothing.

    Trainer writes its ``trainer_state.json`` last, so a checkpoint that has a whole one is complete.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self.optimizer.state_dict()
        tensors = {f"{index}.{key}": value for index, own in optimizer["state"].items() for key, value in own.items()}
        save_file(tensors, Path(output_dir, _OPTIMIZER))
        rest = {"param_groups": optimizer["param_groups"], "scheduler": self.lr_scheduler.state_dict()}
        Path(output_dir, _RATES).write_text(json.dumps(rest), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.state.global_step > self.args.max_steps:
            raise ValueError(f"steps: the run to resume has done {self.state.global_step}, got {self.args.max_steps}")
        self.state.compute_steps(self.args, self.args.max_steps)  # there may be more of them now
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(Path(checkpoint, _OPTIMIZER)).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        rest = read_json(Path(checkpoint, _RATES))
        began, now = (
            [its["initial_lr"] for its in groups] for groups in (rest["param_groups"], self.optimizer.param_groups)
        )
        if began != now:
            raise ValueError(f"learning_rate: the run to resume has {began}, got {now}")
        self.optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
        self.lr_scheduler.load_state_dict(rest["scheduler"])

    def _run_epoch(self, *places: Any, **where: Any) -> None:
        """Trainer does a step of an epoch before it looks at max_steps; a run resumed from its last must do none."""
        if self.state.global_step < self.args.max_steps:
            super()._run_epoch(*places, **where)

    def _save_rng_state(self, output_dir: str) -> None:
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        save_file(states, Path(output_dir, _RNG))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = load_file(Path(checkpoint, _RNG))
        torch.set_rng_state(states["cpu"])
        if torch.cuda.is_available() and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


class _Trainer(ResumableTrainer):
    began_with: dict[str, Any] | None = None
    labels_of_step: Any = None  # where a step has several parts
    by_label: Any = None  # gives the last evaluation's scores of each label

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.began_with is not None:
            write_json(Path(str(output_dir), BEGAN_WITH), self.began_with)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(features["input_ids"]) for features in data]
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _ByLength(size, lengths, self.args.seed)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Notes how many labels a step has, in all its parts."""
        parts, count = super().get_batch_samples(*args, **kwargs)
        self.labels_of_step = None if len(parts) < 2 else sum(_count(part["labels"]) for part in parts)
        return parts, count

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Among evaluations of one score, as where one label is all that is predicted yet, that of the least loss."""
        is_best, state = super()._determine_best_metric(metrics, trial), self.state
        # a step is noted where checkpoints are kept
        tied = metrics[f"eval_{self.args.metric_for_best_model}"] == state.best_metric and state.best_global_step
        if tied and not is_best:
            logged = [entry for entry in state.log_history if entry["step"] == state.best_global_step]
            if is_best := metrics["eval_loss"] < min(entry.get("eval_loss", math.inf) for entry in logged):
                state.best_global_step = state.global_step
        return is_best

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """A part counts by its labels: Trainer takes the mean of the parts' means, but for language models."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.labels_of_step is None or self.model_accepts_loss_kwargs or not model.training:
            return loss
        return loss * self.current_gradient_accumulation_steps * _count(inputs["labels"]) / self.labels_of_step

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """In the order of the data set, which scoring relies on (Trainer's own follows the training sampler)."""
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(
            data, self.args.eval_batch_size, sampler=SequentialSampler(data), collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


def _count(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


class _AtTheEnd(TrainerCallback):
    """Evaluates at the last step too: between two evaluations Trainer would save it without evaluating."""

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        control.should_evaluate |= state.global_step == state.max_steps


class _Reporter(TrainerCallback):
    """Says in a line what each evaluation found."""

    def __init__(self, task: Task, say: Callable[[str], None]):
        self.task, self.say = task, say

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **options: Any) -> None:
        self.say(line_of(self.task, state, metrics))


def line_of(task: Task, state: Any, metrics: dict[str, float]) -> str:
    """An evaluation, as it is told in passing."""
    scores = (f"{name.replace('_', ' ')} {metrics[f'eval_{name}']:.4f}" for name in ("loss", *task.metrics))
    return f"step {state.global_step} of {state.max_steps}: evaluation {', '.join(scores)}"


def _trainer(
    model: torch.nn.Module, task: Task, train: Sequence[Any], evaluation: Sequence[Any], quiet: bool, **arguments: Any
) -> _Trainer:
    pairs = [(task.encode(example), example) for example in evaluation]
    pairs.sort(key=lambda pair: len(pair[0]["input_ids"]))  # batches of one length pad nothing
    features = [feature for feature, _ in pairs]
    examples = [example for _, example in pairs]

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        trainer.by_label = lambda: task.score_by_label(examples, features, prediction.predictions)
        return task.score(examples, features, prediction.predictions)

    trainer = _Trainer(
        model,
        OneDevice(
            per_device_eval_batch_size=64,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=quiet,
            **arguments,
        ),
        data_collator=task.collate,
        train_dataset=[task.encode(example) for example in train],
        eval_dataset=features or None,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: task.reduce(
            logits[0] if isinstance(logits, tuple) else logits, labels
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def parameter_groups(model: PreTrainedModel, learning_rate: float, head_learning_rate: float) -> list[dict[str, Any]]:
    """What of `model` requires grad, for an optimizer; see `fit` for the rates."""
    return groups_of(model.named_parameters(), learning_rate, head_learning_rate)


def groups_of(
    named: Iterable[tuple[str, torch.nn.Parameter]], learning_rate: float, head_learning_rate: float
) -> list[dict[str, Any]]:
    """`parameter_groups` of parameters by their names."""
    prompts: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            # by their modules, within what PEFT may have wrapped around these
            (others if set(name.split(".")).isdisjoint(PROMPT_MODULES) else prompts).append(parameter)
    if not prompts:
        return [{"params": others, "lr": learning_rate}]
    return [{"params": prompts, "lr": learning_rate}, {"params": others, "lr": head_learning_rate}]


def fit(
    model: PreTrainedModel,
    task: Task,
    train: Sequence[Any],
    evaluation: Sequence[Any] = (),
    *,
    steps: int,
    learning_rate: float,
    head_learning_rate: float = HEAD_LEARNING_RATE,
    batch_size: int = 32,
    micro_batch_size: int | None = None,
    warmup: float = 0.1,
    evaluations: int = EVALUATIONS,
    seed: int = 0,
    checkpoints: Path | None = None,
    resume: Path | None = None,
    began_with: dict[str, Any] | None = None,
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, float]]:
    """Trains whatever of `model` requires grad.

    Args:
        train, evaluation: the task's examples; evaluation may be empty.
        steps: optimizer steps in all, each of `batch_size` examples.
        learning_rate: of the prompts, or of all that trains where there are none.
        head_learning_rate: of what trains beside prompts.
        micro_batch_size: how many examples of a batch run at once, where memory is short: a divisor; by default all.
        warmup: the share of steps in which the learning rates rise; they then fall linearly to 0.
        evaluations: how often at most to evaluate and save, the last time at the end, spread evenly over the steps.
        checkpoints: a folder for Trainer's checkpoints. With evaluation examples, `model` then ends with the best one's
            weights; else with the last.
        resume: the checkpoint in that folder to go on from.
        began_with: what a run that goes on must have too, which stands in each checkpoint.
        quiet: shows no progress bar.
        say: gets a line for each evaluation.
    Returns: Trainer's log: a dict per logged step, with `step` and `loss` or `eval_…`.
    Raises: ValueError if nothing in the model requires grad.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: nothing in it requires grad, so there is nothing to train: choose a tuning mode")
    micro_batch_size = micro_batch_size or batch_size
    every = math.ceil(steps / evaluations)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(
            model,
            task,
            train,
            evaluation,
            quiet,
            output_dir=str(checkpoints or scratch),
            max_steps=steps,
            warmup_steps=round(warmup * steps),
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=batch_size // micro_batch_size,
            eval_strategy="steps" if evaluation else "no",
            eval_steps=every,
            save_strategy="steps" if checkpoints else "no",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=bool(checkpoints and evaluation),
            metric_for_best_model=task.metrics[0],
            greater_is_better=task.greater_is_better,
            logging_steps=max(1, steps // 20),
            seed=seed,
        )
        groups = parameter_groups(model, learning_rate, head_learning_rate)
        trainer.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trainer.began_with = began_with
        if evaluation:
            trainer.add_callback(_AtTheEnd())
        if say is not None:
            trainer.add_callback(_Reporter(task, say))
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.state.log_history


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """After it, random numbers go on as if nothing had been in between: a Trainer seeds all generators."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def evaluate(model: torch.nn.Module, task: Task, examples: Sequence[Any]) -> dict[str, float]:
    """The task's metrics of `model` on `examples`, and `loss`."""
    return report(model, task, examples)[0]


def report(
    model: torch.nn.Module, task: Task, examples: Sequence[Any]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What `evaluate` says, and the scores of each label (see `Task.score_by_label`)."""
    with tempfile.TemporaryDirectory() as scratch, _random_state_kept():
        trainer = _trainer(model, task, [], examples, True, output_dir=scratch)
        scores = trainer.evaluate()
    return {name: scores[f"eval_{name}"] for name in ("loss", *task.metrics)}, trainer.by_label()
