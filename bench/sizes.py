"""``python -m bench.sizes``: ops from 4 KB to 1 GB beside the floor of `bench.roofline`, on one and on several threads.

The floor takes its bandwidth from a copy of the output on as many threads, in the same rounds. Ours alone, with no
gradients: what others take is in `bench`. With THP_MEM_ALLOC_ENABLE=1 in the environment torch asks for large pages, as
our ops do: then the copies do not wait for the system's small ones.
"""

import os
from functools import partial

import torch

from .cases import COPY, OURS, TRAINED, Case, Sizes, cast_qkv
from .roofline import work_of
from .timing import interleaved, options, report

# Outputs of 4 KB, 64 KB, 1, 16, 64, 256 MB and 1 GB; a sixteenth of them are prompt rows.
SIZES = (
    Sizes(batch=1, length=15, prompt=1, width=128, heads=4, vocabulary=1000),
    Sizes(batch=2, length=15, prompt=1, width=1024, heads=8, vocabulary=1000),
    Sizes(batch=4, length=60, prompt=4, width=2048, heads=16),
    Sizes(batch=8, length=240, prompt=16, width=4096),
    Sizes(batch=32, length=240, prompt=16, width=4096),
    Sizes(batch=64, length=480, prompt=32, width=4096),
    Sizes(batch=256, length=480, prompt=32, width=4096),
)


def on_threads(threads: int, case: Case, way: str) -> None:
    torch.set_num_threads(threads)
    case.run(way)


def measure(case: Case, rounds: int, most: int) -> dict[str, str]:
    threads = 1, most
    ways = {(n, way): partial(on_threads, n, case, way) for n in threads for way in (OURS, COPY)}
    seconds = interleaved(ways, rounds)
    row = {"op": case.op, "output KB": f"{case.output_bytes / 2**10:.0f}"}
    for n in threads:
        floor = work_of(case).floor(2 * case.output_bytes / seconds[n, COPY])
        row[f"time / floor, {n} thread{'s' * (n > 1)}"] = f"{seconds[n, OURS] / floor:.2f}"
        row[f"time / clone, {n} thread{'s' * (n > 1)}"] = f"{seconds[n, OURS] / seconds[n, COPY]:.2f}"
    for name, way in (("ours", OURS), ("clone", COPY)):
        row[f"{name}, 1 thread / {most}"] = f"{seconds[1, way] / seconds[most, way]:.2f}"
    return row


def main() -> None:
    chosen = options("python -m bench.sizes", __doc__, 15)
    rows = []
    for sizes in SIZES:
        for make in (*(partial(make, train=False) for make in TRAINED.values()), cast_qkv):
            rows.append(measure(make(sizes), chosen.rounds, chosen.threads))
            print("  ".join(rows[-1].values()), flush=True)
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        report(chosen, "sizes-large-pages", "no gradients, THP_MEM_ALLOC_ENABLE=1", rows)
    else:
        report(chosen, "sizes", "no gradients", rows)


if __name__ == "__main__":
    main()
