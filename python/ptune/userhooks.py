"""Whether hooks of a user's are on the modules of a body, and expect a row of states for each row of the batch."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

# Whose hooks behind the embeddings may be given prompt rows and text as one sequence: they do not look at its shape.
_LIBRARIES = {"torch", "transformers", "accelerate", "ptune"}
_GLOBAL = (
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_forward_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)


class UserHooks:
    """Those within ``body``; on the body itself they are given what it is."""

    def __init__(self, body: nn.Module) -> None:
        self.body = body
        self._none_before: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_none_before": None}  # another process numbers its hooks anew

    def present(self) -> bool:
        """Whether there are any. A compiler is told that there are none: it would guard every module."""
        # the number of the next hook says whether any came since the last look
        if torch.compiler.is_compiling() or self._none_before == (newest := RemovableHandle.next_id):
            return False
        found = any(_GLOBAL) or any(map(_has_any, self.body.children()))
        self._none_before = None if found else newest
        return found


def _has_any(module: nn.Module) -> bool:
    """On ``module`` or within."""
    kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks
    if any(kinds):
        hooks = [hook for kind in kinds for hook in kind.values()]
        if any((getattr(hook, "__module__", None) or "").partition(".")[0] not in _LIBRARIES for hook in hooks):
            return True
    return any(child is not None and _has_any(child) for child in module._modules.values())
