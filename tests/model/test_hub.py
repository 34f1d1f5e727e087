"""Prompts in repositories of the hub, which is a cache of its files on this machine, as huggingface_hub lays it out."""

import secrets
import shutil
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard

import ptune
from ptune.checkpoint import CONFIG_NAME, WEIGHTS_NAME, MisfitError

from .common import COUNT, set_prompts, settings_for

CLASSIFIER = ptune.AutoPTuneModelForSequenceClassification


class Hub:
    """Repositories, in a folder like huggingface_hub's cache: what is uploaded is what has been downloaded."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.calls: list[tuple[str, dict]] = []
        # for what loads from it
        self.options = {"cache_dir": folder, "local_files_only": True}

    def load(self, repo_id: str, **rest):
        """Prompts on the base, of which a repository does not say where it lies."""
        return CLASSIFIER.from_pretrained(repo_id, base_model=self.base, **self.options | rest)

    def repository(self, repo_id: str) -> Path:
        return self.folder / f"models--{repo_id.replace('/', '--')}"

    def snapshot(self, repo_id: str, revision: str = "main") -> Path | None:
        ref = self.repository(repo_id) / "refs" / revision
        return ref.parents[1] / "snapshots" / ref.read_text() if ref.exists() else None

    def commit(self, repo_id: str, files: dict[str, Path], revision: str = "main") -> str:
        """A new snapshot: the files of the last, and these."""
        before, sha = self.snapshot(repo_id, revision), secrets.token_hex(20)
        snapshot = self.repository(repo_id) / "snapshots" / sha
        snapshot.mkdir(parents=True)
        if before is not None:
            shutil.copytree(before, snapshot, dirs_exist_ok=True)
        for name, path in files.items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, snapshot / name)
        ref = self.repository(repo_id) / "refs" / revision
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(sha)
        return sha

    # what is put in place of HfApi's

    def create_repo(self, api, repo_id, *, private=None, exist_ok=False):
        self.calls.append(("create_repo", {"private": private, "exist_ok": exist_ok, "token": api.token}))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, api, repo_id, *, branch, exist_ok=False):
        self.calls.append(("create_branch", {"branch": branch, "exist_ok": exist_ok}))

    def file_exists(self, api, repo_id, filename, *, revision=None):
        snapshot = self.snapshot(repo_id, revision or "main")
        return snapshot is not None and (snapshot / filename).exists()

    def upload_folder(self, api, *, repo_id, folder_path, revision, **rest):
        self.calls.append(("upload_folder", rest))
        files = {str(path.relative_to(folder_path)): path for path in Path(folder_path).rglob("*") if path.is_file()}
        return SimpleNamespace(oid=self.commit(repo_id, files, revision or "main"))


def _call(api, method, *args, **kwargs):
    return method(api, *args, **kwargs)


@pytest.fixture
def hub(tmp_path, monkeypatch, base_of):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # local_files_only leaves some requests
    hub = Hub(tmp_path / "hub", base_of("llama").folder)
    for name in ("create_repo", "create_branch", "file_exists", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, partialmethod(_call, getattr(hub, name)))
    return hub


@pytest.fixture
def model(base_of):
    model = base_of("llama").tuned(CLASSIFIER, num_labels=3, **settings_for("overwrite"))
    set_prompts(model, "overwrite")
    return model.eval()


def same(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("how", ["push_to_hub", "save_prompts", "save_pretrained"])
def test_what_is_pushed_is_loaded(model, hub, tmp_path, base_of, how):
    if how == "push_to_hub":
        commit = model.push_to_hub("user/spam", private=True, token="hf_x", commit_message="First")
        assert commit.oid == hub.snapshot("user/spam").name
    else:
        # of a folder that holds more, and a base, the prompts alone are uploaded
        model.save_pretrained(tmp_path / "folder", save_base=True)
        (tmp_path / "folder" / "optimizer.pt").write_bytes(b"x")
        options = {"repo_id": "user/spam", "private": True, "token": "hf_x", "commit_message": "First"}
        getattr(model, how)(tmp_path / "folder", push_to_hub=True, **options)
    assert names(hub.snapshot("user/spam")) == {CONFIG_NAME, WEIGHTS_NAME, "README.md"}
    (made, of_repo), (uploaded, of_commit) = hub.calls
    assert (made, of_repo) == ("create_repo", {"private": True, "exist_ok": True, "token": "hf_x"})
    assert (uploaded, of_commit["commit_message"]) == ("upload_folder", "First")
    assert same(hub.load("user/spam"), model)
    other = base_of("llama").tuned(CLASSIFIER, num_labels=3, **settings_for("shallow")).eval()
    other.load_prompts("user/spam", **hub.options)
    assert same(other, model)
    bank = ptune.PromptBank(base_of("llama").stock(transformers.AutoModelForCausalLM))
    bank.add("spam", "user/spam", **hub.options)
    ids = torch.randint(3, 61, (1, 5))
    torch.testing.assert_close(bank(ids, prompt_names=["spam"]).logits[0], model(ids).logits[0].detach())


@pytest.mark.parametrize("how", ["push_to_hub", "save_prompts", "save_pretrained"])
def test_where_a_local_base_lies_is_told_to_nobody(model, hub, tmp_path, monkeypatch, how):
    if how == "push_to_hub":
        model.push_to_hub("user/spam")
    else:
        getattr(model, how)(tmp_path / "folder", push_to_hub=True, repo_id="user/spam")
        assert same(CLASSIFIER.from_pretrained(tmp_path / "folder"), model)
    for path in hub.snapshot("user/spam").iterdir():
        content = path.read_bytes()
        assert str(hub.base.parent).encode() not in content, path
        assert path.name == WEIGHTS_NAME or hub.base.name.encode() in content
    with pytest.raises(
        OSError, match=rf"its base, '\./{hub.base.name}', cannot be loaded; base_model .* says where it is"
    ):
        CLASSIFIER.from_pretrained("user/spam", **hub.options)
    assert same(hub.load("user/spam"), model)
    monkeypatch.chdir(hub.base.parent)
    assert same(CLASSIFIER.from_pretrained("user/spam", **hub.options), model)


def test_a_base_inside_stays_where_it_is(model, hub, tmp_path, base_of):
    """What is uploaded names no repository that happens to be called "base", and what a bank saves finds it."""
    model.save_pretrained(tmp_path / "whole", save_base=True)
    ptune.hub.upload(tmp_path / "whole", "user/spam")
    assert same(hub.load("user/spam"), model)
    with pytest.raises(OSError, match=r"its base, '\./base', cannot be loaded; base_model .* says where it is"):
        CLASSIFIER.from_pretrained("user/spam", **hub.options)
    bank = ptune.PromptBank(base_of("llama").stock(transformers.AutoModelForCausalLM))
    bank.add("spam", tmp_path / "whole")
    bank.save("spam", tmp_path / "elsewhere")
    assert same(CLASSIFIER.from_pretrained(tmp_path / "elsewhere"), model)


def test_the_folders_name_is_the_default(model, hub, tmp_path):
    model.save_prompts(tmp_path / "spam-prompts", push_to_hub=True)
    assert same(hub.load("me/spam-prompts"), model)


def test_revisions(model, hub, base_of):
    first = model.push_to_hub("user/spam").oid
    again = base_of("llama").tuned(CLASSIFIER, num_labels=3, **settings_for("shallow"))
    again.push_to_hub("user/spam", revision="v2")
    assert ("create_branch", {"branch": "v2", "exist_ok": True}) in hub.calls
    set_prompts(again, "add")
    last = again.push_to_hub("user/spam").oid
    for revision, mode in (
        ("main", "add"),
        (None, "add"),
        (last, "add"),
        (first, "overwrite"),
    ):
        loaded = hub.load("user/spam", revision=revision)
        assert loaded.ptune_config.deep_prompt_mode == mode
    assert hub.load("user/spam", revision="v2").ptune_config.tuning_mode == "ptune"
    with pytest.raises(FileNotFoundError, match="user/spam: expected a folder of prompts, or a repository"):
        again.load_prompts("user/spam", revision="v3", **hub.options)


def test_a_repository_of_several(model, hub, tmp_path, base_of):
    model.save_prompts(tmp_path / "saved")
    files = {f"spam/{path.name}": path for path in (tmp_path / "saved").iterdir()}
    hub.commit("user/all", files)
    loaded = hub.load("user/all", subfolder="spam")
    assert same(loaded, model)
    bank = ptune.PromptBank(base_of("llama").stock(transformers.AutoModelForCausalLM))
    bank.add("spam", "user/all", subfolder="spam", **hub.options)
    with pytest.raises(FileNotFoundError, match="user/all"):
        bank.add("ham", "user/all", subfolder="ham", **hub.options)
    assert bank.names == ["spam"]


def test_a_base_in_the_cache(hub, base_of, monkeypatch):
    """A name without prompts is a base, and prompts on it name it."""
    base = base_of("llama")
    hub.commit("meta/llama", {path.name: path for path in base.folder.iterdir()})
    options = settings_for("shallow", num_labels=3)
    with monkeypatch.context() as patch:
        patch.setattr(ptune.hub, "cached_file", None)  # nobody is asked
        model = CLASSIFIER.from_pretrained("meta/llama", **options, **hub.options)
    stock = base.stock().state_dict()
    assert all(torch.equal(stock[name.removeprefix("model.")], t) for name, t in model.state_dict().items() if
               name.startswith("model."))  # fmt: skip
    assert model.origin.name == "meta/llama"
    model.push_to_hub("user/spam")
    assert same(CLASSIFIER.from_pretrained("user/spam", **hub.options), model)
    # a revision is the prompts', which the base does not have
    sha = hub.snapshot("user/spam").name
    assert same(CLASSIFIER.from_pretrained("user/spam", revision=sha, **hub.options), model)
    card = ModelCard.load(hub.snapshot("user/spam") / "README.md")
    assert card.data.base_model == "meta/llama"
    assert "base_model=" not in card.text
    assert "a local folder" not in card.text
    with pytest.raises(FileNotFoundError, match="meta/llama: expected a folder of prompts, or a repository"):
        model.load_prompts("meta/llama", **hub.options)


def test_offline(model, hub, monkeypatch):
    """From the cache that the environment names, without options."""
    model.push_to_hub("user/spam")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.folder))
    assert same(CLASSIFIER.from_pretrained("user/spam", base_model=hub.base), model)


def test_a_folder_of_that_name_goes_first(model, hub, tmp_path, monkeypatch, base_of):
    model.push_to_hub("user/spam")
    here = base_of("llama").tuned(CLASSIFIER, num_labels=3, **settings_for("shallow"))
    here.save_prompts(tmp_path / "user" / "spam")
    monkeypatch.chdir(tmp_path)
    assert same(hub.load("user/spam"), here)


def test_a_repository_without_weights(model, hub):
    model.push_to_hub("user/spam")
    (hub.snapshot("user/spam") / WEIGHTS_NAME).unlink()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OSError, match=WEIGHTS_NAME):
        model.load_prompts("user/spam", **hub.options)
    with pytest.raises(OSError, match=WEIGHTS_NAME):
        hub.load("user/spam")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_files_are_of_one_commit(model, hub, monkeypatch):
    """What is pushed between the two downloads is not mixed in."""
    model.push_to_hub("user/spam")
    download, asked = ptune.hub.cached_file, []

    def push_in_between(repo_id, name, **options):
        asked.append((name, options.get("revision")))
        found = download(repo_id, name, **options)
        if name == CONFIG_NAME:
            hub.commit("user/spam", {WEIGHTS_NAME: Path(__file__)})
        return found

    first = hub.snapshot("user/spam").name
    monkeypatch.setattr(ptune.hub, "cached_file", push_in_between)
    assert same(hub.load("user/spam"), model)
    assert asked == [(CONFIG_NAME, None), (WEIGHTS_NAME, first)]


class TestCards:
    @pytest.mark.parametrize(
        ("loader", "tag", "rest"),
        [
            (ptune.AutoPTuneModel, "feature-extraction", {}),
            (CLASSIFIER, "text-classification", {"num_labels": 2}),
            (ptune.AutoPTuneModelForQuestionAnswering, "question-answering", {}),
            (ptune.AutoPTuneModelForTokenClassification, "token-classification", {"num_labels": 2}),
            (ptune.AutoPTuneModelForCausalLM, "text-generation", {}),
        ],
    )
    @pytest.mark.parametrize("mode", [None, "shallow", "overwrite"])
    def test_what_it_says(self, base_of, tmp_path, loader, tag, rest, mode):
        model = base_of("gpt2").tuned(loader, **rest, **({} if mode is None else settings_for(mode)))
        model.save_prompts(tmp_path)
        text = (tmp_path / "README.md").read_text()
        data = yaml.safe_load(text.split("---\n")[1])
        assert data == {
            "library_name": "ptune-kernels",
            "pipeline_tag": tag,
            "tags": ["prompt-tuning", "ptune-kernels"],
        }
        # where a local base lies is told to nobody
        folder = base_of("gpt2").folder
        assert f"The base was a local folder, `{folder.name}`: `base_model` is where a copy lies." in text
        assert str(folder.parent) not in text
        settings = model.ptune_config
        assert f"| `tuning_mode` | `{settings.tuning_mode}` |" in text
        assert f"| `pre_seq_len` | {settings.pre_seq_len} |" in text
        assert f'{loader.__name__}.from_pretrained("…", base_model=…)' in text

    def test_a_base_without_a_place(self, tmp_path):
        ptune.AutoPTuneModel.from_config(transformers.GPT2Config(n_layer=1, n_embd=24, n_head=2)).save_prompts(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert "a local folder" not in text
        assert "base_model=…" in text

    def test_is_written_anew_until_it_is_edited(self, model, tmp_path):
        path = tmp_path / "README.md"
        model.save_prompts(tmp_path)
        assert f"| `pre_seq_len` | {COUNT} |" in path.read_text()
        model.init_prompts(ptune.PTuneConfig(tuning_mode="ptune", pre_seq_len=7))
        model.save_prompts(tmp_path)
        assert "| `pre_seq_len` | 7 |" in path.read_text()
        path.write_text(path.read_text() + "\nMine.\n")
        edited = path.read_text()
        model.init_prompts(ptune.PTuneConfig(tuning_mode="ptune", pre_seq_len=2))
        model.save_prompts(tmp_path)
        assert path.read_text() == edited
        (tmp_path / "prefix").mkdir()
        model.save_prefix(tmp_path / "prefix")
        assert "| `pre_seq_len` | 2 |" in (tmp_path / "prefix" / "README.md").read_text()

    def test_one_that_is_there_is_kept(self, model, hub, tmp_path):
        (tmp_path / "README.md").write_bytes(b"\xff of before")
        model.save_prompts(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == b"\xff of before"
        model.push_to_hub("user/spam")
        card = hub.snapshot("user/spam") / "README.md"
        card.write_text("edited on the hub")
        model.push_to_hub("user/spam")
        assert (hub.snapshot("user/spam") / "README.md").read_text() == "edited on the hub"

    def test_trainers_checkpoints_have_none(self, model, tmp_path):
        """Trainer writes its own."""
        model.save_pretrained(tmp_path)
        assert names(tmp_path) == {CONFIG_NAME, WEIGHTS_NAME}


class TestRefusals:
    def test_a_base_is_not_uploaded(self, model, hub, tmp_path):
        with pytest.raises(ValueError, match="push_to_hub: expected False with save_base=True"):
            model.save_pretrained(tmp_path / "out", save_base=True, push_to_hub=True, repo_id="user/spam")
        assert not (tmp_path / "out").exists()
        assert not hub.calls

    def test_what_is_no_prompt_is_not_uploaded(self, model, hub, tmp_path):
        model.save_prompts(tmp_path / "spam")
        (tmp_path / "spam" / WEIGHTS_NAME).unlink()
        for folder, name in (
            (tmp_path, CONFIG_NAME),
            (tmp_path / "none", "no such folder"),
            (tmp_path / "spam", WEIGHTS_NAME),
        ):
            with pytest.raises(FileNotFoundError, match=name):
                ptune.hub.upload(folder, "user/spam")
        assert not hub.calls

    def test_a_repository_that_is_not_there(self, model, hub, base_of):
        for missing in ("user/ham", "ham"):
            with pytest.raises(FileNotFoundError, match=f"^{missing}: expected a folder of prompts, or a repository"):
                model.load_prompts(missing, **hub.options)
            with pytest.raises(OSError, match=r"huggingface\.co"):
                CLASSIFIER.from_pretrained(missing, **hub.options)
        bank = ptune.PromptBank(base_of("llama").stock(transformers.AutoModelForCausalLM))
        with pytest.raises(FileNotFoundError, match=r"^user/ham: expected"):
            bank.add("ham", "user/ham", **hub.options)
        assert bank.names == []

    def test_what_is_no_repository_is_not_looked_for(self, model, monkeypatch, tmp_path):
        monkeypatch.setattr(ptune.hub, "cached_file", None)
        for missing in (str(tmp_path / "none"), "a/b/c", "../x", Path("user/spam")):
            with pytest.raises(FileNotFoundError, match="expected a folder of prompts, got no such folder"):
                model.load_prompts(missing)

    def test_unknown_options(self, model):
        with pytest.raises(TypeError, match=r"expected keywords among cache_dir, .*, got strict"):
            model.load_prompts("user/spam", strict=True)

    def test_a_misfit(self, model, hub, base_of):
        model.push_to_hub("user/spam")
        with pytest.raises(MisfitError, match="model_type"):
            CLASSIFIER.from_pretrained("user/spam", base_model=base_of("gpt2").folder, **hub.options)
