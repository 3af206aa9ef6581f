"""The private names of torch that EdgeServe depends on.

``tests/models/test_torch_internals.py`` has one test for each name, so that a failure after an upgrade of torch says
which name changed. ``torchvision_compat`` declares the operators that torchvision misses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: The attributes in which ``nn.Module`` keeps its tensors and children.
STATE_TABLES = ("_parameters", "_buffers", "_modules")


def parameter_table(module: nn.Module) -> dict[str, Any]:
    """Return the dictionary in which a module keeps its own parameters; None stands for an absent one.

    An assignment to the dictionary skips the checks of ``nn.Module.__setattr__``: a load makes hundreds of assignments.
    """
    return module._parameters


def buffer_table(module: nn.Module) -> dict[str, Any]:
    """Return the dictionary in which a module keeps its own buffers, non-persistent ones included."""
    return module._buffers


def child_table(module: nn.Module) -> dict[str, Any]:
    """Return the dictionary in which a module keeps its children.

    A replaced child, like a replaced parameter, is put back by one assignment to the same dictionary and key.
    """
    return module._modules


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether a hook runs before or after ``forward``; torch has no public query for hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Return whether a call of the module compiles it: ``torch.compile`` of it or its forward, or ``module.compile()``.

    The module that ``torch.compile`` makes is compiled as soon as it is made, as its type says.
    """
    kind = type(module)
    return (
        (kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo"))
        or module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def as_parameter(tensor: torch.Tensor) -> nn.Parameter:
    """Return an ``nn.Parameter`` without gradient on the storage of a plain tensor.

    ``nn.Parameter(tensor)`` ends in the same call after several checks, and a load makes hundreds of parameters.
    """
    parameter: nn.Parameter = torch.Tensor._make_subclass(nn.Parameter, tensor, False)
    return parameter


class FirstUseRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Number the storages that operators receive while the mode is active, in order of their first use.

    The dispatcher sees tensors that a function received without a call of the module that owns them, as attention does;
    module hooks would miss these.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: Rank by ``storage_address``.
        self.first_use: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # No compiler runs here. To shield the mode from it torch would import the compiler, which takes seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the storages among the arguments, nested ones included, and run the operator."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self.first_use.setdefault(storage_address(leaf), len(self.first_use))
        return func(*args, **(kwargs or {}))


class OperatorRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keep the names of operators in the order in which they run while the mode is active, without their overloads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the name, and run the operator."""
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def storage_address(tensor: torch.Tensor) -> int:
    """Return the address of the storage, which views and tied tensors share."""
    return tensor.untyped_storage().data_ptr()
