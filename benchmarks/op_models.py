"""One op of PyTorch's operator database as a model, compared with eager under ``aot_eager`` and under memplan."""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests' arbitrary plans

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import memplan
from tests.arbitrary import arbitrary_plans

SAMPLES = 2  # of an op's sample inputs: the first and the last one
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool, torch.float16)
OPTIONS = {"runtime_estimator": "analytic", "solver_work": 0.01}
# Their results are whatever stood in memory: only shapes are compared.
UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")


def operators() -> dict[str, Any]:
    """Every op of the database by its name and variant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""): op for op in op_db}


@dataclass(frozen=True)
class Model:
    """An op with one of its sample inputs: the tensors are arguments, everything else is fixed."""

    op: Callable[..., Any]
    tensors: tuple[torch.Tensor, ...]
    fill: Callable[[tuple[torch.Tensor, ...]], tuple[Any, Any]]

    @classmethod
    def of(cls, operator: Any, sample: Any) -> Model:
        leaves, form = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        at = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

        def fill(tensors: tuple[torch.Tensor, ...]) -> tuple[Any, Any]:
            filled = list(leaves)
            for k, tensor in zip(at, tensors, strict=True):
                filled[k] = tensor
            return tree_unflatten(filled, form)

        return cls(operator.op, tuple(leaves[k] for k in at), fill)

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        args, kwargs = self.fill(tensors)
        return [leaf for leaf in tree_flatten(self.op(*args, **kwargs))[0] if isinstance(leaf, torch.Tensor)]


def models(operator: Any) -> Iterator[Model]:
    """The op on some of its sample inputs, in the first of DTYPES that it takes; nothing where it takes none."""
    dtype = next((d for d in DTYPES if operator.supports_dtype(d, "cpu")), None)
    if dtype is None:
        return
    gradient = operator.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
    samples = list(itertools.islice(operator.sample_inputs("cpu", dtype, requires_grad=gradient), 100))
    for k in range(min(SAMPLES, len(samples))):
        yield Model.of(operator, samples[-k])


def step(model: Model, run: Callable[..., Any]) -> list[torch.Tensor | None]:
    """Outputs and gradients of one forward and backward from a fixed seed."""
    inputs = [t.detach().clone(memory_format=torch.preserve_format) for t in model.tensors]
    for new, old in zip(inputs, model.tensors, strict=True):
        new.requires_grad_(old.requires_grad)
    torch.manual_seed(0)
    outputs = run(*inputs)
    found: list[torch.Tensor | None] = [o.detach() for o in outputs]
    wanted = [o for o in outputs if o.requires_grad]
    leaves = [t for t in inputs if t.requires_grad]
    if wanted and leaves:
        cotangents = [torch.linspace(0.5, 1.5, o.numel()).to(o).reshape(o.shape) for o in wanted]
        found += torch.autograd.grad(wanted, leaves, cotangents, allow_unused=True)
    return found


def compiled(model: Model, backend: str, **options: Any) -> list[torch.Tensor | None]:
    torch._dynamo.reset()
    given = {"options": options} if options else {}
    return step(model, torch.compile(lambda *tensors: model(*tensors), backend=backend, fullgraph=False, **given))


def planned(model: Model) -> list[torch.Tensor | None]:
    """Under 90 % of the unplanned peak, or the smallest feasible budget; that one must then hold."""
    try:
        return compiled(model, "memplan", memory_budget="90%", **OPTIONS)
    except memplan.BudgetInfeasibleError as error:
        if error.smallest is None:
            raise
        return compiled(model, "memplan", memory_budget=error.smallest, **OPTIONS)


def again(model: Model) -> list[torch.Tensor | None]:
    with arbitrary_plans(seed=0, again=1.0):
        return compiled(model, "memplan", **OPTIONS)


def difference(got: list[torch.Tensor | None], want: list[torch.Tensor | None], defined: bool) -> str:
    """What differs, '' for nothing."""
    if len(got) != len(want):
        return f"{len(got)} results instead of {len(want)}"
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        if a is None and b is None:
            continue
        if a is None or b is None:
            return f"result {k} is {'missing' if a is None else 'not None'}"
        if not defined:
            a, b = torch.zeros_like(a), torch.zeros_like(b)
        try:
            torch.testing.assert_close(a, b, equal_nan=True)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            return f"result {k}: {str(error).splitlines()[0]}"
    return ""


class _Warnings(logging.Handler):
    """Collects the reasons why graphs ran unplanned."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "unplanned" in record.getMessage():
            self.reasons.append(str(record.args[0] if record.args else record.msg))


@contextmanager
def unplanned_reasons() -> Iterator[list[str]]:
    handler = _Warnings()
    logger = logging.getLogger("memplan")
    logger.addHandler(handler)
    try:
        yield handler.reasons
    finally:
        logger.removeHandler(handler)


def outcome(operator: Any) -> dict[str, Any]:
    """``verdict``: "pass", "unplanned" (right, by the fallback), "wrong" (other values than eager's), "error" (an
    exception), or why there is nothing to compare: "no samples", "eager", "aot_eager". ``reason`` tells more."""
    defined = operator.name not in UNDEFINED
    try:
        cases = list(models(operator))
    except Exception as error:  # noqa: BLE001 - the database's own samples may need what this machine lacks
        return _row("no samples", error)
    found = _row("no samples", "none for the CPU")
    for k, model in enumerate(cases):
        found = _compared(model, defined, (planned, again) if k == 0 else (again,))
        if found["verdict"] != "pass":
            return found
    return found


def _compared(
    model: Model, defined: bool, runs: Sequence[Callable[[Model], list[torch.Tensor | None]]]
) -> dict[str, Any]:
    try:
        want = step(model, model)
    except Exception as error:  # noqa: BLE001 - any failure of eager's takes the case out of the comparison
        return _row("eager", error)
    if differs := difference(step(model, model), want, defined):
        return _row("eager", f"not the same twice: {differs}")
    try:
        differs = difference(compiled(model, "aot_eager"), want, defined)
    except Exception as error:  # noqa: BLE001 - the same for the reference backend's
        return _row("aot_eager", error)
    if differs:
        return _row("aot_eager", differs)
    with unplanned_reasons() as reasons:
        for run in runs:
            try:
                differs = difference(run(model), want, defined)
            except Exception as error:  # noqa: BLE001 - what this benchmark is there to find
                return _row("error", f"{run.__name__}: {type(error).__name__}: {error}")
            if differs:
                return _row("wrong", f"{run.__name__}: {differs}")
    return _row("unplanned", reasons[0]) if reasons else _row("pass", "")


def _row(verdict: str, reason: object) -> dict[str, Any]:
    text = f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else str(reason)
    return {"verdict": verdict, "reason": " ".join(text.replace(f"{ROOT}/", "").split())[:300]}
