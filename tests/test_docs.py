"""Documentation and docstrings name what exists: files, classes, commands, options, modules, pages and headings."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from serve_app.cli.main import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "serve_app" / "docs"
#: Everything that a reader opens. The changelog also tells of what was.
PAGES = [
    ROOT / "README.md",
    ROOT / "loadtests" / "RESULTS.md",
    *sorted((ROOT / ".github").glob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
    *sorted(DOCS.glob("*.md")),
]
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
FOLDERS = ("serve_app/", "tests/", "loadtests/", "deploy/", ".github/", ".ci/")
ENDINGS = r"\.(?:py|md|yaml|yml|toml|csv|cff|sh|conf)"
FILE = re.compile(r"[\w.*{},-]+" + ENDINGS)
#: A file, perhaps with some of its folders, as docstrings name it.
FILE_IN_DOCSTRING = re.compile(r"``([\w./-]+" + ENDINGS + ")``")
#: Files that users have, or that commands make.
NOT_OURS = {"keras26_profiles.csv", "ray-cluster.yaml", "small.safetensors"}
#: Names in CamelCase that others define.
FOREIGN = {"UnixDomainSocket"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def spans(page: Path) -> list[str]:
    """What stands in backticks, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line, word by word, in backticks or in a code block for a shell."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(page)]:
        for part in re.split(r"&&|;|\|", line):
            words = part.split("#")[0].strip()
            if words.startswith(("edgeserve ", "python -m ", "python ", "locust ")):
                yield shlex.split(words)


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)
current_pages = pytest.mark.parametrize("page", CURRENT, ids=name_of)


@current_pages
def test_files_that_are_named_exist(page: Path) -> None:
    missing = []
    for span in spans(page):
        path = span.split(":")[0].split(" ")[0]
        if path.startswith(FOLDERS):
            if not any(ROOT.glob(path.rstrip("/"))):
                missing.append(span)
        elif FILE.fullmatch(span) and span not in NOT_OURS and not list(ROOT.glob(span)):
            # A file by its name alone must be one of the repository's, or one that a command writes for its user.
            names = [found for found in ROOT.glob("*/**/" + span) if ".git" not in found.parts]
            if not names:
                missing.append(span)
    assert not missing


def test_files_that_docstrings_name_exist() -> None:
    paths = [path for name in FOLDERS for path in (ROOT / name).rglob("*")] + list(ROOT.glob("*"))
    files = [f"/{name_of(path)}" for path in paths]
    named = {
        (name_of(module), name)
        for module in (ROOT / "serve_app").rglob("*.py")
        for docstring in docstrings(module)
        for name in FILE_IN_DOCSTRING.findall(docstring)
    }
    assert named
    assert [(module, name) for module, name in named if not any(file.endswith(f"/{name}") for file in files)] == []


@current_pages
def test_classes_that_are_named_exist(page: Path) -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in python_files())
    named = {span.split(".")[0].split("(")[0] for span in spans(page)}
    classes = {name for name in named if re.fullmatch(r"[A-Z][a-z]+(?:[A-Z][a-z]+)+", name)}
    assert {name for name in classes if f"class {name}" not in source} <= FOREIGN


@current_pages
def test_commands_that_are_named_exist(page: Path) -> None:
    for words in commands(page):
        if words[0] == "edgeserve":
            check_edgeserve(words[1:])
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, " ".join(words)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), " ".join(words)
        else:
            assert (ROOT / words[words.index("-f") + 1]).is_file(), " ".join(words)


def check_edgeserve(words: list[str]) -> None:
    """That ``edgeserve`` has this command, and the command has these options."""
    name = words[0]
    if not re.fullmatch(r"[a-z]+", name):  # `edgeserve COMMAND --help`, `edgeserve --version`
        return
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"edgeserve has no command {name!r}"
    if isinstance(command, click.Group) and len(words) > 1:
        command = command.get_command(click.Context(command), words[1])
        assert command is not None, f"edgeserve {name} has no command {words[1]!r}"
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    used = {re.sub(r"[\[\]]", "", word).partition("=")[0] for word in words[1:]}
    assert {word for word in used if word.startswith("--")} <= known | {"--help"}, " ".join(words)


@pages
def test_links_within_the_repository_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        linked = page if not path else page.parent / path
        assert linked.exists(), target
        if heading:
            assert heading in slugs(linked), target


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_lines_of_prose_are_no_longer_than_those_of_code(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long


def test_the_readme_is_short_and_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert "pip install -e '.[weights]' && edgeserve up" in lines
    assert "pip install -e '.[test]' && pytest" in lines


def test_every_page_of_the_documentation_is_in_its_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index] == []


def test_every_command_is_documented() -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert [name for name in cli.list_commands(click.Context(cli)) if f"edgeserve {name}" not in page] == []


def test_every_policy_is_documented() -> None:
    from serve_app.simulator.scenario import ALL_POLICIES

    page = (DOCS / "policies.md").read_text(encoding="utf-8")
    assert [name for name in ALL_POLICIES if f"`{name}`" not in page] == []


def test_every_package_is_in_the_architecture() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    packages = [*(ROOT / "serve_app").iterdir(), *(ROOT / "serve_app" / "core").iterdir()]
    folders = [package for package in packages if package.is_dir() and (package / "__init__.py").is_file()]
    assert [name_of(folder) for folder in folders if f"`{name_of(folder)}/`" not in page] == []


def test_the_table_of_layers_is_the_one_that_holds() -> None:
    from test_layers import MAY_IMPORT

    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `serve_app/(\w+)(?:/|\.py)` \|[^|]*\|([^|]*)\|$", page, flags=re.MULTILINE)
    table = {layer: set(re.findall(r"`(\w+)`", imported)) for layer, imported in rows if layer != "cli"}
    assert table == MAY_IMPORT


def test_the_packages_of_core_are_listed_in_their_order() -> None:
    from test_layers import CORE_PACKAGES

    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    places = [page.index(f"| `serve_app/core/{package}/` |") for package in CORE_PACKAGES]
    assert places == sorted(places)


def docstrings(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def python_files() -> Iterator[Path]:
    for folder in ("serve_app", "loadtests", "deploy"):
        yield from (ROOT / folder).rglob("*.py")
