"""Imports point one way, and each large dependency has its door: read from the source, so nothing can slip in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lfrns_hub"
RECIPES = PACKAGE.parent / "recipes"

# What every module may import: data, how a batch and an answer look, how a model comes and is copied.
COMMON = {"units", "batches", "answers", "model_io", "running", "untrusted", "narrow", "format"}
# What else each may; a module that is not named here may import COMMON alone.
ALLOWED = {
    "untrusted": {"narrow"},
    "format": set(),
    "trace": {"adapters", "narrow"},
    "responses": {"taps"},
    "runs": set(),
    "measure": {"runs"},
    "resume": {"runs"},
    "cache": {"resume", "runs"},
    "contribution": {"taps", "responses", "cache"},
    "costs": {"taps", "responses", "redundancy", "contribution"},
    "latency": {"measure", "cache", "runs", "surgery"},
    "options": {"latency", "responses"},
    "select": {"trace", "responses", "redundancy", "latency"},
    "surgery": {"taps", "adapters", "narrow", "responses"},
    "reconstruct": {"taps", "trace", "responses"},
    "judge": {"responses"},
    "self_check": {"narrow", "surgery", "trace"},
    "report": {"taps", "responses", "redundancy"},
    "slim": {
        "trace",
        "self_check",
        "report",
        "responses",
        "redundancy",
        "contribution",
        "costs",
        "select",
        "surgery",
        "reconstruct",
        "judge",
        "taps",
        "measure",
        "options",
        "checkpoint",
        "cache",
        "latency",
    },
    "retrain": {"measure", "resume", "seeded", "cache", "self_check", "surgery", "taps"},
    "pictures": {"compat", "reach"},
    "stream": {"pictures", "seeded"},
    "lineage": {"reach"},
    "zoo": {"models", "pictures", "reach", "checkpoint", "lineage", "format"},
    "checkpoint": {
        "compat",
        "zoo",
        "pictures",
        "adapters",
        "surgery",
        "narrow",
        "format",
        "models",
        "card",
        "hub",
        "plots",
        "lineage",
        "measure",
        "handwritten",
        "runs",
    },
    "hub": {"reach", "handwritten", "runs"},
    "card": {"measure", "plots", "lineage"},
    "plots": {"measure", "runs"},
    "gallery": {"slim", "taps", "report", "redundancy", "plots", "runs"},
    "recipe": {"measure", "gallery", "resume", "hub", "retrain", "surgery", "checkpoint", "runs"},
    "export": {"runs"},
    "bench": {"export", "measure"},
    "index": {"measure", "plots", "runs"},
    "coverage": {"slim", "self_check", "trace", "checkpoint", "measure", "zoo", "recipe"},
    "cli": {
        "compat",
        "recipe",
        "measure",
        "latency",
        "checkpoint",
        "runs",
        "retrain",
        "pictures",
        "zoo",
        "coverage",
        "slim",
        "plots",
        "export",
        "bench",
        "index",
    },
    "__main__": {"cli"},
    "__init__": {"adapters", "trace", "latency", "slim", "retrain", "measure", "checkpoint", "hub", "models"},
}
# One door per dependency.
DOORS = {
    "timm": {"zoo", "lineage", "pictures", "checkpoint", "models", "adapters", "coverage"},
    "transformers": {"compat", "zoo", "pictures", "checkpoint", "adapters", "coverage"},
    "datasets": {"pictures"},
    "accelerate": {"retrain", "responses", "contribution", "checkpoint"},
    "huggingface_hub": {"hub", "handwritten", "card", "reach", "lineage", "zoo", "pictures", "checkpoint"},
    "typer": {"cli", "compat"},
    "onnxruntime": {"export"},
    "matplotlib": {"plots", "gallery"},
}
# What takes long to import and only some calls need.
LATE = {"datasets", "matplotlib", "onnxruntime", "pandas", "scipy", "sklearn"} | {
    f"transformers.{name}" for name in ("modeling_utils", "trainer", "models.vit.modeling_vit")
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name; `from a import b` gives a and a.b."""
    names: set[str] = set()
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*parts[: len(parts) - node.level], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def module_of(path: Path) -> str:
    """The module of the layout a file belongs to: its own name, or its folder's."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = {module_of(path) for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts)


def edges(path: Path) -> set[str]:
    """The modules of the package, other than its own, that a file imports; "" is the package itself."""
    found = set()
    for name in imported(path):
        head, _, rest = name.partition(".")
        if head == PACKAGE.name:
            part = rest.partition(".")[0]
            found.add(part if part in MODULES else "")
    # `from lfrns_hub.units import UnitGroup` names the module itself, never the package.
    plain = {name for name in imported(path) if name == PACKAGE.name}
    return found - {module_of(path)} - (set() if plain else {""})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_before_it(path: Path) -> None:
    allowed = COMMON | ALLOWED.get(module_of(path), set())
    # `from lfrns_hub import recipe` names the package too; where the module is allowed, so is that.
    strange = edges(path) - allowed - {""}
    assert not strange, f"{path.name} imports {sorted(strange)}; allowed: {sorted(allowed)}"


def test_no_module_imports_itself_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if module_of(path) not in ("__init__", "__main__"):
            graph.setdefault(module_of(path), set()).update(edges(path) - {""})
    while free := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in free}
    assert not graph, f"a circle of imports among {sorted(graph)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_dependency_is_imported_at_its_door_alone(path: Path) -> None:
    for dependency, doors in DOORS.items():
        if dependency in {name.partition(".")[0] for name in imported(path)}:
            assert module_of(path) in doors, f"{path.name} imports {dependency}; its doors are {sorted(doors)}"


@pytest.mark.parametrize(
    "path", [*sorted((PACKAGE / "cli").glob("*.py")), *sorted(RECIPES.glob("*.py"))], ids=lambda path: path.name
)
def test_recipes_and_the_command_line_use_public_names_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("lfrns", "recipe")
        ):
            assert not node.attr.startswith("_")


def test_no_module_is_a_drawer_for_anything() -> None:
    assert not MODULES & {"utils", "helpers", "common", "misc"}


def test_nothing_pickles_and_nothing_asserts_on_input() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert "pickle" not in imported(path), path.name
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], f"{path.name} asserts"


def test_importing_registers_every_model_and_leaves_what_is_slow_for_later() -> None:
    code = """
import sys, lfrns_hub
from timm.models import is_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(is_model("lfrns_slim"), "lfrns_vit" in CONFIG_MAPPING, "lfrns_timm_wrapper" in CONFIG_MAPPING)
print(*sys.modules)
import lfrns_hub.cli
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    registered, package, command_line = done.stdout.splitlines()
    assert registered == "True True True"
    for entry, modules in (("lfrns_hub", package.split()), ("lfrns_hub.cli", command_line.split())):
        assert entry in modules
        assert not LATE & set(modules)
