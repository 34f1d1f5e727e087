"""``python -m bench.overhead``: what a call costs before any work is done, beside the eager chain, as one dated table.

The tensors are tiny, so that time is what Python, autograd and the dispatcher take. Forward and backward of those cases
that train; the others under ``no_grad``.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch

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
    report(chosen, "overhead", f"medians of {CALLS} calls each", rows)


if __name__ == "__main__":
    main()
