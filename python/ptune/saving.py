"""What a model with prompts writes and reads: folders of prompts and head, compiled prefixes, and its base."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, hub
from .anatomy import evaluating, whole
from .cache import CompiledPrefix
from .compatibility import check_compiled, check_fit, warn_of_other_settings
from .half_attention import dtypes_of
from .likeness import sample, warn_of_changed_weights, warn_of_other_weights
from .loading import Origin
from .quantised import described


class PromptSaving:
    """The part of `PTuneMixin` that saves and loads."""

    def save_prompts(self: Any, folder: str | os.PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """Write prompts and head, float32, with what they fit, and a model card, to ``folder``; each file atomically.

        A card that was edited is left as it is. ``push_to_hub=True`` then uploads the files, with the ``options`` of
        `ptune.hub.upload`, ``repo_id`` among them. Prompts that FSDP2 has sharded are gathered, for which every process
        must call this.
        """
        described, tensors = self.described()
        warn_of_changed_weights(self, folder)
        hub.write(folder, described, tensors)
        if push_to_hub:
            hub.upload(folder, **options)

    def described(self: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `save_prompts` writes: the config, and copies of prompts and head in float32 on the CPU."""
        self._check_adapters(beside=True)
        self._check_vocabulary()
        if any(".original_module." in name for name in self._own_names().values()):
            raise ValueError("adapters: expected one that is active, as it holds prompts or head; got it disabled")
        own = self._own(self.state_dict())
        copies = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in own.items()}
        return self._description(self.origin), copies

    def push_to_hub(self: Any, repo_id: str, **options: Any) -> Any:
        """Upload what `save_prompts` writes, with the ``options`` of `ptune.hub.upload`, which returns the commit."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_prompts(folder)
            return hub.upload(folder, repo_id, **options)

    def save_prefix(self: Any, folder: str | os.PathLike[str]) -> None:
        """Write the keys and values of the prompt rows, and the head, to ``folder``: all that inference needs.

        `load_prompts` and ``from_pretrained`` read it as they do a folder of prompts; what trains on are then the keys
        and values themselves. Raises `ValueError` where the prompts are not shared.
        """
        self._check_adapters()
        self._check_vocabulary()
        if self.prefix_plan.path != "prefix":
            raise ValueError(f"save_prefix: prompts are not shared here: {self.prefix_plan.reason}")
        self._hooks.prefix.forget()  # what was kept before an edit that cannot be seen
        with torch.no_grad(), evaluating(self):
            compiled = CompiledPrefix(self._hooks.prefix.prefix())
        warn_of_changed_weights(self, folder)
        tensors = {name: self.get_parameter(name) for name in self._head} | compiled.state_dict(
            prefix=checkpoint.COMPILED
        )
        hub.write(folder, self._description(self.origin), tensors)

    def load_prompts(self: Any, folder: str | os.PathLike[str], *, head: bool = True, **options: Any) -> None:
        """Take over the prompts and head of ``folder``, or what `save_prefix` wrote there, with their mode and length.

        Parameters whose shape stays remain the same objects, which an optimizer may hold.

        Args:
            folder: may be the name of a repository on the hub, with the ``options`` of `ptune.hub.download`.
            head: ``False`` takes the prompts alone, and leaves the head that is here: for another task or other labels
                (Vu et al. 2022).

        Raises `ptune.checkpoint.MisfitError` where prompts do not fit this base, saying why; nothing is changed then.
        """
        self._check_unwrapped()
        folder = hub.folder_of(folder, **options)
        saved, tensors = checkpoint.read_config(folder), checkpoint.read_tensors(folder)
        if not head:
            here = self._description(self.origin)
            tensors = {name: tensor for name, tensor in tensors.items() if name not in saved["head"]}
            tensors |= {name: self.get_parameter(name).detach() for name in self._head}
            saved |= {name: here[name] for name in ("model_class", "head", "id2label", "problem_type")}
        settings = checkpoint.settings_of(saved)
        settings.prefix_sharing = self.ptune_config.prefix_sharing
        check_fit(self, saved, tensors)
        names = checkpoint.compiled_names(settings, self.config.num_hidden_layers)
        compiled = [tensors[name] for name in names if name in tensors]
        before = {name: getattr(self, name) for name in checkpoint.PROMPT_MODULES}
        self._install(settings, *(tensors.get(name) for name in checkpoint.PROMPTS), compiled, saved["head"])
        self._keep(before)
        with torch.no_grad():
            for name in saved["head"] if head else ():
                self.get_parameter(name).copy_(tensors[name])
        warn_of_other_settings(self, saved, folder)
        warn_of_other_weights(self, saved, folder)

    def _keep(self: Any, before: dict[str, nn.Module | None]) -> None:
        """Have the prompts that are here now in the modules that they were in ``before``, where these are as large."""
        for name, module in before.items():
            now = getattr(self, name)
            if module is not None and now is not None and _shapes(module) == _shapes(now):
                module.load_state_dict(now.state_dict())
                module.zero_grad()
                setattr(self, name, module.requires_grad_())

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        save_base: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write prompts and head, as Trainer asks for; ``save_base=True`` adds the base, in a folder of its own.

        ``state_dict`` is the whole model's, if not its present one. ``push_to_hub=True`` adds a model card and uploads,
        as `save_prompts` does. Further keywords are those of the upload, or of transformers' ``save_pretrained`` for
        the base.
        """
        if push_to_hub and save_base:
            raise ValueError("push_to_hub: expected False with save_base=True, for a base is never uploaded")
        self._check_adapters()
        origin = self.origin
        if save_base:
            checkpoint.check_free(save_directory)
            # as it is now: its config may have been changed since it was loaded
            origin = Origin(checkpoint.BASE_FOLDER, checkpoint.base_config(self.config))
        else:
            self._check_vocabulary()
            warn_of_changed_weights(self, save_directory)
        state = self.state_dict() if state_dict is None else state_dict
        if save_base:
            folder = os.path.join(save_directory, checkpoint.BASE_FOLDER)
            base_state = {
                n: t for n, t in state.items() if n not in checkpoint.PROMPTS and not n.startswith(checkpoint.COMPILED)
            }
            with self._as_base():
                self.save_pretrained(folder, is_main_process=is_main_process, state_dict=base_state, **kwargs)
        own = self._own(state)  # by every process, as in `save_prompts`
        if is_main_process:
            write = hub.write if push_to_hub else checkpoint.write
            write(save_directory, self._description(origin), own)
            if push_to_hub:
                hub.upload(save_directory, **kwargs)

    def _check_adapters(self: Any, beside: bool = False) -> None:
        """Raises `ValueError` for adapters that would be lost; ``beside``: but for those that PEFT's model saves."""
        adapters = getattr(self, "peft_config", None)
        if adapters and (self._hf_peft_config_loaded or not beside):  # those of add_adapter
            raise ValueError(
                f"adapters: {', '.join(adapters)} would be lost, for neither a folder of prompts nor its base holds "
                "them; remove them with delete_adapter, or use peft's get_peft_model, which saves them itself"
            )

    def _check_unwrapped(self: Any) -> None:
        """Raises `ValueError` where PEFT or FSDP2 has taken over what prompts and head would replace."""
        if getattr(self, "peft_config", None):
            raise ValueError(
                f"adapters: expected none yet, got {', '.join(self.peft_config)}; prompts come first, adapters on top"
            )
        if any(hasattr(self._found(name), "full_tensor") for name in self._folder_names()):
            raise ValueError("prompts: expected a model that is not sharded yet; prompts come first, then fully_shard")

    def _check_vocabulary(self: Any) -> None:
        vocabulary = self.get_input_embeddings().num_embeddings
        if vocabulary != self._loaded_vocabulary:
            raise ValueError(
                f"vocab_size: expected {self._loaded_vocabulary}, as it was loaded, got {vocabulary}; a folder of "
                "prompts does not hold resized embeddings: save with save_base=True"
            )

    def _own(self: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: whole(state[here]) for name, here in self._own_names().items()}

    def _own_names(self: Any) -> dict[str, str]:
        """Of prompts and head: as a folder has them, and as they are called here, where PEFT may have wrapped them."""
        names = {id(tensor): name for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        return {name: names[id(self._found(name))] for name in self._folder_names()}

    def _found(self: Any, name: str) -> Tensor:
        """The parameter or buffer of this name, if need be within what PEFT wrapped around its module."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)

    def _folder_names(self: Any) -> list[str]:
        prompts = zip(checkpoint.PROMPTS, self._tables(), strict=True)
        compiled = (
            []
            if self.compiled_prefix is None
            else checkpoint.compiled_names(self.ptune_config, self.config.num_hidden_layers)
        )
        return [name for name, table in prompts if table is not None] + compiled + self._head

    def _description(self: Any, origin: Origin) -> dict[str, Any]:
        settings = self.ptune_config
        labelled = bool(self._head) or "Classification" in self.base_class.__name__  # the base may have had the head
        return {
            "format_version": checkpoint.FORMAT_VERSION,
            "base": {
                "name": origin.name,
                "fingerprint": checkpoint.fingerprint(origin.config),
                "config": origin.config,
                "overrides": origin.overrides,
                "dtype": str(self.get_input_embeddings().weight.dtype).removeprefix("torch."),
                "quantization": described(self.config),
                "weights": sample(self),
                **dtypes_of(self),
            },
            "model_class": self.base_class.__name__,
            "tuning_mode": settings.tuning_mode,
            "pre_seq_len": settings.pre_seq_len,
            "deep_prompt_mode": settings.deep_prompt_mode,
            "prompt_init": settings.prompt_init,
            "base_dropout": settings.base_dropout,
            "embedding_size": self.get_input_embeddings().weight.shape[1],
            "hidden_size": self.config.hidden_size,
            "num_layers": self.config.num_hidden_layers,
            "head": list(self._head),
            "id2label": {str(i): label for i, label in self.config.id2label.items()} if labelled else None,
            "problem_type": self.config.problem_type if labelled else None,
        }

    def _check_compiled(self: Any) -> None:
        if self.compiled_prefix is None or self.prefix_plan.path != "prefix":
            return
        with torch.no_grad(), evaluating(self):
            own = self._hooks.prefix._capture(None).prefix().tensors()
        names = checkpoint.compiled_names(self.ptune_config, len(own) // 2)
        check_compiled(names, self.compiled_prefix.tensors(), own)

    @contextmanager
    def _as_base(self: Any) -> Iterator[None]:
        """Be the stock class, without prompts and with the config it came with, for as long as it takes to save it."""
        prompts = {name: self._modules.pop(name) for name in checkpoint.PROMPT_MODULES if name in self._modules}
        own, ignored, adapted = type(self), self._keys_to_ignore_on_save, self._hf_peft_config_loaded
        self.__class__ = self.base_class
        self._keys_to_ignore_on_save = set()
        self._hf_peft_config_loaded = False
        self._dropout.restore()
        try:
            yield
        finally:
            self._modules.update(prompts)
            self.__class__ = own
            self._keys_to_ignore_on_save = ignored
            self._hf_peft_config_loaded = adapted
            self._set_dropout()


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module.parameters()]
