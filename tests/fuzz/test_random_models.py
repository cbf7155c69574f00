"""Random models under random options, compared with eager. ``make fuzz`` runs thousands of new ones."""

from __future__ import annotations

from hypothesis import example, given, settings

from tests.fuzz.harness import check
from tests.fuzz.recipes import Recipe, Run, recipes, runs

NIGHTLY = settings.get_current_profile_name() == "nightly"


def cases(by_default: int, nightly: int) -> settings:
    return settings(max_examples=nightly if NIGHTLY else by_default)


LONGEST = 10 if NIGHTLY else 5


# A training norm that runs again when one of its two new statistics is copied back and the other is not yet
@example(Recipe((("batch_norm", 0), ("activation", 0)), shape=(2, 4, 8)), Run(60, arbitrary=0, peak=True))
# A rewrite of one thing, experts here, that took counters of another's calls with it
@example(Recipe((("Experts", 1), ("Conv2d", 0)), shape=(2, 2, 8)), Run(60, arbitrary=0, peak=True, fusion=True))
@cases(70, 1400)
@given(recipes(LONGEST), runs(arbitrary=True))
def test_every_valid_plan_gives_what_eager_gives(recipe: Recipe, run: Run) -> None:
    check(recipe, run)


# Numbers of a graph with other sizes than the first, of symbols' type though they are known
SIZES = (
    "graph_break",
    "in_place_on_a_view",
    "batch_norm_frozen",
    "graph_break",
    "rms_norm",
    "without_gradient",
    "sampled",
)


@example(
    Recipe(tuple((name, 0) for name in SIZES), alone=True), Run(60, update=True, input_gradient=True, other_batch=True)
)
@cases(30, 600)
@given(recipes(LONGEST), runs(arbitrary=False))
def test_every_budget_gives_what_eager_gives(recipe: Recipe, run: Run) -> None:
    check(recipe, run)
