"""``python -m bench.train_step``: one training step with shared prompts beside PEFT's, as one dated table.

A step is forward, backward and optimizer. Each point (m prompt rows, n text tokens, b texts) compares prompts with
PEFT's PROMPT_TUNING, and deep prompts with its PREFIX_TUNING. B is the number of rows that a block computes without
sharing over that with it: b(m + n) / (m + bn). The other way is a step of ours with prompt rows apart from the text
where they are packed with it, and packed where they are apart. Saved is the memory that a forward keeps for its
backward; RSS is by how much a process that trains grows.
"""

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import ptune

from .timing import interleaved, options, report

POINTS = ((20, 128, 8), (100, 32, 16), (100, 128, 8), (200, 64, 16), (100, 32, 2))
VOCABULARY = 2048
PAIRS = {"ptune": "PROMPT_TUNING", "deep_ptune": "PREFIX_TUNING"}


def config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip


def ours(mode: str, rows: int, sharing: bool = True) -> Any:
    torch.manual_seed(0)
    return ptune.AutoPTuneModelForCausalLM.from_config(
        config(), tuning_mode=mode, pre_seq_len=rows, prefix_sharing=sharing
    )


def theirs(mode: str, rows: int) -> Any:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config())
    kind = peft.PromptTuningConfig if PAIRS[mode] == "PROMPT_TUNING" else peft.PrefixTuningConfig
    return peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=rows))


def batch(length: int, size: int, padded: bool = False) -> dict[str, torch.Tensor]:
    """``padded``: all texts but the first end somewhere behind their half."""
    ids = torch.randint(VOCABULARY, (size, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[1:] = torch.arange(length) < torch.randint(length // 2, length, (size - 1, 1)) + 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # PEFT predicts the first token from the last prompt row
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def run() -> float:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def in_passes(model: Any, run: Callable[[], Any], packs: bool) -> None:
    """A step with the prompt rows packed with the text in one pass, or in a pass of their own before it."""
    model.prefix_plan.packs = packs
    run()
    model.prefix_plan.packs = None


def check(mode: str, model: Any, other: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Refuses to time steps that differ: from PEFT's where the prompts mean the same, else from the concat path's."""
    if mode == "deep_ptune":
        other = ours(mode, model.ptune_config.pre_seq_len, sharing=False)
        pairs = [(model.intermediate_prompt_embeddings, other.intermediate_prompt_embeddings)]
    else:
        pairs = []
    mine = model.prompt_embeddings
    pairs.append((mine, other.prompt_encoder.default.embedding if mode == "ptune" else other.prompt_embeddings))
    with torch.no_grad():
        for one, two in pairs:
            two.weight.copy_(one.weight)
    losses = [m(**inputs).loss for m in (model, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for one, two in pairs:
        torch.testing.assert_close(one.weight.grad, two.weight.grad, rtol=0, atol=1e-5 * two.weight.grad.abs().max())


def saved(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that one forward keeps for its backward, parameters aside."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss  # held, so that no storage is freed and its address taken by another
        total = sum(kept.values())
    del loss
    return total


def growth(side: str, mode: str, point: tuple[int, int, int], threads: int, answer: Any) -> None:
    """In a process of its own: by how many KiB three steps make it grow."""
    torch.set_num_threads(threads)
    rows, length, size = point
    model = ours(mode, rows) if side == "ours" else theirs(mode, rows)
    run = step(model, batch(length, size))
    before = resident("VmRSS")
    for _ in range(3):
        run()
    answer.put(resident("VmHWM") - before)


def resident(name: str) -> int:
    """KiB that this process holds (``VmRSS``), or held at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def grown(*arguments: Any) -> int:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=growth, args=(*arguments, answer))
    process.start()
    kib = answer.get()
    process.join()
    return kib


def main() -> None:
    chosen = options("python -m bench.train_step", __doc__, 15)

    table: list[dict[str, str]] = []
    for mode, name in PAIRS.items():
        for point in POINTS:
            rows, length, size = point
            inputs = batch(length, size)
            model, other = ours(mode, rows).train(), theirs(mode, rows).train()
            check(mode, model, other, inputs)
            steps: dict[str, Callable[[], Any]] = {"ours": step(model, inputs), "peft": step(other, inputs)}
            steps["other"] = partial(in_passes, model, steps["ours"], mode == "deep_ptune")
            seconds = interleaved(steps, chosen.rounds)
            kept = saved(other, inputs) / saved(model, inputs)
            rss = [grown(side, mode, point, chosen.threads) for side in ("peft", "ours")]
            bound = size * (rows + length) / (rows + size * length)
            line = {
                "beside": name, "m": str(rows), "n": str(length), "b": str(size), "B": f"{bound:.2f}",
                "ours ms": f"{seconds['ours'] * 1e3:.0f}", "peft ms": f"{seconds['peft'] * 1e3:.0f}",
                "faster": f"{seconds['peft'] / seconds['ours']:.2f}",
                "the other way": f"{seconds['other'] / seconds['ours']:.2f}", "saved": f"{kept:.2f}",
                "RSS": f"{rss[0] / max(1, rss[1]):.2f}",
            }  # fmt: skip
            print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
            table.append(line)
    report(chosen, "train-step", f"peft {peft.__version__}, transformers {transformers.__version__}", table)


if __name__ == "__main__":
    main()
