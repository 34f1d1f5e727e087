"""transformers' Trainer and TRL's SFTTrainer train prompts as they train whole models."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import BitsAndBytesConfig, TorchAoConfig

from ptune import AutoPTuneModelForCausalLM

pytest.importorskip("trl")  # which needs Python 3.11

from . import trainers
from .trainers import DEEP, KINDS, SHALLOW, Losses, loss_curve, make_model, make_trainer, trained

# gradient checkpointing took another name, which the oldest supported transformers does not know
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

PROMPTS = {"shallow": SHALLOW, "deep": DEEP}
CASES = [("classifier", "shallow"), ("classifier", "deep"), ("language model", "deep"), ("sft", "shallow")]


@pytest.fixture
def base_of(tiny_bert, tiny_llama):
    return lambda kind: tiny_bert if kind == "classifier" else tiny_llama


def quantised(backend):
    if backend == "int8 weights":
        config = TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(
            load_in_4bit=backend == "nf4", load_in_8bit=backend != "nf4", bnb_4bit_quant_type="nf4"
        )
    return {"quantization_config": config, "device_map": "cpu"}


def parts(parameter):
    """The tensors that a parameter is made of."""
    return [getattr(parameter, part) for part in ("qdata", "scale") if hasattr(parameter, part)] or [parameter]


def assert_same(got, expected, tolerance=0.0):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * max(1.0, value.abs().max().item()))


@pytest.mark.parametrize(("kind", "prompts"), CASES)
def test_the_best_prompts_are_loaded_at_the_end(base_of, tmp_path, kind, prompts):
    """After four steps downhill, two uphill."""
    base = base_of(kind)
    model = make_model(kind, base, **PROMPTS[prompts])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = make_trainer(
        kind, model, base, tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0 if step < 4 else -10.0)),
    )  # fmt: skip
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert losses[6] > losses[best] + 0.1
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = {step: load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (best, 6)}
    assert_same(trained(model), saved[best])
    assert not any(torch.equal(saved[6][name], value) for name, value in saved[best].items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize(("kind", "prompts"), CASES)
def test_a_resumed_run_ends_as_the_whole_one(base_of, tmp_path, kind, prompts):
    base = base_of(kind)
    whole = make_model(kind, base, **PROMPTS[prompts])
    make_trainer(kind, whole, base, tmp_path, max_steps=6, save_strategy="steps", save_steps=3).train()
    resumed = make_model(kind, base, **PROMPTS[prompts])
    trainer = make_trainer(kind, resumed, base, tmp_path / "again", max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 6  # three of them from before
    assert_same(trained(resumed), trained(whole))


@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_a_resumed_run_of_prompts_beside_lora(base_of, tmp_path, kind):
    """PEFT saves what its config names: prompts and head among it, as the README has it."""
    peft = pytest.importorskip("peft")
    base = base_of(kind)

    def both():
        model = make_model(kind, base, **DEEP)
        own = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        targets = ["query", "value"] if kind == "classifier" else ["q_proj", "v_proj"]
        config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=own, lora_dropout=0.0)
        return peft.get_peft_model(model, config)

    whole, resumed, start = both(), both(), trained(both())
    make_trainer(kind, whole, base, tmp_path, max_steps=6, save_strategy="steps", save_steps=3).train()
    trainer = make_trainer(kind, resumed, base, tmp_path / "again", max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(trained(resumed), trained(whole))
    assert not any(torch.equal(value, start[name]) for name, value in trained(whole).items() if "lora_A" not in name)


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["accumulation", "checkpointing", "reentrant checkpointing"],
)
@pytest.mark.parametrize(("kind", "prompts"), CASES)
def test_what_saves_memory_changes_nothing(base_of, tmp_path, kind, prompts, options):
    """Plain gradient descent: Adam would make much of a gradient that is 0 but for rounding."""
    base = base_of(kind)
    plain, frugal = ({"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0} | rest for rest in ({}, options))
    expected = loss_curve(kind, base, tmp_path, PROMPTS[prompts], **plain)
    got = loss_curve(kind, base, tmp_path, PROMPTS[prompts], **frugal)
    assert got[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same(got[1], expected[1], 1e-5)
    start = trained(make_model(kind, base, **PROMPTS[prompts]))
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in expected[1].items())


@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_smoothed_labels_are_those_of_the_stock_class(base_of, tmp_path, kind):
    """Of a language model they are shifted, which Trainer tells by the name of the class; each text alone."""
    base = base_of(kind)
    trainer = make_trainer(kind, make_model(kind, base, **DEEP), base, tmp_path, label_smoothing_factor=0.2)
    loss, losses = trainer.evaluate()["eval_loss"], []
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logp = trainer.model(ids).logits.log_softmax(-1)
        logp, labels = (logp, [row["labels"]]) if kind == "classifier" else (logp[0, :-1], ids[0, 1:])
        losses += [-0.8 * p[label].item() - 0.2 * p.mean().item() for p, label in zip(logp, labels, strict=True)]
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_padding_on_the_left_changes_nothing(tiny_llama, tmp_path, prompts):
    """Trainer divides by the labels that it counts: there, by each text's first too, which the model does not score."""
    scores = []
    for side in ("right", "left"):
        losses = Losses()
        model = make_model("language model", tiny_llama, **PROMPTS[prompts])
        trainer = make_trainer("language model", model, tiny_llama, tmp_path, max_steps=2, callbacks=[losses])
        trainer.data_collator.tokenizer.padding_side = side
        trainer.train()
        scores.append([*losses.values, trainer.evaluate()["eval_loss"]])
        with torch.no_grad():
            itself = model.eval()(**trainer.data_collator(list(trainer.eval_dataset))).loss
        assert scores[-1][-1] == pytest.approx(itself.item(), abs=1e-5)
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


def test_sft_scores_what_the_model_says(tiny_llama, tmp_path):
    """Its loss, accuracy and entropy, taken past the model's own head, beside those of each text alone."""
    model = make_model("sft", tiny_llama, **DEEP)
    trainer = make_trainer("sft", model, tiny_llama, tmp_path)
    scores = trainer.evaluate()
    losses, right, entropies = [], [], []
    model = AutoPTuneModelForCausalLM.from_pretrained(tiny_llama, **DEEP)
    model.load_state_dict(trained(trainer.model), strict=False)
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        logp = model(ids).logits[0, :-1].log_softmax(-1)
        losses += (-logp.gather(1, ids[0, 1:, None])).flatten().tolist()
        right += (logp.argmax(-1) == ids[0, 1:]).tolist()
        entropies += (-(logp.exp() * logp).sum(-1)).tolist()
    for name, values in (("loss", losses), ("mean_token_accuracy", right), ("entropy", entropies)):
        assert scores[f"eval_{name}"] == pytest.approx(sum(values) / len(values), abs=1e-5), name


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
def test_packed_texts_are_refused(tiny_llama, tmp_path, options):
    trainer = make_trainer("sft", make_model("sft", tiny_llama, **SHALLOW), tiny_llama, tmp_path, **options)
    with pytest.raises(NotImplementedError, match="packed batches are not supported"):
        trainer.train()


@pytest.mark.parametrize("backend", ["nf4", "LLM.int8", "int8 weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_bases(base_of, tmp_path, caplog, kind, backend):
    """Trainer refuses one without an adapter, and TRL rounds what trains on one of bitsandbytes' to bfloat16."""
    base, given = base_of(kind), quantised(backend)
    model = make_model(kind, base, **DEEP, **given)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = trained(model)
    trainer = make_trainer(kind, model, base, tmp_path, max_steps=8, save_strategy="steps", save_steps=4)
    assert_same(trained(model), start)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.05
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    for name, value in frozen.items():
        assert all(torch.equal(a, b) for a, b in zip(parts(model.get_parameter(name)), parts(value), strict=True)), name
    assert load_file(tmp_path / "checkpoint-4" / "model.safetensors").keys() == start.keys()
    resumed = make_model(kind, base, **DEEP, **quantised(backend))
    trainer = make_trainer(kind, resumed, base, tmp_path / "again", max_steps=8)
    logging.getLogger("transformers").addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, "transformers"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "missing keys" in record.message]
    assert_same(trained(resumed), trained(model))


def test_two_processes_have_the_losses_of_one(tiny_bert, tiny_llama, base_of, tmp_path):
    """`accelerate launch` on four texts each, beside one process on the same eight: each step's loss, and the end."""
    # with --cpu it leaves the starting of several to MPI; that they are on a CPU, the script's own arguments say
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    result = subprocess.run(
        [sys.executable, *launch, *plain, trainers.__file__, str(tiny_bert), str(tiny_llama), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    for kind in KINDS:
        two = load_file(tmp_path / f"{kind}.safetensors")
        losses, one = loss_curve(kind, base_of(kind), tmp_path, DEEP)
        assert two.pop("losses").tolist() == pytest.approx(losses, abs=1e-5), kind
        assert_same(two, one, 1e-5)
