"""``python -m bench.remote``: blocks on servers of this machine beside the same model without, as one dated table.

A training step of MiniLM with deep prompts, its six blocks on two servers: forward and backward, b = 32, m = 16. Then
one of a random Llama of that size with a shallow prompt, whose rows run once for all texts, or with each.
Gradients are first held to the local model's. Time is a multiple of the local step's, without micro-batches and with
some. Bytes are those of the arrays at the client's and the servers' boundaries; beside them what Petals' scheme sends
of prompts for the same step: prompt rows with each row's text, there and back, and a copy of deep prompts for each row
of the batch, and as many gradients back.
"""

import tempfile
from functools import partial
from typing import Any

import torch
import transformers

import ptune
from ptune import remote
from ptune.demo import minilm_folder

from .timing import interleaved, options, report

ROWS, LENGTH, COUNT, SERVERS = 32, 64, 16, 2
MICRO_BATCHES = (32, 16, 8, 4)
VOCABULARY = 20000
MODES = {
    "shallow": {"tuning_mode": "ptune", "pre_seq_len": COUNT},
    "deep": {"tuning_mode": "deep_ptune", "pre_seq_len": COUNT, "deep_prompt_mode": "add"},
}


def step(model: Any, batch: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    model(**batch).loss.backward()


def checked(far: Any, local: Any, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes that a step of ``far`` sends, whose gradients are those of ``local`` after one of its own."""
    far.load_state_dict(local.state_dict(), strict=False)
    far.remote.link.traffic.clear()  # of what random prompts were begun from
    step(far, batch)
    for mine, other in zip(far.prompt_parameters(), local.prompt_parameters(), strict=True):
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-4 * scale)
    return dict(far.remote.link.traffic)


def timed(what: str, here: float, there: float, whole: float | None = None) -> dict[str, str]:
    return {
        "what": what,
        "local ms": f"{here * 1e3:.0f}",
        "remote ms": f"{there * 1e3:.0f}",
        "of local": f"{there / here:.2f}",
        "of no micro-batches": "" if whole is None else f"{there / whole:.2f}",
    }


def counted(what: str, number: int, petals: int | None = None) -> dict[str, str]:
    if petals is None:
        return {"what": what, "bytes": str(number)}
    times = f" ({petals / number:.0f} times smaller)"
    return {"what": what + times, "bytes": str(number), "bytes, as Petals": str(petals)}


def expanded(local: Any) -> int:
    """Bytes of deep prompts that are copied for each row of a batch."""
    _, deep = local.get_prompt(ROWS)
    return 0 if deep is None else deep.nbytes


def minilm_rows(batch: dict[str, torch.Tensor], rounds: int) -> list[dict[str, str]]:
    base, batch = str(minilm_folder()), batch | {"labels": torch.randint(2, (ROWS,))}
    local = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(base, **MODES["deep"]).eval()
    servers = remote.serve_blocks(model=base, servers=SERVERS)
    servers.wait()
    step(local, batch)
    far, traffic = {}, {}
    for rows in MICRO_BATCHES:
        far[rows] = remote.AutoDistributedModelForSequenceClassification.from_pretrained(
            base, servers=servers, micro_batch=rows, **MODES["deep"]
        ).eval()
        traffic[rows] = checked(far[rows], local, batch)
    seconds = interleaved(
        {"local": partial(step, local, batch)} | {rows: partial(step, model, batch) for rows, model in far.items()},
        rounds,
    )
    servers.stop()
    steps = [
        timed(f"step, micro-batches of {rows}", seconds["local"], seconds[rows], seconds[ROWS])
        for rows in MICRO_BATCHES
    ]
    petals = dict.fromkeys(("prompts", "prompt gradients"), expanded(local))
    return steps + [counted(name, number, petals.get(name)) for name, number in traffic[ROWS].items()]


def llama_rows(batch: dict[str, torch.Tensor], rounds: int, base: str) -> list[dict[str, str]]:
    batch = batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    servers = remote.serve_blocks(model=base, servers=SERVERS)
    servers.wait()
    steps, counts = [], []
    for mode, settings in MODES.items():
        local = ptune.AutoPTuneModelForCausalLM.from_pretrained(base, **settings).eval()
        step(local, batch)
        shared, apart = (
            remote.AutoDistributedModelForCausalLM.from_pretrained(
                base, servers=servers, micro_batch=8, prefix_sharing=sharing, **settings
            ).eval()
            for sharing in (True, False)
        )
        sent, with_text = (checked(model, local, batch) for model in (shared, apart))
        for where in ("", " between servers"):
            ours = sum(sent[name + where] for name in ("prompts", "prompt gradients"))
            # with each text, states of prompt rows travel, and as many gradients
            theirs = 2 * (with_text["hidden" + where] - sent["hidden" + where])
            theirs += 0 if where else 2 * expanded(local)
            counts.append(counted(f"Llama, {mode}: prompts and their gradients{where}", ours, theirs))
        seconds = interleaved(
            {"local": partial(step, local, batch)}
            | {name: partial(step, model, batch) for name, model in (("shared", shared), ("with each text", apart))},
            rounds,
        )
        steps += [
            timed(f"Llama, {mode}: prompt rows {name}", seconds["local"], seconds[name])
            for name in ("shared", "with each text")
        ]
    servers.stop()
    return steps + counts


def main() -> None:
    chosen = options("bench.remote", __doc__, rounds=15)
    torch.manual_seed(0)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[::3, LENGTH // 2 :] = 0
    batch = {"input_ids": torch.randint(1000, VOCABULARY, (ROWS, LENGTH)), "attention_mask": mask}
    rows = minilm_rows(batch, chosen.rounds)
    with tempfile.TemporaryDirectory() as folder:
        rows += llama_rows(batch, chosen.rounds, folder)
    rows = [dict.fromkeys((*rows[0], "bytes", "bytes, as Petals"), "") | row for row in rows]
    for row in rows:
        print(row)
    report(chosen, "remote", f"MiniLM, {ROWS} rows of {LENGTH}, {COUNT} prompt rows, {SERVERS} servers", rows)


if __name__ == "__main__":
    main()
