"""Servers that are killed, stopped or emptied change no result, and nothing is left behind.

``PTUNE_KILLS`` is how many servers `test_random_kills` kills (10).
"""

import gc
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model.common import close
from safetensors.torch import load_file, save_file

pytest.importorskip("ray", reason="ray is not installed")

import ray

from ptune import remote
from ptune.remote import sequential, session, shared
from ptune.remote.wire import Prompts, Request, SessionGone, Shared, TooLarge, to_array

from .common import batch_of, give, settings_for

RETRIES = remote.Retries(attempts=30, first_delay=0.25, max_delay=4.0, timeout=60.0)
SEED = 7


@pytest.fixture(scope="module")
def servers(cluster, folder_of):
    """Two servers for each half of a model."""
    started = remote.serve_blocks(model=str(folder_of("llama")), servers=2, replicas=2, name="replicated", cpus=0)
    started.wait()
    yield started
    started.stop()


def all_serve(servers):
    """Waits for those that an earlier test killed."""
    for _ in range(300):
        try:
            return servers.wait()
        except remote.RemoteError:
            time.sleep(0.2)
    raise TimeoutError("not all servers have restarted")


def model_on(servers, folder, retries=RETRIES, **rest):
    torch.manual_seed(SEED)
    model = remote.AutoDistributedModelForCausalLM.from_pretrained(
        folder, servers=servers, retries=retries, **settings_for("add"), **rest
    )
    give(model, model)
    return model.eval()


def pid_of(server):
    """Of the process that is alive, or will be when it has been restarted."""
    for _ in range(100):
        try:
            return ray.get(server.status.remote(), timeout=60)["pid"]
        except ray.exceptions.RayActorError:
            time.sleep(0.2)
    raise AssertionError("a killed server was not restarted")


class Killer:
    """Kills the server that the ``after``-th message goes to, when it has been sent."""

    def __init__(self, monkeypatch):
        self.after = None
        self.killed = 0
        for module in (sequential, session, shared):
            monkeypatch.setattr(module, "call", self.call)
        self._call = remote.link.call

    def call(self, server, method, returns, *args):
        pid = None
        if self.after is not None:
            self.after -= 1
            if self.after < 0:
                self.after, pid = None, pid_of(server)
        made = self._call(server, method, returns, *args)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            self.killed += 1
        return made


def step(model, batch):
    """Loss and gradients of one training step."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.prompt_parameters())]


def states_of(servers):
    """What each server says of itself, when all have been restarted."""
    for actor in servers.actors:
        pid_of(actor)
    return [ray.get(actor.status.remote()) for actor in servers.actors]


def bytes_stored():
    """In Ray's object stores."""
    return ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"]


def test_random_kills(servers, folder_of, monkeypatch):
    model = model_on(servers, folder_of("llama"), micro_batch=3)
    ids, mask = batch_of("left")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = step(model, batch)
    texts = [model.generate(ids, attention_mask=mask, num_beams=beams, **how) for beams in (1, 2)]
    gc.collect()  # graphs and sessions that nobody has a hold of
    time.sleep(1.0)
    stored = bytes_stored()
    killer, choose = Killer(monkeypatch), random.Random(SEED)
    kills = int(os.environ.get("PTUNE_KILLS", "6"))
    while killer.killed < kills:
        begun = time.monotonic()
        beams = killer.killed % 3
        # of a step's 12 messages, half are its backward's; a generation has 18
        killer.after = choose.randrange(12 if beams == 0 else 18)
        if beams == 0:
            for got, other in zip(step(model, batch), expected, strict=True):
                close(got, other)
        else:
            got = model.generate(ids, attention_mask=mask, num_beams=beams, **how)
            assert got.tolist() == texts[beams - 1].tolist()
        assert killer.after is None
        assert time.monotonic() - begun < 120
    gc.collect()
    assert sum(row["kept"] + row["sessions"] for row in states_of(servers)) == 0
    for _ in range(100):  # Ray frees objects in its own time
        if bytes_stored() <= stored:
            break
        time.sleep(0.1)
    assert bytes_stored() <= stored


def test_both_replicas_killed(servers, folder_of):
    model = model_on(servers, folder_of("llama"))
    ids, mask = batch_of("right")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    expected = step(model, batch)
    model.zero_grad()
    loss = model(**batch).loss
    for actor in servers.actors[2:]:
        os.kill(pid_of(actor), signal.SIGKILL)
    loss.backward()
    for got, other in zip([loss, *(p.grad for p in model.prompt_parameters())], expected, strict=True):
        close(got, other)
    assert sum(row["recomputed"] for row in states_of(servers)) > 0


def test_a_slow_server_is_left(servers, folder_of):
    model = model_on(servers, folder_of("llama"), remote.Retries(attempts=4, timeout=1.0))
    ids, _ = batch_of("none")
    with torch.no_grad():
        expected = model(ids).logits
        slow = pid_of(model.remote.link.spans[1].server)
        os.kill(slow, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            close(model(ids).logits, expected)
            assert 1.0 <= time.monotonic() - begun < 20
        finally:
            os.kill(slow, signal.SIGCONT)


def test_a_request_that_takes_long_is_waited_for(servers):
    """Longer than ``timeout``, in which a server has to answer, and not to have computed."""
    hidden = torch.randn(300, 200, 24)
    blocks = remote.RemoteSequential(remote.connect(servers.name))
    with torch.no_grad():
        begun = time.monotonic()
        expected = blocks(hidden)
        took = time.monotonic() - begun
        blocks.link.retries = remote.Retries(attempts=1, timeout=took / 4)
        close(blocks(hidden), expected)


def test_a_session_that_is_gone_costs_no_pause(servers, monkeypatch):
    blocks, hidden = remote.RemoteSequential(remote.connect(servers.name)), torch.randn(2, 6, 24)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"paused for {seconds} s"))
    with blocks.inference_session() as gone:
        parts = [gone.step(hidden[:, :5])]
        for server, name in gone._places.values():
            ray.get(server.close.remote(name))
        parts.append(gone.step(hidden[:, 5:]))
    close(torch.cat(parts, 1), blocks(hidden))


def test_servers_of_the_same_name_are_found_again(cluster, folder_of):
    """What a backward that failed for good has left on others is forgotten; later calls go to the new servers."""
    how = {"model": str(folder_of("llama")), "servers": 2, "name": "again", "cpus": 0, "max_restarts": 0}
    started = remote.serve_blocks(**how)
    started.wait()
    model = model_on(started, folder_of("llama"), remote.Retries(attempts=2, first_delay=0.1, timeout=20.0))
    ids, _ = batch_of("none")
    loss = model(ids, labels=ids).loss
    os.kill(pid_of(started.actors[1]), signal.SIGKILL)
    with pytest.raises(remote.RemoteError, match="2 attempts failed"):
        loss.backward()
    value = loss.item()
    del loss
    gc.collect()
    for _ in range(50):
        if ray.get(started.actors[0].status.remote())["kept"] == 0:
            break
        time.sleep(0.1)
    else:
        pytest.fail("activations are still kept")
    started.stop()
    started = remote.serve_blocks(**how)
    started.wait()
    try:
        close(model(ids, labels=ids).loss, torch.tensor(value))
    finally:
        started.stop()


def test_a_server_that_comes_back_with_other_weights(cluster, folder_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("llama"), folder)
    started = remote.serve_blocks(model=str(folder), name="changing", cpus=0)
    started.wait()
    model, (ids, _) = model_on(started, folder), batch_of("none")
    model(ids, use_cache=False)
    for file in folder.glob("*.safetensors"):
        save_file({name: its + 1 for name, its in load_file(file).items()}, file, metadata={"format": "pt"})
    os.kill(pid_of(started.actors[0]), signal.SIGKILL)
    try:
        with pytest.raises(ValueError, match=r"expected the weights, config and dtype .*; load the model again"):
            model(ids, use_cache=False)
    finally:
        started.stop()


def test_servers_of_two_models_are_no_servers_of_one(servers, monkeypatch):
    other = iter("ab")
    stated = remote.serve._status_of
    monkeypatch.setattr(remote.serve, "_status_of", lambda *given: stated(*given) | {"fingerprint": next(other)})
    with pytest.raises(remote.RemoteError, match="expected servers of one model, got several"):
        remote.connect(servers.name)


def test_another_cluster_than_the_servers(servers):
    blocks = remote.RemoteSequential(remote.connect(servers.name))
    for span in blocks.link.spans:
        span.where = "elsewhere", "01000000"
    with pytest.raises(remote.RemoteError, match="expected the Ray cluster of the servers, got another"):
        blocks(torch.randn(1, 2, 24))


def lost_object(cluster):
    """A reference to what was on a machine that is gone."""
    gone = cluster.add_node(num_cpus=1, resources={"gone": 1}, object_store_memory=80 * 2**20)
    reference = ray.remote(num_cpus=0, resources={"gone": 1}, max_retries=0)(lambda: np.zeros(200_000)).remote()
    ray.wait([reference], fetch_local=False)
    cluster.remove_node(gone)
    with pytest.raises(ray.exceptions.ObjectLostError):
        ray.get(reference, timeout=60)
    return reference


@pytest.mark.parametrize("lost", ["hidden", "rows", "rows elsewhere", "parts"])
def test_lost_objects(lost, cluster, servers, monkeypatch):
    """A backward, whose servers have forgotten what they kept, does not find what stood between them either.

    What its caller has changed since is not what it begins again with.
    """
    blocks = remote.RemoteSequential(remote.connect(servers.name, RETRIES), micro_batch=2)
    leaves = [torch.randn(*shape, 24, requires_grad=True) for shape in ((3, 5), (4, 2), (1, 2))]
    positions = torch.arange(2, 7)[None]

    def forward():
        return blocks(leaves[0], leaves[1], None, positions, mode="add", shared=leaves[2])

    expected = torch.autograd.grad(forward().square().sum(), leaves)
    passes = []
    make = sequential._Pass.__init__

    def remember(run, *args):
        passes.append(run)
        make(run, *args)

    monkeypatch.setattr(sequential._Pass, "__init__", remember)
    output = forward()
    chunks, rows = passes[0].chunks, passes[0].shared[0]
    if lost == "rows elsewhere":
        rows.legs[1].turn_away()  # to a server that never had them
    else:
        for server, keep in [*chunks[0]._outstanding, *((holder, rows._name) for holder in rows._holders)]:
            ray.get(server.forget.remote(keep))
    with torch.no_grad():
        for given in (*leaves, positions):
            given.zero_()
    gone = lost_object(cluster)
    if lost == "parts":
        finish = chunks[1].finish_backward

        def finish_and_lose(relay):
            results = finish(relay)
            chunks[1].parts[2] = gone
            return results

        monkeypatch.setattr(chunks[1], "finish_backward", finish_and_lose)
    else:
        (chunks[0] if lost == "hidden" else rows).relay.states[1] = gone
    for gradient, other in zip(torch.autograd.grad(output.square().sum(), leaves), expected, strict=True):
        close(gradient, other)


def test_a_replay_begins_with_what_was_sent(cluster, servers):
    """One server forgets a session, and the rows that those before it shared are lost."""
    blocks = remote.RemoteSequential(remote.connect(servers.name, remote.Retries(attempts=3)))
    hidden, rows, positions = torch.randn(2, 6, 24), torch.randn(1, 2, 24), torch.arange(2, 7)[None]
    whole, given = blocks(hidden, shared=rows), hidden[:, :5].clone()
    with blocks.inference_session() as session:
        parts = [session.step(given, position_ids=positions, shared=rows)]
        assert not session._shared[0]._holders  # caches have the keys and values now
        for tensor in (given, positions, rows):
            tensor.zero_()
        server, name = session._places[2]
        ray.get(server.close.remote(name))
        session._shared[0].relay.states[0] = lost_object(cluster)
        parts.append(session.step(hidden[:, 5:], position_ids=torch.tensor([[7]])))
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("given", [([0, 1, 2], None, None), (None, [7], [9])], ids=["first", "later"])
@pytest.mark.parametrize("count", [0, 2], ids=["text", "shared"])
def test_a_replay_has_the_positions_that_some_steps_lack(count, given, servers):
    blocks = remote.RemoteSequential(remote.connect(servers.name))
    hidden, rows = torch.randn(2, 5, 24), torch.randn(1, count, 24) if count else None
    positions = [None if numbers is None else torch.tensor(numbers)[None] + count for numbers in given]
    columns = torch.arange(count, count + 5)[None].split((3, 1, 1), 1)
    whole = [own if own is not None else default for own, default in zip(positions, columns, strict=True)]
    expected = blocks(hidden, position_ids=torch.cat(whole, 1), shared=rows)
    parts = []
    with blocks.inference_session() as session:
        for states, position_ids in zip(hidden.split((3, 1, 1), 1), positions, strict=True):
            if session.length == count + 4:
                server, name = session._places[2]
                ray.get(server.close.remote(name))
            first = None if session.length else rows
            parts.append(session.step(states, position_ids=position_ids, shared=first))
    close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("how", ["call", "session"])
def test_shared_rows_go_on_at_another_server(how, servers, monkeypatch):
    """Where the first one dies of them: what later servers are told to make them of is of the new one."""
    all_serve(servers)  # so that there is another
    blocks = remote.RemoteSequential(remote.connect(servers.name, remote.Retries(attempts=4, timeout=30.0)))
    hidden, rows = torch.randn(2, 5, 24), torch.randn(1, 2, 24)
    expected, killer = blocks(hidden, shared=rows), Killer(monkeypatch)
    killer.after = 0
    if how == "call":
        close(blocks(hidden, shared=rows), expected)
    else:
        with blocks.inference_session() as begun:
            close(begun.step(hidden, shared=rows), expected)
    assert killer.killed == 1


def test_a_step_that_failed_can_be_made_again(servers, monkeypatch):
    """Where it has selected rows, and the first of two servers has made it."""
    blocks = remote.RemoteSequential(remote.connect(servers.name))
    hidden, rows = torch.randn(3, 6, 24), torch.tensor([2, 2, 0])
    expected = blocks(torch.cat([hidden[rows, :5], hidden[:, 5:]], 1))
    call = session.call

    def interrupted(server, method, returns, request, *args):
        if request.first:
            raise KeyboardInterrupt
        return call(server, method, returns, request, *args)

    with blocks.inference_session() as begun:
        begun.step(hidden[:, :5])
        monkeypatch.setattr(session, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begun.step(hidden[:, 5:], rows=rows)
        monkeypatch.undo()
        close(begun.step(hidden[:, 5:], rows=rows), expected[:, 5:])


def test_nobody_is_left(cluster, folder_of):
    alone = remote.serve_blocks(
        model=str(folder_of("llama")), spans=[[0, 1], [1, 4]], name="mortal", cpus=0, max_restarts=0
    )
    try:
        alone.wait()
        blocks = remote.RemoteSequential(remote.connect("mortal", remote.Retries(3, 0.1, 0.2, 30.0)))
        hidden = torch.randn(1, 3, 24)
        blocks(hidden)
        os.kill(pid_of(alone.actors[1]), signal.SIGKILL)
        with pytest.raises(remote.RemoteError, match=r"blocks 1 to 3: 3 attempts failed: (ActorDiedError.*){3}"):
            blocks(hidden)
    finally:
        alone.stop()


def test_large_batches_are_split(servers, folder_of):
    blocks = remote.RemoteSequential(remote.connect("replicated"))
    hidden = torch.randn(5, 7, 24)
    expected = blocks(hidden)
    requests = sum(row["requests"] for row in states_of(servers))
    blocks.link.max_tokens = 15
    close(blocks(hidden), expected)
    assert sum(row["requests"] for row in states_of(servers)) == requests + 3 * 2
    blocks.link.max_tokens = 6
    with pytest.raises(TooLarge, match=r"at most 6 tokens in a row \(max_tokens\), got 7"):
        blocks(hidden)
    with pytest.raises(TooLarge, match="at most 6 tokens in all"):
        blocks.inference_session().step(hidden)


# One server, in this process: what it admits, keeps and forgets.


@pytest.fixture
def server_with(cluster, folder_of):
    return lambda dtype="auto", **limits: remote.BlockServer(
        str(folder_of("llama")), 0, 2, dtype, limits=remote.ServerLimits(**limits)
    )


def request_for(hidden, **rest):
    return Request(0, 2, "float32", tuple(hidden.shape[:2]), **rest)


def test_kept_activations_have_a_budget(server_with):
    hidden = [torch.randn(2, 5, 24) for _ in range(3)]
    gradient = torch.randn(2, 5, 24)

    def run(budget):
        server = server_with(kept_bytes=budget)
        for i, states in enumerate(hidden):
            server.forward(request_for(states), to_array(states, "float32"), f"call {i}")
        kept = server.status()
        assert kept["kept_bytes"] <= budget
        gradients = [
            server.backward(request_for(states), gradient.numpy(), f"call {i}", [ray.put(states.numpy())])[0]
            for i, states in enumerate(hidden)
        ]
        assert server.status()["recomputed"] == 3 - kept["kept"]
        assert server.status()["kept_bytes"] == 0
        return kept, gradients

    enough, expected = run(10**9)
    assert enough["kept"] == 3
    for budget, count in ((enough["kept_bytes"] // 2, 1), (0, 0)):
        kept, gradients = run(budget)
        assert kept["kept"] == count
        assert all(np.array_equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_shared_rows_have_a_budget(server_with):
    """Keys and values that do not fit are made again, whenever they are needed, and are the same."""
    rows, deep = np.random.randn(1, 2, 24).astype(np.float32), np.random.randn(2, 2, 24).astype(np.float32)
    hidden = [np.random.randn(2, 5, 24).astype(np.float32) for _ in range(2)]
    alone = Request(0, 2, "float32", (1, 2), prompts=Prompts("client", 0, 2, [ray.put(deep)]), mode="add")
    given = Shared("rows", alone, [ray.put(rows)])

    def run(budget):
        server = server_with(kept_bytes=budget)
        request = request_for(hidden[0], shared=given, mask=np.ones((2, 7), bool))
        made, _ = server.share(given, rows)
        for i, states in enumerate(hidden):
            server.forward(request, states, f"call {i}")
        back = [server.backward(request, np.ones_like(h), f"call {i}", [ray.put(h)]) for i, h in enumerate(hidden)]
        parts = [ray.put(part) for _, part, _ in back]
        kept = server.status()["kept"]
        *ends, _ = server.backward_shared(given, np.ones_like(made), parts)
        assert server.status()["kept_bytes"] == 0
        return kept, [made, *(own for own, _, _ in back), *ends]

    (kept, expected), (none, got) = run(10**9), run(0)
    assert (kept, none) == (1, 0)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("forgotten", [False, True], ids=["kept", "forgotten"])
def test_a_gradient_that_nobody_wants_is_not_computed(forgotten, server_with):
    rows, hidden = (np.random.randn(*shape, 24).astype(np.float32) for shape in ((1, 2), (2, 5)))
    given = Shared("rows", Request(0, 2, "float32", (1, 2)), [ray.put(rows)])
    found = []
    for wanted in (True, False):
        server = server_with()
        request = request_for(hidden, shared=given, mask=np.ones((2, 7), bool), differentiable=wanted)
        server.forward(request, hidden, "call")
        kept = server.status()["kept_bytes"]
        if forgotten:
            server.forget("call")
        found.append((kept, *server.backward(request, np.ones_like(hidden), "call", [ray.put(hidden)])))
    (everything, own, expected, _), (less, none, got, _) = found
    assert own.shape == hidden.shape
    assert none is None
    assert less < everything
    for array, other in zip(got, expected, strict=True):
        close(torch.from_numpy(array), torch.from_numpy(other))


def test_gradients_of_shared_rows_are_summed_unrounded(server_with):
    server = server_with("bfloat16")
    rows, hidden = (np.random.randn(*shape, 24).astype(np.float32) for shape in ((1, 2), (4, 5)))
    given = Shared("rows", Request(0, 2, "float32", (1, 2)), [ray.put(rows)])
    request = request_for(hidden, shared=given, mask=np.ones((4, 7), bool))
    part = server.backward(request, np.ones_like(hidden), "call", [ray.put(hidden)])[1]
    rounded = [torch.from_numpy(array).bfloat16().float().numpy() for array in part]
    assert not any(np.array_equal(array, own) for array, own in zip(part, rounded, strict=True))

    def back(*factors):
        parts = [ray.put([array * np.float32(factor) for array in rounded]) for factor in factors]
        return server.backward_shared(given, None, parts)[0]

    # each of the small ones would be lost in half of the first
    assert np.array_equal(back(1, *[2**-9] * 8), back(1 + 2**-6))


def test_what_a_vanished_client_left_is_dropped(server_with, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("ptune.remote.keeping.time", clock)
    now = 0.0
    server = server_with(idle_seconds=60)
    hidden = np.zeros((1, 3, 24), np.float32)
    prompts = Prompts("client", 0, 2, [ray.put(np.zeros((2, 2, 24), np.float32))])
    server.forward(request_for(hidden, prompts=prompts), hidden, "call")
    server.step(request_for(hidden), hidden, "session", 0)
    now = 59.0
    kept = server.status()
    assert min(kept["kept_bytes"], kept["session_bytes"], kept["prompt_bytes"]) > 0
    now = 61.0
    kept = server.status()
    assert max(kept["kept_bytes"], kept["session_bytes"], kept["prompt_bytes"]) == 0


def test_no_server_waits_without_end(server_with, monkeypatch):
    monkeypatch.setattr("ptune.remote.server._FETCH_SECONDS", 0.2)
    late = ray.remote(num_cpus=0)(lambda: time.sleep(30)).remote()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        server_with().backward(request_for(HIDDEN), HIDDEN, "a call that it has forgotten", [late])


def test_sessions_stand_where_the_client_thinks(server_with):
    server, hidden = server_with(), np.zeros((1, 3, 24), np.float32)
    with pytest.raises(SessionGone):
        server.step(request_for(hidden), hidden, "session", 3)
    server.step(request_for(hidden), hidden, "session", 0)
    with pytest.raises(SessionGone):
        server.step(request_for(hidden), hidden, "session", 2)
    with pytest.raises(TooLarge, match="session_bytes"):
        server_with(session_bytes=100).step(request_for(hidden), hidden, "session", 0)


def test_a_step_that_failed_leaves_no_session(server_with, monkeypatch):
    """Its rows may have been selected, and would be again."""
    server, hidden = server_with(), np.zeros((2, 3, 24), np.float32)
    server.step(request_for(hidden), hidden, "session", 0)

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(server.span.body, "forward", fail)
    with pytest.raises(MemoryError):
        server.step(request_for(hidden), hidden, "session", 3, np.array([1, 1]))
    monkeypatch.undo()
    with pytest.raises(SessionGone):
        server.step(request_for(hidden), hidden, "session", 3, np.array([1, 1]))


HIDDEN = np.zeros((2, 3, 24), np.float32)


@pytest.mark.parametrize(
    ("changes", "hidden", "message"),
    [
        ({}, HIDDEN.astype(np.float64), "hidden: expected float32 .*, got float64"),
        ({}, HIDDEN[:1], r"hidden: expected float32 of shape \(2, 3, 24\), got float32 of shape \(1, 3, 24\)"),
        ({}, torch.zeros(2, 3, 24), "hidden: expected an array"),
        ({"first": 1, "last": 3}, HIDDEN, "blocks: expected a range within 0 to 2"),
        ({"dtype": "complex64"}, HIDDEN, "dtype: expected one of"),
        ({"shape": (2, -3)}, HIDDEN, "shape: expected"),
        ({"mode": "replace"}, HIDDEN, "mode: expected"),
        ({"differentiable": None}, HIDDEN, "differentiable: expected True or False, got None"),
        ({"mask": np.ones((2, 3))}, HIDDEN, "mask: expected bool"),
        ({"mask": np.ones((2, 2), bool)}, HIDDEN, r"mask: expected bool of shape \(2, 3\), got bool of shape \(2, 2\)"),
        ({"mask": np.ones((2, 4), bool)}, HIDDEN, r"mask: expected bool of shape \(2, 3\), got bool of shape \(2, 4\)"),
        ({"shape": (2, 0)}, HIDDEN[:, :0], "shape: expected at least one row and one column"),
        ({"shape": (0, 3)}, HIDDEN[:0], "shape: expected at least one row and one column"),
        ({"first": 1, "last": 1}, HIDDEN, "blocks: expected a range within 0 to 2"),
        ({"positions": np.ones((3, 3), np.int64)}, HIDDEN, "positions: expected int64"),
        ({"positions": np.ones((2, 3))}, HIDDEN, "positions: expected int64"),
        ({"positions": 3}, HIDDEN, "positions: expected an array"),
        ({"prompts": {}}, HIDDEN, "prompts: expected Prompts, got dict"),
        ({"prompts": Prompts("c", 0, 4, [])}, HIDDEN, "prompts: expected 1 to 3 rows, got 4"),
        ({"prompts": Prompts("c", 0, 0, [])}, HIDDEN, "prompts: expected 1 to 3 rows, got 0"),
        (
            {"prompts": Prompts("c", 0, 2, []), "starts": np.zeros(1, np.int32)},
            HIDDEN,
            r"starts: expected int32 of shape \(2,\)",
        ),
        (
            {"prompts": Prompts("c", 0, 2, []), "starts": np.zeros(2)},
            HIDDEN,
            "starts: expected int32 .*, got float64",
        ),
        (
            {"prompts": Prompts("c", 0, 2, []), "starts": np.array([0, 2], np.int32)},
            HIDDEN,
            "starts: expected columns 0 to 1",
        ),
        ({"shared": {}}, HIDDEN, "shared: expected Shared, got dict"),
        ({"shared": Shared("rows", None, [])}, HIDDEN, "shared: expected prompt rows and a Request"),
        (
            {"shared": Shared("rows", Request(0, 1, "float32", (1, 2)), [])},
            HIDDEN,
            "shared: expected rows for blocks 0",
        ),
        (
            {"shared": Shared("rows", Request(0, 2, "float32", (2, 2)), [])},
            HIDDEN,
            r"of shape \(1, m\), got .*\(2, 2\)",
        ),
        (
            {"shared": Shared("rows", Request(0, 2, "float16", (1, 2)), [])},
            HIDDEN,
            "shared: expected float32 or float64",
        ),
        (
            {"shared": Shared("rows", Request(0, 2, "float32", (1, 2), mask=np.ones((1, 2), bool)), [])},
            HIDDEN,
            "shared: expected rows at positions 0 to m - 1",
        ),
        (
            {"shared": Shared("rows", Request(0, 2, "float32", (1, 2), differentiable=False), [])},
            HIDDEN,
            "differentiable: expected True for shared rows",
        ),
        (
            {"shared": Shared("rows", Request(0, 2, "float32", (1, 2), prompts=Prompts("c", 0, 1, [])), [])},
            HIDDEN,
            "prompts: expected 2 rows, as shared has, got 1",
        ),
        (
            {"shared": Shared("rows", Request(0, 2, "float32", (1, 2)), []), "mask": np.ones((2, 4), bool)},
            HIDDEN,
            r"mask: expected bool of shape \(2, 5\)",
        ),
    ],
)
def test_the_door(changes, hidden, message, server_with):
    fields = {"first": 0, "last": 2, "dtype": "float32", "shape": (2, 3)} | changes
    with pytest.raises(ValueError, match=message):
        server_with().forward(Request(**fields), hidden)


def test_the_door_of_sessions(server_with):
    server = server_with()
    server.step(request_for(HIDDEN), HIDDEN, "session", 0)
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \(2, 6\), got bool of shape \(2, 3\)"):
        server.step(request_for(HIDDEN, mask=np.ones((2, 3), bool)), HIDDEN, "session", 3)
    server.step(request_for(HIDDEN, mask=np.ones((2, 6), bool)), HIDDEN, "session", 3)


def test_the_door_has_a_limit(server_with):
    with pytest.raises(TooLarge, match=r"at most 5 tokens \(max_tokens\), got 6"):
        server_with(max_tokens=5).forward(request_for(HIDDEN), HIDDEN)
    with pytest.raises(ValueError, match="request: expected a Request, got dict"):
        server_with().forward({}, HIDDEN)
    alone = Shared("rows", Request(0, 2, "float32", (1, 7)), [ray.put(np.zeros((1, 7, 24), np.float32))])
    with pytest.raises(TooLarge, match=r"shared: expected at most 6 tokens \(max_tokens\), got 7"):
        server_with(max_tokens=6).forward(request_for(HIDDEN, shared=alone, mask=np.ones((2, 10), bool)), HIDDEN)


def test_the_door_of_shared_rows(server_with):
    server, rows = server_with(), np.zeros((1, 2, 24), np.float32)
    given = Shared("rows", request_for(rows), [ray.put(rows)])
    request = request_for(HIDDEN, shared=given, mask=np.ones((2, 5), bool))
    server.step(request, HIDDEN, "session", 0)
    with pytest.raises(ValueError, match="shared: expected in the first step of a session alone"):
        server.step(request, HIDDEN, "session", 5)
    assert server.status()["sessions"] == 1
    nested = request_for(rows, shared=given, mask=np.ones((1, 4), bool))
    for shared_rows, array, message in (
        ({}, rows, "shared: expected Shared, got dict"),
        (Shared("other", nested, []), rows, "shared: expected prompt rows and a Request for them alone"),
        (Shared("other", request_for(rows), []), rows[:, :1], r"shared: expected float32 of shape \(1, 2, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            server.share(shared_rows, array)
    for parts, got in (([rows], "1"), ({}, "dict")):
        with pytest.raises(ValueError, match=f"parts: expected lists of 4 arrays, got {got}"):
            server.backward_shared(given, None, [ray.put(parts)])
    server.span.unshared = "of a reason"
    with pytest.raises(ValueError, match="shared: expected None, as this server shares no rows: of a reason"):
        server.share(Shared("other", request_for(rows), []), rows)
