"""How many trials share a GPU: the largest configuration is the one that is measured, and nothing is guessed."""

import pytest

from cluster.resources import Packing
from cluster.runtime import Node, Runtime
from search import packing
from search.packing import Memory, largest_configuration, measured_packing, packing_for
from search.spec import StudySpec
from search.study import run_study
from vae.config import DataConfig
from vae.data import Dataset, load_data
from vae.model import VAE, num_parameters

GIB = 2**30


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data(DataConfig(source="digits"))


def spec(**sections: object) -> StudySpec:
    return StudySpec.model_validate({"resources": {"gpus_per_trial": "auto"}, **sections})


def test_the_largest_configuration_has_the_most_weights_and_the_largest_batches(digits):
    space = {"latent_dim": [4, 32], "hidden_width": [16, 64], "activation": ["relu", "glu"], "batch_size": [32, 128]}
    model, train = largest_configuration(spec(space=space), digits.row_shape)
    others = [
        spec().model_config_for({"activation": name, "latent_dim": z, "hidden_width": width}, digits.row_shape)
        for name in ("relu", "glu") for z in (4, 32) for width in (16, 64)
    ]  # fmt: skip
    assert num_parameters(model) == max(map(num_parameters, others))
    assert (model.activation, model.latent_dim, model.hidden_dims[0]) == ("glu", 32, 64)  # a glu's layers are wider
    assert (train.batch_size, train.max_epochs) == (128, 1)
    assert VAE(model, digits.train).num_parameters == num_parameters(model)


def test_the_packing_fits_the_smallest_gpu_and_what_was_measured_is_said(digits, monkeypatch):
    found = [Memory(2 * GIB, 80 * GIB), Memory(3 * GIB, 16 * GIB)]
    monkeypatch.setattr(packing, "_measure", lambda spec, data, nodes: found)
    nodes = (Node("a", "large", "10.0.0.1", 32, 1), Node("b", "small", "10.0.0.2", 32, 1), Node("c", "cpu", "", 8))
    said: list[str] = []
    assert measured_packing(spec(), digits, Runtime("10.0.0.1:6379", nodes), said.append) == Packing(4)  # 16 / 3.6
    assert "2,048 of 81,920 MiB on large; 16 trials a GPU" in said[0]
    assert "3,072 of 16,384 MiB on small; 4 trials a GPU" in said[1]


def test_where_nothing_can_be_measured_each_trial_has_a_gpu_to_itself_and_why_is_said(digits, ray_here):
    """A GPU that Ray does not have, and one that torch cannot see."""
    (node,) = ray_here.nodes
    said: list[str] = []
    imagined = Runtime("here", (Node(node.node_id, node.host, node.address, 2, 1),))
    assert measured_packing(spec(), digits, imagined, said.append) == Packing(1)
    assert "not schedulable" in said[0]
    assert "one trial a GPU" in said[0]
    assert packing._peak_memory(spec(), digits) == "torch sees no GPU there"


def test_auto_without_a_gpu_is_a_search_on_cpus(ray_here, tmp_path, small_spec):
    values = small_spec.dump() | {"name": "auto", "resources": {"gpus_per_trial": "auto", "concurrency": 2}}
    values["storage"]["path"], values["budget"]["trials"] = str(tmp_path), 2
    said: list[str] = []
    study = run_study(StudySpec.model_validate(values), say=said.append)
    assert any("there is no GPU" in line for line in said)
    assert {(row["gpus"], tuple(row["gpu_ids"])) for row in study.attempts().to_pylist()} == {(0.0, ())}
    assert {row.device for row in study.rows()} == {"cpu"}


def test_gpus_that_nobody_asked_for_are_told_of(digits):
    said: list[str] = []
    with_gpu = Runtime("local", (Node("a", "here", "127.0.0.1", 8, 1),))
    assert packing_for(spec(resources={"gpus_per_trial": 0}), digits, with_gpu, said.append) is None
    assert "--gpus-per-trial auto" in said.pop()
    assert packing_for(spec(resources={"gpus_per_trial": 0.5}), digits, with_gpu, said.append) is None
    without = Runtime("local", (Node("a", "here", "127.0.0.1", 8, 0),))
    assert packing_for(spec(resources={"gpus_per_trial": 0}), digits, without, said.append) is None
    assert said == []


@pytest.mark.gpu
def test_a_share_of_a_gpu_is_measured_and_is_enough(digits):
    from cluster.runtime import ray_runtime

    said: list[str] = []
    with ray_runtime(num_cpus=2, num_gpus=1) as runtime:
        found = measured_packing(spec(), digits, runtime, said.append)
    assert found.trials == 2  # a core each
    assert "MiB on" in said[0]
