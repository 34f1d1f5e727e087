"""What people do with a model whose blocks are on servers: right as with a local one, or refused by name."""

import copy
import logging
import pickle

import pytest
import torch
import transformers
from model.common import close

import ptune

pytest.importorskip("ray", reason="ray is not installed")

import ray

from ptune import remote
from ptune.inputs import BEFORE_5_24
from ptune.remote import RemoteSequential, ServeConfig
from ptune.remote.keeping import Keeping
from ptune.remote.shards import read_tensors

from .common import batch_of, give, settings_for

LM = remote.AutoDistributedModelForCausalLM


@pytest.fixture
def far(serve, folder_of):
    model = LM.from_pretrained(folder_of("llama"), servers=serve("llama", 2), **settings_for("overwrite"))
    give(model, model)
    return model.eval()


def test_a_copy_has_prompts_of_its_own(far, folder_of):
    ids, _ = batch_of("none")
    local = ptune.AutoPTuneModelForCausalLM.from_pretrained(folder_of("llama"), **settings_for("overwrite")).eval()
    twin = copy.deepcopy(far)
    give(twin, local)
    with torch.no_grad():
        before = far(ids).logits
        close(twin(ids).logits, local(ids).logits)
        cache = far(ids[:, :3]).past_key_values  # a copy made now has no part in it
        copy.deepcopy(far)
        close(far(ids[:, 3:], past_key_values=cache).logits, before[:, 3:])


def test_it_cannot_be_pickled(far):
    with pytest.raises(TypeError, match=r"on servers cannot be pickled; save_prompts"):
        pickle.dumps(far)


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1, 0]])
def test_some_rows_of_a_cache_go_on(far, rows):
    ids, _ = batch_of("none")
    with torch.no_grad():
        cache = far(ids[:, :4]).past_key_values
        cache.batch_select_indices(torch.tensor(rows))
        close(far(ids[rows, 4:], past_key_values=cache).logits, far(ids).logits[rows, 4:])


@pytest.mark.parametrize("given", [{"use_cache": True}, {"past_key_values": transformers.DynamicCache()}])
def test_a_cache_with_gradients_is_refused(far, given):
    with pytest.raises(NotImplementedError, match=r"expected none where gradients are wanted.* torch.no_grad"):
        far(torch.tensor([[5, 6]]), **given)


def test_packed_texts_are_refused(serve, folder_of):
    model = LM.from_pretrained(folder_of("llama"), servers=serve("llama", 2))
    with pytest.raises(NotImplementedError, match=r"position_ids: packed batches .* let the texts read one another"):
        model(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)


def test_hooks_on_the_way_back_see_each_block(far):
    ids, _ = batch_of("none")
    seen = []
    far.model.layers[1].register_full_backward_hook(lambda block, given, made: seen.append(made[0].abs().max()))
    far.model.layers[2].register_full_backward_hook(lambda block, given, made: seen.append(made[0].abs().max()))
    far(ids, labels=ids).loss.backward()
    assert len(seen) == 2
    assert seen[0] != seen[1]


@pytest.mark.parametrize("setting", [{"rms_norm_eps": 0.5}, {"num_hidden_layers": 2}, {"hidden_act": "relu"}])
def test_other_settings_than_the_servers_have(setting, serve, folder_of):
    for given in (setting, {"config": transformers.AutoConfig.from_pretrained(folder_of("llama"), **setting)}):
        with pytest.raises(ValueError, match=rf"{next(iter(setting))}: expected as in the config of"):
            LM.from_pretrained(folder_of("llama"), servers=serve("llama", 2), **given)
    LM.from_pretrained(folder_of("llama"), servers=serve("llama", 2), pad_token_id=7)


def test_prompts_of_other_weights(serve, folder_of, tmp_path, caplog):
    """The blocks that servers have are looked at, and not only the table of tokens, which is here."""
    settings, base = settings_for("overwrite"), tmp_path / "base"
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder_of("llama"))
    torch.nn.init.normal_(stock.model.layers[-1].self_attn.q_proj.weight)
    stock.save_pretrained(base)
    for path, warns in ((folder_of("llama"), False), (base, True)):
        ptune.AutoPTuneModelForCausalLM.from_pretrained(path, **settings).save_prompts(tmp_path / "prompts")
        caplog.clear()
        LM.from_pretrained(tmp_path / "prompts", servers=serve("llama", 2), base_model=folder_of("llama"))
        assert ("of other weights" in caplog.text) is warns


@pytest.mark.parametrize(
    ("given", "kind", "problem"),
    [
        ({"attn_dtype": "bfloat16"}, NotImplementedError, "attention in half precision .* it runs on servers"),
        ({"wire_dtype": "int8"}, ValueError, "wire_dtype: expected one of"),
        ({"micro_batch": 2.5}, ValueError, "micro_batch: expected at least one row, got 2.5"),
        ({"retries": 3}, TypeError, "retries: expected Retries"),
        ({"servers": ["llama"]}, TypeError, "servers: expected Servers or their name"),
        ({"quantization_config": {"load_in_8bit": True}}, NotImplementedError, "quantization_config: expected None"),
    ],
)
def test_arguments_are_checked_at_once(given, kind, problem, serve, folder_of):
    with pytest.raises(kind, match=problem):
        LM.from_pretrained(folder_of("llama"), **{"servers": serve("llama", 2), **settings_for("overwrite")} | given)


def test_dtypes_of_the_wire_go_by_three_names(serve):
    link = remote.connect(serve("llama", 2))
    for name in ("bfloat16", "bf16", torch.bfloat16):
        assert RemoteSequential(link, wire_dtype=name).wire_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"device": "gpu"}, "device: expected 'cpu' or 'cuda', got 'gpu'"),
        ({"limits": {"max_tokens": "99"}}, "max_tokens: expected a whole number of at least 1, got '99'"),
        ({"limits": {"max_tokens": 0}}, "max_tokens: expected a whole number of at least 1, got 0"),
        ({"limits": {"idle_seconds": float("nan")}}, "idle_seconds: expected a number of at least 0, got nan"),
        ({"limits": 3}, "limits: expected ServerLimits or dict, got 3"),
        ({"spans": 4}, "spans: expected list or tuple or nothing, got 4"),
        ({"device": None}, "device: expected str, got None"),
        ({"cpus": "many"}, "cpus: expected int or float, got 'many'"),
        ({"gpus": True}, "gpus: expected int or float or nothing, got True"),
        ({"max_restarts": "x"}, "max_restarts: expected int, got 'x'"),
        ({"servers": True}, "servers: expected at least 1, got True"),
        ({"resources": ["a"]}, "resources: expected dict"),
        ({"resources": {"a": "b"}}, "resources: expected numbers"),
    ],
)
def test_servers_are_not_begun_with(given, problem):
    with pytest.raises(ValueError, match=problem):
        ServeConfig(model="base", **given)


def test_a_config_that_is_no_yaml(tmp_path):
    (tmp_path / "servers.yaml").write_text("model: [")
    with pytest.raises(ValueError, match=r"servers\.yaml: expected YAML, got"):
        ServeConfig.read(tmp_path / "servers.yaml")


def test_a_config_without_a_model(tmp_path):
    (tmp_path / "servers.yaml").write_text("servers: 2")
    with pytest.raises(ValueError, match=r"servers\.yaml: expected a model"):
        ServeConfig.read(tmp_path / "servers.yaml")
    assert ServeConfig.read(tmp_path / "servers.yaml", model="base").servers == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{", "not JSON"), ("[]", "expected a weight_map"), ('{"weight_map": {"a": 3}}', "expected names of files")],
)
def test_a_damaged_index(tmp_path, content, problem):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json: {problem}"):
        read_tensors(tmp_path, lambda name: True)


@pytest.mark.parametrize(("given", "expected"), [(None, "local"), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_no_cluster_is_joined_unasked(given, expected, monkeypatch):
    """Not even one that runs on this machine: a model would be sent to whoever has started it."""
    addresses = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **rest: addresses.append(address))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert remote.join() == (given is None)
    assert addresses == [expected]


def test_compiled(far):
    ids = torch.randint(3, 61, (2, 5))
    expected = far(ids, labels=ids).loss
    compiled = torch.compile(far, backend="eager")
    close(compiled(ids, labels=ids).loss, expected)


@pytest.mark.parametrize("spans", [[[0, 1, 2]], [0, 4], [["0", "4"]]])
def test_spans_are_pairs(spans):
    with pytest.raises(ValueError, match=r"spans: expected pairs \[first, last\], got"):
        ServeConfig(model="base", spans=spans).spans_of(4)


@pytest.mark.parametrize("what", ["assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"])
def test_generation_that_crops_caches_is_refused(far, what):
    before = far.config.num_hidden_layers
    with pytest.raises(NotImplementedError, match=f"{what}: expected None"):
        far.generate(torch.tensor([[5, 6]]), **{what: 2})
    assert far.config.num_hidden_layers == before


@pytest.mark.parametrize("rows", [torch.tensor([0, 9]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])])
def test_rows_of_a_session_are_checked(rows, serve):
    session = RemoteSequential(remote.connect(serve("llama", 2))).inference_session()
    session.step(torch.randn(2, 3, 24))
    with pytest.raises(ValueError, match=r"rows: expected numbers \[b\] from 0 to 1"):
        session.step(torch.randn(2, 1, 24), rows=rows)
    with pytest.raises(ValueError, match="hidden: expected 2 rows, as the session has, got 3"):
        session.step(torch.randn(3, 1, 24))
    assert session.length == 3


def test_what_is_served_stays(cluster, folder_of):
    """Until it is stopped, even where nobody holds what `serve_blocks` returned."""
    name = remote.serve_blocks(model=str(folder_of("llama")), name="kept by nobody", cpus=0).name
    model = LM.from_pretrained(folder_of("llama"), servers=name)
    assert model(torch.tensor([[5, 6]]), use_cache=False).logits.isfinite().all()
    remote.Servers(name, [ray.get_actor(row["actor"], namespace="ptune") for row in remote.status(name)]).stop()


def test_what_cannot_run_is_not_served(cluster, tmp_path):
    sizes = {"vocab_size": 64, "n_embd": 24, "n_layer": 2, "n_head": 3, "rotary_dim": 4}
    transformers.AutoModelForCausalLM.from_config(transformers.GPTJConfig(**sizes)).save_pretrained(tmp_path / "gptj")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2}
    dynamic = transformers.LlamaConfig(num_attention_heads=3, rope_parameters=rope, **sizes)
    transformers.AutoModelForCausalLM.from_config(dynamic).save_pretrained(tmp_path / "dynamic")
    problems = {"dynamic": "rope_type 'dynamic'"}
    if BEFORE_5_24:  # its blocks have returned states alone since
        problems["gptj"] = "expected hidden states, got tuple"
    for folder, problem in problems.items():
        servers = remote.serve_blocks(model=str(tmp_path / folder), cpus=0, max_restarts=0)
        with pytest.raises(remote.RemoteError, match=problem) as raised:
            servers.wait()
        assert len(str(raised.value)) < 400  # and not Ray's whole traceback
        assert servers.name not in remote.serve._started  # so that the name can be had again
    transformers.LlavaConfig().save_pretrained(tmp_path / "multimodal")
    with pytest.raises(NotImplementedError, match=r"got .*, which is multimodal \(llava\)"):
        remote.serve_blocks(model=str(tmp_path / "multimodal"))


def test_a_cluster_that_has_too_little(cluster, folder_of, caplog):
    with caplog.at_level(logging.WARNING):
        servers = remote.serve_blocks(model=str(folder_of("llama")), name="too many", cpus=1000)
    assert "1 servers reserve 1000 CPU, and this cluster has 2" in caplog.text
    with pytest.raises(remote.RemoteError, match=r"1 of 1 servers have not started in 0\.5 s"):
        servers.wait(0.5)
    servers.stop()


def test_what_is_closed_while_it_runs_is_not_kept():
    keeping = Keeping(100, idle=60.0)
    keeping.drop("running")
    keeping.put("running", 1, 10)
    keeping.put("other", 2, 10)
    assert (keeping.get("running"), keeping.get("other"), len(keeping)) == (None, 2, 1)
    keeping.drop("other")
    keeping.put("other", 3, 10)  # it was there to be dropped: this is another
    assert keeping.get("other") == 3
