"""``ptune serve-blocks`` and ``ptune remote-status``."""

import time

import pytest
import torch
from model.common import close
from typer.testing import CliRunner

pytest.importorskip("ray", reason="ray is not installed")

from ptune import cli, remote
from ptune.remote.serve import ServeConfig


def test_serve_and_status(cluster, folder_of, tmp_path, monkeypatch):
    shown = []

    class UntilLookedAt:
        def wait(self):
            blocks = remote.RemoteSequential(remote.connect("from a file"))
            close(blocks(torch.zeros(1, 2, 24)), blocks(torch.zeros(1, 2, 24)))
            shown.append(CliRunner().invoke(cli.app, ["remote-status", "from a file"]).stdout)
            monkeypatch.undo()  # loading a model waits for events of its own
            model = remote.AutoDistributedModelForCausalLM.from_pretrained(
                folder_of("llama"), servers="from a file", tuning_mode="ptune", pre_seq_len=4
            )
            assert model.blocks_dtype == torch.bfloat16
            assert model.prefix_plan.path == "prefix"  # what bfloat16 rounds away says nothing against it
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.threading, "Event", UntilLookedAt)
    file = tmp_path / "servers.yaml"
    file.write_text("name: from a file\ncpus: 0\nreplicas: 2\ndtype: bfloat16\nlimits: {max_tokens: 99}\n")
    result = CliRunner().invoke(
        cli.app, ["serve-blocks", "--config", str(file), "--model", str(folder_of("llama")), "--replicas", "1"]
    )
    assert result.exit_code == 0, result.stderr
    for output, requests in ((result.stdout, "0"), (shown[0], "2")):
        row = next(line for line in output.splitlines() if "from a file" in line)
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[:2] == ["from a file", "0-3"]
        assert cells[3:5] == ["ready", requests]
        assert cells[5].endswith("MiB")
    for _ in range(100):
        if not remote.status("from a file"):
            break
        time.sleep(0.1)
    with pytest.raises(remote.RemoteError, match="no servers are named 'from a file'"):
        remote.connect("from a file")
    result = CliRunner().invoke(cli.app, ["remote-status", "from a file"])
    assert result.exit_code == 2
    assert "no servers that are named 'from a file'" in " ".join(result.stderr.split())


def test_status_of_a_folder(tmp_path, monkeypatch):
    """Its servers are named by the whole path, however it was given."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote.serve, "join", lambda address: None)
    monkeypatch.setattr(remote.serve, "_running", lambda: {str(tmp_path / "model"): {(0, 2): ["one"]}, "b": {}})
    monkeypatch.setattr(remote.serve, "_answer", lambda actor, timeout: {"state": "ready"})
    for name in ("model", "./model", str(tmp_path / "model"), None):
        assert [row["actor"] for row in remote.status(name)] == ["one"]
    assert remote.status("other") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "expected names and values, got list"),
        ("models: x", "expected some of cpus"),
        ("limits: {bytes: 3}", "limits: expected some of idle_seconds"),
        ("limits: {max_tokens: 100.0}", "max_tokens: expected a whole number of at least 1, got 100.0"),
        ("spans: [[0, 2], [3, 4]]", "spans: expected blocks 0 to 4 without a gap"),
        ("servers: 5", "servers: expected at most 4"),
        ("replicas: 0", "replicas: expected at least 1, got 0"),
    ],
)
def test_what_is_wrong_takes_one_line(text, problem, cluster, folder_of, tmp_path):
    file = tmp_path / "servers.yaml"
    file.write_text(text)
    result = CliRunner().invoke(cli.app, ["serve-blocks", "--config", str(file), "--model", str(folder_of("llama"))])
    assert result.exit_code == 2
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1


def test_dtypes_go_by_two_names():
    given = ("auto", "bf16", "fp16", "fp32", "float16")
    expected = ["auto", "bfloat16", "float16", "float32", "float16"]
    assert [ServeConfig(model="m", dtype=name).dtype for name in given] == expected


def test_blocks_are_spread_evenly():
    config = ServeConfig(model="m", servers=3)
    assert config.spans_of(8) == [(0, 3), (3, 5), (5, 8)]
    assert ServeConfig(model="m", spans=[[0, 1], [1, 8]]).spans_of(8) == [(0, 1), (1, 8)]
