"""Write docs/api.md, the reference of the public names, from their docstrings: `python docs/render_api.py`.

tests/test_api.py compares the page with what this gives, and runs the examples.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
WIDTH = 100  # of a signature on one line
SECTIONS = {
    "Slim": (
        "lfrns_hub.slim",
        "lfrns_hub.analyse",
        "lfrns_hub.analysis.Analysis",
        "lfrns_hub.method.report.SlimResult",
        "lfrns_hub.method.report.SlimReport",
        "lfrns_hub.method.report.GroupReport",
        "lfrns_hub.LatencySetup",
        "lfrns_hub.options.FindOptions",
        "lfrns_hub.options.CutOptions",
        "lfrns_hub.options.RunOptions",
    ),
    "Look at a model": (
        "lfrns_hub.find_units",
        "lfrns_hub.check",
        "lfrns_hub.self_check.CheckReport",
        "lfrns_hub.UnitGroup",
        "lfrns_hub.SlimPlan",
    ),
    "Train and measure": (
        "lfrns_hub.retrain",
        "lfrns_hub.measure",
        "lfrns_hub.Record",
        "lfrns_hub.measure.evaluate",
        "lfrns_hub.measure.count_macs",
    ),
    "Save, load, push": ("lfrns_hub.save", "lfrns_hub.load", "lfrns_hub.push"),
    "Models and images": (
        "lfrns_hub.zoo.create_dense",
        "lfrns_hub.zoo.load_data",
        "lfrns_hub.zoo.make_transform",
        "lfrns_hub.zoo.set_preprocessing",
        "lfrns_hub.zoo.check_images",
        "lfrns_hub.zoo.guard_against_chance",
        "lfrns_hub.zoo.example_input",
        "lfrns_hub.pictures.load_processor",
        "lfrns_hub.pictures.stream.stream_data",
    ),
    "Extend": ("lfrns_hub.register_adapter", "lfrns_hub.widths", "lfrns_hub.list_adapters", "lfrns_hub.register_op"),
    "Cut by a plan of your own": ("lfrns_hub.surgery.cut", "lfrns_hub.surgery.masked"),
}
HEAD = """# Reference

The public names, by `python docs/render_api.py` from their docstrings; for the command line, `lfrns COMMAND --help`.
Shapes stand in brackets: N images, C channels, H rows and W columns of pixels, U units, K classes. One MAC is two
FLOPs. The examples need `import timm, torch`, `import lfrns_hub as lfrns` and the name itself.
"""


def find(name: str) -> Any:
    """Return what a dotted name means."""
    module, _, attribute = name.rpartition(".")
    # By import: `lfrns_hub.measure` is a function, and also the module of `lfrns_hub.measure.evaluate`.
    return getattr(importlib.import_module(module), attribute)


def signature(target: Any, name: str) -> str:
    """Return the signature of a function, a dataclass or a method as its source writes it."""
    node = ast.parse(textwrap.dedent(inspect.getsource(target))).body[0]
    gives = ""
    if isinstance(node, ast.ClassDef):
        parts = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
        parts = [re.sub(r" = field\(default_factory=(\w+)\)$", r" = \1()", part) for part in parts]
    else:
        arguments = node.args
        arguments.args = [each for each in arguments.args if each.arg not in ("self", "cls")]
        gives = f" -> {ast.unparse(node.returns)}"
        parts = list(_arguments(arguments))
    line = f"{name}({', '.join(parts)}){gives}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){gives}"])


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    """Yield each argument with its type and default."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    for each, default in zip(plain, defaults, strict=True):
        yield ast.unparse(each) + (f" = {ast.unparse(default)}" if default else "")
    if arguments.vararg:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield ast.unparse(each) + (f" = {ast.unparse(default)}" if default else "")
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def sections(text: str) -> dict[str, str]:
    """Divide a docstring into its text, under "", and its sections, by their headings."""
    headings = r"^(Args|Attributes|Returns|Raises|Example|Source):(?: |\n|$)"
    first, *rest = re.split(headings, text, flags=re.MULTILINE)
    return {"": first.strip()} | {
        key: textwrap.dedent(body.strip("\n")) for key, body in zip(rest[::2], rest[1::2], strict=True)
    }


def items(body: str) -> list[tuple[str, str]]:
    """Return the names and texts of a section that lists them; its further lines are indented."""
    found = re.findall(r"^(\S.*?(?:,\n .*?)*?):\s+(.*(?:\n[ \n].*)*)", body, flags=re.MULTILINE)
    return [(" ".join(names.split()), " ".join(text.split())) for names, text in found]


def render_text(text: str) -> str:
    """Render a docstring: lists of names, paragraphs, the example as code."""
    parts = sections(text)
    lines = [parts.pop("")]
    for heading, body in parts.items():
        if heading == "Example":
            lines.append(f"```python\n{body.strip()}\n```")
        elif heading in ("Returns", "Source"):
            lines.append(f"**{heading}:** {body.strip()}")
        else:
            listed = [f"- {_code(names)}: {told}" for names, told in items(body)]
            lines.append("\n".join([f"**{heading}:**", "", *listed]))
    return "\n\n".join(lines)


def _code(names: str) -> str:
    """Render names with commas between them as code."""
    return ", ".join(f"`{name}`" for name in names.split(", "))


def render(name: str) -> str:
    """Render a public name: its signature, its docstring and, of a class, its public methods."""
    target, short = find(name), name.rpartition(".")[2]
    lines = [f"### {name}", f"```python\n{signature(target, short)}\n```", render_text(inspect.getdoc(target) or "")]
    if is_dataclass(target):
        for method, value in vars(target).items():
            value = getattr(value, "__func__", value)
            if inspect.isfunction(value) and method[0] != "_":
                lines.append(f"#### {short}.{method}")
                lines.append(f"```python\n{signature(value, method)}\n```")
                lines.append(render_text(inspect.getdoc(value) or ""))
    return "\n\n".join(lines)


def anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def render_page() -> str:
    """Render the page: a list of contents, then each section."""
    contents = [
        f"- [{title}](#{anchor(title)}): "
        + ", ".join(f"[{name.rpartition('.')[2]}](#{anchor(name)})" for name in names)
        for title, names in SECTIONS.items()
    ]
    body = [f"## {title}\n\n" + "\n\n".join(map(render, names)) for title, names in SECTIONS.items()]
    return "\n\n".join([HEAD.strip(), "\n".join(contents), *body]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
