"""Random models under random budgets: no step holds more than its plan says."""

from __future__ import annotations

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import memplan
from memplan.backend import recent_plans
from memplan.planner import Planned
from tests.fuzz.recipes import Model, Recipe, recipes
from tests.fuzz.test_random_models import LONGEST, cases
from tests.peak import peak_above

SHAPES = st.sampled_from(((4, 16, 32), (3, 32, 64), (8, 64, 16)))


@example(Recipe((("data_dependent", 0),), shape=(8, 64, 16)), 80, True)  # positions of a mask that indexes
@example(Recipe((("fill_a_new_tensor", 1),), shape=(4, 16, 32)), 100, True)  # a copy that clones a whole storage
@example(Recipe((("complex_numbers", 3),), shape=(3, 32, 64)), 100, True)  # a conjugate that a kernel resolves
@cases(40, 400)
@given(recipes(LONGEST, SHAPES), st.sampled_from((100, 80, 60, 40, 20)), st.booleans())
def test_no_step_holds_more_than_its_plan_says(recipe: Recipe, percent: int, strided: bool) -> None:
    torch.manual_seed(0)
    model = Model(recipe)
    batch, length, width = recipe.shape
    base = torch.randn(batch, length, 2 * width)
    x = base[..., ::2] if strided else base[..., :width].contiguous()
    try:
        model(x)
    except RuntimeError:
        assume(False)  # eager refuses the combination
    planned, above = measured(model, x, f"{percent}%")
    assert planned.problem.resident_bytes + above <= planned.plan.peak


def measured(model: Model, x: torch.Tensor, budget: str | int) -> tuple[Planned, int]:
    """The plan of the one graph, and the most bytes that a training step takes above what is there before it."""
    torch._dynamo.reset()
    before = recent_plans()[-1:]
    run = torch.compile(
        model, backend="memplan", fullgraph=True, options={"memory_budget": budget, "solver_work": 0.01}
    )

    def step() -> None:
        out = run(x)
        (out if isinstance(out, torch.Tensor) else out[0]).backward()
        del out
        model.zero_grad(set_to_none=True)

    try:
        above = peak_above(step, warm_ups=2)
    except memplan.BudgetInfeasibleError as error:
        assert error.smallest is not None and not isinstance(budget, int)
        return measured(model, x, error.smallest)
    except torch._dynamo.exc.Unsupported:
        assume(False)  # several graphs
    (planned,) = recent_plans()[-1:]
    assume(planned not in before)  # the graph ran unplanned
    return planned, above
