"""``python -m bench.overhead``: what a call costs before any work is done, beside the eager chain, as one dated table.

The tensors are tiny, so that time is what Python, autograd and the dispatcher take. Forward and backward of those cases
that train; the others under ``no_grad``. Then forward and backward of a tiny Llama of 16 layers with prompt rows,
beside the stock model on the text alone and beside PEFT's prompt tuning.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import peft
import torch
import transformers

import ptune

from .cases import OURS, Case, Sizes, cases
from .timing import interleaved, options, report

CALLS = 200
TINY = Sizes(batch=2, length=4, prompt=2, width=16, heads=2, vocabulary=9)


def calls(case: Case, way: str) -> Callable[[], None]:
    def run() -> None:
        with nullcontext() if case.trained else torch.no_grad():
            for _ in range(CALLS):
                case.run(way)

    return run


def models() -> dict[str, Any]:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=16, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    stock = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return {
        OURS: ptune.AutoPTuneModelForCausalLM.from_config(config, tuning_mode="ptune", pre_seq_len=4),
        "PEFT": peft.get_peft_model(copy.deepcopy(stock), settings),
        "the stock model": stock,
    }


def step(model: Any) -> None:
    """Forward and backward; without a prompt the text's embeddings train, so that gradients pass all blocks."""
    ids = torch.zeros(2, 8, dtype=torch.long)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    inputs = {"input_ids": ids} if trains else {"inputs_embeds": model.get_input_embeddings()(ids).requires_grad_()}
    model(**inputs).logits.sum().backward()


def main() -> None:
    chosen = options("python -m bench.overhead", __doc__, 31)
    rows: list[dict[str, str]] = []
    for case in cases(TINY):
        eager = next(way for way in case.ways if way != OURS and not way.startswith("ours"))
        case.check()
        seconds = interleaved({way: calls(case, way) for way in (OURS, eager)}, chosen.rounds)
        rows.append({
            "case": case.name, "ours us": f"{seconds[OURS] / CALLS * 1e6:.1f}", "beside": eager,
            "its us": f"{seconds[eager] / CALLS * 1e6:.1f}", "ours / its": f"{seconds[OURS] / seconds[eager]:.2f}",
        })  # fmt: skip
        print("  ".join(rows[-1].values()), flush=True)
    seconds = interleaved({name: partial(step, model.train()) for name, model in models().items()}, chosen.rounds)
    for name in ("the stock model", "PEFT"):
        rows.append({
            "case": "a Llama, forward + backward", "ours us": f"{seconds[OURS] * 1e6:.1f}", "beside": name,
            "its us": f"{seconds[name] * 1e6:.1f}", "ours / its": f"{seconds[OURS] / seconds[name]:.2f}",
        })  # fmt: skip
        print("  ".join(rows[-1].values()), flush=True)
    report(chosen, "overhead", f"medians of {CALLS} calls each", rows)


if __name__ == "__main__":
    main()
