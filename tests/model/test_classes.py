"""Classes: made once per base class, importable, picklable, and to transformers what their base is."""

import copy
import gc
import pickle
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import accelerate
import pytest
import torch
import transformers as hf

import ptune
import ptune.models
from ptune.call import running
from ptune.concat import fusible_scale
from ptune.loading import check_keywords
from ptune_kernels import embed_and_prepend

from .common import COUNT, SHARED, close, set_prompts, settings_for, take


def test_names_and_bases():
    made = ptune.models.PTuneLlamaForCausalLM
    assert made is ptune.models.PTuneLlamaForCausalLM
    assert (made.__name__, made.__module__) == ("PTuneLlamaForCausalLM", "ptune.models")
    assert issubclass(made, ptune.PTuneMixin)
    assert issubclass(made, hf.LlamaForCausalLM)
    for name in ("PTuneNothing", "LlamaForCausalLM", "PTuneLlamaConfig", "PTuneGenerationMixin"):
        with pytest.raises(AttributeError, match=name):
            getattr(ptune.models, name)


@pytest.mark.parametrize(
    "loader",
    [ptune.AutoPTuneModel, ptune.AutoPTuneModelForCausalLM, ptune.AutoPTuneModelForSequenceClassification],
)
def test_copies_are_independent_and_whole(base_of, loader):
    model = base_of("llama").tuned(loader, **settings_for("overwrite"))
    set_prompts(model, "overwrite")
    ids, mask = torch.randint(3, 61, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expected = model(input_ids=ids, attention_mask=mask)[0]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(copied(input_ids=ids, attention_mask=mask)[0], expected)
        with torch.no_grad():
            copied.intermediate_prompt_embeddings.weight[COUNT:].zero_()
        assert not torch.equal(copied(input_ids=ids, attention_mask=mask)[0], expected)
        assert torch.equal(model(input_ids=ids, attention_mask=mask)[0], expected)


def test_another_process_reads_a_pickle(base_of, tmp_path):
    model = base_of("bert").tuned(**settings_for("overwrite"))
    ids = torch.randint(3, 61, (1, 5))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, ids, model(ids)[0].detach())))
    program = (
        "import pickle, sys, torch\n"
        "model, ids, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "output = model(ids, output_hidden_states=True)\n"
        "torch.testing.assert_close(output[0], expected)\n"
        "assert len(output.hidden_states) == 4, output.hidden_states\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "model.pickle"], check=True)


def test_settings_come_from_keywords_or_the_config_and_stay_off_it(base_of):
    base = base_of("llama")
    config = hf.AutoConfig.from_pretrained(base.folder)
    config.tuning_mode, config.pre_seq_len, config.deep_prompt_mode = "deep_ptune", 3, "add"
    model = ptune.AutoPTuneModelForCausalLM.from_pretrained(base.folder, config=config)
    assert (model.ptune_config.pre_seq_len, model.ptune_config.deep_prompt_mode) == (3, "add")
    model = ptune.AutoPTuneModelForCausalLM.from_pretrained(base.folder, config=config, pre_seq_len=5)
    assert model.ptune_config.pre_seq_len == 5
    assert not set(vars(model.config)) & {"tuning_mode", "pre_seq_len", "deep_prompt_mode"}
    assert "pre_seq_len" not in model.config.to_json_string()
    assert config.pre_seq_len == 3
    model.init_prompts(config)
    assert model.prompt_embeddings.weight.shape[0] == 3


def test_wrong_settings_are_refused_before_weights_are_read(base_of, monkeypatch):
    monkeypatch.setattr(hf.AutoModel, "from_pretrained", None)
    config = base_of("llama").family.config()
    config.tuning_mode = "ptune"
    for wrong in ({"tuning_mode": "prefix"}, {"pre_seq_len": 4}, {"config": config}):
        with pytest.raises(ValueError, match=r"tuning_mode|pre_seq_len"):
            base_of("llama").tuned(**wrong)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("pre_seq_length", "pre_seq_len"),
        ("tunning_mode", "tuning_mode"),
        ("prompt_init_texts", "prompt_init_text"),
        ("attn_dtypes", "attn_dtype"),
        ("basemodel", "base_model"),
        ("num_virtual_tokens", "pre_seq_len"),  # PEFT's
    ],
)
def test_misspelt_keywords_are_refused_before_weights_are_read(base_of, tmp_path, monkeypatch, name, meant):
    base = base_of("llama")
    base.tuned(**settings_for("shallow")).save_prompts(tmp_path)
    monkeypatch.setattr(hf.LlamaModel, "from_pretrained", None)
    monkeypatch.setattr(hf.LlamaModel, "_from_config", None)
    for load, source in (
        (ptune.AutoPTuneModel.from_pretrained, base.folder),
        (ptune.AutoPTuneModel.from_pretrained, tmp_path),
        (ptune.models.ptune_class(hf.LlamaModel).from_pretrained, base.folder),
        (ptune.AutoPTuneModel.from_config, hf.AutoConfig.from_pretrained(base.folder)),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: unknown keyword; did you mean {meant}\?$"):
            load(source, **{name: 4}, tuning_mode="ptune")


def test_a_loaded_model_is_no_name(base_of):
    base = base_of("llama")
    with pytest.raises(TypeError, match="expected the name or folder of a base or of prompts, got LlamaModel"):
        ptune.AutoPTuneModel.from_pretrained(base.stock(), tuning_mode="ptune", pre_seq_len=2)


def test_keywords_of_transformers_are_not_taken_for_misspelt_ones():
    code = Path(hf.__file__).parent
    files = [code / "modeling_utils.py", code / "configuration_utils.py", *code.glob("models/auto/*.py")]
    names = {name for file in files for name in re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', file.read_text())}
    assert {"dtype", "quantization_config", "attn_implementation", "key_mapping", "tp_plan"} < names
    check_keywords(names - {"trust_remote_code"}, None)
    config = hf.LlamaConfig()
    config.attn_dtyp = config.pre_seq_length = None
    check_keywords(["attn_dtyp", "pre_seq_length"], config)
    check_keywords(["tuning_modes", "trust_remote_code"], None)


def test_class_and_config_alone(base_of):
    torch.manual_seed(0)
    config = base_of("llama").family.config()
    config.tuning_mode, config.pre_seq_len = "ptune", 3
    config.num_labels = 4
    model = ptune.models.PTuneLlamaForSequenceClassification(config)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["score.weight", "prompt_embeddings.weight"]
    language_model = ptune.models.PTuneLlamaForCausalLM(config)
    assert [n for n, p in language_model.named_parameters() if p.requires_grad] == ["prompt_embeddings.weight"]
    loaded = ptune.models.PTuneLlamaForCausalLM.from_pretrained(base_of("llama").folder, **settings_for("overwrite"))
    assert type(loaded) is ptune.models.PTuneLlamaForCausalLM
    auto = ptune.AutoPTuneModelForSequenceClassification.from_config(config)
    assert type(auto) is type(model)
    assert auto.prompt_embeddings.weight.shape == (3, 24)
    assert config.pre_seq_len == 3


def test_transformers_sees_the_base_class(base_of):
    base = base_of("llama")
    model = base.tuned(ptune.AutoPTuneModelForCausalLM, **settings_for("shallow"))
    stock = base.stock(hf.AutoModelForCausalLM)
    assert model.can_generate()
    assert not base_of("bert").tuned(**settings_for("shallow")).can_generate()
    assert model.is_custom_code() == stock.is_custom_code()
    assert model.loss_type == stock.loss_type == "ForCausalLM"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "ptune_eager"  # eager's counterpart that takes a prefix
    ids = torch.randint(3, 61, (1, 5))
    assert model(ids, output_attentions=True).attentions[0] is not None
    own = settings_for("shallow", prefix_sharing=False)
    for settings in ({}, own):
        assert base.tuned(attn_implementation="eager", **settings).config._attn_implementation == "eager"
    assert model._no_split_modules == stock._no_split_modules
    for name in ("llama", "bloom"):  # Bloom cannot
        tuned, stock = base_of(name).tuned(**settings_for("shallow")), base_of(name).stock()
        assert tuned._can_set_attn_implementation() == stock._can_set_attn_implementation() == (name == "llama")


def test_nothing_to_train_is_said(base_of, caplog):
    base_of("llama").tuned(num_labels=2)
    assert "tuning_mode ('ptune' or 'deep_ptune') and pre_seq_len" in caplog.text
    caplog.clear()
    base_of("llama").tuned(ptune.AutoPTuneModelForSequenceClassification)
    base_of("llama").tuned(**settings_for("shallow"))
    assert not caplog.text


@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
def test_an_embedding_on_the_disk(base_of, tmp_path, mode):
    """accelerate keeps its weight on the meta device between calls; prompts are where it looks tokens up."""
    base = base_of("llama")
    places = {"embed_tokens": "disk", "layers": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    model = base.tuned(device_map=places, offload_folder=tmp_path, **settings_for(mode))
    assert model.embed_tokens.weight.is_meta
    assert {p.device.type for name, p in model.named_parameters() if "prompt" in name} == {"cpu"}
    near = base.tuned(**settings_for(mode))
    near.load_state_dict({n: p for n, p in model.state_dict().items() if "prompt" in n}, strict=False)
    ids = torch.randint(3, 61, (2, 5))
    assert torch.equal(model(ids)[0], near(ids)[0])


@pytest.mark.parametrize("sharing", ["auto", False])
def test_prompts_that_are_offloaded(base_of, sharing):
    model = accelerate.cpu_offload(base_of("llama").tuned(**settings_for("add", prefix_sharing=sharing)))
    with pytest.raises(NotImplementedError, match=r"prompts: expected on a device, .* cpu_offload .* device_map"):
        model(torch.randint(3, 61, (2, 5)))


def test_loading_information(base_of):
    model, information = base_of("bert").tuned(ptune.AutoPTuneModelForSequenceClassification, output_loading_info=True)
    assert "classifier.weight" in information["missing_keys"]
    assert model.classifier.weight.requires_grad


def test_embeddings_with_hooks_are_called(base_of):
    """A hook on the base's embedding has its say, as in the base: the fused look-up steps aside."""
    base = base_of("llama")
    stock, model = base.stock(), base.tuned(**settings_for("shallow", prompt_init_text=[3, 4, 5, 6]))
    ids = torch.randint(3, 61, (2, 5))
    before = model(ids)[0]
    for one in (stock, model):
        one.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 1.5)
    assert not torch.equal(model(ids)[0], before)
    own = model.prompt_embeddings.weight / 1.5  # the stock model's hook scales them too
    with torch.no_grad():
        stock.embed_tokens.weight[3:7] = own
    words = torch.tensor([[3, 4, 5, 6]]).expand(2, -1)
    ids = ids.clamp_min(7)
    close(model(ids)[0], stock(torch.cat([words, ids], 1))[0][:, 4:])


def test_gemmas_scaled_look_up_is_the_modules(base_of):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        embedding = base_of("gemma3").tuned(dtype=dtype, **settings_for("shallow")).get_input_embeddings()
        scale = fusible_scale(embedding)
        ids = torch.arange(61)[None]
        fused = embed_and_prepend(torch.zeros(1, 24), ids, embedding.weight, None, scale)
        assert torch.equal(fused[:, 1:], embedding(ids))


def test_threads_do_not_mix(base_of):
    """Calls in several threads, of different lengths and paddings, each see their own."""
    model = base_of("llama").tuned(**settings_for("overwrite"))
    batches = []
    for length in range(3, 19):
        ids = torch.randint(3, 61, (2, length))
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    expected = [model(**batch)[0].detach() for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda batch: model(**batch)[0], batches * 3), expected * 3, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("sharing", ["auto", False], ids=["shared", "concat"])
def test_a_failed_call_leaves_nothing_behind(base_of, sharing):
    """A block that is run by itself afterwards is the bare block."""
    base = base_of("llama")
    stock, model = base.stock(), base.tuned(**settings_for("overwrite", prefix_sharing=sharing))
    handle = model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randint(3, 61, (2, 5)))
    handle.remove()
    assert running() is None
    states, positions = torch.randn(2, 5 + COUNT, 24), torch.arange(5 + COUNT)[None]
    one, other = (m.layers[1](states, position_embeddings=m.rotary_emb(states, positions)) for m in (stock, model))
    assert torch.equal(one, other)


def interrupt(model, call):
    """Have a KeyboardInterrupt come while ``model`` runs in ``call``."""
    mlp = model.layers[2].mlp
    mlp.forward = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        call()
    del mlp.forward


@pytest.mark.parametrize("path", [*SHARED, "concat"])
@pytest.mark.parametrize(
    "inner", ["shallow", "overwrite", "disabled", "behind its prompt", "stock", "itself", "interrupted"]
)
def test_a_call_within_a_call(base_of, path, inner):
    """A hook on one model calls another (a teacher, say): neither learns of the other."""
    base = base_of("llama")
    model, other = base.tuned(**settings_for("overwrite")), base.tuned(**settings_for("shallow"))
    set_prompts(model, "overwrite")
    if inner == "stock":
        other = ptune.hybrid(base.stock(), torch.bfloat16)
    elif inner == "itself":
        other = model
    elif inner == "overwrite":
        set_prompts(other, inner)
    ids, mask = torch.randint(3, 61, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0

    @torch.no_grad()
    def call():
        with other.disable_prompts() if inner in ("disabled", "itself") else nullcontext():
            output = other(ids, attention_mask=mask)
        if inner == "behind its prompt":
            return other(ids[:, :1], past_key_values=output.past_key_values)[0]
        return output[0][mask.bool()]

    take(model, path)
    expected, wanted, calls, got = model(ids, use_cache=False)[0], call(), [], []

    def hook(*_):
        if inner == "interrupted":
            interrupt(other, call)
        elif len(calls) < 3:  # or it would call itself for ever
            calls.append(None)
            got.append(call())

    handle = model.layers[1].register_forward_hook(hook)
    close(model(ids, use_cache=False)[0], expected)
    assert running() is None
    handle.remove()
    got.append(call())
    assert all(torch.equal(each, wanted) for each in got)
    assert running() is None


@pytest.mark.parametrize("path", [*SHARED, "concat"])
def test_an_interruption_is_soon_forgotten(base_of, path):
    base = base_of("llama")
    model, stock = base.tuned(**settings_for("overwrite")), ptune.hybrid(base.stock(), torch.bfloat16)
    take(model, path)
    ids, mask = torch.randint(3, 61, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    expected = model(ids, use_cache=False)[0]
    wanted = stock(ids, attention_mask=mask.tril(3))[0]
    interrupt(model, partial(model, ids, use_cache=False))
    assert torch.equal(stock(ids, attention_mask=mask.tril(3))[0], wanted)
    assert torch.equal(model(ids, use_cache=False)[0], expected)
    assert running() is None
    other = base.tuned(**settings_for("shallow"))
    take(other, path)
    interrupt(other, partial(other, ids))
    interrupt(model, partial(model, ids))
    gone = weakref.ref(other)
    del other
    assert torch.equal(model(ids, use_cache=False)[0], expected)
    gc.collect()
    assert gone() is None
    interrupt(model, partial(model, ids, use_cache=False))
    model.init_prompts(ptune.PTuneConfig())
    padded = {"attention_mask": mask.tril(3)}
    close(model(ids, **padded)[0], base.stock()(ids, **padded)[0])


def test_a_graph_keeps_no_other_model(base_of):
    base = base_of("llama")
    model, other = base.tuned(**settings_for("overwrite")), base.tuned(**settings_for("overwrite")).train()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    ids, kept = torch.randint(3, 61, (2, 6)), []
    model.layers[1].register_forward_hook(lambda *_: kept.append(other(ids)[0]))
    model(ids)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    kept[-1].sum().backward()


@pytest.mark.parametrize("loader", [ptune.AutoPTuneModel, ptune.AutoPTuneModelForCausalLM])
def test_compiled_whole(base_of, loader):
    """torch.compile takes the hooks along without a graph break, whether it traces them or runs them itself."""
    model = base_of("llama").tuned(loader, **settings_for("overwrite")).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for padding in (0, 2, 3):
        ids, mask = torch.randint(3, 61, (2, 6)), torch.ones(2, 6, dtype=torch.long)
        mask[1, :padding] = 0
        expected = model(input_ids=ids, attention_mask=mask)[0]
        close(compiled(input_ids=ids, attention_mask=mask)[0][mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("loader", [ptune.AutoPTuneModel, ptune.AutoPTuneModelForSequenceClassification])
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite"])
def test_exported_for_any_size(base_of, loader, name, mode):
    class OneOutput(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask)[0]

    model = OneOutput(base_of(name).tuned(loader, **settings_for(mode)).eval())
    model.model.config.use_cache = False
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    ids = torch.randint(3, 61, (4, 9))
    program = torch.export.export(model, (ids, torch.ones_like(ids)), dynamic_shapes=(sizes, sizes), strict=False)
    ids, mask = torch.randint(3, 61, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = mask[1, 4:] = 0
    got, expected = program.module()(ids, mask), model(ids, mask)
    close(*((x[mask.bool()] if x.dim() == 3 else x) for x in (got, expected)))
