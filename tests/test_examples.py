"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path


def test_own_model_learns():
    path = Path(__file__).parents[1] / "examples" / "own_model.py"
    spec = importlib.util.spec_from_file_location("own_model", path)
    own_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own_model)
    before, after = own_model.main(pretrain_steps=100, tune_steps=50)
    assert after < before - 0.1
