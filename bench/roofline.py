"""``python -m bench.roofline BANDWIDTH``: the least that each op must move, and how long that takes at so many GB/s.

An op reads each element that it needs once and writes each of its outputs once, in one launch; in a training step its
backward reads the gradients of the prompt rows and writes their sum (the text's gradient is a view; ``part_qkv`` reads
and writes the gradients of all rows). No op can be faster on a device whose memory moves that much, and whose caches do
not hold it.
"""

import argparse
from typing import NamedTuple

from .cases import TRAINED, Case, Sizes

HALF, FLOAT, ID = 2, 4, 8  # bytes


class Work(NamedTuple):
    read: int
    written: int
    launches: int = 1

    def floor(self, bytes_per_second: float) -> float:
        """Seconds."""
        return (self.read + self.written) / bytes_per_second

    def and_then(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def work(op: str, s: Sizes, train: bool = False) -> Work:
    """Of one call of ``op`` on bfloat16 tensors of sizes ``s``, with its backward if ``train``."""
    prompt, text, table = s.prompt * s.width, s.batch * s.length * s.width, s.vocabulary * s.width
    prompt_rows = s.batch * prompt
    ids = s.batch * s.length
    forward = {
        "embed_and_prepend": Work(prompt * FLOAT + ids * ID + min(text, table) * HALF, (prompt_rows + text) * HALF),
        "prepend": Work(prompt * FLOAT + text * HALF, (prompt_rows + text) * HALF),
        "overwrite": Work(prompt * FLOAT + text * HALF, (prompt_rows + text) * HALF),
        "prepend_kv": Work(2 * (prompt * FLOAT + text * HALF), 2 * (prompt_rows + text) * HALF),
        "cast_qkv": Work(3 * text * FLOAT, 3 * text * HALF),
        "overwrite_": Work(prompt * FLOAT, prompt_rows * HALF),
        "part_qkv": Work(2 * (prompt + text) * HALF, 2 * (prompt_rows + text) * HALF),
    }[op]
    if not train:
        return forward
    if op == "part_qkv":  # the gradients of all rows, in one launch for the texts' and one for the prompt's
        read = 3 * prompt + 2 * prompt_rows + 3 * text
        return forward.and_then(Work(read * HALF, 3 * (prompt + text) * HALF, 2))
    pools = 2 if op == "prepend_kv" else 1
    return forward.and_then(Work(pools * prompt_rows * HALF, pools * prompt * FLOAT, pools))


def work_of(case: Case) -> Work:
    forward = work(case.op, case.sizes)
    assert forward.written == case.output_bytes, f"{case.op}: the model and the op do not write the same"
    return work(case.op, case.sizes, bool(case.trained))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("bandwidth", type=float, help="of memory, in GB/s")
    chosen = parser.parse_args()
    sizes = Sizes()
    print(sizes)
    for op in ("embed_and_prepend", "prepend", "overwrite", "prepend_kv", "cast_qkv", "part_qkv", "overwrite_"):
        for train in (False, True) if op in TRAINED else (op == "part_qkv",):
            w, name = work(op, sizes, train), op + (", forward + backward" if train else "")
            print(
                f"{name:<38} {w.read:>12,} bytes read {w.written:>12,} written "
                f"{w.launches} launches {w.floor(chosen.bandwidth * 1e9) * 1e6:>9.1f} us"
            )


if __name__ == "__main__":
    main()
