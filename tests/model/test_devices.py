"""The model side on a GPU, held to the CPU's float32 concat path; on the CPU too, which shows that the tests are right.

A GPU has other kernels for the ops and for attention, and transformers compiles decoding steps there by itself.
"""

from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptune
from ptune import varlen

from .common import MODES, PADDINGS, SHARED, close, set_prompts, settings_for, take, texts_for
from .families import VOCABULARY
from .oracle import pad
from .test_bank import batch, tuned

# Without a GPU it is left out, not skipped a hundred times; tests/ops/test_cuda.py skips aloud.
GPU = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *GPU])
def device(request):
    return request.param


def causal(base, mode, **rest):
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for(mode), **rest)
    set_prompts(model, mode)
    return model.train()


def step(model, ids, mask, path):
    """Logits of real tokens, and prompt gradients, on the CPU in float32."""
    take(model, path)
    model.zero_grad()
    where = model.device
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    output = model(**{name: None if tensor is None else tensor.to(where) for name, tensor in given.items()})
    output.loss.backward()
    logits = output.logits if mask is None else output.logits[mask.bool().to(where)]
    return [tensor.detach().float().cpu() for tensor in (logits, *(p.grad for p in model.prompt_parameters()))]


def error(got, truth):
    """Squared, of each tensor by its scale, so that no tensor counts for all."""
    return sum(((a - b) / b.std()).square().mean() for a, b in zip(got, truth, strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_step(base_of, device, name, mode, padding, implementation):
    check_a_step(causal(base_of(name), mode), device, padding, implementation)


@pytest.mark.parametrize("device", GPU)  # it has no backward on a CPU, and compiles for long
def test_a_step_of_flex_attention(base_of, device):
    check_a_step(causal(base_of("llama-wide"), "overwrite"), device, "left", "flex_attention")


def check_a_step(model, device, padding, implementation):
    ids, mask = pad(texts_for(padding), padding, 0)
    truth = step(model, ids, mask, "concat")
    model.set_attn_implementation(implementation)
    model.to(device)
    for path in (*SHARED, "concat"):
        for got, expected in zip(step(model, ids, mask, path), truth, strict=True):
            close(got, expected, 1e-4)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast", "hybrid"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision(base_of, monkeypatch, device, mode, padding, how, checkpointed):
    """The shared path errs no more than twice what the concat path does; on a GPU by one attention over all texts."""
    flash = Mock(wraps=varlen.flash)
    monkeypatch.setattr(varlen, "flash", flash)
    exact = causal(base_of("llama-wide"), mode)
    half = {"bfloat16": {"dtype": torch.bfloat16}, "autocast": {}, "hybrid": {"attn_dtype": "bfloat16"}}
    model = causal(base_of("llama-wide"), mode, **half[how])
    model.load_state_dict({name: tensor.clone() for name, tensor in exact.state_dict().items()})
    model.to(device)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    errors = dict.fromkeys((*SHARED, "concat"), 0.0)
    for _ in range(4):  # one text's luck is not another's
        ids, mask = pad(texts_for(padding), padding, 0)
        truth = step(exact, ids, mask, "concat")
        for path in errors:
            with torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
                errors[path] += error(step(model, ids, mask, path), truth).item()
    for path in SHARED:
        assert 0 < errors[path] <= 2**2 * errors["concat"]
    assert flash.called == (device == "cuda" and padding != "left")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("cache", "compiled"),
    [("dynamic", False), ("dynamic", True), ("static", True)],
    ids=["dynamic", "compiled prompts", "static"],
)
@torch.no_grad()
def test_generate(base_of, device, mode, cache, compiled):
    model = causal(base_of("llama"), mode).eval()
    ids, mask = pad(texts_for("left"), "left", 0)
    how = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, attention_mask=mask, **how)
    model.to(device)
    if compiled:
        model.compile_prompts()
    for _ in range(2):  # a compiled step is replayed
        got = model.generate(ids.to(device), attention_mask=mask.to(device), **how, cache_implementation=cache)
        assert torch.equal(got.sequences.cpu(), expected.sequences)
        for logits, truth in zip(got.logits, expected.logits, strict=True):
            close(logits.cpu(), truth, 1e-4)


@torch.no_grad()
def test_a_bank(base_of, device, tmp_path):
    base = base_of("llama")
    here, there = (ptune.PromptBank(base.stock(AutoModelForCausalLM).to(where)) for where in ("cpu", device))
    for kind, task in (("shallow", "sequence"), ("overwrite", "token"), ("add", "lm")):
        folder = tuned(base, tmp_path, kind, task)
        here.add(kind, folder)
        there.add(kind, folder)
    ids, mask = batch(5, "left")
    names = ["add", None, "shallow", "overwrite", "add"]
    expected = here(ids, mask, prompt_names=names)
    got = there(ids.to(device), mask.to(device), prompt_names=names)
    for row, truth in enumerate(expected.logits):
        real = slice(None) if truth.dim() == 1 else mask[row].bool()
        close(got.logits[row].cpu()[real], truth[real], 1e-4)


def test_a_watched_model(base_of, device):
    model = base_of("gpt2").stock().eval().to(device)
    watching = ptune.precision.watch(model, every=1)
    greatest = []
    model.h[1].register_forward_hook(lambda module, args, output: greatest.append(output.abs().max().item()))
    for _ in range(2):
        model(torch.randint(3, VOCABULARY, (2, 5), device=device))
    found = {(record["name"], record["tensor"]): record["amax"] for record in watching.report()}
    assert found["h.1", "output"] == max(greatest)
