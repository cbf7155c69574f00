import pytest

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import torch
import zoo
from rivals import Contender, prepare


@pytest.fixture
def one_thread():
    """Sums over scattered rows come out in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(step, workload):
    torch.manual_seed(1)
    loss = step(**workload.inputs)
    loss.backward()
    return loss, [p.grad for p in workload.model.parameters()]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_builds_the_same_step_twice_and_checkpoints_it(name, one_thread):
    dropout = zoo.MODELS[name].has_dropout
    plain, again = zoo.build(name, "small", dropout), zoo.build(name, "small", dropout)
    loss, expected = gradients(plain.model, plain)
    checkpointed_loss, got = gradients(prepare(Contender("eager", "pairs"), again, dropout), again)
    assert torch.equal(checkpointed_loss, loss)
    for g, e in zip(got, expected, strict=True):
        assert g is e is None or torch.equal(g, e)


def test_unknown_model_names_the_known_ones():
    with pytest.raises(KeyError, match="resnet50"):
        zoo.build("resnet51")
