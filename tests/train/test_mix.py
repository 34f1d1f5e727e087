"""`ptune train --task-mix` on tiny random models: several tasks trained together."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from .commands import classification_file, generation_file, interrupt, metrics_of, ptune, succeed, tagging_file


def mix_of(folder: Path, **files: str) -> str:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return ",".join(str(folder / f"{name}.yaml") for name in files)


def test_tasks_trained_together(tiny_bert, tmp_path):
    mood, names = classification_file(tmp_path), tagging_file(tmp_path)
    mix = mix_of(
        tmp_path,
        mood=f"task: classification\ndata: {mood.name}\neval_data: {mood.name}\nbatch_size: 32\nlearning_rate: 1e-2\n",
        people=f"name: names\ntask: tagging\ndata: {names.name}\nbatch_size: 32\npre_seq_len: 5\n",
    )
    out = tmp_path / "out"
    shown = succeed("train", "--task-mix", mix, "--model", tiny_bert, "--out", out, "--steps", 120)
    assert "macro f1" in shown
    assert "entity f1" in shown
    assert sorted(path.name for path in out.iterdir()) == ["mood", "names"]
    assert metrics_of(out / "mood")["accuracy"] > 0.9
    assert metrics_of(out / "names")["entity_f1"] > 0.9
    loss = float(re.search(r"loss\W+([\d.]+)", succeed("eval", out / "mood", "--data", mood))[1])
    assert metrics_of(out / "mood")["loss"] == pytest.approx(loss, abs=1e-4)  # the heads' dropout was off
    assert json.loads(succeed("predict", out / "mood", "good red"))["label"] == "yes"
    assert json.loads(succeed("predict", out / "names", "Ann is in Rome"))["tags"][0] == "B-person"
    shown = " ".join(succeed("info", out).replace("│", "").split())
    for name, task in (("mood", "classification"), ("names", "tagging")):
        figures = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in metrics_of(out / name).items())
        assert f"{name} {task}: {figures}" in shown


def test_generation_trained_beside_classification(tiny_llama, tmp_path):
    mix = mix_of(
        tmp_path,
        tale=f"task: generation\ndata: {generation_file(tmp_path).name}\ndeep_prompt_mode: add\nbatch_size: 32\n",
        mood=f"task: classification\ndata: {classification_file(tmp_path).name}\ntuning_mode: none\n",
    )
    alone, out = tmp_path / "alone", tmp_path / "out"
    arguments = ["--model", tiny_llama, "--steps", 60]
    succeed("train", "--task-mix", mix, "--out", out, *arguments)
    data = tmp_path / "stories0.jsonl"
    succeed("train", "--task", "generation", "--data", data, "--deep-prompt-mode", "add", "--out", alone, *arguments)
    assert metrics_of(out / "tale")["perplexity"] < 1.1 * metrics_of(alone)["perplexity"]
    assert "(add)" in succeed("info", out / "tale")


def test_a_prompt_that_is_too_long_is_found_before_training(tiny_llama, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "red " * 20, "completion": "one"}))
    task = f"task: generation\ndata: {generation_file(tmp_path).name}\nmax_length: 20\n"
    mix = mix_of(tmp_path, one=task, other=task + "eval_data: long.jsonl\n")
    refused = ptune("train", "--task-mix", mix + ",", "--model", tiny_llama, "--steps", 2, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert f"Error: other: {tmp_path}/long.jsonl: max_length: 20 tokens leave no room" in refused.stderr
    assert not (tmp_path / "out").exists()


def evaluations_of(folder: Path) -> list[dict[str, float]]:
    return [entry for entry in json.loads((folder / "train.json").read_text())["log"] if "eval_loss" in entry]


def test_a_mix_keeps_what_did_best_of_each_task(tiny_llama, tmp_path):
    """The more the tale is trained, the worse it fits its evaluation data, which wants the opposite."""
    data, other = generation_file(tmp_path), generation_file(tmp_path, 20, seed=1)
    other.write_text(other.read_text().replace("one two three", "three two one"))
    tale = f"task: generation\ndata: {data.name}\neval_data: {other.name}\nbatch_size: 32\nlearning_rate: 1e-1\n"
    mood = f"task: classification\ndata: {classification_file(tmp_path).name}\nbatch_size: 16\n"
    out, arguments = tmp_path / "out", ["--model", tiny_llama, "--steps", 60]
    succeed("train", "--task-mix", mix_of(tmp_path, tale=tale, mood=mood), "--out", out, *arguments)
    evaluations = evaluations_of(out / "tale")
    assert [entry["step"] for entry in evaluations] == [12, 24, 36, 48, 60]
    best = min(evaluations, key=lambda entry: entry["eval_perplexity"])
    assert best["step"] < 60
    assert metrics_of(out / "tale") == {"loss": best["eval_loss"], "perplexity": best["eval_perplexity"]}
    assert f"{best['eval_loss']:.4f}" in succeed("eval", out / "tale", "--data", other)


def test_tasks_of_a_mix_do_not_slow_each_other_down(tiny_llama, tmp_path):
    """One task's gradients are long, and would shorten the other's if they were clipped together."""
    tale = f"task: generation\ndata: {generation_file(tmp_path).name}\nbatch_size: 32\n"
    mood = f"task: classification\ndata: {classification_file(tmp_path).name}\nbatch_size: 16\n"
    for out, mix in (("alone", mix_of(tmp_path, mood=mood)), ("mixed", mix_of(tmp_path, tale=tale, mood=mood))):
        succeed("train", "--task-mix", mix, "--out", tmp_path / out, "--model", tiny_llama, "--steps", 15)
    alone, mixed = (evaluations_of(tmp_path / out / "mood") for out in ("alone", "mixed"))
    assert [entry["eval_loss"] for entry in mixed] == pytest.approx([entry["eval_loss"] for entry in alone], rel=1e-3)


def test_an_interrupted_mix_resumes_to_the_same_bits(tiny_bert, tmp_path, monkeypatch):
    """What did best of the mood, which hardly learns, is of before the interruption."""
    mood, names = classification_file(tmp_path), tagging_file(tmp_path)
    tasks = {
        "mood": f"task: classification\ndata: {mood.name}\nlearning_rate: 1e-6\nhead_learning_rate: 1e-6\n",
        "names": f"task: tagging\ndata: {names.name}\nlearning_rate: 1e-2\n",
    }
    out, whole, mix = tmp_path / "out", tmp_path / "whole", mix_of(tmp_path, **tasks)
    arguments = ["--task-mix", mix, "--model", tiny_bert, "--steps", 20]
    succeed("train", *arguments, "--out", whole)
    interrupt(monkeypatch, *arguments, "--out", out, step=18)
    (newest,) = (out / "checkpoints").iterdir()
    assert newest.name == "checkpoint-16"
    assert {path.suffix for path in newest.rglob("*") if path.is_file()} == {".safetensors", ".json"}

    refused = ptune("train", *arguments, "--out", out)
    assert refused.exit_code == 2
    assert "holds an unfinished run" in refused.stderr
    turned = ",".join(reversed(mix.split(",")))
    refused = ptune("train", *arguments, "--out", out, "--resume", "--task-mix", turned)
    assert "task_mix: the run to resume has mood, names, got names, mood" in refused.stderr
    refused = ptune("train", "--task", "tagging", "--data", names, "--model", tiny_bert, "--out", out, "--resume")
    assert "is of several tasks (--task-mix)" in refused.stderr
    mix_of(tmp_path, mood=tasks["mood"] + "pre_seq_len: 5\n")
    refused = ptune("train", *arguments, "--out", out, "--resume")
    assert "pre_seq_len: the run to resume has 16, got 5" in refused.stderr
    mix_of(tmp_path, mood=tasks["mood"] + "hold_out: 0.2\n")
    refused = ptune("train", *arguments, "--out", out, "--resume")
    assert "mood: training examples: the run to resume has 81 (" in refused.stderr
    mix_of(tmp_path, **tasks)

    succeed("train", *arguments, "--out", out, "--resume")
    assert sorted(path.name for path in out.iterdir()) == ["mood", "names"]
    for name in tasks:
        resumed, finished = (load_file(folder / name / "model.safetensors") for folder in (out, whole))
        assert resumed.keys() == finished.keys()
        for key, tensor in finished.items():
            assert torch.equal(resumed[key], tensor), (name, key)
        assert evaluations_of(out / name) == evaluations_of(whole / name)
    first, *others = evaluations_of(out / "mood")
    assert all(entry["eval_macro_f1"] == first["eval_macro_f1"] for entry in others)
    again = ptune("train", *arguments, "--out", out, "--resume")
    assert again.exit_code == 2
    assert f"the run in {out} has finished" in again.stderr
    (out / "train.json").touch()  # as of one task
    refused = ptune("train", *arguments, "--out", out, "--overwrite")
    assert f"{out} holds a finished run of one task" in refused.stderr


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("task: tagging\ndata: a\nname: checkpoints", "name: 'checkpoints' is the folder of the checkpoints"),
        ("task: [", "a.yaml: not YAML"),
        ("task: tagging", "a.yaml: expected task and data at least, got task"),
        ("task: tagging\ndata: a\nmodel: b", "head_learning_rate, got model"),
        ("task: tagging\ndata: nowhere.conll", "nowhere.conll"),
        ("task: chess\ndata: a", "task: expected one of"),
        ("task: [tagging]\ndata: a", "a.yaml: task: expected a string, got ['tagging']"),
        ("task: tagging\ndata: 3", "a.yaml: data: expected a string, got 3"),
        ("task: tagging\ndata: a\nlabel_column: no", "a.yaml: label_column: expected a string, got False"),
        ("task: tagging\ndata: a\nbatch_size: 0", "a.yaml: batch_size: expected an integer of at least 1, got 0"),
        ("task: tagging\ndata: a\nbatch_size: true", "a.yaml: batch_size: expected an integer of at least 1, got True"),
        ("task: tagging\ndata: a\npre_seq_len: 2.5", "a.yaml: pre_seq_len: expected an integer of at least 1, got 2.5"),
        ("task: tagging\ndata: a\nlearning_rate: fast", "a.yaml: learning_rate: expected a number, got 'fast'"),
        ("task: tagging\ndata: a\nhold_out: null", "a.yaml: hold_out: expected a number, got None"),
    ],
)
def test_what_is_wrong_with_a_mix(tiny_llama, tmp_path, text, problem):
    (tmp_path / "a.yaml").write_text(text)
    result = ptune("train", "--task-mix", tmp_path / "a.yaml", "--model", tiny_llama, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../outside", "{tmp}/outside", "two words", "''"])
def test_names_that_are_no_folders(tiny_bert, tmp_path, name):
    """Before anything is written, wherever the name leads."""
    classification_file(tmp_path)
    mix = mix_of(tmp_path, a=f"task: classification\ndata: sentiment0.tsv\nname: {name.format(tmp=tmp_path)}\n")
    result = ptune("train", "--task-mix", mix, "--model", tiny_bert, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "a.yaml: name: expected up to 100 letters" in " ".join(result.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "sentiment0.tsv"]


@pytest.mark.parametrize("option", [["--task", "tagging"], ["--pre-seq-len", 3], ["--learning-rate", 1]])
def test_options_that_the_files_of_a_mix_say(tiny_llama, tmp_path, option):
    mix = mix_of(tmp_path, a="task: tagging\ndata: names.conll\n")
    result = ptune("train", "--task-mix", mix, "--model", tiny_llama, "--out", tmp_path / "out", *option)
    assert result.exit_code == 2
    assert f"{option[0]}: not with --task-mix" in " ".join(result.stderr.split())


def test_encoder_decoders_are_trained_one_by_one(tmp_path):
    base = tmp_path / "base"
    AutoConfig.for_model("t5").save_pretrained(base)
    mix = mix_of(tmp_path, tale=f"task: generation\ndata: {generation_file(tmp_path).name}\n")
    result = ptune("train", "--task-mix", mix, "--model", base, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"model: {base} is an encoder-decoder, and tasks are trained together" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
