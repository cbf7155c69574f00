"""Graph files: what is read, and where an error is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memplan.errors import InputError
from memplan.graph_files import load_graph, parse_graph
from memplan.problem import Phase
from memplan.validate import check_sequence

NODE_LINK: dict[str, Any] = {
    "graph": {"order": ["a", "b", "c"]},
    "nodes": [
        {"id": "c", "cost_cpu": 3, "cost_ram": 30},
        {"id": "a", "cost_cpu": 1, "cost_ram": 10},
        {"id": "b", "duration": 2.5, "out_cost": 20},
    ],
    "links": [{"source": "a", "target": "b"}, {"0": "b", "1": "c"}],
}
JOINT: dict[str, Any] = {
    "buffers": [8, 16, 4],
    "outputs": [2, 1],
    "forward_outputs": [1],
    "ops": [
        {"name": "f", "op": "aten.f", "time_us": 5, "reads": [0], "writes": [1], "phase": "forward", "random": True},
        {"name": "g", "op": "aten.g", "time_us": 7, "reads": [1], "writes": [2], "phase": "backward", "random": False},
    ],
}


def test_a_node_link_graph_in_its_stored_order() -> None:
    graph = parse_graph(json.dumps(NODE_LINK))
    assert graph.ids == ("a", "b", "c")
    assert [op.reads for op in graph.problem.ops] == [(), (0,), (1,)]
    assert check_sequence(graph.problem, (0, 1, 2)) == (50, 6.5)
    assert graph.sequence_ids((0, 1, 0, 2)) == ["a", "b", "a", "c"]
    assert graph.sequence_ops(["a", "b", "c"]) == (0, 1, 2)
    with pytest.raises(InputError, match="no node 'x'"):
        graph.sequence_ops(["x"])


def test_without_an_order_ids_ascend() -> None:
    data = {
        "nodes": [{"name": k, "duration": 1, "out_cost": 1} for k in (10, 2, 0)],
        "links": [{"0": 0, "1": 2}, {"0": 2, "1": 10}],
    }
    assert parse_graph(json.dumps(data)).ids == (0, 2, 10)


def test_a_joint_graph() -> None:
    problem = parse_graph(json.dumps(JOINT)).problem
    assert problem.ops[0].once and problem.ops[1].phase == Phase.BACKWARD
    assert problem.resident_bytes == 0, "buffers that no op writes are not counted in these files"
    assert check_sequence(problem, (0, 1)) == (20, 12.0)


def test_memplans_own_problem() -> None:
    problem = parse_graph(json.dumps(JOINT)).problem
    assert parse_graph(problem.to_json()).problem == problem


def changed(data: dict[str, Any], *path: Any, value: Any) -> str:
    """``data`` with one place changed, as text."""
    copy = json.loads(json.dumps(data))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n  nodes", r"line 2, column 3: not JSON"),
        ("[]", "no JSON object"),
        ("{}", "neither 'nodes'"),
        (
            changed(NODE_LINK, "nodes", 1, value={"id": "a", "cost_cpu": 1}),
            r"nodes\[1\] has no 'cost_ram' or 'out_cost'",
        ),
        (changed(NODE_LINK, "nodes", 1, "id", value="b"), r"nodes\[2\]: node 'b' stands twice"),
        (changed(NODE_LINK, "nodes", 1, "cost_ram", value=-1), r"nodes\[1\]: size: -1 is not a number"),
        (changed(NODE_LINK, "nodes", 1, "cost_ram", value=1.5), r"nodes\[1\]: size: 1.5 is not a whole number"),
        (changed(NODE_LINK, "nodes", 1, "cost_cpu", value="x"), r"nodes\[1\]: duration: 'x' is not a number"),
        (changed(NODE_LINK, "links", 1, "1", value="z"), r"links\[1\]: there is no node 'z'"),
        (changed(NODE_LINK, "links", value=None), "no list 'links'"),
        (changed(NODE_LINK, "graph", "order", value=["a", "b"]), "graph.order does not name every node once"),
        (changed(NODE_LINK, "graph", "order", value=["c", "b", "a"]), r"op 0 .* before it is made"),
        (changed(JOINT, "ops", 1, "phase", value="sideways"), r"ops\[1\]: phase 'sideways' is none of forward"),
        (changed(JOINT, "ops", 1, "reads", value=[9]), "buffer 9, which does not exist"),
        (changed(JOINT, "ops", 1, "reads", value=["x"]), r"ops\[1\]: reads: 'x' is not a number"),
        (changed(JOINT, "buffers", 0, value=None), r"buffers\[0\]: None is not a number"),
        (changed(JOINT, "ops", 0, value=7), r"ops\[0\] is no JSON object"),
        (changed(JOINT, "outputs", value=[7]), "7"),
    ],
)
def test_errors_name_the_place(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_graph(text)


def test_a_missing_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="nowhere.json: cannot be read"):
        load_graph(tmp_path / "nowhere.json")
