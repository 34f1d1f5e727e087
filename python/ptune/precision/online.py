"""`watch`: the magnitudes in a model that runs, and a warning at the first inf or NaN, without waiting for a device."""

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .sites import ATTENTION, QKV, Parts, attention_calls, has_weights
from .statistics import FLOAT16_MAX

EVERY = 16


def watch(model: nn.Module, every: int = EVERY) -> "Watch":
    """Keep an eye on ``model`` from now on, until the handle's ``remove()``.

    What every block hands on is looked at in every call: an inf or NaN that can reach the output is in there. What goes
    into and comes out of the modules with weights in a block, and query, key, value and output of its attention, which
    are what half precision rounds, are looked at in the first call and in each ``every``-th after it: their amax is a
    sample. Padding counts. The first inf or NaN is warned of (`RuntimeWarning`), once, by its module's name.

    Nothing waits for the device: a call's maxima are copied while the next runs, so on a GPU the warning comes up to
    a few calls late, or with ``report()`` or ``remove()``. Models that are compiled are not looked into.

    Raises `ValueError` for a model without blocks, or ``every`` below 1.
    """
    if type(every) is not int or every < 1:
        raise ValueError(f"every: expected an integer of at least 1, got {every!r}")
    parts = Parts(model)
    if not parts.blocks:
        raise ValueError(f"model: {type(model).__name__} has no list of blocks to watch")
    return Watch(model, parts, every)


class Watch:
    """The handle that `watch` returns.

    Attributes:
        calls: how many calls of the model began.
    """

    def __init__(self, model: nn.Module, parts: Parts, every: int) -> None:
        self.calls = 0
        self._model = model
        self._names = parts.names
        self._every = every
        self._peaks: dict[tuple[nn.Module, str], Tensor] = {}  # in the order of execution
        self._dtypes: dict[tuple[nn.Module, str], torch.dtype] = {}
        self._sampled: ExitStack | None = None
        self._copies: list[_Copy] = []
        self._warned = False
        inside = [m for block in parts.blocks for m in block.modules() if has_weights(m)]
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            *(module.register_forward_hook(self._note_module) for module in dict.fromkeys(inside)),
            *(block.register_forward_hook(self._note_block) for block in parts.blocks),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def report(self) -> list[dict[str, Any]]:
        """One record for each tensor that was looked at, in the order of execution.

        ``name`` (of the module), ``tensor`` ("output", "input", "query", …), ``dtype``, ``amax`` (inf or NaN from the
        first such value on), ``share`` of float16's greatest number, ``finite``. Waits for the device.
        """
        self._inspect(wait=True)
        records = []
        for (module, tensor), peak in self._peaks.items():
            amax = peak.item()
            records.append({
                "name": self._names[module],
                "tensor": tensor,
                "dtype": str(self._dtypes[module, tensor]).removeprefix("torch."),
                "amax": amax,
                "share": amax / FLOAT16_MAX,
                "finite": amax < float("inf"),  # NaN is not
            })  # fmt: skip
        return records

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._close()
        self._inspect(wait=True)

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._close()
        if self.calls % self._every == 0:
            self._sampled = ExitStack()
            self._sampled.enter_context(attention_calls(self._model, self._note_attention))
        self.calls += 1

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._close()
        self._inspect()
        if not self._warned and not self._copies:
            by_device: dict[torch.device, list[Any]] = {}
            for key, peak in list(self._peaks.items()):  # other threads may call the model
                by_device.setdefault(peak.device, []).append(key)
            self._copies = [_Copy(keys, [self._peaks[key] for key in keys]) for keys in by_device.values()]
            self._inspect()

    def _close(self) -> None:
        sampled, self._sampled = self._sampled, None
        if sampled is not None:
            sampled.close()

    def _note_block(self, module: nn.Module, args: Any, output: Any) -> None:
        self._note(module, "output", output)

    def _note_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._sampled is not None:
            self._note(module, "input", args)
            self._note(module, "output", output)

    def _note_attention(self, stock: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = stock(module, *args, **kwargs)
        for kind, tensor in zip(ATTENTION, (*args[: len(QKV)], output[0]), strict=True):
            self._note(module, kind, tensor)
        return output

    def _note(self, module: nn.Module, what: str, values: Any) -> None:
        tensor = next((x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()), None)
        if tensor is None or not tensor.numel():
            return
        with torch.no_grad():
            low, high = tensor.detach().aminmax()
            peak = torch.maximum(-low, high).float()  # of NaN it is NaN
            if (before := self._peaks.get((module, what))) is not None:
                peak = torch.maximum(peak, before.to(peak.device))
        self._peaks[module, what] = peak
        self._dtypes[module, what] = tensor.dtype

    def _inspect(self, wait: bool = False) -> None:
        """Look at the maxima that have arrived, and warn of the first that is inf or NaN."""
        if wait and not self._warned and self._peaks:
            keys = list(self._peaks)
            self._copies = [_Copy(keys, [self._peaks[key].cpu() for key in keys])]
        if any(not copy.arrived() for copy in self._copies):
            return
        found = [key for copy in self._copies for key in copy.nonfinite()]
        self._copies = []
        if found and not self._warned:
            self._warned = True
            module, what = next(key for key in self._peaks if key in found)
            message = f"{self._names[module]}: inf or NaN in its {what} ({self._dtypes[module, what]})"
            warnings.warn(f"{message}, by call {self.calls}", RuntimeWarning, stacklevel=2)


class _Copy:
    """Maxima on their way to the host."""

    def __init__(self, keys: list[Any], peaks: list[Tensor]) -> None:
        self.keys = keys
        values = torch.stack(peaks)
        self.event: Any = None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(values.device))
        else:
            self.values = values.cpu()

    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def nonfinite(self) -> list[Any]:
        finite = self.values.isfinite().tolist()
        return [key for key, is_finite in zip(self.keys, finite, strict=True) if not is_finite]
