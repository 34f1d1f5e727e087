"""The command line on tiny random models: round trips, and one line for whatever is wrong."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertForSequenceClassification,
    MBartTokenizer,
    Trainer,
)
from typer.testing import CliRunner

import ptune as package
from ptune import AutoPTuneModel, AutoPTuneModelForQuestionAnswering
from ptune.checkpoint import PROMPTS, compiled_names
from ptune.cli import app
from ptune.data import hold_out
from ptune.runs import Run
from ptune.tasks import scores_by_label

from .commands import (
    FILES,
    classification_file,
    generation_file,
    interrupt,
    metrics_of,
    ptune,
    sentences,
    succeed,
    tagging_file,
)
from .tiny import SPECIAL, WORDS


def test_classification_round_trip(tiny_bert, tmp_path):
    out, plot = tmp_path / "out", tmp_path / "curves.png"
    train, held_out = classification_file(tmp_path), classification_file(tmp_path, count=60, seed=1)
    arguments = ["--model", tiny_bert, "--task", "classification", "--data", train, "--out", out]
    shown = succeed("train", *arguments, "--eval-data", held_out, "--pre-seq-len", 8, "--plot", plot)
    assert "macro f1" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")

    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "ptune_config.json", "train.json"]
    rows, hidden, layers, labels = 8, 32, 2, 2
    head = hidden * labels + labels
    tensors = load_file(out / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == rows * hidden * (1 + layers) + head
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    record = json.loads((out / "train.json").read_text())
    assert record["metrics"]["accuracy"] > 0.9
    (kept,) = (entry for entry in record["log"] if entry["step"] == record["kept_step"] and "eval_loss" in entry)
    assert record["metrics"] == {name: kept[f"eval_{name}"] for name in ("loss", "macro_f1", "accuracy")}
    assert f"as it was after step {record['kept_step']}, on 60 evaluation examples" in " ".join(shown.split())
    assert f"{record['metrics']['accuracy']:.4f}" in succeed("eval", out, "--data", held_out)

    texts = tmp_path / "texts.txt"
    texts.write_bytes(b"\xef\xbb\xbfgood red\r\n\r\nbad one two\r\n")  # as some editors save: marked, with CR LF
    lines = succeed("predict", out, "--file", texts).splitlines()
    refused = ptune("predict", out, "good", "--max-new-tokens", 3)
    assert "--max-new-tokens: expected with generation, got classification" in refused.stderr
    assert succeed("predict", out, text="good red\n\nbad one two\n").splitlines() == lines
    answers = [json.loads(line) for line in lines]
    assert [(answer["text"], answer["label"]) for answer in answers] == [("good red", "yes"), ("bad one two", "no")]
    assert all(0.5 < answer["score"] <= 1 for answer in answers)
    assert [answer["row"] for answer in answers] == [1, 3]
    table = tmp_path / "texts.csv"
    table.write_text('id,text\n7,good red\n8," "\n9,bad one two\n')
    rows = [json.loads(line) for line in succeed("predict", out, "--file", table, "--all-scores").splitlines()]
    assert [row["row"] for row in rows] == [1, 3]
    for row, answer in zip(rows, answers, strict=True):
        assert row["scores"].keys() == {"no", "yes"}
        assert row["scores"][row["label"]] == row["score"] == max(row["scores"].values())
        assert sum(row["scores"].values()) == pytest.approx(1, abs=2e-4)
        assert {name: value for name, value in row.items() if name != "scores"} == answer
    one = json.loads(succeed("predict", out, "bad one two"))
    assert one["score"] == pytest.approx(answers[1]["score"], abs=1e-3)
    shown = " ".join(succeed("info", out).replace("│", " ").split())
    assert "task classification" in shown
    assert "prefix sharing yes: prompt rows never read the text" in shown


def test_scores_by_label(tiny_bert, tmp_path):
    """Those of what `ptune predict` says, on data of which a part is labelled wrongly, and one label is rare."""
    out, data = tmp_path / "out", tmp_path / "wrong.jsonl"
    train, shared = classification_file(tmp_path), ["--model", tiny_bert, "--task", "classification", "--out", out]
    succeed("train", *shared, "--data", train, "--steps", 60)
    rows = [
        (" ".join(["good" if i % 5 else "bad", *words]), "no" if i % 3 else "yes")
        for i, words in enumerate(sentences(31, 2))
    ]
    data.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    answers = [json.loads(line)["label"] for line in succeed("predict", out, "--file", data).splitlines()]
    scores = json.loads(succeed("eval", out, "--data", data, "--json"))
    assert scores["examples"] == 31
    assert scores["by_label"] == scores_by_label([label for _, label in rows], answers)
    assert scores["macro_f1"] == pytest.approx(sum(its["f1"] for its in scores["by_label"].values()) / 2)
    shown = re.findall(r"[\w.]+", succeed("eval", out, "--data", data))
    for label, (*rates, count) in ((label, its.values()) for label, its in scores["by_label"].items()):
        start = shown.index(label)
        assert shown[start : start + 5] == [label, *(f"{rate:.4f}" for rate in rates), str(count)]


def test_prompts_of_another_task_to_start_from(tiny_bert, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shared = ["--model", tiny_bert, "--steps", 3]
    mood = ["--task", "classification", "--data", classification_file(tmp_path)]
    names = ["--task", "tagging", "--data", tagging_file(tmp_path)]
    succeed("train", *shared, *mood, "--pre-seq-len", 5, "--out", first)
    still = [*names, "--out", second, "--init-from", first, "--learning-rate", 1e-9]
    succeed("train", *shared, *still, "--pre-seq-len", 5)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    for name in PROMPTS:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)
    assert after["classifier.bias"].shape == (3,)
    (tmp_path / "names.yaml").write_text(
        f"task: tagging\ndata: {names[-1].name}\ninit_from: first\npre_seq_len: 5\nlearning_rate: 1e-9\n"
    )
    succeed("train", *shared, "--task-mix", tmp_path / "names.yaml", "--out", tmp_path / "mixed")
    after = load_file(tmp_path / "mixed" / "names" / "model.safetensors")
    torch.testing.assert_close(after[PROMPTS[1]], before[PROMPTS[1]], rtol=0, atol=1e-7)
    model = AutoPTuneModel.from_pretrained(tiny_bert)
    model.load_prompts(first, head=False)
    model.save_prefix(tmp_path / "prefix")
    succeed("train", *shared, *names, "--out", tmp_path / "on", "--init-from", tmp_path / "prefix", "--pre-seq-len", 5)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "prefix", tmp_path / "on"))
    for name in compiled_names(model.ptune_config, model.config.num_hidden_layers):
        assert not torch.equal(after[name], before[name])
    for given, problem in (
        ([], "pre_seq_len: the prompts to start from have 5, got 16"),
        (
            ["--pre-seq-len", 5, "--tuning-mode", "none"],
            "init_from: expected with a tuning mode, and without init_text",
        ),
        (["--pre-seq-len", 5, "--init-text", "good"], "init_from: expected with a tuning mode, and without init_text"),
    ):
        result = ptune("train", *shared, *still, *given, "--overwrite")
        assert result.exit_code == 2
        assert problem in " ".join(result.stderr.split())


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_tagging_round_trip(tiny_bert, tmp_path, mode):
    out = tmp_path / "out"
    arguments = ["--model", tiny_bert, "--task", "tagging", "--data", tagging_file(tmp_path), "--out", out]
    result = ptune("train", *arguments, "--tuning-mode", mode)
    assert result.exit_code == 0, result.exception
    assert "9 of 90 examples are held out" in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in said] == [f"step {step} of 150" for step in (30, 60, 90, 120, 150)]
    log = json.loads((out / "train.json").read_text())["log"]
    last = [entry for entry in log if "eval_loss" in entry][-1]
    assert f"loss {last['eval_loss']:.4f}, entity f1 {last['eval_entity_f1']:.4f}" in said[-1]
    assert json.loads((out / "train.json").read_text())["metrics"]["entity_f1"] > 0.9
    answer = json.loads(succeed("predict", out, "--file", "-", text="Ann is in Rome"))
    assert answer["tags"] == ["B-person", "O", "O", "B-place"]
    assert answer["entities"][1] == {"type": "place", "text": "Rome", "first_word": 3, "last_word": 3}
    data = tmp_path / "wrong.conll"
    data.write_text("Ann\tB-person\nin\tO\nRome\tB-person\n\nBob\tO\nOslo\tB-place\n")
    assert json.loads(succeed("eval", out, "--data", data, "--json"))["by_label"] == {
        "person": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "examples": 2},
        "place": {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "examples": 1},
    }


def test_a_head_alone(tiny_bert, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "--model",
        tiny_bert,
        "--task",
        "classification",
        "--data",
        classification_file(tmp_path),
        "--out",
        out,
    ]
    succeed("train", *arguments, "--tuning-mode", "none")
    assert load_file(out / "model.safetensors").keys() == {"classifier.weight", "classifier.bias"}
    assert json.loads((out / "train.json").read_text())["metrics"]["accuracy"] > 0.9
    assert json.loads(succeed("predict", out, "bad one"))["label"] == "no"


def test_generation_round_trip(tiny_llama, tmp_path):
    out, data = tmp_path / "out", generation_file(tmp_path)
    arguments = ["--model", tiny_llama, "--task", "generation", "--data", data, "--out", out]
    succeed("train", *arguments)
    log = json.loads((out / "train.json").read_text())["log"]
    perplexities = [entry["eval_perplexity"] for entry in log if "eval_perplexity" in entry]
    assert min(perplexities) < 0.8 * perplexities[0]
    prompts = ["red blue", "the"]
    refused = ptune("predict", out, "the", "--all-scores")
    assert "--all-scores: expected with classification, got generation" in refused.stderr
    lines = succeed("predict", out, "--max-new-tokens", 3, text="\n".join(prompts)).splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["prompt"] for answer in answers] == prompts
    alone = json.loads(succeed("predict", out, "the", "--max-new-tokens", 3))
    assert alone | {"row": 2} == answers[1]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_round_trip(kind, request, tmp_path):
    """Scores and completions are the stock model's, one row at a time, with the trained prompt joined by hand."""
    base, out, held_out = request.getfixturevalue(f"tiny_{kind}"), tmp_path / "out", tmp_path / "held_out.jsonl"
    rows = [(" ".join(words), " ".join(["one", "two", "three"][: len(words) // 2])) for words in sentences(20, 1)]
    held_out.write_text("\n".join(json.dumps({"source": text, "target": completion}) for text, completion in rows))
    arguments = ["--model", base, "--task", "generation", "--data", generation_file(tmp_path), "--out", out]
    arguments += ["--eval-data", held_out, "--tuning-mode", "ptune", "--pre-seq-len", 8, "--learning-rate", 0.3]
    succeed("train", *arguments)
    stock, word = AutoModelForSeq2SeqLM.from_pretrained(base).eval(), (SPECIAL + WORDS).index
    prompt = load_file(out / "model.safetensors")["prompt_embeddings.weight"]
    first, last = [word("[CLS]")] * (kind == "bart"), word("[SEP]")
    likelihoods, without, completions = [], [], []
    for text, completion in rows:
        ids = torch.tensor([*first, *map(word, text.split()), last])
        labels = torch.tensor([*first, *map(word, completion.split()), last])
        start = torch.tensor([[stock.config.decoder_start_token_id, *labels[:-1]]])
        embeds = stock.get_input_embeddings()(ids)
        with torch.no_grad():
            encoded = stock.get_encoder()(inputs_embeds=torch.cat([prompt, embeds])[None])
            for found, states in ((likelihoods, encoded), (without, stock.get_encoder()(inputs_embeds=embeds[None]))):
                logits = stock(encoder_outputs=states, decoder_input_ids=start).logits[0]
                found.append(logits.double().log_softmax(-1).gather(1, labels[:, None]))
            written = stock.generate(encoder_outputs=encoded, max_new_tokens=6, do_sample=False)[0].tolist()
        completions.append(" ".join((SPECIAL + WORDS)[token] for token in written if token >= len(SPECIAL)))
    perplexity, untuned = ((-torch.cat(found).mean()).exp().item() for found in (likelihoods, without))
    assert perplexity < 0.5 * untuned
    assert metrics_of(out)["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert metrics_of(out)["loss"] == pytest.approx(math.log(perplexity), rel=1e-5)
    shown = succeed("eval", out, "--data", held_out)
    assert float(re.search(r"perplexity\W+([\d.]+)", shown)[1]) == pytest.approx(perplexity, abs=1e-4)
    shown = succeed("predict", out, "--max-new-tokens", 6, text="\n".join(text for text, _ in rows))
    answers = [(answer["prompt"], answer["completion"]) for answer in map(json.loads, shown.splitlines())]
    assert answers == [(text, written) for (text, _), written in zip(rows, completions, strict=True)]
    shown = " ".join(succeed("info", out).replace("│", " ").split())
    assert "task seq2seq" in shown
    assert "prefix sharing no: prompt rows of an encoder-decoder are read by its decoder" in shown


def evaluated(out: Path) -> list[int]:
    log = json.loads((out / "train.json").read_text())["log"]
    return [entry["step"] for entry in log if "eval_loss" in entry]


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((out / "train.json").read_text())["log"] if "loss" in entry]


def test_a_run_cut_off_after_its_last_checkpoint_trains_no_further(tiny_bert, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ["--model", tiny_bert, "--task", "classification", "--data", classification_file(tmp_path)]
    succeed("train", *arguments, "--steps", 5, "--out", whole)
    with monkeypatch.context() as patch:
        patch.delattr(Run, "write_record")
        assert ptune("train", *arguments, "--steps", 5, "--out", out).exit_code != 0
    refused = ptune("train", *arguments, "--steps", 4, "--out", out, "--resume")
    assert refused.exit_code == 2
    assert "steps: the run to resume has done 5, got 4" in refused.stderr
    succeed("train", *arguments, "--steps", 5, "--out", out, "--resume")
    record = json.loads((out / "train.json").read_text())
    assert max(entry["step"] for entry in record["log"]) == 5
    resumed, finished = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in finished.items())


def test_a_run_that_goes_on_for_longer(tiny_bert, tmp_path, monkeypatch):
    arguments = ["--model", tiny_bert, "--task", "classification", "--data", classification_file(tmp_path)]
    arguments += ["--out", tmp_path / "out", "--steps"]
    interrupt(monkeypatch, *arguments, 10, step=7)
    succeed("train", *arguments, 40, "--resume")
    assert evaluated(tmp_path / "out") == [2, 4, 6, 8, 16, 24, 32, 40]


@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("t5", "generation")])
def test_an_interrupted_run_resumes_to_the_same_weights(kind, task, request, tmp_path, monkeypatch):
    out, whole, base = tmp_path / "out", tmp_path / "whole", request.getfixturevalue(f"tiny_{kind}")
    data = FILES[task](tmp_path)
    arguments = ["--model", base, "--task", task, "--data", data, "--steps", 20]
    succeed("train", *arguments, "--out", whole)
    interrupt(monkeypatch, *arguments, "--out", out, step=18)
    assert {path.name for path in out.iterdir()} == {"checkpoints"}
    newest = out / "checkpoints" / "checkpoint-16"
    assert not (newest / "config.json").exists()
    assert not (newest / "tokenizer.json").exists()
    assert {path.suffix for path in newest.iterdir()} == {".safetensors", ".json"}
    shutil.copytree(newest, out / "checkpoints" / "checkpoint-of-mine")
    cut_short = out / "checkpoints" / "checkpoint-18"
    shutil.copytree(newest, cut_short)
    (cut_short / "trainer_state.json").write_text('{"best')
    assert "this run was interrupted: `ptune train … --resume` goes on" in ptune("info", out).stderr

    succeed("train", *arguments, "--out", out, "--resume")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-of-mine"]
    resumed, finished = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert losses(out) == pytest.approx(losses(whole), abs=1e-6)
    assert resumed.keys() == finished.keys()
    for name, tensor in finished.items():
        assert torch.equal(resumed[name], tensor), name
    again = ptune("train", *arguments, "--out", out, "--resume")
    assert again.exit_code == 2
    assert f"the run in {out} has finished" in again.stderr


def test_a_run_is_resumed_with_what_it_began_with(tiny_bert, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    data, others = classification_file(tmp_path), tmp_path / "others.tsv"
    others.write_text(data.read_text().replace("yes", "aye"))
    options = {"--model": base, "--task": "classification", "--data": data, "--out": tmp_path / "out", "--steps": 10}

    def arguments(**changes):
        return [
            part
            for pair in (options | {f"--{name}": value for name, value in changes.items()}).items()
            for part in pair
        ]

    interrupt(monkeypatch, *arguments(), step=4)
    header, *lines = data.read_text().splitlines(keepends=True)
    kept, _ = hold_out(lines, 0.1, lambda line: line.split("\t")[0], 0)
    (tmp_path / "kept.tsv").write_text(header + "".join(kept))
    kept = tmp_path / "kept.tsv"
    settings = json.loads((base / "config.json").read_text())
    for changes, problem in (
        ({"pre-seq-len": 5}, "pre_seq_len: the run to resume has 16, got 5"),
        ({"learning-rate": 0.5}, "learning_rate: the run to resume has [0.01, 0.1], got [0.5, 0.1]"),
        ({"model": tiny_bert}, f"model: the run to resume has {base}, got {tiny_bert}"),
        ({"data": others}, "the run to resume has the labels no, yes; got aye, no"),
        ({"seed": 1}, "seed: the run to resume has 0, got 1"),
        ({"batch-size": 8}, "batch_size: the run to resume has 32, got 8"),
        ({"dtype": "bfloat16"}, "dtype: the run to resume has auto, got bfloat16"),
        ({"max-length": 9}, "max_length: the run to resume has 24, got 9"),
        ({"hold-out": 0.2}, "training examples: the run to resume has 81 ("),
        ({"eval-data": data, "data": kept}, "evaluation examples: the run to resume has 9 ("),
        ({}, f"the config of {base} has changed"),
    ):
        if not changes:
            (base / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 1e-3}))
        refused = ptune("train", *arguments(**changes), "--resume")
        assert refused.exit_code == 2
        assert problem in refused.stderr
    (base / "config.json").write_text(json.dumps(settings))
    succeed("train", *arguments(), "--resume")


@pytest.mark.parametrize("count", [2, 3])
def test_a_base_with_a_head_of_its_own(tiny_bert, tmp_path, monkeypatch, count):
    base, out, data = tmp_path / "base", tmp_path / "out", classification_file(tmp_path)
    shutil.copytree(tiny_bert, base)
    config = AutoConfig.from_pretrained(base, num_labels=count, problem_type="regression")
    BertForSequenceClassification(config).save_pretrained(base)
    weights = (base / "model.safetensors").read_bytes()
    arguments = ["--model", base, "--task", "classification", "--data", data, "--steps", 20, "--out"]
    refused = ptune("train", *arguments, base, "--overwrite")
    assert refused.exit_code == 2
    assert "expected a folder for prompts, got one of a model" in refused.stderr
    interrupt(monkeypatch, *arguments, out, step=8)
    kept = ptune("train", *arguments, out, "--resume").stderr.count("own head for 2 labels is kept")
    assert kept == (count == 2)
    assert ("classifier.weight" in load_file(out / "model.safetensors")) == (count == 3)
    assert json.loads(succeed("predict", out, "good red"))["label"] in ("no", "yes")
    succeed("eval", out, "--data", data)
    assert (base / "model.safetensors").read_bytes() == weights


def test_a_base_that_was_moved(tiny_bert, tmp_path):
    base, moved, out, data = tmp_path / "base", tmp_path / "moved", tmp_path / "out", classification_file(tmp_path)
    shutil.copytree(tiny_bert, base)
    succeed("train", "--model", base, "--task", "classification", "--data", data, "--out", out, "--steps", 2)
    scored, predicted = succeed("eval", out, "--data", data), succeed("predict", out, "good red")
    base.rename(moved)
    for command in (["eval", out, "--data", data], ["predict", out, "good red"]):
        lost = ptune(*command)
        assert lost.exit_code == 2
        assert "--base-model on the command line" in " ".join(lost.stderr.split())
        assert succeed(*command, "--base-model", moved) == (scored if command[0] == "eval" else predicted)


def test_overwrite_replaces_a_run_and_leaves_other_files(tiny_bert, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "--model",
        tiny_bert,
        "--task",
        "classification",
        "--data",
        classification_file(tmp_path),
        "--out",
        out,
    ]
    succeed("train", *arguments, "--steps", 10)
    (out / "notes.txt").write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    refused = ptune("train", *arguments, "--steps", 4)
    assert refused.exit_code == 2
    assert "is not empty" in refused.stderr
    assert (out / "model.safetensors").read_bytes() == before
    succeed("train", *arguments, "--steps", 4, "--overwrite", "--seed", 1)
    assert (out / "model.safetensors").read_bytes() != before
    assert not (out / "checkpoints").exists()
    assert (out / "notes.txt").read_text() == "mine"


def _lose_tokenizer(base: Path) -> None:
    for path in base.glob("tokenizer*"):
        path.unlink()


def _change_config(base: Path, **changes: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


DAMAGES = {
    "no tokenizer": _lose_tokenizer,
    "odd tokenizer": lambda base: (base / "tokenizer.json").write_text('{"version": 1}'),
    "damaged": lambda base: (base / "model.safetensors").write_bytes(b"\0" * 100),
    "odd config": lambda base: _change_config(base, hidden_size="32"),
    "wider": lambda base: _change_config(base, hidden_size=64),
    "shorter": lambda base: save_file(
        {name: its for name, its in load_file(base / "model.safetensors").items() if "layer.1." not in name},
        base / "model.safetensors",
        {"format": "pt"},
    ),
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"--model": "no/such/model"}, "no/such/model"),
        ({"--task": "translation"}, "translation"),
        ({"--data": "none.tsv"}, "none.tsv: no such file"),
        ({"--data": "empty.tsv"}, "empty.tsv: the file is empty"),
        ({"--data": "short.tsv"}, "short.tsv:3: expected 2 columns (label, text), got 1"),
        ({"--data": "one.tsv"}, "one.tsv: expected at least two labels, got yes"),
        ({"--eval-data": "new.tsv"}, "new.tsv: labels not seen in training: maybe; it saw no, yes"),
        ({"--text-column": "sms"}, "no column 'sms' for the text"),
        ({"--hold-out": "2"}, "hold_out: expected a number above 0 and below 1"),
        ({"--tuning-mode": "soft"}, "soft"),
        ({"--plot": "curves.pdf"}, "expected a .png file"),
        ({"--resume": None}, "nothing to resume"),
        ({"--pre-seq-len": "38"}, "38 rows leave no room"),
        ({"--pre-seq-len": "40"}, "expected less than the 40 positions"),
        ({"--out": "empty.tsv/a/b"}, "empty.tsv is a file"),
        ({"--task": "generation"}, "(bert) is none"),
        ({"--learning-rate": "inf"}, "learning_rate: expected a positive number, got inf"),
        ({"--head-learning-rate": "nan"}, "head_learning_rate: expected a positive number, got nan"),
        ({"--prompt-column": "text"}, "prompt_column: classification takes none, got 'text'"),
        ({"--task": "tagging", "--text-column": "text"}, "text_column: tagging takes none, got 'text'"),
        ({"--init-text": ""}, "prompt_init_text"),
        ({"--micro-batch-size": 5}, "micro_batch_size: expected a divisor of batch_size (32), got 5"),
        ({"--max-length": "3"}, "max_length: expected 4 or more with this tokenizer, got 3"),
        ({"--model": "no tokenizer"}, "expected a tokenizer in no tokenizer, got one without a vocabulary"),
        ({"--model": "odd tokenizer"}, "the tokenizer of odd tokenizer cannot be read"),
        ({"--model": "damaged"}, "header"),
        ({"--model": "odd config"}, "hidden_size"),
        ({"--model": "wider"}, "wider: expected all weights of BertModel, in the shapes of its config; lacking or of"),
        ({"--model": "shorter"}, "other shapes: bert.encoder.layer.1.attention"),
    ],
)
def test_what_is_wrong_takes_one_line(tiny_bert, tmp_path, monkeypatch, changes, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = classification_file(tmp_path)
    Path("empty.tsv").write_text("")
    Path("short.tsv").write_text("label\ttext\nyes\tone\nno\n")
    Path("one.tsv").write_text("label\ttext\nyes\tone\nyes\ttwo\n")
    Path("new.tsv").write_text("label\ttext\nmaybe\tone\n")
    if (model := changes.get("--model")) in DAMAGES:
        shutil.copytree(tiny_bert, model)
        DAMAGES[model](Path(model))
    options = {"--model": tiny_bert, "--task": "classification", "--data": good, "--out": "out"} | changes
    arguments = [part for pair in options.items() for part in pair if part is not None]
    result = ptune("train", *arguments)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert "Traceback" not in result.output
    if "Usage" not in result.stderr:  # an option that typer itself refuses is shown in a box
        assert result.stderr.count("\n") <= 2
        assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert not Path("out").exists()


def test_what_a_base_must_be_is_for_its_head_to_lack(tiny_bert, tmp_path):
    """Layers of random weights would train as a head."""
    for name in ("wider", "shorter"):
        shutil.copytree(tiny_bert, tmp_path / name)
        DAMAGES[name](tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: expected all weights of BertModel"):
            AutoPTuneModel.from_pretrained(tmp_path / name, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(("steps", "expected"), [(9, [2, 4, 6, 8, 9]), (23, [5, 10, 15, 20, 23]), (3, [1, 2, 3])])
def test_the_last_step_is_evaluated(tiny_bert, tmp_path, steps, expected):
    data = classification_file(tmp_path).name
    (tmp_path / "mood.yaml").write_text(f"task: classification\ndata: {data}\n")
    arguments = ["--model", tiny_bert, "--steps", steps, "--out"]
    succeed("train", *arguments, tmp_path / "one", "--task", "classification", "--data", tmp_path / data)
    succeed("train", *arguments, tmp_path / "mix", "--task-mix", tmp_path / "mood.yaml")
    assert evaluated(tmp_path / "one") == evaluated(tmp_path / "mix" / "mood") == expected


def test_of_equal_scores_the_least_loss_is_kept(tiny_bert, tmp_path):
    """As while one label is all that is predicted: the first evaluation is not the best then."""
    out, data = tmp_path / "out", tmp_path / "data.tsv"
    data.write_text("label\ttext\n" + "yes\tgood one\n" * 30 + "no\tbad two\n" * 2)
    slowly = ["--learning-rate", 1e-4, "--head-learning-rate", 1e-3, "--steps", 20]
    arguments = ["--model", tiny_bert, "--task", "classification", "--data", data, "--eval-data", data, "--out", out]
    succeed("train", *arguments, *slowly)
    record = json.loads((out / "train.json").read_text())
    evaluations = [entry for entry in record["log"] if "eval_loss" in entry]
    best = max(entry["eval_macro_f1"] for entry in evaluations)
    tied = [entry for entry in evaluations if entry["eval_macro_f1"] == best]
    assert len(tied) > 1
    least = min(entry["eval_loss"] for entry in tied)
    assert least < tied[0]["eval_loss"]
    assert record["metrics"]["loss"] == least
    assert f"{least:.4f}" in succeed("eval", out, "--data", data)


def test_what_is_cut_is_said(tiny_bert, tmp_path, caplog):
    out = tmp_path / "out"
    arguments = ["--model", tiny_bert, "--task", "tagging", "--data", tagging_file(tmp_path), "--out", out]
    succeed("train", *arguments, "--steps", 2, "--max-length", 8)
    answers = succeed("predict", out, text="Ann " * 9 + "\nAnn\n").splitlines()
    assert "1 of 2 texts reach 8 tokens and may be cut" in caplog.text
    assert json.loads(answers[0])["tags"][6:] == ["O"] * 3


def test_a_reader_that_has_enough(tiny_bert, tmp_path):
    out = tmp_path / "out"
    arguments = ["--task", "classification", "--data", classification_file(tmp_path), "--out", out, "--steps", 2]
    succeed("train", "--model", tiny_bert, *arguments)
    (tmp_path / "texts.txt").write_text("good red\n" * 5000)
    command = f"{sys.executable} -c 'from ptune.cli import main; main()' predict {out} --file {tmp_path}/texts.txt"
    done = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["text"] == "good red"
    assert "Error" not in done.stderr


def test_labels_are_in_the_order_of_the_bases_head(tiny_bert, tmp_path):
    base, out, data = tmp_path / "base", tmp_path / "out", classification_file(tmp_path)
    shutil.copytree(tiny_bert, base)
    stock = BertForSequenceClassification.from_pretrained(base, id2label={0: "yes", 1: "no"})
    with torch.no_grad():
        stock.classifier.weight.zero_()
        stock.classifier.bias.copy_(torch.tensor([5.0, -5.0]))
    stock.save_pretrained(base)
    arguments = ["--task", "classification", "--data", data, "--out", out, "--steps", 2]
    assert "own head for 2 labels is kept" in ptune("train", "--model", base, *arguments).stderr
    answer = json.loads(succeed("predict", out, "bad"))
    assert (answer["label"], answer["score"]) == ("yes", pytest.approx(1, abs=1e-3))


def test_a_prompt_that_is_too_long_is_found_before_training(tiny_llama, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "red " * 20, "completion": "one"}))
    arguments = ["--model", tiny_llama, "--data", generation_file(tmp_path), "--eval-data", tmp_path / "long.jsonl"]
    refused = ptune("train", *arguments, "--task", "generation", "--max-length", 20, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "long.jsonl: max_length: 20 tokens leave no room after the prompt 'red red" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_labels_are_shown_as_they_are(tiny_bert, tmp_path):
    data, out = classification_file(tmp_path), tmp_path / "[bold]out"
    data.write_text(data.read_text().replace("yes", "[/x]").replace("no\t", "[red]no\t"))
    succeed("train", "--model", tiny_bert, "--task", "classification", "--data", data, "--out", out, "--steps", 2)
    shown = succeed("info", out)
    assert "[/x], [red]no" in shown
    assert "[bold]out" in shown.replace("\n", "")


def test_one_text_is_given_in_one_way(tmp_path):
    for arguments, problem in (
        (["x", "--file", "none.txt"], "--file, --text-column: expected without TEXT"),
        (["x", "--text-column", "text"], "--file, --text-column: expected without TEXT"),
        (["--text-column", "text"], "--text-column: expected with --file"),
        (["--file", "a.txt", "--text-column", "text"], "expected a .csv, .tsv, .jsonl file, for a column is named"),
        (["\udcff bad"], "TEXT:1: not UTF-8"),
    ):
        refused = ptune("predict", tmp_path, *arguments)
        assert refused.exit_code == 2
        assert problem in refused.stderr


def test_folders_that_are_no_run(tmp_path):
    for command in (["predict", tmp_path, "x"], ["eval", tmp_path, "--data", tmp_path / "a.csv"], ["info", tmp_path]):
        result = ptune(*command)
        assert result.exit_code == 2
        assert str(tmp_path) in result.stderr.replace("\n", "")
        assert result.stderr.startswith("Error: ")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "one of PEFT's, which `ptune convert` reads" in " ".join(ptune("info", tmp_path).stderr.split())


def test_labels_are_counted(tiny_bert, tmp_path):
    data = tmp_path / "data.tsv"
    data.write_text("label\ttext\n" + "yes\tgood\n" * 5 + "no\tbad\n" * 3 + "Yes\tgood one\n" * 2)
    arguments = ["--model", tiny_bert, "--task", "classification", "--data", data, "--eval-data", data, "--steps", 2]
    said = " ".join(ptune("train", *arguments, "--out", tmp_path / "out").stderr.split())
    assert "10 training examples: yes 5, no 3, Yes 2." in said
    assert "differ in case alone, and are taken for different ones: yes, Yes." in said
    shown = json.loads(succeed("info", tmp_path / "out", "--json"))
    assert (shown["task"], shown["labels"], shown["tuning mode"]) == (
        "classification", "Yes, no, yes", "deep_ptune (overwrite)",
    )  # fmt: skip
    again = ptune("train", *arguments, "--out", tmp_path / "out", "--resume").stderr
    assert f"has finished; --init-from {tmp_path / 'out'} begins a longer one" in again.replace("\n", "")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"task": "classif', "not JSON"),
        (b"\xff", "not JSON"),
        ("[]", "task is missing, or of the wrong type"),
        ('{"task": "classification"}', "max_length is missing"),
        ("translation", "task: expected one of classification, tagging, generation, seq2seq, got 'translation'"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, content, problem):
    record = tmp_path / "train.json"
    if content == "translation":
        whole = {"max_length": 8, "steps": 1, "batch_size": 1, "learning_rate": 0.1, "metrics": {}}
        content = json.dumps({"task": content, **whole})
    record.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (["predict", tmp_path, "x"], ["eval", tmp_path, "--data", tmp_path / "a.csv"], ["info", tmp_path]):
        result = ptune(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: {record}: ")
        assert problem in result.stderr


def test_prompts_saved_from_python(tiny_bert, tiny_llama, tmp_path):
    prompts = {"tuning_mode": "deep_ptune", "pre_seq_len": 6}
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    text = " ".join(["good", *["one"] * 60])  # longer than the model can read
    model = package.AutoPTuneModelForSequenceClassification.from_pretrained(tiny_bert, **labels, **prompts).eval()
    model.save_prompts(tmp_path / "mood")
    answer = json.loads(succeed("predict", tmp_path / "mood", text))
    ids = AutoTokenizer.from_pretrained(tiny_bert)(text, truncation=True, max_length=40 - 6, return_tensors="pt")
    score, index = model(**ids).logits[0].softmax(-1).max(-1)
    score = pytest.approx(score.item(), abs=1e-3)
    assert answer == {"row": 1, "text": text, "label": ["no", "yes"][index], "score": score}
    scores = json.loads(succeed("eval", tmp_path / "mood", "--data", classification_file(tmp_path), "--json"))
    assert scores["by_label"].keys() <= {"no", "yes"}
    writer = package.AutoPTuneModelForCausalLM.from_pretrained(tiny_llama, **prompts)
    writer.save_prompts(tmp_path / "tale")
    assert json.loads(succeed("predict", tmp_path / "tale", "the red", "--max-new-tokens", 2))["prompt"] == "the red"


def test_prompts_saved_from_python_for_other_tasks(tiny_bert, tmp_path):
    classifier = package.AutoPTuneModelForSequenceClassification
    for kind, given in (
        (AutoPTuneModel, {}),
        (package.AutoPTuneModelForQuestionAnswering, {}),
        (classifier, {"problem_type": "multi_label_classification"}),
    ):
        model = kind.from_pretrained(tiny_bert, tuning_mode="ptune", pre_seq_len=2, **given)
        model.save_prompts(tmp_path)
        result = ptune("predict", tmp_path, "x")
        assert result.exit_code == 2
        got = " of ".join([model.base_class.__name__, *given.values()])
        problem = f"expected prompts for classification, tagging, generation, seq2seq, got those of {got}"
        assert problem in " ".join(result.stderr.split())
    for kind, labels, problem in (
        (classifier, {"num_labels": 1}, "expected two labels or more, got LABEL_0"),
        (
            package.AutoPTuneModelForTokenClassification,
            {},
            "expected tags that begin with B- or I-, or are O, got LABEL_0",
        ),
    ):
        kind.from_pretrained(tiny_bert, tuning_mode="ptune", pre_seq_len=2, **labels).save_prompts(tmp_path)
        result = ptune("predict", tmp_path, "x")
        assert result.exit_code == 2
        assert problem in " ".join(result.stderr.split())
    AutoPTuneModel.from_pretrained(tiny_bert, tuning_mode="ptune", pre_seq_len=2).save_prompts(tmp_path)
    said = succeed("info", tmp_path)
    assert "BertModel" in said
    assert "prompt rows" in said
    assert "training" not in said


def test_a_run_knows_its_prompts(tiny_bert, tmp_path):
    data, out = classification_file(tmp_path), tmp_path / "out"
    arguments = ["--model", tiny_bert, "--task", "classification", "--data", data, "--out", out]
    succeed("train", *arguments, "--steps", 1, "--tuning-mode", "ptune")
    assert "macro f1" in (said := succeed("info", out))
    assert "(overwrite)" not in said  # which a shallow prompt does not
    AutoPTuneModel.from_pretrained(tiny_bert, tuning_mode="ptune", pre_seq_len=2).save_prompts(out)
    for command in (["info", out], ["predict", out, "x"]):
        assert "of a run whose prompts are no longer here" in ptune(*command).stderr


def test_predict_reads_what_train_does(tiny_bert, tmp_path):
    data, out = classification_file(tmp_path), tmp_path / "out"
    succeed("train", "--model", tiny_bert, "--task", "classification", "--data", data, "--out", out, "--steps", 1)
    texts = [json.loads(line)["text"] for line in succeed("predict", out, "--file", data).splitlines()]
    assert texts == [line.partition("\t")[2] for line in data.read_text().splitlines()[1:]]


def test_info_without_the_base(tiny_bert, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_bert, base)
    data = classification_file(tmp_path)
    arguments = ["train", "--model", base, "--task", "classification", "--data", data, "--out", out, "--steps", 2]
    succeed(*arguments, "--tuning-mode", "ptune")
    assert "no: in an encoder prompt rows read the text" in succeed("info", out)
    shutil.rmtree(base)
    assert "no: in an encoder prompt rows read the text" in succeed("info", out)


def test_info_of_labels_that_are_numbers(tiny_bert, tmp_path):
    loader = package.AutoPTuneModelForSequenceClassification
    loader.from_pretrained(tiny_bert, id2label={0: 10, 1: 20}).save_prompts(tmp_path)
    assert "10, 20" in succeed("info", tmp_path)
    data = tmp_path / "data.tsv"
    data.write_text("label\ttext\n10\tgood\n20\tbad\n")
    assert json.loads(succeed("eval", tmp_path, "--data", data, "--json"))["examples"] == 2


def test_predict_names_the_text_that_is_not_utf8(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("one\ncafé\n".encode("latin-1"))
    from_file = ptune("predict", tmp_path, "--file", file)
    from_input = CliRunner().invoke(app, ["predict", str(tmp_path)], input=file.read_bytes())
    assert [from_file.exit_code, from_input.exit_code] == [2, 2]
    assert f"{file}:2: not UTF-8" in from_file.stderr
    assert "standard input:2: not UTF-8" in from_input.stderr


@pytest.mark.parametrize(
    ("task", "lost", "problem"),
    [
        ("generation", ["eos_token"], "has no eos_token"),
        ("classification", ["pad_token", "eos_token", "unk_token"], "has no token to pad with"),
    ],
)
def test_a_tokenizer_without_the_tokens_a_task_needs(tiny_llama, tmp_path, task, lost, problem):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | dict.fromkeys(lost)))
    data = generation_file(tmp_path) if task == "generation" else classification_file(tmp_path)
    result = ptune("train", "--model", base, "--task", task, "--data", data, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert problem in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_says_so_in_one_line_and_can_be_tried_again(tiny_bert, tmp_path, monkeypatch):
    out, data = tmp_path / "out", classification_file(tmp_path)
    arguments = ["train", "--model", tiny_bert, "--task", "classification", "--data", data, "--out", out, "--steps", 4]

    def full(*arguments, **options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", full)
        failed = ptune(*arguments)
    assert failed.exit_code == 2
    assert failed.stderr.endswith("Error: No space left on device\n")
    assert (out / "checkpoints").is_dir()
    succeed(*arguments)


def test_too_long_prompts_take_one_line(tiny_llama, tmp_path):
    out, data = tmp_path / "out", generation_file(tmp_path)
    succeed(
        "train",
        "--model",
        tiny_llama,
        "--task",
        "generation",
        "--data",
        data,
        "--out",
        out,
        "--max-length",
        12,
        "--steps",
        2,
    )
    long = " ".join(["red"] * 20)
    data.write_text(json.dumps({"prompt": long, "completion": "one"}))
    for command in (["predict", out, long], ["eval", out, "--data", data]):
        result = ptune(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: max_length: 12 tokens leave no room after the prompt")


@pytest.mark.parametrize(("kind", "task"), [("t5", "classification"), ("bart", "tagging"), ("led", "generation")])
def test_encoder_decoders_that_cannot_learn_a_task(tmp_path, kind, task):
    AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
    arguments = ["--model", tmp_path / kind, "--task", task, "--data", FILES[task](tmp_path), "--out", tmp_path / "out"]
    result = ptune("train", *arguments)
    assert result.exit_code == 2
    expected = (
        f"({kind}) is an encoder-decoder, which cannot be trained on {task}; expected another base, or generation"
    )
    assert expected in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_encoder_decoders_read_no_whole_texts(tmp_path):
    """Known before the weights, of which there are none here."""
    base, data = tmp_path / "base", tmp_path / "a.csv"
    AutoConfig.for_model("t5").save_pretrained(base)
    data.write_text("text\nonce\n")
    result = ptune("train", "--model", base, "--task", "generation", "--data", data, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{data}: expected prompts and completions, for an encoder-decoder" in " ".join(result.stderr.split())


def test_completions_that_are_cut_are_counted(tiny_t5, tmp_path):
    data = tmp_path / "a.csv"
    data.write_text("prompt,completion\n" + "red,one two\n" * 10 + "red,one two three\n" * 10)
    arguments = ["--model", tiny_t5, "--task", "generation", "--data", data, "--eval-data", data, "--steps", 1]
    result = ptune("train", *arguments, "--max-length", 4, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert "10 of 20 training examples reach 4 tokens and may be cut" in " ".join(result.stderr.split())


def test_encoder_decoders_that_must_be_told_languages(tiny_bart, tmp_path):
    base, arguments = tmp_path / "base", ["--task", "generation", "--data", generation_file(tmp_path), "--steps", 1]
    shutil.copytree(tiny_bart, base, ignore=shutil.ignore_patterns("token*"))
    MBartTokenizer().save_pretrained(base)
    result = ptune("train", "--model", base, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"the tokenizer of {base} must be told languages" in " ".join(result.stderr.split())


def test_generation_needs_prompts(tiny_llama, tmp_path):
    data = generation_file(tmp_path)
    arguments = ["--model", tiny_llama, "--task", "generation", "--data", data, "--out", tmp_path / "out"]
    result = ptune("train", *arguments, "--tuning-mode", "none")
    assert result.exit_code == 2
    assert "generation has no head to train" in result.stderr


def test_convert_there_and_back(tiny_llama, tmp_path):
    """Nothing that is there is written over, unless that is asked for."""
    run, peft, ours = (tmp_path / name for name in ("run", "peft", "ours"))
    data = generation_file(tmp_path)
    arguments = ["--task", "generation", "--data", data, "--tuning-mode", "ptune", "--pre-seq-len", 3, "--steps", 1]
    succeed("train", "--model", tiny_llama, *arguments, "--out", run)
    succeed("convert", "--to-peft", run, peft)
    succeed("convert", peft, ours)
    before, after = (load_file(folder / "model.safetensors") for folder in (run, ours))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    refused = ptune("convert", peft, run)
    assert refused.exit_code == 2
    assert f"out: {run} is not empty" in " ".join(refused.stderr.split())
    succeed("eval", run, "--data", data)
    assert str(ours) in ptune("convert", peft, ours, "--overwrite").stderr.replace("\n", "")


def test_convert_is_told_the_task(tiny_bert, tmp_path):
    """A file of P-tuning v2 does not say what its head is for."""
    config = AutoConfig.from_pretrained(tiny_bert)
    width, source = config.hidden_size, tmp_path / "pytorch_model.bin"
    state = {
        "prefix_encoder.embedding.weight": torch.randn(3, 2 * config.num_hidden_layers * width),
        "qa_outputs.weight": torch.randn(2, width),
        "qa_outputs.bias": torch.randn(2),
    }
    torch.save(state, source)
    command = ["convert", source, tmp_path / "ours", "--base-model", tiny_bert]
    refused = ptune(*command)
    assert refused.exit_code == 2
    assert "head: does not fit BertModel" in refused.stderr
    assert "; task (--task on the command line) says what it is for" in " ".join(refused.stderr.split())
    succeed(*command, "--task", "answering")
    model = AutoPTuneModelForQuestionAnswering.from_pretrained(tmp_path / "ours")
    assert torch.equal(model.qa_outputs.weight, state["qa_outputs.weight"])


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("prompts", "expected a base, got a folder of prompts"),
        ("peft", "got one of PEFT's; see `ptune convert`"),
        ("nowhere", "there is no such folder"),
    ],
)
@pytest.mark.parametrize("command", ["train", "audit"])
def test_what_is_no_base(tmp_path, kind, problem, command):
    folder = tmp_path / kind
    for name in {"prompts": ["ptune_config.json"], "peft": ["adapter_config.json"]}.get(kind, []):
        folder.mkdir()
        (folder / name).touch()
    arguments = ["--model", folder, "--data", classification_file(tmp_path), "--out", tmp_path / "out"]
    result = ptune(command, *arguments, *(["--task", "classification"] if command == "train" else []))
    assert result.exit_code == 2
    assert f"Error: {folder}: expected a" in " ".join(result.stderr.split())
    assert problem in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "given", "name"),
    [
        *(("train", given, given) for given in ("auto", "float32", "float16", "bfloat16")),
        *(("audit", given, given) for given in ("float16", "bfloat16")),
        *((command, *pair) for command in ("train", "audit") for pair in (("fp16", "float16"), ("bf16", "bfloat16"))),
        ("train", "fp32", "float32"),
        ("audit", "fp32", None),
        ("audit", "auto", None),
        ("train", "half", None),
    ],
)
def test_dtypes_go_by_two_names(tmp_path, monkeypatch, command, given, name):
    def stop(dtype):
        raise ValueError(f"in {dtype}")

    monkeypatch.setattr("ptune.runs.prepare", lambda options, say: stop(options.dtype))
    monkeypatch.setattr("ptune.precision.command.audit_files", lambda model, data, out, dtype, *rest: stop(dtype))
    arguments = ["--model", "m", "--data", "d", "--out", tmp_path, *(["--task", "tagging"] * (command == "train"))]
    result = ptune(command, *arguments, "--dtype", given)
    assert result.exit_code == 2
    if name is not None:
        assert result.stderr == f"Error: in {name}\n"
    else:
        expected = "auto, float32, float16, bfloat16" if command == "train" else "float16, bfloat16"
        assert f"expected one of {expected}, got {given!r}" in " ".join(result.stderr.replace("│", "").split())


def test_several_processes_are_refused(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["--model", tiny_bert, "--task", "classification", "--data", classification_file(tmp_path)]
    refused = ptune("train", *arguments, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "WORLD_SIZE: expected one process, got 2" in refused.stderr


def test_version():
    assert succeed("--version") == f"ptune-kernels {package.__version__}\n"


def test_help_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "-m", "ptune", "train", "--help"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr.split()
    assert "ptune.cli" in imported
    assert not {"torch", "transformers"} & set(imported)
    assert set(package.__all__) < set(dir(package))
