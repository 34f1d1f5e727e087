"""Damaged checkpoints: each loads as what was saved, or is an error that names it, and changes nothing.

``PTUNE_FUZZ_SEEDS=1000:2000`` runs other seeds than the first few.
"""

import json
import os
import random
import re
import shutil
import struct
import time
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ptune
from ptune.convert import convert

from .families import LAYERS, VOCABULARY

FIRST, _, LAST = os.environ.get("PTUNE_FUZZ_SEEDS", "0:300").partition(":")
SEEDS = range(int(FIRST), int(LAST))
ERRORS = (ValueError, OSError, NotImplementedError)
LM, CLASSIFIER = ptune.AutoPTuneModelForCausalLM, ptune.AutoPTuneModelForSequenceClassification
OURS = ("shallow", "deep", "head", "prefix")
THEIRS = ("peft rows", "peft prefix", "p-tuning v2")
DTYPES = (torch.int64, torch.bool, torch.float64, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.uint8)
ODD = (None, [], {}, "", "x", -1, 10**30, -(10**18), 0.5, True, [[[[]]]], {"a": {"b": None}}, "\ud800", [None], 1e308)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The name of a base may become one to look for on the hub, again and again where it cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def saved(base_of, tmp_path_factory):
    """Folders by their kind."""
    base, folder = base_of("llama"), tmp_path_factory.mktemp("saved")
    settings = {
        "shallow": (LM, {"tuning_mode": "ptune", "pre_seq_len": 3}),
        "deep": (LM, {"tuning_mode": "deep_ptune", "pre_seq_len": 3}),
        "head": (CLASSIFIER, {"tuning_mode": "deep_ptune", "pre_seq_len": 3, "num_labels": 2}),
        "prefix": (LM, {"tuning_mode": "deep_ptune", "pre_seq_len": 3}),
        "other": (LM, {"tuning_mode": "ptune", "pre_seq_len": 5}),
    }
    for kind, (loader, rest) in settings.items():
        model = base.tuned(loader, **rest)
        (model.save_prefix if kind == "prefix" else model.save_prompts)(folder / kind)
        (folder / kind / "README.md").unlink()
    for kind, config in (("peft rows", peft.PromptTuningConfig), ("peft prefix", peft.PrefixTuningConfig)):
        stock = base.stock(transformers.AutoModelForSequenceClassification, num_labels=2)
        tuned = peft.get_peft_model(stock, config(task_type="SEQ_CLS", num_virtual_tokens=3))
        tuned.save_pretrained(folder / kind)
        (folder / kind / "README.md").unlink()
    (folder / "p-tuning v2").mkdir()
    state = {"prefix_encoder.embedding.weight": torch.randn(3, 2 * LAYERS * 2 * 6), "score.weight": torch.randn(2, 24)}
    torch.save(state, folder / "p-tuning v2" / "prompts.bin")
    return folder


class Target:
    """A model, and a bank, that bear what damaged folders must not change."""

    def __init__(self, base, loader, saved: Path) -> None:
        self.reference = saved / "other"
        rest = {"num_labels": 2} if loader is CLASSIFIER else {}
        self.model = base.tuned(loader, tuning_mode="ptune", pre_seq_len=4, **rest).eval()
        self.bank = ptune.PromptBank(base.stock(transformers.AutoModelForCausalLM))
        self.bank.add("other", self.reference)
        self.model.save_prompts(saved / f"before-{loader.__name__}")
        self.own = saved / f"before-{loader.__name__}"
        self.ids = torch.randint(3, VOCABULARY, (1, 4))
        self.before = self.state()

    @torch.no_grad()
    def state(self) -> tuple:
        tensors = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        tensors["logits"] = self.model(self.ids).logits
        tensors["bank"] = self.bank(self.ids, prompt_names=["other"]).logits[0]
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return tensors, (self.model.ptune_config, trained, self.bank.names, str(self.model.config))

    def check(self) -> None:
        (tensors, rest), (before, rest_before) = self.state(), self.before
        assert rest == rest_before
        assert same(tensors, before)


@pytest.fixture(scope="module")
def targets(base_of, saved):
    return {loader: Target(base_of("llama"), loader, saved) for loader in (LM, CLASSIFIER)}


def damage(folder: Path, dice: random.Random, saved: Path) -> str:
    """Change one thing of a folder; returns what."""
    path = dice.choice(sorted(folder.iterdir()))
    files = [truncate, empty, replace_by_folder, replace_by_loop, no_utf8, remove]
    if path.suffix == ".json":
        files += [odd_value] * 10 + [deep_json, drop_key]
    elif path.suffix == ".safetensors":
        files += [flip_header] * 3 + [odd_header] * 4 + [odd_tensor] * 6 + [rename, other_folders]
    else:
        files += [flip_header] * 2 + [odd_tensor] * 4 + [rename]
    change = dice.choice(files)
    change(path, dice) if change is not other_folders else other_folders(path, dice, saved)
    return f"{path.name}: {change.__name__}"


def truncate(path, dice):
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))])


def empty(path, dice):
    path.write_bytes(b"")


def remove(path, dice):
    path.unlink()


def replace_by_folder(path, dice):
    path.unlink()
    path.mkdir()


def replace_by_loop(path, dice):
    path.unlink()
    path.symlink_to(path)


def no_utf8(path, dice):
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def deep_json(path, dice):
    path.write_text("[" * dice.choice([10, 5000, 100_000]))


def places(value, path=()):
    """Every place of a parsed JSON file."""
    yield path
    for key in value if isinstance(value, dict) else ():
        yield from places(value[key], (*path, key))


def at(config, place):
    for key in place:
        config = config[key]
    return config


def odd_value(path, dice):
    config = json.loads(path.read_text())
    place = dice.choice(list(places(config)))
    if not place:
        config = dice.choice(ODD)
    else:
        at(config, place[:-1])[place[-1]] = dice.choice(ODD)
    path.write_text(json.dumps(config))


def drop_key(path, dice):
    config = json.loads(path.read_text())
    place = dice.choice([place for place in places(config) if place])
    del at(config, place[:-1])[place[-1]]
    path.write_text(json.dumps(config))


def header_of(path) -> tuple[int, bytes]:
    content = path.read_bytes()
    return struct.unpack("<Q", content[:8])[0], content


def flip_header(path, dice):
    content = bytearray(path.read_bytes())
    end = 8 + header_of(path)[0] if path.suffix == ".safetensors" else 200
    content[dice.randrange(end)] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def odd_header(path, dice):
    size, content = header_of(path)
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    entry = header[dice.choice([name for name in header if name != "__metadata__"])]
    kind = dice.randrange(6)
    if kind == 0:
        path.write_bytes(struct.pack("<Q", dice.choice([2**63, 2**40, 10**8, size + 1, 0])) + content[8:])
        return
    if kind == 1:
        entry["data_offsets"] = dice.choice([[0, 2**50], [8, 4], [-4, 0], [2**64, 2**64 + 4], [0, 4], []])
    elif kind == 2:
        entry["shape"] = dice.choice([[2**40, 2**40], [0], [-1, 24], [], [2**63], [1] * 100, "x"])
    elif kind == 3:
        entry["dtype"] = dice.choice(["I64", "F8_E4M3", "BOOL", "nothing", 3, None, "F64"])
    elif kind == 4:
        header = {name: entry for name in header if name != "__metadata__"}  # all of them overlap
    else:
        header["more"] = {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def odd_tensor(path, dice):
    tensors = read(path)
    name = dice.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = dice.randrange(4)
    if kind == 0:
        tensor = tensor.to(dice.choice(DTYPES))
    elif kind == 1:
        tensor.view(-1)[dice.randrange(tensor.numel())] = float(dice.choice(["nan", "inf", "-inf"]))
    elif kind == 2:
        tensor = dice.choice([tensor[:-1], tensor[..., :-1], tensor[None], tensor.flatten(), tensor[:0], tensor.sum()])
    else:
        tensor = torch.zeros(dice.choice([(1,), (0, 24), (3, 0), (2, 2, 2, 2), (1000, 24)]))
    write(path, tensors | {name: tensor.contiguous()})


def rename(path, dice):
    tensors = read(path)
    name = dice.choice(sorted(tensors))
    moved = tensors.pop(name)
    if dice.random() < 0.7:
        tensors[dice.choice(["foreign", "", name + ".weight", "model.norm.weight", "x" * 1000])] = moved
    write(path, tensors)


def other_folders(path, dice, saved):
    others = [other for other in saved.rglob(path.name) if not other.parent.name.startswith("before")]
    shutil.copy(dice.choice(sorted(others)), path)


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


OF_FILES = ("ptune_config.json", "model.safetensors", "prompt_embeddings", "score.weight")
ENTRIES = (
    "model_class",
    "head",
    "labels",
    "compiled_prefix",
    "num_layers",
    "_size",
    "keys and values",
    "prompts",
    "pre_seq",
)


def attempt(call, folder: Path, what: str):
    """What ``call`` returns, or ``None`` where it refuses the folder, by the name of a file or of an entry."""
    try:
        return call()
    except ERRORS as error:
        said = f"{what}: {type(error).__name__}: {error}"
    assert any(name in said[len(what) :] for name in (str(folder), *ENTRIES, *OF_FILES)), said
    return None


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_folders(base_of, saved, targets, tmp_path, seed):
    dice = random.Random(seed)
    kind = dice.choice(OURS + THEIRS)
    folder = tmp_path / "damaged"
    shutil.copytree(saved / kind, folder)
    what = f"{kind}: {damage(folder, dice, saved)}"
    loader = LM if kind in ("shallow", "deep", "prefix") else CLASSIFIER
    start, memory = time.monotonic(), memory_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if kind in OURS:
        read_ours(folder, saved / kind, loader, targets[loader], what)
    else:
        source = folder / "prompts.bin" if kind == "p-tuning v2" else folder
        given = {"base_model": base_of("llama").folder, "task": "classification"}
        attempt(lambda: convert(source, tmp_path / "out", **given), folder, what)
        if (tmp_path / "out").exists():
            original = saved / kind / "prompts.bin" if kind == "p-tuning v2" else saved / kind
            convert(original, tmp_path / "expected", **given)
            expected, got = (load_file(tmp_path / out / "model.safetensors") for out in ("expected", "out"))
            assert same(got, expected) or "odd_tensor" in what or "rename" in what or "flip" in what, what
    targets[loader].check()
    assert time.monotonic() - start < 20, what
    grown = memory_of("VmHWM") - memory
    assert grown < 150_000, f"{what}: {grown} KB"


def memory_of(what: str) -> int:
    """This process's memory, or the peak of it, in KB."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def read_ours(folder: Path, original: Path, loader, target: Target, what: str) -> None:
    model, bank = target.model, target.bank
    weights, swapped = load_file(original / "model.safetensors"), "other_folders" in what  # which may fit as they are
    if attempt(lambda: model.load_prompts(folder) or True, folder, what):
        got = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_prompts(target.own)
        model.eval()
        assert swapped or all(torch.equal(got[name], weights[name]) for name in weights), what
    target.check()
    if attempt(lambda: bank.add("damaged", folder) or True, folder, what):
        bank.add("original", original)
        damaged, undamaged = bank(target.ids.expand(2, -1), prompt_names=["damaged", "original"]).logits
        bank.remove("damaged")
        bank.remove("original")
        assert swapped or torch.equal(damaged, undamaged), what
    target.check()
    loaded = attempt(lambda: loader.from_pretrained(folder), folder, what)
    if loaded is not None:
        assert swapped or all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights), what
