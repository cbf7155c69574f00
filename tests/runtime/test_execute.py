"""Programs as they are run: operands, results, frees and errors of single steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx

from memplan.lower import Binding, Lowered
from memplan.problem import Phase
from memplan.program import Program, Step, StepKind
from memplan.runtime.execute import Executable
from memplan.runtime.views import looked_at


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def executable(graph: fx.Graph, module: torch.nn.Module | None = None) -> Executable:
    """One slot a node and one step a node, nothing freed."""
    *nodes, output = graph.nodes
    slot_of = {node: slot for slot, node in enumerate(nodes)}
    inputs = sum(node.op == "placeholder" for node in nodes)
    bindings = tuple(Binding(node, ((-1, slot_of[node]),)) for node in nodes[inputs:])
    kinds = [StepKind.RUN if looked_at(node) is None else StepKind.VIEW for node in nodes[inputs:]]
    steps = tuple(Step(kind, node.name, Phase.FORWARD) for kind, node in zip(kinds, nodes[inputs:], strict=True))
    lowered = Lowered(Program((), (), steps, ()), bindings, slot_of, inputs, tuple(output.args[0]))
    return Executable(fx.GraphModule(module or torch.nn.Module(), graph), lowered)


def collected(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def ran(build: Callable[[fx.Graph, fx.Node], fx.Node], value: Any) -> Any:
    graph = fx.Graph()
    graph.output((build(graph, graph.placeholder("x")),))
    return executable(graph)([value])[0]


@pytest.mark.parametrize(
    "build",
    [
        lambda x: [x, 1, [x, None]],
        lambda x: (x,),
        lambda x: {"left": x, "right": (2, x)},
        lambda x: slice(x, None, 2),
        lambda x: [1, (2.5, float("inf")), torch.float32],
        lambda x: torch.device("cpu"),
    ],
)
def test_arguments_arrive_as_the_graph_has_them(build: Callable[[Any], Any]) -> None:
    expected = build(7)
    args, kwargs = ran(lambda g, x: g.call_function(collected, (build(x), x), {"given": build(x)}), 7)
    assert args == (expected, 7)
    assert kwargs == {"given": expected}


def test_constants_are_read_from_where_they_lie() -> None:
    module = torch.nn.Module()
    module.inner = torch.nn.Module()
    module.inner.constant = torch.arange(3.0)
    graph = fx.Graph()
    x = graph.placeholder("x")
    constant = graph.get_attr("inner.constant")
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, constant)), None))
    assert executable(graph, module)([torch.ones(3)])[0].tolist() == [0, 1, 2]


def test_an_error_names_the_step_and_holds_no_tensor() -> None:
    with pytest.raises(RuntimeError) as caught:
        ran(lambda g, x: g.call_function(torch.ops.aten.view.default, (x, [5])), torch.zeros(4))
    assert [entry.name for entry in caught.traceback][-1] == "view_default"
    assert not any(
        isinstance(v, torch.Tensor) for entry in caught.traceback[-2:] for v in entry.frame.f_locals.values()
    )


@pytest.mark.usefixtures("no_collection")
def test_a_program_that_nobody_holds_is_gone_with_its_constants() -> None:
    module = torch.nn.Module()
    module.constant = torch.arange(3.0)
    graph = fx.Graph()
    graph.output((graph.call_function(torch.ops.aten.neg.default, (graph.get_attr("constant"),)),))
    run = executable(graph, module)
    constant, functions = weakref.ref(module.constant), weakref.ref(run._plain.functions[1])
    run([])
    del run
    assert functions() is None
    del module, graph
    gc.collect()
    assert constant() is None
