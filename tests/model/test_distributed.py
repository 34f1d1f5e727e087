"""Two processes (gloo) train as one does: DDP, and FSDP2 around the frozen base, or around all."""

import gc
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

import ptune
from ptune.anatomy import whole

from .common import settings_for
from .families import FAMILIES

ROWS = 4


def make(name, mode):
    torch.manual_seed(0)
    loader = ptune.AutoPTuneModelForCausalLM if FAMILIES[name].causal else ptune.AutoPTuneModelForTokenClassification
    settings = settings_for("overwrite" if mode == "keys and values" else mode)
    model = loader.from_config(FAMILIES[name].config(), **settings).train()
    if mode == "keys and values":
        with tempfile.TemporaryDirectory() as folder:
            model.save_prefix(folder)
            model.load_prompts(folder)
    return model


def inputs_for(name, rows):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (ROWS, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :1] = 0, 0
    labels = ids if FAMILIES[name].causal else ids % 2
    return {
        "input_ids": ids[rows],
        "attention_mask": mask[rows],
        "labels": labels[rows].masked_fill(mask[rows] == 0, -100),
    }


def loss_of(model, name, rows):
    """A sum, so that what each process has adds up to the whole batch's."""
    inputs = inputs_for(name, rows)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits.float()
    if FAMILIES[name].causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def train(rank, kind, name, mode, checkpointing, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    outcome = gradients_of(rank, kind, name, mode, checkpointing, folder)
    if rank == 0:
        torch.save(outcome, f"{folder}/gradients.pt")
    # what was wrapped must not outlive the group that it speaks through, and hooks make circles
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # now and then torch's own threads abort the interpreter while it takes itself down


def gradients_of(rank, kind, name, mode, checkpointing, folder):
    model = make(name, mode)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    wrapped = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        ignored = set(trained.values()) if kind == "fsdp, base" else set()
        mesh = init_device_mesh("cpu", (2,))
        for block in FAMILIES[name].blocks(model.base_model):
            fully_shard(block, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):  # the second step runs on what the first left behind
        model.zero_grad()
        rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        loss_of(wrapped, name, rows).backward()
    gradients = {key: whole(p.grad).clone() for key, p in trained.items()}
    model.save_prompts(f"{folder}/prompts")
    if kind == "fsdp, base":
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= 2
    return model.prefix_plan.path, gradients


@pytest.mark.parametrize(
    ("kind", "name", "mode", "checkpointing"),
    [
        ("ddp", "llama", "add", None),
        ("ddp", "modernbert", "overwrite", "not reentrant"),
        ("fsdp, base", "llama", "overwrite", None),
        ("fsdp, base", "gpt2", "shallow", "not reentrant"),
        ("fsdp", "llama", "overwrite", "not reentrant"),
        ("fsdp", "modernbert", "overwrite", None),
        ("fsdp", "llama", "keys and values", None),
        ("ddp", "gpt2", "keys and values", "reentrant"),
    ],
)
def test_two_processes_have_the_gradients_of_one(tmp_path, kind, name, mode, checkpointing):
    spawn(train, (kind, name, mode, checkpointing, str(tmp_path)), nprocs=2)
    path, gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert path == "prefix"
    model = make(name, mode)
    (loss_of(model, name, slice(None)) / 2).backward()
    saved = load_file(tmp_path / "prompts" / "model.safetensors")
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=0, atol=1e-5 * scale)
            assert torch.equal(saved[key], parameter)
