"""The tables that the op tests run over: targets, sizes, dtypes, layouts, placements, and each op with its inputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import ptune_kernels
from ptune_kernels import Placement

from . import oracle

# --- targets: a backend on a device ---


@dataclass(frozen=True)
class Target:
    backend: str
    device: str

    @property
    def interpreted(self):
        return self.backend == "triton" and self.device == "cpu"

    def ulps(self, dtype):
        """How far a rounded result may be from torch's: Triton's interpreter truncates to bfloat16, hardware rounds."""
        return 1 if self.interpreted and dtype == torch.bfloat16 else 0

    def op(self, name):
        return getattr(getattr(torch.ops, f"ptune_{self.backend}"), name).default

    def missing(self):
        """Why this target cannot run here, or None."""
        if self.backend == "native" and not ptune_kernels.native.loaded(self.device):
            return f"no compiled {self.device} library"
        return None


# Without a GPU its targets are left out, not skipped a thousand times; test_cuda.py skips aloud.
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
TARGETS = [Target(backend, device) for device in DEVICES for backend in ("reference", "native", "triton")]


def _param(target, *values, name):
    marks = [pytest.mark.cuda] if target.device == "cuda" else []
    if reason := target.missing():
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(target, *values, marks=marks, id=f"{target.backend}-{target.device}{name}")


def on_targets(function):
    """Parametrises a test over `target`."""
    return pytest.mark.parametrize("target", [_param(target, name="") for target in TARGETS])(function)


def on_targets_and_sizes(function):
    """Parametrises a test over `target` and `sizes`, with a short table for Triton's slow interpreter."""
    table = [
        _param(target, sizes, name="-" + "x".join(map(str, sizes)))
        for target in TARGETS
        for sizes in (SMALL_SIZES if target.interpreted else SIZES)
    ]
    return pytest.mark.parametrize(("target", "sizes"), table)(function)


# --- sizes, dtypes, layouts, placements ---

# batch, prompt rows, text rows, width
SMALL_SIZES = [(2, 3, 5, 7), (2, 0, 2, 3), (2, 2, 0, 5), (0, 2, 3, 4), (1, 2, 1, 63)]
SIZES = [
    *SMALL_SIZES,
    (1, 1, 1, 1),
    (2, 1, 2, 384),
    (5, 7, 2, 1),
    (3, 16, 9, 3),
    (2, 5, 3, 123),
    (3, 4, 7, 257),
    (1, 2, 1, 4096),
    (1, 0, 0, 8),
    (0, 0, 0, 1),
    (17, 2, 1, 33),
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TEXT_DTYPES = (*FLOATS, torch.float64)
KV_DTYPES = [(prefix, text) for prefix in FLOATS for text in FLOATS] + [(torch.float64, torch.float64)]


def dtypes_for(target, sizes):
    """Every dtype of text; for Triton's slow interpreter, at the first sizes alone."""
    return TEXT_DTYPES if not target.interpreted or sizes == SMALL_SIZES[0] else (torch.float32, torch.bfloat16)


LAYOUTS = ("contiguous", "offset", "heads", "transposed", "stepped", "expanded")


def lay_out(tensor, layout):
    """The same values in other memory (with "expanded", the first row's values for the whole batch)."""
    if layout == "offset":  # storage offset 1: no 16-byte alignment anywhere
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if layout == "heads" and tensor.dim() == 4:  # side by side in each row, as attention is given them
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":  # the order of the dimensions reversed
        return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))
    if layout == "stepped":  # every other element of the last dimension, every third row
        spread = tensor.new_zeros(*tensor.shape[:-2], tensor.shape[-2] * 3, tensor.shape[-1] * 2)
        spread[..., ::3, ::2] = tensor
        return spread[..., ::3, ::2]
    if layout == "expanded":  # stride 0 over the batch
        return tensor[:1].expand_as(tensor)
    return tensor.contiguous()


def random_placement(batch, pool_rows, text_rows, device, within=False):
    """Rows anywhere in the pool (overlapping, some empty) at any column; `within`: they fit in text_rows rows."""
    longest = min(pool_rows, text_rows) if within else pool_rows
    lengths = [int(torch.randint(0, longest + 1, ())) for _ in range(batch)]
    starts = [int(torch.randint(0, pool_rows - length + 1, ())) for length in lengths]
    room = [text_rows - (length if within else 0) for length in lengths]
    columns = [int(torch.randint(0, free + 1, ())) for free in room]
    start, length, column = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths, columns))
    # A maximum above every length puts zeros in every row.
    return Placement(start, length, column, max(lengths, default=0) + int(torch.randint(0, 3, ())))


# --- the ops ---


@dataclass(frozen=True)
class Op:
    """One public op with its options, and how to make inputs for it."""

    name: str
    make: Callable  # (b, m, n, d, dtype, device) -> the tensors, in the order of the arguments
    differentiable: tuple[int, ...]  # which of the tensors get a gradient
    options: tuple[tuple[str, object], ...] = ()
    label: str = ""
    pools: tuple[int, ...] = ()  # which of them are prompts, whose gradients are sums over the batch
    views: tuple[int, ...] = ()  # which outputs are views, of inputs or of other outputs
    overwrites: bool = False  # its placement lies within hidden, which has m + n rows

    def __str__(self):
        return self.name + self.label

    def case(self, sizes, dtype, device, placed):
        """(tensors, keywords) for one call."""
        b, m, n, d = sizes
        keywords = dict(self.options)
        if self.name in ("part_qkv", "spread_kv"):
            b = max(b, 1)
            keywords |= {"num_prompts": m, "batch_size": b}
        elif placed and self.name != "cast_qkv":
            keywords["placement"] = random_placement(b, m, m + n if self.overwrites else n, device, self.overwrites)
        if self.name == "strip":
            m = keywords["max_length"] = keywords["placement"].max_length if placed else m
        return self.make(b, m, n, d, dtype, device), keywords

    def __call__(self, *tensors, **keywords):
        return getattr(ptune_kernels, self.name)(*tensors, **keywords)

    def expected(self, *tensors, **keywords):
        return getattr(oracle, self.name.rstrip("_"))(*tensors, **keywords)


def _prompt_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _embed(b, m, n, d, dtype, device):
    table = torch.randn(11, d, device=device).to(dtype)
    return (
        torch.randn(m, d, device=device, dtype=_prompt_dtype(dtype)),
        torch.randint(0, 11, (b, n), device=device),
        table,
    )


def _prepend(b, m, n, d, dtype, device):
    return torch.randn(m, d, device=device, dtype=_prompt_dtype(dtype)), torch.randn(b, n, d, device=device).to(dtype)


def _strip(b, m, n, d, dtype, device):
    return (torch.randn(b, m + n, d, device=device).to(dtype),)


def _overwrite(b, m, n, d, dtype, device):
    return torch.randn(b, m + n, d, device=device).to(dtype), torch.randn(
        m, d, device=device, dtype=_prompt_dtype(dtype)
    )


def _prepend_kv(b, m, n, d, dtype, device):
    wide, heads = d + 8, 2  # as well aligned as d
    prefixes = (torch.randn(heads, m, width, device=device, dtype=_prompt_dtype(dtype)) for width in (wide, d))
    return *prefixes, *(torch.randn(b, heads, n, width, device=device).to(dtype) for width in (wide, d))


def _cast_qkv(b, m, n, d, dtype, device):
    shapes = ((b, 2, n, d), (b, 1, m + n, d), (b, 1, m + n, d + 1))
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


def _part_qkv(b, m, n, d, dtype, device):
    shapes = ((1, 4, m + b * n, d + 8), (1, 2, m + b * n, d + 8), (1, 2, m + b * n, d))
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


def _spread_kv(*sizes):
    return _part_qkv(*sizes)[1:]


OPS = [
    Op("embed_and_prepend", _embed, (0,), pools=(0,)),
    Op("embed_and_prepend", _embed, (0,), (("scale", math.sqrt(2304)),), "-scaled", pools=(0,)),
    Op("prepend", _prepend, (0, 1), pools=(0,)),
    Op("strip", _strip, (0,)),
    Op("overwrite", _overwrite, (0, 1), pools=(1,), overwrites=True),
    Op("overwrite", _overwrite, (0, 1), (("mode", "add"),), "-add", pools=(1,), overwrites=True),
    Op("prepend_kv", _prepend_kv, (0, 1, 2, 3), pools=(0, 1)),
    Op("cast_qkv", _cast_qkv, (0, 1, 2)),
    Op("part_qkv", _part_qkv, (0, 1, 2), pools=(1, 2), views=(0, 1, 2, 3, 4, 5)),
    Op("spread_kv", _spread_kv, (0, 1), pools=(0, 1)),
]
on_ops = pytest.mark.parametrize("op", OPS, ids=str)
