"""`RemoteSequential`: a module that stands where blocks were, which run on their servers."""

import uuid
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn

from .link import Link, call, tell
from .relay import Leg, Relay, way_back
from .session import InferenceSession
from .shared import SharedRows, deep_gradient
from .wire import Request, TooLarge, check_shapes, checked_dtype, geometry, name_of, to_array, to_tensor


class RemoteSequential(nn.Module):
    """Blocks ``first`` … ``last - 1`` of a model, on the servers that ``link`` leads to; ``remote[2:5]`` are some.

    Args:
        wire_dtype: of hidden states and their gradients on their way (``"bfloat16"`` or the like); ``None`` for that of
            the hidden states.
        micro_batch: how many rows travel together. The next ones are sent while these are with a later server; a
            request that is too large for a server is split in any case.
    """

    def __init__(
        self,
        link: Link,
        first: int = 0,
        last: int | None = None,
        *,
        wire_dtype: str | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        if micro_batch is not None and (type(micro_batch) is not int or micro_batch < 1):
            raise ValueError(f"micro_batch: expected at least one row, got {micro_batch!r}")
        wire_dtype = None if wire_dtype is None else checked_dtype("wire_dtype", wire_dtype)
        self.link = link
        self.first = first
        self.last = len(link) if last is None else last
        self.wire_dtype = wire_dtype
        self.micro_batch = micro_batch

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, blocks: slice) -> "RemoteSequential":
        if not isinstance(blocks, slice) or blocks.step not in (None, 1):
            raise TypeError(f"blocks: expected a slice of consecutive ones, got {blocks!r}")
        start, stop, _ = blocks.indices(len(self))
        if start >= stop:
            raise ValueError(f"blocks: expected at least one of {len(self)}, got {blocks!r}")
        return RemoteSequential(
            self.link,
            self.first + start,
            self.first + stop,
            wire_dtype=self.wire_dtype,
            micro_batch=self.micro_batch,
        )

    def forward(
        self,
        hidden: Tensor,
        prompts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        starts: Tensor | None = None,
        mode: str = "overwrite",
        shared: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks on ``hidden`` [b, S, d]; differentiable in it, in ``prompts`` and in ``shared``.

        Args:
            prompts: deep prompts [blocks, m, d], float32. Their gradient is summed over the batch by the servers.
            attention_mask: [b, S], 0 for padding; ``None`` where there is none. With ``shared`` [b, m + S], its first m
                columns 1.
            position_ids: [b, S] or [1, S]; ``None`` for 0, 1, …, or m, m + 1, … with ``shared``.
            starts: [b], the column at which the m prompt rows of each row begin; ``None`` for 0.
            mode: whether prompts ``"overwrite"`` these rows (but for the model's first block, where they are added), or
                ``"add"``.
            shared: prompt rows [1, m, d], at positions 0 to m - 1, that are run once, and that all rows of ``hidden``
                attend to as if they stood before their first tokens; ``prompts`` are then theirs. For blocks where such
                rows never read the text: causal ones, or where ``prompts`` overwrite the rows.

        Raises `RemoteError` where the blocks could not be run, and `ValueError` for what no server takes.
        """
        check_shapes(hidden, prompts, shared, len(self))
        given = [tensor for tensor in (hidden, prompts, shared) if tensor is not None]
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        run = _Pass(self, hidden, attention_mask, position_ids, starts if prompts is not None else None, mode, keep)
        return _Blocks.apply(run, hidden, prompts, shared)

    def inference_session(self, max_length: int | None = None) -> InferenceSession:
        """A session whose keys and values are kept by the servers; ``max_length``: how many columns it may come to."""
        return InferenceSession(self.link, self.first, self.last, self.wire_dtype, max_length)


class _Pass:
    """One forward through the blocks, and its backward, in micro-batches."""

    def __init__(
        self,
        blocks: RemoteSequential,
        hidden: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        starts: Tensor | None,
        mode: str,
        keep: bool,
    ) -> None:
        self.link = blocks.link
        self.legs = self.link.legs(blocks.first, blocks.last)
        self.dtype = blocks.wire_dtype or name_of(hidden.dtype)
        self.arrays = geometry(mask, positions, starts)
        self.mode, self.keep, self.differentiable = mode, keep, hidden.requires_grad
        rows, length = hidden.shape[:2]
        for name, array in self.arrays.items():
            if array is not None and len(array) not in (1, rows):  # a slice of it would hide what is wrong
                raise ValueError(f"{name}: expected {rows} rows, as hidden has, got {len(array)}")
        most = self.link.max_tokens // length
        if most == 0:
            raise TooLarge(
                f"hidden: expected at most {self.link.max_tokens} tokens in a row (max_tokens), got {length}"
            )
        step = min(blocks.micro_batch or rows, most)
        self.slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        self.chunks: list[_Chunk] = []
        self.shared: list[SharedRows] = []  # at most one, for all chunks
        # once the pass is dropped: chunks and relays refer to each other, and would wait for the garbage collector
        weakref.finalize(self, _release, self.chunks, self.shared).atexit = False

    def forward(self, hidden: Tensor, prompts: Tensor | None, shared: Tensor | None) -> Tensor:
        array = to_array(hidden, self.dtype)
        sent = self.link.prompts(self.legs, prompts)
        if shared is not None:
            self.shared.append(SharedRows(self.link, self.legs, shared, sent, self.mode))
            sent = [None] * len(sent)
            count, length = shared.shape[1], array.shape[1]
            if self.arrays["mask"] is None:
                self.arrays["mask"] = np.ones((len(array), count + length), np.bool_)
            if self.arrays["positions"] is None:
                self.arrays["positions"] = np.arange(count, count + length, dtype=np.int64)[None]
        for rows in self.slices:
            requests = [
                Request(
                    leg.first,
                    leg.last,
                    self.dtype,
                    (rows.stop - rows.start, array.shape[1]),
                    prompts=prompt,
                    mode=self.mode,
                    # a later server's gradient is where an earlier one's begins
                    differentiable=self.differentiable or leg is not self.legs[0],
                    identity=leg.replicas.identity,
                    **{name: _rows_of(value, rows) for name, value in self.arrays.items()},
                )
                for leg, prompt in zip(self.legs, sent, strict=True)
            ]
            self.chunks.append(_Chunk(self.link, requests, array[rows], self.keep, *self.shared))
        for each in self.shared:
            each.relay.settle()
        outputs = [
            to_tensor("hidden", chunk.forward(), self.dtype, chunk.hidden.shape).to(hidden.device, hidden.dtype)
            for chunk in self.chunks
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        array = to_array(gradient, self.dtype)
        relays = [chunk.begin_backward(array[rows]) for chunk, rows in zip(self.chunks, self.slices, strict=True)]
        parts: list[Tensor] = []
        deep: Tensor | None = None
        for chunk, relay in zip(self.chunks, relays, strict=True):
            part, *of_legs = chunk.finish_backward(relay)
            if self.differentiable:
                parts.append(to_tensor("gradient", part, self.dtype, chunk.hidden.shape))
            if (together := deep_gradient(of_legs)) is not None:
                deep = together if deep is None else deep + together
        own: Tensor | None = None
        for shared in self.shared:
            own, deep = shared.backward(lambda leg: [chunk.parts[leg.first] for chunk in self.chunks], relays)
        hidden = torch.cat(parts).to(gradient.dtype) if parts else None
        hidden, deep, own = (each if each is None else each.to(gradient.device) for each in (hidden, deep, own))
        return hidden, deep, own


class _Chunk:
    """Some rows of a batch on their way through the blocks and back."""

    def __init__(
        self,
        link: Link,
        requests: list[Request],
        hidden: np.ndarray,
        keep: bool,
        shared: SharedRows | None = None,
    ) -> None:
        self.link = link
        self.shared = shared
        self.parts: dict[int, Any] = {}
        self.hidden = hidden
        self.requests = {request.first: request for request in requests}
        self.legs = link.legs(requests[0].first, requests[-1].last)
        self.keep = keep
        self._names: dict[int, str] = {}
        self._outstanding: list[tuple[Any, str]] = []
        lost = None if shared is None else shared.again
        self.relay = Relay(self.legs, link.retries, self._begin, self._send, lost)

    def forward(self) -> np.ndarray:
        output = self.relay.wait()[0]
        self.link.count("hidden", self.hidden.nbytes + output.nbytes, self.hidden.nbytes * (len(self.legs) - 1))
        # what each leg was given stays in the object store until the graph is gone
        self.relay.states = self.relay.states[:-1] if self.keep else []
        return output

    def begin_backward(self, gradient: np.ndarray) -> Relay:
        legs, retries = way_back(self.legs), self.link.retries
        return Relay(legs, retries, lambda: ray.put(gradient), self._send_back, self._forward_again)

    def finish_backward(self, relay: Relay) -> list[Any]:
        results = relay.wait()
        for leg in relay.legs:  # whose backward took them
            if (kept := (leg.server, self._names[leg.first])) in self._outstanding:
                self._outstanding.remove(kept)
        own, *deep = (0 if array is None else array.nbytes for array in results)
        self.link.count("gradients", self.hidden.nbytes + own, self.hidden.nbytes * (len(self.legs) - 1))
        self.link.count("prompt gradients", sum(deep))
        return results

    def release(self) -> None:
        """Let go of what stands between the servers, and of activations whose backward did not come.

        Servers that do not hear of it drop them in time.
        """
        for server, keep in self._outstanding:
            tell(server, "forget", keep)
        self._outstanding.clear()
        del self.relay  # which holds this in turn

    def _begin(self) -> Any:
        return ray.put(self.hidden)

    def _send(self, leg: Leg, states: Any) -> list[Any]:
        keep = None
        if self.keep:
            keep = self._names[leg.first] = uuid.uuid4().hex
            self._outstanding.append((leg.server, keep))
        return call(leg.server, "forward", 2, self._request(leg), states, keep)

    def _send_back(self, leg: Leg, gradient: Any) -> list[Any]:
        source = [self.relay.given_to(leg)]
        made = call(leg.server, "backward", 3, self._request(leg), gradient, self._names[leg.first], source)
        if self.shared is not None:
            self.parts[leg.first] = made.pop(1)  # which only the servers read
        return made

    def _request(self, leg: Leg) -> Request:
        request = self.requests[leg.first]
        return request if self.shared is None else replace(request, shared=self.shared.for_request(leg))

    def _forward_again(self) -> None:
        """Make anew what each leg was given."""
        self.relay.states.append(None)
        self.relay.begin_again()
        self.relay.settle()
        self.relay.states.pop()


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Pass, hidden: Tensor, prompts: Tensor | None, shared: Tensor | None) -> Tensor:
        ctx.run = run
        return run.forward(hidden, prompts, shared)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.run.backward(gradient)


def _rows_of(array: Any, rows: slice) -> Any:
    return array if array is None or len(array) == 1 else array[rows]


def _release(chunks: list[_Chunk], shared: list[SharedRows]) -> None:
    for chunk in chunks:
        chunk.release()
    for rows in shared:
        rows.release()
