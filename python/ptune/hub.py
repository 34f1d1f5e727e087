"""Prompts on the Hugging Face hub: the card of a folder, its upload, and repositories of prompts as local folders.

A repository holds what a folder does, ``ptune_config.json`` and ``model.safetensors``, with a card, and never the base.
"""

import os
import reprlib
import shutil
import tempfile
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from . import checkpoint
from .kinds import KINDS, kind_of

CARD_NAME = "README.md"
# of `download`; those of the prompts are of their repository, and not of the one of their base
OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
OF_THE_PROMPTS = ("revision", "subfolder")

_WHAT = {
    None: "A task head",
    "ptune": "A soft prompt",
    "deep_ptune": "Soft prompts for every block",
}


def is_repo_id(path: Any) -> bool:
    """Whether ``path`` may be the name of a repository: a folder of that name goes first."""
    return isinstance(path, str) and not os.path.isdir(path) and _is_valid(path)


def download(repo_id: Any, **options: Any) -> Path | None:
    """A local folder with the prompts of a repository; ``None`` where there are none, or it cannot be reached.

    ``options``: those of `OPTIONS` that are given, as transformers takes them. Raises `FileNotFoundError` for a
    repository without weights.
    """
    if not is_repo_id(repo_id) or _is_known_base(repo_id, options):
        return None
    if (config := cached(repo_id, checkpoint.CONFIG_NAME, options)) is None:
        return None
    # of the same commit, whatever is pushed meanwhile
    options["revision"] = extract_commit_hash(config, None) or options.get("revision")
    if (weights := cached(repo_id, checkpoint.WEIGHTS_NAME, options)) is None:
        raise FileNotFoundError(f"{repo_id}: expected {checkpoint.WEIGHTS_NAME} beside {checkpoint.CONFIG_NAME}")
    return Path(weights).parent


def _is_known_base(repo_id: str, options: dict[str, Any]) -> bool:
    """Whether the cache holds it as a base, whose ``config.json`` prompts never have: that saves a request."""
    name = os.path.join(options.get("subfolder") or "", "config.json")
    found = try_to_load_from_cache(repo_id, name, options.get("cache_dir"), options.get("revision"))
    return isinstance(found, str)


def cached(repo_id: str, name: str, options: dict[str, Any]) -> str | None:
    """A file of a repository, or of a folder; ``None`` where there is none, or it cannot be reached."""
    try:
        return cached_file(repo_id, name, **options)
    except OSError:
        return None


def folder_of(path: str | os.PathLike[str], **options: Any) -> str | os.PathLike[str]:
    """``path``, where it is a folder, else what `download` makes of it.

    Raises `FileNotFoundError` where that is nothing, and `TypeError` for what is no path and for unknown ``options``.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"folder: expected a path, or the name of a repository, got {reprlib.repr(path)}")
    if unknown := options.keys() - set(OPTIONS):
        raise TypeError(f"expected keywords among {', '.join(OPTIONS)}, got {', '.join(sorted(unknown))}")
    if not is_repo_id(path):
        return path
    if (folder := download(path, **options)) is None:
        raise FileNotFoundError(
            f"{path}: expected a folder of prompts, or a repository on the hub with {checkpoint.CONFIG_NAME}; found "
            "neither, nor a copy of such a repository in the cache"
        )
    return folder


def upload(
    folder: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload prompts",
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload the files of prompts in ``folder``, and nothing else, to a repository, which is made if there is none.

    By default it has the folder's name. A card that the repository has is kept. Of a base that is a local folder the
    name alone is uploaded, and not where it lies. The keywords are those of `HfApi`. Raises `FileNotFoundError` or
    `ValueError` for a folder that holds no prompts, or damaged ones, and makes no repository then.
    """
    config, tensors = checkpoint.read_config(folder), checkpoint.read_tensors(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id or Path(folder).absolute().name, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    base = config["base"]
    if (name := _folder_name(base["name"])) is not None:
        base["name"] = f"./{name}"  # which no repository can be called
    with tempfile.TemporaryDirectory() as shared:
        checkpoint.write(shared, config, tensors)
        if Path(folder, CARD_NAME).exists() and not api.file_exists(repo_id, CARD_NAME, revision=revision):
            shutil.copy(Path(folder, CARD_NAME), shared)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=shared,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )


def write(folder: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """`checkpoint.write`, with a model card; one that was edited is left as it is."""
    path = Path(folder, CARD_NAME)
    keep = path.exists() and not _is_unedited(path)
    checkpoint.write(folder, config, tensors)
    if not keep:
        text = card(config)
        checkpoint.replace_file(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def card(config: dict[str, Any]) -> str:
    """The model card of a folder with this ``ptune_config.json``."""
    base, name = config["base"]["name"], config["model_class"]
    kind = kind_of(name) or KINDS[-1]
    folder = _folder_name(base)
    on_hub = folder is None and _is_valid(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="ptune-kernels",
        pipeline_tag=kind.tag,
        tags=["prompt-tuning", "ptune-kernels"],
    )
    elsewhere = "" if on_hub else ", base_model=…"
    local = f" The base was a local folder, `{folder}`: `base_model` is where a copy lies." if folder else ""
    return f"""---
{data.to_yaml()}
---

# {_WHAT[config["tuning_mode"]]} on {f"[{base}](https://huggingface.co/{base})" if on_hub else "a frozen model"}

Trained with ptune-kernels on a frozen `{name}`, whose own weights are not in here.{local}

| setting | |
|---|---|
| `tuning_mode` | `{config["tuning_mode"]}` |
| `pre_seq_len` | {config["pre_seq_len"]} |
| `deep_prompt_mode` | `{config["deep_prompt_mode"]}` |

```python
from ptune import AutoPTuneModel{kind.loader}

model = AutoPTuneModel{kind.loader}.from_pretrained("…"{elsewhere})  # this repository, or a folder
```
"""


def _folder_name(base: str) -> str | None:
    """The last part of the path to a base, which tells those who have a copy, and nothing of the machine.

    ``None`` where ``base`` is no path: the name of a repository, or nothing.
    """
    # a path of Windows may have the separators of any system
    return None if _is_valid(base) and base != checkpoint.BASE_FOLDER else PureWindowsPath(base).name or None


def _is_valid(repo_id: str) -> bool:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    return True


def _is_unedited(path: Path) -> bool:
    """Whether a folder's card is what `card` made of its config."""
    try:
        return path.read_text(encoding="utf-8") == card(checkpoint.read_config(path.parent))
    except (OSError, ValueError):
        return False
