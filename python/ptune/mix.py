"""Several tasks trained together: one frozen base, a prompt for each task, and batches that hold them all.

A task's gradients are those that its own rows would give it alone.
"""

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import AutoConfig, PrinterCallback, TrainerCallback

from .bank import PromptBank, check_name
from .checkpoint import PROMPTS, read_json, write_json
from .data import Columns
from .folders import CHECKPOINTS, RECORD, remove_checkpoints
from .loading import check_base_path
from .runs import Options, Run, prepare
from .tasks import IGNORED, Features
from .train import BEGAN_WITH, EVALUATIONS, OneDevice, ResumableTrainer, evaluate, groups_of, line_of

# What a task's file may say, and of what kind it is; the rest is said once, for all.
_KEYS: dict[str, type] = {
    "name": str, "task": str, "data": str, "eval_data": str, "hold_out": float, "text_column": str,
    "label_column": str, "prompt_column": str, "completion_column": str, "tuning_mode": str, "pre_seq_len": int,
    "deep_prompt_mode": str, "init_text": str, "init_from": str, "max_length": int, "batch_size": int,
    "learning_rate": float, "head_learning_rate": float,
}  # fmt: skip
_KINDS = {str: "a string", int: "an integer of at least 1", float: "a number"}
_COLUMNS = ("text_column", "label_column", "prompt_column", "completion_column")
_MAX_GRAD_NORM = 1.0  # of each task, as Trainer's of one
_BATCH_SIZE = 32  # of all tasks together, where their files do not say
# in a checkpoint: a folder of prompts for each task; what did best; and evaluations, by task in the order of the tasks
_PROMPTS, _BEST, _LOG = "prompts", "best.safetensors", "evaluations.json"


def read_mix(paths: Sequence[Path], out: Path, resume: Path | None = None, **shared: Any) -> dict[str, Options]:
    """The options of each task, by its name (the file's, unless it says one), from one YAML file for each.

    Args:
        paths: the files; paths in them are relative to them.
        out: the folder of the tasks' folders.
        resume: the checkpoint to go on from.
        shared: options of all.
    Raises: ValueError for a file that is no mapping, or says what is no option of `ptune train`; for tasks that are not
        those of the run to resume; for a folder that holds a finished run of one task; and for one that holds an
        unfinished run, unless that is resumed or overwritten.
    """
    if (out / RECORD).exists():
        raise ValueError(f"out: {out} holds a finished run of one task; choose another folder")
    checkpoints = out / CHECKPOINTS
    if not (resume or shared.get("overwrite")) and checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise ValueError(f"out: {out} holds an unfinished run; --resume it, or --overwrite it")
    options: dict[str, Options] = {}
    for path in paths:
        said = _read_task(path)
        name = said.pop("name")
        if name in options:
            raise ValueError(f"{path}: name: {name!r} is another task's")
        said.setdefault("batch_size", max(1, _BATCH_SIZE // len(paths)))
        said["resume"] = resume and resume / _PROMPTS / name
        options[name] = Options(**said | shared | {"out": out / name})
    if resume is not None:
        if not (resume / _LOG).is_file():
            raise ValueError(f"out: the run to resume in {out} is of one task, not of several")
        began = list(read_json(resume / _LOG))
        if began != list(options):
            raise ValueError(f"task_mix: the run to resume has {', '.join(began)}, got {', '.join(options)}")
    return options


def _read_task(path: Path) -> dict[str, Any]:
    """The name of a task, and what else its file says, as `Options` takes it."""
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(said, dict) or not {"task", "data"} <= said.keys():
        keys = ", ".join(map(str, said)) if isinstance(said, dict) else type(said).__name__
        raise ValueError(f"{path}: expected task and data at least, got {keys}")
    if unknown := [str(key) for key in said if key not in _KEYS]:
        raise ValueError(f"{path}: expected no keys but {', '.join(_KEYS)}, got {', '.join(unknown)}")
    said = {"name": path.stem} | {key: _of_kind(path, key, value) for key, value in said.items()}
    try:
        check_name(said["name"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if said["name"] == CHECKPOINTS:
        raise ValueError(f"{path}: name: {said['name']!r} is the folder of the checkpoints of all")
    said["columns"] = Columns(*(said.pop(column, None) for column in _COLUMNS))
    said |= {key: path.parent / said[key] for key in ("data", "eval_data", "init_from") if key in said}
    if said.get("tuning_mode") == "none":  # as on the command line
        said["tuning_mode"] = None
    return said


def _of_kind(path: Path, key: str, value: Any) -> Any:
    """The value of a key, as its kind."""
    kind, got = _KEYS[key], value
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        with suppress(ValueError):
            value = float(value)  # YAML takes 1e-2 for a string
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
        raise ValueError(f"{path}: {key}: expected {_KINDS[kind]}, got {got!r}")
    return value


class TaskMix(nn.Module):
    """The prompts and heads of a bank, in training together; the base is not part of it.

    Attributes:
        bank: whose prompts `forward` runs.
        parameters_of: by task, what trains for it, by the names that its folder has.
    """

    def __init__(self, bank: PromptBank) -> None:
        super().__init__()
        self.bank = bank
        self.parameters_of = {name: bank.unfreeze(name) for name in bank.names}
        self.prompts = nn.ParameterList(
            parameter for own in self.parameters_of.values() for key, parameter in own.items() if key in PROMPTS
        )
        self.heads = nn.ModuleList(bank.head(name) for name in bank.names)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_names: Sequence[str], labels_of: dict[str, Tensor]
    ) -> dict[str, Tensor | None]:
        """``loss``: the sum of the tasks', each the mean over its own rows."""
        return {"loss": self.bank(input_ids, attention_mask, prompt_names=prompt_names, labels=labels_of).loss}


def train_mix(
    options: dict[str, Options],
    steps: int | None,
    say: Callable[[str], None],
    out: Path,
    resume: Path | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Train the tasks of `read_mix` together, and write a folder for each, of what did best, as `Run.fit` does.

    Args:
        steps: optimizer steps, each with ``batch_size`` examples of every task; by default, what the task that takes
            most has alone.
        say: gets a line for each choice that was made.
        out: the folder of the tasks' folders, and of the checkpoints until all is done.
        resume: the checkpoint in it to go on from, as `read_mix` was given it.
        quiet: shows no progress bar.
    Returns: by task, the record that stands in its `train.json`.
    """
    first = next(iter(options.values()))
    check_base_path(first.model)
    if AutoConfig.from_pretrained(first.model).is_encoder_decoder:
        raise NotImplementedError(
            f"model: {first.model} is an encoder-decoder, and tasks are trained together in a PromptBank, which takes "
            "none; train each by itself"
        )
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, its in options.items():
            try:
                run = prepare(replace(its, steps=steps), lambda line, name=name: say(f"{name}: {line}"))  # type: ignore[misc]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if resume is None:
                run.model.save_prompts(Path(scratch, name))
            runs[name] = replace(run, model=None)
        steps = steps or max(run.steps for run in runs.values())
        every = math.ceil(steps / EVALUATIONS)
        if resume is None:
            remove_checkpoints(out / CHECKPOINTS)
        arguments = OneDevice(
            str(out / CHECKPOINTS), max_steps=steps, warmup_steps=round(0.1 * steps), per_device_train_batch_size=1,
            max_grad_norm=0.0, save_steps=every, save_total_limit=1, remove_unused_columns=False,
            logging_steps=max(1, steps // 20), seed=first.seed, report_to="none", disable_tqdm=quiet,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        # where Trainer takes what trains
        bank = PromptBank(_base(first.model, first.dtype).to(arguments.device))
        for name in options:
            bank.add(name, Path(resume / _PROMPTS if resume else scratch, name))
        mix = TaskMix(bank)
        best = _Best(mix, runs, every, say)
        if resume is not None:
            best.load(resume)
        data = _Steps(runs, steps, first.seed)
        trainer = _MixTrainer(mix, arguments, train_dataset=data, data_collator=partial(_collate, runs))
        trainer.best = best
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Clipping(mix))
        trainer.add_callback(best)
        groups = []
        for name, run in runs.items():
            own = mix.parameters_of[name].items()
            groups += groups_of(own, run.learning_rate, run.options.head_learning_rate)
        trainer.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    best.restore()
    records = {}
    for name, run in runs.items():
        bank.save(name, run.options.out)
        records[name] = replace(run, steps=steps).write_record(trainer.state.log_history + best.log[name])
    remove_checkpoints(out / CHECKPOINTS)
    return records


def _base(model: str, dtype: str) -> Any:
    """The base as the class that its checkpoint is of, which has all that any task takes from it."""
    config = AutoConfig.from_pretrained(model)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    return kind.from_pretrained(model, dtype=dtype)


class _Clipping(TrainerCallback):
    """Clips the gradients of each task by their own norm, lest one task slow the others down."""

    def __init__(self, mix: TaskMix) -> None:
        self.mix = mix

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        for own in self.mix.parameters_of.values():
            nn.utils.clip_grad_norm_(list(own.values()), _MAX_GRAD_NORM)


class _Alone(nn.Module):
    """A task of a bank, as `evaluate` takes a model."""

    def __init__(self, bank: PromptBank, name: str) -> None:
        super().__init__()
        self.bank, self.name = bank, name
        self.head = bank.head(name)  # whose dropout `eval` turns off

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        names = [self.name] * input_ids.shape[0]
        output = self.bank(input_ids, attention_mask, prompt_names=names, labels={self.name: labels})
        return output.tasks[self.name].output


class _Best(TrainerCallback):
    """Evaluates every task each ``every`` steps and at the end, and remembers what of each did best.

    Attributes:
        log: by task, its evaluations, as Trainer's log has them.
    """

    def __init__(self, mix: TaskMix, runs: dict[str, Run], every: int, say: Callable[[str], None]) -> None:
        self.mix, self.runs, self.every, self.say = mix, runs, every, say
        self.log: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        self._values: dict[str, list[Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        for name, run in self.runs.items():
            metrics = evaluate(_Alone(self.mix.bank, name), run.task, run.evaluation)
            found = {f"eval_{key}": value for key, value in metrics.items()} | {"step": state.global_step}
            self.log[name].append(found)
            self.say(f"{name}: {line_of(run.task, state, found)}")
            if run.best(self.log[name]) is self.log[name][-1]:
                self._values[name] = [own.detach().clone() for own in self.mix.parameters_of[name].values()]

    def save(self, folder: Path) -> None:
        """Write the evaluations, and what did best, to a checkpoint."""
        save_file(
            {f"{name}/{i}": own for name, its in self._values.items() for i, own in enumerate(its)}, folder / _BEST
        )
        write_json(folder / _LOG, self.log)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""
        self.log = read_json(folder / _LOG)
        found = load_file(folder / _BEST)
        for name, own in self.mix.parameters_of.items():
            self._values[name] = [found[f"{name}/{i}"] for i in range(len(own))]

    @torch.no_grad()
    def restore(self) -> None:
        """Give every task what of it did best."""
        for name, values in self._values.items():
            for own, value in zip(self.mix.parameters_of[name].values(), values, strict=True):
                own.copy_(value)


class _Steps(Dataset):
    """The examples of each step, of every task: as many as its batch size, without repeats until all were seen."""

    def __init__(self, runs: dict[str, Run], steps: int, seed: int) -> None:
        self.features = {name: [run.task.encode(example) for example in run.train] for name, run in runs.items()}
        self.picked = {
            name: list(_batches(len(run.train), run.options.batch_size, steps, random.Random(f"{seed} {name}")))
            for name, run in runs.items()
        }
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, list[Features]]:
        return {name: [self.features[name][i] for i in picked[step]] for name, picked in self.picked.items()}


def _batches(count: int, size: int, steps: int, chooser: random.Random) -> Iterator[list[int]]:
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += chooser.sample(range(count), count)
        yield waiting[:size]
        del waiting[:size]


def _collate(runs: dict[str, Run], steps: Sequence[dict[str, list[Features]]]) -> dict[str, Any]:
    """One step's examples as one padded batch, with the labels of each task apart."""
    (step,) = steps
    parts = {name: runs[name].task.collate(features) for name, features in step.items()}
    width = max(part["input_ids"].shape[1] for part in parts.values())
    return {
        "input_ids": torch.cat([_widened(part["input_ids"], width, 0) for part in parts.values()]),
        "attention_mask": torch.cat([_widened(part["attention_mask"], width, 0) for part in parts.values()]),
        "prompt_names": [name for name, part in parts.items() for _ in part["input_ids"]],
        "labels_of": {name: _widened(part["labels"], width, IGNORED) for name, part in parts.items()},
    }


def _widened(tensor: Tensor, width: int, filling: int) -> Tensor:
    """[k, n] → [k, width]; labels of classes, [k], as they are."""
    return tensor if tensor.dim() == 1 else nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=filling)


class _MixTrainer(ResumableTrainer):
    best: _Best

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        folder = Path(output_dir)
        bank = self.best.mix.bank
        for name in bank.names:
            bank.save(name, folder / _PROMPTS / name)
            write_json(folder / _PROMPTS / name / BEGAN_WITH, self.best.runs[name].began_with)
        self.best.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the bank was given the checkpoint's prompts."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data)
