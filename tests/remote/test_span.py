"""Blocks that are loaded alone do what they do in the whole model."""

import json

import pytest
import torch
import transformers
from model.common import close
from model.families import FAMILIES, VOCABULARY

pytest.importorskip("ray", reason="ray is not installed")

from ptune.capture import Capture
from ptune.remote.span import Span

from .common import LAYERS

SERVED = sorted(FAMILIES.keys() - {"albert", "bloom", "gemma4", "mixtral"})


def through(body, blocks, hidden, first, last, **arguments):
    """What stock blocks ``first`` … ``last - 1`` make of ``hidden``, which hooks of this file's own put in."""
    made = []

    def put_in(block, args, kwargs):
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handles = [
        blocks[first].register_forward_pre_hook(put_in, with_kwargs=True),
        blocks[last - 1].register_forward_hook(lambda block, args, output: made.append(output)),
    ]
    try:
        body(input_ids=torch.randint(3, VOCABULARY, hidden.shape[:2]), **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return made[0]


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("spans", [[(1, 3)], [(0, 4)], [(0, 1), (1, 4)]], ids=str)
def test_states_and_gradients(name, spans, folder_of):
    family, folder = FAMILIES[name], folder_of(name)
    body = transformers.AutoModel.from_pretrained(folder).eval()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, 7:] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0) + 2
    arguments = {"attention_mask": mask}
    if name != "distilbert":
        arguments["position_ids"] = positions
    hidden = torch.randn(3, 9, body.config.hidden_size, requires_grad=True)
    expected = through(body, family.blocks(body), hidden, spans[0][0], spans[-1][1], **arguments)
    got = hidden
    for first, last in spans:
        got = Span(folder, first, last)(got, first, last, mask=mask, positions=arguments.get("position_ids"))
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real])
    weight = torch.randn_like(expected) * mask[..., None]
    gradients = [torch.autograd.grad((states * weight).sum(), hidden)[0][real] for states in (got, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", SERVED)
def test_shared_rows_are_those_of_each_text(name, folder_of):
    """Rows that run once, at the head of two spans, against rows that run with every text."""
    spans = [Span(folder_of(name), first, last, "float64") for first, last in [(0, 1), (1, 4)]]
    assert all(span.unshared is None for span in spans)
    assert all(span.causal == FAMILIES[name].causal for span in spans)
    width, mode = spans[0].width, "add" if FAMILIES[name].causal else "overwrite"
    shapes = (1, 2, width), (3, 7, width), (4, 2, width)
    rows, text, prompts = leaves = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    shared, own, whole = text, rows, torch.cat([rows.expand(3, -1, -1), text], 1)
    for span in spans:
        where = span.first, span.last
        deep = prompts[span.first : span.last]
        capture = Capture(deep.unbind(), mode == "overwrite")
        own = span(own, *where, prompts=deep, mode=mode, shared=capture)
        shared = span(shared, *where, mask=mask, positions=positions[:, 2:], shared=capture.prefix())
        whole = span(whole, *where, mask=mask, positions=positions, prompts=deep, mode=mode)
    real = mask[:, 2:].bool()
    close(shared[real], whole[:, 2:][real])
    weight = torch.randn_like(text) * real[..., None]
    gradients = [torch.autograd.grad((states * weight).sum(), leaves) for states in (shared, whole[:, 2:])]
    for gradient, other in zip(*gradients, strict=True):
        close(gradient, other)


def test_blocks_that_do_not_share_keep_their_attention(folder_of, monkeypatch):
    sharing = Span(folder_of("llama"), 1, 3)
    monkeypatch.setattr("ptune.remote.span.disorder", lambda *args: "of a reason")
    others = [Span(folder_of("llama"), 1, 3)]
    monkeypatch.setattr("ptune.remote.span.KNOWN", frozenset())
    others.append(Span(folder_of("llama"), 1, 3))
    assert [other.unshared for other in (sharing, *others)] == [
        None,
        "of a reason",
        "'llama' is not among the models known to share",
    ]
    stock = transformers.AutoModel.from_pretrained(folder_of("llama")).config._attn_implementation
    assert sharing.body.config._attn_implementation != stock
    assert all(other.body.config._attn_implementation == stock for other in others)
    hidden = torch.randn(2, 5, 24)
    for other in others:
        close(other(hidden, 1, 3), sharing(hidden, 1, 3))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_weights_have_the_dtype_that_is_asked_for(dtype, folder_of, tmp_path):
    transformers.AutoModel.from_pretrained(folder_of("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    made, wanted = Span(tmp_path, 1, 3, dtype), torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    assert {weight.dtype for weight in made.body.parameters()} == {made.dtype} == {wanted}
    assert made(torch.randn(2, 5, 24), 1, 3).dtype == torch.float32


def test_quantised_checkpoints_are_refused(folder_of, tmp_path):
    for file in folder_of("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match="expected weights as they are, got quantised ones"):
        Span(tmp_path, 0, 1)


def test_it_holds_its_own_blocks_alone(folder_of):
    folder = folder_of("llama")
    whole = transformers.AutoModel.from_pretrained(folder)
    span = Span(folder, 1, 3)
    stored = sum(
        {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in span.body.parameters()}.values()
    )
    blocks = sum(p.nbytes for block in whole.layers[1:3] for p in block.parameters())
    assert blocks <= stored < blocks + 1000


def test_it_reads_its_own_shards_alone(folder_of, tmp_path):
    index = json.loads((folder_of("llama") / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if ".layers.2." in name}
    assert needed < set(index.values())
    for file in folder_of("llama").iterdir():
        if file.suffix != ".safetensors" or file.name in needed:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    Span(tmp_path, 2, 3)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        Span(tmp_path, 0, LAYERS)


@pytest.mark.parametrize("name", ["albert", "bloom", "mixtral"])
def test_blocks_that_cannot_be_apart_are_refused(name, folder_of):
    hidden = torch.randn(1, 3, 24)
    with pytest.raises(NotImplementedError):
        Span(folder_of(name), 0, 2)(hidden, 0, 2)


@pytest.mark.parametrize("left", ["hidden_size_per_layer_input", "num_kv_shared_layers"])
def test_blocks_that_read_more_than_states_are_refused(tmp_path, left):
    config = FAMILIES["gemma4"].config()
    setattr(config, left, 0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="as they read tokens or the keys of other blocks"):
        Span(tmp_path, 0, 1)


def test_encoder_decoders_are_refused(tmp_path):
    config = transformers.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    transformers.T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="expected blocks of one text, got those of an encoder-decoder"):
        Span(tmp_path, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last": 5}, "blocks: expected some of 0 to 3"),
        ({"first": 2, "last": 2}, "blocks"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_what_is_not_there_is_refused(arguments, message, folder_of):
    with pytest.raises(ValueError, match=message):
        Span(folder_of("llama"), **{"first": 0, "last": 1} | arguments)
