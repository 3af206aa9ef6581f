"""One test for each private name of torch: after an upgrade the failing test says which name changed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from serve_app.models import torch_internals
from serve_app.models.torch_internals import (
    FirstUseRecorder,
    as_parameter,
    buffer_table,
    child_table,
    has_forward_hooks,
    is_compiled,
    parameter_table,
    storage_address,
)


def test_module_parameters_is_the_table_that_forward_reads() -> None:
    module = nn.Linear(2, 2, bias=False)
    assert list(parameter_table(module)) == ["weight", "bias"], "an absent parameter has a place as well"
    assert parameter_table(module)["bias"] is None
    parameter_table(module)["weight"] = nn.Parameter(torch.eye(2), requires_grad=False)
    parameter_table(module)["bias"] = nn.Parameter(torch.ones(2), requires_grad=False)
    assert module(torch.tensor([2.0, 3.0])).tolist() == [3, 4]


def test_module_parameters_takes_a_meta_tensor_back() -> None:
    module = nn.Linear(2, 2)
    parameter_table(module)["weight"] = torch.empty(2, 2, device="meta")
    assert module.weight.is_meta


def test_module_buffers_holds_the_non_persistent_ones() -> None:
    module = nn.Module()
    module.register_buffer("scale", torch.ones(1), persistent=False)
    assert "scale" not in module.state_dict()
    buffer_table(module)["scale"] = torch.full((1,), 2.0)
    assert module.scale.tolist() == [2]


def test_module_modules_replaces_a_child_of_any_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Flatten())
    child_table(module)["0"] = nn.Identity()
    assert module(torch.ones(1, 2)).tolist() == [[1, 1]]
    assert [name for name, _ in module.named_modules()] == ["", "0", "1"]


def test_state_tables_are_all_that_a_module_keeps_tensors_and_children_in() -> None:
    module = nn.BatchNorm2d(2)
    module.add_module("child", nn.Identity())
    holders = {
        name
        for name, value in vars(module).items()
        if isinstance(value, dict) and any(isinstance(item, torch.Tensor | nn.Module) for item in value.values())
    }
    assert holders == set(torch_internals.STATE_TABLES)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_module_forward_hooks_and_forward_pre_hooks_list_what_was_registered(register: str) -> None:
    module = nn.Identity()
    assert not has_forward_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert has_forward_hooks(module)
    handle.remove()
    assert not has_forward_hooks(module)


@pytest.mark.slow
def test_torchvision_is_imported_without_the_compiler_which_can_still_be_imported() -> None:
    program = """
import sys, torch
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.models.builders.registry import build_on_meta
torchvision = import_torchvision()
assert build_on_meta("torchvision:vit_b_32", "random:0").heads.head.weight.is_meta
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
boxes = torch.tensor([[0.0, 0.0, 3.0, 3.0]])
print(torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [boxes], 2).sum().item())
import torch._dynamo.utils
print(torch._dynamo.utils.is_compile_supported("cpu"))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False", "4.0", "True"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_modules_are_known_before_they_run() -> None:
    class CompiledForward(nn.Linear):
        @torch.compile
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    compiled_in_place = nn.Linear(2, 2)
    compiled_in_place.compile()
    assert is_compiled(torch.compile(nn.Linear(2, 2)))
    assert is_compiled(compiled_in_place)
    assert is_compiled(CompiledForward(2, 2))
    assert not is_compiled(nn.Linear(2, 2))


def test_tensor_make_subclass_gives_a_parameter_on_the_same_storage() -> None:
    tensor = torch.arange(6.0)[1:].as_strided((2, 2), (1, 2))
    parameter = as_parameter(tensor)
    assert type(parameter) is nn.Parameter
    assert (parameter.data_ptr(), parameter.stride(), parameter.shape) == (tensor.data_ptr(), (1, 2), (2, 2))
    assert not parameter.requires_grad


def test_tensor_make_subclass_works_in_inference_mode() -> None:
    with torch.inference_mode():
        parameter = as_parameter(torch.ones(2))
    assert parameter.is_inference()
    assert isinstance(parameter, nn.Parameter)


def test_python_dispatch_mode_sees_operators_and_their_results_pass_through() -> None:
    first, second = torch.ones(2), torch.ones(2)
    recorder = FirstUseRecorder()
    with recorder:
        result = first + 1
        torch.nn.functional.linear(result[None], second[None])
    assert result.tolist() == [2, 2]
    order = [recorder.first_use[storage_address(tensor)] for tensor in (first, result, second)]
    assert order == sorted(order)
    before = dict(recorder.first_use)
    torch.ones(2) + 1
    assert recorder.first_use == before, "the mode ends with its block"


def test_should_skip_dynamo_spares_the_import_of_the_compiler() -> None:
    assert "_should_skip_dynamo" in vars(torch.utils._python_dispatch.TorchDispatchMode)
    assert not hasattr(FirstUseRecorder.__torch_dispatch__, "__wrapped__"), "the wrapper imports torch._dynamo"


def test_pytree_finds_tensors_that_are_nested_in_the_arguments() -> None:
    parts = [torch.ones(1), torch.zeros(1)]
    recorder = FirstUseRecorder()
    with recorder:
        torch.cat(parts)
    assert [recorder.first_use[storage_address(part)] for part in parts] == [0, 1]
