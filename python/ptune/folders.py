"""The output folder of a training run, and back from it to a model that predicts.

It holds the prompts and head (`model.safetensors`, `ptune_config.json`), `train.json` (task, base, metrics and log)
and, until the run has finished, Trainer's checkpoints.
"""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME

from .anatomy import position_limit
from .auto import MODELS
from .checkpoint import PEFT_CONFIG, WEIGHTS_NAME, is_prompt_folder, read_config, read_json
from .kinds import kind_of
from .quantised import is_quantised
from .tasks import TASKS, WRITING, Task
from .tokenizer import load_tokenizer

RECORD = "train.json"
RECORD_KEYS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "max_length": int,
    "steps": int,
    "batch_size": int,
    "learning_rate": (int, float),
    "metrics": dict,
}
CHECKPOINTS = "checkpoints"
_LONGEST = 2**20  # tokens; a tokenizer that knows no limit says 10^30


def read_record(folder: Path) -> dict[str, Any]:
    """What `train.json` says. Raises: ValueError if the folder is not one that a finished run has written."""
    path = folder / RECORD
    if not path.is_file():
        there = f"{folder} holds no {RECORD}" if folder.is_dir() else f"{folder}: no such folder"
        problem = f"{there}: expected the --out folder of a finished `ptune train`"
        if (folder / PEFT_CONFIG).is_file():
            problem += ", and this is one of PEFT's, which `ptune convert` reads"
        if (folder / CHECKPOINTS).is_dir():
            problem += ", and this run was interrupted: `ptune train … --resume` goes on with it"
        raise ValueError(problem)
    record = read_json(path)
    for name, kind in RECORD_KEYS.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise ValueError(f"{path}: damaged: {name} is missing, or of the wrong type")
    if record["task"] not in TASKS:
        raise ValueError(f"{path}: task: expected one of {', '.join(TASKS)}, got {record['task']!r}")
    if record.get("weights") not in (None, weights_in(folder)):  # older runs did not say
        raise ValueError(f"{path}: of a run whose prompts are no longer here: others were saved over them")
    return record


def weights_in(folder: Path) -> str | None:
    """By which a run knows its prompts."""
    file = folder / WEIGHTS_NAME
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _record_of(folder: Path) -> dict[str, Any] | None:
    """`read_record`; ``None`` of prompts that Python saved, which know of no run."""
    return read_record(folder) if (folder / RECORD).exists() or not is_prompt_folder(folder) else None


def load_run(folder: Path, base_model: str | None = None) -> tuple[PreTrainedModel, Task]:
    """The tuned model of a folder of prompts, and its task; ``base_model``: where its base is now, if elsewhere.

    Of prompts that Python saved, the task is that of their class, and texts are cut where the base can read no further.
    Raises: ValueError for a class that is of no task here.
    """
    record, saved = _record_of(folder), read_config(folder)
    name = record["task"] if record else getattr(kind_of(saved["model_class"]), "task", None)
    found = [str(label) for label in (saved["id2label"] or {}).values()]
    if name not in TASKS or saved.get("problem_type") not in (None, "single_label_classification"):
        got = " of ".join(filter(None, (saved["model_class"], saved.get("problem_type"))))
        raise ValueError(f"{folder}: expected prompts for {', '.join(TASKS)}, got those of {got}")
    if name == "classification" and len(found) == 1:
        raise ValueError(f"{folder}: expected two labels or more, got {found[0]}")
    if name == "tagging" and any(label != "O" and label[:2] not in ("B-", "I-") for label in found):
        raise ValueError(f"{folder}: expected tags that begin with B- or I-, or are O, got {', '.join(found)}")
    model = MODELS[name].from_pretrained(folder, base_model=base_model)
    if torch.cuda.is_available() and not is_quantised(model):  # which is where it belongs already
        model.to("cuda")
    labels = [] if name in WRITING else [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    tokenizer = load_tokenizer(model.origin.name, name)
    return model, TASKS[name](tokenizer, record["max_length"] if record else _readable(model, tokenizer), labels)


def _readable(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How long a text may be, as the tokenizer and the model's table of positions say."""
    _, positions = position_limit(model.base_model)
    room = _LONGEST if positions is None else positions - model.ptune_config.pre_seq_len
    return min(room, tokenizer.model_max_length, _LONGEST)


def describe(folder: Path) -> dict[str, str]:
    """What an output folder holds, by name; of tasks that were trained together, what each has learnt."""
    tasks = [] if (folder / RECORD).exists() else sorted(path.parent for path in folder.glob(f"*/{RECORD}"))
    if tasks:
        return {task.name: _learnt(read_record(task)) for task in tasks}
    record = _record_of(folder)
    prompts = read_config(folder)
    mode, its_class, weights = prompts["tuning_mode"], prompts["model_class"], folder / WEIGHTS_NAME
    lines = {
        "task": record["task"] if record else getattr(kind_of(its_class), "task", None) or its_class,
        "base": prompts["base"]["name"],
        "tuning mode": f"deep_ptune ({prompts['deep_prompt_mode']})" if mode == "deep_ptune" else str(mode),
        "prompt rows": str(prompts["pre_seq_len"]),
        "labels": ", ".join(map(str, prompts["id2label"].values())) if prompts["id2label"] else "none",
        "size": f"{weights.stat().st_size / 1024:.0f} KiB",
    }
    if record is None:
        return lines
    steps, rates = f"{record['steps']} steps of {record['batch_size']}", f"learning rate {record['learning_rate']:g}"
    lines["training"] = f"{steps}, {rates}"
    for name in ("prefix_sharing", "kept_step"):  # older runs did not say
        if name in record:
            lines[name.replace("_", " ")] = str(record[name])
    return lines | _metrics(record)


def _metrics(record: dict[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): f"{float(value):.4f}" for name, value in record["metrics"].items()}


def _learnt(record: dict[str, Any]) -> str:
    return f"{record['task']}: {', '.join(map(' '.join, _metrics(record).items()))}"


def latest_checkpoint(out: Path) -> Path:
    """The newest complete checkpoint of an output folder. Raises: ValueError if there is none."""
    found = [path for path in (out / CHECKPOINTS).glob("checkpoint-[0-9]*") if _is_complete(path)]
    if not found:
        finished = [*out.glob(RECORD), *out.glob(f"*/{RECORD}")]
        reason = f"{out / CHECKPOINTS} holds no checkpoint"
        if finished:
            reason = f"the run in {out} has finished; --init-from {out} begins a longer one with its prompts"
        raise ValueError(f"out: nothing to resume, {reason}")
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _is_complete(checkpoint: Path) -> bool:
    """Whether the file that is written last is whole."""
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
    except (OSError, ValueError):
        return False
    return True


def remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-[0-9]*"):
        shutil.rmtree(checkpoint)
    with suppress(OSError):  # there is none, or it holds what is not ours
        folder.rmdir()
