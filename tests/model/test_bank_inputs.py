"""What a `PromptBank` is given: bases with settings of their own, long batches, token types, and what it refuses."""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ptune
from ptune import checkpoint
from ptune.checkpoint import MisfitError

from .common import close
from .families import VOCABULARY
from .test_bank import KINDS, LOADERS, alone, bank_of, batch, tuned


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.7)
    return model


class TestOverriddenBases:
    def folder(self, base, tmp_path, window: int):
        model = ptune.AutoPTuneModelForCausalLM.from_pretrained(
            base.folder, tuning_mode="deep_ptune", pre_seq_len=3, sliding_window=window
        )
        randomised(model).save_prompts(tmp_path / str(window))
        return tmp_path / str(window)

    def test_the_same_settings(self, base_of, tmp_path):
        base = base_of("mistral")
        folder = self.folder(base, tmp_path, 3)
        bank = ptune.PromptBank(base.stock(transformers.AutoModelForCausalLM, sliding_window=3))
        bank.add("a", folder)
        ids, mask = batch(3, "right")
        output = bank(ids, mask, prompt_names=["a", None, "a"])
        for row in (0, 2):
            close(output.logits[row][mask[row].bool()], alone(folder, "lm", ids[row], mask[row]), 2e-5)

    @pytest.mark.parametrize(("trained", "here"), [(3, 5), (5, 3), (3, 4)])
    def test_other_settings(self, base_of, tmp_path, trained, here):
        """5 is what the base was saved with."""
        base = base_of("mistral")
        bank = ptune.PromptBank(base.stock(transformers.AutoModelForCausalLM, sliding_window=here))
        message = f"sliding_window: {trained} in the base of the prompts, {here} here"
        with pytest.raises(MisfitError, match=message):
            bank.add("a", self.folder(base, tmp_path, trained))
        assert bank.names == []

    def test_absurd_settings(self, base_of, tmp_path):
        """They are compared, and no model is made of them."""
        base = base_of("llama")
        folder = tuned(base, tmp_path, "shallow", "lm")
        config = json.loads((folder / "ptune_config.json").read_text())
        config["base"]["overrides"] = {"num_hidden_layers": 10**9, "hidden_size": 10**12}
        (folder / "ptune_config.json").write_text(json.dumps(config))
        bank = bank_of(base)
        with pytest.raises(MisfitError, match="num_hidden_layers: 1000000000 in the base of the prompts, 3 here"):
            bank.add("a", folder)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_a_config_within_the_config_may_have_another_dtype(tmp_path, trained):
    """MPT's says its own."""
    config = transformers.MptConfig(d_model=24, n_heads=4, n_layers=2, vocab_size=VOCABULARY, max_seq_len=64)
    transformers.MptForCausalLM(config).save_pretrained(tmp_path / "base")
    model = LOADERS["lm"].from_pretrained(tmp_path / "base", dtype=trained, **KINDS["shallow"])
    model.save_prompts(tmp_path / "prompts")
    ids = torch.randint(3, VOCABULARY, (1, 5))
    for dtype in (torch.float32, torch.bfloat16):
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        assert stock.config.attn_config.dtype is not trained or dtype == trained
        bank = ptune.PromptBank(stock)
        bank.add("a", tmp_path / "prompts")
        expected = LOADERS["lm"].from_pretrained(tmp_path / "prompts", dtype=dtype)
        close(bank(ids, prompt_names=["a"]).logits[0].float(), expected(ids).logits[0].float(), 2e-2)


class TestLearnedPositions:
    """Of which the tiny models have 64, and RoBERTa 62."""

    def task(self, base) -> str:
        return "lm" if base.family.causal else "token"

    def bank(self, base, tmp_path):
        bank, folders, labels = bank_of(base), {}, {} if base.family.causal else {"num_labels": 2}
        for kind in ("shallow", "overwrite"):
            mode = {"shallow": "ptune", "overwrite": "deep_ptune"}[kind]
            model = base.tuned(LOADERS[self.task(base)], tuning_mode=mode, pre_seq_len=40, **labels)
            folders[kind] = tmp_path / f"long-{kind}"
            randomised(model).save_prompts(folders[kind])
            bank.add(kind, folders[kind])
        return bank, folders

    @pytest.mark.parametrize("padding", ["right", "left"])
    @pytest.mark.parametrize("name", ["gpt2", "bert", "roberta", "distilbert", "opt"])
    @pytest.mark.parametrize("width", [60, 70])
    def test_rows_that_fit(self, base_of, tmp_path, name, padding, width):
        """A long prompt with a short text, a short one with a long text: wider than the table, in whatever columns."""
        base = base_of(name)
        bank, folders = self.bank(base, tmp_path)
        names, lengths = ["shallow", None, "overwrite", "shallow"], [22, 60, 20, 1]
        ids, mask = torch.randint(3, VOCABULARY, (4, width)), torch.zeros(4, width, dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, slice(0, length) if padding == "right" else slice(width - length, width)] = 1
        output = bank(ids, mask, prompt_names=names)
        for row, prompt in enumerate(names):
            if prompt is not None:
                expected = alone(folders[prompt], self.task(base), ids[row], mask[row])
                close(output.logits[row][mask[row].bool()], expected, 2e-5)
        with torch.no_grad():
            expected = base.stock().eval()(ids[1][mask[1].bool()][None]).last_hidden_state[0]
        close(output.last_hidden_state[1][mask[1].bool()], expected, 2e-5)

    def test_a_row_that_does_not(self, base_of, tmp_path):
        bank, _ = self.bank(base_of("gpt2"), tmp_path)
        ids = torch.randint(3, VOCABULARY, (2, 25))
        with pytest.raises(ValueError, match=r"40 prompt rows and the text need 65 positions, .* only 64"):
            bank(ids, prompt_names=[None, "overwrite"])

    @pytest.mark.parametrize("init", [{}, {"prompt_init": "vocab"}, {"prompt_init_text": [5, 6]}])
    @pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
    def test_prompts_that_leave_none(self, base_of, init, mode):
        model = base_of("gpt2").tuned(ptune.AutoPTuneModel, tuning_mode=mode, pre_seq_len=63, **init)
        before = model.prompt_embeddings
        with pytest.raises(ValueError, match="pre_seq_len: expected less than the 64 positions that PTuneGPT2Model"):
            model.init_prompts(ptune.PTuneConfig(tuning_mode=mode, pre_seq_len=64, **init))
        assert model.prompt_embeddings is before

    def test_saved_prompts_that_leave_none(self, base_of, tmp_path):
        base = base_of("gpt2")
        folder = tuned(base, tmp_path, "shallow", "lm")
        config = checkpoint.read_config(folder) | {"pre_seq_len": 64}
        checkpoint.write(folder, config, {"prompt_embeddings.weight": torch.randn(64, 24)})
        model, bank = base.tuned(LOADERS["lm"]), bank_of(base)
        for load in (model.load_prompts, lambda folder: bank.add("a", folder)):
            with pytest.raises(MisfitError, match="pre_seq_len: expected less than the 64 positions"):
                load(folder)


class TestTokenTypes:
    @pytest.mark.parametrize("padding", ["right", "left"])
    @pytest.mark.parametrize("name", ["bert", "gpt2", "electra"])
    def test_equal_to_each_prompt_alone(self, base_of, tmp_path, name, padding):
        base = base_of(name)
        bank = bank_of(base)
        folders = {kind: tuned(base, tmp_path, kind, "token") for kind in ("shallow", "overwrite", "add")}
        for kind, folder in folders.items():
            bank.add(kind, folder)
        names = [*folders, None, *folders]
        random.shuffle(names)
        ids, mask = batch(len(names), padding)
        for types in (torch.zeros_like(ids), torch.randint(2, ids.shape), torch.ones_like(ids)):
            output = bank(ids, mask, prompt_names=names, token_type_ids=types)
            for row, prompt in enumerate(names):
                real = mask[row].bool()
                text = {"input_ids": ids[row][real][None], "token_type_ids": types[row][real][None]}
                if prompt is None:
                    model, got = base.stock(), output.last_hidden_state[row]
                else:
                    model, got = LOADERS["token"].from_pretrained(folders[prompt], prefix_sharing=False), (
                        output.logits[row]
                    )  # fmt: skip
                with torch.no_grad():
                    close(got[real], model.eval()(**text)[0][0], 2e-5)

    def test_refusals(self, base_of, tmp_path):
        bank, ids = bank_of(base_of("llama")), torch.randint(3, VOCABULARY, (1, 4))
        with pytest.raises(ValueError, match="token_type_ids: LlamaForCausalLM takes none"):
            bank(ids, prompt_names=[None], token_type_ids=torch.zeros_like(ids))
        with pytest.raises(NotImplementedError, match="token_type_ids: not supported in generation"):
            bank.generate(ids, prompt_names=[None], token_type_ids=torch.zeros_like(ids))
        bank = bank_of(base_of("bert"))
        for types in (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 4), [[0, 0, 0, 0]]):
            with pytest.raises(ValueError, match=r"token_type_ids: expected integers of shape \(1, 4\), got"):
                bank(ids, prompt_names=[None], token_type_ids=types)
        model = base_of("bert").tuned(LOADERS["token"], tuning_mode="deep_ptune", pre_seq_len=2).eval()
        model.save_prefix(tmp_path)
        bank.add("compiled", tmp_path)
        with pytest.raises(NotImplementedError, match="a compiled prefix is without its rows"):
            bank(ids, prompt_names=["compiled"], token_type_ids=torch.ones_like(ids))


class TestRefusals:
    @pytest.fixture
    def bank(self, base_of, tmp_path):
        base = base_of("llama")
        bank = bank_of(base)
        bank.add("a", tuned(base, tmp_path, "shallow", "lm"))
        return bank

    @pytest.mark.parametrize("limit", ["1", float("nan"), 1e6, True, -1, [1]])
    def test_budgets(self, base_of, limit):
        with pytest.raises(ValueError, match="max_bytes: expected None or an int of at least 0, got"):
            bank_of(base_of("llama"), max_bytes=limit)

    @pytest.mark.parametrize("folder", [3, b"folder", None, ["a"]])
    def test_folders(self, bank, base_of, folder):
        with pytest.raises(TypeError, match="folder: expected a path, or the name of a repository, got"):
            bank.add("b", folder)
        with pytest.raises(TypeError, match="folder: expected a path"):
            base_of("llama").tuned().load_prompts(folder)
        assert bank.names == ["a"]

    def test_files(self, bank, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors: expected a folder of prompts"):
            bank.add("b", tmp_path / "model.safetensors")

    def test_bases_whose_rows_are_choices(self, base_of):
        base = base_of("bert").stock(transformers.AutoModelForMultipleChoice)
        with pytest.raises(NotImplementedError, match="rows are texts by themselves, got BertForMultipleChoice"):
            ptune.PromptBank(base)

    @pytest.mark.parametrize("call", ["__call__", "generate"])
    def test_batches(self, bank, call):
        call, ids = getattr(bank, call), torch.randint(3, VOCABULARY, (2, 5))
        mask = torch.ones_like(ids)
        for wrong in (ids.tolist(), ids.float(), ids.bool(), ids.to(torch.int8), None):
            with pytest.raises(ValueError, match="input_ids: expected a tensor of int32 or int64, got"):
                call(wrong, mask, prompt_names=["a", None])
        for wrong in (mask.tolist(), mask[:, 1:], mask[:1], mask[None]):
            with pytest.raises(ValueError, match=r"attention_mask: expected a tensor of shape \(2, 5\), got"):
                call(ids, wrong, prompt_names=["a", None])
        for wrong in (None, "aa", 3, [], ["a"], iter("a")):
            with pytest.raises(ValueError, match="prompt_names: expected 2 names, one for each row, got"):
                call(ids, mask, prompt_names=wrong)
        for wrong in (3, ["a"], b"a"):
            with pytest.raises(ValueError, match=r"no prompt .* in this bank, which has 1: 'a'"):
                call(ids, mask, prompt_names=["a", wrong])

    def test_labels(self, bank):
        ids = torch.randint(3, VOCABULARY, (2, 5))
        for wrong in (ids, [ids], {"a": ids[:1].tolist()}, {"b": ids}):
            with pytest.raises(ValueError, match="labels: expected"):
                bank(ids, prompt_names=["a", None], labels=wrong)
        for wrong in (ids, ids[0], torch.tensor(1)):  # the batch's, one text's without its row, a number
            with pytest.raises(ValueError, match=r"labels: expected a tensor of 1 rows for 'a', got torch\.int64"):
                bank(ids, prompt_names=["a", None], labels={"a": wrong})

    def test_labels_of_routers(self, base_of, tmp_path):
        """Their loss is one of the whole batch."""
        base = base_of("mixtral")
        base.tuned(LOADERS["lm"], output_router_logits=True, **KINDS["shallow"]).save_prompts(tmp_path)
        bank = ptune.PromptBank(base.stock(transformers.AutoModelForCausalLM, output_router_logits=True))
        bank.add("a", tmp_path)
        ids, mask = batch(2, "right")
        expected = bank(ids, mask, prompt_names=["a", "a"]).logits
        assert expected[0].shape == (ids.shape[1], VOCABULARY)
        with pytest.raises(NotImplementedError, match=r"labels: the loss of routers \(output_router_logits=True\)"):
            bank(ids, mask, prompt_names=["a", "a"], labels={"a": ids})

    def test_labels_that_the_model_class_does_not_take(self, base_of, tmp_path):
        base, ids = base_of("bert"), torch.randint(3, VOCABULARY, (2, 5))
        model = base.tuned(ptune.AutoPTuneModelForQuestionAnswering, **KINDS["overwrite"])
        model.save_prompts(tmp_path)
        bank = bank_of(base)
        bank.add("answers", tmp_path)
        with pytest.raises(ValueError, match="labels: expected none for None, as BertModel takes none"):
            bank(ids, prompt_names=[None, None], labels={None: ids})
        with pytest.raises(ValueError, match="for 'answers', as BertForQuestionAnswering takes none"):
            bank(ids, prompt_names=["answers", None], labels={"answers": ids[:1]})
        output = bank(ids, prompt_names=["answers", None]).tasks["answers"].output
        close(output.end_logits, model(ids[:1]).end_logits)

    def test_names_may_be_an_iterator(self, bank):
        ids, names = torch.randint(3, VOCABULARY, (3, 5)), ["a", None, "a"]
        expected = bank(ids, prompt_names=names)
        got = bank(ids, prompt_names=iter(names))
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
        assert got.tasks["a"].rows == [0, 2]

    @pytest.mark.parametrize("name", ["LlamaPreTrainedModel", "LlamaConfig", "BertModel", "no.such", "__name__", ""])
    def test_classes_that_are_no_models(self, bank, base_of, tmp_path, name):
        folder = tuned(base_of("llama"), tmp_path, "overwrite", "sequence")
        config = json.loads((folder / "ptune_config.json").read_text()) | {"model_class": name}
        (folder / "ptune_config.json").write_text(json.dumps(config))
        with pytest.raises(MisfitError, match=f"model_class: expected a class of LlamaConfig's models, got {name}"):
            bank.add("b", folder)


class TestNamesAndFolders:
    @pytest.fixture
    def bank(self, base_of, tmp_path):
        base = base_of("llama")
        self.folder = tuned(base, tmp_path, "shallow", "sequence")
        bank = bank_of(base)
        bank.add("a", self.folder)
        yield bank
        assert bank.names == ["a"]
        assert not bank.compiled_bytes

    @pytest.mark.parametrize("name", ["", "../a", "a/b", "/etc", ".a", "a\\b", "a\n", "x" * 101, 3])
    def test_names(self, bank, name):
        with pytest.raises(ValueError, match="name: expected up to 100 letters"):
            bank.add(name, self.folder)

    def test_taken(self, bank):
        with pytest.raises(ValueError, match="'a' is taken"):
            bank.add("a", self.folder)

    def test_missing_folder(self, bank, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere: expected a folder of prompts, got no such folder"):
            bank.add("b", tmp_path / "nowhere")

    def test_other_base(self, bank, base_of, tmp_path):
        with pytest.raises(ptune.checkpoint.MisfitError, match=r"'b' .*expected a class of LlamaConfig's models"):
            bank.add("b", tuned(base_of("qwen3"), tmp_path, "shallow", "lm"))

    def test_not_finite(self, bank, tmp_path):
        model = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(self.folder)
        with torch.no_grad():
            model.prompt_embeddings.weight[1, 2] = float("nan")
        model.save_prompts(tmp_path / "nan")
        with pytest.raises(ValueError, match=r"prompt_embeddings\.weight: expected finite numbers"):
            bank.add("b", tmp_path / "nan")

    def test_unknown_names(self, bank):
        ids, mask = batch(2, "right")
        with pytest.raises(ValueError, match="no prompt 'b' in this bank, which has 1: 'a'"):
            bank(ids, mask, prompt_names=["a", "b"])
        with pytest.raises(ValueError, match="no prompt 'b'"):
            bank.remove("b")
        with pytest.raises(ValueError, match="prompt_names: expected 2 names, one for each row"):
            bank(ids, mask, prompt_names=["a"])
        with pytest.raises(ValueError, match="prompt_names: expected 2 names"):
            bank(ids, mask, prompt_names="aa")

    def test_classifiers_do_not_generate(self, bank):
        ids, mask = batch(1, "left")
        with pytest.raises(ValueError, match="'a' was trained on LlamaForSequenceClassification"):
            bank.generate(ids, mask, prompt_names=["a"])

    def test_head_of_another_class(self, base_of, tmp_path):
        base = base_of("llama")
        bank = ptune.PromptBank(base.stock())
        with pytest.raises(ptune.checkpoint.MisfitError, match="load the base as LlamaForCausalLM"):
            bank.add("lm", tuned(base, tmp_path, "shallow", "lm"))
        ids, mask = batch(1, "left")
        with pytest.raises(ValueError, match="LlamaModel cannot generate"):
            bank.generate(ids, mask, prompt_names=[None])

    def test_output_layers_of_their_own_do_not_generate(self, base_of, tmp_path):
        base = base_of("llama")
        base.stock().save_pretrained(tmp_path / "body")
        model = ptune.AutoPTuneModelForCausalLM.from_pretrained(tmp_path / "body", **KINDS["shallow"])
        assert model._head == ["lm_head.weight"]
        model.save_prompts(tmp_path / "own")
        bank = bank_of(base)
        bank.add("own", tmp_path / "own")
        ids, mask = batch(1, "left")
        close(bank(ids, mask, prompt_names=["own"]).logits[0], model.eval()(ids, mask).logits[0].detach())
        with pytest.raises(NotImplementedError, match="'own' has an output layer of its own"):
            bank.generate(ids, mask, prompt_names=["own"])

    def test_heads_that_name_the_body(self, bank, tmp_path):
        config = json.loads((self.folder / "ptune_config.json").read_text())
        config["head"].append("model.norm.weight")
        tensors = load_file(self.folder / "model.safetensors") | {"model.norm.weight": torch.ones(24)}
        checkpoint.write(tmp_path / "inside", config, tensors)
        with pytest.raises(ptune.checkpoint.MisfitError, match=r"outside the body, got \['model.norm.weight'\]"):
            bank.add("b", tmp_path / "inside")

    def test_compiled_prefix_of_another_shape(self, bank, tmp_path):
        model = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(self.folder).eval()
        model.save_prefix(tmp_path / "prefix")
        tensors = load_file(tmp_path / "prefix" / "model.safetensors")
        tensors["compiled_prefix.key_1"] = tensors["compiled_prefix.key_1"][:1]
        checkpoint.write(tmp_path / "prefix", checkpoint.read_config(tmp_path / "prefix"), tensors)
        with pytest.raises(ptune.checkpoint.MisfitError, match=r"key_1: expected \(2, 5, 6\), got \(1, 5, 6\)"):
            bank.add("b", tmp_path / "prefix")

    def test_models_with_prompts(self, base_of):
        with pytest.raises(TypeError, match="expected a stock transformers model, got PTuneLlamaModel"):
            ptune.PromptBank(base_of("llama").tuned(tuning_mode="ptune", pre_seq_len=2))
