"""Imports point one way, and each large dependency has its door: read from the source, so nothing can slip in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lfrns_hub"
RECIPES = PACKAGE.parent / "recipes"

# The rooms of the package, floor by floor: each imports what lies on a lower floor alone.
FLOORS = (
    {"format", "models"},
    {"units", "runs"},
    {"model_io"},
    {"trace", "measure"},
    {"method", "runtimes"},
    {"surgery"},
    {"latency"},
    {"options"},
    {"self_check"},
    {"plots", "retrain"},
    {"hub"},
    {"pictures"},
    {"checkpoint"},
    {"zoo", "analysis", "recipe"},
    {"slim"},
    {"coverage", "__init__"},
    {"cli"},
    {"__main__"},
)
# The steps of the method, in reading order: each imports those before it alone.
STEPS = ("taps", "responses", "redundancy", "fold", "gates", "costs", "ledger", "pruning_set", "fcr", "restore",
         "reconstruct", "recalibrate", "report", "provenance")  # fmt: skip
# One door per dependency.
DOORS = {
    "timm": {"zoo", "hub", "pictures", "checkpoint", "models", "coverage"},
    "transformers": {"format", "zoo", "pictures", "checkpoint", "coverage"},
    "datasets": {"pictures"},
    "accelerate": {"retrain", "recipe"},
    "huggingface_hub": {"hub", "zoo", "pictures", "checkpoint"},
    "typer": set(),  # lfrns_cli's alone
    "onnxruntime": {"runtimes"},
    "matplotlib": {"plots"},
}
# What takes long to import and only some calls need.
LATE = {"accelerate", "datasets", "matplotlib", "onnxruntime", "pandas", "scipy", "sklearn"} | {
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


def test_the_floors_have_every_room_once() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert sorted(rooms) == sorted(MODULES)
    assert sorted(STEPS) == sorted(path.stem for path in (PACKAGE / "method").glob("[!_]*.py"))
    assert len(list(PACKAGE.glob("*.py"))) <= 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_lower_floors_alone(path: Path) -> None:
    own = next(number for number, floor in enumerate(FLOORS) if module_of(path) in floor)
    below = set().union(*FLOORS[:own])
    # `from lfrns_hub import recipe` names the package too; where the room is allowed, so is that.
    strange = edges(path) - below - {""}
    assert not strange, f"{path.name} imports {sorted(strange)}, which do not lie below {module_of(path)}"


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_the_method_imports_those_before_it_alone(step: str) -> None:
    names = {name.split(".")[2] for name in imported(PACKAGE / "method" / f"{step}.py") if ".method." in name}
    assert names <= set(STEPS[: STEPS.index(step)])


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


# Functions of more than 60 lines, each with the reason.
LONG = {
    "hub/card.py render_card": "one call that names every field of card.md",
    "retrain/train.py retrain": "checks the arguments of a public call, then runs it",
}
# Functions of more than twelve parameters: public calls, and timm's entry point, which takes a network's own.
WIDE = {"slim.py slim", "slim.py analyse", "retrain/train.py retrain", "checkpoint/entrypoint.py lfrns_slim"}


def test_functions_are_short_and_take_few_parameters() -> None:
    long, wide = set(), set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                name = f"{path.relative_to(PACKAGE)} {node.name}"
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and node.end_lineno - body[0].lineno >= 60:
                    long.add(name)
                if sum(map(len, (node.args.posonlyargs, node.args.args, node.args.kwonlyargs))) > 12:
                    wide.add(name)
    assert long == LONG.keys() and wide == WIDE
    assert len((PACKAGE / "slim.py").read_text(encoding="utf-8").splitlines()) <= 260


def test_one_file_registers_hooks() -> None:
    found = [path.relative_to(PACKAGE) for path in FILES if re.search(r"\.register_\w*hook\(", path.read_text())]
    assert found == [Path("model_io", "hooks.py")]


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
import lfrns_cli.commands, lfrns_hub.cli.make, lfrns_hub.cli.look, lfrns_hub.cli.judge, lfrns_hub.cli.ship
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    registered, package, command_line = done.stdout.splitlines()
    assert registered == "True True True"
    for entry, modules in (("lfrns_hub", package.split()), ("lfrns_hub.cli", command_line.split())):
        assert entry in modules
        assert not LATE & set(modules)
