"""Whether the weights that keys and values of prompt rows were computed from are what they were."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count_step(*_: Any) -> None:
    """Fused optimizers, and those of bitsandbytes, change weights and leave their versions."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class Watched:
    """The weights of ``body`` and the ``prompts`` before it, as they are now. ``how``: what else must stay as it is."""

    def __init__(self, how: tuple, prompts: Sequence[Tensor], body: nn.Module) -> None:
        self.how = how
        # the parameters themselves, as addresses are used again
        self.prompts = list(prompts)
        # what modules hold, in place of a walk through them, which every call would wait for
        self.holders = [held for module in body.modules() for held in (module._parameters, module._modules)]
        self.held = [(held, name, its) for held in self.holders for name, its in held.items()]
        self.weights = [*self.prompts, *(its for _, _, its in self.held if isinstance(its, Tensor))]
        self.state = self._state()

    def is_still(self, how: tuple, prompts: Sequence[Tensor]) -> bool:
        return (
            self.how == how
            and len(self.prompts) == len(prompts)
            and all(a is b for a, b in zip(self.prompts, prompts, strict=True))
            and all(held.get(name) is its for held, name, its in self.held)
            and sum(map(len, self.holders)) == len(self.held)
            and self._state() == self.state
        )

    def _state(self) -> list:
        return [_steps, *((0 if w.is_inference() else w._version, w.dtype) for w in self.weights)]
