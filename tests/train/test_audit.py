"""`ptune audit` on tiny random models."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ptune.precision.command import pooling_of

from .commands import generation_file, ptune, sentences, succeed


def lines_file(folder: Path, count: int = 11) -> Path:
    path = folder / "lines.txt"
    path.write_text("\n\n".join(" ".join(words) for words in sentences(count, seed=3)) + "\n")
    return path


def test_audit_of_an_embedding_model(tiny_bert, tmp_path):
    out = tmp_path / "deep" / "out"
    shown = succeed("audit", "--model", tiny_bert, "--data", lines_file(tmp_path), "--out", out, "--batch-size", 4)
    record = json.loads((out / "report.json").read_text())
    assert (record["dtype"], record["compares"], record["rows"]) == ("fp16", "embeddings", 8)
    assert record["whole"].keys() == {"fp16", "bf16", "hybrid-fp16", "hybrid-bf16"}
    assert record["verdict"] in shown
    assert "cosines of 0.999 at least" in shown
    assert "hybrid-bf16" in shown
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_audit_of_a_generative_model(tiny_llama, tmp_path):
    """Its architecture has a head; prompts and completions are one text."""
    data, out = generation_file(tmp_path, count=3), tmp_path / "out"
    succeed("audit", "--model", tiny_llama, "--data", data, "--out", out, "--dtype", "bf16", "--batches", 5)
    record = json.loads((out / "report.json").read_text())
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    # [CLS] before each, and a token for each word
    tokens = sum(1 + len(f"{row['prompt']} {row['completion']}".split()) for row in rows)
    assert (record["dtype"], record["compares"], record["rows"]) == ("bf16", "logits", tokens)
    assert any(site["kind"] == "head" for site in record["sites"])


def with_pooling(base, folder, config):
    """A copy of ``base`` as sentence-transformers saves a model that pools by ``config``."""
    shutil.copytree(base, folder)
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda row: row[0]),
        ({"pooling_mode_lasttoken": True}, lambda row: row[-1]),
        ({"pooling_mode": "mean", "include_prompt": True}, lambda row: row.mean(0)),
        ({"pooling_mode": ["max", "cls"]}, lambda row: torch.cat([row.amax(0), row[0]])),
    ],
)
def test_an_audit_pools_as_sentence_transformers_would(tiny_llama, tmp_path, config, expected):
    folder = with_pooling(tiny_llama, tmp_path / "model", config)
    states, mask = torch.randn(4, 7, 5), torch.ones(4, 7, dtype=torch.long)
    mask[0, :3] = mask[1, 4:] = mask[2, 1:] = 0
    rows = torch.stack([expected(row[real.bool()]) for row, real in zip(states, mask, strict=True)])
    torch.testing.assert_close(pooling_of(str(folder))(states, mask), rows)
    out = tmp_path / "out"
    succeed("audit", "--model", folder, "--data", lines_file(tmp_path), "--out", out, "--batches", 1)
    record = json.loads((out / "report.json").read_text())
    assert (record["compares"], record["rows"]) == ("embeddings", 8)


@pytest.mark.parametrize("config", [{"pooling_mode_weightedmean_tokens": True}, {"pooling_mode": "attention"}, {}])
def test_an_audit_refuses_other_poolings(tiny_bert, tmp_path, config):
    folder = with_pooling(tiny_bert, tmp_path / "model", config)
    result = ptune("audit", "--model", folder, "--data", lines_file(tmp_path), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "expected a pooling of cls, lasttoken, max, mean, got" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [("[{", "modules.json: not JSON"), ('{"a": 3}', "expected a Pooling among"), ("[3]", "expected a Pooling among")],
)
def test_an_audit_refuses_damaged_modules(tiny_bert, tmp_path, content, problem):
    folder = with_pooling(tiny_bert, tmp_path / "model", {"pooling_mode": "mean"})
    (folder / "modules.json").write_text(content)
    result = ptune("audit", "--model", folder, "--data", lines_file(tmp_path), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"--data": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"--data": "lines.md"}, "lines.md: expected a .csv, .tsv, .jsonl file"),
        ({"--text-column": "text"}, "lines.txt: a .txt file has no columns"),
        ({"--out": "lines.txt"}, "--out: lines.txt is a file"),
        ({"--model": "./nowhere"}, "./nowhere"),
    ],
)
def test_what_is_wrong_with_an_audit(tiny_bert, tmp_path, monkeypatch, changes, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines_file(tmp_path)
    Path("lines.md").write_text("text")
    options = {"--model": tiny_bert, "--data": "lines.txt", "--out": "out"} | changes
    result = ptune("audit", *(part for option in options.items() for part in option))
    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.split())
    assert result.stderr.startswith("Error: ")
    assert not Path("out").exists()
