"""What an optimizer step does, and an evaluation does not."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, GenerationMixin, Trainer, TrainingArguments, set_seed

import ptune.mix
import ptune.train
from ptune import PromptBank
from ptune.data import Columns, Labelled
from ptune.generation import PromptGeneration
from ptune.mix import TaskMix
from ptune.runs import Run, new_model
from ptune.tasks import IGNORED, TASKS, Classification, Generation, Tagging
from ptune.tokenizer import load_tokenizer
from ptune.train import OneDevice, ResumableTrainer, evaluate, fit

from .commands import FILES

EXAMPLES = [Labelled("good one two", "yes"), Labelled("bad red", "no")] * 4


@pytest.mark.parametrize("mode", [None, "ptune", "deep_ptune"])
def test_prompts_and_head_move_at_their_own_rates(tiny_bert, mode):
    task = Classification(load_tokenizer(str(tiny_bert), "classification"), 16, ["no", "yes"])
    texts = [example.text for example in EXAMPLES]
    set_seed(0)
    model = new_model("classification", str(tiny_bert), task.labels, tuning_mode=mode, pre_seq_len=3, init_text=texts)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    fit(model, task, EXAMPLES, steps=1, warmup=0, learning_rate=1e-3, head_learning_rate=1e-2, quiet=True)
    for name, old in before.items():
        # Adam's first step is as long as its rate wherever there is a gradient
        moved = (model.get_parameter(name) - old).abs().max().item()
        rate = 1e-2 if mode and "prompt" not in name else 1e-3
        assert moved == pytest.approx(rate, rel=1e-3), name
    assert any("prompt" in name for name in before) == (mode is not None)


def test_equal_scores_where_no_checkpoints_are_kept(tiny_bert):
    """There is no best step then, whose loss a later evaluation could be compared with."""
    task = Classification(load_tokenizer(str(tiny_bert), "classification"), 16, ["no", "yes"])
    model = new_model("classification", str(tiny_bert), task.labels, tuning_mode=None, pre_seq_len=0, init_text="")
    log = fit(model, task, EXAMPLES, EXAMPLES, steps=3, evaluations=3, learning_rate=1e-7, quiet=True)
    scores = [entry["eval_macro_f1"] for entry in log if "eval_macro_f1" in entry]
    assert len(scores) == 3
    assert len(set(scores)) == 1


@pytest.mark.parametrize(
    ("scores", "kept"), [([math.nan, 3.0, 2.0, 2.5], 3), ([4.0, math.nan], 1), ([math.nan, math.nan], 2)]
)
def test_what_is_no_number_is_not_the_best(scores, kept):
    log = [{"step": i, "eval_perplexity": its, "eval_loss": its} for i, its in enumerate(scores, 1)]
    assert Run.best(SimpleNamespace(task=Generation), log)["step"] == kept


@pytest.mark.parametrize("kind", ["classification", "tagging", "generation"])
def test_a_batch_in_parts_trains_alike(tiny_bert, tiny_llama, tmp_path, kind):
    """On the same examples in each step; an epoch's last part is smaller, and labels of tokens differ in number."""
    kind, base = TASKS[kind], str(tiny_llama if kind == "generation" else tiny_bert)
    examples = kind.read(FILES[kind.name](tmp_path), Columns())[:20]
    task = kind(load_tokenizer(base, kind.name), 32, kind.label_names(examples))
    trained, sizes = [], []
    for micro_batch_size in (None, 3):
        set_seed(1)
        texts = [task.text_of(example) for example in examples]
        model = new_model(kind.name, base, task.labels, tuning_mode="ptune", pre_seq_len=3, init_text=texts)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.register_forward_pre_hook(
            lambda model, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True
        )
        fit(
            model,
            task,
            examples,
            steps=3,
            learning_rate=1e-2,
            batch_size=12,
            micro_batch_size=micro_batch_size,
            quiet=True,
        )
        trained.append(model.prompt_embeddings.weight.detach())
    assert sizes == [12, 8, 12, *[3] * 4, 3, 3, 2, *[3] * 4]
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=1e-4)


def test_a_second_gpu_is_left_alone(tmp_path):
    """Trainer would put a part of each batch there, and take batches of twice the size."""
    kinds = (OneDevice, TrainingArguments)
    arguments = [kind(str(tmp_path), per_device_train_batch_size=4, use_cpu=True) for kind in kinds]
    for its in arguments:
        its._n_gpu = its.n_gpu and 1  # set up
        its._n_gpu = 2
    assert [its.train_batch_size for its in arguments] == [4, 8]


@pytest.mark.parametrize(
    ("own", "stock"),
    [
        (ResumableTrainer, Trainer),
        (ptune.train._Trainer, Trainer),
        (ptune.mix._MixTrainer, Trainer),
        (PromptGeneration, GenerationMixin),
    ],
)
def test_what_is_overridden_exists(own, stock):
    """A release of transformers that calls it otherwise would not call it at all, and say nothing."""
    for name in vars(own):
        if name.startswith("_") and not name.startswith("__"):
            assert hasattr(stock, name), name


def test_an_evaluation_draws_no_random_numbers(tiny_bert):
    task = Classification(load_tokenizer(str(tiny_bert), "classification"), 16, ["no", "yes"])
    model = new_model("classification", str(tiny_bert), task.labels, tuning_mode=None, pre_seq_len=0, init_text=())

    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    set_seed(3)
    expected = draws()
    set_seed(3)
    evaluate(model, task, EXAMPLES)
    assert draws() == expected


@pytest.mark.parametrize("kind", [Tagging, Generation])
def test_the_loss_is_the_mean_of_all_labels(tiny_bert, tiny_llama, tmp_path, kind):
    """Whatever the batches: the same examples, four times, are batched in another way."""
    base = {Tagging: tiny_bert, Generation: tiny_llama}[kind]
    examples = kind.read(FILES[kind.name](tmp_path), Columns(text="prompt"))  # of all lengths
    task = kind(load_tokenizer(str(base), kind.name), 32, kind.label_names(examples))
    set_seed(0)
    texts = [task.text_of(example) for example in examples]
    model = new_model(kind.name, str(base), task.labels, tuning_mode="ptune", pre_seq_len=3, init_text=texts).eval()
    losses = []
    for example in examples:
        batch = task.collate([task.encode(example)])
        with torch.no_grad():
            output = model(**batch)
        labels = batch["labels"][:, kind is Generation :]
        losses.append(output.loss.double().expand(int((labels != IGNORED).sum())))
    for times in (1, 4):
        assert evaluate(model, task, examples * times)["loss"] == pytest.approx(float(torch.cat(losses).mean()), 1e-5)


def test_heads_of_a_mix_drop_out_what_they_do_alone(tiny_bert, tmp_path):
    """As much of the same numbers, which are drawn for one head after the other; of the base nothing is dropped."""
    ids, bank, models = torch.randint(4, 20, (6, 5)), PromptBank(AutoModel.from_pretrained(tiny_bert)), {}
    labels = {"classification": torch.tensor([0, 1, 0]), "tagging": torch.randint(2, (3, 5))}
    for name, mode in (("classification", "deep_ptune"), ("tagging", "ptune")):
        models[name] = new_model(name, str(tiny_bert), "ab", tuning_mode=mode, pre_seq_len=3, init_text="good red one")
        models[name].save_prompts(tmp_path / name)
        bank.add(name, tmp_path / name)
    mix = TaskMix(bank)
    names = [name for name in models for _ in range(3)]

    def losses(training):
        torch.manual_seed(0)
        mixed = mix.train(training)(ids, torch.ones_like(ids), names, labels)["loss"]
        torch.manual_seed(0)
        rows = dict(zip(models, ids.split(3), strict=True))
        alone = [model.train(training)(rows[name], labels=labels[name]).loss for name, model in models.items()]
        return mixed.item(), sum(alone).item()

    (dropped, expected), (whole, without) = losses(True), losses(False)
    assert dropped == pytest.approx(expected, rel=1e-5)
    assert whole == pytest.approx(without, rel=1e-5)
    assert abs(dropped - whole) > 1e-3
