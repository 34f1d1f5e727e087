"""`BlockServer`: a Ray actor that runs some blocks of a checkpoint for clients."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from transformers import DynamicCache

from ..attention import Prefix
from ..capture import Capture
from .keeping import Keeping
from .span import Span
from .wire import Prompts, Request, SessionGone, Shared, TooLarge, to_array, to_tensor

_MIB = 2**20
_FETCH_SECONDS = 60.0


@dataclass(frozen=True)
class ServerLimits:
    """What one server takes on.

    Attributes:
        max_tokens: b · S of one request.
        kept_bytes: activations of forwards whose backward has not come, and what shared prompt rows were run for; older
            ones are computed again. As much again for deep prompts.
        session_bytes: keys and values of inference sessions; the longest unused are dropped, and their clients send
            their history again.
        idle_seconds: after which what a client left is dropped.
    """

    max_tokens: int = 65536
    kept_bytes: int = 1024 * _MIB
    session_bytes: int = 1024 * _MIB
    idle_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole = name == "max_tokens"
            fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not fits or not value >= whole:  # NaN too
                raise ValueError(f"{name}: expected a {'whole ' * whole}number of at least {whole:d}, got {value!r}")


class BlockServer:
    """Runs blocks ``first`` … ``last - 1`` of the checkpoint ``path``; one request at a time, in their order.

    Hidden states come and go as arrays (see `wire`), which every method that computes returns beside a receipt,
    ``True``: a client can wait for it without fetching them. What is wrong with a request is a `ValueError`.
    """

    def __init__(
        self,
        path: str,
        first: int,
        last: int,
        dtype: str = "auto",
        device: str = "cpu",
        limits: ServerLimits | None = None,
        revision: str | None = None,
    ) -> None:
        self.limits = limits or ServerLimits()
        self.span = Span(path, first, last, dtype, device, revision=revision or "main")
        idle = self.limits.idle_seconds
        self._kept = Keeping(self.limits.kept_bytes, idle)
        self._sessions = Keeping(self.limits.session_bytes, idle)
        self._prompts = Keeping(self.limits.kept_bytes, idle)
        self._weights = {weight.untyped_storage().data_ptr() for weight in self.span.body.parameters()}
        self._weight_bytes = sum(weight.untyped_storage().nbytes() for weight in self.span.body.parameters())
        self._requests = self._recomputed = 0

    def forward(self, request: Request, hidden: np.ndarray, keep: str | None = None) -> tuple[np.ndarray, bool]:
        """The blocks' output [b, S, d]. Activations are kept under the name ``keep``, for `backward`."""
        states = self._admit(request, hidden)
        if keep is None:
            with torch.no_grad():
                output = self.span(states, request.first, request.last, **self._arguments(request))
        else:
            run, nbytes = self._run(request, states)
            self._kept.put(keep, run, nbytes)
            output = run.output
        return to_array(output, request.dtype), True

    def backward(
        self, request: Request, gradient: np.ndarray, keep: str, source: list[Any]
    ) -> tuple[np.ndarray | None, Any, bool]:
        """Gradients of the hidden states, and of the prompts: float32 [blocks, m, d], summed over the batch.

        ``None`` for hidden states that are not differentiable. Where prompt rows are shared, of the keys and values of
        these in place of prompts: a list, for `backward_shared`.

        ``source``: a list with a reference to the hidden states of the forward, which is run again where its
        activations are no longer here.
        """
        output_gradient = self._admit(request, gradient, "gradient")
        run = self._kept.take(keep)
        if run is None:
            self._recomputed += 1
            run, _ = self._run(request, self._states(request, _fetch(source[0])))
        inputs = run.layers if run.prompts is None else [run.prompts]
        if request.differentiable:
            inputs = [run.hidden, *inputs]
        gradients = list(torch.autograd.grad(run.output, inputs, output_gradient))
        own = to_array(gradients.pop(0), request.dtype) if request.differentiable else None
        if request.shared is not None:
            rest: Any = [to_array(each, request.shared.request.dtype) for each in gradients]
        else:
            rest = to_array(gradients[0], "float32") if gradients else None
        return own, rest, True

    def share(self, shared: Shared, rows: np.ndarray) -> tuple[np.ndarray, bool]:
        """What the blocks make of prompt rows [1, m, d], whose keys and values are kept for later requests."""
        states = self._admit_shared(shared, rows, "shared")
        return to_array(self._captured(shared, states).output, shared.request.dtype), True

    def backward_shared(
        self, shared: Shared, gradient: np.ndarray | None, parts: list[Any]
    ) -> tuple[np.ndarray, np.ndarray | None, bool]:
        """Gradients of the rows, [1, m, d], and of their deep prompts: float32 [blocks, m, d].

        ``gradient``: of what `share` returned; ``None`` after the last blocks. ``parts``: references to the gradients
        of keys and values that `backward` returned for all requests of the step, which are summed in their order.
        """
        output_gradient = self._admit_shared(shared, gradient, "gradient")
        run = self._captured(shared)
        sums = [torch.zeros_like(layer, dtype=_wide(layer)) for layer in run.layers]
        for part in _fetch(parts):
            if type(part) is not list or len(part) != len(sums):
                got = len(part) if type(part) is list else type(part).__name__
                raise ValueError(f"parts: expected lists of {len(sums)} arrays, got {got}")
            for total, array in zip(sums, part, strict=True):
                total += to_tensor("parts", array, shared.request.dtype, total.shape).to(total.device)
        self._kept.take(shared.name)
        outputs, gradients = run.layers, [total.to(layer.dtype) for total, layer in zip(sums, run.layers, strict=True)]
        if output_gradient is not None:
            outputs, gradients = [*outputs, run.output], [*gradients, output_gradient]
        inputs = [run.hidden] if run.prompts is None else [run.hidden, run.prompts]
        # where deep prompts overwrite the rows, nothing reads these
        own, *deep = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
        own = torch.zeros_like(run.hidden) if own is None else own
        return to_array(own, shared.request.dtype), to_array(deep[0], "float32") if deep else None, True

    def step(
        self, request: Request, hidden: np.ndarray, session: str, seen: int, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, bool]:
        """Continue ``session`` by the columns of ``hidden``, after ``seen`` others; 0 begins it, with what is shared.

        ``rows``: which rows of the batch before are continued. Raises `SessionGone` where the session does not stand at
        ``seen``.
        """
        states = self._admit(request, hidden, seen=seen)
        prompt_columns = 0 if request.shared is None else request.shared.request.shape[1]
        if seen and prompt_columns:
            raise ValueError("shared: expected in the first step of a session alone")
        cache = self._sessions.take(session)
        if seen == 0:
            cache = DynamicCache(config=self.span.body.config)
        elif cache is None or cache.get_seq_length(request.first) != seen:
            raise SessionGone(session)
        elif rows is not None:
            cache.batch_select_indices(torch.from_numpy(rows.copy()))
        with torch.no_grad():
            output = self.span(states, request.first, request.last, cache=cache, **self._arguments(request))
        if cache.get_seq_length(request.first) != seen + prompt_columns + request.shape[1]:
            raise ValueError(f"session: {type(self.span.body).__name__} keeps no keys and values")
        nbytes = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        if nbytes > self.limits.session_bytes:
            raise TooLarge(
                f"session: expected at most {self.limits.session_bytes} bytes of keys and values (session_bytes), got "
                f"{nbytes}; without a cache (use_cache=False) none are kept"
            )
        self._sessions.put(session, cache, nbytes)
        return to_array(output, request.dtype), True

    @ray.method(concurrency_group="beside")
    def close(self, session: str) -> None:
        """Forget a session."""
        self._sessions.drop(session)

    @ray.method(concurrency_group="beside")
    def forget(self, keep: str) -> None:
        """Forget the activations of a forward whose backward will not come, or what shared rows were run for."""
        self._kept.drop(keep)

    @ray.method(concurrency_group="beside")
    def status(self) -> dict[str, Any]:
        """What `ptune remote-status` shows, and what a client checks."""
        for keeping in (self._kept, self._sessions, self._prompts):
            keeping.drop_idle()
        return {
            "first": self.span.first,
            "last": self.span.last,
            "num_layers": self.span.num_layers,
            "fingerprint": self.span.fingerprint,
            "identity": self.span.identity,
            "unshared": self.span.unshared,
            "causal": self.span.causal,
            "weights": self.span.weights,
            "dtype": str(self.span.dtype).removeprefix("torch."),
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "requests": self._requests,
            "recomputed": self._recomputed,
            "sessions": len(self._sessions),
            "session_bytes": self._sessions.nbytes,
            "kept": len(self._kept),
            "kept_bytes": self._kept.nbytes,
            "prompt_bytes": self._prompts.nbytes,
            "weight_bytes": self._weight_bytes,
            "max_tokens": self.limits.max_tokens,
        }

    def _admit(self, request: Request, array: Any, name: str = "hidden", seen: int = 0) -> Tensor:
        """The states in ``array``, of a request that has been checked."""
        if type(request) is not Request:
            raise ValueError(f"request: expected a Request, got {type(request).__name__}")
        request.check(self.span.first, self.span.last, seen)
        if request.identity not in (None, self.span.identity):
            raise ValueError(
                f"{self.span.path}: expected the weights, config and dtype that were served when the model was loaded, "
                "got others since a server was started again; load the model again"
            )
        states = self._states(request, array, name)
        self._requests += 1
        for keeping in (self._kept, self._sessions, self._prompts):
            keeping.drop_idle()
        return states

    def _admit_shared(self, shared: Shared, array: Any, name: str) -> Tensor | None:
        if type(shared) is not Shared:
            raise ValueError(f"shared: expected Shared, got {type(shared).__name__}")
        shared.check(self.span.first, self.span.last)
        return None if array is None else self._admit(shared.request, array, name)

    def _states(self, request: Request, array: Any, name: str = "hidden") -> Tensor:
        if (tokens := request.shape[0] * request.shape[1]) > self.limits.max_tokens:
            raise TooLarge(f"{name}: expected at most {self.limits.max_tokens} tokens (max_tokens), got {tokens}")
        states = to_tensor(name, array, request.dtype, (*request.shape, self.span.width))
        return states.to(self.span.device)

    def _arguments(self, request: Request) -> dict[str, Any]:
        arguments: dict[str, Any] = {"mode": request.mode}
        for name in ("mask", "positions", "starts"):
            if (array := getattr(request, name)) is not None:
                tensor = torch.from_numpy(array.copy())
                arguments[name] = (tensor.long() if name == "mask" else tensor).to(self.span.device)
        if request.prompts is not None:
            arguments["prompts"] = self._prompts_of(request, request.prompts)
        if request.shared is not None:
            # leaves: each request has a graph of its own, and their gradients are to be summed unrounded
            leaves = [
                layer.detach().to(_wide(layer)).requires_grad_() for layer in self._captured(request.shared).layers
            ]
            arguments["shared"] = Prefix(list(zip(leaves[::2], leaves[1::2], strict=True)))
        return arguments

    def _captured(self, shared: Shared, rows: Tensor | None = None) -> "_Kept":
        """The keys and values of prompt rows and their graph, from ``rows``, or their source, where none are kept."""
        run = self._kept.get(shared.name)
        if run is None:
            if self.span.unshared is not None:
                raise ValueError(f"shared: expected None, as this server shares no rows: {self.span.unshared}")
            if not self.span.causal and (shared.request.prompts is None or shared.request.mode != "overwrite"):
                raise ValueError(
                    "shared: expected prompts that overwrite them, as these blocks read in both directions"
                )
            if rows is None:
                self._recomputed += 1
                rows = self._states(shared.request, _fetch(shared.source[0]), "shared")
            run, nbytes = self._run(shared.request, rows, capture=True)
            self._kept.put(shared.name, run, nbytes)
        return run

    def _prompts_of(self, request: Request, prompts: Prompts) -> Tensor:
        key = (prompts.client, request.first, request.last)
        version, rows = self._prompts.get(key) or (None, None)
        if version != prompts.version:
            shape = (request.last - request.first, prompts.count, self.span.width)
            rows = to_tensor("prompts", _fetch(prompts.source[0]), "float32", shape).to(self.span.device)
            self._prompts.put(key, (prompts.version, rows), rows.nbytes)
        assert rows is not None
        return rows

    def _run(self, request: Request, hidden: Tensor, capture: bool = False) -> tuple["_Kept", int]:
        """A forward whose graph is kept, and how many bytes it keeps; or, for prompt rows alone, a ``capture``."""
        arguments = self._arguments(request)
        hidden.requires_grad_(request.differentiable)
        if (prompts := arguments.get("prompts")) is not None:
            prompts = arguments["prompts"] = prompts.detach().requires_grad_()
        if capture:
            deep = () if prompts is None else prompts.unbind()
            arguments["shared"] = Capture(deep, prompts is not None and request.mode == "overwrite")
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would keep its own graph alive

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = self.span(hidden, request.first, request.last, **arguments)
        layers = [tensor for layer in arguments["shared"].layers for tensor in layer] if "shared" in arguments else []
        return _Kept(hidden, prompts, output, layers), sum(saved.values()) + sum(layer.nbytes for layer in layers)


@dataclass
class _Kept:
    hidden: Tensor
    prompts: Tensor | None
    output: Tensor
    layers: list[Tensor]  # keys and values of prompt rows: theirs, or those that were given


def _fetch(references: Any) -> Any:
    """What is referred to; where it does not come, the other clients must not wait for it without end."""
    return ray.get(references, timeout=_FETCH_SECONDS)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
