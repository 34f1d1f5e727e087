"""Prompts of PEFT, P-tuning v2 and Petals, held to what the real PEFT says, or to the formats' own arithmetic."""

import json
import pickle

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import ptune
from ptune.checkpoint import MisfitError
from ptune.convert import convert, to_peft
from ptune.models import ptune_class

from .common import all_close, close, set_prompts, skip_without_peft_of_now
from .families import LAYERS, VOCABULARY

TASKS = {
    "SEQ_CLS": (transformers.AutoModelForSequenceClassification, ptune.AutoPTuneModelForSequenceClassification),
    "TOKEN_CLS": (transformers.AutoModelForTokenClassification, ptune.AutoPTuneModelForTokenClassification),
    "QUESTION_ANS": (transformers.AutoModelForQuestionAnswering, ptune.AutoPTuneModelForQuestionAnswering),
    "CAUSAL_LM": (transformers.AutoModelForCausalLM, ptune.AutoPTuneModelForCausalLM),
}
KINDS = {
    "PROMPT_TUNING": (peft.PromptTuningConfig, {}),
    "P_TUNING": (peft.PromptEncoderConfig, {"encoder_hidden_size": 7}),
    "MULTITASK_PROMPT_TUNING": (peft.MultitaskPromptTuningConfig, {"num_tasks": 3, "num_ranks": 2}),
    "PREFIX_TUNING": (peft.PrefixTuningConfig, {}),
    "projected": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 9}),
    "CARTRIDGE": (peft.CartridgeConfig, {}),
}


def peft_model(base, kind: str, task: str, **settings):
    """A PEFT model whose prompt and head are of a size that tells."""
    if task != "CAUSAL_LM" and kind in ("PREFIX_TUNING", "projected", "CARTRIDGE"):
        skip_without_peft_of_now()
    config, rest = KINDS[kind]
    labels = {} if task in ("CAUSAL_LM", "QUESTION_ANS") else {"num_labels": 5}
    stock = TASKS[task][0].from_pretrained(base.folder, **labels)
    model = peft.get_peft_model(stock, config(task_type=task, num_virtual_tokens=6, **rest | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model.eval()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 7))
    return ids, torch.ones_like(ids)


@torch.no_grad()
def logits(model, ids, mask, **rest) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask, **rest).logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_peft(base_of, tmp_path, name, task, kind):
    base = base_of(name)
    model = peft_model(base, kind, task)
    model.save_pretrained(tmp_path / "peft")
    ids, mask = texts()
    for number in range(3) if kind == "MULTITASK_PROMPT_TUNING" else (None,):
        convert(tmp_path / "peft", tmp_path / "ours", task_id=number)
        ours = TASKS[task][1].from_pretrained(tmp_path / "ours").eval()
        rest = {} if number is None else {"task_ids": torch.full((3,), number)}

        def run(model, rest=rest):
            expected = logits(model, ids, mask, **rest)
            # PEFT returns prompt rows where there are such
            return [expected[:, -ids.shape[1] :] if task == "CAUSAL_LM" else expected]

        all_close([logits(ours, ids, mask)], run, model)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE"])
def test_reads_peft_on_an_encoder(base_of, tmp_path, kind):
    model = peft_model(base_of("bert"), kind, "TOKEN_CLS")
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "ours")
    ours = ptune.AutoPTuneModelForTokenClassification.from_pretrained(tmp_path / "ours").eval()
    ids, mask = texts()
    close(logits(ours, ids, mask), logits(model, ids, mask))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_a_prefix_trains_on(base_of, tmp_path, name, checkpointing):
    """With PEFT's gradients; PEFT itself refuses to train a prompt that was loaded."""
    task = "TOKEN_CLS" if name == "bert" else "CAUSAL_LM"
    model = peft_model(base_of(name), "PREFIX_TUNING", task)
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "ours")
    ours = TASKS[task][1].from_pretrained(tmp_path / "ours").train()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # of the head, whose dropout is on
    if checkpointing:
        ours.gradient_checkpointing_enable(checkpointing)
    ids, mask = texts()
    mask[1, 4:] = 0
    labels = torch.where(mask.bool(), ids % 5 if task == "TOKEN_CLS" else ids, -100)
    labels[:, 0] = -100  # of a language model, that is predicted by the prompt alone
    ours(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()

    def gradients(model):
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        return [model.prompt_encoder.default.embedding.weight.grad]

    pairs = [tensor.grad.transpose(0, 1) for tensor in ours.compiled_prefix.tensors()]
    all_close([torch.stack(pairs, 1).flatten(1)], gradients, model)


@pytest.mark.parametrize(("name", "task"), [("roberta", "SEQ_CLS"), ("roberta", "TOKEN_CLS"), ("llama", "SEQ_CLS")])
def test_other_pooling_is_said(base_of, tmp_path, caplog, name, task):
    peft_model(base_of(name), "PROMPT_TUNING", task).save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "ours")
    assert ("where PEFT does by a prompt row" in caplog.text) == (name == "roberta" and task == "SEQ_CLS")


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "PROMPT_TUNING"), ("bert", "PREFIX_TUNING")])
@torch.no_grad()
def test_question_answering(base_of, tmp_path, name, kind):
    base, auto = base_of(name), ptune.AutoPTuneModelForQuestionAnswering
    model = peft_model(base, kind, "QUESTION_ANS")
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "ours")
    ours = auto.from_pretrained(tmp_path / "ours").eval()
    ids, mask = texts()
    for name in ("start_logits", "end_logits"):
        got, expected = (its(input_ids=ids, attention_mask=mask)[name] for its in (ours, model))
        close(got, expected[:, -ids.shape[1] :])
    if kind == "PROMPT_TUNING":
        to_peft(tmp_path / "ours", tmp_path / "again")
        stock = transformers.AutoModelForQuestionAnswering.from_pretrained(base.folder)
        again = peft.PeftModel.from_pretrained(stock, tmp_path / "again").eval()
        close(again(input_ids=ids, attention_mask=mask).end_logits[:, -ids.shape[1] :], got)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # two tables, and one under two names
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_tables_of_tokens_beside_the_prompt(base_of, tmp_path, name, task):
    """PEFT's ``save_embedding_layers=True``: the base's own are no head, and others are not dropped."""
    base = base_of(name)
    model = peft_model(base, "PROMPT_TUNING", task)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) > 1 + (task == "SEQ_CLS")
    convert(tmp_path / "peft", tmp_path / "ours")
    ids, mask = texts()
    ours = TASKS[task][1].from_pretrained(tmp_path / "ours").eval()
    close(logits(ours, ids, mask), logits(model, ids, mask)[:, -ids.shape[1] :])
    model.get_base_model().resize_token_embeddings(VOCABULARY + 3)
    model.save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    with pytest.raises(MisfitError, match="head: does not fit"):
        convert(tmp_path / "resized", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_changed_settings_are_said(base_of, tmp_path, caplog):
    settings = {"tuning_mode": "ptune", "pre_seq_len": 2}
    for name, changes in (("stock", {}), ("changed", {"rms_norm_eps": 0.5})):
        TASKS["CAUSAL_LM"][1].from_pretrained(base_of("llama").folder, **settings, **changes).save_prompts(tmp_path)
        to_peft(tmp_path, tmp_path / name)
    (said,) = (record.message for record in caplog.records if "was loaded with" in record.message)
    assert said == f"{tmp_path / 'changed'}: PEFT's folder does not say that its base was loaded with {changes}"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite", "add", "compiled"])
def test_peft_reads_what_is_written(base_of, tmp_path, name, task, mode):
    base = base_of(name)
    labels = {} if task == "CAUSAL_LM" else {"num_labels": 4}
    settings = {"tuning_mode": "ptune" if mode == "shallow" else "deep_ptune", "pre_seq_len": 3}
    if mode == "add":
        settings["deep_prompt_mode"] = "add"
    model = TASKS[task][1].from_pretrained(base.folder, **settings, **labels).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.7)
    model.save_prefix(tmp_path / "ours") if mode == "compiled" else model.save_prompts(tmp_path / "ours")
    to_peft(tmp_path / "ours", tmp_path / "peft")
    if task != "CAUSAL_LM" and mode != "shallow":
        skip_without_peft_of_now()
    theirs = peft.PeftModel.from_pretrained(TASKS[task][0].from_pretrained(base.folder, **labels), tmp_path / "peft")
    expected_type = "PROMPT_TUNING" if mode == "shallow" else "PREFIX_TUNING"
    assert theirs.peft_config["default"].peft_type == expected_type
    ids, mask = texts()
    expected = logits(model, ids, mask)
    got = logits(theirs.eval(), ids, mask)
    close(got[:, -ids.shape[1] :] if task == "CAUSAL_LM" else got, expected)
    convert(tmp_path / "peft", tmp_path / "again")
    again = TASKS[task][1].from_pretrained(tmp_path / "again").eval()
    close(logits(again, ids, mask), expected)


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_peft_reads_the_head_of_the_base(base_of, tmp_path, name):
    base_of(name).stock(TASKS["SEQ_CLS"][0], num_labels=3).save_pretrained(tmp_path / "base")
    model = TASKS["SEQ_CLS"][1].from_pretrained(tmp_path / "base", tuning_mode="deep_ptune", pre_seq_len=3).eval()
    assert model._head == []
    set_prompts(model, "overwrite")
    model.save_prompts(tmp_path / "ours")
    to_peft(tmp_path / "ours", tmp_path / "peft")
    skip_without_peft_of_now()
    theirs = peft.PeftModel.from_pretrained(TASKS["SEQ_CLS"][0].from_pretrained(tmp_path / "base"), tmp_path / "peft")
    ids, mask = texts()
    close(logits(theirs.eval(), ids, mask), logits(model, ids, mask))


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_peft_reads_a_head_that_is_new_in_part(base_of, tmp_path, name):
    """The checkpoint's classifier was for other labels: its first layer stays, and PEFT wants that too."""
    classifier, tuned = TASKS["SEQ_CLS"]
    base_of(name).stock(classifier, num_labels=2).save_pretrained(tmp_path / "base")
    labels = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = tuned.from_pretrained(tmp_path / "base", tuning_mode="ptune", pre_seq_len=3, **labels)
    assert len(model._head) == 2
    model.save_prompts(tmp_path / "ours")
    to_peft(tmp_path / "ours", tmp_path / "peft")
    skip_without_peft_of_now()
    stock = classifier.from_pretrained(tmp_path / "base", **labels)
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "peft").state_dict()
    saved = {
        key.replace(".modules_to_save.default", ""): its for key, its in theirs.items() if "modules_to_save" in key
    }
    for name in model._head:
        (found,) = (its for key, its in saved.items() if key.endswith(f".{name}"))
        assert torch.equal(found, model.get_parameter(name))


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_a_half_base_rounds_nothing(base_of, tmp_path, kind):
    base_of("llama").stock(transformers.AutoModelForCausalLM).bfloat16().save_pretrained(tmp_path / "base")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert stock.dtype == torch.bfloat16
    model = peft.get_peft_model(stock, KINDS[kind][0](task_type="CAUSAL_LM", num_virtual_tokens=6))
    model.save_pretrained(tmp_path / "peft")
    expected = load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"]
    assert not torch.equal(expected, expected.bfloat16().float())
    convert(tmp_path / "peft", tmp_path / "ours")
    ids, mask = texts()
    ours = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert ours.dtype == torch.bfloat16
    close(logits(ours, ids, mask), logits(model.eval(), ids, mask)[:, -ids.shape[1] :], 1e-2)
    to_peft(tmp_path / "ours", tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "adapter_model.safetensors")["prompt_embeddings"], expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_models_without_a_task(base_of, tmp_path, name, mode):
    """The base's checkpoint of bert has no pooler, which is therefore what trains beside the prompts."""
    base = base_of(name)
    model = base.tuned(tuning_mode=mode, pre_seq_len=3).eval()
    assert model._head == ([] if name == "llama" else ["pooler.dense.bias", "pooler.dense.weight"])
    model.save_prompts(tmp_path / "ours")
    to_peft(tmp_path / "ours", tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(base.stock(), tmp_path / "peft").eval()
    convert(tmp_path / "peft", tmp_path / "again")
    again = ptune.AutoPTuneModel.from_pretrained(tmp_path / "again").eval()
    ids, mask = texts()
    with torch.no_grad():
        expected, got, back = (m(input_ids=ids, attention_mask=mask) for m in (model, theirs, again))
    close(got.last_hidden_state[:, -ids.shape[1] :], expected.last_hidden_state)
    close(back.last_hidden_state, expected.last_hidden_state)
    if name == "bert":
        close(back.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_reads_p_tuning_v2(base_of, tmp_path, projected, whole, dtype):
    base, count, width = base_of("bert"), 4, 2 * LAYERS * 24
    state = {}
    if whole:  # as its authors' Trainer writes it
        stock = base.stock(transformers.AutoModelForTokenClassification, num_labels=3)
        state = stock.state_dict() | {"bert.embeddings.position_ids": torch.arange(64)[None]}
    state |= {"classifier.weight": torch.randn(3, 24), "classifier.bias": torch.randn(3)}
    if projected:
        encoder = nn.Sequential(nn.Embedding(count, 24), nn.Linear(24, 11), nn.Tanh(), nn.Linear(11, width))
        names = ["embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"]
        state |= {f"prefix_encoder.{name}": t for name, t in zip(names, encoder.state_dict().values(), strict=True)}
        encoder = encoder.to(dtype).float()  # as it is read
        prefix = encoder(torch.arange(count)).detach()
    else:
        prefix = state["prefix_encoder.embedding.weight"] = torch.randn(count, width).to(dtype).float()
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    convert(tmp_path / "pytorch_model.bin", tmp_path / "ours", base_model=base.folder, task="tagging")
    ours = ptune.AutoPTuneModelForTokenClassification.from_pretrained(tmp_path / "ours").eval()
    assert ours._head == ["classifier.bias", "classifier.weight"]
    # as its authors feed a model: past_key_values of [m, 2L, heads, width]
    past = prefix.view(count, 2 * LAYERS, 4, 6).permute(1, 2, 0, 3)
    for layer, (key, value) in enumerate(ours._hooks.prefix.prefix().layers):
        assert torch.equal(key, past[2 * layer])
        assert torch.equal(value, past[2 * layer + 1])
    assert torch.equal(ours.classifier.weight, state["classifier.weight"].float())


@pytest.mark.parametrize("deep", [False, True])
def test_reads_petals(base_of, tmp_path, deep):
    base, count = base_of("llama"), 4
    rows, inner = torch.randn(count, 24), torch.randn(count, LAYERS * 24)
    state = {"transformer.prompt_embeddings.weight": rows.half()}
    if deep:
        state["transformer.intermediate_prompt_embeddings.weight"] = inner
    torch.save(state, tmp_path / "prompts.pt")
    convert(tmp_path / "prompts.pt", tmp_path / "ours", base_model=base.folder, task="generation")
    ours = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours.prompt_embeddings.weight, rows.half().float())
    assert ours.ptune_config.deep is deep
    if deep:
        assert ours.ptune_config.deep_prompt_mode == "add"
        # as Petals reads a row: [m, L, d]
        for layer, expected in enumerate(inner.view(count, LAYERS, 24).unbind(1)):
            got = ours.intermediate_prompt_embeddings.weight[layer * count : (layer + 1) * count]
            assert torch.equal(got, expected)


class TestRefusals:
    @pytest.fixture
    def folder(self, base_of, tmp_path):
        peft_model(base_of("llama"), "PREFIX_TUNING", "SEQ_CLS").save_pretrained(tmp_path / "peft")
        yield tmp_path / "peft"
        assert not (tmp_path / "out").exists()

    def refuse(self, folder, match, error=ValueError, **rest):
        with pytest.raises(error, match=match):
            convert(folder, folder.parent / "out", **rest)

    def change(self, folder, **settings):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    def change_tensor(self, folder, name, change):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors[name] = change(tensors[name])
        save_file(tensors, path)

    def test_other_kinds(self, folder):
        self.change(folder, peft_type="LORA")
        self.refuse(folder, "peft_type: expected one of PROMPT_TUNING, .*got 'LORA'")

    def test_other_tasks(self, folder):
        self.change(folder, task_type="POLY")
        self.refuse(folder, "task_type: expected one of SEQ_CLS, .*got 'POLY'")

    def test_other_base(self, folder, base_of):
        self.refuse(
            folder,
            r"keys and values: expected \[m, 144\] for this base",
            MisfitError,
            base_model=base_of("gpt2").folder,
        )

    def test_a_revision_of_the_base(self, folder):
        """A folder of prompts would go on with the base's newest."""
        self.change(folder, base_model_name_or_path="some/base", revision="abc")
        self.refuse(folder, "revision: expected the base's own, .* got 'abc'; download that of some/base")

    def test_wrong_number_of_rows(self, folder):
        self.change(folder, num_virtual_tokens=7)
        self.refuse(folder, r"prompt_embeddings: expected \[7, …\], got \[6, 72\]")

    def test_wrong_shape(self, folder):
        self.change_tensor(folder, "prompt_embeddings", lambda t: t[:, :-6].contiguous())
        self.refuse(folder, r"expected \[m, 72\] for this base, got \[6, 66\]", MisfitError)

    def test_not_finite(self, folder):
        self.change_tensor(folder, "prompt_embeddings", lambda t: t / 0)
        self.refuse(folder, "prompt_embeddings: expected finite numbers")

    @pytest.mark.parametrize(
        "dtype", [torch.int64, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
    )
    def test_numbers_of_other_kinds(self, folder, dtype):
        self.change_tensor(folder, "prompt_embeddings", lambda t: t.to(dtype))
        self.refuse(folder, f"prompt_embeddings: expected floating-point numbers of 16 bits or more, got {dtype}")

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t.to_sparse(),
            lambda t: t.to("meta"),
            lambda t: t[:, :1].clone().expand(6, 10**12),
            lambda t: torch.nested.nested_tensor([t[0], t[1, :3]]),
        ],
        ids=["sparse", "meta", "repeated", "nested"],
    )
    def test_tensors_without_all_of_their_numbers(self, folder, change):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        path.unlink()
        torch.save(tensors | {"prompt_embeddings": change(tensors["prompt_embeddings"])}, folder / "adapter_model.bin")
        self.refuse(folder, "prompt_embeddings: expected all of its numbers, got a sparse, nested or repeated tensor")

    def test_beyond_float32(self, folder):
        self.change_tensor(folder, "prompt_embeddings", lambda t: t.double() * 1e300)
        self.refuse(folder, "prompt_embeddings: expected finite numbers")

    def test_names_that_are_none(self, folder, tmp_path, base_of):
        torch.save({0: torch.randn(3, 24)}, tmp_path / "p.pt")
        self.refuse(tmp_path / "p.pt", "expected tensors by their names", base_model=base_of("llama").folder)

    def test_shards(self, folder):
        """PEFT writes and reads one file."""
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model-00001-of-00002.safetensors")
        (folder / "adapter_model.safetensors.index.json").write_text("{}")
        self.refuse(folder, "adapter_model.safetensors: no such file", FileNotFoundError)

    def test_foreign_head(self, folder):
        self.change_tensor(folder, "base_model.score.weight", lambda t: t[:, :-1].contiguous())
        self.refuse(
            folder,
            r"head: does not fit LlamaForSequenceClassification \(no such parameters: \['score.weight'\]",
            MisfitError,
        )

    def test_truncated(self, folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refuse(folder, "not a file of tensors")

    def test_task_id(self, folder, base_of):
        self.refuse(folder, "task_id: expected with a multitask prompt alone", task_id=1)
        peft_model(base_of("llama"), "MULTITASK_PROMPT_TUNING", "CAUSAL_LM").save_pretrained(folder)
        for number in (3, -1, None, True, 1.0, "1"):
            self.refuse(folder, f"task_id: expected 0 to 2, got {number!r}", task_id=number)

    def test_pickled_code(self, folder, tmp_path):
        class Code:
            def __reduce__(self):
                return (open, (str(tmp_path / "written"), "w"))

        (folder / "adapter_model.safetensors").unlink()
        with (folder / "adapter_model.bin").open("wb") as file:
            pickle.dump({"prompt_embeddings": Code()}, file)
        self.refuse(folder, "holds pickled code")
        torch.save({"prompt_embeddings": Code()}, folder / "adapter_model.bin")
        self.refuse(folder, "holds pickled code")
        assert not (tmp_path / "written").exists()

    def test_files_that_do_not_say(self, folder, tmp_path, base_of):
        torch.save({"prompt_embeddings.weight": torch.randn(3, 24)}, tmp_path / "p.pt")
        self.refuse(tmp_path / "p.pt", "base_model: expected one")
        self.refuse(
            tmp_path / "p.pt", "task: expected one of 'classification'", base_model=base_of("llama").folder, task="qa"
        )
        torch.save({"other": torch.randn(3, 24)}, tmp_path / "p.pt")
        self.refuse(tmp_path / "p.pt", r"expected prefix_encoder.embedding.weight .* got other")
        self.refuse(tmp_path / "nowhere.pt", "no such file", FileNotFoundError)

    def test_deep_prompts_that_are_not_shared(self, folder, base_of, tmp_path):
        model = ptune.AutoPTuneModelForCausalLM.from_pretrained(
            base_of("bloom").folder, tuning_mode="deep_ptune", pre_seq_len=2
        )
        model.save_prompts(tmp_path / "ours")
        with pytest.raises(ValueError, match="PEFT has no deep prompts but keys and values"):
            to_peft(tmp_path / "ours", tmp_path / "out")

    def test_what_peft_would_not_hand_over(self, folder, base_of, tmp_path):
        settings = {"tuning_mode": "deep_ptune", "pre_seq_len": 2}
        base_of("distilbert").tuned(**settings).save_prompts(tmp_path / "ours")
        with pytest.raises(ValueError, match="past_key_values, which DistilBertModel takes none of"):
            to_peft(tmp_path / "ours", tmp_path / "out")
        masked = ptune_class(transformers.BertForMaskedLM).from_pretrained(base_of("bert").folder, **settings)
        masked.save_prompts(tmp_path / "ours")
        with pytest.raises(ValueError, match="model_class: expected one of a task that PEFT has, got BertForMaskedLM"):
            to_peft(tmp_path / "ours", tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bfloat16", "bin", "no task", "no base"])
def test_adapters_as_people_have_them(base_of, tmp_path, kind, how):
    """In half precision, in torch's format, or without saying what they are for or on; in a folder with spaces."""
    base, folder = base_of("llama"), tmp_path / "my adapter é"
    model = peft_model(base, kind, "SEQ_CLS")
    model.save_pretrained(folder)
    path, config = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(path)
    if how == "bfloat16":
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
    elif how == "bin":
        path.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    config |= {"no task": {"task_type": None}, "no base": {"base_model_name_or_path": ""}}.get(how, {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    given = {"no task": {"task": "classification"}, "no base": {"base_model": base.folder}}.get(how, {})
    task_id = {"task_id": 1} if kind == "MULTITASK_PROMPT_TUNING" else {}
    if how == "no base":
        with pytest.raises(ValueError, match="base_model: expected one"):
            convert(folder, tmp_path / "ours", **task_id)
    convert(folder, tmp_path / "ours", **given, **task_id)
    ours = TASKS["SEQ_CLS"][1].from_pretrained(tmp_path / "ours").eval()
    ids, mask = texts()
    if how == "bfloat16":
        theirs = peft.PeftModel.from_pretrained(
            TASKS["SEQ_CLS"][0].from_pretrained(base.folder, num_labels=5), folder
        ).eval()
    else:
        theirs = model
    rest = {"task_ids": torch.full((3,), 1)} if task_id else {}
    close(logits(ours, ids, mask), logits(theirs, ids, mask, **rest))
