"""Budgets in the repository: what ``memplan check`` and ``memplan compare`` decide. No torch.

[[tool.memplan.model]]
name = "gpt2"
entry = "train.py:build"
limit = "24GiB"            # the peak may not be larger
max_regression = "2%"      # nor grow by more than this against the base
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from memplan.analysis import CATEGORIES, Analysis
from memplan.decisions import family
from memplan.errors import BudgetInfeasibleError, InputError, OptionError
from memplan.problem import SCHEMA_VERSION, read_schema
from memplan.units import format_bytes, parse_budget, parse_bytes


@dataclass(frozen=True)
class ModelConfig:
    """One ``[[tool.memplan.model]]`` table; ``entry`` is the only key it must have."""

    entry: str
    name: str = ""
    limit: str | int | None = None  # bytes
    max_regression: str | int | None = None  # "2%" or bytes
    train: bool = True
    optimizer: str | None = None
    target: str | None = None  # device profile
    memory_budget: str | int | None = None  # plan under it first, then check what is left
    input: tuple[str, ...] = ()  # shapes, as --input takes them

    @property
    def label(self) -> str:
        return self.name or self.entry


@dataclass(frozen=True)
class Rule:
    """How much one figure may grow: a share of the base, or an amount (bytes; microseconds for time)."""

    metric: str  # "peak", "time" or a category
    share: float | None = None
    amount: int = 0

    @classmethod
    def parse(cls, text: str) -> Rule:
        """'peak:2%', 'peak:64MiB', 'activation:0'; raises OptionError for anything else."""
        metric, colon, allowed = text.partition(":")
        if not colon or metric not in ("peak", "time", *CATEGORIES):
            known = ", ".join(("peak", "time", *CATEGORIES))
            raise OptionError(f"cannot read {text!r}; write for example 'peak:2%' (figures: {known})")
        number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", allowed)
        if number:
            return cls(metric, share=float(number[1]) / 100)
        return cls(metric, amount=parse_bytes(allowed))

    def value(self, analysis: Analysis) -> float:
        if self.metric == "peak":
            return analysis.peak_bytes
        return analysis.time if self.metric == "time" else analysis.breakdown.get(self.metric, 0)

    def broken(self, base: Analysis, head: Analysis) -> str:
        """What to tell when ``head`` grew too much, '' when it did not."""
        before, now = self.value(base), self.value(head)
        allowed = before * self.share if self.share is not None else self.amount
        if now - before <= allowed:
            return ""
        limit = f"{100 * self.share:g} %" if self.share is not None else self._said(self.amount)
        grown = f" (+{100 * (now - before) / before:.1f} %)" if before else ""
        return f"{self.metric} grew from {self._said(before)} to {self._said(now)}{grown}; allowed: {limit}"

    def _said(self, value: float) -> str:
        return f"{value:.0f} µs" if self.metric == "time" else format_bytes(int(value))


@dataclass(frozen=True)
class Change:
    """A family of buffers of one module whose bytes at the peak differ."""

    what: str
    category: str
    module: str
    source: str  # where the head makes it; the base, when only the base does
    base: int  # bytes
    head: int

    @property
    def delta(self) -> int:
        return self.head - self.base


@dataclass(frozen=True)
class Verdict:
    """What is said about one model. ``error``: it could not be analysed, so nothing was decided."""

    name: str
    head: Analysis | None = None
    base: Analysis | None = None
    limit: int | None = None  # bytes
    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    error: str = ""
    refused: BudgetInfeasibleError | None = None  # no plan keeps the memory budget

    @property
    def ok(self) -> bool:
        return not self.failures and not self.error

    @property
    def delta(self) -> int:
        return self.head.peak_bytes - self.base.peak_bytes if self.head and self.base else 0

    @property
    def culprit(self) -> str:
        """``file:line`` to point at: what grew most since the base, else the largest buffer that has one."""
        grown = [c.source for c in self.changes if c.delta > 0 and c.source]
        held = self.head.at_peak if self.head else self.refused.alive if self.refused else ()
        alive = [b.source for b in held if b.source]
        return next(iter(grown + alive), "")


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 all within budget, 1 one is over or regressed, 2 one could not be analysed."""
    if any(v.error for v in verdicts):
        return 2
    return 0 if all(v.ok for v in verdicts) else 1


def judge(
    name: str,
    head: Analysis,
    base: Analysis | None = None,
    limit: str | int | None = None,
    rules: Sequence[Rule] = (),
) -> Verdict:
    """Hold an analysis against its limit and, where there is one, against its base."""
    bytes_allowed = None if limit is None else parse_bytes(limit)
    failures = []
    if bytes_allowed is not None and head.peak_bytes > bytes_allowed:
        over = head.peak_bytes - bytes_allowed
        failures.append(
            f"peak {format_bytes(head.peak_bytes)} is {format_bytes(over)} over the limit of {format_bytes(bytes_allowed)}"
        )
    if base is None:
        return Verdict(name, head, None, bytes_allowed, tuple(failures))
    failures += [said for rule in rules if (said := rule.broken(base, head))]
    changed = changes(base, head)
    return Verdict(name, head, base, bytes_allowed, tuple(failures), environment_warnings(base, head), changed)


def refusal(name: str, error: BudgetInfeasibleError) -> Verdict:
    """The step is over its budget, whatever is planned."""
    return Verdict(name, limit=error.budget, failures=(str(error),), refused=error)


def changes(base: Analysis, head: Analysis) -> tuple[Change, ...]:
    """Families of buffers whose bytes at the peak differ, the largest growth first.

    Buffers are matched by module, category and family of name: numbers in names and lines shift with every edit.
    """
    totals: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    source: dict[tuple[str, str, str], str] = {}
    for side, analysis in ((1, head), (0, base)):
        for b in analysis.at_peak:
            key = (b.module, b.category, family(b.name))
            totals[key][side] += b.size
            source[key] = source.get(key) or b.source
    found = [
        Change(key[2], key[1], key[0], source[key], before, now)
        for key, (before, now) in totals.items()
        if before != now
    ]
    return tuple(sorted(found, key=lambda c: (-c.delta, c.module, c.what)))


def environment_warnings(base: Analysis, head: Analysis) -> tuple[str, ...]:
    """Differences of environment that could explain a difference of bytes."""
    names = dict.fromkeys((*base.versions, *head.versions))
    said = [
        f"{name}: {base.versions.get(name, 'absent')} in the base, {head.versions.get(name, 'absent')} in the head"
        for name in names
        if base.versions.get(name) != head.versions.get(name)
    ]
    if base.target != head.target:
        said.append(f"target: {base.target or 'unknown'} in the base, {head.target or 'unknown'} in the head")
    return tuple(said)


def config_file(start: Path) -> Path:
    """The file given, or the pyproject.toml in or above the folder ``start``. Raises OptionError where there is none."""
    if not start.exists():
        raise OptionError(f"there is no file or folder {start}")
    file = start if start.is_file() else next((f / "pyproject.toml" for f in _upwards(start)), None)
    if file is None:
        raise OptionError(f"there is no pyproject.toml in or above {start.resolve()}")
    return file.resolve()


def read_config(file: Path) -> tuple[ModelConfig, ...]:
    """The models of a pyproject.toml. Raises OptionError naming the file and the key."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read {file}: {error}") from error
    models = table.get("tool", {}).get("memplan", {}).get("model", [])
    if not isinstance(models, list) or not models:
        raise OptionError(f"{file} has no [[tool.memplan.model]] table; nothing to check")
    return tuple(_model_config(entry, f"{file}: tool.memplan.model[{k}]") for k, entry in enumerate(models))


def _upwards(folder: Path) -> list[Path]:
    return [f for f in (folder.resolve(), *folder.resolve().parents) if (f / "pyproject.toml").is_file()]


def _model_config(table: Mapping[str, Any], place: str) -> ModelConfig:
    known = {f.name for f in fields(ModelConfig)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise OptionError(f"{place}: unknown key {unknown[0]!r}; keys are {', '.join(sorted(known))}")
    if "entry" not in table:
        raise OptionError(f"{place} has no 'entry'; write for example entry = \"train.py:build\"")
    hints = get_type_hints(ModelConfig)
    for key, value in table.items():
        if key != "input" and not isinstance(value, hints[key]):
            raise OptionError(f"{place}: {key} cannot be {value!r}")
    given = table.get("input", [])
    shapes = [given] if isinstance(given, str) else given
    if not isinstance(shapes, list) or not all(isinstance(shape, str) for shape in shapes):
        raise OptionError(f'{place}: input cannot be {given!r}; write for example ["8x1024:int64"]')
    config = ModelConfig(**{**table, "input": tuple(shapes)})
    try:
        if config.limit is not None:
            parse_bytes(config.limit)
        if config.memory_budget is not None:
            parse_budget(config.memory_budget, 0)
        if config.max_regression is not None:
            Rule.parse(f"peak:{config.max_regression}")
    except OptionError as error:
        raise OptionError(f"{place}: {error}") from error
    return config


# A file of analyses: what ``check -o`` writes and ``compare`` reads


def analyses_to_json(analyses: Mapping[str, Analysis]) -> str:
    """Analyses by name, as one document."""
    models = {name: analysis.to_dict() for name, analysis in analyses.items()}
    return json.dumps({"schema_version": SCHEMA_VERSION, "kind": "analyses", "models": models}) + "\n"


def read_analyses(path: Path) -> dict[str, Analysis]:
    """One analysis, or a file of them, by name. Raises InputError naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
        if '"kind": "analyses"' not in text[:200]:
            analysis = Analysis.from_json(text)
            return {analysis.name: analysis}
        models = read_schema(text, "analyses")["models"]
        return {name: Analysis.from_json(json.dumps(data)) for name, data in models.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except (InputError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: {error}") from error
