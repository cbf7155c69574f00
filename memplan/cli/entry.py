"""``file.py:name`` and ``module:attr`` → a model and its inputs. This executes the code that the entry names."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from memplan.cli.common import tell
from memplan.errors import InputError, OptionError

if TYPE_CHECKING:
    import torch

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dims>\d+(?:x\d+)*|scalar)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class Loaded:
    """A model and the inputs of one step; its tensors have no memory."""

    model: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_entry(entry: str, inputs: Sequence[str] = ()) -> Loaded:
    """Import and call what ``entry`` names, with tensors that have shapes but no memory.

    Raises OptionError for an entry that cannot be read, InputError (naming the user's exception) when its code fails.
    """
    found = resolve(entry)
    import torch

    given = [parse_shape(text) for text in inputs]
    model, example = _split(entry, _built(entry, found))
    with torch.device("meta"):
        args, kwargs = _examples(entry, example)
        args = (*args, *(_tensor(shape, dtype) for name, shape, dtype in given if not name))
        kwargs |= {name: _tensor(shape, dtype) for name, shape, dtype in given if name}
    if not args and not kwargs:
        raise OptionError(f"{entry} gives a model without inputs; return (model, example_inputs) or give --input SHAPE")
    return Loaded(model, args, kwargs)


def _built(entry: str, found: Any) -> Any:
    """Call the entry on the meta device, where tensors have shapes and no bytes; code that asks such a tensor for data
    is run once more as it is, with real memory."""
    import torch

    from memplan.cli.meta import StayOnMeta

    if not callable(found) or isinstance(found, torch.nn.Module):
        return found
    try:
        with StayOnMeta(), torch.device("meta"):
            return found()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise _failed(entry, error) from error
        tell(f"memplan: {entry} needs the data of its tensors ({error}); building it with real memory")
        return _guarded(entry, found)
    except (Exception, SystemExit) as error:
        raise _failed(entry, error) from error


def resolve(entry: str) -> Any:
    """The object that ``file.py:name`` or ``module:attr`` names."""
    place, colon, name = entry.rpartition(":")
    if not colon or not place or not name:
        raise OptionError(f"cannot read {entry!r}; write file.py:name or module:attr")
    if place.endswith(".py"):
        value: Any = _import_file(Path(place))
    else:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
        value = _guarded(entry, importlib.import_module, place)
    for part in name.split("."):
        if not hasattr(value, part):
            raise InputError(f"{place} has no {part!r}" + (f" in {name!r}" if part != name else ""))
        value = getattr(value, part)
    return value


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    # The module's name must not shadow an installed one; the file's folder is importable, as `python file.py` has it.
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    _guarded(str(path), spec.loader.exec_module, module)
    return module


def _guarded(entry: str, call: Any, *args: Any) -> Any:
    """Call the user's code; whatever it raises, SystemExit included, becomes one InputError."""
    try:
        return call(*args)
    except (Exception, SystemExit) as error:
        raise _failed(entry, error) from error


def _failed(entry: str, error: BaseException) -> InputError:
    return InputError(f"{entry} failed: {type(error).__name__}: {error}")


def _split(entry: str, value: Any) -> tuple[Any, Any]:
    import torch

    if isinstance(value, torch.nn.Module):
        return value, ()
    if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], torch.nn.Module):
        return value[0], value[1]
    raise InputError(f"{entry} gives {type(value).__name__}; it must give a model, or (model, example_inputs)")


def _examples(entry: str, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs; a shape (tuple of ints), (shape, dtype) or text '8x16:int64' becomes a tensor."""
    import torch

    if isinstance(example, Mapping):
        return (), {key: _example(value) for key, value in example.items()}
    if isinstance(example, torch.Tensor) or _is_shape(example) or isinstance(example, str):
        return (_example(example),), {}
    if isinstance(example, (tuple, list)):
        return tuple(_example(value) for value in example), {}
    raise InputError(f"{entry}: example inputs are {type(example).__name__}; give a tensor, a tuple, a dict or shapes")


def _example(value: Any) -> Any:
    import torch

    if _is_shape(value):
        return _tensor(tuple(value), "float32")
    if isinstance(value, tuple) and len(value) == 2 and _is_shape(value[0]) and isinstance(value[1], torch.dtype):
        return _tensor(tuple(value[0]), str(value[1]).removeprefix("torch."))
    if isinstance(value, str) and _SHAPE.fullmatch(value):
        _, shape, dtype = parse_shape(value)
        return _tensor(shape, dtype)
    return value


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(type(n) is int for n in value)


def parse_shape(text: str) -> tuple[str, tuple[int, ...], str]:
    """'input_ids=8x1024:int64' → ('input_ids', (8, 1024), 'int64'); raises OptionError."""
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise OptionError(f"cannot read {text!r} as an input; write for example 8x1024:int64 or input_ids=8x1024:int64")
    dims = () if match["dims"] == "scalar" else tuple(int(n) for n in match["dims"].split("x"))
    return match["name"] or "", dims, match["dtype"] or "float32"


def _tensor(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise OptionError(f"torch has no dtype {dtype!r}")
    if any(n < 0 for n in shape):
        raise InputError(f"an input of shape {shape}: a size is negative")
    return torch.zeros(shape, dtype=kind)
