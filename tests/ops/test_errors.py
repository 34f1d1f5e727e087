"""Bad input: an error that names the argument, what was expected and what came, before anything is written."""

import math
import re

import numpy as np
import pytest
import torch

import ptune_kernels
from ptune_kernels import Placement

from .cases import on_targets

B, M, N, D, H, V = 2, 3, 4, 5, 2, 7


def good(name, device):
    """Arguments that the op takes, by name."""

    def floats(*shape):
        return torch.randn(shape, device=device)

    arguments = {
        "embed_and_prepend": lambda: {
            "prompts": floats(M, D),
            "input_ids": torch.randint(0, V, (B, N), device=device),
            "embedding": floats(V, D),
        },
        "prepend": lambda: {"prompts": floats(M, D), "hidden": floats(B, N, D)},
        "strip": lambda: {"hidden": floats(B, M + N, D), "max_length": M},
        "overwrite": lambda: {"hidden": floats(B, N, D), "prompts": floats(M, D)},
        "prepend_kv": lambda: {
            "prefix_k": floats(H, M, D),
            "prefix_v": floats(H, M, D + 1),
            "key": floats(B, H, N, D),
            "value": floats(B, H, N, D + 1),
        },
        "cast_qkv": lambda: {
            "query": floats(B, H, N, D),
            "key": floats(B, H, N, D),
            "value": floats(B, H, N, D),
            "dtype": torch.float16,
        },
        "part_qkv": lambda: {
            "query": floats(1, 2 * H, M + B * N, D),
            "key": floats(1, H, M + B * N, D),
            "value": floats(1, H, M + B * N, D + 1),
            "num_prompts": M,
            "batch_size": B,
        },
        "spread_kv": lambda: {
            "key": floats(1, H, M + B * N, D),
            "value": floats(1, H, M + B * N, D + 1),
            "num_prompts": M,
            "batch_size": B,
        },
    }
    return arguments[name.rstrip("_")]()


def bad(op, argument, change, *words):
    return pytest.param(op, argument, change, words, id=f"{op}-{argument}-{words[-1]}")


def zeros(*shape, **keywords):
    return lambda t: torch.zeros(shape, device=t.device, **keywords)


def to(dtype):
    return lambda t: t.to(dtype)


BAD_TENSORS = [
    bad("embed_and_prepend", "prompts", zeros(1, M, D), "2 dimensions", f"[1, {M}, {D}]"),
    bad("embed_and_prepend", "input_ids", zeros(N, dtype=torch.int64), "2 dimensions", f"[{N}]"),
    bad("embed_and_prepend", "embedding", zeros(V, D + 1), f"size {D}", f"[{V}, {D + 1}]"),
    bad("embed_and_prepend", "embedding", zeros(1, V, D), "2 dimensions", f"[1, {V}, {D}]"),
    bad("embed_and_prepend", "prompts", to(torch.bfloat16), "torch.float32", "torch.bfloat16"),
    bad("embed_and_prepend", "prompts", to(torch.float64), "torch.float32", "torch.float64"),
    bad("embed_and_prepend", "embedding", to(torch.int32), "torch.float32", "torch.int32"),
    bad("embed_and_prepend", "input_ids", to(torch.float32), "torch.int64", "torch.float32"),
    bad("prepend", "prompts", zeros(D), "2 dimensions", f"[{D}]"),
    bad("prepend", "prompts", zeros(M, D + 1), f"size {D}", f"[{M}, {D + 1}]"),
    bad("prepend", "hidden", zeros(N, D), "3 dimensions", f"[{N}, {D}]"),
    bad("prepend", "prompts", to(torch.float16), "torch.float32", "torch.float16"),
    bad("prepend", "hidden", to(torch.int64), "torch.bfloat16", "torch.int64"),
    bad("prepend", "hidden", to(torch.float8_e4m3fn), "torch.bfloat16", "torch.float8_e4m3fn"),
    bad("prepend", "hidden", lambda t: t.to_sparse(), "strided", "torch.sparse_coo"),
    bad("strip", "hidden", zeros(M + N, D), "dimensions", f"[{M + N}, {D}]"),
    bad("strip", "max_length", lambda m: -1, f"0 to {M + N}", "-1"),
    bad("strip", "max_length", lambda m: M + N + 1, f"0 to {M + N}", str(M + N + 1)),
    bad("strip", "hidden", to(torch.int32), "torch.float32", "torch.int32"),
    *(
        param
        for op in ("overwrite", "overwrite_")
        for param in (
            bad(op, "hidden", zeros(B, N, D, 1), "3 dimensions", f"[{B}, {N}, {D}, 1]"),
            bad(op, "prompts", zeros(1, M, D), "2 dimensions", f"[1, {M}, {D}]"),
            bad(op, "prompts", zeros(M, D - 1), f"size {D}", f"[{M}, {D - 1}]"),
            bad(op, "prompts", zeros(N + 1, D), f"at most {N}", str(N + 1)),
            bad(op, "prompts", to(torch.bfloat16), "torch.float32", "torch.bfloat16"),
            bad(op, "hidden", to(torch.complex64), "torch.float32", "torch.complex64"),
        )
    ),
    bad("prepend_kv", "prefix_k", zeros(H + 1, M, D), f"size {H}", f"[{H + 1}, {M}, {D}]"),
    bad("prepend_kv", "prefix_k", zeros(H, M, D + 2), f"size {D}", f"[{H}, {M}, {D + 2}]"),
    bad("prepend_kv", "prefix_v", zeros(H, M + 1, D + 1), f"size {M}", f"[{H}, {M + 1}, {D + 1}]"),
    bad("prepend_kv", "prefix_v", zeros(1, H, M, D), "3 dimensions", f"[1, {H}, {M}, {D}]"),
    bad("prepend_kv", "key", zeros(H, N, D), "4 dimensions", f"[{H}, {N}, {D}]"),
    bad("prepend_kv", "value", zeros(B + 1, H, N, D + 1), f"size {B}", f"[{B + 1}, {H}, {N}, {D + 1}]"),
    bad("prepend_kv", "value", zeros(B, H, N + 1, D + 1), f"size {N}", f"[{B}, {H}, {N + 1}, {D + 1}]"),
    bad("prepend_kv", "value", to(torch.float16), "torch.float32", "torch.float16"),
    bad("prepend_kv", "prefix_k", to(torch.float64), "torch.float32", "torch.float64"),
    bad("cast_qkv", "query", zeros(N, D), "4 dimensions", f"[{N}, {D}]"),
    bad("cast_qkv", "key", to(torch.int8), "torch.float32", "torch.int8"),
    bad("cast_qkv", "dtype", lambda dtype: torch.float64, "torch.float16", "torch.float64"),
    bad("cast_qkv", "dtype", lambda dtype: torch.int32, "torch.float16", "torch.int32"),
    bad("part_qkv", "query", zeros(H, M + B * N, D), "4 dimensions", f"[{H}, {M + B * N}, {D}]"),
    bad("part_qkv", "query", zeros(B, H, M + B * N, D), "size 1", f"[{B}, {H}, {M + B * N}, {D}]"),
    bad("part_qkv", "key", zeros(B, H, M + B * N, D), "size 1", f"[{B}, {H}, {M + B * N}, {D}]"),
    bad("part_qkv", "query", zeros(1, H, M, D), f"[1, a multiple of {H}, {M + B * N}, {D}]", f"[1, {H}, {M}, {D}]"),
    bad("part_qkv", "query", zeros(1, H, M + B * N, D + 1), f"{D}]", f"[1, {H}, {M + B * N}, {D + 1}]"),
    bad("part_qkv", "query", zeros(1, H + 1, M + B * N, D), f"a multiple of {H}", f"[1, {H + 1}, {M + B * N}, {D}]"),
    bad("part_qkv", "query", to(torch.int64), "torch.float32", "torch.int64"),
    bad("part_qkv", "query", to(torch.float64), "torch.float32", "torch.float64"),
    bad("part_qkv", "value", zeros(1, H, M, D), f"size {M + B * N}", f"[1, {H}, {M}, {D}]"),
    bad("part_qkv", "value", zeros(1, H + 1, M + B * N, D), f"size {H}", f"[1, {H + 1}, {M + B * N}, {D}]"),
    bad("part_qkv", "value", to(torch.float16), "torch.float32", "torch.float16"),
    bad("part_qkv", "num_prompts", lambda m: -1, f"0 to {M + B * N}", "-1"),
    bad("part_qkv", "num_prompts", lambda m: M + B * N + 1, f"0 to {M + B * N}", str(M + B * N + 1)),
    bad("part_qkv", "batch_size", lambda b: 0, f"a divisor of {B * N}", "0"),
    bad("spread_kv", "key", zeros(H, M + B * N, D), "4 dimensions", f"[{H}, {M + B * N}, {D}]"),
    bad("spread_kv", "value", zeros(1, H, M, D), f"size {M + B * N}", f"[1, {H}, {M}, {D}]"),
    bad("spread_kv", "num_prompts", lambda m: M + B * N + 1, f"0 to {M + B * N}", str(M + B * N + 1)),
    bad("spread_kv", "batch_size", lambda b: 0, f"a divisor of {B * N}", "0"),
    bad("part_qkv", "batch_size", lambda b: B * N + 1, f"a divisor of {B * N}", str(B * N + 1)),
]


def assert_refused(op, arguments, error, name, words):
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error) as caught:
        getattr(ptune_kernels, op)(**arguments)
    message = str(caught.value)
    for word in (name, *words):
        assert re.search(rf"(?<![\w.]){re.escape(word)}", message), f"{word!r} is not in {message!r}"
    for key, x in before.items():
        assert x.layout != torch.strided or torch.equal(arguments[key], x), f"{key} changed"
    return message


@on_targets
@pytest.mark.parametrize(("op", "argument", "change", "words"), BAD_TENSORS)
def test_tensors(target, op, argument, change, words):
    arguments = good(op, target.device)
    arguments[argument] = change(arguments[argument])
    assert_refused(op, arguments, ValueError, argument, words)


ANOTHER_CLASS = [
    ("embed_and_prepend", "embedding", torch.nn.Embedding(V, D), ("expected a tensor [V, d]", "Embedding", ".weight")),
    *(
        (op, "placement", 5, ("expected a Placement or None", "int"))
        for op in ("embed_and_prepend", "prepend", "strip", "overwrite", "overwrite_", "prepend_kv")
    ),
    ("strip", "max_length", Placement.of([0], [1], [0], pool_rows=1), ("expected a number of rows", "a Placement")),
    ("cast_qkv", "dtype", "bfloat16", ("expected a torch.dtype", "'bfloat16'")),
    ("prepend_kv", "dtype", "bfloat16", ("expected a torch.dtype", "'bfloat16'")),
    ("part_qkv", "dtype", "bfloat16", ("expected a torch.dtype", "'bfloat16'")),
    ("spread_kv", "dtype", "bfloat16", ("expected a torch.dtype", "'bfloat16'")),
]


@on_targets
@pytest.mark.parametrize(("op", "argument", "value", "words"), ANOTHER_CLASS)
def test_another_class(target, op, argument, value, words):
    with pytest.raises(TypeError) as caught:
        getattr(ptune_kernels, op)(**good(op, target.device) | {argument: value})
    assert str(caught.value).startswith(f"{argument}: ")
    assert all(word in str(caught.value) for word in words)


@on_targets
@pytest.mark.parametrize(
    "op",
    [
        "embed_and_prepend",
        "prepend",
        "strip",
        "overwrite",
        "overwrite_",
        "prepend_kv",
        "cast_qkv",
        "part_qkv",
        "spread_kv",
    ],
)
def test_arrays(target, op):
    """Refused here, or by torch, which names the argument."""
    for argument, value in good(op, target.device).items():
        if isinstance(value, torch.Tensor):
            with pytest.raises((TypeError, RuntimeError), match=r"[Ee]xpected .*ndarray"):
                getattr(ptune_kernels, op)(**good(op, target.device) | {argument: value.cpu().numpy()})


@on_targets
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_devices(target, grad):
    """Two devices in one call. (The meta device stands for the other one.)"""
    for op, argument in (
        ("embed_and_prepend", "prompts"),
        ("embed_and_prepend", "input_ids"),
        ("prepend", "prompts"),
        ("overwrite", "prompts"),
        ("overwrite_", "prompts"),
        ("prepend_kv", "prefix_k"),
        ("prepend_kv", "value"),
        ("cast_qkv", "key"),
        ("part_qkv", "key"),
        ("spread_kv", "value"),
    ):
        arguments = good(op, target.device)
        arguments[argument] = torch.empty_like(arguments[argument], device="meta")
        if grad and arguments[argument].is_floating_point():
            arguments[argument].requires_grad_()
        with pytest.raises(ValueError, match=f"{target.device}.*meta|meta.*{target.device}"):
            getattr(ptune_kernels, op)(**arguments)


PLACED = ["embed_and_prepend", "prepend", "overwrite", "overwrite_", "prepend_kv"]


def placement(device, start=(0, 1), length=(3, 2), column=(0, 1), max_length=3, dtype=torch.int32):
    tensors = (torch.tensor(x, dtype=dtype, device=device) for x in (start, length, column))
    return Placement(*tensors, max_length)


BAD_PLACEMENTS = [
    ("start", {"start": (0, 1, 0)}, (f"size {B}", "[3]")),
    ("length", {"length": ((3, 2),)}, ("1 dimension", "[1, 2]")),
    ("start", {"dtype": torch.int64}, ("torch.int32", "torch.int64")),
    ("max_length", {"max_length": -1}, ("at least 0", "-1")),
]


@on_targets
@pytest.mark.parametrize("op", PLACED)
@pytest.mark.parametrize(("field", "change", "words"), BAD_PLACEMENTS, ids=lambda x: x if isinstance(x, str) else "")
def test_placements(target, op, field, change, words):
    arguments = good(op, target.device) | {"placement": placement(target.device, **change)}
    assert_refused(op, arguments, ValueError, f"placement.{field}", words)


# field, what is wrong with it, and the numbers of which the message gives one: the value, or its sum with the length
BAD_VALUES = [
    ("start", {"start": (-1, 1)}, "-1"),
    ("length", {"length": (-1, 2)}, "-1"),
    ("length", {"max_length": 2}, "3"),
    ("column", {"column": (0, -1)}, "-1"),
    ("column", {"column": (0, N + 1)}, f"{N + 1}|{N + 3}"),
    ("column", {"column": (2**31 - 1, 0)}, f"{2**31 - 1}|{2**31 + 2}"),
    ("start", {"start": (0, 2)}, "2|4"),
    ("start", {"start": (2**31 - 1, 0)}, f"{2**31 - 1}|{2**31 + 2}"),
]


@on_targets
@pytest.mark.parametrize("op", PLACED)
@pytest.mark.parametrize(("field", "change", "value"), BAD_VALUES, ids=lambda x: x if isinstance(x, str) else "")
def test_values_of_a_placement(target, op, field, change, value):
    """Checked on the CPU; a GPU would have to synchronise, and makes NaN of the row instead (test_out_of_range.py)."""
    if target.device != "cpu":
        pytest.skip("values are not read on a GPU")
    arguments = good(op, target.device) | {"placement": placement(target.device, **change)}
    message = assert_refused(op, arguments, IndexError, f"placement.{field}", ("expected",))
    assert re.search(rf"got.* ({value})\b", message), message


@on_targets
@pytest.mark.parametrize("op", ["overwrite", "overwrite_"])
def test_overwriting_beyond_the_last_row(target, op):
    """A column where prepend could put the prompt, but where two rows do not fit."""
    if target.device != "cpu":
        pytest.skip("values are not read on a GPU")
    arguments = good(op, target.device) | {"placement": placement(target.device, column=(0, N - 1))}
    message = assert_refused(op, arguments, IndexError, "placement.column", ("expected",))
    assert re.search(rf"got.* ({N - 1}|{N + 1})\b", message), message


@on_targets
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, V, 2**31 - 1])
def test_ids(target, wrong, dtype):
    if target.device != "cpu":
        pytest.skip("values are not read on a GPU")
    arguments = good("embed_and_prepend", target.device)
    arguments["input_ids"] = arguments["input_ids"].to(dtype)
    arguments["input_ids"][1, 2] = wrong
    assert_refused("embed_and_prepend", arguments, IndexError, "input_ids", (f"0 to {V - 1}", str(wrong)))


@on_targets
def test_ids_beyond_int32(target):
    """An id that would be a good one if only its low 32 bits were read."""
    if target.device != "cpu":
        pytest.skip("values are not read on a GPU")
    arguments = good("embed_and_prepend", target.device)
    arguments["input_ids"][0, 0] = 2**32 + 1
    assert_refused("embed_and_prepend", arguments, IndexError, "input_ids", (str(2**32 + 1),))


@on_targets
@pytest.mark.parametrize("op", ["overwrite", "overwrite_"])
def test_mode(target, op):
    assert_refused(op, good(op, target.device) | {"mode": "ADD"}, ValueError, "mode", ("'ADD'",))


@on_targets
def test_strip_takes_states(target):
    """And no heads, whose gradient no op would prepend."""
    with pytest.raises(ValueError, match=r"hidden: expected 3 dimensions, got shape \[2, 3, 5, 4\]"):
        ptune_kernels.strip(torch.randn(2, 3, 5, 4, device=target.device), 2)


@on_targets
def test_strip_and_placement_agree(target):
    arguments = good("strip", target.device) | {"placement": placement(target.device, max_length=4)}
    assert_refused("strip", arguments, ValueError, "max_length", ("4", "3"))


@on_targets
def test_strip_takes_any_start(target):
    """Of the pool that the rows came from it knows nothing."""
    hidden = torch.randn(B, M + N, D, device=target.device)
    near, far = (
        Placement(*(torch.full((B,), its, dtype=torch.int32, device=target.device) for its in (start, 2, 1)), M)
        for start in (0, 2**31 - 1)
    )
    assert torch.equal(ptune_kernels.strip(hidden, M, far), ptune_kernels.strip(hidden, M, near))


@on_targets
def test_half_a_placement(target):
    numbers = torch.zeros(B, dtype=torch.int32, device=target.device)
    arguments = good("prepend", target.device) | {"placement": Placement(numbers, numbers, None, 3)}
    assert_refused("prepend", arguments, ValueError, "placement", ("start, length and column",))


@on_targets
def test_overwrite_in_place_of_overlapping_memory(target):
    """Rows of the batch that share their memory cannot each have their own prompt."""
    arguments = good("overwrite_", target.device)
    arguments["hidden"] = torch.zeros(1, N, D, device=target.device).expand(B, N, D)
    with pytest.raises(ValueError, match=r"hidden: expected .* its own memory, got dimension 0 expanded"):
        ptune_kernels.overwrite_(**arguments)
    assert not arguments["hidden"].any()


def test_placement_of_checks_on_the_host():
    made = Placement.of([0, 4], [3, 0], [1, 2], pool_rows=4)
    assert made.max_length == 3
    assert [x.tolist() for x in made[:3]] == [[0, 4], [3, 0], [1, 2]]
    assert all(x.dtype == torch.int32 for x in made[:3])
    for start, length, column in ((-1, 1, 0), (0, -1, 0), (0, 1, -1), (2, 3, 0)):
        with pytest.raises(IndexError, match=rf"row 1.*at most 4.*start {start}, length {length}, column {column}"):
            Placement.of([0, start], [1, length], [0, column], pool_rows=4)
    with pytest.raises(ValueError, match=r"one number each for every row of the batch, got 1, 2 and 1"):
        Placement.of([0], [1, 1], [0], pool_rows=4)
    with pytest.raises(TypeError, match=r"row 1: expected integers, got start 0, length 1\.7, column 0"):
        Placement.of([0, 0], [1, 1.7], [0, 0], pool_rows=4)
    for number in (None, math.nan, math.inf, "a"):
        with pytest.raises(TypeError, match="row 1: expected integers"):
            Placement.of([0, 0], [1, number], [0, 0], pool_rows=4)
    with pytest.raises(IndexError, match=r"row 0: .* of 31 bits"):
        Placement.of([2**31], [1], [0], pool_rows=2**33)
    with pytest.raises(IndexError, match=r"row 0.*at most 250, got start 200, length 100"):
        Placement.of(*np.array([[200], [100], [0]], dtype=np.uint8), pool_rows=250)  # their sum wraps
    assert Placement.of([], [], [], pool_rows=4).start.shape == (0,)
    assert Placement.of(*torch.tensor([[0, 1], [2, 3], [0, 0]]), pool_rows=4).max_length == 3


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend: expected one of reference, native, triton or None, got 'cuda'"),
        ptune_kernels.use_backend("cuda"),
    ):
        pass
