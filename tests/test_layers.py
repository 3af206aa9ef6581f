"""Imports point downward only, and what is pure stays pure: read from the source, so that nothing can slip through."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "serve_app"

#: Layer -> layers below it that it may import; its own modules always, ``serve_app`` itself (the version) always.
MAY_IMPORT = {
    "errors": set(),
    "core": {"errors"},
    "workload": {"errors", "core"},
    "config": {"errors", "core", "workload"},
    "simulator": {"errors", "core", "workload", "config"},
    "store": {"errors", "core"},
    "tasks": {"errors", "core"},
    "models": {"errors", "core", "store", "tasks"},
    "serving": {"errors", "core", "config", "store", "tasks", "models"},
}
#: The top of the package: these import everything, and nothing below imports them.
TOP = {"cli", "__main__", "__init__"}
#: The folders of ``core``, the highest first: each imports those after it and the files beside them.
CORE_PACKAGES = ("coordination", "placement", "routing", "cluster", "cache", "policies")
TORCH = {"torch", "torchvision", "timm", "safetensors"}
#: Reads the clock, the machine or global randomness, or brings threads: what ``core`` gets as arguments instead.
IMPURE = {
    "asyncio", "concurrent", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "queue", "secrets",
    "select", "shutil", "signal", "socket", "subprocess", "sys", "tempfile", "threading", "time", "uuid",
}  # fmt: skip
ROUTER_MODULES = ("serve_app.serving.router.router", "serve_app.serving.api.http_app", "serve_app.serving.app")


def modules(layer: str | None = None) -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    return [path for path in found if layer is None or layer_of(path.relative_to(PACKAGE).parts[0]) == layer]


def layer_of(name: str) -> str:
    return name.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            assert node.module is not None
            if node.module == "serve_app":
                yield from (f"serve_app.{alias.name}" for alias in node.names)
            else:
                yield node.module


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, names: Mapping[str, Path]) -> Iterator[str]:
    """Modules among ``names`` that a file imports, also those that ``from package import module`` names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in names or node.module in names:
                    yield whole if whole in names else str(node.module)


def layers_imported(path: Path) -> set[str]:
    own = {name.split(".")[1] for name in imports(path) if name.startswith("serve_app.")}
    return {layer_of(name) for name in own if not name.startswith("__version")}


def packages_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_downward_only(path: Path) -> None:
    layer = layer_of(path.relative_to(PACKAGE).parts[0])
    if layer in TOP:
        return
    assert layer in MAY_IMPORT, f"{layer} is in no layer: add it to serve_app/docs/architecture.md and here"
    assert layers_imported(path) <= MAY_IMPORT[layer] | {layer}


@pytest.mark.parametrize("path", modules("core"), ids=name_of)
def test_packages_of_core_import_lower_packages_only(path: Path) -> None:
    package = path.relative_to(PACKAGE / "core").parts[0]
    imported = {name.split(".")[2] for name in imports(path) if name.startswith("serve_app.core.")}
    below = CORE_PACKAGES[CORE_PACKAGES.index(package) :] if package in CORE_PACKAGES else ()
    assert imported & set(CORE_PACKAGES) <= set(below)


@pytest.mark.parametrize("package", ["serve_app", "loadtests"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    names = {module_name(path): path for path in sorted((PACKAGE.parent / package).rglob("*.py"))}
    below = {name: {found for found in imported_modules(path, names) if found != name} for name, path in names.items()}
    done: set[str] = set()
    while ready := {name for name in below.keys() - done if below[name] <= done}:
        done |= ready
    assert not below.keys() - done, "these import each other, or what does"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_the_models_package_imports_torch(path: Path) -> None:
    if path not in modules("models"):
        assert not packages_imported(path) & TORCH


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_the_serving_package_imports_ray(path: Path) -> None:
    if path not in modules("serving"):
        assert "ray" not in packages_imported(path)


@pytest.mark.parametrize("path", modules("core"), ids=name_of)
def test_core_is_built_from_the_standard_library_and_numpy_alone(path: Path) -> None:
    assert packages_imported(path) <= sys.stdlib_module_names | {"numpy", "serve_app"}


@pytest.mark.parametrize("path", modules("core"), ids=name_of)
def test_core_reads_no_clock_and_no_machine(path: Path) -> None:
    assert not packages_imported(path) & IMPURE


@pytest.mark.parametrize("path", modules("core") + modules("workload"), ids=name_of)
def test_randomness_comes_in_as_an_argument(path: Path) -> None:
    """``random.Random`` may be named, but neither the global generator nor numpy's may be called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"{name_of(path)}:{node.lineno}: random.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            assert {alias.name for alias in node.names} <= {"Random", "Generator"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not (called == "random.Random" and not node.args), f"{name_of(path)}:{node.lineno}: unseeded"
            assert not called.startswith(("np.random.", "numpy.random.")), f"{name_of(path)}:{node.lineno}: {called}"
            assert called not in ("open", "input", "print"), f"{name_of(path)}:{node.lineno}: {called}"


@pytest.mark.slow
def test_the_router_does_not_import_torch() -> None:
    script = f"import sys, {', '.join(ROUTER_MODULES)}; print(sorted({TORCH!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_core_does_not_import_anything_heavy() -> None:
    heavy = TORCH | {"ray", "yaml", "pydantic", "fastapi"}
    script = (
        "import sys, serve_app.core.routing.choose, serve_app.core.coordination.coordinator_state; "
        f"print(sorted({heavy!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
