"""Reads public recomputation graphs: networkx node-link JSON, and joint forward+backward graphs of storages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import InputError
from memplan.problem import Buffer, Category, Op, Phase, Problem


@dataclass(frozen=True)
class GraphFile:
    """A problem and the names by which its file knows the ops: ``ids[i]`` is the node id of op i."""

    problem: Problem
    ids: tuple[Any, ...]

    def sequence_ids(self, sequence: Sequence[int]) -> list[Any]:
        """A sequence of ops in the file's own node ids."""
        return [self.ids[i] for i in sequence]

    def sequence_ops(self, ids: Sequence[Any]) -> tuple[int, ...]:
        """The op indices of a sequence of node ids; raises InputError at an unknown id."""
        index = {key: i for i, key in enumerate(self.ids)}
        unknown = next((key for key in ids if key not in index), None)
        if unknown is not None:
            raise InputError(f"the graph has no node {unknown!r}")
        return tuple(index[key] for key in ids)


def load_graph(path: str | Path) -> GraphFile:
    """Read a graph file: node-link JSON, a joint graph, or memplan's own problem JSON.

    Raises InputError naming the place (line, node or op) of whatever cannot be read.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    try:
        return parse_graph(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse_graph(text: str) -> GraphFile:
    """The same from text; raises InputError without the file's name."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    if not isinstance(data, dict):
        raise InputError("the file holds no JSON object")
    if data.get("kind") == "problem":
        problem = Problem.from_json(text)
        ids: tuple[Any, ...] = tuple(range(len(problem.ops)))
    elif "nodes" in data:
        problem, ids = _node_link(data)
    elif "ops" in data:
        problem = _joint(data)
        ids = tuple(range(len(problem.ops)))
    else:
        raise InputError("the object has neither 'nodes' (node-link graph) nor 'ops' (joint graph)")
    problem.check()
    return GraphFile(problem, ids)


def _node_link(data: Mapping[str, Any]) -> tuple[Problem, tuple[Any, ...]]:
    """One op and one buffer a node; stored order = graph.order, else ascending ids. Nothing is kept at the end."""
    nodes = {}
    for at, node in enumerate(_list(data, "nodes", "the graph")):
        place = f"nodes[{at}]"
        key = _any(node, ("id", "name"), place)
        if key in nodes:
            raise InputError(f"{place}: node {key!r} stands twice")
        size = _whole(_any(node, ("cost_ram", "out_cost"), place), f"{place}: size")
        time = _number(_any(node, ("cost_cpu", "duration"), place), f"{place}: duration")
        nodes[key] = (size, time, str(node.get("name", key)))
    operands: dict[Any, list[Any]] = {key: [] for key in nodes}
    for at, link in enumerate(_list(data, "links", "the graph")):
        source, target = (_any(link, names, f"links[{at}]") for names in (("source", "0"), ("target", "1")))
        for end in (source, target):
            if end not in nodes:
                raise InputError(f"links[{at}]: there is no node {end!r}")
        operands[target].append(source)
    graph = data.get("graph")
    order = (graph.get("order") if isinstance(graph, dict) else None) or sorted(nodes, key=lambda k: (str(type(k)), k))
    if sorted(map(str, order)) != sorted(map(str, nodes)):
        raise InputError("graph.order does not name every node once")
    index = {key: i for i, key in enumerate(order)}
    ops = tuple(
        Op(nodes[key][2], reads=tuple(index[u] for u in operands[key]), writes=(i,), time=nodes[key][1])
        for i, key in enumerate(order)
    )
    return Problem(ops, tuple(Buffer(nodes[key][2], nodes[key][0]) for key in order)), tuple(order)


def _joint(data: Mapping[str, Any]) -> Problem:
    """A joint graph; buffers that no op writes (parameters, inputs) count no bytes, as in the files' own rules."""
    sizes = [_whole(size, f"buffers[{b}]") for b, size in enumerate(_list(data, "buffers", "the graph"))]
    ops = []
    for at, op in enumerate(_list(data, "ops", "the graph")):
        place = f"ops[{at}]"
        phase = _any(op, ("phase",), place)
        if phase not in set(Phase):
            raise InputError(f"{place}: phase {phase!r} is none of {', '.join(Phase)}")
        ops.append(
            Op(
                str(op.get("name", at)),
                target=str(op.get("op", "")),
                reads=_indices(op, "reads", place),
                writes=_indices(op, "writes", place),
                time=_number(_any(op, ("time_us",), place), f"{place}: time_us"),
                phase=Phase(phase),
                once=bool(op.get("random", False)),
            )
        )
    made = {b for op in ops for b in op.writes}
    outputs = tuple(dict.fromkeys(_indices(data, "outputs", "the graph")))
    forward = tuple(dict.fromkeys(_indices(data, "forward_outputs", "the graph")))
    buffers = tuple(
        Buffer(f"b{b}", size if b in made else 0, Category.ACTIVATION if b in made else Category.INPUT)
        for b, size in enumerate(sizes)
    )
    outputs = tuple(dict.fromkeys((*outputs, *forward)))
    return Problem(tuple(ops), buffers, outputs, forward, note=str(data.get("note", "")))


def _list(data: Mapping[str, Any], key: str, place: str) -> list[Any]:
    value = data.get(key)
    if not isinstance(value, list):
        raise InputError(f"{place} has no list {key!r}")
    return value


def _any(node: Any, names: tuple[str, ...], place: str) -> Any:
    if not isinstance(node, dict):
        raise InputError(f"{place} is no JSON object")
    for name in names:
        if name in node:
            if isinstance(node[name], (list, dict)):
                raise InputError(f"{place}: {name!r} is neither a number nor a text")
            return node[name]
    raise InputError(f"{place} has no {' or '.join(map(repr, names))}")


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise InputError(f"{place}: {value!r} is not a number ≥ 0")
    return float(value)


def _whole(value: Any, place: str) -> int:
    if _number(value, place) != int(value):
        raise InputError(f"{place}: {value!r} is not a whole number of bytes")
    return int(value)


def _indices(data: Any, key: str, place: str) -> tuple[int, ...]:
    values = _list(data, key, place) if isinstance(data, dict) else []
    return tuple(_whole(value, f"{place}: {key}") for value in values)
