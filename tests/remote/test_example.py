"""The example trains to the local accuracy, though a server is killed."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed")


def test_accuracy_is_the_local_one(cluster, minilm, data_folder):
    path = Path(__file__).parents[2] / "examples" / "remote_classification.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    far, here = example.main(str(minilm), str(data_folder / "sms_spam" / "sms_spam.tsv"), steps=16, held_out=150)
    assert far == pytest.approx(here, abs=0.03)
    assert far > 0.9
