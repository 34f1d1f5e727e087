"""A training run, from files to an output folder (see `ptune.folders`), which is written once training has begun."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from .anatomy import position_limit
from .auto import MODELS
from .checkpoint import check_free, fingerprint, is_prompt_folder, read_config, read_json, write_json
from .data import Columns, DataError, hold_out
from .folders import CHECKPOINTS, RECORD, remove_checkpoints, weights_in
from .language import config_of
from .loading import check_base_path
from .plan import Plan
from .support import ENCODER_DECODERS
from .tasks import TASKS, WRITING, Task
from .tokenizer import load_tokenizer
from .train import BEGAN_WITH, HEAD_LEARNING_RATE, fit

LEARNING_RATES = {None: HEAD_LEARNING_RATE, "ptune": 3e-2, "deep_ptune": 1e-2}
EPOCHS = 3
MIN_STEPS = 150
MIN_ROOM = 8  # tokens of text beside the prompt
_SHOWN = 20  # labels, the most frequent ones


@dataclass(frozen=True)
class Options:
    """What `ptune train` is told. None: `prepare` chooses."""

    model: str
    task: str
    data: Path
    out: Path
    eval_data: Path | None = None
    hold_out: float = 0.1
    columns: Columns = field(default_factory=Columns)
    tuning_mode: str | None = "deep_ptune"
    pre_seq_len: int = 16
    deep_prompt_mode: str = "overwrite"
    init_text: str | None = None
    init_from: Path | None = None  # a folder of prompts, in place of a text
    max_length: int = 128
    steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    head_learning_rate: float = HEAD_LEARNING_RATE
    dtype: str = "auto"
    seed: int = 0
    resume: Path | None = None  # the prompts of the checkpoint to go on from
    overwrite: bool = False


@dataclass(frozen=True)
class Run:
    """A model, a task and examples that fit each other, made by `prepare`."""

    options: Options
    model: Any  # with prompts and head
    task: Task
    train: Sequence[Any]
    evaluation: Sequence[Any]
    steps: int
    learning_rate: float
    prefix_plan: Plan

    @property
    def began_with(self) -> dict[str, Any]:
        """What a run that is resumed must have as it had."""
        return {
            "seed": self.options.seed,
            "batch_size": self.options.batch_size,
            "max_length": self.task.max_length,
            "dtype": self.options.dtype,
            "training examples": _digest(self.train),
            "evaluation examples": _digest(self.evaluation),
        }

    def fit(self, say: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Trains and writes the output folder. Returns the record that stands in its `train.json`.

        `say` gets a line for each evaluation, in place of a progress bar.
        """
        options = self.options
        checkpoints = options.out / CHECKPOINTS
        if not options.resume:
            remove_checkpoints(checkpoints)
        log = fit(
            self.model,
            self.task,
            self.train,
            self.evaluation,
            steps=self.steps,
            learning_rate=self.learning_rate,
            head_learning_rate=options.head_learning_rate,
            batch_size=options.batch_size,
            micro_batch_size=options.micro_batch_size,
            seed=options.seed,
            checkpoints=checkpoints,
            resume=options.resume,
            began_with=self.began_with,
            quiet=say is not None,
            say=say,
        )
        self.model.save_pretrained(options.out)
        record = self.write_record(log)
        remove_checkpoints(checkpoints)
        return record

    def write_record(self, log: Sequence[dict[str, float]]) -> dict[str, Any]:
        """Write the `train.json` that makes a folder of prompts one of a finished run, and return it."""
        options, best = self.options, self.best(log)
        record = {
            "task": self.task.name,
            "max_length": self.task.max_length,
            "steps": self.steps,
            "batch_size": options.batch_size,
            "learning_rate": self.learning_rate,
            "head_learning_rate": options.head_learning_rate,
            "seed": options.seed,
            "kept_step": best["step"],
            "weights": weights_in(options.out),
            "prefix_sharing": f"{'yes' if self.prefix_plan.path == 'prefix' else 'no'}: {self.prefix_plan.reason}",
            "metrics": {name: best[f"eval_{name}"] for name in ("loss", *self.task.metrics)},
            "log": log,
        }
        write_json(options.out / RECORD, record)
        return record

    def best(self, log: Sequence[dict[str, float]]) -> dict[str, float]:
        """The log's best evaluation, by loss where scores are equal, whose weights are the ones kept.

        None that is NaN, or the last where all are.
        """
        score, sign = f"eval_{self.task.metrics[0]}", -1 if self.task.greater_is_better else 1
        evaluations = [entry for entry in log if score in entry]
        numbers = [entry for entry in evaluations if not math.isnan(entry[score])]
        return min(numbers or evaluations[-1:], key=lambda entry: (sign * entry[score], entry["eval_loss"]))


def prepare(options: Options, say: Callable[[str], None]) -> Run:
    """Reads the data, loads the model, checks that all of it fits, and writes nothing.

    `say` gets a line for each choice that was made for the user. Raises: ValueError (DataError for a file) or OSError.
    """
    _check(options)
    options = replace(options, task=_task_on(options.model, options.task))
    kind = TASKS[options.task]
    train = kind.read(options.data, options.columns)
    labels = _order_of_the_base(options.model, kind.label_names(train))
    if len(labels) == 1:  # there are none in generation
        raise DataError(options.data, None, f"expected at least two labels, got {labels[0]}")
    if options.eval_data:
        evaluation = kind.read(options.eval_data, options.columns)
        check_labels(kind, evaluation, labels, options.eval_data)
    else:
        train, evaluation = hold_out(train, options.hold_out, kind.stratum, options.seed)
        say(f"No --eval-data: {len(evaluation)} of {len(train) + len(evaluation)} examples are held out for it.")

    tokenizer = load_tokenizer(options.model, options.task)
    set_seed(options.seed)  # the head and random prompts are drawn in loading
    model = new_model(
        options.task,
        options.model,
        labels,
        tuning_mode=options.tuning_mode,
        pre_seq_len=options.pre_seq_len,
        init_text=[kind.text_of(example) for example in train] if options.init_text is None else options.init_text,
        deep_prompt_mode=options.deep_prompt_mode,
        dtype=options.dtype,
    )
    if options.init_from:
        model.load_prompts(options.init_from, head=False)
    if options.resume:
        _check_same(read_config(options.resume), model, labels)
    task = kind(tokenizer, _room(model, tokenizer, options), labels)
    steps = options.steps or max(MIN_STEPS, EPOCHS * math.ceil(len(train) / options.batch_size))
    rate = options.learning_rate or LEARNING_RATES[options.tuning_mode]
    trained = model.num_trainable_parameters()
    if labels:
        _say_labels(kind, train, say)
    if labels and not model._head:
        say(f"The base's own head for {len(labels)} labels is kept as it is.")
    say(f"{trained:,} parameters train: {steps} steps of {options.batch_size}, learning rate {rate:g}.")
    encoded = _encoded(task, train, options.data)
    _encoded(task, evaluation, options.eval_data or options.data)
    cut = sum(task.max_length in (len(its["input_ids"]), len(its["labels"])) for its in encoded)
    if cut:
        why = "--max-length" if task.max_length == options.max_length else "--pre-seq-len leaves no room for more"
        say(f"{cut} of {len(train)} training examples reach {task.max_length} tokens and may be cut ({why}).")
    run = Run(options, model, task, train, evaluation, steps, rate, model.prefix_plan)
    if options.resume:
        _check_began(options.resume, run.began_with)
    return run


def _say_labels(kind: type[Task], examples: Sequence[Any], say: Callable[[str], None]) -> None:
    """Say how often each label stands, and which may be one that is written in two ways."""
    counts = Counter(label for example in examples for label in kind.labels_of(example)).most_common()
    rest = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    shown = ", ".join(f"{label} {count}" for label, count in counts[:_SHOWN])
    say(f"{len(examples)} training examples: {shown}{rest}.")
    of_one = Counter(label.casefold() for label, _ in counts)
    if alike := [label for label, _ in counts if of_one[label.casefold()] > 1]:
        say(f"These labels differ in case alone, and are taken for different ones: {', '.join(alike)}.")


def _check_began(checkpoint: Path, now: dict[str, Any]) -> None:
    """Raises ValueError unless the run to resume began with the same."""
    path = checkpoint / BEGAN_WITH
    for name, value in (read_json(path) if path.exists() else {}).items():  # there is none in older checkpoints
        if value != now[name]:
            raise ValueError(f"{name}: the run to resume has {value}, got {now[name]}")


def _digest(examples: Sequence[Any]) -> str:
    return f"{len(examples)} ({hashlib.sha256(repr(examples).encode()).hexdigest()[:16]})"


def _order_of_the_base(base: str, labels: list[str]) -> list[str]:
    """The labels in the order of a head that the base may have for them."""
    own = AutoConfig.from_pretrained(base).id2label
    ordered = [str(own[index]) for index in sorted(own)]
    return ordered if sorted(ordered) == sorted(labels) else labels


def _encoded(task: Task, examples: Sequence[Any], path: Path) -> list[dict[str, list[int]]]:
    try:
        return [task.encode(example) for example in examples]
    except ValueError as error:
        raise DataError(path, None, str(error)) from None


def new_model(
    task: str,
    base: str,
    labels: Sequence[str] = (),
    *,
    tuning_mode: str | None,
    pre_seq_len: int,
    init_text: str | Sequence[str],
    **options: Any,
) -> Any:
    """A frozen base with a head for `labels` and new prompts, which start from `init_text` or samples of it.

    The head is new, unless the base has one for as many labels.
    """
    if tuning_mode is not None:
        options |= {"pre_seq_len": pre_seq_len, "prompt_init": "text", "prompt_init_text": init_text}
    if labels:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        options["ignore_mismatched_sizes"] = True  # a head for other labels
    if task == "classification":
        options["problem_type"] = "single_label_classification"
    return MODELS[task].from_pretrained(base, tuning_mode=tuning_mode, **options)


def check_columns(kind: type[Task], columns: Columns) -> None:
    """Raises ValueError for a column that is named and that the task has no use for."""
    for name, named in vars(columns).items():
        if named is not None and name not in kind.columns:
            raise ValueError(f"{name}_column: {kind.name} takes none, got {named!r}")


def check_labels(kind: type[Task], examples: Sequence[Any], labels: Sequence[str], path: Path) -> None:
    """Raises DataError if an example has a label that training did not see."""
    unseen = [label for label in kind.label_names(examples) if not kind.is_known(label, labels)]
    if unseen:
        raise DataError(path, None, f"labels not seen in training: {', '.join(unseen)}; it saw {', '.join(labels)}")


def _check(options: Options) -> None:
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"WORLD_SIZE: expected one process, got {processes}; transformers' Trainer trains on several")
    if options.task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {options.task!r}")
    if options.tuning_mode is None and options.task in WRITING:
        raise ValueError("tuning_mode: generation has no head to train, so it needs ptune or deep_ptune")
    if options.tuning_mode not in LEARNING_RATES:
        modes = ", ".join(map(str, LEARNING_RATES))
        raise ValueError(f"tuning_mode: expected one of {modes}, got {options.tuning_mode!r}")
    for name in ("learning_rate", "head_learning_rate"):
        rate = getattr(options, name)
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {rate}")
    if options.micro_batch_size is not None and options.batch_size % options.micro_batch_size:
        raise ValueError(
            f"micro_batch_size: expected a divisor of batch_size ({options.batch_size}), got {options.micro_batch_size}"
        )
    check_columns(TASKS[options.task], options.columns)
    check_base_path(options.model)
    out = options.out
    check_free(out)
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"out: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"out: no permission to write to {nearest}")
    # What failed before its first checkpoint leaves an empty folder for them, which is nothing to lose.
    filled = out.is_dir() and any(path.name != CHECKPOINTS or any(path.iterdir()) for path in out.iterdir())
    if filled and not (options.resume or options.overwrite):
        raise ValueError(f"out: {out} is not empty; choose another folder, --resume its run, or --overwrite it")
    if options.init_from and (options.init_text is not None or options.tuning_mode is None):
        raise ValueError("init_from: expected with a tuning mode, and without init_text")
    if options.resume and not is_prompt_folder(options.resume):
        raise ValueError(f"out: the run to resume in {out} is of several tasks (--task-mix)")
    for folder, whose in (
        (options.resume, "the run to resume has"),
        (options.init_from, "the prompts to start from have"),
    ):
        saved = read_config(folder) if folder else {}
        for name in ("tuning_mode", "pre_seq_len", "deep_prompt_mode"):
            value = 0 if name == "pre_seq_len" and options.tuning_mode is None else getattr(options, name)
            if saved.get(name, value) != value:
                raise ValueError(f"{name}: {whose} {saved[name]!r}, got {value!r}")


def _check_same(saved: dict[str, Any], model: Any, labels: Sequence[str]) -> None:
    """Raises ValueError unless the run to resume has the same base and labels."""
    base, trained = saved["base"], list((saved["id2label"] or {}).values())
    if base["name"] != model.origin.name:
        raise ValueError(f"model: the run to resume has {base['name']}, got {model.origin.name}")
    if base["fingerprint"] != fingerprint(model.origin.config):
        raise ValueError(f"model: the config of {base['name']} has changed since the run to resume began")
    if trained != list(labels):
        raise ValueError(f"data: the run to resume has the labels {', '.join(trained)}; got {', '.join(labels)}")


def _task_on(base: str, task: str) -> str:
    """The task itself, or the one of `WRITING` that suits the base.

    Raises ValueError for a base that the task cannot be learnt on, though it may have a class that could.
    """
    config = config_of(base)
    kind = config.model_type
    if task in WRITING and config.is_encoder_decoder and kind in ENCODER_DECODERS:
        return "seq2seq"
    encoder_alone = task == "tagging" and kind in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    if config.is_encoder_decoder and not encoder_alone:
        raise ValueError(
            f"model: {base} ({kind}) is an encoder-decoder, which cannot be trained on {task}; expected another base, "
            f"or generation on one of {', '.join(ENCODER_DECODERS)}"
        )
    if task not in WRITING:
        return task
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"task: generation needs a decoder, and {base} ({kind}) is none")
    return "generation"


def _room(model: Any, tokenizer: PreTrainedTokenizerBase, options: Options) -> int:
    """The tokens that an example may have: `max_length`, or what a table of positions leaves beside the prompt."""
    if options.max_length < (least := tokenizer.num_special_tokens_to_add() + 2):
        raise ValueError(f"max_length: expected {least} or more with this tokenizer, got {options.max_length}")
    _, positions = position_limit(model.base_model)
    if positions is None:
        return options.max_length
    left = positions - (options.pre_seq_len if options.tuning_mode else 0)
    if left < MIN_ROOM:
        raise ValueError(f"pre_seq_len: {options.pre_seq_len} rows leave no room in the model's {positions} positions")
    return min(options.max_length, left)
