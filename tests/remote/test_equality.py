"""A model whose blocks are on servers equals the local one, which knows nothing of them."""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from model.common import close, moved_by_a_bit

import ptune

pytest.importorskip("ray", reason="ray is not installed")

import ray

from ptune import remote
from ptune.inputs import CACHE
from ptune.models.bert import DistributedBertForTokenClassification
from ptune.models.llama import DistributedLlamaForSequenceClassification
from ptune.remote import wire

from .common import COUNT, LAYERS, batch_of, give, settings_for, trained

MODES = ("none", "shallow", "overwrite", "add")
PADDINGS = ("none", "right", "left")


def pair_of(task, folder, servers, mode, sharing="auto", **rest):
    settings = settings_for(mode) | {"prefix_sharing": sharing}
    local = getattr(ptune, f"AutoPTuneModelFor{task}").from_pretrained(folder, **settings)
    far = getattr(remote, f"AutoDistributedModelFor{task}").from_pretrained(folder, servers=servers, **settings, **rest)
    give(far, local)
    assert far.prefix_plan == local.prefix_plan
    return local, far


def check(local, far, batch, real):
    """Losses, logits and every gradient."""
    outputs = [model.eval()(**batch) for model in (local, far)]
    for output in outputs:
        output.loss.backward()
    close(outputs[1].loss, outputs[0].loss)
    close(outputs[1].logits[real], outputs[0].logits[real])
    expected = trained(local)
    assert trained(far).keys() == expected.keys()

    def nudged(name):
        moved = moved_by_a_bit(local)
        moved.zero_grad()
        moved(**batch).loss.backward()
        return trained(moved)[name].grad

    for name, parameter in trained(far).items():
        assert expected[name].grad.any()
        close(parameter.grad, expected[name].grad, nudged=lambda name=name: nudged(name))


@pytest.mark.parametrize("micro_batch", [None, 2, 3])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("servers", [1, 2, 4])
def test_language_model(servers, mode, padding, micro_batch, serve, folder_of):
    name = serve("llama", servers)
    local, far = pair_of("CausalLM", folder_of("llama"), name, mode, micro_batch=micro_batch)
    ids, mask = batch_of(padding)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    real = slice(None) if mask is None else mask.bool()
    check(local, far, {"input_ids": ids, "attention_mask": mask, "labels": labels}, real)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "servers"), [("llama", 2), ("qwen3", 1), ("mistral", 1), ("bert", 2)])
def test_sequence_classification(family, servers, mode, padding, serve, folder_of):
    local, far = pair_of("SequenceClassification", folder_of(family), serve(family, servers), mode, micro_batch=3)
    ids, mask = batch_of(padding)
    check(local, far, {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0, 1])}, ...)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "servers"), [("llama", 4), ("mistral", 1), ("bert", 2)])
def test_token_classification(family, servers, mode, serve, folder_of):
    local, far = pair_of("TokenClassification", folder_of(family), serve(family, servers), mode)
    ids, mask = batch_of("right")
    labels = torch.randint(2, ids.shape).masked_fill(mask == 0, -100)
    check(local, far, {"input_ids": ids, "attention_mask": mask, "labels": labels}, mask.bool())


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES[1:])
def test_rows_that_are_not_shared(mode, padding, serve, folder_of):
    local, far = pair_of("CausalLM", folder_of("llama"), serve("llama", 2), mode, sharing=False, micro_batch=2)
    ids, mask = batch_of(padding)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    real = slice(None) if mask is None else mask.bool()
    check(local, far, {"input_ids": ids, "attention_mask": mask, "labels": labels}, real)
    if padding != "right":
        how = {"attention_mask": mask, "max_new_tokens": 4, "pad_token_id": 0, "do_sample": False, "num_beams": 2}
        assert far.generate(ids, **how).tolist() == local.generate(ids, **how).tolist()


@pytest.mark.parametrize("first", [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], ids=["of one type", "of their own"])
def test_token_types_are_honoured(first, serve, folder_of):
    """Prompt rows have the type of the token that they stand before; only those of one type are shared."""
    local, far = pair_of("SequenceClassification", folder_of("bert"), serve("bert", 2), "overwrite", micro_batch=2)
    ids, mask = batch_of("right")
    types = torch.randint(2, ids.shape)
    types[:, 0] = torch.tensor(first)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": torch.tensor([0, 1, 1, 0, 1])}
    check(local, far, batch, ...)


def test_checkpointing_changes_nothing(serve, folder_of):
    local, far = pair_of("CausalLM", folder_of("llama"), serve("llama", 2), "add")
    far.gradient_checkpointing_enable()
    ids, mask = batch_of("left")
    labels = ids.masked_fill(mask == 0, -100)
    for model in (local, far):
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
    for parameter, other in zip(far.prompt_parameters(), local.prompt_parameters(), strict=True):
        close(parameter.grad, other.grad)


def test_positions_are_honoured(serve, folder_of):
    local, far = pair_of("CausalLM", folder_of("llama"), serve("llama", 2), "add", sharing=True)
    ids, mask = batch_of("left")
    positions = (mask.cumsum(1) - 1).clamp_min(0) * 2 + 3
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    check(local, far, batch, mask.bool())


def test_training_follows_the_local_curve(serve, folder_of):
    local, far = pair_of("SequenceClassification", folder_of("bert"), serve("bert", 2), "overwrite", micro_batch=3)
    local.dropout.p = far.dropout.p = 0.0  # the head's own
    curves = []
    batches = [(*batch_of("right"), torch.randint(2, (5,))) for _ in range(20)]
    for model in (local, far):
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        curve = []
        for ids, mask, labels in batches:
            loss = model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    close(curves[1], curves[0], 1e-4)
    assert curves[0].std() > 0.05


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=["greedy", "beams", "sample"]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "servers"), [("llama", 2), ("qwen3", 1), ("mistral", 1), ("gpt2", 1)])
def test_generate(family, servers, mode, how, serve, folder_of):
    local, far = pair_of("CausalLM", folder_of(family), serve(family, servers), mode)
    ids, mask = batch_of("left")
    continued = []
    for model in (local, far):
        torch.manual_seed(5)
        continued.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **how))
    assert continued[1].tolist() == continued[0].tolist()


@pytest.mark.parametrize("mode", ["none", "shallow", "add"])
def test_watched_blocks_generate(mode, serve, folder_of):
    """Where hooks see what each block is given, each has a session of its own."""
    local, far = pair_of("CausalLM", folder_of("llama"), serve("llama", 2), mode)
    ids, mask = batch_of("left")
    how = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0, "num_beams": 2}
    seen = []
    handle = far.model.layers[2].register_forward_hook(lambda block, args, output: seen.append(output.shape[1]))
    assert far.generate(ids, **how).tolist() == local.generate(ids, **how).tolist()
    assert len(seen) > 1 == seen[-1]
    with torch.no_grad():
        cache = far(ids, attention_mask=mask, use_cache=True).past_key_values
        handle.remove()
        with pytest.raises(ValueError, match=rf"{CACHE}: expected a cache as .* watched or not as now"):
            far(ids[:, :1], past_key_values=cache)


def test_prompts_off_is_the_stock_model(serve, folder_of):
    _, far = pair_of("CausalLM", folder_of("llama"), serve("llama", 2), "overwrite")
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder_of("llama")).eval()
    ids, mask = batch_of("left")
    with torch.no_grad(), far.disable_prompts():
        close(far(ids, attention_mask=mask).logits[mask.bool()], stock(ids, attention_mask=mask).logits[mask.bool()])


def test_deep_prompts_begin_as_they_do_here(serve, folder_of):
    texts = [list(range(5, 17)), list(range(20, 29))]
    made = []
    for loader, where in (
        (ptune.AutoPTuneModelForCausalLM, {}),
        (remote.AutoDistributedModelForCausalLM, {"servers": serve("llama", 2)}),
    ):
        torch.manual_seed(3)
        model = loader.from_pretrained(folder_of("llama"), **settings_for("overwrite"), prompt_init_text=texts, **where)
        made.append([parameter.detach() for parameter in model.prompt_parameters()])
    for got, expected in zip(made[1], made[0], strict=True):
        close(got, expected)


def test_folders_of_prompts_are_those_of_a_local_model(serve, folder_of, tmp_path):
    servers = serve("llama", 2)
    local, far = pair_of("SequenceClassification", folder_of("llama"), servers, "add")
    far.save_prompts(tmp_path)
    again = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(tmp_path)
    back = DistributedLlamaForSequenceClassification.from_pretrained(tmp_path, servers=servers)
    for name, parameter in trained(local).items():
        assert torch.equal(again.get_parameter(name), parameter)
        assert torch.equal(back.get_parameter(name), parameter)


def test_compiled_prefixes_are_refused(serve, folder_of, tmp_path):
    local, far = pair_of("CausalLM", folder_of("llama"), serve("llama", 2), "shallow")
    with pytest.raises(ValueError, match="compile_prompts: expected blocks that are here"):
        far.compile_prompts()
    with pytest.raises(ValueError, match="save_prefix: expected blocks that are here"):
        far.save_prefix(tmp_path)
    local.save_prefix(tmp_path)
    with pytest.raises(ValueError, match="a compiled prefix: expected prompts"):
        far.load_prompts(tmp_path)
    ids, _ = batch_of("none")
    check(local, far, {"input_ids": ids, "labels": ids}, ...)


def test_the_client_reads_no_blocks(serve, folder_of, tmp_path):
    folder = folder_of("bert")
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in weights.items() if ".layer." not in name}
    assert needed < set(weights.values())
    for file in folder.iterdir():
        if file.suffix != ".safetensors" or file.name in needed:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = DistributedBertForTokenClassification.from_pretrained(tmp_path, servers=serve("bert", 2), num_labels=3)
    assert model.num_labels == 3
    assert not [name for name, _ in model.named_parameters() if ".layer." in name]


def test_some_blocks(serve, folder_of):
    blocks = remote.RemoteSequential(remote.connect(serve("llama", 2)))
    assert len(blocks) == LAYERS
    assert len(blocks[1:3][1:]) == 1
    with pytest.raises(ValueError, match=rf"blocks: expected at least one of {LAYERS}, got slice\(2, 2, None\)"):
        blocks[2:2]
    with pytest.raises(ValueError, match="micro_batch: expected at least one row, got 0"):
        remote.RemoteSequential(blocks.link, micro_batch=0)
    body = transformers.AutoModel.from_pretrained(folder_of("llama")).eval().requires_grad_(False)
    hidden, mask = torch.randn(3, 7, 24, requires_grad=True), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    embedded = body.rotary_emb(hidden, torch.arange(7)[None])
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    prompts = torch.randn(2, 2, 24, requires_grad=True)
    rows = torch.tensor([0, 3, 0], dtype=torch.int32)
    states = hidden
    for layer, prompt in zip(body.layers[1:3], prompts, strict=True):
        replaced = [torch.cat([row[:at], prompt, row[at + 2 :]]) for row, at in zip(states, rows.tolist(), strict=True)]
        states = layer(torch.stack(replaced), attention_mask=causal, position_embeddings=embedded)
    got = blocks[1:3](hidden, prompts, mask, starts=rows)
    real = mask.bool()
    close(got[real], states[real])
    weight = torch.randn_like(got) * mask[..., None]
    expected = torch.autograd.grad((states * weight).sum(), [hidden, prompts])
    for gradient, other in zip(torch.autograd.grad((got * weight).sum(), [hidden, prompts]), expected, strict=True):
        close(gradient, other)


def test_some_blocks_with_shared_rows(serve, folder_of):
    blocks = remote.RemoteSequential(remote.connect(serve("llama", 2)), micro_batch=2)[1:3]
    body = transformers.AutoModel.from_pretrained(folder_of("llama")).eval().requires_grad_(False)
    hidden, shared, prompts = (torch.randn(*shape, 24, requires_grad=True) for shape in ((3, 7), (1, 2), (2, 2)))
    padding = (0, 3, 0)
    mask = torch.arange(7) >= torch.tensor(padding)[:, None]
    positions = (mask.cumsum(1) - 1).clamp_min(0) + 2

    def alone(text):
        states = torch.cat([shared[0], text])[None]
        embedded = body.rotary_emb(states, torch.arange(states.shape[1])[None])
        for layer, prompt in zip(body.layers[1:3], prompts, strict=True):
            states = torch.cat([states[:, :2] + prompt, states[:, 2:]], 1)
            states = layer(states, attention_mask=None, position_embeddings=embedded)
        return states[0, 2:]

    expected = torch.cat([alone(text[at:]) for text, at in zip(hidden, padding, strict=True)])
    first = torch.cat([torch.ones(3, 2, dtype=torch.bool), mask], 1)
    got = blocks(hidden, prompts, first, positions, mode="add", shared=shared)[mask]
    close(got, expected)
    close(blocks(hidden[:1], prompts, mode="add", shared=shared)[0], expected[:7])
    weight, leaves = torch.randn_like(got), [hidden, shared, prompts]
    gradients = [torch.autograd.grad((states * weight).sum(), leaves) for states in (got, expected)]
    for gradient, other in zip(*gradients, strict=True):
        close(gradient, other)
    before = torch.arange(9) >= torch.tensor(padding)[:, None]  # [pad ; prompt ; text]
    with blocks.inference_session(max_length=11) as session:
        parts = [session.step(hidden[:, :4], prompts, before[:, :6], positions[:, :4], mode="add", shared=shared)]
        for at in (4, 5, 6):
            parts.append(session.step(hidden[:, at : at + 1], None, before[:, : at + 3], positions[:, at : at + 1]))
        close(torch.cat(parts, 1)[mask], expected)
        assert session.length == 9
        with pytest.raises(ValueError, match="at most 2 more columns, got 3"):
            session.step(hidden[:, :1], shared=shared)
        with pytest.raises(ValueError, match="shared: expected in the first step"):
            session.step(hidden[:, :1], shared=shared[:, :1])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"prompts": torch.zeros(LAYERS, 2, 24)}, "prompts: expected 3 rows, as shared has, got 2"),
        ("llama", {"attention_mask": torch.ones(2, 5)}, r"mask: expected bool of shape \(2, 8\)"),
        ("bert", {}, "shared: expected prompts that overwrite them"),
        (
            "bert",
            {"prompts": torch.zeros(LAYERS, 3, 24), "mode": "add"},
            "shared: expected prompts that overwrite them",
        ),
    ],
)
def test_rows_that_cannot_be_shared(family, changes, message, serve):
    blocks = remote.RemoteSequential(remote.connect(serve(family, 2)))
    for run in (blocks, blocks.inference_session().step):
        with pytest.raises(ValueError, match=message):
            run(torch.zeros(2, 5, 24), **{"shared": torch.zeros(1, 3, 24)} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 24)}, r"hidden: expected \[b, S, d\].*, got shape \(2, 24\)"),
        ({"hidden": torch.zeros(2, 0, 24)}, r"hidden: expected \[b, S, d\].*, got shape \(2, 0, 24\)"),
        ({"hidden": torch.zeros(0, 5, 24)}, r"hidden: expected \[b, S, d\].*, got shape \(0, 5, 24\)"),
        ({"prompts": torch.zeros(LAYERS - 1, 2, 24)}, rf"prompts: expected \[{LAYERS}, m, 24\]"),
        ({"prompts": torch.zeros(LAYERS, 2, 23)}, rf"prompts: expected \[{LAYERS}, m, 24\]"),
        ({"prompts": torch.zeros(LAYERS, 0, 24)}, rf"prompts: expected \[{LAYERS}, m, 24\], m above 0"),
        ({"prompts": torch.zeros(LAYERS, 6, 24)}, "prompts: expected 1 to 5 rows, got 6"),
        ({"shared": torch.zeros(2, 3, 24)}, r"shared: expected \[1, m, 24\].*, got shape \(2, 3, 24\)"),
        ({"shared": torch.zeros(1, 0, 24)}, r"shared: expected \[1, m, 24\], m above 0"),
        ({"shared": torch.zeros(24)}, r"shared: expected \[1, m, 24\]"),
        ({"attention_mask": torch.ones(3, 5)}, "mask: expected"),
        ({"attention_mask": torch.ones(2, 4)}, "mask: expected"),
        ({"position_ids": torch.ones(3, 5)}, "positions: expected"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, serve):
    blocks = remote.RemoteSequential(remote.connect(serve("llama", 2)))
    for run in (blocks, blocks.inference_session().step):
        with pytest.raises(ValueError, match=message):
            run(**{"hidden": torch.zeros(2, 5, 24)} | changes)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 1), (3, 1, 1), (2, 2, 2)], ids=str)
def test_the_least_sizes(sizes, serve, folder_of):
    """Of batch, text and prompt."""
    batch, length, count = sizes
    blocks = remote.RemoteSequential(remote.connect(serve("llama", 2)))
    body = transformers.AutoModel.from_pretrained(folder_of("llama")).eval()
    hidden, rows = torch.randn(batch, length, 24), torch.randn(1, count, 24)
    body.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = body(inputs_embeds=torch.cat([rows.expand(batch, -1, -1), hidden], 1)).last_hidden_state[:, count:]
    close(blocks(hidden, shared=rows), expected)
    close(blocks(torch.cat([rows.expand(batch, -1, -1), hidden], 1))[:, count:], expected)
    with blocks.inference_session() as session:
        close(session.step(hidden, shared=rows), expected)


def test_a_session_equals_one_call(serve):
    blocks = remote.RemoteSequential(remote.connect(serve("llama", 4)))
    hidden, prompts = torch.randn(2, 9, 24), torch.randn(LAYERS, 3, 24)
    with torch.no_grad():
        whole = blocks(hidden, prompts)
    with blocks.inference_session(max_length=9) as session:
        with pytest.raises(ValueError, match="mask: expected"):
            session.step(hidden[:, :5], attention_mask=torch.ones(2, 7), shared=prompts[:1])
        parts = [session.step(hidden[:, :5], prompts), session.step(hidden[:, 5:6]), session.step(hidden[:, 6:])]
        close(torch.cat(parts, 1), whole)
        assert session.length == 9
        with pytest.raises(ValueError, match="at most 0 more columns, got 1"):
            session.step(hidden[:, :1])
    with pytest.raises(ValueError, match="closed"):
        session.step(hidden[:, :1])


def test_prompts_travel_once_per_version(serve, folder_of):
    _, far = pair_of("SequenceClassification", folder_of("bert"), serve("bert", 2), "add", micro_batch=1)
    ids, _ = batch_of("none")
    traffic, size = far.remote.link.traffic, LAYERS * COUNT * 24 * 4
    traffic.clear()
    for versions in (1, 2):
        for _ in range(2):
            far(ids)
        assert traffic["prompts"] == versions * size
        with torch.no_grad():
            far.intermediate_prompt_embeddings.weight += 1
    far(ids, labels=torch.zeros(5, dtype=torch.long)).loss.backward()
    assert traffic["prompts"] == 3 * size
    assert traffic["prompt gradients"] == len(ids) * size


def test_a_link_promises_what_each_server_can():
    same = {"fingerprint": "", "weights": ["", ""]}
    both = [
        same | {"max_tokens": 9, "dtype": "float32", "unshared": None, "causal": True},
        same | {"max_tokens": 8, "dtype": "bfloat16", "unshared": "of a reason", "causal": False},
    ]
    for states in (both, both[::-1]):
        link = remote.Link([], remote.Retries(), states)
        assert (link.max_tokens, link.dtype, link.unshared, link.causal) == (8, torch.bfloat16, "of a reason", False)


def test_servers_that_share_no_rows(serve, folder_of, monkeypatch):
    def make(link, *args):
        begin(link, *args)
        link.unshared = "of a reason"

    begin = remote.Link.__init__
    monkeypatch.setattr(remote.Link, "__init__", make)
    settings = settings_for("shallow") | {"servers": serve("llama", 2)}
    far = remote.AutoDistributedModelForCausalLM.from_pretrained(folder_of("llama"), **settings)
    assert far.prefix_plan.path == "concat"
    assert "its servers share no prompt rows: of a reason" in far.prefix_plan.reason
    with pytest.raises(ValueError, match=r"prefix_sharing: True.*its servers share no prompt rows: of a reason"):
        remote.AutoDistributedModelForCausalLM.from_pretrained(folder_of("llama"), **settings, prefix_sharing=True)


def test_what_is_sent_is_a_copy():
    """In what dtype and layout soever it comes: it may be sent again when its owner has changed it."""
    given = torch.ones(2, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.long), torch.ones(2, dtype=torch.int32)
    states = [torch.ones(2, 3, 4, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.float16)]
    states.append(torch.ones(3, 2, 4).transpose(0, 1))
    arrays = [*wire.geometry(*given).values(), *(wire.to_array(each, wire.name_of(each.dtype)) for each in states)]
    for tensor in (*given, *states):
        tensor.zero_()
    assert all(array.all() for array in arrays)
    assert all(array.flags.c_contiguous for array in arrays)


def test_a_version_has_one_value(serve, monkeypatch):
    """Even where another thread sends others at the same time."""
    link, put, sent = remote.connect(serve("llama", 2)), ray.put, []

    def meanwhile(array):
        monkeypatch.setattr(ray, "put", put)
        sent.extend(link.prompts(link.legs(0, 2), torch.ones(2, 3, 24)))
        return put(array)

    monkeypatch.setattr(ray, "put", meanwhile)
    sent += link.prompts(link.legs(0, 2), torch.zeros(2, 3, 24))
    assert sent[0].version != sent[1].version


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("mode", MODES[1:])
def test_prompt_rows_travel_once_per_step(mode, micro_batch, serve, folder_of):
    _, far = pair_of("CausalLM", folder_of("llama"), serve("llama", 2), mode, micro_batch=micro_batch)
    ids, _ = batch_of("none")
    traffic, rows, text = far.remote.link.traffic, COUNT * 24 * 4, ids.numel() * 24 * 4
    deep = 0 if mode == "shallow" else LAYERS * rows
    for versions in (1, 0):
        traffic.clear()
        far(ids, labels=ids).loss.backward()
        assert traffic == {
            "prompts": rows + versions * deep,
            "prompts between servers": rows,
            "hidden": 2 * text,
            "hidden between servers": text,
            "gradients": text,  # of what the model makes: that of the text's embeddings nobody reads
            "gradients between servers": text,
            "prompt gradients": rows + deep,
            "prompt gradients between servers": rows,
        }
    traffic.clear()
    far.generate(ids, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    new = 2 * len(ids) * 24 * 4
    assert traffic["prompts"] == traffic["prompts between servers"] == rows
    assert traffic["hidden"] == 2 * (text + new)
    assert traffic["hidden between servers"] == text + new


@pytest.mark.parametrize("kind", ["prompts", "rows"])
def test_a_gradient_that_nobody_wants_does_not_travel(kind, serve):
    blocks = remote.RemoteSequential(remote.connect(serve("llama", 2)), micro_batch=2)
    hidden, prompts, rows = (torch.randn(*shape, 24, requires_grad=True) for shape in ((3, 7), (LAYERS, 2), (1, 2)))
    how, leaves = {"prompts": ({}, [prompts]), "rows": ({"shared": rows}, [prompts, rows])}[kind]
    weight, traffic, found = torch.randn_like(hidden), blocks.link.traffic, []
    for text, ways in ((hidden, 2), (hidden.detach(), 1)):
        traffic.clear()
        (blocks(text, prompts, mode="add", **how) * weight).sum().backward()
        assert traffic["gradients"] == ways * hidden.nbytes
        assert traffic["gradients between servers"] == hidden.nbytes
        found.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for gradient, other in zip(*found, strict=True):
        close(gradient, other)


@pytest.mark.parametrize("shared", [None, torch.zeros(1, 2, 24)], ids=["text", "shared"])
def test_nothing_waits_for_the_garbage_collector(shared, serve):
    count = 3 if shared is None else 4
    blocks = remote.RemoteSequential(remote.connect(serve("llama", 2)), micro_batch=2)
    hidden = torch.randn(5, 7, 24, requires_grad=True)
    actors = [span.server for span in blocks.link.spans]

    def held_by(output):
        return output.grad_fn.run.chunks, output.grad_fn.run.shared

    gc.collect()
    gc.disable()
    try:
        outputs = [blocks(hidden, shared=shared) for _ in range(2)]
        assert [ray.get(actor.status.remote())["kept"] for actor in actors] == [2 * count] * 2
        outputs[0].sum().backward()
        assert [ray.get(actor.status.remote())["kept"] for actor in actors] == [count] * 2
        # with references to prompts, and to what stands between the servers
        left = weakref.WeakSet(part for output in outputs for parts in held_by(output) for part in parts)
        assert len(left) == 2 * count
        del outputs
        assert [ray.get(actor.status.remote())["kept"] for actor in actors] == [0, 0]
        assert not left
    finally:
        gc.enable()


def test_half_the_bytes_on_the_wire(serve):
    def rounded(tensor):
        return tensor.detach().bfloat16().float().requires_grad_()

    servers = serve("llama", 2)
    whole, half = (
        remote.RemoteSequential(remote.connect(servers), wire_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    hidden = torch.randn(4, 8, 24, requires_grad=True)
    states = half(hidden)
    gradient = torch.autograd.grad(states.square().sum(), hidden)[0]
    # the same, rounded by hand wherever it travels
    given = [rounded(hidden)]
    made = [whole[:2](given[0])]
    given.append(rounded(made[0]))
    made.append(whole[2:](given[1]))
    assert torch.equal(states, rounded(made[1]))
    back = rounded(2 * states)
    for part, at in zip(reversed(made), reversed(given), strict=True):
        back = rounded(torch.autograd.grad(part, at, back)[0])
    assert torch.equal(gradient, back)
    assert half.link.traffic["hidden"] == half.link.traffic["gradients"] == 2 * hidden.numel() * 2
    assert half.link.traffic["hidden between servers"] == hidden.numel() * 2


def test_rounding_on_the_way_keeps_prompts_shared(serve, folder_of):
    _, far = pair_of("CausalLM", folder_of("llama"), serve("llama", 2), "shallow", wire_dtype="bfloat16")
    assert far.remote.wire_dtype == "bfloat16"
    ids, _ = batch_of("none")
    far.remote.link.traffic.clear()
    far(ids, labels=ids).loss.backward()
    assert far.remote.link.traffic["hidden"] == 2 * ids.numel() * 24 * 2
    assert far.remote.link.traffic["prompts"] == COUNT * 24 * 4


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_is_not_recorded_is_refused(name, serve, folder_of):
    _, far = pair_of("CausalLM", folder_of("llama"), serve("llama", 2), "shallow")
    with pytest.raises(NotImplementedError, match=name):
        far(torch.tensor([[5, 6]]), **{name: True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"prefix_sharing": True}, "prefix_sharing: True.*prompt rows read the text"), ({"base_dropout": True}, "base_")],
)
def test_settings_that_servers_do_not_have(settings, message, serve, folder_of):
    with pytest.raises(ValueError, match=message):
        remote.AutoDistributedModelForTokenClassification.from_pretrained(
            folder_of("bert"), servers=serve("bert", 2), **settings_for("add"), **settings
        )


def test_servers_of_another_model_are_refused(serve, folder_of):
    with pytest.raises(ValueError, match="another config"):
        remote.AutoDistributedModelForCausalLM.from_pretrained(folder_of("qwen3"), servers=serve("llama", 2))
    with pytest.raises(remote.RemoteError, match="ptune serve-blocks"):
        remote.AutoDistributedModelForCausalLM.from_pretrained(folder_of("qwen3"), servers="nobody")


def test_without_ray():
    script = (
        "import sys; sys.modules['ray'] = None\n"
        "import ptune, ptune.models.llama\n"
        "from ptune.models import PTuneLlamaForCausalLM\n"
        "try:\n    from ptune.models.llama import DistributedLlamaForCausalLM\n"
        "except ImportError as error:\n    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "ptune.remote needs Ray: pip install 'ptune-kernels[remote]'"
