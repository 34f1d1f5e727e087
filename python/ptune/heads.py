"""Task heads apart from their body: each is given the states that a body, run for many tasks at once, had for it."""

import copy
import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from . import checkpoint
from .anatomy import find_body
from .attention import stock_name
from .compatibility import check_fit
from .config import take_settings
from .dropout import FrozenDropout
from .layout import roll_rows, states_at
from .loading import saved_labels
from .models import ptune_class
from .pooling import pool
from .quantised import holds_quantised


class Heads:
    """Makes the heads that folders of prompts have, on the base that ``runner`` (a `PTuneMixin`) is of.

    ``config`` is the base's own, with the dropout that the runner's has no more: a head keeps its share of it.
    """

    def __init__(self, runner: Any, config: Any) -> None:
        self.runner = runner
        self.config = config
        self._skeletons: dict[tuple[str, int | None], Any] = {}

    def of(self, saved: dict[str, Any], tensors: dict[str, Tensor]) -> "Head":
        """The head of a folder's config and tensors. Raises `MisfitError` where it does not fit the base."""
        skeleton = self._skeleton(saved)
        skeleton._set_head(saved["head"])
        # the base as it was in training: here nothing can be changed of it any more
        config = checkpoint.trained_config(saved)
        base = saved["base"] | {"config": config, "fingerprint": checkpoint.fingerprint(config)}
        check_fit(skeleton, saved | {"base": base}, tensors)
        return Head(skeleton, self.runner, {name: tensors[name] for name in saved["head"]})

    def of_base(self) -> "Head":
        """The head that the base itself has."""
        own = {"model_class": self.runner.base_class.__name__, "id2label": None}
        return Head(self._skeleton(own), self.runner, {})

    def _skeleton(self, saved: dict[str, Any]) -> Any:
        """A model of the folder's class and labels, without memory for its weights: one for all of so many labels."""
        labels = {"problem_type": self.runner.config.problem_type} | saved_labels(saved)
        key = saved["model_class"], len(labels["id2label"]) if "id2label" in labels else None
        if key not in self._skeletons:
            config = copy.deepcopy(self.config)
            take_settings(config)
            config._attn_implementation = stock_name(config._attn_implementation)
            kind: Any = getattr(transformers, saved["model_class"], None)
            is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
            own = self.runner.base_class.config_class  # some configs have the classes of others, as InternLM 3's
            if not is_model or kind.forward is nn.Module.forward or kind.config_class is not own:
                raise checkpoint.MisfitError(
                    f"model_class: expected a class of {own.__name__}'s models, got {saved['model_class']}"
                )
            if "id2label" in labels:
                config.id2label = labels["id2label"]
            with torch.device("meta"):
                self._skeletons[key] = ptune_class(kind)(config)
        skeleton = self._skeletons[key]
        for name, value in labels.items():
            setattr(skeleton.config, name, value)
        return skeleton


class Head:
    """What a model class does to the states of a body, with a task's own parameters.

    Attributes:
        model_class: the stock class.
        model: a model of that class, with the task's labels and without the body.
    """

    def __init__(self, skeleton: Any, runner: Any, own: dict[str, Tensor]) -> None:
        body = find_body(skeleton)
        states = _States(body)
        # all but the body is copied
        model = copy.deepcopy(skeleton, {id(body): states, id(skeleton._dropout): FrozenDropout(states)})
        prefix = next(name + "." * bool(name) for name, module in model.named_modules() if module is states)
        device = runner.device
        shared = dict(runner.named_parameters(remove_duplicate=False))
        shared |= {prefix + name: parameter for name, parameter in runner._hooks.body.named_parameters()}
        modules = dict(runner.named_modules())
        modules |= {prefix + name: module for name, module in runner._hooks.body.named_modules()}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if name in own:
                parameter = nn.Parameter(own[name].to(device, torch.float32, copy=True), requires_grad=False)
            elif name in shared:
                parameter = shared[name]
            else:
                raise checkpoint.MisfitError(
                    f"{name}: the prompts do not hold it, and {runner.base_class.__name__} does not have it; "
                    f"load the base as {skeleton.base_class.__name__}"
                )
            owner, _, leaf = name.rpartition(".")
            if name not in own and holds_quantised(modules[owner]):
                model.set_submodule(owner, modules[owner])
            else:
                model.get_submodule(owner)._parameters[leaf] = parameter
        if inside := own.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}:
            raise checkpoint.MisfitError(f"head: expected parameters outside the body, got {sorted(inside)}")
        if any(buffer.is_meta for buffer in model.buffers()):
            raise NotImplementedError(f"{skeleton.base_class.__name__}: its head has buffers, which nothing holds")
        self.model_class = skeleton.base_class
        self.model = model.eval()
        self._own = list(own)

    @property
    def takes_labels(self) -> bool:
        """Whether the model class has a loss, and one of ``labels``: that of answers is of two columns."""
        return "labels" in inspect.signature(self.model_class.forward).parameters

    def own(self) -> dict[str, nn.Parameter]:
        """The task's own parameters, by the names that its folder has."""
        return {name: self.model.get_parameter(name) for name in self._own}

    def unfreeze(self) -> dict[str, nn.Parameter]:
        """`own`, which train from now on."""
        own = self.own()
        for parameter in own.values():
            parameter.requires_grad_()
        return own

    def __call__(
        self,
        states: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        column: Tensor,
        labels: Tensor | None = None,
    ) -> Any:
        """The model's output for texts [k, n], of which the body made ``states`` [k, n, d].

        ``column`` [k]: where they begin.
        """
        if labels is not None and self.model.can_generate() and labels.shape == input_ids.shape:
            labels = labels.scatter(1, column[:, None].long(), -100)  # nothing of the text predicts its first token
        if self.model_class.__name__.endswith("ForSequenceClassification"):
            # as they are pooled where they begin in the first column
            states, input_ids, attention_mask = (roll_rows(x, column, 1) for x in (states, input_ids, attention_mask))
            column = torch.zeros_like(column)
        _thread.given = states, states_at(column, states)
        try:
            given = {} if labels is None else {"labels": labels}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **given)
        finally:
            _thread.given = None


_thread = threading.local()


@dataclass
class _Output(BaseModelOutputWithPoolingAndCrossAttentions):
    def __getattr__(self, name: str) -> None:
        """Nothing of what else some bodies return and their heads hand on, as routers' logits."""
        if name.startswith("_"):
            raise AttributeError(name)


class _States(nn.Module):
    """Stands where a body was, and returns the states that it made."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.config = body.config
        self.pooler = copy.deepcopy(getattr(body, "pooler", None))
        self.activation = getattr(body, "pooler_activation", getattr(body, "activation", None))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states, first = _thread.given
        pooled = None if self.pooler is None else pool(self, first)
        return _Output(last_hidden_state=states, pooler_output=pooled)
