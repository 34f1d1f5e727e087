"""``python -m bench.watch``: a forward pass of MiniLM that `ptune.precision.watch` looks at, beside a plain one.

32 texts of 64 tokens. A way is timed over as many calls as there are from one sampled call to the next, so that each
holds exactly one of these; times are of one call.
"""

from functools import partial
from typing import Any

import torch
import transformers

import ptune
from ptune.demo import minilm_folder
from ptune.precision.online import EVERY

from .timing import interleaved, options, report

BATCH, LENGTH = 32, 64
WAYS = {"float32": None, "hybrid bfloat16": torch.bfloat16}


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> None:
    for _ in range(EVERY):
        model(input_ids=ids)


def check(model: Any, ids: torch.Tensor) -> None:
    """Refuses to time a watch that does not see what it should."""
    seen: list[float] = []
    block = model.encoder.layer[2]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output.abs().max().item()))
    watching = ptune.precision.watch(model)
    with torch.no_grad():
        model(input_ids=ids)
    (record,) = (r for r in watching.report() if (r["name"], r["tensor"]) == ("encoder.layer.2", "output"))
    watching.remove()
    handle.remove()
    if record["amax"] != seen[0]:
        raise AssertionError(f"the watch saw {record['amax']}, and a hook {seen[0]}")


def main() -> None:
    chosen = options("python -m bench.watch", __doc__, 15)

    ids = torch.randint(1000, 30000, (BATCH, LENGTH))
    table = []
    for name, dtype in WAYS.items():
        plain, watched = (transformers.AutoModel.from_pretrained(minilm_folder()).eval() for _ in range(2))
        for model in (plain, watched):
            ptune.hybrid(model, attn_dtype=dtype)
        check(watched, ids)
        ptune.precision.watch(watched)
        seconds = interleaved(
            {way: partial(run, m, ids) for way, m in (("plain", plain), ("watched", watched))}, chosen.rounds
        )
        for way, taken in seconds.items():
            row = {
                "model": name, "b": str(BATCH), "n": str(LENGTH), "way": way, "ms": f"{taken / EVERY * 1e3:.1f}",
                "time / plain": f"{taken / seconds['plain']:.3f}",
            }  # fmt: skip
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            table.append(row)
    report(chosen, "watch", f"transformers {transformers.__version__}", table)


if __name__ == "__main__":
    main()
