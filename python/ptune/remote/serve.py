"""Starting, finding and stopping the servers of a model's blocks: named Ray actors, which Ray places and restarts."""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch
import yaml  # type: ignore[import-untyped]
from ray.exceptions import GetTimeoutError, RayError
from transformers import AutoConfig

from ..language import is_multimodal
from .link import Link
from .relay import Leg, Relay, RemoteError, Replicas, Retries
from .server import BlockServer, ServerLimits
from .wire import checked_dtype

NAMESPACE = "ptune"

_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "spans": (list, tuple, type(None)),
    "name": (str, type(None)),
    "dtype": (str,),
    "device": (str,),
    "revision": (str, type(None)),
    "cpus": (int, float),
    "gpus": (int, float, type(None)),
    "resources": (dict,),
    "max_restarts": (int,),
    "limits": (ServerLimits, dict),
}
_started: dict[str, Sequence[Any]] = {}  # Ray ends an actor when its last handle goes
_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ServeConfig:
    """Which servers to start.

    Args:
        model: the checkpoint, a name on the hub or a folder that every machine can read.
        servers: over how many the blocks are spread evenly.
        replicas: how many there are of each.
        spans: blocks ``[first, last]`` of each server (``last`` is the next one's first), in place of ``servers``.
        name: under which clients find them; by default ``model``.
        dtype: of the weights; ``"auto"`` for the checkpoint's.
        device: ``"cpu"`` or ``"cuda"``.
        revision: of a model on the hub.
        cpus, gpus, resources: what Ray is to reserve for each server; by default a GPU where ``device`` is one.
        max_restarts: how often Ray starts a server anew that died; -1 without end.
        limits: see `ServerLimits`.
    """

    model: str
    servers: int = 1
    replicas: int = 1
    spans: list[list[int]] | None = None
    name: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    revision: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    max_restarts: int = -1
    limits: ServerLimits = field(default_factory=ServerLimits)

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"{name}: expected {_said(kinds)}, got {value!r}")
        if not all(isinstance(amount, int | float) for amount in self.resources.values()):
            raise ValueError(f"resources: expected numbers, got {self.resources!r}")
        for name in ("servers", "replicas"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)!r}")
        if isinstance(self.limits, dict):
            self.limits = _made_of(ServerLimits, "limits", self.limits)
        if self.gpus is None:
            self.gpus = 1.0 if self.device.startswith("cuda") else 0.0
        if self.dtype != "auto":
            self.dtype = checked_dtype("dtype", self.dtype)
        try:
            torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device: expected 'cpu' or 'cuda', got {self.device!r}") from None
        self.model = _absolute(self.model)

    @classmethod
    def read(cls, file: str | os.PathLike[str], **rest: Any) -> "ServeConfig":
        """From a YAML file of these names; those in ``rest`` go before it."""
        try:
            found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{file}: expected YAML, got {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file}: expected names and values, got {type(found).__name__}")
        return _made_of(cls, str(file), found | rest)

    def spans_of(self, num_layers: int) -> list[tuple[int, int]]:
        """First and last of each server's blocks. Raises `ValueError` where these are not all of the model's."""
        if self.spans is None:
            if self.servers > num_layers:
                raise ValueError(f"servers: expected at most {num_layers}, one for each block, got {self.servers}")
            ends = [round(num_layers * i / self.servers) for i in range(self.servers + 1)]
            return list(pairwise(ends))
        if not all(isinstance(span, list | tuple) and [type(end) for end in span] == [int, int] for span in self.spans):
            raise ValueError(f"spans: expected pairs [first, last], got {self.spans!r}")
        spans = [(first, last) for first, last in self.spans]
        if [first for first, _ in spans] + [num_layers] != [0] + [last for _, last in spans]:
            raise ValueError(f"spans: expected blocks 0 to {num_layers} without a gap, got {self.spans}")
        if any(first >= last for first, last in spans):
            raise ValueError(f"spans: expected at least one block in each, got {self.spans}")
        return spans


class Servers:
    """Servers that `serve_blocks` started; they live until `stop`, or until this process ends."""

    def __init__(self, name: str, actors: Sequence[Any]) -> None:
        self.name = name
        self.actors = list(actors)

    def wait(self, timeout: float = 600.0) -> None:
        """Until all have loaded their blocks. Raises `RemoteError` with what kept one from it.

        Where one cannot load its blocks, all are ended.
        """
        answers = [actor.status.remote() for actor in self.actors]
        try:
            ray.get(answers, timeout=timeout)
        except GetTimeoutError as error:
            _, missing = ray.wait(answers, num_returns=len(answers), timeout=0)
            raise RemoteError(
                f"{self.name}: {len(missing)} of {len(answers)} servers have not started in {timeout:g} s; they are "
                "waiting for Ray to reserve resources, or still loading"
            ) from error
        except RayError as error:
            if getattr(error, "actor_init_failed", False):
                self.stop()  # or their name stays taken
            reason = str(error).strip().rpartition("\n")[2]  # what comes before is how Ray got there
            raise RemoteError(f"{self.name}: a server did not start: {reason}") from error

    def stop(self) -> None:
        """End them, for all clients."""
        _started.pop(self.name, None)
        for actor in self.actors:
            ray.kill(actor)


def serve_blocks(config: ServeConfig | None = None, **settings: Any) -> Servers:
    """Start servers for the blocks of a model: those of ``config``, or of the fields of one.

    Starts a local Ray where none is joined yet. Raises `ValueError` where such servers run already, or cannot be so
    many, and `NotImplementedError` for a multimodal model.
    """
    config = config or ServeConfig(**settings)
    own = AutoConfig.from_pretrained(config.model, revision=config.revision or "main")
    if is_multimodal(own):
        raise NotImplementedError(
            f"model: expected a language model alone, got {config.model}, which is multimodal ({own.model_type})"
        )
    spans = config.spans_of(own.num_hidden_layers)
    join()
    name = config.name or config.model
    if name in _running():
        raise ValueError(f"name: expected one that no servers have, got {name!r}, which some have")
    options: dict[str, Any] = {"concurrency_groups": {"beside": 1}}
    kind: Any = ray.remote(**options)(BlockServer)
    _warn_of_what_lacks(config, len(spans) * config.replicas)
    actors = [
        kind.options(
            name=_actor_name(name, first, last, replica),
            namespace=NAMESPACE,
            num_cpus=config.cpus,
            num_gpus=config.gpus,
            resources=config.resources,
            max_restarts=config.max_restarts,
            scheduling_strategy="SPREAD",
        ).remote(config.model, first, last, config.dtype, config.device, config.limits, config.revision)
        for first, last in spans
        for replica in range(config.replicas)
    ]
    _started[name] = actors
    return Servers(name, actors)


def _warn_of_what_lacks(config: ServeConfig, count: int) -> None:
    """Ray lets a server wait, without a word, for what no machine has."""
    there = ray.cluster_resources()
    for name, each in {"CPU": config.cpus, "GPU": config.gpus, **config.resources}.items():
        if each and count * each > there.get(name, 0.0):
            _logger.warning(
                "%d servers reserve %g %s, and this cluster has %g: some will wait until there is more (cpus, gpus and "
                "resources of a --config say what each reserves)", count, count * each, name, there.get(name, 0.0)
            )  # fmt: skip


def join(address: str | None = None) -> bool:
    """Join the Ray cluster at ``address``; nothing where one is joined.

    By default that of the environment (RAY_ADDRESS), or a new one on this machine. ``"auto"``: the one that runs here.
    Returns whether it started one. Raises `RemoteError` where there is none.
    """
    if ray.is_initialized():
        return False
    # without an address, Ray would join whatever cluster runs on this machine, and models would be sent there
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address=address, namespace=NAMESPACE, include_dashboard=False, log_to_driver=False)
    except ConnectionError as error:
        raise RemoteError(f"address: expected a Ray cluster at {address!r}, got {error}") from None
    return address == "local"


def connect(name: str, retries: Retries | None = None) -> Link:
    """A link to the servers that are named ``name``. Raises `RemoteError` where they do not serve all blocks."""
    join("auto")
    retries = retries or Retries()
    name = _absolute(name)
    found = _running().get(name)
    if not found:
        raise RemoteError(
            f"no servers are named {name!r}; start them with `ptune serve-blocks --model {name}`, or join the cluster "
            "that they are in (RAY_ADDRESS)"
        )
    spans = [
        Replicas(first, last, [partial(ray.get_actor, actor, namespace=NAMESPACE) for actor in actors])
        for (first, last), actors in sorted(found.items())
    ]
    states = [_status_of(span, retries) for span in spans]
    ends = [0, *(span.last for span in spans)]
    if ends != [*(span.first for span in spans), states[0]["num_layers"]]:
        raise RemoteError(f"{name}: expected servers of blocks 0 to {states[0]['num_layers'] - 1}, got {sorted(found)}")
    if len({state["fingerprint"] for state in states}) > 1:
        raise RemoteError(f"{name}: expected servers of one model, got several, by the configs that they loaded")
    for span, state in zip(spans, states, strict=True):
        span.identity = state["identity"]
    return Link(spans, retries, states)


def status(name: str | None = None, timeout: float = 5.0) -> list[dict[str, Any]]:
    """What each server says of itself, with ``state``: ``"ready"``, or why it did not answer in time."""
    join("auto")
    rows: list[dict[str, Any]] = []
    for served, spans in sorted(_running().items()):
        if name is not None and _absolute(name) != served:
            continue
        for (first, last), actors in sorted(spans.items()):
            rows += [
                {"name": served, "first": first, "last": last, "actor": actor, **_answer(actor, timeout)}
                for actor in actors
            ]
    return rows


def _answer(actor: str, timeout: float) -> dict[str, Any]:
    try:
        handle: Any = ray.get_actor(actor, namespace=NAMESPACE)
        return {"state": "ready", **ray.get(handle.status.remote(), timeout=timeout)}
    except GetTimeoutError:
        return {"state": f"no answer in {timeout:g} s"}
    except (RayError, ValueError) as error:
        return {"state": type(error).__name__}


def _status_of(span: Replicas, retries: Retries) -> dict[str, Any]:
    def ask(leg: Leg, _: Any) -> list[Any]:
        answer = leg.server.status.remote()
        return [answer, answer]

    return Relay([Leg(span, span.first, span.last)], retries, lambda: None, ask).wait()[0]


def _running() -> dict[str, dict[tuple[int, int], list[str]]]:
    """Names of actors by the blocks that they have, by the name that they serve."""
    found: dict[str, dict[tuple[int, int], list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in ray.util.list_named_actors(all_namespaces=True):
        parts = entry["name"].rsplit("|", 3)
        if entry["namespace"] == NAMESPACE and len(parts) == 4:
            found[parts[0]][int(parts[1]), int(parts[2])].append(entry["name"])
    return found


def _absolute(name: str) -> str:
    """A folder's path, by which its servers are named wherever they are asked for from."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def _actor_name(name: str, first: int, last: int, replica: int) -> str:
    return f"{name}|{first}|{last}|{replica}"


def _said(kinds: tuple[type, ...]) -> str:
    return " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)


def _made_of(kind: Any, where: str, values: dict[str, Any]) -> Any:
    known = {entry.name for entry in fields(kind)}
    if unknown := values.keys() - known:
        raise ValueError(f"{where}: expected some of {', '.join(sorted(known))}, got {sorted(unknown)}")
    if kind is ServeConfig and "model" not in values:
        raise ValueError(f"{where}: expected a model")
    return kind(**values)
