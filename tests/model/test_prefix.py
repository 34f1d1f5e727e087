"""The prefix path beside the concat path: heads, dtypes, ways of training, and which rows are run."""

import copy
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ptune
from ptune.checkpoint import CONFIG_NAME, WEIGHTS_NAME, compiled_names
from ptune.precision import to_half

from .common import COUNT, MODES, PADDINGS, SHARED, close, set_prompts, settings_for, take, texts_for
from .families import FAMILIES, VOCABULARY
from .oracle import pad

CORE = [name for name, family in FAMILIES.items() if family.core]
LOADERS = {
    "generation": ptune.AutoPTuneModelForCausalLM,
    "classification": ptune.AutoPTuneModelForSequenceClassification,
    "tagging": ptune.AutoPTuneModelForTokenClassification,
}
TASKS = [
    (name, task)
    for name in CORE
    for task in LOADERS
    if (task != "generation" or FAMILIES[name].causal) and (name, task) != ("gemma3", "tagging")
]


def batch(padding, task, pad_id):
    texts = texts_for(padding, (11, 3, 9, 1))
    ids, mask = pad(texts, padding, pad_id)
    if task == "classification":
        labels = torch.randint(3, (len(ids),))
    else:
        labels = torch.randint(3, ids.shape) if task == "tagging" else ids.clone()
        if mask is not None:
            labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def outcome(model, inputs, path):
    """Logits where there is text, and the gradients of prompts and head."""
    take(model, path)
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    logits, mask = output.logits, inputs["attention_mask"]
    if mask is not None and logits.dim() == 3:
        logits = logits[mask.bool()]
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def alike(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


@pytest.fixture
def tuned(base_of):
    def make(name, task, mode, **rest):
        torch.manual_seed(0)
        labels = {} if task == "generation" else {"num_labels": 3}
        model = base_of(name).tuned(LOADERS[task], **labels, **settings_for(mode), **rest)
        if not FAMILIES[name].causal and mode != "overwrite":
            pytest.skip("prompt rows of an encoder read the text")
        assert model.prefix_plan.path == "prefix", model.prefix_plan.reason
        set_prompts(model, mode)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):  # the head's own
                module.p = 0.0
        return model.train()

    return make


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_paths_agree(tuned, name, task, mode, padding):
    model = tuned(name, task, mode)
    inputs = batch(padding, task, model.config.pad_token_id)
    expected, wanted = outcome(model, inputs, "concat")
    for path in SHARED:
        logits, gradients = outcome(model, inputs, path)
        close(logits, expected)
        assert gradients.keys() == wanted.keys()
        for key, gradient in wanted.items():
            assert gradient.abs().max() > 0
            alike(gradients[key], gradient, 2e-5 if key in ("score.weight", "classifier.bias") else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CORE)
def test_half_precision_errs_no_more_than_twice_concat(tuned, name, mode, dtype):
    """Against float32: outputs and prompt gradients of the shared path, beside those of torch's own half run."""
    task = "tagging" if name != "gemma3" else "generation"
    exact = tuned(name, task, mode)
    rough = tuned(name, task, mode, dtype=dtype)
    rough.load_state_dict({k: v.clone() for k, v in exact.state_dict().items()})
    inputs = batch("left", task, exact.config.pad_token_id)
    truth = outcome(exact, inputs, "concat")
    *shared, whole = (outcome(rough, inputs, path) for path in (*SHARED, "concat"))

    def error(run):
        parts = [run[0] - truth[0], *(run[1][k] - truth[1][k] for k in truth[1] if "prompt" in k)]
        return torch.cat([part.float().flatten().square() for part in parts]).mean().sqrt()

    assert max(map(error, shared)) <= 2 * error(whole)


@pytest.mark.parametrize("path", SHARED)
def test_gradients_accumulate(tuned, path):
    model = tuned("llama", "generation", "add")
    batches = [batch("left", "generation", 0) for _ in range(2)]
    expected = [outcome(model, inputs, "concat")[1] for inputs in batches]
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        take(model, path)
        model.zero_grad()
        for inputs in batches:
            model(**inputs).loss.backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                alike(parameter.grad, expected[0][key] + expected[1][key])


@pytest.mark.parametrize("path", SHARED)
def test_one_graph_can_be_run_backward_twice(tuned, path):
    model = tuned("llama", "generation", "overwrite")
    take(model, path)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch("right", "generation", 0)).loss
    loss.backward(retain_graph=True)
    once = model.prompt_embeddings.weight.grad.clone()
    loss.backward()
    alike(model.prompt_embeddings.weight.grad, 2 * once)


@pytest.mark.parametrize("path", SHARED)
@pytest.mark.parametrize("way", ["autograd.grad", "compiled"])
def test_checkpointed_gradients_by_other_ways(tuned, way, path):
    model = tuned("llama", "generation", "add")
    inputs = batch("left", "generation", 0)
    expected = outcome(model, inputs, "concat")[1]
    take(model, path)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    if way == "autograd.grad":
        gradients = torch.autograd.grad(model(**inputs).loss, parameters)
    else:
        torch.compiler.reset()
        torch.compile(model, backend="aot_eager")(**inputs).loss.backward()
        gradients = [p.grad for p in parameters]
    for key, gradient in zip(names, gradients, strict=True):
        alike(gradient, expected[key])


@pytest.mark.parametrize("sharing", ["auto", False])
def test_foreign_checkpoints_of_deep_prompts_are_refused(base_of, sharing):
    """They recompute a block without the call that it was part of, and would leave its prompts out."""
    model = base_of("llama").tuned(**settings_for("add", prefix_sharing=sharing)).train()
    for depth, block in enumerate(model.layers):
        model.layers[depth] = checkpoint_wrapper(block)
    with pytest.raises(NotImplementedError, match=r"use gradient_checkpointing_enable\(\) in place of a wrapper"):
        model(torch.randint(3, VOCABULARY, (2, 5)))[0].sum().backward()


def test_a_tied_weight_is_read_again(tuned):
    """Weights that queries alone read are left out for overwritten prompt rows; one that keys come to share is not."""
    model = tuned("opt", "generation", "overwrite")
    inputs = batch("none", "generation", 0)
    for layer in model.model.decoder.layers:
        layer.self_attn.k_proj.weight = layer.self_attn.q_proj.weight
    close(outcome(model, inputs, "apart")[0], outcome(model, inputs, "concat")[0])


@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_autocast(tuned, name):
    """Keys and values are captured under the autocast of the text."""
    model = tuned(name, "tagging", "overwrite")
    inputs = batch("left", "tagging", model.config.pad_token_id)
    truth = outcome(model, inputs, "concat")
    with torch.autocast("cpu", torch.bfloat16):
        *shared, whole = (outcome(model, inputs, path) for path in (*SHARED, "concat"))
    for key in (0, *truth[1]):
        of = (lambda run: run[0]) if key == 0 else (lambda run, key=key: run[1][key])
        for run in shared:
            assert (of(run) - of(truth)).norm() <= 2 * (of(whole) - of(truth)).norm()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_autocast_to_another_half_than_the_bases(tuned, name):
    """What is not computed of overwritten rows has autocast's dtype too, or rotary embeddings would mix two halves."""
    model = tuned(name, "tagging", "overwrite").half()
    ids = torch.randint(3, VOCABULARY, (2, 5))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for path in (*SHARED, "concat"):
            take(model, path)
            assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("path", SHARED)
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_compiled_training_step(tuned, name, path):
    task = "classification" if name == "bert" else "generation"
    model = tuned(name, task, "overwrite")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = batch("right", task, 0)
    _, expected = outcome(model, inputs, path)
    model.zero_grad()
    compiled(**inputs).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            alike(parameter.grad, expected[key])


def test_token_types_of_the_rows_first_tokens(base_of):
    """Prompt rows have the type of the token that they stand before: shared where that is one, else with every row."""
    model = base_of("bert").tuned(**settings_for("overwrite"))
    ids, mask = pad(texts_for("left"), "left", 0)
    rows = counted(model)
    first = mask.argmax(1)
    given = [(torch.full_like(ids, kind), True) for kind in (0, 1)]
    given.append((torch.randint(0, 2, ids.shape).scatter(1, first[:, None], torch.tensor([[0], [1], [0], [1]])), False))
    of_all = torch.zeros_like(ids[:1])  # one row for the whole batch, whose texts begin at different columns of it
    given += [(of_all, True), (of_all.index_fill(1, first[1], 1), False)]
    for types, shares in given:
        rows.clear()
        output = model(input_ids=ids, attention_mask=mask, token_type_ids=types)[0]
        assert (rows[0] == (1, COUNT)) == shares
        take(model, "concat")
        close(output[mask.bool()], model(input_ids=ids, attention_mask=mask, token_type_ids=types)[0][mask.bool()])
        take(model, "prefix")


def counted(model):
    """The batch and length of each run of the model's first block from now on."""
    rows = []
    blocks = next(
        family for family in FAMILIES.values() if family.config().model_type == model.config.model_type
    ).blocks
    blocks(model.base_model).__getitem__(0).register_forward_pre_hook(
        lambda _, args: rows.append(tuple(args[0].shape[:2]))
    )
    return rows


@torch.no_grad()
def as_concat(model, ids):
    logits = model(ids).logits
    take(model, "concat")
    close(logits, model(ids).logits)
    take(model, "prefix")


class TestCompiledPrompts:
    """`compile_prompts`: after the first call no prompt row is run, until the prompts change."""

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
    def test_generate_runs_text_alone(self, tuned, context, cache):
        model = tuned("gemma3", "generation", "add").eval()
        ids, mask = pad(texts_for("left"), "left", 0)
        how = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
        how |= {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        take(model, "concat")
        expected = model.generate(ids, **how)
        take(model, "prefix")
        model.compile_prompts()
        rows = counted(model)
        with context():
            assert torch.equal(model.generate(ids, **how), expected)
            assert rows.pop(0) == (1, COUNT)
            assert torch.equal(model.generate(ids, **how), expected)
        assert sum(length for size, length in rows if size == 1) == 0
        first, *later = [length for _, length in rows[: len(rows) // 2]]
        assert first == ids.shape[1]
        assert set(later) == ({1} if cache != "none" else set(range(first + 1, first + 6)))

    def test_changed_prompts_are_compiled_again(self, tuned):
        model = tuned("llama", "generation", "overwrite")
        model.compile_prompts()
        ids = torch.randint(3, VOCABULARY, (2, 5))
        rows = counted(model)

        def runs():
            rows.clear()
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits
            take(model, "concat")
            with torch.no_grad():
                close(logits, model(ids, use_cache=False).logits)
            take(model, "prefix")
            return (1, COUNT) in rows

        assert runs()
        assert not runs()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(ids, labels=ids).loss.backward()
        assert not runs()
        optimizer.step()
        assert runs()
        assert not runs()
        state = {name: tensor + 1 for name, tensor in model.state_dict().items() if "prompt" in name}
        model.load_state_dict(state, strict=False)
        assert runs()
        model.double()
        assert runs()
        assert not runs()

    @pytest.mark.parametrize("how", ["fused", "bitsandbytes"])
    def test_steps_that_no_version_tells_of(self, tuned, tmp_path, how):
        model = tuned("llama", "classification", "overwrite").eval()
        model.compile_prompts()
        ids = torch.randint(3, VOCABULARY, (2, 5))
        trained = [p for p in model.parameters() if p.requires_grad]
        if how == "fused":
            optimizer = torch.optim.AdamW(trained, lr=0.5, fused=True)
        else:
            optimizer = pytest.importorskip("bitsandbytes").optim.AdamW(trained, lr=0.5)

        as_concat(model, ids)
        model(ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        as_concat(model, ids)
        model.prompt_embeddings.weight.data += 1  # which nothing tells of
        model.save_prefix(tmp_path)
        with torch.no_grad():
            loaded = type(model).from_pretrained(tmp_path)
            take(model, "concat")
            close(loaded(ids).logits, model(ids).logits)

    def test_changed_weights_are_compiled_anew(self, tuned):
        model = tuned("llama", "generation", "overwrite").eval()
        model.compile_prompts()
        ids = torch.randint(3, VOCABULARY, (2, 5))

        as_concat(model, ids)
        weight = model.model.layers[1].self_attn.k_proj.weight
        with torch.no_grad():
            weight.mul_(1.5)
        as_concat(model, ids)
        model.model.layers[1].self_attn.k_proj.weight = torch.nn.Parameter(weight.detach() * 2)
        as_concat(model, ids)
        attention = model.model.layers[1].self_attn
        attention.k_proj.bias = torch.nn.Parameter(torch.randn(len(weight)))
        as_concat(model, ids)
        attention.v_proj = torch.nn.Linear(*reversed(weight.shape))
        as_concat(model, ids)
        attention.v_proj = torch.nn.Sequential(attention.v_proj)
        as_concat(model, ids)
        attention.v_proj.append(torch.nn.Linear(len(weight), len(weight)))
        as_concat(model, ids)
        model.prompt_embeddings.weight = torch.nn.Parameter(model.prompt_embeddings.weight.detach() * 2)
        as_concat(model, ids)
        model.half().float()
        as_concat(model, ids)
        model.prompt_embeddings.weight.data += 1
        model.compile_prompts()
        as_concat(model, ids)
        model.init_prompts(ptune.PTuneConfig(**settings_for("add")))
        as_concat(model, ids)
        assert model._hooks.prefix.keep_compiled

    def test_training_the_base_beside_frozen_prompts(self, tuned):
        model = tuned("llama", "generation", "overwrite")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        weight = model.model.layers[1].self_attn.k_proj.weight.requires_grad_()
        inputs = batch("right", "generation", 0)
        take(model, "concat")
        (expected,) = torch.autograd.grad(model(**inputs).loss, weight)
        take(model, "prefix")
        model.compile_prompts()
        with torch.no_grad():
            model(**inputs)
        alike(torch.autograd.grad(model(**inputs).loss, weight)[0], expected)

    def test_training_sees_the_prompts_themselves(self, tuned):
        model = tuned("llama", "generation", "overwrite")
        inputs = batch("right", "generation", 0)
        expected = outcome(model, inputs, "prefix")[1]
        model.compile_prompts()
        with torch.no_grad():
            model(**inputs)
        gradients = outcome(model, inputs, "prefix")[1]
        assert all(torch.equal(gradients[key], expected[key]) for key in expected)

    def test_copies_compile_their_own(self, tuned):
        model = tuned("llama", "generation", "shallow").eval()
        model.compile_prompts()
        ids = torch.randint(3, VOCABULARY, (2, 5))
        with torch.no_grad():
            expected = model(ids).logits
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                close(twin(ids).logits, expected)
                # as often as the original's weight was changed: its copy counts anew
                for _ in range(model.prompt_embeddings.weight._version + 1):
                    twin.prompt_embeddings.weight.mul_(1.5)
                    assert not torch.equal(twin(ids).logits, expected)
            close(model(ids).logits, expected)

    def test_another_threads_call_does_not_take_them_away(self, base_of, monkeypatch):
        """It comes when this call has found what is kept to be still right, and keeps that of another token type."""
        model = base_of("bert").tuned(**settings_for("overwrite")).eval()
        ids = torch.randint(3, VOCABULARY, (2, 5))
        one, other = torch.zeros_like(ids), torch.ones_like(ids)
        with torch.no_grad():
            expected = model(ids, token_type_ids=one)[0]
            model.compile_prompts()
            model(ids, token_type_ids=one)
            is_still = ptune.watched.Watched.is_still

            def interrupted(*states):
                monkeypatch.setattr(ptune.watched.Watched, "is_still", is_still)
                found = is_still(*states)
                model(ids, token_type_ids=other)
                return found

            monkeypatch.setattr(ptune.watched.Watched, "is_still", interrupted)
            assert torch.equal(model(ids, token_type_ids=one)[0], expected)

    def test_refused_where_nothing_is_shared(self, base_of):
        model = base_of("bert").tuned(**settings_for("shallow"))
        with pytest.raises(ValueError, match="compile_prompts: prompts are not shared here: in an encoder"):
            model.compile_prompts()


class TestSavedPrefix:
    """`save_prefix`: a folder that needs no prompts."""

    @pytest.mark.parametrize(("name", "task", "mode"), [
        ("gemma3", "generation", "add"), ("gpt2", "classification", "shallow"), ("bert", "tagging", "overwrite"),
    ])  # fmt: skip
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_serves_as_the_prompts_did(self, tuned, tmp_path, name, task, mode, dtype):
        model = tuned(name, task, mode, dtype=dtype).eval()
        take(model, "apart")  # as prompt rows were run to be saved: to the same bits
        inputs = batch("left", task, model.config.pad_token_id)
        del inputs["labels"]
        model.save_prefix(tmp_path)
        loaded = LOADERS[task].from_pretrained(tmp_path).eval()
        assert loaded.prompt_embeddings is loaded.intermediate_prompt_embeddings is None
        trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
        assert trained == {*model._head, *compiled_names(loaded.ptune_config, model.config.num_hidden_layers)}
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        if task == "generation":
            how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **inputs}
            assert torch.equal(loaded.generate(**how), model.generate(**how))
        with loaded.disable_prompts(), model.disable_prompts(), torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    def test_autocast_has_no_say(self, tuned, tmp_path):
        model = tuned("llama", "generation", "shallow")
        model.save_prefix(tmp_path / "plain")
        with torch.autocast("cpu", torch.bfloat16):
            model.save_prefix(tmp_path / "autocast")
        plain, other = (load_file(tmp_path / folder / WEIGHTS_NAME) for folder in ("plain", "autocast"))
        assert all(torch.equal(plain[name], other[name]) for name in plain)

    def test_a_compiler_cannot_read_types(self, tuned, tmp_path):
        tuned("bert", "tagging", "overwrite").save_prefix(tmp_path)
        model = torch.compile(LOADERS["tagging"].from_pretrained(tmp_path), backend="eager")
        ids = torch.randint(3, VOCABULARY, (2, 5))
        with torch.no_grad(), pytest.raises(Exception, match="a compiler cannot tell whether token_type_ids are the"):
            model(ids, token_type_ids=torch.zeros_like(ids))

    @pytest.mark.parametrize(
        ("dtype", "way"),
        [
            (torch.bfloat16, lambda folder, dtype: LOADERS["tagging"].from_pretrained(folder, dtype=dtype)),
            (torch.float16, lambda folder, dtype: LOADERS["tagging"].from_pretrained(folder).to(dtype)),
            (torch.float64, lambda folder, dtype: LOADERS["tagging"].from_pretrained(folder).to(dtype)),
            (torch.bfloat16, lambda folder, dtype: to_half(LOADERS["tagging"].from_pretrained(folder), dtype)),
        ],
        ids=["loaded in bf16", "cast to fp16", "cast to fp64", "to_half"],
    )
    def test_loses_nothing_on_a_base_of_another_dtype(self, tuned, tmp_path, dtype, way):
        """It serves as its rounded copy does, and is saved as it was."""
        tuned("llama", "tagging", "overwrite").save_prefix(tmp_path)
        whole = load_file(tmp_path / WEIGHTS_NAME)
        rounded = {name: tensor.to(dtype).float() for name, tensor in whole.items() if "compiled" in name}
        (tmp_path / "rounded").mkdir()
        shutil.copy(tmp_path / CONFIG_NAME, tmp_path / "rounded")
        save_file(whole | rounded, tmp_path / "rounded" / WEIGHTS_NAME)
        model, expected = way(tmp_path, dtype), way(tmp_path / "rounded", dtype)
        ids = torch.randint(3, VOCABULARY, (2, 5))
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
        model.save_prefix(tmp_path / "prefix")
        model.save_pretrained(tmp_path / "prompts")
        for folder in ("prefix", "prompts"):
            saved = load_file(tmp_path / folder / WEIGHTS_NAME)
            assert saved.keys() == whole.keys()
            assert all(torch.equal(saved[name], whole[name]) for name in whole)

    def test_prompts_take_its_place_and_it_theirs(self, tuned, tmp_path):
        model = tuned("llama", "generation", "overwrite").eval()
        ids = torch.randint(3, VOCABULARY, (2, 5))
        with torch.no_grad():
            expected = model(ids).logits
            model.save_prefix(tmp_path / "prefix")
            model.save_prompts(tmp_path / "prompts")
            for folder in ("prefix", "prompts", "prefix"):
                model.init_prompts(ptune.PTuneConfig(**settings_for("shallow", count=2)))
                model.load_prompts(tmp_path / folder)
                assert (model.compiled_prefix is None) == (folder == "prompts")
                assert torch.equal(model(ids).logits, expected)

    def test_refuses_what_it_cannot_serve(self, tuned, base_of, tmp_path):
        model = tuned("bert", "tagging", "overwrite")
        model.save_prefix(tmp_path)
        loaded = LOADERS["tagging"].from_pretrained(tmp_path)
        ids = torch.randint(3, VOCABULARY, (2, 5))
        zeros = torch.zeros_like(ids)
        assert torch.equal(loaded(ids, token_type_ids=zeros).logits, loaded(ids).logits)
        with pytest.raises(ValueError, match="cannot be served by a compiled prefix: token_type_ids are not those"):
            loaded(ids, token_type_ids=zeros + 1)
        with pytest.raises(ValueError, match="get_prompt: a compiled prefix was loaded"):
            loaded.get_prompt(2)
        with pytest.raises(ptune.checkpoint.MisfitError, match="do not fit"):
            base_of("electra").tuned(LOADERS["tagging"], num_labels=3).load_prompts(tmp_path)
        alone = base_of("bert").tuned(**settings_for("shallow"))
        with pytest.raises(ValueError, match="save_prefix: prompts are not shared here"):
            alone.save_prefix(tmp_path / "none")
        assert not (tmp_path / "none").exists()
