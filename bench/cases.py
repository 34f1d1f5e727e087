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

BATCH, LENGTH, PROMPT, WIDTH, VOCABULARY, HEADS = 8, 128, 16, 4096, 32000, 32
DTYPE = torch.bfloat16
OURS, COPY = "ours", "clone"

Way = Callable[[], tuple[Tensor, ...]]


@dataclass
class Case:
    """Several ways to compute one thing from the same inputs; with ``trained``, forward and backward."""

    name: str
    ways: dict[str, Way]
    trained: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        self.seeds = tuple(torch.randn_like(t) for t in self.ways[OURS]())

    def run(self, way: str) -> tuple[Tensor, ...]:
        outputs = self.ways[way]()
        return torch.autograd.grad(outputs, self.trained, self.seeds) if self.trained else outputs

    def check(self) -> None:
        """Refuses to time an op that is not right: raises AssertionError unless every way gives the same.

        The others sum prompt gradients in half precision; they may be as far off as that format is coarse.
        """
        for way in self.ways:
            if way == COPY and self.trained:
                continue
            torch.testing.assert_close(self.ways[way](), self.ways[OURS](), rtol=0, atol=0)
            if self.trained:
                eps = torch.finfo(DTYPE).eps
                torch.testing.assert_close(self.run(way), self.run(OURS), rtol=BATCH * eps, atol=BATCH * eps)


def _peft(prompts: Tensor) -> Tensor:
    return F.embedding(torch.arange(PROMPT).unsqueeze(0), prompts).repeat(BATCH, 1, 1).to(DTYPE)


def _petals(prompts: Tensor) -> Tensor:
    return F.embedding(torch.arange(PROMPT).unsqueeze(0).expand(BATCH, -1), prompts).to(DTYPE)


def _case(name: str, ours: Way, others: dict[str, Way], trained: tuple[Tensor, ...] = ()) -> Case:
    """A case with the first of the others compiled too, and the bytes that must move."""
    first = next(iter(others))
    ways = {OURS: ours, **others, f"compiled {first}": torch.compile(others[first])}
    if not trained:
        outputs = ours()
        ways[COPY] = lambda: tuple(t.clone() for t in outputs)
    return Case(name + (", forward + backward" if trained else ""), ways, trained)


def embed_and_prepend(train: bool) -> Case:
    prompts = torch.randn(PROMPT, WIDTH, requires_grad=train)
    table = torch.randn(VOCABULARY, WIDTH).to(DTYPE)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    others: dict[str, Way] = {
        "PEFT": lambda: (torch.cat([_peft(prompts), F.embedding(ids, table)], dim=1),),
        "Petals": lambda: (torch.cat([_petals(prompts), F.embedding(ids, table)], dim=1),),
    }
    return _case(
        "embed_and_prepend",
        lambda: (ops.embed_and_prepend(prompts, ids, table),),
        others,
        (prompts,) if train else (),
    )


def prepend(train: bool) -> Case:
    prompts = torch.randn(PROMPT, WIDTH, requires_grad=train)
    hidden = torch.randn(BATCH, LENGTH, WIDTH).to(DTYPE)
    others: dict[str, Way] = {
        "PEFT": lambda: (torch.cat([_peft(prompts), hidden], dim=1),),
        "Petals": lambda: (torch.cat([_petals(prompts), hidden], dim=1),),
    }
    return _case("prepend", lambda: (ops.prepend(prompts, hidden),), others, (prompts,) if train else ())


def overwrite(train: bool) -> Case:
    prompts = torch.randn(PROMPT, WIDTH, requires_grad=train)
    hidden = torch.randn(BATCH, PROMPT + LENGTH, WIDTH).to(DTYPE)
    others: dict[str, Way] = {
        "PEFT's parts": lambda: (torch.cat([_peft(prompts), hidden[:, PROMPT:]], dim=1),),
        "Petals' parts": lambda: (torch.cat([_petals(prompts), hidden[:, PROMPT:]], dim=1),),
    }
    return _case("overwrite", lambda: (ops.overwrite(hidden, prompts),), others, (prompts,) if train else ())


def prepend_kv(train: bool) -> Case:
    width = WIDTH // HEADS
    prefixes = tuple(torch.randn(HEADS, PROMPT, width, requires_grad=train) for _ in range(2))
    # As attention gets them: views of [b, n, h, hd].
    key, value = torch.randn(2, BATCH, LENGTH, HEADS, width).to(DTYPE).transpose(2, 3).unbind()

    def eager() -> tuple[Tensor, ...]:
        k, v = (prefix.expand(BATCH, -1, -1, -1).to(DTYPE) for prefix in prefixes)
        return torch.cat([k, key], dim=2), torch.cat([v, value], dim=2)

    return _case(
        "prepend_kv",
        lambda: ops.prepend_kv(*prefixes, key, value),
        {"expand, cast and cat": eager},
        prefixes if train else (),
    )


def cast_qkv() -> Case:
    q, k, v = torch.randn(3, BATCH, LENGTH, HEADS, WIDTH // HEADS).transpose(2, 3).unbind()

    def eager() -> tuple[Tensor, ...]:
        return tuple(t.to(DTYPE, memory_format=torch.contiguous_format) for t in (q, k, v))

    return _case("cast_qkv", lambda: ops.cast_qkv(q, k, v, DTYPE), {"three casts": eager})


def overwrite_in_place() -> Case:
    """The same op on longer and longer texts: its time must not grow, as it touches the prompt rows alone."""
    prompts = torch.randn(PROMPT, WIDTH)

    def text(length: int) -> Tensor:
        return torch.randn(BATCH, PROMPT + length, WIDTH, dtype=DTYPE)

    def ours(hidden: Tensor) -> Way:
        return lambda: (ops.overwrite_(hidden, prompts)[:, :PROMPT],)

    def assignment(hidden: Tensor) -> Way:
        def way() -> tuple[Tensor, ...]:
            hidden[:, :PROMPT] = prompts
            return (hidden[:, :PROMPT],)

        return way

    others = {f"ours, n = {n}": ours(text(n)) for n in (1024, 8192)}
    return Case("overwrite_", {OURS: ours(text(LENGTH)), **others, "slice assignment": assignment(text(LENGTH))})


def cases() -> Iterator[Case]:
    for make in (embed_and_prepend, prepend, overwrite, prepend_kv):
        for train in (False, True):
            yield make(train)
    yield cast_qkv()
    yield overwrite_in_place()
