"""``python -m bench.remote``: blocks on servers of this machine beside the same model without, as one dated table.

A training step of MiniLM with deep prompts, its six blocks on two servers: forward and backward, b = 32, m = 16.
Gradients are first held to the local model's. Time is a multiple of the local step's, without micro-batches and with
some. Bytes are those of the arrays at the client's boundary; beside them what Petals' scheme sends of prompts for the
same step: a copy for each row of the batch, and as many gradients back.
"""

from functools import partial
from typing import Any

import torch

import ptune
from ptune import remote
from ptune.demo import minilm_folder

from .timing import interleaved, options, report

ROWS, LENGTH, COUNT, SERVERS = 32, 64, 16, 2
MICRO_BATCHES = (32, 16, 8, 4)
SETTINGS = {"tuning_mode": "deep_ptune", "pre_seq_len": COUNT, "deep_prompt_mode": "add"}


def step(model: Any, batch: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    model(**batch).loss.backward()


def main() -> None:
    chosen = options("bench.remote", __doc__, rounds=15)
    base = str(minilm_folder())
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[::3, LENGTH // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, (ROWS,))}
    local = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(base, **SETTINGS).eval()
    servers = remote.serve_blocks(model=base, servers=SERVERS)
    servers.wait()
    far = {}
    for rows in MICRO_BATCHES:
        far[rows] = remote.AutoDistributedModelForSequenceClassification.from_pretrained(
            base, servers=servers, micro_batch=rows, **SETTINGS
        ).eval()
        far[rows].load_state_dict(local.state_dict(), strict=False)
    step(local, batch)
    for model in far.values():
        model.remote.link.traffic.clear()  # of what random prompts were begun from
        step(model, batch)
        for mine, other in zip(model.prompt_parameters(), local.prompt_parameters(), strict=True):
            scale = other.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-4 * scale)
    traffic = dict(far[ROWS].remote.link.traffic)

    seconds = interleaved(
        {"local": partial(step, local, batch)} | {rows: partial(step, model, batch) for rows, model in far.items()},
        chosen.rounds,
    )
    rows = [
        {
            "what": f"step, micro-batches of {rows}",
            "local ms": f"{seconds['local'] * 1e3:.0f}",
            "remote ms": f"{seconds[rows] * 1e3:.0f}",
            "of local": f"{seconds[rows] / seconds['local']:.2f}",
            "of no micro-batches": f"{seconds[rows] / seconds[ROWS]:.2f}",
        }
        for rows in MICRO_BATCHES
    ]
    _, deep = local.get_prompt(ROWS)
    expanded = {"prompts": deep.nbytes, "prompt gradients": deep.nbytes}
    for row in rows:
        row |= {"bytes": "", "bytes, as Petals": ""}
    for name, number in traffic.items():
        row = dict.fromkeys(rows[0], "") | {"what": name, "bytes": str(number)}
        if name in expanded:
            row["bytes, as Petals"] = str(expanded[name])
            row["what"] += f" ({expanded[name] / number:.0f} times smaller)"
        rows.append(row)
    for row in rows:
        print(row)
    report(chosen, "remote", f"MiniLM, {ROWS} rows of {LENGTH}, {COUNT} prompt rows, {SERVERS} servers", rows)
    servers.stop()


if __name__ == "__main__":
    main()
