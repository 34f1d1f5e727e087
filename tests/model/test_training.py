"""Training: frozen dropout, gradient checkpointing, and transformers' Trainer on checkpoints of prompts."""

import copy
import json
import logging

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

import ptune

from .common import COUNT, SHARED, close, set_prompts, settings_for, take, texts_for
from .families import FAMILIES
from .oracle import pad

# gradient checkpointing took another name, which the oldest supported transformers does not know
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def gradients(model, ids, mask):
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.manual_seed(3)
    (output * torch.randn_like(output) * mask[..., None]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "prompt" in name}


@pytest.fixture
def whole_call_checkpoints(monkeypatch):
    """Transformers before 5.23: a layer's hooks run inside the recomputed region."""
    call = torch.nn.Module.__call__

    def checkpointing(self, *args, **kwargs):
        if not (self.gradient_checkpointing and self.training):
            return call(self, *args, **kwargs)
        kwargs = {name: None if name.startswith("past_") else value for name, value in kwargs.items()}

        def inner(*inner_args):
            self.gradient_checkpointing = False
            try:
                return call(self, *inner_args, **kwargs)
            finally:
                self.gradient_checkpointing = True

        return self._gradient_checkpointing_func(inner, *args)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", checkpointing)


@pytest.mark.parametrize("path", SHARED)
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("where", ["as this transformers does", "whole call"])
@pytest.mark.parametrize("mode", ["shallow", "overwrite", "add"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_checkpointed_gradients_are_the_same(base_of, name, mode, where, reentrant, path, request):
    if where == "whole call":
        request.getfixturevalue("whole_call_checkpoints")
    model = base_of(name).tuned(**settings_for("shallow"))
    set_prompts(model, mode)
    model.train()
    if model.prefix_plan.path == "prefix":
        take(model, path)
    ids, mask = pad(texts_for("left"), "left", 0)
    expected = gradients(model, ids, mask)
    runs: list[int] = []
    blocks = FAMILIES[name].blocks(model)

    def count(_, args):
        runs.extend([1] * (args[0].shape[:2].numel() > COUNT))  # of the batch, not of prompt rows that run before it

    count.__module__ = "ptune"  # a user's hook would be given the batch alone
    counting = blocks[1].register_forward_pre_hook(count)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(block.gradient_checkpointing for block in blocks)
    got = gradients(model, ids, mask)
    counting.remove()
    if where == "whole call":
        assert len(runs) == 2  # the hook ran in the recomputation too
    for key, value in expected.items():
        close(got[key], value, 1e-6)
    if name in ("bert", "gpt2"):
        blocks[1](torch.randn(1, 2, 24))  # no call is left over that its hook would take it for a part of


def test_the_frozen_base_drops_nothing(base_of):
    for name in ("bert", "distilbert", "gpt2", "opt", "modernbert"):
        model = base_of(name).tuned(**settings_for("overwrite")).train()
        ids = torch.randint(3, 61, (2, 6))
        assert all(module.training for module in model.modules())
        assert torch.equal(model(input_ids=ids)[0], model(input_ids=ids)[0])
        with model.disable_prompts():
            noisy = [model(input_ids=ids)[0] for _ in range(2)]
        if name != "modernbert":  # its default is no dropout
            assert not torch.equal(*noisy)
        assert torch.equal(model(input_ids=ids)[0], model(input_ids=ids)[0])


def test_inside_disable_prompts_the_base_keeps_its_dropout(base_of, tmp_path):
    """Whatever is done there; and the prompts that begin there are like any others afterwards."""
    model = base_of("gpt2").tuned(**settings_for("overwrite")).train()
    plan = model.prefix_plan
    with model.disable_prompts():
        model.init_prompts(ptune.PTuneConfig(**settings_for("overwrite")))
        assert model.drop.p == 0.1
        model.save_pretrained(tmp_path, save_base=True)
        assert model.drop.p == 0.1
        with model.disable_prompts():
            pass
        assert model.drop.p == 0.1
    assert model.drop.p == 0
    assert model.prefix_plan == plan


def test_dropout_from_the_config(base_of, tmp_path):
    """Falcon reads its probabilities from the config at every call."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.FalconConfig(**sizes, hidden_dropout=0.5)
    model = ptune.AutoPTuneModel.from_config(config, **settings_for("shallow"))
    model.train()
    ids = torch.randint(3, 61, (2, 6))
    assert torch.equal(model(input_ids=ids)[0], model(input_ids=ids)[0])
    model.save_pretrained(tmp_path, save_base=True)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["hidden_dropout"] == 0.5


def test_base_dropout_can_be_kept(base_of):
    model = base_of("bert").tuned(**settings_for("shallow", base_dropout=True)).train()
    ids = torch.randint(3, 61, (2, 6))
    assert not torch.equal(model(input_ids=ids)[0], model(input_ids=ids)[0])


def test_the_heads_own_dropout_stays(base_of):
    model = base_of("bert").tuned(ptune.AutoPTuneModelForSequenceClassification, **settings_for("shallow")).train()
    assert model.dropout.p == 0.1
    ids = torch.randint(3, 61, (2, 6))
    assert not torch.equal(model(ids).logits, model(ids).logits)


class Rows(torch.utils.data.Dataset):
    """Texts of unequal lengths whose label is whether token 5 comes before token 6."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(count)
        self.rows = []
        for _ in range(count):
            ids = torch.randint(7, 61, (int(torch.randint(4, 9, (), generator=generator)),), generator=generator)
            label = int(torch.randint(2, (), generator=generator))
            ids[0] = 5 + label
            self.rows.append({"input_ids": ids, "labels": label})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    ids, mask = pad([row["input_ids"] for row in rows], "right", 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def trainer_for(model, folder, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 3e-2, "seed": 3,
        "save_steps": 4, "eval_steps": 4, "eval_strategy": "steps", "logging_steps": 4, "load_best_model_at_end": True,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**defaults | options)
    return transformers.Trainer(model, arguments, train_dataset=Rows(64), eval_dataset=Rows(32), data_collator=collate)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def make_model(base_of):
    def make(**rest):
        torch.manual_seed(11)
        return base_of("bert").tuned(
            ptune.AutoPTuneModelForSequenceClassification, num_labels=2, **settings_for("overwrite"), **rest
        )

    return make


def test_trainer_saves_resumes_and_returns_to_the_best(make_model, tmp_path, caplog):
    model = make_model()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = trained(model)
    trainer = trainer_for(model, tmp_path / "whole")
    losses = []
    trainer.add_callback(type("Losses", (transformers.TrainerCallback,), {
        "on_evaluate": lambda self, args, state, control, metrics, **_: losses.append(metrics["eval_loss"]),
    })())  # fmt: skip
    trainer.train()
    folder = tmp_path / "whole" / "checkpoint-8"
    saved = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "ptune_config.json", "optimizer.pt"} <= saved
    assert not saved & {"config.json", "generation_config.json"}
    assert (folder / "model.safetensors").stat().st_size < 4 * (model.num_trainable_parameters() + 1000)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert not any(torch.equal(value, start[name]) for name, value in trained(model).items())

    best = tmp_path / "whole" / f"checkpoint-{4 * (losses.index(min(losses)) + 1)}"
    assert trainer.state.best_model_checkpoint == str(best)
    loaded = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(best)
    for name, value in trained(model).items():
        assert torch.equal(value, trained(loaded)[name])

    # resumed from step 8, the run ends as it did
    resumed = make_model()
    logging.getLogger("transformers").addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, "transformers"):
        again = trainer_for(resumed, tmp_path / "whole", load_best_model_at_end=False)
        again.train(resume_from_checkpoint=str(folder))
    assert not [record for record in caplog.records if "missing keys" in record.message]
    last = ptune.AutoPTuneModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-12")
    for name, value in trained(resumed).items():
        close(value, trained(last)[name], 1e-6)


def test_trainer_learns_in_bfloat16(make_model, tmp_path):
    """bf16 autocast on a bf16 base: prompts, head and their optimizer states stay float32."""
    model = make_model(dtype=torch.bfloat16)
    trainer = trainer_for(model, tmp_path, bf16=True, max_steps=8, save_steps=8, eval_steps=8)
    trainer.train()
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in states if value.dim() > 0} == {torch.float32}
    logits = trainer.predict(Rows(8)).predictions
    assert logits.shape == (8, 2)


def test_trainer_checkpoints_activations(make_model, tmp_path):
    model = make_model()
    plain = copy.deepcopy(model)
    options = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trainer_for(plain, tmp_path, **options).train()
    trainer_for(model, tmp_path, gradient_checkpointing=True, **options).train()
    for name, value in trained(plain).items():
        close(trained(model)[name], value, 1e-6)


def test_checkpoint_is_only_torchs(base_of):
    """A block's checkpoint outside a call with prompts is the function that was given."""
    model = base_of("llama").tuned(**settings_for("overwrite")).train()
    model.gradient_checkpointing_enable()
    with model.disable_prompts():
        ids = torch.randint(3, 61, (2, 5))
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded).last_hidden_state.sum().backward()
    assert embedded.grad.abs().sum() > 0
    assert model.layers[0]._gradient_checkpointing_func.checkpoint.func is checkpoint
