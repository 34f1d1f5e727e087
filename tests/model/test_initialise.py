"""Where prompts start: at the frozen base's own states on real tokens."""

import numpy as np
import pytest
import torch
import transformers

import ptune

from .common import COUNT, close, settings_for
from .families import FAMILIES, LAYERS


def layers_of(model):
    return model.intermediate_prompt_embeddings.weight.detach().view(LAYERS, -1, 24)


@pytest.mark.parametrize("mode", ["overwrite", "add"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.causal])
def test_a_causal_model_starts_as_the_base_prompted_with_the_text(base_of, name, mode):
    if (name, mode) == ("gemma4", "add"):
        pytest.skip("its layers get more from words than from prompt rows, which are no words")
    base = base_of(name)
    words, text = torch.randint(3, 61, (COUNT,)), torch.randint(3, 61, (3, 6))
    model = base.tuned(**settings_for(mode, prompt_init_text=words.tolist()))
    expected = base.stock()(input_ids=torch.cat([words.expand(3, -1), text], 1)).last_hidden_state[:, COUNT:]
    close(model(input_ids=text).last_hidden_state, expected)


def test_on_a_real_model(data_folder):
    """stories260K prompted with words, by a soft prompt made of them."""
    folder = data_folder / "stories260K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = "Lily and Tom went to the park. They saw a big dog"
    ids = tokenizer.encode(words, add_special_tokens=False)
    stories = [tokenizer(story, return_tensors="pt").input_ids for story in ("The dog was sad.", "A bird sang to Tom")]
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for mode in ("shallow", "overwrite", "add"):
        model = ptune.AutoPTuneModelForCausalLM.from_pretrained(
            folder, **settings_for(mode, len(ids), prompt_init_text=words)
        )
        for text in stories:
            expected = stock(torch.cat([torch.tensor([ids]), text], 1)).logits[:, len(ids) :]
            close(model(text).logits, expected)


def test_a_short_text_is_repeated_and_a_long_one_cut(base_of):
    base = base_of("llama")
    embeddings = base.stock().embed_tokens.weight
    model = base.tuned(**settings_for("shallow", 5, prompt_init_text=[7, 9]))
    assert torch.equal(model.prompt_embeddings.weight, embeddings[[7, 9, 7, 9, 7]])
    model = base.tuned(**settings_for("shallow", 2, prompt_init_text=[7, 9, 11]))
    assert torch.equal(model.prompt_embeddings.weight, embeddings[[7, 9]])


def test_rows_of_training_texts_are_states_in_context(base_of):
    base = base_of("bert")
    texts = [torch.randint(3, 61, (n,)).tolist() for n in (5, 3, 8)]
    model = base.tuned(**settings_for("overwrite", 7, prompt_init_text=texts))
    stock = base.stock()
    outputs = [stock(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states for text in texts]
    embeddings = stock.embeddings.word_embeddings.weight
    layers = layers_of(model)
    assert torch.equal(layers[0], torch.zeros_like(layers[0]))
    used = set()
    for row in range(7):
        places = [
            (which, column)
            for which, text in enumerate(texts)
            for column in range(len(text))
            if torch.allclose(layers[1:, row], torch.stack([s[0, column] for s in outputs[which][1:LAYERS]]), atol=1e-5)
        ]
        assert len(places) == 1
        which, column = places[0]
        used.add(which)
        assert torch.equal(model.prompt_embeddings.weight[row], embeddings[texts[which][column]])
    assert used == {0, 1, 2}  # every text in turn


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_random_rows_are_as_long_as_the_median_real_one(base_of, name):
    base = base_of(name)
    model = base.tuned(**settings_for("overwrite", 6))
    stock = base.stock()
    ids = torch.arange(3, 61)[None]
    real = stock.get_input_embeddings()(ids).norm(dim=-1).median()
    lengths = model.prompt_embeddings.weight.norm(dim=-1)
    assert lengths.max() - lengths.min() < 1e-4
    assert 0.7 < lengths[0] / real < 1.4
    layers, states = layers_of(model), stock(input_ids=ids, output_hidden_states=True).hidden_states
    assert not layers[0].any()
    for depth in range(1, LAYERS):
        assert 0.6 < layers[depth].norm(dim=-1)[0] / states[depth].norm(dim=-1).median() < 1.6


def test_vocabulary_rows_are_embeddings(base_of):
    base = base_of("gemma3")
    model = base.tuned(**settings_for("overwrite", 6, prompt_init="vocab"))
    table = base.stock().get_input_embeddings()(torch.arange(61))
    distance = (model.prompt_embeddings.weight[:, None] - table).norm(dim=-1)
    assert distance.min(-1).values.max() < 1e-4
    assert not {0, 1, 2} & set(distance.argmin(-1).tolist())  # no special tokens
    expected = base.stock()(input_ids=distance.argmin(-1)[None], output_hidden_states=True).hidden_states
    for depth in range(1, LAYERS):
        close(layers_of(model)[depth], expected[depth][0])


def test_added_prompts_start_at_zero(base_of):
    for init in ("random", "vocab"):
        model = base_of("llama").tuned(**settings_for("add", prompt_init=init))
        assert not model.intermediate_prompt_embeddings.weight.any()
        assert model.prompt_embeddings.weight.all()


def test_the_global_seed_decides(base_of):
    for init in ({}, {"prompt_init": "vocab"}, {"prompt_init_text": [[5, 6, 7], [8, 9]]}):
        made = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            made.append(base_of("llama").tuned(**settings_for("overwrite", **init)).prompt_embeddings.weight)
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("kind", [transformers.GPTJConfig, transformers.CodeGenConfig, transformers.CTRLConfig])
def test_a_model_reads_no_more_than_its_positions(kind):
    """These compute their tables in advance, for so many positions and no more."""
    sizes = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16, "dff": 24, "rotary_dim": 2}
    long = {"prompt_init_text": [list(range(3, 43))]}
    for init in ({}, long):
        model = ptune.AutoPTuneModel.from_config(kind(**sizes), **settings_for("overwrite", **init))
        assert model.intermediate_prompt_embeddings.weight.isfinite().all()


def test_strings_are_read_by_the_bases_tokenizer(minilm):
    text = "Classify the message as spam or ham"
    model = ptune.AutoPTuneModel.from_pretrained(minilm, **settings_for("overwrite", 8, prompt_init_text=text))
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = model.get_input_embeddings().weight[torch.tensor([ids[i % len(ids)] for i in range(8)])]
    assert torch.equal(model.prompt_embeddings.weight, expected)
    again = ptune.AutoPTuneModel.from_pretrained(
        minilm, **settings_for("shallow", 8, prompt_init_text=text), tokenizer=tokenizer
    )
    assert torch.equal(again.prompt_embeddings.weight, expected)
    several = ptune.AutoPTuneModel.from_pretrained(
        minilm, **settings_for("overwrite", 3, prompt_init_text=[text, "a b"])
    )
    assert several.intermediate_prompt_embeddings.weight.isfinite().all()


def test_the_tokenizer_comes_from_where_the_base_does(minilm, monkeypatch):
    asked, read = {}, transformers.AutoTokenizer.from_pretrained

    def from_pretrained(name, **options):
        asked.update(options)
        return read(name)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    options = {"token": "secret", "revision": "v2", "trust_remote_code": False}
    ptune.AutoPTuneModel.from_pretrained(minilm, **settings_for("shallow", 3, prompt_init_text="a b"), **options)
    assert asked == options


def test_a_base_of_random_weights_has_no_tokenizer(minilm):
    config, settings = FAMILIES["bert"].config(), settings_for("shallow", 2, prompt_init_text="a b")
    with pytest.raises(ValueError, match=r"prompt_init_text: .* pass tokenizer="):
        ptune.AutoPTuneModel.from_config(config, **settings)
    tokenizer = type("Tokenizer", (), {"encode": staticmethod(lambda text, add_special_tokens: [7, 9])})()
    model = ptune.AutoPTuneModel.from_config(config, **settings, tokenizer=tokenizer)
    assert torch.equal(model.prompt_embeddings.weight, model.get_input_embeddings().weight[[7, 9]])


class Rows(torch.utils.data.Dataset):
    """A dataset is no sequence."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def column(rows):
    """As pandas and pyarrow have them."""
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


KINDS = {
    "tuple": tuple,
    "tensor": torch.tensor,
    "array": np.array,
    "column": column,
    "series": lambda rows: pytest.importorskip("pandas").Series(rows, index=range(1, len(rows) + 1)),
    "column of arrays": lambda rows: column([np.array(row) for row in rows]),
    "list of tensors": lambda rows: [torch.tensor(row) for row in rows],
    "dataset": Rows,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("ids", [[5, 6, 7], [[5, 6, 7], [8, 9, 10]]], ids=["one", "several"])
def test_token_ids_of_any_kind(base_of, kind, ids):
    base, prompts = base_of("gpt2"), []
    for text in (ids, kind(ids)):
        torch.manual_seed(0)
        prompts.append(base.tuned(**settings_for("shallow", prompt_init_text=text)).prompt_embeddings.weight)
    assert torch.equal(*prompts)


def test_initialising_leaves_no_trace(base_of):
    """A model in training, with prompts already: the base is run bare, and all but the prompts is as before."""
    model = base_of("bert").tuned(**settings_for("overwrite")).train()
    model.encoder.layer[1].eval()
    training = [module.training for module in model.modules() if "prompt" not in type(module).__name__]
    settings = ptune.PTuneConfig(**settings_for("overwrite", prompt_init_text=[3, 4, 5, 6]))
    model.init_prompts(settings)
    first = [p.detach().clone() for p in (model.prompt_embeddings.weight, model.intermediate_prompt_embeddings.weight)]
    with torch.autocast("cpu", torch.bfloat16):
        model.init_prompts(settings)
    assert torch.equal(first[0], model.prompt_embeddings.weight)
    assert torch.equal(first[1], model.intermediate_prompt_embeddings.weight)
    assert [module.training for module in model.modules()][: len(training) - 2] == training[:-2]
    assert sum(len(block._forward_pre_hooks) for block in model.encoder.layer) == LAYERS


def test_what_is_recorded_is_not_cached(base_of):
    """A cache of blocks on servers would be a session, which these may be too small for."""
    model, calls = base_of("llama").tuned(), []
    model.base_model.register_forward_pre_hook(lambda body, args, kwargs: calls.append(kwargs), with_kwargs=True)
    model.init_prompts(ptune.PTuneConfig(tuning_mode="deep_ptune", pre_seq_len=3))
    assert calls[0]["use_cache"] is False
