"""Options: what a user may set, where a value comes from, and clear errors for what cannot be.

Precedence: the call, then ``MEMPLAN_*`` in the environment, then ``[tool.memplan]`` of the pyproject.toml above the
working directory, then the default. Dotted keys (``recompute.enabled``) are attributes with an underscore.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from memplan.errors import OptionError
from memplan.units import parse_budget, parse_bytes

GROUPS = ("fusion", "placement", "recompute", "reuse", "swap", "trace")
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "min-peak": {"objective": "peak"},
}


@dataclass(frozen=True)
class Options:
    """One field an option; ``None`` means: not limited, or decided by the device."""

    memory_budget: int | str | None = None  # bytes, "24GiB", or "60%" of the peak without a budget
    objective: str = "time"  # "time": least slowdown under the budget; "peak": smallest peak
    reserved: int | str = 0  # bytes the caller holds outside the compiled region
    target: str | None = None  # device profile; None: the device of the inputs
    verify: bool = True  # validate every plan before it runs
    runtime_estimator: str = "profile"  # "profile": measure each op once; "analytic": estimate
    recompute_enabled: bool = True
    swap_enabled: bool = True  # offload to the tiers named in swap.tiers, where that is cheaper than recomputing
    swap_tiers: str = "host"  # comma-separated: "host" (where the device is not the host), "disk" (opt-in)
    swap_directory: str | None = None  # of the disk tier's file; None: the system's directory for temporary files
    swap_disk_limit: int | str | None = None  # bytes; None: what is free there
    swap_host_limit: int | str | None = None  # bytes; None: what is free
    reuse_enabled: bool = True  # results over operands that die there, where the peak falls by it; the same bits
    placement_enabled: bool = False  # one allocation for a step's memory, at planned offsets
    fusion_enabled: bool = False  # contract pointwise ops and reductions into compiled regions
    lowering: str | None = None  # of a region: "triton", "inductor" or "eager"; None: the fastest for the device
    solver_time_limit_s: float | None = None  # wall clock; None: only the deterministic work limit
    solver_work: float = 1.0  # multiple of the solver's default effort
    solver_seed: int = 0
    trace_enabled: bool = False  # write every stage to trace.dir
    trace_dir: str = "memplan_trace"

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, ("time", "peak"))
        _one_of("runtime_estimator", self.runtime_estimator, ("profile", "analytic"))
        if self.lowering is not None:
            _one_of("lowering", self.lowering, ("triton", "inductor", "eager"))
        object.__setattr__(self, "reserved", parse_bytes(self.reserved))
        if self.memory_budget is not None:
            parse_budget(self.memory_budget, 1)  # malformed budgets are refused before anything compiles
            if self.objective == "peak":
                raise OptionError('memory_budget and objective="peak" cannot be given together; drop one of them')
        if self.solver_work <= 0:
            raise OptionError(f"solver_work must be positive, not {self.solver_work}")

    def budget(self, unplanned_peak: int) -> int | None:
        """Bytes the compiled region may hold; None without a budget."""
        if self.memory_budget is None:
            return None
        return parse_budget(self.memory_budget, unplanned_peak + int(self.reserved)) - int(self.reserved)

    @property
    def tier_limits(self) -> dict[str, int]:
        """Most bytes of each tier that has a limit; the others take what is free."""
        given = {"host": self.swap_host_limit, "disk": self.swap_disk_limit}
        return {tier: parse_bytes(limit) for tier, limit in given.items() if limit is not None}

    def without_budget(self) -> Options:
        """The same options, free to hold any number of bytes."""
        return replace(self, memory_budget=None)

    @classmethod
    def resolve(cls, given: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Merge the call's options with the environment and the project file. Raises OptionError."""
        if mode is not None and mode not in MODES:
            raise OptionError(f"unknown mode {mode!r}; modes are {', '.join(sorted(MODES))}")
        merged = {_attribute(key): value for key, value in _from_project().items() if not isinstance(value, list)}
        merged |= _from_environment()
        merged |= MODES[mode or "default"]
        merged |= {_attribute(key): value for key, value in (given or {}).items()}
        return cls(**{name: _typed(name, value) for name, value in merged.items()})


def option_names() -> tuple[str, ...]:
    """Every option as users write it."""
    return tuple(_dotted(f.name) for f in fields(Options))


def _dotted(attribute: str) -> str:
    group, _, rest = attribute.partition("_")
    return f"{group}.{rest}" if group in GROUPS and rest else attribute


def _attribute(key: str) -> str:
    name = key.replace(".", "_")
    if name not in {f.name for f in fields(Options)}:
        near = difflib.get_close_matches(key, option_names(), n=3, cutoff=0.5)
        hint = (
            f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; options are {', '.join(option_names())}"
        )
        raise OptionError(f"unknown option {key!r}{hint}")
    return name


def _typed(name: str, value: Any) -> Any:
    """Check a value against the field's annotation; strings from the environment are read as the annotation says."""
    allowed = get_args(get_type_hints(Options)[name]) or (get_type_hints(Options)[name],)
    if isinstance(value, str) and str not in allowed:
        text = value.strip().lower()
        if bool in allowed and text in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return text in ("1", "true", "yes", "on")
        if float in allowed or int in allowed:
            try:
                return float(text) if float in allowed else int(text)
            except ValueError:
                pass
    if isinstance(value, bool) and bool not in allowed or not isinstance(value, (*allowed, *_widened(allowed))):
        kinds = " or ".join(t.__name__ for t in allowed if t is not type(None))
        raise OptionError(f"option {_dotted(name)!r} must be {kinds}, not {value!r}")
    return value


def _widened(allowed: tuple[type, ...]) -> tuple[type, ...]:
    return (int,) if float in allowed else ()


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"option {_dotted(name)!r} must be one of {', '.join(choices)}, not {value!r}")


def _from_environment() -> dict[str, Any]:
    found = {f.name: os.environ.get(f"MEMPLAN_{f.name.upper()}") for f in fields(Options)}
    return {name: value for name, value in found.items() if value is not None}


def _from_project() -> dict[str, Any]:
    for folder in (Path.cwd(), *Path.cwd().parents):
        file = folder / "pyproject.toml"
        if file.is_file():
            try:
                table = tomllib.loads(file.read_text()).get("tool", {}).get("memplan", {})
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise OptionError(f"cannot read {file}: {error}") from error
            flat: dict[str, Any] = {}
            for key, value in table.items():
                flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            return flat
    return {}
