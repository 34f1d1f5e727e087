"""A local Ray cluster, and tiny models that it serves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model.families import FAMILIES

from .common import LAYERS

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SERVED = [("llama", 1), ("llama", 2), ("llama", 4), ("qwen3", 1), ("mistral", 1), ("gpt2", 1), ("bert", 2)]


@pytest.fixture(scope="session")
def cluster():
    """Ray on this machine, for all tests of blocks on servers; further nodes can be added."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 * 2**20}
    made = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=made.address, namespace="ptune", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """``folder_of(family)``: a checkpoint of random weights, in shards, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            family, config = FAMILIES[name], FAMILIES[name].config()
            config.num_hidden_layers = LAYERS
            if getattr(config, "layer_types", None) is not None:
                config.layer_types = (list(config.layer_types) * LAYERS)[:LAYERS]
            loader: Any = transformers.AutoModelForCausalLM if family.causal else transformers.AutoModelForMaskedLM
            with torch.random.fork_rng():
                torch.manual_seed(len(name))
                model = loader.from_config(config)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which hide mistakes
                            parameter.add_(torch.randn_like(parameter) * 0.2)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name], max_shard_size=20_000)
        return made[name]

    return make


@pytest.fixture(scope="session")
def serve(cluster, folder_of):
    """``serve(family, servers)``: the name under which that many servers have its blocks."""
    from ptune.remote import serve_blocks

    # all at once, as each spends most of its start on imports
    started = {
        (family, servers): serve_blocks(
            model=str(folder_of(family)), servers=servers, name=f"{family} on {servers}", cpus=0
        )
        for family, servers in SERVED
    }
    yield lambda family, servers: started[family, servers].name
    for servers in started.values():
        servers.stop()
