"""Random models under random budgets: no step holds more than its plan says."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import memplan
from memplan.backend import recent_plans
from memplan.realise import Planned
from memplan.runtime import native
from memplan.runtime.arena import Pool
from tests.fuzz.recipes import Model, Recipe, recipes
from tests.fuzz.test_random_models import LONGEST, cases
from tests.peak import peak_above

SHAPES = st.sampled_from(((4, 16, 32), (3, 32, 64), (8, 64, 16)))
NORMS = Recipe((("batch_norm_frozen", 2), ("batch_norm_frozen", 2), ("statistics", 0)), shape=(8, 64, 16), alone=True)

# Outputs with other strides than the zeros that stand for the gradients nobody gives
STRIDED = Recipe(
    (("activation", 0), ("attention", 0), ("activation", 0)),
    (("view", 0), ("view", 1), ("twice", 2)),
    shape=(8, 64, 16),
)
SIZES = Recipe((("Counter", 2), ("data_dependent", 3)), shape=(3, 32, 64))


@example(Recipe((("data_dependent", 0),), shape=(8, 64, 16)), 80, True)  # positions of a mask that indexes
@example(Recipe((("fill_a_new_tensor", 1),), shape=(4, 16, 32)), 100, True)  # a copy that clones a whole storage
@example(Recipe((("complex_numbers", 3),), shape=(3, 32, 64)), 100, True)  # a conjugate that a kernel resolves
@example(NORMS, 40, True)  # a norm whose result lies otherwise in memory than its fake one
@example(SIZES, 60, True)  # an assertion about the size of a result that waits for it through numbers alone
@cases(40, 400)
@given(recipes(LONGEST, SHAPES), st.sampled_from((100, 80, 60, 40, 20)), st.booleans())
def test_no_step_holds_more_than_its_plan_says(recipe: Recipe, percent: int, strided: bool) -> None:
    planned, above = measured(*built(recipe, strided), f"{percent}%")
    assert planned.problem.resident_bytes + above <= planned.plan.peak


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler builds arena.cpp here")
@example(STRIDED, 160, False)
@cases(8, 200)
@given(recipes(LONGEST, SHAPES), st.sampled_from((160, 110)), st.booleans())
def test_no_step_holds_more_with_its_arena(recipe: Recipe, percent: int, strided: bool) -> None:
    """An arena's bookkeeping is promised as if the step were large, so budgets here are above such small steps' peaks."""
    planned, above = measured(*built(recipe, strided), f"{percent}%", arena=True)
    held = planned.timeline.peak
    gc.collect()
    for pool in Pool.all():
        if pool.program is planned.lowered.program and not pool.off:
            # A kernel whose temporaries need more in one piece than in all may have lifted the arena, within the budget: by
            # what it takes before its results are there at most.
            held, layout, storages = pool.layout.held(pool.program), pool.layout, pool.program.storages
            made = {at: sum(storages[s].size for s in step.makes) for at, step in enumerate(pool.program.steps)}
            lifted = max((size + made[at] for at, size in layout.workspaces.items()), default=0)
            assert layout.height <= 1.01 * layout.load + lifted
    assert planned.problem.resident_bytes + above <= held
    assert planned.budget is not None and held <= planned.budget


def built(recipe: Recipe, strided: bool) -> tuple[Model, torch.Tensor]:
    """A random model and its input."""
    torch.manual_seed(0)
    model = Model(recipe)
    batch, length, width = recipe.shape
    base = torch.randn(batch, length, 2 * width)
    x = base[..., ::2] if strided else base[..., :width].contiguous()
    try:
        model(x)
    except RuntimeError:
        assume(False)  # eager refuses the combination
    return model, x


def measured(model: Model, x: torch.Tensor, budget: str | int, arena: bool = False) -> tuple[Planned, int]:
    """The plan of the one graph, and the most bytes that a training step takes above what is there before it."""
    torch._dynamo.reset()
    before = recent_plans()[-1:]
    options = {"memory_budget": budget, "solver_work": 0.01, "placement.enabled": arena}
    run = torch.compile(model, backend="memplan", fullgraph=True, options=options)

    def step() -> None:
        out = run(x)
        (out if isinstance(out, torch.Tensor) else out[0]).backward()
        del out
        model.zero_grad(set_to_none=True)

    try:
        above = peak_above(step, warm_ups=2)
    except memplan.BudgetInfeasibleError as error:
        assert error.smallest is not None and not isinstance(budget, int)
        return measured(model, x, error.smallest, arena)
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError):
        assume(False)  # several graphs, or a number that dynamo will not guess (a norm's average over all batches)
    (planned,) = recent_plans()[-1:]
    assume(planned not in before)  # the graph ran unplanned
    return planned, above
