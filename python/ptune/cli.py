"""The command `ptune`: train, eval, predict, info, convert, audit, demo, serve-blocks, remote-status."""

import json
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config import SHORT_DTYPES

# What loads torch and transformers is imported inside the commands: `ptune --help` should not wait seconds for it.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
notes = Console(stderr=True, highlight=False)
results = Console(highlight=False)


class TaskName(str, Enum):
    classification = "classification"
    tagging = "tagging"
    generation = "generation"


class ConvertedTask(str, Enum):
    classification = "classification"
    tagging = "tagging"
    answering = "answering"
    generation = "generation"
    seq2seq = "seq2seq"


class Mode(str, Enum):
    deep_ptune = "deep_ptune"
    ptune = "ptune"
    none = "none"


class DeepMode(str, Enum):
    overwrite = "overwrite"
    add = "add"


def _dtype(help: str, *names: str) -> Any:
    """An option that takes the dtypes ``names``, by their short names too."""

    def read(given: str) -> str:
        name = SHORT_DTYPES.get(given, given)
        if name not in names:
            raise typer.BadParameter(f"expected one of {', '.join(names)}, got {given!r}")
        return name

    short = [short for short, name in SHORT_DTYPES.items() if name in names]
    return typer.Option(help=f"{help} Or {', '.join(short)}.", parser=read, metavar=f"[{'|'.join(names)}]")


_HALVES = ("float16", "bfloat16")
_DTYPES = ("auto", "float32", *_HALVES)

RunFolder = Annotated[
    Path, typer.Argument(help="The --out folder of a finished `ptune train`, or of save_prompts.", show_default=False)
]
BaseModel = Annotated[str | None, typer.Option(help="The base, where it is not where it was in training.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object in place of tables.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text. Default: found by its name.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label. Default: found by its name.")]
PromptColumn = Annotated[str | None, typer.Option(help="Column of the prompt (generation).")]
CompletionColumn = Annotated[str | None, typer.Option(help="Column of the completion (generation).")]


def main() -> None:
    """Runs the command that the arguments name."""
    app(prog_name="ptune")


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"ptune-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Tune soft prompts on frozen transformers."""


# what is said once for all tasks that are trained together
_OF_A_MIX = ("task_mix", "model", "out", "steps", "dtype", "seed", "resume", "overwrite")


@app.command()
def train(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Folder or hub name of the frozen base.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the prompts, head and checkpoints.", show_default=False)],
    task: Annotated[TaskName | None, typer.Option(help="What is learnt; generation by encoder-decoders too.")] = None,
    data: Annotated[Path | None, typer.Option(help="CSV, TSV or JSONL; CoNLL for tagging.")] = None,
    task_mix: Annotated[
        str | None, typer.Option(help="YAML files of several tasks, with commas: trained together.", metavar="FILES")
    ] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Like --data. Default: a held-out part.")] = None,
    hold_out: Annotated[float, typer.Option(help="The share to hold out without --eval-data.")] = 0.1,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    tuning_mode: Annotated[
        Mode, typer.Option(help="Prompts in every block, before the text, or none.")
    ] = Mode.deep_ptune,
    pre_seq_len: Annotated[int, typer.Option(min=1, help="Rows of the prompt.")] = 16,
    deep_prompt_mode: Annotated[DeepMode, typer.Option(help="How deep prompts enter a block.")] = DeepMode.overwrite,
    init_text: Annotated[str | None, typer.Option(help="Text to start from. Default: training texts.")] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Prompts of another task to start from, in place of a text.", metavar="FOLDER")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of an example; what is beyond is cut.")] = 128,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the optimizer. Default: 3 passes, at least 150.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Of it, how many at once. Default: all.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: one for each tuning mode.")] = None,
    head_learning_rate: Annotated[float, typer.Option(help="Of the head beside prompts.")] = 1e-1,
    dtype: Annotated[str, _dtype("Of the frozen base; prompts and head are float32.", *_DTYPES)] = "auto",
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG for the loss and metric curves.")] = None,
) -> None:
    """Train a soft prompt and a task head on a frozen model."""
    with _one_line_errors():
        if plot and (plot.suffix.lower() != ".png" or not plot.absolute().parent.is_dir()):
            raise ValueError(f"--plot: expected a .png file in a folder that exists, got {plot}")
        if task_mix is not None:
            for name in context.params:
                source = context.get_parameter_source(name)
                if name not in _OF_A_MIX and source is not None and source.name == "COMMANDLINE":
                    raise ValueError(f"--{name.replace('_', '-')}: not with --task-mix, whose files say what is learnt")
            files = [Path(file.strip()) for file in task_mix.split(",") if file.strip()]
            if not files:
                raise ValueError("--task-mix: expected a file for each task")
            _train_mix(files, out, steps, resume, model=model, dtype=dtype, seed=seed, overwrite=overwrite)
            return
        if task is None or data is None:
            raise ValueError(f"--{'data' if task else 'task'}: expected one, or --task-mix")
        _quieten()
        from .data import Columns
        from .folders import latest_checkpoint
        from .runs import Options, prepare

        run = prepare(
            Options(
                model=model,
                task=task.value,
                data=data,
                out=out,
                eval_data=eval_data,
                hold_out=hold_out,
                columns=Columns(text_column, label_column, prompt_column, completion_column),
                tuning_mode=None if tuning_mode is Mode.none else tuning_mode.value,
                pre_seq_len=pre_seq_len,
                deep_prompt_mode=deep_prompt_mode.value,
                init_text=init_text,
                init_from=init_from,
                max_length=max_length,
                steps=steps,
                batch_size=batch_size,
                micro_batch_size=micro_batch_size,
                learning_rate=learning_rate,
                head_learning_rate=head_learning_rate,
                dtype=dtype,
                seed=seed,
                resume=latest_checkpoint(out) if resume else None,
                overwrite=overwrite,
            ),
            _say,
        )
        record = run.fit(None if sys.stderr.isatty() else _say)
        if plot:
            from .plot import plot_log

            plot_log(record["log"], run.task.metrics, plot)
    on = f"on {len(run.evaluation)} evaluation examples"
    _print_metrics(record["metrics"], f"{out}, as it was after step {record['kept_step']}, {on}")


def _train_mix(files: list[Path], out: Path, steps: int | None, resume: bool, **shared: Any) -> None:
    _quieten()
    from .folders import latest_checkpoint
    from .mix import read_mix, train_mix

    checkpoint = latest_checkpoint(out) if resume else None
    options = read_mix(files, out, checkpoint, **shared)
    records = train_mix(options, steps, _say, out, checkpoint, quiet=not sys.stderr.isatty())
    for name, record in records.items():
        kept = f"as it was after step {record['kept_step']}"
        _print_metrics(record["metrics"], f"{out / name}, {kept}, on its evaluation examples")


def _say(line: str) -> None:
    notes.print(line, markup=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    folder: RunFolder,
    data: Annotated[Path, typer.Option(help="Examples like the training data's.", show_default=False)],
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    base_model: BaseModel = None,
    as_json: AsJson = False,
) -> None:
    """Score a tuned model on labelled data, as a whole and by label."""
    with _one_line_errors():
        _quieten()
        from .data import Columns
        from .folders import load_run
        from .runs import check_columns, check_labels
        from .train import report

        model, task = load_run(folder, base_model)
        columns = Columns(text_column, label_column, prompt_column, completion_column)
        check_columns(type(task), columns)
        examples = task.read(data, columns)
        check_labels(type(task), examples, task.labels, data)
        scores, by_label = report(model, task, examples)
    if as_json:
        finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}  # JSON has no others
        typer.echo(json.dumps({"examples": len(examples), **finite, "by_label": by_label}, ensure_ascii=False))
        return
    _print_metrics(scores, f"{folder}, on {len(examples)} examples of {data}")
    if by_label:
        _print_by_label(by_label)


@app.command()
def predict(
    folder: RunFolder,
    text: Annotated[str | None, typer.Argument(help="Default: each text of --file.", show_default=False)] = None,
    file: Annotated[
        Path,
        typer.Option(help="CSV, TSV, JSONL or .conll, else a text per line; - is standard input.", allow_dash=True),
    ] = Path("-"),
    text_column: TextColumn = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion (generation); default: 64.", show_default=False)
    ] = None,
    all_scores: Annotated[bool, typer.Option("--all-scores", help="Of each label (classification).")] = False,
    base_model: BaseModel = None,
) -> None:
    """Write one JSON line per text that is not blank: its row, and a label, tags and entities, or a completion."""
    with _one_line_errors():
        if text is not None and (str(file) != "-" or text_column):
            raise ValueError("--file, --text-column: expected without TEXT")
        texts = [_decoded(text)] if text is not None else _read_texts(file, text_column)
        rows = [row for row, its in enumerate(texts, 1) if its.strip()]
        if not rows:
            raise ValueError("no text to predict: give one, or lines on standard input or in --file")
        _quieten()
        from .folders import load_run
        from .tasks import WRITING

        model, task = load_run(folder, base_model)
        options: dict[str, Any] = {}
        if all_scores:
            _expect_task("--all-scores", task.name, "classification")
            options["all_scores"] = True
        if max_new_tokens is not None:
            _expect_task("--max-new-tokens", task.name, *WRITING)
            options["max_new_tokens"] = max_new_tokens
        found = task.predict(model, [texts[row - 1] for row in rows], **options)
        for row, prediction in zip(rows, found, strict=True):
            typer.echo(json.dumps({"row": row, **prediction}, ensure_ascii=False))


@app.command()
def info(folder: RunFolder, as_json: AsJson = False) -> None:
    """Show what an output folder holds."""
    with _one_line_errors():
        _quieten()
        from .folders import describe

        rows = describe(folder)
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    table = Table(title=escape(str(folder)), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    results.print(table)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="PEFT's folder, or a file of P-tuning v2 or Petals.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    base_model: Annotated[str | None, typer.Option(help="The base, where it is not where SOURCE says.")] = None,
    task: Annotated[ConvertedTask | None, typer.Option(help="Where SOURCE does not say.")] = None,
    task_id: Annotated[int | None, typer.Option(help="Which task of a multitask prompt.")] = None,
    to_peft: Annotated[bool, typer.Option("--to-peft", help="SOURCE is a folder of ours; write it for PEFT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Read the prompts of another library into a folder of ours, or write ours for PEFT."""
    with _one_line_errors():
        if not overwrite and out.is_dir() and any(out.iterdir()):
            raise ValueError(f"out: {out} is not empty; choose another folder, or --overwrite it")
        _quieten()
        from . import convert as converters

        if to_peft:
            if task is not None or task_id is not None:
                raise ValueError("--task, --task-id: expected without --to-peft")
            converters.to_peft(source, out, base_model)
        else:
            name = None if task is None else task.value
            converters.convert(source, out, base_model=base_model, task=name, task_id=task_id)
    notes.print(f"Written: {escape(str(out))}", soft_wrap=True)


@app.command()
def audit(
    model: Annotated[str, typer.Option(help="Folder or hub name of a model.", show_default=False)],
    data: Annotated[Path, typer.Option(help="CSV, TSV or JSONL, or a .txt of lines.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.png.", show_default=False)],
    dtype: Annotated[str, _dtype("The precision to find fault with.", *_HALVES)] = "float16",
    text_column: TextColumn = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text; what is beyond is cut.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    batches: Annotated[int, typer.Option(min=1, help="How many batches, from the file's beginning.")] = 2,
) -> None:
    """Find where a model loses precision in half types, and the cheapest repair."""
    with _one_line_errors():
        _quieten()
        from .precision.command import audit_files
        from .precision.report import print_audit, write_audit

        found = audit_files(model, data, out, dtype, text_column, max_length, batch_size, batches)
        written = write_audit(found, out)
    print_audit(found, results)
    notes.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)


@app.command()
def demo(
    seed: int = 0,
    budget: Annotated[float, typer.Option(min=0.01, help="Share of the full demo's examples and steps.")] = 1.0,
) -> None:
    """Tune two tasks on one frozen MiniLM, on texts that every Python has. Offline, six minutes."""
    with _one_line_errors():
        _quieten()
        from .demo import run_demo

        run_demo(results, seed=seed, budget=budget)


@app.command()
def serve_blocks(
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the base, as every machine has it.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML of the options here, and of Ray's resources.")] = None,
    servers: Annotated[int | None, typer.Option(min=1, help="Over how many its blocks are spread.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="How many there are of each server.")] = None,
    name: Annotated[str | None, typer.Option(help="Under which clients find them. Default: --model.")] = None,
    dtype: Annotated[str | None, _dtype("Of the weights.", *_DTYPES)] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. Default: RAY_ADDRESS, else a new one.")] = None,
) -> None:
    """Run the blocks of a model for clients (ptune.remote), until interrupted. On trusted networks alone."""
    with _one_line_errors():
        _quieten()
        from . import remote

        options = {"model": model, "servers": servers, "replicas": replicas, "name": name, "device": device}
        options["dtype"] = dtype
        given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        if config is None and model is None:
            raise ValueError("--model: expected one, or --config")
        settings = remote.ServeConfig(**given) if config is None else remote.ServeConfig.read(config, **given)
        own = remote.join(address)
        started = remote.serve_blocks(settings)
        started.wait()
        _print_servers(remote.status(started.name))
        rest = ", which ends the Ray cluster here and its clients" if own else ""
        notes.print(f"Serving until interrupted{rest}.", soft_wrap=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as service managers interrupt
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            started.stop()


@app.command()
def remote_status(
    name: Annotated[str | None, typer.Argument(help="Of the servers. Default: all.", show_default=False)] = None,
    address: Annotated[str, typer.Option(help="Of their Ray cluster. Default: the one that runs here.")] = "auto",
) -> None:
    """Show the servers of blocks: span, node, state, requests, memory."""
    with _one_line_errors():
        _quieten()
        from . import remote

        if address != "auto":
            _say(f"Looking for a Ray cluster at {address} (a minute, if there is none).")
        remote.join(address)
        rows = remote.status(name)
        if not rows:
            named = "" if name is None else f" that are named {name!r}"
            raise ValueError(f"no servers{named} in this cluster; `ptune serve-blocks` starts some")
    _print_servers(rows)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns what the user can mend (a wrong path, file or option) into one line and exit code 2."""
    try:
        yield
    except BrokenPipeError:  # the reader closed the pipe, which typer handles
        raise
    except _mendable() as error:
        notes.print(f"[bold red]Error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _mendable() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import StrictDataclassError  # a config's value of another kind
    from safetensors import SafetensorError

    return ValueError, OSError, ImportError, NotImplementedError, SafetensorError, StrictDataclassError


def _quieten() -> None:
    """Keeps transformers' loading bars and reports, which say that a new head is new, out of the output.

    And what it imports where they are installed, whether used or not.
    """
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as its_logging

    its_logging.set_verbosity_error()
    its_logging.disable_progress_bar()


def _expect_task(option: str, task: str, *names: str) -> None:
    if task not in names:
        raise ValueError(f"{option}: expected with {names[0]}, got {task}")


def _decoded(text: str) -> str:
    """An argument, whose bytes Python takes as they come."""
    from .data import decode

    return decode(text.encode("utf-8", "surrogateescape"), "TEXT")


def _read_texts(path: Path, column: str | None) -> list[str]:
    from .data import decode, read_inputs, split_lines

    if str(path) != "-":
        return read_inputs(path, column)
    if column:
        raise ValueError("--text-column: expected with --file")
    if sys.stdin.isatty():
        raise ValueError("no text to predict: give one, or lines on standard input or in --file")
    return split_lines(decode(sys.stdin.buffer.read(), "standard input"))


def _print_servers(rows: list[dict[str, Any]]) -> None:
    table = Table(title="servers of blocks", title_justify="left")
    for column in ("name", "span", "node", "state", "requests", "memory"):
        table.add_column(column, justify="right" if column in ("requests", "memory") else "left")
    for row in rows:
        memory = sum(row.get(f"{part}_bytes", 0) for part in ("weight", "kept", "session", "prompt"))
        answered = row["state"] == "ready"
        table.add_row(
            row["name"],
            f"{row['first']}-{row['last'] - 1}",
            row["node"][:8] if answered else "",
            row["state"],
            str(row["requests"]) if answered else "",
            f"{memory / 2**20:.1f} MiB" if answered else "",
        )
    results.print(table)


def _print_metrics(metrics: dict[str, float], title: str) -> None:
    results.print(escape(title), soft_wrap=True)  # as a table's own title it would be as narrow as the table
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    results.print(table)


def _print_by_label(by_label: dict[str, dict[str, float]]) -> None:
    table = Table()
    table.add_column("label")
    for name in ("precision", "recall", "f1", "examples"):
        table.add_column(name, justify="right")
    for label, scores in by_label.items():
        rates = (f"{scores[name]:.4f}" for name in ("precision", "recall", "f1"))
        table.add_row(escape(label), *rates, str(scores["examples"]))
    results.print(table)
