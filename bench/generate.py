"""``python -m bench.generate``: generation with compiled prompts beside PEFT's, as one dated table.

Time to the first token is that of ``generate`` with one new token; time per token is what each of the others adds. The
same prompt, texts and tokens on both sides.
"""

from functools import partial
from typing import Any

import peft
import torch
import transformers

from .timing import interleaved, options, report
from .train_step import VOCABULARY, ours, theirs

ROWS, NEW = 100, 33
POINTS = ((32, 1), (32, 8), (128, 8))


def count_prompt_rows(model: Any, ids: torch.Tensor) -> int:
    """How many rows more than the text's a call of generate runs."""
    seen = 0

    def note(module: Any, args: Any) -> None:
        nonlocal seen
        seen += args[0].shape[0] * args[0].shape[1]

    handle = model.model.layers[0].register_forward_pre_hook(note)
    run(model, ids, NEW)
    handle.remove()
    return seen - ids.shape[0] * (ids.shape[1] + NEW - 1)


@torch.no_grad()
def run(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    mask = torch.ones_like(ids)
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )[:, -new:]


def main() -> None:
    chosen = options("python -m bench.generate", __doc__, 10)

    mine, other = ours("ptune", ROWS).eval(), theirs("ptune", ROWS).eval()
    with torch.no_grad():
        other.prompt_encoder.default.embedding.weight.copy_(mine.prompt_embeddings.weight)
    mine.compile_prompts()
    table = []
    for length, size in POINTS:
        ids = torch.randint(3, VOCABULARY, (size, length))
        if not torch.equal(run(mine, ids, NEW), run(other, ids, NEW)):
            raise AssertionError("the two generate different tokens")
        if (rows := count_prompt_rows(mine, ids)) != 0:
            raise AssertionError(f"{rows} prompt rows were run, after the prompts were compiled")
        ways = {
            (side, new): partial(run, model, ids, new) for side, model in (("ours", mine), ("peft", other))
            for new in (1, NEW)
        }  # fmt: skip
        seconds = interleaved(ways, chosen.rounds)
        first = {side: seconds[side, 1] for side in ("ours", "peft")}
        each = {side: (seconds[side, NEW] - first[side]) / (NEW - 1) for side in first}
        row = {"m": str(ROWS), "n": str(length), "b": str(size)}
        for name, times in (("first token", first), ("each token", each)):
            row |= {f"{name}, {side} ms": f"{value * 1e3:.1f}" for side, value in times.items()}
            row[f"{name}, faster"] = f"{times['peft'] / times['ours']:.2f}"
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        table.append(row)
    report(chosen, "generate", f"peft {peft.__version__}, transformers {transformers.__version__}", table)


if __name__ == "__main__":
    main()
