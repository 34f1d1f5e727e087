"""Mixed batches of a `PromptBank` against each prompt alone."""

import random
import re
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import ptune
import ptune.checkpoint

from .common import close, moved_by_a_bit
from .families import VOCABULARY

KINDS = {
    "shallow": {"tuning_mode": "ptune", "pre_seq_len": 5},
    "long": {"tuning_mode": "ptune", "pre_seq_len": 11},
    "overwrite": {"tuning_mode": "deep_ptune", "pre_seq_len": 3},
    "add": {"tuning_mode": "deep_ptune", "pre_seq_len": 4, "deep_prompt_mode": "add"},
    "head": {"tuning_mode": None},
}
LOADERS = {
    "sequence": ptune.AutoPTuneModelForSequenceClassification,
    "token": ptune.AutoPTuneModelForTokenClassification,
    "lm": ptune.AutoPTuneModelForCausalLM,
}


def tuned(base, folder: Path, kind: str, task: str, labels: int = 3) -> Path:
    """A folder of random prompts of a kind, and of a random head."""
    kwargs = {} if task == "lm" else {"num_labels": labels}
    model = LOADERS[task].from_pretrained(base.folder, **KINDS[kind], **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.7)
    path = folder / f"{kind}-{task}-{labels}"
    model.save_prompts(path)
    return path


def bank_of(base, **kwargs) -> ptune.PromptBank:
    loader = transformers.AutoModelForCausalLM if base.family.causal else transformers.AutoModel
    if base.family.name == "modernbert":
        loader = transformers.AutoModelForMaskedLM  # its classifiers begin with a layer of that head
    return ptune.PromptBank(base.stock(loader), **kwargs)


def batch(size: int, padding: str) -> tuple[Tensor, Tensor]:
    lengths = [random.randint(1, 9) for _ in range(size)]
    n = max(lengths)
    ids, mask = torch.randint(3, VOCABULARY, (size, n)), torch.zeros(size, n, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if padding == "right" else slice(n - length, n)] = 1
    return ids, mask


def alone(path: Path, task: str, ids: Tensor, mask: Tensor, like=lambda model: model) -> Tensor:
    """The logits of one text, run without padding by a model with these prompts, or one ``like`` it."""
    model = like(LOADERS[task].from_pretrained(path, prefix_sharing=False).eval())
    with torch.no_grad():
        return model(input_ids=ids[mask.bool()][None], attention_mask=mask[mask.bool()][None]).logits[0]


@pytest.mark.parametrize("kind", ["shallow", "overwrite", "head"])
def test_a_model_in_memory_is_added_as_its_folder(base_of, tmp_path, kind):
    base = base_of("llama")
    folder = tuned(base, tmp_path, kind, "sequence")
    model = LOADERS["sequence"].from_pretrained(folder)
    bank = bank_of(base)
    bank.add("folder", folder)
    with pytest.raises(TypeError, match="expected no keywords with a model, got revision"):
        bank.add("model", model, revision="main")
    bank.add("model", model)
    ids, mask = batch(1, "right")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the bank has a copy
    ids, mask = ids.expand(2, -1), mask.expand(2, -1)
    one, other = bank(ids, mask, prompt_names=["folder", "model"]).logits
    close(other, one)
    bank.save("model", tmp_path / "again")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[name], tensor)


def test_prompts_that_come_draw_no_random_numbers(base_of, tmp_path):
    """From those of a thread that samples."""
    base = base_of("llama")
    folders = {kind: tuned(base, tmp_path, kind, "lm") for kind in ("shallow", "overwrite", "add")}
    before = torch.get_rng_state()
    loaded = base.stock(transformers.AutoModelForCausalLM)
    drawn = not torch.equal(torch.get_rng_state(), before)
    before = torch.get_rng_state()
    bank = ptune.PromptBank(loaded)
    for kind, folder in folders.items():
        bank.add(kind, folder)
    assert torch.equal(torch.get_rng_state(), before), f"and loading the base {'does' if drawn else 'does not'}"


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3", "mistral", "mixtral", "gemma3", "gpt2", "bert", "roberta", "modernbert", "distilbert", "bloom"],
)
def test_mixed_batch_equals_each_prompt_alone(base_of, tmp_path, name, padding):
    base = base_of(name)
    tasks = ("sequence", "token") + ("lm",) * base.family.causal
    bank = bank_of(base)
    # a model that is found not to share answers right all the same, but slowly
    assert (bank._nothing is None) == (name == "bloom")
    folders = {}
    for i, kind in enumerate(KINDS):
        for task in tasks:
            if name == "gemma3" and task == "token":
                continue
            if kind == "head" and task == "lm":
                continue
            folders[f"{kind}.{task}"] = (tuned(base, tmp_path, kind, task, 2 + i), task)
            bank.add(f"{kind}.{task}", folders[f"{kind}.{task}"][0])
    names = [*folders, None, *random.sample([*folders], 3)]
    random.shuffle(names)
    ids, mask = batch(len(names), padding)
    output = bank(ids, mask, prompt_names=names)
    assert sorted(row for task in output.tasks.values() for row in task.rows) == list(range(len(names)))
    for row, prompt in enumerate(names):
        if prompt is None:
            continue
        path, task = folders[prompt]
        logits = output.logits[row] if task == "sequence" else output.logits[row][mask[row].bool()]
        run = partial(alone, path, task, ids[row], mask[row])
        close(logits, run(), 2e-5, nudged=partial(run, moved_by_a_bit))
    row = names.index(None)
    with torch.no_grad():
        expected = base.stock().eval()(ids[row][mask[row].bool()][None]).last_hidden_state[0]
    close(output.last_hidden_state[row][mask[row].bool()], expected, 2e-5)


def rows_run(bank: ptune.PromptBank) -> list[tuple[int, ...]]:
    """The shapes of what the first block is given, from now on."""
    seen: list[tuple[int, ...]] = []
    block = bank._runner.get_submodule(BLOCKS[bank._runner.config.model_type])[0]
    block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    return seen


BLOCKS = {"llama": "model.layers", "bert": "encoder.layer"}


def test_base_runs_once_and_prompt_rows_once_ever(base_of, tmp_path):
    base = base_of("llama")
    bank = bank_of(base)
    for kind in ("shallow", "overwrite", "add"):
        bank.add(kind, tuned(base, tmp_path, kind, "lm"))
    ids, mask = batch(5, "left")
    seen = rows_run(bank)
    names = ["shallow", None, "add", "overwrite", "shallow"]
    bank(ids, mask, prompt_names=names)
    assert sorted(seen) == sorted([(1, 5), (1, 3), (1, 4), tuple(ids.shape)])
    seen.clear()
    bank(ids, mask, prompt_names=names[::-1])
    assert seen == [tuple(ids.shape)]


def test_encoder_runs_shallow_rows_in_a_second_call(base_of, tmp_path):
    base = base_of("bert")
    bank = bank_of(base)
    bank.add("shallow", tuned(base, tmp_path, "shallow", "token"))
    bank.add("long", tuned(base, tmp_path, "long", "token"))
    bank.add("overwrite", tuned(base, tmp_path, "overwrite", "token"))
    ids, mask = batch(5, "right")
    seen = rows_run(bank)
    bank(ids, mask, prompt_names=["long", "overwrite", "shallow", None, "overwrite"])
    assert seen == [(1, 3), (3, ids.shape[1]), (2, 11 + ids.shape[1])]
    seen.clear()
    bank(ids, mask, prompt_names=["long", None, None, None, "shallow"])
    assert seen == [(5, 11 + ids.shape[1])] or seen == [(3, ids.shape[1]), (2, 11 + ids.shape[1])]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "bloom"])
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_generates_what_each_prompt_alone_does(base_of, tmp_path, name, how):
    if name == "bloom" and how.get("cache_implementation"):
        pytest.skip("bloom has no static cache")
    base = base_of(name)
    bank = bank_of(base)
    folders = {kind: tuned(base, tmp_path, kind, "lm") for kind in ("shallow", "long", "overwrite", "add")}
    for kind, folder in folders.items():
        bank.add(kind, folder)
    names = [*folders, None]
    random.shuffle(names)
    ids, mask = batch(len(names), "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    made = bank.generate(ids, mask, prompt_names=names, **options)
    again = bank.generate(ids, mask, prompt_names=names, **options)
    assert torch.equal(made, again)
    for row, prompt in enumerate(names):
        text = ids[row][mask[row].bool()][None]
        model = (
            base.stock(transformers.AutoModelForCausalLM)
            if prompt is None
            else ptune.AutoPTuneModelForCausalLM.from_pretrained(folders[prompt])
        )
        expected = model.eval().generate(text, attention_mask=torch.ones_like(text), **options)
        assert torch.equal(made[row, ids.shape[1] :], expected[0, text.shape[1] :]), prompt


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral", "bloom"])
@pytest.mark.parametrize(
    "how", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}, {"use_cache": False}]
)
def test_generates_for_texts_without_padding(base_of, tmp_path, name, size, how):
    """transformers leaves out a mask of ones."""
    if name == "bloom" and how.get("cache_implementation"):
        pytest.skip("bloom has no static cache")
    base = base_of(name)
    bank = bank_of(base)
    folders = {kind: tuned(base, tmp_path, kind, "lm") for kind in ("shallow", "long", "add")}
    for kind, folder in folders.items():
        bank.add(kind, folder)
    names = random.sample([*folders], size)
    ids = torch.randint(3, VOCABULARY, (size, 7))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = bank.generate(ids, prompt_names=names, **options | how)
    assert torch.equal(made, bank.generate(ids, torch.ones_like(ids), prompt_names=names, **options | how))
    for row, prompt in enumerate(names):
        model = ptune.AutoPTuneModelForCausalLM.from_pretrained(folders[prompt]).eval()
        assert torch.equal(made[row], model.generate(ids[row][None], **options)[0]), prompt


def test_other_models_with_prompts_run_while_it_generates(base_of, tmp_path):
    base = base_of("llama")
    bank, folder = bank_of(base), tuned(base, tmp_path, "shallow", "lm")
    bank.add("long", tuned(base, tmp_path, "long", "lm"))
    other = ptune.AutoPTuneModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, VOCABULARY, (1, 5))
    expected = other(ids).logits
    seen = []

    def judge(_, scores: Tensor) -> Tensor:
        seen.append(other(ids).logits)
        return scores

    bank.generate(ids, prompt_names=["long"], max_new_tokens=2, pad_token_id=0, logits_processor=[judge])
    assert seen
    for logits in seen:
        close(logits, expected)


def test_a_base_that_changes_in_place_is_noticed(base_of, tmp_path):
    base = base_of("llama")
    stock = base.stock(transformers.AutoModelForCausalLM)
    bank, folder = ptune.PromptBank(stock), tuned(base, tmp_path, "overwrite", "lm")
    bank.add("a", folder)
    ids, mask = batch(2, "left")
    before = bank(ids, mask, prompt_names=["a", "a"]).last_hidden_state
    with torch.no_grad():
        for layer in stock.model.layers:
            layer.self_attn.k_proj.weight.add_(torch.randn_like(layer.self_attn.k_proj.weight))
    fresh = ptune.PromptBank(stock)
    fresh.add("a", folder)
    after = fresh(ids, mask, prompt_names=["a", "a"]).last_hidden_state
    assert not torch.allclose(before, after, atol=1e-2)
    assert torch.equal(bank(ids, mask, prompt_names=["a", "a"]).last_hidden_state, after)
    assert bank.compiled_bytes == fresh.compiled_bytes


def test_autocast_does_not_round_what_is_kept(base_of, tmp_path):
    base = base_of("llama")
    bank = bank_of(base)
    folder = tuned(base, tmp_path, "add", "lm")
    bank.add("a", folder)
    ids, mask = torch.randint(3, VOCABULARY, (1, 5)), torch.ones(1, 5, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        bank(ids, mask, prompt_names=["a"])
    close(bank(ids, mask, prompt_names=["a"]).logits[0], alone(folder, "lm", ids[0], mask[0]))


def test_what_is_added_in_inference_mode_may_train(base_of, tmp_path):
    base = base_of("llama")
    bank = bank_of(base)
    with torch.inference_mode():
        bank.add("a", tuned(base, tmp_path, "shallow", "sequence"))
    own = bank.unfreeze("a")
    bank(torch.randint(3, VOCABULARY, (1, 5)), prompt_names=["a"], labels={"a": torch.tensor([1])}).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in own.values())


def test_tasks_of_one_class_share_what_is_made_for_it(base_of, tmp_path):
    """Thousands of tasks would else take a model's modules each; what their labels are is their own."""
    base = base_of("llama")
    bank = bank_of(base)
    before = len(bank._heads._skeletons)
    kinds = {"a": "regression", "b": "multi_label_classification", "c": None}
    for name, kind in kinds.items():
        labels = {"id2label": {i: f"{name}{i}" for i in range(3)}, "label2id": {f"{name}{i}": i for i in range(3)}}
        LOADERS["sequence"].from_pretrained(base.folder, **labels, problem_type=kind).save_prompts(tmp_path / name)
        bank.add(name, tmp_path / name)
    assert len(bank._heads._skeletons) == before + 1
    for name, kind in kinds.items():
        assert bank.head(name).config.id2label == {i: f"{name}{i}" for i in range(3)}
        assert bank.head(name).config.label2id == {f"{name}{i}": i for i in range(3)}
        assert bank.head(name).config.problem_type == kind


def test_an_assistant_has_prompts_of_its_own(base_of, tmp_path):
    base = base_of("llama")
    bank, folder = bank_of(base), tuned(base, tmp_path, "shallow", "lm")
    bank.add("long", tuned(base, tmp_path, "long", "lm"))
    assistant = ptune.AutoPTuneModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, VOCABULARY, (1, 5))
    options = {"prompt_names": ["long"], "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assisted = bank.generate(ids, torch.ones_like(ids), assistant_model=assistant, **options)
    assert torch.equal(assisted, bank.generate(ids, torch.ones_like(ids), **options))


def test_generate_takes_any_mask(base_of, tmp_path):
    base = base_of("llama")
    bank = bank_of(base)
    bank.add("a", tuned(base, tmp_path, "shallow", "lm"))
    ids, mask = batch(3, "left")
    options = {"prompt_names": ["a", None, "a"], "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    made = bank.generate(ids, mask, **options)
    for other in (mask * 7, mask.bool(), mask.float()):
        assert torch.equal(bank.generate(ids, other, **options), made)


def test_conversation_goes_on_from_a_cache(base_of, tmp_path):
    base = base_of("llama")
    bank = bank_of(base)
    for kind in ("shallow", "overwrite"):
        bank.add(kind, tuned(base, tmp_path, kind, "lm"))
    names = ["overwrite", None, "shallow"]
    ids, mask = batch(3, "left")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = bank.generate(ids, mask, prompt_names=names, return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, torch.randint(3, VOCABULARY, (3, 2))], 1)
    wider = torch.cat([mask, mask.new_ones(3, 5)], 1)
    resumed = bank.generate(more, wider, prompt_names=names, past_key_values=first.past_key_values, **options)
    assert torch.equal(resumed, bank.generate(more, wider, prompt_names=names, **options))


def test_budget_drops_the_least_recently_used(base_of, tmp_path):
    base = base_of("llama")
    folder = tuned(base, tmp_path, "shallow", "lm")
    ids, mask = batch(1, "right")
    one = bank_of(base)
    one.add("a", folder)
    expected = one(ids, mask, prompt_names=["a"]).logits[0]
    size = one.compiled_bytes
    assert size == 2 * 3 * 2 * 5 * 6 * 4  # K and V, layers, heads, rows, width, float32
    bank = bank_of(base, max_bytes=2 * size + size // 2)
    for number in range(7):
        bank.add(f"p{number}", folder)
    for number in [*range(7), 6, 5, 0, 6]:
        close(bank(ids, mask, prompt_names=[f"p{number}"]).logits[0], expected)
        assert bank.compiled_bytes <= bank.max_bytes
    kept = {name for name, entry in bank._entries.items() if entry in bank._compiled.kept}
    assert kept == {"p0", "p6"}
    everything = bank(ids.expand(7, -1), mask.expand(7, -1), prompt_names=bank.names)
    assert bank.compiled_bytes == 2 * size
    for logits in everything.logits:
        close(logits, expected)
    bank.remove("p6")
    assert bank.compiled_bytes < 2 * size
    assert bank.names == [f"p{number}" for number in range(6)]
    assert re.fullmatch(r"PromptBank\(Llama\w*; prompts: p0, p1, p2, p3, p4, p5; compiled: \d+\.\d MiB\)", repr(bank))


def test_prompts_in_place_of_others(base_of, tmp_path):
    base = base_of("llama")
    bank = bank_of(base)
    one, other = (tuned(base, tmp_path / name, "shallow", "lm") for name in ("one", "other"))
    ids, mask = torch.randint(3, VOCABULARY, (1, 6)), torch.ones(1, 6, dtype=torch.long)
    bank.add("b", other, replace=True)  # which replaces nothing
    bank.add("a", one)
    bank(ids, mask, prompt_names=["a"])
    size = bank.compiled_bytes
    with pytest.raises(FileNotFoundError):
        bank.add("a", tmp_path / "nowhere", replace=True)
    expected = [alone(path, "lm", ids[0], mask[0]) for path in (one, other)]
    assert not torch.allclose(*expected)
    close(bank(ids, mask, prompt_names=["a"]).logits[0], expected[0], 2e-5)
    bank.add("a", other, replace=True)
    assert bank.names == ["b", "a"]
    assert bank.compiled_bytes < size
    close(bank(ids, mask, prompt_names=["a"]).logits[0], expected[1], 2e-5)


def test_a_file_that_is_written_over_changes_nothing(base_of, tmp_path):
    base = base_of("llama")
    bank = bank_of(base, max_bytes=0)  # the prompt is compiled anew at every call
    folder = tuned(base, tmp_path, "add", "lm")
    bank.add("a", folder)
    ids, mask = batch(2, "right")
    expected = bank(ids, mask, prompt_names=["a", "a"]).last_hidden_state
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size // 2))
    assert torch.equal(bank(ids, mask, prompt_names=["a", "a"]).last_hidden_state, expected)


def test_takes_a_compiled_prefix(base_of, tmp_path):
    base = base_of("llama")
    folder = tuned(base, tmp_path, "overwrite", "sequence")
    model = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(folder).eval()
    model.save_prefix(tmp_path / "compiled")
    bank = bank_of(base)
    bank.add("compiled", tmp_path / "compiled")
    ids, mask = batch(2, "right")
    close(bank(ids, mask, prompt_names=["compiled", None]).logits[0], alone(folder, "sequence", ids[0], mask[0]), 2e-5)


def test_base_is_left_alone(base_of, tmp_path):
    base = base_of("llama")
    stock = base.stock(transformers.AutoModelForCausalLM).train()
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    bank = ptune.PromptBank(stock)
    bank.add("a", tuned(base, tmp_path, "overwrite", "lm"))
    ids, mask = batch(2, "left")
    bank(ids, mask, prompt_names=["a", None])
    assert type(stock) is transformers.LlamaForCausalLM
    assert stock.training
    assert stock.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in stock.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in stock.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())
    pointers = {parameter.data_ptr() for parameter in stock.parameters()}
    assert pointers == {
        p.data_ptr() for name, p in bank._runner.named_parameters() if not name.endswith("prompt_embeddings.weight")
    }


def test_half_precision_base(base_of, tmp_path):
    base = base_of("llama")
    folders = {kind: tuned(base, tmp_path, kind, "token") for kind in ("shallow", "overwrite", "add")}
    bank = ptune.PromptBank(base.stock(transformers.AutoModelForCausalLM, dtype=torch.bfloat16))
    for kind, folder in folders.items():
        bank.add(kind, folder)
    ids, mask = batch(3, "left")
    output = bank(ids, mask, prompt_names=list(folders))
    for row, folder in enumerate(folders.values()):
        model = ptune.AutoPTuneModelForTokenClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
        text = ids[row][mask[row].bool()]
        with torch.no_grad():
            half = model(text[None], attention_mask=torch.ones_like(text[None])).logits[0]
        exact = alone(folder, "token", ids[row], mask[row])
        assert output.logits[row].dtype == torch.float32
        error = (output.logits[row][mask[row].bool()] - exact).abs().max()
        assert error <= 2 * (half - exact).abs().max()


def test_adds_and_removes_while_batches_run(base_of, tmp_path):
    base = base_of("llama")
    folders = {kind: tuned(base, tmp_path, kind, "lm") for kind in ("shallow", "overwrite")}
    bank = bank_of(base, max_bytes=1000)
    for kind, folder in folders.items():
        bank.add(kind, folder)
    ids, mask = batch(4, "left")
    names = ["shallow", "overwrite", None, "shallow"]
    expected = bank(ids, mask, prompt_names=names).last_hidden_state
    failures: list[BaseException] = []
    done = threading.Event()

    def change() -> None:
        try:
            while not done.is_set():
                bank.add("other", folders["shallow"])
                bank(ids, mask, prompt_names=["other", "overwrite", "other", None])
                bank.remove("other")
        except BaseException as failure:  # what a thread raises is lost
            failures.append(failure)

    threads = [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            close(bank(ids, mask, prompt_names=names).last_hidden_state, expected)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures


def to_the_left(values: Tensor, mask: Tensor, filling: int) -> Tensor:
    """Rows whose real columns come first."""
    moved = torch.full_like(values, filling)
    for row, (its, real) in enumerate(zip(values, mask.bool(), strict=True)):
        moved[row, : int(real.sum())] = its[real]
    return moved


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "bloom"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_gradients_are_those_of_training_apart(base_of, tmp_path, name, padding):
    base = base_of(name)
    bank = bank_of(base)
    folders = {}
    for i, kind in enumerate(("shallow", "overwrite", "add", "long", "head")):
        task = ("sequence", "token", "lm")[i % (3 if base.family.causal else 2)]
        folders[kind] = (tuned(base, tmp_path, kind, task), task)
        bank.add(kind, folders[kind][0])
    names = [*folders, "shallow", "add", "overwrite"]
    random.shuffle(names)
    ids, mask = batch(len(names), padding)
    trained = {kind: bank.unfreeze(kind) for kind in folders}
    labels = {}
    for kind, (_, task) in folders.items():
        rows = [row for row, other in enumerate(names) if other == kind]
        if task == "sequence":
            labels[kind] = torch.randint(3, (len(rows),))
        else:
            labels[kind] = torch.randint(3, ids[rows].shape).where(mask[rows].bool(), -100)
            labels[kind] = labels[kind] if task == "token" else ids[rows].where(mask[rows].bool(), -100)
    if any((mask[names.index(kind)].sum() < 2) for kind, (_, task) in folders.items() if task == "lm"):
        labels = {kind: its for kind, its in labels.items() if folders[kind][1] != "lm"}  # a text that predicts nothing
    bank(ids, mask, prompt_names=names, labels=labels).loss.backward()
    for kind, its in labels.items():
        path, task = folders[kind]
        model = LOADERS[task].from_pretrained(path, prefix_sharing=False).eval()
        rows = [row for row, other in enumerate(names) if other == kind]
        # padded on the right, where the stock model that a head alone has counts positions as the definition does
        its = its if task == "sequence" else to_the_left(its, mask[rows], -100)
        inputs = {
            "input_ids": to_the_left(ids[rows], mask[rows], 0),
            "attention_mask": to_the_left(mask[rows], mask[rows], 0),
            "labels": its,
        }

        def apart(model, inputs=inputs):
            model.zero_grad()
            model(**inputs).loss.backward()
            return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

        moved, expected = moved_by_a_bit(model), apart(model)
        assert trained[kind].keys() == expected.keys()
        for key, gradient in expected.items():
            close(trained[kind][key].grad, gradient, 2e-5, lambda m=moved, key=key: apart(m)[key], least=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_keys_and_values_train_beside_prompts(base_of, tmp_path, dtype):
    base = base_of("llama")
    folder, other = tuned(base, tmp_path, "overwrite", "sequence"), tuned(base, tmp_path, "shallow", "sequence")
    LOADERS["sequence"].from_pretrained(folder).save_prefix(tmp_path / "prefix")
    bank = ptune.PromptBank(base.stock(transformers.AutoModelForCausalLM).to(dtype))
    bank.add("a", tmp_path / "prefix")
    bank.add("b", other)
    names, kinds = ["b", "a", "a", None], torch.randint(3, (2,))
    ids, mask = batch(4, "right")
    bank(ids, mask, prompt_names=names)  # which compiles both
    trained = bank.unfreeze("a")
    bank(ids, mask, prompt_names=names, labels={"a": kinds}).loss.backward()
    model = LOADERS["sequence"].from_pretrained(tmp_path / "prefix", dtype=dtype).eval()
    model(input_ids=ids[1:3], attention_mask=mask[1:3], labels=kinds).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for name, gradient in expected.items():
        got = trained[name].grad
        assert got.dtype == torch.float32
        if (
            dtype == torch.bfloat16
        ):  # in which random models are too steep to be compared; but rows are summed in float32
            assert not torch.equal(got, got.bfloat16().float())
        else:
            close(got, gradient, 2e-5, least=1e-6)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.sub_(parameter.grad)
    bank.save("a", tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in trained.items())


def test_what_trains_is_saved(base_of, tmp_path):
    base = base_of("llama")
    bank = bank_of(base)
    bank.add("a", tuned(base, tmp_path, "overwrite", "sequence"))
    ids, mask = batch(3, "right")
    before = bank(ids, mask, prompt_names=["a"] * 3).logits
    with torch.no_grad():
        for parameter in bank.unfreeze("a").values():
            parameter.add_(torch.randn_like(parameter))
    after = bank(ids, mask, prompt_names=["a"] * 3).logits
    assert not torch.allclose(before[0], after[0])
    bank.save("a", tmp_path / "saved")
    for row in range(3):
        close(after[row], alone(tmp_path / "saved", "sequence", ids[row], mask[row]), 2e-5)
    bank.add("b", tmp_path / "saved")
    close(bank(ids, mask, prompt_names=["b", None, "a"]).logits[0], after[0])
