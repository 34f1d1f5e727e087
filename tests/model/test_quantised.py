"""Prompts on quantised bases: outputs of the quantised stock model, gradients of its dequantised weights."""

import copy
import json

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import ptune
from ptune.checkpoint import CONFIG_NAME, read_config
from ptune.convert import convert, to_peft

from .common import MODES, close, moved_by_a_bit, set_prompts, settings_for, texts_for
from .families import FAMILIES
from .oracle import Prompt, pad, real, run_row

bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

# one rounding to 8 bits, of what a row's greatest value is
INT8 = 1 / 127


def eight_bits(threshold):
    return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)


BACKENDS = {
    "nf4": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4 twice": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "LLM.int8": lambda: eight_bits(6.0),
    "LLM.int8 without outliers": lambda: eight_bits(0.0),
    "int8 weights": lambda: transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "float8 weights": lambda: transformers.TorchAoConfig(torchao.Float8WeightOnlyConfig()),
}
WEIGHTS_ALONE = [name for name in BACKENDS if "LLM" not in name]


def quantised(name, dtype=torch.float32):
    """What `from_pretrained` is given; with a GPU at hand, bitsandbytes would take that."""
    return {"quantization_config": BACKENDS[name](), "device_map": "cpu", "dtype": dtype}


def dequantised(model):
    """A copy of a stock quantised model's weights, in the model that it was made from."""
    plain = type(model)(copy.deepcopy(model.config))
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            kind = type(parameter).__name__
            if kind == "Params4bit":
                parameter = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            elif kind == "Int8Params":
                scale = parameter.SCB if module.state.SCB is None else module.state.SCB
                parameter = parameter.data.float() * scale[:, None] / 127
            elif kind != "Parameter":
                parameter = parameter.dequantize()
            plain.get_parameter(f"{name}.{key}".lstrip(".")).data = parameter.detach().clone()
    return plain


def bits(model):
    """Every bit of the base, whatever its type."""
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for name, tensor in model.state_dict().items():
        if name not in own:
            parts = [getattr(tensor, part) for part in ("qdata", "scale") if hasattr(tensor, part)]
            found[name] = [part.clone() for part in parts or [tensor]]
    return found


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_those_of_the_quantised_stock_model(base_of, backend, mode):
    """Row by row; LLM.int8 looks for outliers over the rows of a call, except in training on a CPU."""
    base = base_of("llama")
    body = base.stock(**quantised(backend)).train(backend == "LLM.int8")
    model = base.tuned(**quantised(backend), **settings_for("shallow")).train(backend == "LLM.int8")
    prompt = set_prompts(model, mode)
    assert model.prefix_plan.path == ("concat" if backend == "LLM.int8" else "prefix")
    texts = texts_for("left")
    ids, mask = pad(texts, "left", 0)
    with torch.no_grad():
        rows = real(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    blocks, table = FAMILIES["llama"].blocks(body), body.get_input_embeddings().weight.data

    def moved(values):
        """By the last bit of float16, in which LLM.int8 reads what it rounds."""
        return None if values is None else values.detach() * (1 + torch.randn_like(values).sign() * 2**-11)

    def nudged(text):
        leaves, before = [moved(leaf) for leaf in (prompt.shallow, prompt.deep)], table.clone()
        table.copy_(moved(table))
        states = run_row(body, blocks, Prompt(*leaves, prompt.mode), text).states[-1].detach()
        table.copy_(before)
        return states

    rounds = {"tolerance": INT8, "nudged": lambda: nudged(text)} if backend == "LLM.int8 without outliers" else {}
    for text, row in zip(texts, rows, strict=True):
        close(row, run_row(body, blocks, prompt, text).states[-1].detach(), **rounds)


@pytest.mark.parametrize("sharing", ["auto", False])
@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_dequantised_base(base_of, tmp_path, backend, mode, sharing):
    base = base_of("llama")
    stock = base.stock(**quantised(backend))
    stock(torch.randint(3, 61, (1, 5)))
    dequantised(stock).save_pretrained(tmp_path)
    settings = settings_for(mode, prefix_sharing=sharing)
    model = base.tuned(**quantised(backend), **settings).train()
    before = bits(model)
    plain = ptune.AutoPTuneModel.from_pretrained(tmp_path, quantization_config=None, **settings).train()
    plain.load_state_dict({name: p for name, p in model.named_parameters() if p.requires_grad}, strict=False)
    ids, mask = pad(texts_for("right"), "right", 0)
    weights = torch.randn(*ids.shape, 24) * mask[..., None]

    def gradients(each):
        each.zero_grad()
        with torch.no_grad():
            each.eval()(input_ids=ids, attention_mask=mask)  # after which bitsandbytes once had no gradients
        (each.train()(input_ids=ids, attention_mask=mask).last_hidden_state * weights).sum().backward()
        return {name: p.grad.clone() for name, p in each.named_parameters() if p.requires_grad}

    got, expected = gradients(model), gradients(plain)

    def nudged(name):
        for parameter in plain.parameters():
            if not parameter.requires_grad:  # its last bit depends on the order of the products that dequantise it
                parameter.data = moved_by_a_bit(parameter)
        return gradients(plain)[name]

    for name, gradient in expected.items():
        close(got[name], gradient, nudged=lambda name=name: nudged(name))
        assert model.get_parameter(name).dtype == torch.float32
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_folders_of_prompts_say_how_the_base_was_quantised(base_of, tmp_path, caplog, backend, dtype):
    model = base_of("llama").tuned(
        ptune.AutoPTuneModelForCausalLM, **quantised(backend, dtype), **settings_for("overwrite")
    )
    model.save_prompts(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert read_config(tmp_path)["base"]["quantization"]["quant_method"] == model.quantization_method.value
    loaded = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert same_bits(bits(loaded), bits(model))
    ids = torch.randint(3, 61, (2, 5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    whole = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path, quantization_config=None)
    assert {type(p) for p in whole.parameters()} == {nn.Parameter}
    assert torch.equal(whole.prompt_embeddings.weight, model.prompt_embeddings.weight)
    assert "other weights" not in caplog.text


@pytest.mark.parametrize("backend", ["nf4", "LLM.int8", "int8 weights"])
def test_with_the_base_inside(base_of, tmp_path, backend):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **quantised(backend), **settings_for("overwrite"))
    model.save_pretrained(tmp_path, save_base=True)
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "prompt" in name]  # noqa: SIM118 (no mapping)
    assert model.prompts_enabled
    loaded = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert same_bits(bits(loaded), bits(model))
    ids = torch.randint(3, 61, (2, 5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_prompts(tmp_path / "again")  # whose base is one that was quantised before it was loaded
    again = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu")
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("backend", WEIGHTS_ALONE)
def test_compiled_prompts_and_generation(base_of, backend):
    model = base_of("llama").tuned(ptune.AutoPTuneModelForCausalLM, **quantised(backend), **settings_for("overwrite"))
    set_prompts(model, "overwrite")
    ids, mask = pad(texts_for("left"), "left", 0)
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        model.compile_prompts()
        close(model(input_ids=ids, attention_mask=mask).logits, before)
    generated = model.generate(ids, **options)
    steps = torch.cat([mask, torch.ones(len(ids), 6, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(input_ids=generated, attention_mask=steps).logits
    logits[..., model.config.eos_token_id] = -torch.inf  # as it must not end
    assert torch.equal(logits[:, ids.shape[1] - 1 : -1].argmax(-1), generated[:, ids.shape[1] :])


@pytest.mark.parametrize(
    ("backend", "called"),
    [*((name, False) for name in WEIGHTS_ALONE), *(("LLM.int8 without outliers", called) for called in (False, True))],
)
def test_banks(base_of, tmp_path, backend, called):
    """LLM.int8's scales move from parameters to modules when a base is first ``called``, and must be shared from both.

    It rounds activations, each row's alone: what moves them by a bit may move one by a step.
    """
    base, loader = base_of("llama"), ptune.AutoPTuneModelForCausalLM
    tolerance = INT8 if "LLM" in backend else 1e-5
    stock = base.stock(transformers.AutoModelForCausalLM, **quantised(backend))
    ids, models = torch.randint(3, 61, (3, 5)), {}
    before = stock(ids).logits if called else None
    bank = ptune.PromptBank(stock)
    for mode in ("shallow", "overwrite"):
        models[mode] = base.tuned(loader, **quantised(backend), **settings_for(mode))
        models[mode].save_prompts(tmp_path / mode)
        bank.add(mode, tmp_path / mode)
    with torch.no_grad():
        names = ["shallow", None, "overwrite"]
        logits = bank(ids, torch.ones_like(ids), prompt_names=names).logits
        close(logits[0], models["shallow"](ids[:1]).logits[0], tolerance)
        close(logits[2], models["overwrite"](ids[2:]).logits[0], tolerance)
        with models["overwrite"].disable_prompts():
            close(logits[1], models["overwrite"](ids[1:2]).logits[0], tolerance)
        beside = torch.cat([ids[:1], torch.randint(3, 61, (2, 5))])
        assert torch.equal(bank(beside, torch.ones_like(ids), prompt_names=names).logits[0], logits[0])
    if called:
        assert torch.equal(stock(ids).logits, before)


@pytest.mark.parametrize("backend", ["nf4", "LLM.int8 without outliers"])
@pytest.mark.parametrize(
    "loader", [transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification]
)
@torch.no_grad()
def test_a_bank_whose_base_has_a_quantised_head(base_of, tmp_path, backend, loader):
    base_of("bert").stock(loader, num_labels=3).save_pretrained(tmp_path)
    stock = loader.from_pretrained(tmp_path, **quantised(backend)).eval()
    assert type(stock.classifier).__module__.startswith("bitsandbytes")
    ids = torch.randint(3, 61, (2, 5))
    output = ptune.PromptBank(stock)(ids, torch.ones_like(ids), prompt_names=[None, None])
    # bitsandbytes itself calls no 4-bit weight of three rows on a CPU that packs them
    expected = (stock if "LLM" in backend else dequantised(stock).eval())(ids).logits
    close(output.tasks[None].output.logits, expected, INT8 if "LLM" in backend else 1e-5)


def test_banks_on_llm_int8_with_outliers_are_refused(base_of):
    with pytest.raises(NotImplementedError, match=r"base: LLM\.int8 .*a row would depend on the others"):
        ptune.PromptBank(base_of("llama").stock(transformers.AutoModelForCausalLM, **quantised("LLM.int8")))


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
@pytest.mark.parametrize("backend", ["nf4", "fp4 twice"])
def test_prompts_of_peft(base_of, tmp_path, backend, kind):
    """In training: otherwise bitsandbytes packs the stock model's weights on some CPUs, and fails at sizes so small."""
    stock = base_of("llama").stock(transformers.AutoModelForCausalLM, **quantised(backend))
    stock.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(stock, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", base_model=tmp_path / "base")
    ours = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu").eval()
    ids = torch.randint(3, 61, (2, 5))
    with torch.no_grad():
        close(ours(ids).logits, theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -5:])
    to_peft(tmp_path / "ours", tmp_path / "back")
    again, first = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("back", "theirs"))
    assert torch.equal(again["prompt_embeddings"], first["prompt_embeddings"])


def test_what_is_refused(base_of, tmp_path):
    base = base_of("llama")
    dynamic = transformers.TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig())
    embeddings = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    anew = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    for config, reason in (
        (dynamic, "hand gradients through, and it has Int8DynamicActivationInt8WeightConfig"),
        (embeddings, "its embeddings are quantised"),
        (anew, "its weights are quantised anew at every call"),
    ):
        with pytest.raises(NotImplementedError, match=f"PTuneLlamaModel: .* because .*{reason}"):
            base.tuned(quantization_config=config, device_map="cpu", **settings_for("shallow"))


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "quanto"])
def test_other_quantisers_are_refused_by_name(base_of, method):
    model = base_of("llama").stock(**quantised("nf4"))
    model.hf_quantizer.quantization_config.quant_method = method
    model.__class__ = ptune.models.ptune_class(type(model))
    with pytest.raises(NotImplementedError, match=f"PTuneLlamaModel: .* gradients through {method} have not been"):
        model.adopt([])


def test_weights_packed_for_inference_are_refused(base_of):
    model = base_of("llama").stock(**quantised("nf4"))
    model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    model.__class__ = ptune.models.ptune_class(type(model))
    with pytest.raises(NotImplementedError, match="has packed its weights for inference"):
        model.adopt([])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "distilbert", "llama"])
def test_new_heads_are_not_quantised(base_of, tmp_path, name, backend):
    """Of RoBERTa's two layers, say; bitsandbytes takes both for its own, which the stock model then fails in."""
    loader = ptune.AutoPTuneModelForSequenceClassification
    model = base_of(name).tuned(loader, **quantised(backend), **settings_for("overwrite"))
    assert {type(model.get_submodule(key.rpartition(".")[0])).__name__ for key in model._head} <= {
        "Linear",
        "LayerNorm",
    }
    assert all(model.get_parameter(key).requires_grad for key in model._head)
    ids, mask = pad(texts_for("right"), "right", model.config.pad_token_id)
    model.train()(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_prompts(tmp_path)
    loaded = loader.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(loaded(ids, mask).logits, model.eval()(ids, mask).logits)


@pytest.mark.parametrize(("backend", "argument"), [("nf4", "llm_int8_skip"), ("int8 weights", "modules_to_not")])
def test_heads_that_are_new_in_part(base_of, tmp_path, backend, argument):
    """A checkpoint's head for other labels: its bias does not fit, and its weight is quantised as it is."""
    base_of("bert").stock(transformers.AutoModelForSequenceClassification, num_labels=2).save_pretrained(tmp_path)
    given = {"num_labels": 3, "ignore_mismatched_sizes": True, **quantised(backend), **settings_for("shallow")}
    with pytest.raises(NotImplementedError, match=rf"another was quantised; name \['classifier'\] in .*{argument}"):
        ptune.AutoPTuneModelForSequenceClassification.from_pretrained(tmp_path, **given)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"quant_method": "gptq"}, "expected bitsandbytes or torchao, got 'gptq'"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "quantize_", "_data": {}}}}, "expected types"),
        ({"quant_type": {"_type": "torch.dtype", "_data": "load"}}, r"expected types .* got \['load'\]"),
        ({"bnb_4bit_compute_dtype": "load"}, "quantization: "),
        ({"bnb_4bit_quant_type": 4}, "quantization: "),
    ],
)
def test_folders_that_were_tampered_with(base_of, tmp_path, change, error):
    base_of("llama").tuned(**quantised("nf4"), **settings_for("shallow")).save_prompts(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    config["base"]["quantization"] |= change
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=error):
        ptune.AutoPTuneModel.from_pretrained(tmp_path, device_map="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_base_in_memory(base_of, backend):
    """As on one that is loaded with them; and the base's own bits and outputs stay."""
    base, ids = base_of("llama"), torch.randint(3, 61, (2, 6))
    given = quantised(backend)
    stock = base.stock(transformers.AutoModelForSequenceClassification, **given, num_labels=3, pad_token_id=0)
    before = bits(stock)
    model = ptune.with_prompts(stock, ptune.PTuneConfig(**settings_for("overwrite"))).train()
    loaded = base.tuned(ptune.AutoPTuneModelForSequenceClassification, **given, num_labels=3, **settings_for("shallow"))
    set_prompts(loaded, "overwrite")
    model.load_state_dict({name: loaded.get_parameter(name) for name in model._own_names()}, strict=False)
    output = model(ids, labels=torch.tensor([0, 2]))
    assert torch.equal(output.logits, loaded.train()(ids).logits)
    output.loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.prompt_parameters())
    assert model.score.weight.grad.abs().max() > 0
    assert same_bits(bits(stock), before)
