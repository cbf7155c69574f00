"""Building a model where tensors have shapes and no bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MOVES = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda)


class StayOnMeta(TorchFunctionMode):
    """Tensors without data ignore moves to a device (``model.cuda()``); changes of dtype are made. What is made on a
    device other than the CPU, which may not be here, is made without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MOVES and args[0].device.type == "meta":
            if func is not torch.Tensor.to:
                return args[0]
            kwargs.pop("device", None)
            args = (args[0], *(_without_device(a) for a in args[1:]))
        elif kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "cpu":
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _without_device(argument: Any) -> Any:
    """An argument of ``Tensor.to`` that names no other device."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    names_device = isinstance(argument, (str, torch.device)) or type(argument) is int
    return "meta" if names_device else argument
