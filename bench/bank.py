"""``python -m bench.bank``: mixed batches of a `PromptBank` beside the bare base, as one dated table.

32 texts of 32 tokens over 8 prompts, of all tasks that the base serves: what the bank takes as a multiple of the bare
base's forward on these texts, and what eight runs of eight models, one for each prompt, would take (``apart``). The
bank's answers are held to those of the eight first. Then 1,000 prompts in a bank with 64 MB for compiled ones.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import ptune
from ptune.demo import minilm_folder

from .timing import interleaved, options, report
from .train_step import config

SIZE, LENGTH = 32, 32
SHORT = (4, 8, 12, 16, 20, 24, 32)
LONG = (1, 10, 20, 40, 60, 80, 100)
EIGHT = 8  # prompts in a batch, "none" among them
MANY, BUDGET = 1000, 64_000_000

LOADERS = {
    "sequence": ptune.AutoPTuneModelForSequenceClassification,
    "token": ptune.AutoPTuneModelForTokenClassification,
    "lm": ptune.AutoPTuneModelForCausalLM,
}


def prompts(base: Path, folder: Path, lengths: tuple[int, ...], modes: tuple[str, ...], causal: bool) -> list[Any]:
    """Models with random prompts of these lengths, modes and tasks in turn; their folders hold what they are."""
    tasks = ("sequence", "token", "lm") if causal else ("sequence", "token")
    models = []
    for i, rows in enumerate(lengths):
        torch.manual_seed(i)
        task = tasks[i % len(tasks)]
        labels = {} if task == "lm" else {"num_labels": 3 + i}
        model = LOADERS[task].from_pretrained(base, tuning_mode=modes[i % len(modes)], pre_seq_len=rows, **labels)
        model.save_prompts(folder / str(i))
        models.append(model.eval())
    return models


@torch.no_grad()
def apart(models: list[Any], base: Any, ids: torch.Tensor, names: list[str | None]) -> list[torch.Tensor]:
    """The logits (of the bare base: states) of each row, by one run for each prompt."""
    made: list[torch.Tensor] = [ids] * len(names)
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        model = base if name is None else models[int(name)]
        output = model(input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows]))
        for row, its in zip(rows, output.last_hidden_state if name is None else output.logits, strict=True):
            made[row] = its
    return made


def mixed(label: str, base: Path, lengths: tuple[int, ...], modes: tuple[str, ...], rounds: int) -> dict[str, str]:
    causal = "llama" in label
    stock = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_pretrained(base).eval()
    bare = stock.base_model
    bank = ptune.PromptBank(stock)
    with tempfile.TemporaryDirectory() as folder:
        models = prompts(base, Path(folder), lengths, modes, causal)
        for i in range(len(models)):
            bank.add(str(i), Path(folder, str(i)))
    for model in models:
        if model.prefix_plan.path == "prefix":
            model.compile_prompts()
    names: list[str | None] = [*bank.names, None] * (SIZE // EIGHT)
    ids = torch.randint(3, stock.config.vocab_size, (SIZE, LENGTH))
    mask = torch.ones_like(ids)
    output = bank(ids, mask, prompt_names=names)
    for row, expected in enumerate(apart(models, bare, ids, names)):
        got = output.last_hidden_state[row] if names[row] is None else output.logits[row]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    with torch.no_grad():
        seconds = interleaved(
            {
                "bank": partial(bank, ids, mask, prompt_names=names),
                "bare": partial(bare, input_ids=ids, attention_mask=mask),
                "apart": partial(apart, models, bare, ids, names),
            },
            rounds,
        )
    return {
        "base": label, "modes": "/".join(dict.fromkeys(modes)), "rows": f"0-{max(lengths)}",
        "bank ms": f"{seconds['bank'] * 1e3:.0f}", "of bare": f"{seconds['bank'] / seconds['bare']:.2f}",
        "apart of bare": f"{seconds['apart'] / seconds['bare']:.2f}",
    }  # fmt: skip


def many(base: Path) -> str:
    """Every one of `MANY` prompts answers, and those that were dropped answer as before."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(base)
    bank = ptune.PromptBank(stock, max_bytes=BUDGET)
    with tempfile.TemporaryDirectory() as folder:
        model = ptune.AutoPTuneModelForCausalLM.from_pretrained(base, tuning_mode="ptune", pre_seq_len=20)
        for i in range(MANY):
            with torch.no_grad():
                model.prompt_embeddings.weight.normal_(std=0.02)
            model.save_prompts(folder)
            bank.add(str(i), folder)
    ids = torch.randint(3, stock.config.vocab_size, (1, LENGTH))
    first, most = [], 0
    for name in bank.names:
        first.append(bank(ids, prompt_names=[name]).logits[0])
        most = max(most, bank.compiled_bytes)
        held = sum(prefix.nbytes for prefix in bank._compiled.kept.values())
        if not held == bank.compiled_bytes <= BUDGET:
            raise AssertionError(f"{held} bytes are held, of {BUDGET}")
    kept = len(bank._compiled.kept)
    for name, expected in zip(bank.names, first, strict=True):
        torch.testing.assert_close(bank(ids, prompt_names=[name]).logits[0], expected, rtol=0, atol=1e-5)
    return f"{MANY} prompts of 20 rows answer, twice, with {most / 1e6:.1f} of {BUDGET / 1e6:.0f} MB: {kept} are kept"


def main() -> None:
    chosen = options("python -m bench.bank", __doc__, 15)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    table = []
    with tempfile.TemporaryDirectory() as llama:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(llama)
        for label, base, modes in (
            ("llama", Path(llama), ("ptune", "deep_ptune")),
            ("minilm", minilm_folder(), ("deep_ptune",)),
            ("minilm", minilm_folder(), ("ptune", "deep_ptune")),
        ):
            for lengths in (SHORT, LONG):
                line = mixed(label, base, lengths, modes, chosen.rounds)
                print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
                table.append(line)
        said = many(Path(llama))
    print(said)
    report(chosen, "bank", f"transformers {transformers.__version__}; {said}", table)


if __name__ == "__main__":
    main()
