"""What is timed: each op of ours, the chains that others run for the same result, and a copy of the output.

PEFT looks the prompt up once, repeats it for the batch and casts; Petals looks it up for every row of the batch and
casts; both then concatenate (`PeftModel.get_prompt` of peft 0.21, `PTuneMixin.get_prompt` of petals 2.2).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import ptune_kernels as ops

DTYPE = torch.bfloat16
OURS, COPY = "ours", "clone"

Way = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sizes:
    """Texts [batch, length], prompt rows, width, and what it is cut into by attention; by default, of a large model."""

    batch: int = 8
    length: int = 128
    prompt: int = 16
    width: int = 4096
    heads: int = 32
    vocabulary: int = 32000


@dataclass
class Case:
    """Several ways to compute one thing from the same inputs, forward and backward if something is ``trained``; and a
    copy of what the forward puts out, which are the outputs from ``written`` on: those before are views."""

    op: str
    sizes: Sizes
    ways: dict[str, Way]
    trained: tuple[Tensor, ...] = ()
    written: int = 0

    def __post_init__(self) -> None:
        outputs = tuple(t.detach() for t in self.ways[OURS]())
        copied = outputs[self.written :]
        self.output_bytes = sum(t.nbytes for t in copied)
        self.seeds = tuple(torch.randn_like(t) for t in outputs if self.trained)
        self.ways[COPY] = lambda: tuple(t.clone() for t in copied)

    @property
    def name(self) -> str:
        return self.op + (", forward + backward" if self.trained else "")

    def run(self, way: str) -> tuple[Tensor, ...]:
        outputs = self.ways[way]()
        trains = self.trained and way != COPY
        return torch.autograd.grad(outputs, self.trained, self.seeds) if trains else outputs

    def check(self) -> None:
        """Refuses to time an op that is not right: raises AssertionError unless every way gives the same.

        The others sum prompt gradients in half precision; they may be as far off as that format is coarse.
        """
        for way in self.ways:
            expected = self.ways[OURS]()[self.written if way == COPY else 0 :]
            torch.testing.assert_close(self.ways[way](), expected, rtol=0, atol=0)
            if self.trained and way != COPY:
                coarse = max(map(len, self.seeds)) * torch.finfo(DTYPE).eps
                torch.testing.assert_close(self.run(way), self.run(OURS), rtol=coarse, atol=coarse)


def _peft(prompts: Tensor, batch: int) -> Tensor:
    return (
        F.embedding(torch.arange(len(prompts), device=prompts.device).unsqueeze(0), prompts)
        .repeat(batch, 1, 1)
        .to(DTYPE)
    )


def _petals(prompts: Tensor, batch: int) -> Tensor:
    return F.embedding(torch.arange(len(prompts), device=prompts.device).unsqueeze(0).expand(batch, -1), prompts).to(
        DTYPE
    )


def _case(
    op: str, sizes: Sizes, ours: Way, others: dict[str, Way], trained: tuple[Tensor, ...] = (), written: int = 0
) -> Case:
    """A case with the first of the others compiled too."""
    first = next(iter(others))
    return Case(op, sizes, {OURS: ours, **others, f"compiled {first}": torch.compile(others[first])}, trained, written)


def embed_and_prepend(s: Sizes, train: bool) -> Case:
    prompts = torch.randn(s.prompt, s.width, requires_grad=train)
    table = torch.randn(s.vocabulary, s.width).to(DTYPE)
    ids = torch.randint(s.vocabulary, (s.batch, s.length))
    others: dict[str, Way] = {
        "PEFT": lambda: (torch.cat([_peft(prompts, s.batch), F.embedding(ids, table)], dim=1),),
        "Petals": lambda: (torch.cat([_petals(prompts, s.batch), F.embedding(ids, table)], dim=1),),
    }
    return _case(
        "embed_and_prepend",
        s,
        lambda: (ops.embed_and_prepend(prompts, ids, table),),
        others,
        (prompts,) if train else (),
    )


def prepend(s: Sizes, train: bool) -> Case:
    prompts = torch.randn(s.prompt, s.width, requires_grad=train)
    hidden = torch.randn(s.batch, s.length, s.width).to(DTYPE)
    others: dict[str, Way] = {
        "PEFT": lambda: (torch.cat([_peft(prompts, s.batch), hidden], dim=1),),
        "Petals": lambda: (torch.cat([_petals(prompts, s.batch), hidden], dim=1),),
    }
    return _case("prepend", s, lambda: (ops.prepend(prompts, hidden),), others, (prompts,) if train else ())


def overwrite(s: Sizes, train: bool) -> Case:
    prompts = torch.randn(s.prompt, s.width, requires_grad=train)
    hidden = torch.randn(s.batch, s.prompt + s.length, s.width).to(DTYPE)
    others: dict[str, Way] = {
        "PEFT's parts": lambda: (torch.cat([_peft(prompts, s.batch), hidden[:, s.prompt :]], dim=1),),
        "Petals' parts": lambda: (torch.cat([_petals(prompts, s.batch), hidden[:, s.prompt :]], dim=1),),
    }
    return _case("overwrite", s, lambda: (ops.overwrite(hidden, prompts),), others, (prompts,) if train else ())


def prepend_kv(s: Sizes, train: bool) -> Case:
    width = s.width // s.heads
    prefixes = tuple(torch.randn(s.heads, s.prompt, width, requires_grad=train) for _ in range(2))
    # As attention gets them: views of [b, n, h, hd].
    key, value = torch.randn(2, s.batch, s.length, s.heads, width).to(DTYPE).transpose(2, 3).unbind()

    def eager() -> tuple[Tensor, ...]:
        k, v = (prefix.expand(s.batch, -1, -1, -1).to(DTYPE) for prefix in prefixes)
        return torch.cat([k, key], dim=2), torch.cat([v, value], dim=2)

    return _case(
        "prepend_kv",
        s,
        lambda: ops.prepend_kv(*prefixes, key, value),
        {"expand, cast and cat": eager},
        prefixes if train else (),
    )


def cast_qkv(s: Sizes) -> Case:
    q, k, v = torch.randn(3, s.batch, s.length, s.heads, s.width // s.heads).transpose(2, 3).unbind()

    def eager() -> tuple[Tensor, ...]:
        return tuple(t.to(DTYPE, memory_format=torch.contiguous_format) for t in (q, k, v))

    return _case("cast_qkv", s, lambda: ops.cast_qkv(q, k, v, DTYPE), {"three casts": eager})


def part_qkv(s: Sizes) -> Case:
    m, b = s.prompt, s.batch
    rows = m + b * s.length
    packed = torch.randn(3, 1, rows, s.heads, s.width // s.heads).to(DTYPE).transpose(2, 3).unbind()
    packed = tuple(t.requires_grad_() for t in packed)

    def eager() -> tuple[Tensor, ...]:
        own, texts = zip(*(t.split([m, rows - m], 2) for t in packed), strict=True)
        query, key, value = (t.squeeze(0).unflatten(1, (b, -1)).transpose(0, 1) for t in texts)
        keys, values = (torch.cat([o.expand(b, -1, -1, -1), t], 2) for o, t in zip(own[1:], (key, value), strict=True))
        return *own, query, keys, values

    return _case("part_qkv", s, lambda: ops.part_qkv(*packed, m, b), {"split and cat": eager}, packed, written=4)


def overwrite_in_place(s: Sizes) -> Case:
    """The same op on longer and longer texts: its time must not grow, as it touches the prompt rows alone."""
    prompts = torch.randn(s.prompt, s.width)

    def text(length: int) -> Tensor:
        return torch.randn(s.batch, s.prompt + length, s.width, dtype=DTYPE)

    def ours(hidden: Tensor) -> Way:
        return lambda: (ops.overwrite_(hidden, prompts)[:, : s.prompt],)

    def assignment(hidden: Tensor) -> Way:
        def way() -> tuple[Tensor, ...]:
            hidden[:, : s.prompt] = prompts
            return (hidden[:, : s.prompt],)

        return way

    others = {f"ours, n = {n}": ours(text(n)) for n in (1024, 8192)}
    ways = {OURS: ours(text(s.length)), **others, "slice assignment": assignment(text(s.length))}
    return Case("overwrite_", s, ways)


TRAINED = {make.__name__: make for make in (embed_and_prepend, prepend, overwrite, prepend_kv)}


def cases(sizes: Sizes = Sizes()) -> Iterator[Case]:
    for make in TRAINED.values():
        for train in (False, True):
            yield make(sizes, train)
    yield cast_qkv(sizes)
    yield part_qkv(sizes)
    yield overwrite_in_place(sizes)
