"""Device profiles: what a planner must know of a device that it may not have at hand. No torch unless one is asked."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from memplan.errors import OptionError


@dataclass(frozen=True)
class Link:
    """A way between the device and a slower tier; a transfer takes ``latency + bytes / rate``."""

    write: float  # bytes/s from the device to the tier
    read: float  # bytes/s back
    latency: float  # microseconds


@dataclass(frozen=True)
class DeviceProfile:
    """Capacity, rates and allocator of a device. A CPU's rates are those of one core."""

    name: str
    kind: str  # torch device type: "cuda" or "cpu"
    memory: int  # bytes
    flops: Mapping[str, float] = field(hash=False)  # FLOP/s of matrix products by dtype name
    bandwidth: float  # bytes/s of device memory
    launch: float  # microseconds an op takes at the least
    granularity: int  # bytes; the allocator rounds every storage up to a multiple
    links: Mapping[str, Link] = field(hash=False)  # by tier: "host", "disk"
    source: str = ""  # where the numbers come from


def known_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with memplan."""
    folder = resources.files("memplan") / "profiles"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def profile_for(target: str) -> DeviceProfile:
    """The profile named ``target``, or of the file ``target``, or ("cuda") of the GPU at hand.

    Raises OptionError for an unknown name, with the nearest ones, and for a file that is not a profile.
    """
    if target == "cuda":
        return _present_gpu()
    if target.endswith(".toml"):
        try:
            text = Path(target).read_text()
        except OSError as error:
            raise OptionError(f"cannot read the device profile {target}: {error.strerror}") from error
        return _parse(Path(target).stem, text, target)
    if target not in known_profiles():
        near = difflib.get_close_matches(target, known_profiles(), cutoff=0.3)
        choices = ", ".join(near or known_profiles())
        raise OptionError(f"no device profile named {target!r}; did you mean {choices}? A file must end in .toml")
    text = (resources.files("memplan") / "profiles" / f"{target}.toml").read_text()
    return _parse(target, text, target)


def _parse(name: str, text: str, place: str) -> DeviceProfile:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{place}: not TOML: {error}") from error
    try:
        return DeviceProfile(
            name=name,
            kind=str(data["kind"]),
            memory=int(data["memory"]) or _machine_memory(),
            flops={dtype: _positive(rate, f"flops.{dtype}") for dtype, rate in data["flops"].items()},
            bandwidth=_positive(data["bandwidth"], "bandwidth"),
            launch=_positive(data["launch"], "launch"),
            granularity=int(_positive(data["granularity"], "granularity")),
            links={tier: _link(tier, link) for tier, link in data.get("links", {}).items()},
            source=str(data.get("source", "")),
        )
    except KeyError as error:
        raise OptionError(f"{place}: a device profile needs the key {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise OptionError(f"{place}: {error}") from error


def _link(tier: str, data: Mapping[str, Any]) -> Link:
    return Link(*(_positive(data[key], f"links.{tier}.{key}") for key in ("write", "read", "latency")))


def _positive(value: Any, key: str) -> float:
    number = float(value)
    if number <= 0:
        raise ValueError(f"{key} must be positive, not {value}")
    return number


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _present_gpu() -> DeviceProfile:
    """The profile whose name fits the GPU at hand, with that GPU's own capacity; the nearest by capacity otherwise."""
    import torch

    if not torch.cuda.is_available():
        raise OptionError("target 'cuda' needs a GPU; name a profile to plan for one: " + ", ".join(known_profiles()))
    present = torch.cuda.get_device_properties(torch.cuda.current_device())
    profiles = [p for p in map(profile_for, known_profiles()) if p.kind == "cuda"]
    model = present.name.lower().replace(" ", "")
    named = [p for p in profiles if p.name.split("-")[0] in model]
    nearest = min(named or profiles, key=lambda p: abs(p.memory - present.total_memory))
    return replace(nearest, memory=present.total_memory)
