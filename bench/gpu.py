"""``python -m bench.gpu``: the ops, a training step and generation on a GPU, as a dated JSON file and a picture.

Every op from a few KB to a GB on both of our backends, beside PEFT's and Petals' chains, these compiled, and a copy of
the output, timed by events with a cold L2 cache; at the smallest size also what a call costs the host. A training step
and generation of Llamas of 1B and 8B parameters (random weights, bfloat16) beside PEFT, the step with prompt rows apart
from the text too, and which share of a step's GPU time goes into our kernels; a step whose blocks are compiled, which
the host then does not hold up. Every figure is the median of rounds in which all ways took their turn.

``--parts`` runs some of it, beside what today's file has of the others. ``--rehearse`` goes the same way on the CPU,
with tiny sizes, and writes nothing.
"""

import argparse
import copy
import datetime
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import peft
import torch
import transformers
import triton
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers.modeling_layers import GradientCheckpointingLayer
from triton.testing import do_bench

import ptune
import ptune_kernels
from ptune.models import ptune_class
from ptune_kernels import native

from .cases import COPY, OURS, Case, Sizes, cases
from .generate import run as generate
from .roofline import work_of
from .timing import RESULTS, interleaved
from .train_step import PAIRS, batch, in_passes, step

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROUNDS = 5
OUR_KERNELS = re.compile("_(prepend|strip|cast|overwrite|sum|join).*_kernel|(Assemble|Plain|Strip|Overwrite|Sum)Rows")
SIZES = (
    Sizes(batch=1, length=1, prompt=4, width=1024, heads=8),
    Sizes(batch=4, length=64, prompt=16, width=2048, heads=16),
    Sizes(batch=16, length=496, prompt=16, width=4096),
    Sizes(batch=64, length=2016, prompt=32, width=4096),
)
TINY = (Sizes(batch=2, length=4, prompt=2, width=16, heads=2, vocabulary=9),)
POINTS = ((20, 128, 16), (100, 64, 32), (200, 256, 8))
LLAMAS = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
PARTS = ("ops", "training", "generation", "compiled")
TINY_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8}


def medians(ways: dict[str, Callable[[], Any]], seconds: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
    """Of what ``seconds`` says of each way, in interleaved rounds."""
    rounds = [{way: seconds(run) for way, run in ways.items()} for _ in range(ROUNDS)]
    return {way: statistics.median(taken[way] for taken in rounds) for way in ways}


def kernel_seconds(ways: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """On a GPU of launches that find the L2 cache cold, by events."""
    if device == "cpu":
        return interleaved(ways, ROUNDS)
    return medians(ways, lambda run: do_bench(run, warmup=2, rep=8, return_mode="median") / 1e3)


def host_seconds(ways: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """What a call costs the host where nothing waits for it."""
    calls = 1 if device == "cpu" else 200

    def seconds(run: Callable[[], Any]) -> float:
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls

    return medians(ways, seconds)


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def wall_seconds(ways: dict[Any, Callable[[], Any]], device: str) -> dict[Any, float]:
    """Medians of calls that are waited for."""

    def waited(run: Callable[[], Any]) -> None:
        run()
        synchronise(device)

    return interleaved({way: partial(waited, run) for way, run in ways.items()}, ROUNDS)


def backends(device: str) -> list[str]:
    return ["native"] if device == "cpu" else ["triton"] + ["native"] * native.loaded("cuda")


def on_backend(case: Case, backend: str) -> Callable[[], None]:
    def run() -> None:
        with ptune_kernels.use_backend(backend):
            case.run(OURS)

    return run


def ops(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    for sizes in TINY if tiny else SIZES:
        making = cases(sizes)
        while (case := next_on(device, making)) is not None:
            torch.compiler.reset()  # every case compiles for its own sizes, as the first would
            ways: dict[str, Callable[[], Any]] = {f"ours, {b}": on_backend(case, b) for b in backends(device)}
            ways |= {way: partial(case.run, way) for way in case.ways if way != OURS}
            for backend in backends(device):
                with ptune_kernels.use_backend(backend):
                    case.check()
            seconds = kernel_seconds(ways, device)
            row = {
                "case": case.name, "output bytes": case.output_bytes, **vars(sizes),
                "us": {way: taken * 1e6 for way, taken in seconds.items()},
                "floor us": work_of(case).floor(2 * case.output_bytes / seconds[COPY]) * 1e6,
            }  # fmt: skip
            if sizes in (SIZES[0], *TINY):
                row["host us"] = {way: taken * 1e6 for way, taken in host_seconds(ways, device).items()}
            yield row


def next_on(device: str, making: Iterator[Case]) -> Case | None:
    gc.collect()  # the largest cases do not fit beside one another
    with torch.device(device):
        return next(making, None)


def llama(sizes: dict[str, int], device: str) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=2048, num_key_value_heads=8, max_position_embeddings=1024, **sizes, dtype=torch.bfloat16
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def pair(base: Any, mode: str, rows: int, device: str) -> dict[str, Any]:
    """A model with prompts of ours and one with PEFT's, on the weights of ``base``."""
    gc.collect()  # what the last pair held
    ours, theirs = (copy.deepcopy(base, {id(p): p for p in base.parameters()}) for _ in range(2))
    ours.__class__ = ptune_class(type(ours))
    ours.adopt([])
    ours.init_prompts(ptune.PTuneConfig(tuning_mode=mode, pre_seq_len=rows))
    kind = peft.PromptTuningConfig if PAIRS[mode] == "PROMPT_TUNING" else peft.PrefixTuningConfig
    return {
        "ours": ours,
        "peft": peft.get_peft_model(theirs, kind(task_type="CAUSAL_LM", num_virtual_tokens=rows)).to(device),
    }


def peak(run: Callable[[], Any], device: str) -> int:
    """Bytes that a step needs beyond what is there before it."""
    if device == "cpu":
        run()
        return 1
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def share_of_ours(run: Callable[[], Any], device: str) -> float:
    """Which part of the GPU's time goes into our kernels."""
    with profile(activities=[ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA]) as profiled:
        run()
        synchronise(device)
    kernels = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels)
    mine = sum(event.self_device_time_total for event in kernels if OUR_KERNELS.search(event.key))
    return mine / total if total else 0.0


def training(name: str, base: Any, points: Any, device: str) -> Iterator[dict[str, Any]]:
    for mode, beside in PAIRS.items():
        # most batches of texts hold padding: one point with it shows what it costs
        padded = [(points[len(points) // 2], True)] if mode == "ptune" else []
        for (rows, length, size), pads in [*((point, False) for point in points), *padded]:
            with torch.device(device):
                inputs = batch(length, size, pads)
            models = pair(base, mode, rows, device)
            steps = {side: step(model.train(), inputs) for side, model in models.items()}
            steps["apart"] = partial(in_passes, models["ours"], steps["ours"], False)
            memory = {side: peak(run, device) for side, run in steps.items()}
            seconds = wall_seconds(steps, device)
            yield {
                "model": name, "beside": beside, "m": rows, "n": length, "b": size, "padded": pads,
                "B": size * (rows + length) / (rows + size * length),
                "ms": {side: taken * 1e3 for side, taken in seconds.items()},
                "time, peft / ours": seconds["peft"] / seconds["ours"],
                "time, apart / packed": seconds["apart"] / seconds["ours"],
                "peak memory, peft / ours": memory["peft"] / memory["ours"],
                "our kernels / all": share_of_ours(steps["ours"], device),
            }  # fmt: skip


def compiled(name: str, base: Any, points: Any, device: str) -> Iterator[dict[str, Any]]:
    """A step with prompt tuning, each block one graph that all blocks share."""
    for rows, length, size in points:
        torch.compiler.reset()
        with torch.device(device):
            inputs = batch(length, size)
        models = pair(base, "ptune", rows, device)
        for model in models.values():
            model.config.use_cache = False  # PEFT's would fill one, and every block be a graph of its own
            for block in model.modules():
                if isinstance(block, GradientCheckpointingLayer):
                    block.compile(dynamic=False)
        seconds = wall_seconds({side: step(model.train(), inputs) for side, model in models.items()}, device)
        yield {
            "model": name, "m": rows, "n": length, "b": size, "B": size * (rows + length) / (rows + size * length),
            "ms": {side: taken * 1e3 for side, taken in seconds.items()},
            "time, peft / ours": seconds["peft"] / seconds["ours"],
        }  # fmt: skip


def generation(name: str, base: Any, points: Any, device: str) -> Iterator[dict[str, Any]]:
    new = 17
    for rows, length, size in points:
        ids = torch.randint(3, 2048, (size, length), device=device)
        models = pair(base, "ptune", rows, device)
        models["ours"].compile_prompts()
        ways = {
            (side, n): partial(generate, model.eval(), ids, n) for side, model in models.items() for n in (1, new)
        }  # fmt: skip
        seconds = wall_seconds(ways, device)
        each = {side: (seconds[side, new] - seconds[side, 1]) / (new - 1) for side in models}
        yield {
            "model": name, "m": rows, "n": length, "b": size,
            "first token ms": {side: seconds[side, 1] * 1e3 for side in models},
            "first token, peft / ours": seconds["peft", 1] / seconds["ours", 1],
            "each token ms": {side: taken * 1e3 for side, taken in each.items()},
            "each token, peft / ours": each["peft"] / each["ours"],
        }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time over the floor, by the bytes of the output."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(2, (len(names) + 1) // 2, figsize=(22, 9), layout="constrained", sharey=True)
    for name, axis in zip(names, axes.flat, strict=False):
        for way in next(row["us"] for row in rows if row["case"] == name):
            points = [(row["output bytes"], row["us"][way] / row["floor us"]) for row in rows if row["case"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=way)
        axis.set(xscale="log", title=name, xlabel="bytes of the output", ylim=(0, 6))
        axis.legend(fontsize=7)
    axes[0, 0].set_ylabel("time / floor")
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=120)


def about(device: str) -> str:
    where = "CPU" if device == "cpu" else torch.cuda.get_device_name()
    libraries = ", ".join(
        f"{library.__name__} {library.__version__}" for library in (torch, triton, transformers, peft)
    )
    return f"{where}, {libraries}, medians of {ROUNDS} interleaved rounds, {datetime.date.today().isoformat()}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes, writing nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    chosen = parser.parse_args()
    device = "cpu" if chosen.rehearse else "cuda"
    if not chosen.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --rehearse goes the same way on the CPU")
    llamas = {"tiny": TINY_LLAMA} if chosen.rehearse else LLAMAS
    points = ((3, 5, 2),) if chosen.rehearse else POINTS
    date = datetime.date.today().isoformat()
    path = chosen.out / f"gpu-{date}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, Any] = {"about": about(device)}
    found |= {part: [] if part in chosen.parts else before.get(part, []) for part in PARTS}

    def note(kind: str, row: dict[str, Any]) -> None:
        found[kind].append(row)
        print(kind, json.dumps(row), flush=True)
        if not chosen.rehearse:
            # as soon as it is known: a run that is broken off has shown something
            chosen.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1))

    if "ops" in chosen.parts:
        for row in ops(device, chosen.rehearse):
            note("ops", row)
        if not chosen.rehearse:
            draw(found["ops"], path.with_suffix(".png"), found["about"])
    for name, sizes in llamas.items():
        base = llama(sizes, device)
        for part, rows_of in (("training", training), ("generation", generation)):
            for row in rows_of(name, base, points, device) if part in chosen.parts else ():
                note(part, row)
    for name, sizes in llamas.items() if "compiled" in chosen.parts else ():
        for row in compiled(name, llama(sizes, device), points[:2], device):
            note("compiled", row)
    print(found["about"])


if __name__ == "__main__":
    main()
