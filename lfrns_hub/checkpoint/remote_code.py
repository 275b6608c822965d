"""The file in a checkpoint for `trust_remote_code=True`: with it the checkpoint opens without lfrns_hub.

It is composed of our own sources, so that no code exists twice: narrow.py, compat.py and the other files that a kind
needs, each without its imports of the package, and a tail that names the classes.
"""

import ast
from pathlib import Path
from typing import Any

from lfrns_hub.checkpoint.narrow_classes import CLASS_PREFIX, MODELING, own_names

MODELING_FILE = f"{MODELING}.py"
HERE = Path(__file__).parent
NARROW, COMPAT = HERE.parent / "format" / "narrow.py", HERE.parent / "format" / "compat.py"
CLASSES, ENTRYPOINT = HERE / "narrow_classes.py", HERE / "entrypoint.py"
HEAD = '''"""Opens this checkpoint in transformers by trust_remote_code=True; made from the sources of lfrns_hub.

No forward is overridden: stock classes, whose layers take the sizes that config.json states.
"""

'''
CONVERSION = "get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping"


def auto_map(config: str, classifier: str, base: str | None) -> dict[str, str]:
    """Return the `auto_map` of config.json.

    Args:
        config: Name of the stock config class as transformers exports it, "ViTConfig".
        classifier: Name of the stock classifier.
        base: Name of the stock model in it, for AutoModel; None where AutoModel cannot load it.
    """
    names = {"AutoConfig": config, "AutoModel": base, "AutoModelForImageClassification": classifier}
    return {auto: f"{MODELING}.{CLASS_PREFIX}{name}" for auto, name in names.items() if name}


def write_code(folder: Path, names: dict[str, Any], base_source: Path | None = None) -> None:
    """Write the modeling file of a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        names: Its auto_map; other entries are ignored, and nothing is written if none is ours.
        base_source: Source of a timm model that timm itself does not have.
    """
    ours = {auto: name.removeprefix(f"{MODELING}.{CLASS_PREFIX}") for auto, name in own_names(names).items()}
    config, classifier = ours.get("AutoConfig"), ours.get("AutoModelForImageClassification")
    if config is None or classifier is None:
        return
    wraps_timm = config == "TimmWrapperConfig"
    imports, bodies = {"import transformers"}, []
    for path in [
        NARROW,
        COMPAT,
        CLASSES,
        *([ENTRYPOINT] if wraps_timm else []),
        *([base_source] if base_source else []),
    ]:
        outside, body = split_source(path)
        imports |= outside
        bodies.append(body)
    tail = (_wrapper_tail if wraps_timm else _narrow_tail)(config, classifier, ours.get("AutoModel"))
    if wraps_timm:
        imports.add(f"from transformers.conversion_mapping import {CONVERSION}")
    text = HEAD + "\n".join(sorted(imports)) + "\n\n" + "\n\n".join([*bodies, tail])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODELING_FILE).write_text(text, encoding="utf-8")


def split_source(path: Path) -> tuple[set[str], str]:
    """Split a source into its imports from outside the package, and the code after its imports."""
    text = path.read_text(encoding="utf-8")
    imports = [node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    outside = {ast.unparse(node) for node in imports if not ast.unparse(node).startswith("from lfrns_hub")}
    return outside, "\n".join(text.splitlines()[max(node.end_lineno for node in imports) :]).strip("\n") + "\n"


def _narrow_tail(config: str, classifier: str, base: str | None) -> str:
    """Return the code that names the narrow classes of one kind of transformers model."""
    ours = [CLASS_PREFIX + name for name in (config, classifier, base or "")]
    text = f"{ours[0]} = narrow_config(transformers.{config}, __name__)\n"
    text += f"{ours[1]} = narrow_class(transformers.{classifier}, {ours[0]}, __name__)\n"
    return text + (f"{ours[2]} = narrow_base(transformers.{base}, {ours[1]}, __name__)\n" if base else "")


def _wrapper_tail(config: str, classifier: str, base: str | None) -> str:
    """Return the code that names the classes for a wrapped timm model, whose file lacks the wrapper's prefix."""
    ours = CLASS_PREFIX + config
    text = f"{ours} = narrow_config(transformers.{config}, __name__)\n"
    for name in filter(None, (classifier, base)):
        text += f"{CLASS_PREFIX}{name} = wrapper_class(transformers.{name}, {ours}, __name__)\n"
    mapping = f"get_checkpoint_conversion_mapping(transformers.{config}.model_type)"
    return text + f"register_checkpoint_conversion_mapping({ours}.model_type, {mapping}, overwrite=True)\n"
