"""The yaml file of `lfrns zoo`: what it may hold, and the reader that refuses everything else; without torch."""

import difflib
import re
from collections.abc import Callable, Hashable
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from typer import Option

from lfrns_cli.options import (
    Batch,
    Budget,
    Calibration,
    Flip,
    Images,
    Preprocessing,
    Preset,
    Rate,
    Seed,
    check_calibration,
    check_license,
    check_rate,
    check_repository,
)

Runtime = Literal["eager", "compiled", "onnxruntime"]
FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # a number to everybody but YAML 1.1, as 1e-4
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
MAX_SHOWN = 80  # characters of a value in an error
Least = Annotated[int, Option(min=0)]
Positive = Annotated[int, Option(min=1)]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images of a model: those that `--data` and the options beside it name."""

    SHORT: ClassVar[str] = "path"

    path: str
    label_column: str | None = None
    val_split: float | None = None
    class_map: str | None = None
    max_unreadable: Least | None = None

    def __post_init__(self) -> None:
        Images(data=self.path, val_split=self.val_split)  # the place of class_map is not known yet

    @property
    def images(self) -> Images:
        """The same as options."""
        return Images(data=self.path, **{name: value for name, value in vars(self).items() if name != "path"})


@dataclass(frozen=True, kw_only=True)
class Training:
    """How slim models are retrained, with the dense one as teacher."""

    epochs: Least = 3
    learning_rate: Rate = None
    batch_size: Batch = 64
    flip: Flip = True

    def __post_init__(self) -> None:
        check_rate(self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How units are chosen."""

    preset: Preset = "ours"
    calibration_images: Calibration = 2000
    fcr_steps: Least = 200

    def __post_init__(self) -> None:
        check_calibration(self.calibration_images)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How the passes of a latency budget are timed."""

    batch: Positive = 1
    threads: Positive | None = None
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    workers: Least = 0


@dataclass(frozen=True, kw_only=True)
class Model:
    """A dense model; a section that it has of its own stands in place of the common one."""

    SHORT: ClassVar[str] = "model"

    model: str
    name: str | None = None
    weights: str | None = None
    license: str | None = None
    base_model: str | None = None
    exclude: list[str] | None = None
    budgets: list[Budget] | None = None
    data: Data | None = None
    preprocessing: Preprocessing | None = None
    training: Training | None = None
    pruning: Pruning | None = None

    def __post_init__(self) -> None:
        check_license(self.license)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model with all that its run needs: paths in full, the common sections filled in.

    Attributes:
        name: Its folder, and the beginning of its checkpoints' names.
    """

    name: str
    model: str
    weights: str | None
    license: str | None
    base_model: str | None
    exclude: list[str] | None
    budgets: list[Budget]
    data: Data
    preprocessing: Preprocessing
    training: Training
    pruning: Pruning
    latency: Latency
    machine: Device
    seed: int


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """The whole file."""

    out: str
    models: list[Model]
    budgets: list[Budget] | None = None
    data: Data | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    training: Training = field(default_factory=Training)
    pruning: Pruning = field(default_factory=Pruning)
    latency: Latency = field(default_factory=Latency)
    runtimes: list[Runtime] | None = None
    machine: Device = field(default_factory=Device)
    seed: Seed = 0
    push_to_hub: str | None = None
    private: bool = False
    with_images: bool = False
    collection: str | None = None

    def __post_init__(self) -> None:
        check_repository("--push-to-hub", self.push_to_hub, owner_alone=True)
        for name in ("private", "with_images", "collection"):
            if getattr(self, name) and self.push_to_hub is None:
                raise ValueError(
                    f"--{name} {getattr(self, name)}: says something of what is pushed, and nothing is. Add "
                    "push_to_hub: USER, or leave this out."
                )


@dataclass(frozen=True)
class ZooPlan:
    """What a file asks for.

    Attributes:
        zoo: The file.
        out: The folder of the zoo.
        runs: One for each model, in the file's order.
    """

    zoo: Zoo
    out: Path
    runs: list[Run]


def read_zoo(path: str) -> ZooPlan:
    """Read a file; relative paths in it are relative to its folder.

    Raises:
        ValueError: The file is not there or no YAML, or it has an unknown key, a value of another type or out of its
            range, a file that is not there, or two things of one name; the message has the path of the key.
    """
    if not Path(path).is_file():
        raise ValueError(f"lfrns zoo {path}: there is no such file. docs/zoo.md shows one.")
    content = _load(path)
    try:
        zoo: Zoo = read(Zoo, content, "")
        runs = [_run_of(zoo, place, Path(path).parent) for place in range(len(zoo.models))]
        _refuse_same_names(runs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ZooPlan(zoo, (Path(path).parent / Path(zoo.out).expanduser()).resolve(), runs)


def _load(path: str) -> Any:
    """Parse the file; a key that stands twice, of which YAML would drop one, is refused."""
    import yaml  # here: help needs none

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for place, key in enumerate(keys):
                if key in keys[:place]:
                    line = node.value[place][0].start_mark.line + 1
                    raise ValueError(f"line {line}: {key} stands there for the second time. Leave one of them.")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path}: is no YAML that can be read ({problem[:200]}). Mend it first.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read(kind: Any, value: Any, where: str) -> Any:
    """Return a value of JSON or YAML as a type: a dataclass, a list, a tuple, a choice or a plain one.

    A section may be a single value, which is that of the field its class calls SHORT.

    Args:
        kind: The type; the least number that an option of the command line takes holds here as well.
        value: The value.
        where: Path of its key, for errors; "" for the whole file.
    Raises:
        ValueError: It is not of that type, or breaks a rule of its class.
    """
    if get_origin(kind) is Annotated:
        plain, *options = get_args(kind)
        found = read(plain, value, where)
        least = next((option.min for option in options if getattr(option, "min", None) is not None), None)
        most = next((option.max for option in options if getattr(option, "max", None) is not None), None)
        if found is not None and ((least is not None and found < least) or (most is not None and found > most)):
            bound = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"{where} {_shown(value)}: it must be {bound}.")
        return found
    if get_origin(kind) in (Union, UnionType):
        kinds = [part for part in get_args(kind) if part is not NoneType]
        return None if value is None else read(kinds[0], value, where)
    if is_dataclass(kind):
        return _read_section(kind, value, where)
    if get_origin(kind) in (list, tuple):
        return _read_items(kind, value, where)
    if get_origin(kind) is Literal:
        if value in get_args(kind) and isinstance(value, str):
            return value
        quoted = " Write it in quotes: to YAML a bare no is false." if isinstance(value, bool) else ""
        raise ValueError(f"{where} {_shown(value)}: must be one of {', '.join(get_args(kind))}.{quoted}")
    if kind is float and isinstance(value, str) and FLOAT.fullmatch(value):
        return float(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is float and value != value):
        raise ValueError(f"{where} {_shown(value)}: {WORDS[kind]} is needed.")
    return value


def _read_items(kind: Any, value: Any, where: str) -> Any:
    """Read a list, or a tuple of so many values."""
    parts = get_args(kind)
    if not isinstance(value, list) or (get_origin(kind) is tuple and len(value) != len(parts)):
        needed = "a list" if get_origin(kind) is list else f"a list of {len(parts)} numbers"
        raise ValueError(f"{where} {_shown(value)}: {needed} is needed.")
    kinds = parts if get_origin(kind) is tuple else parts * len(value)
    items = [read(part, item, f"{where}[{place}]") for place, (part, item) in enumerate(zip(kinds, value, strict=True))]
    return get_origin(kind)(items)


def _read_section(kind: Any, value: Any, where: str) -> Any:
    """Read the keys of a section; what its class says of options is said of keys."""
    short = getattr(kind, "SHORT", None)
    if short is not None and value is not None and not isinstance(value, (dict, list)):
        value = {short: value}
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} {_shown(value)}: keys with their values are needed.")
    known = {one.name: one for one in fields(kind)}
    inside: Callable[[Any], str] = lambda key: f"{where}.{key}" if where else str(key)  # noqa: E731
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" There are {', '.join(known)}."
            raise ValueError(f"{inside(key)} {_shown(value[key])}: there is no such key.{hint}")
    for name, one in known.items():
        if name not in value and one.default is one.default_factory is MISSING:
            raise ValueError(f"{inside(name)}: is missing. It must be given.")
    given = {key: read(known[key].type, part, inside(key)) for key, part in value.items()}
    try:
        return kind(**given)
    except ValueError as error:
        said = re.sub(r"^--([\w-]+)", lambda found: inside(found[1].replace("-", "_")), str(error))
        raise ValueError(said) from error


def _shown(value: Any) -> str:
    """Return a value for an error: one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _run_of(zoo: Zoo, place: int, folder: Path) -> Run:
    """Fill in what a model takes from the common sections, with paths in full."""
    model, where = zoo.models[place], f"models[{place}]"
    budgets, data = model.budgets or zoo.budgets, model.data or zoo.data
    if not budgets:
        raise ValueError(f"{where}.budgets: is missing. Give budgets of all models, as budgets: [0.75, 0.5].")
    if data is None:
        raise ValueError(f"{where}.data: is missing. Give the data of all models, as data: DIR.")
    of_data = f"{where}.data" if model.data else "data"
    data = replace(
        data,
        path=_located(folder, data.path, f"{of_data}.path"),
        class_map=_file(folder, data.class_map, f"{of_data}.class_map"),
    )
    of_budgets = f"{where}.budgets" if model.budgets else "budgets"
    for number, budget in enumerate(budgets):
        if not budget.shares:
            raise ValueError(f"{of_budgets}[{number}]: names nothing to keep. Give macs, params or latency.")
    name = model.name or re.sub(r"[^\w-]+", "_", Path(model.model.rpartition(":")[2]).name.partition(".")[0])
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII) or name == "work":
        raise ValueError(
            f"{where}.name {_shown(name)}: a folder and repositories are named by it: letters, digits, - and _ alone, "
            "and not work."
        )
    return Run(
        name=name,
        model=_located(folder, model.model, f"{where}.model"),
        weights=_file(folder, model.weights, f"{where}.weights"),
        license=model.license,
        base_model=None if model.base_model is None else _located(folder, model.base_model, f"{where}.base_model"),
        exclude=model.exclude,
        budgets=budgets,
        data=data,
        preprocessing=model.preprocessing or zoo.preprocessing,
        training=model.training or zoo.training,
        pruning=model.pruning or zoo.pruning,
        latency=zoo.latency,
        machine=zoo.machine,
        seed=zoo.seed,
    )


def _located(folder: Path, text: str, where: str) -> str:
    """Return the full path of a folder where one is meant, any other name as it is."""
    prefix, _, rest = text.rpartition("local-dir:")
    path = folder / Path(rest).expanduser()
    if path.exists():
        return f"local-dir:{path.resolve()}" if text.startswith("local-dir:") else str(path.resolve())
    if prefix or text.startswith("local-dir:") or rest.startswith((".", "/", "~")) or rest.count("/") > 1:
        raise ValueError(f"{where} {text}: there is no such folder. Paths are relative to the file's own folder.")
    return text


def _file(folder: Path, text: str | None, where: str) -> str | None:
    """Return the full path of a file, or of a folder of files, that must be there."""
    if text is None:
        return None
    path = folder / Path(text).expanduser()
    if not path.exists():
        raise ValueError(f"{where} {text}: there is no such file. Paths are relative to the file's own folder.")
    return str(path.resolve())


def _refuse_same_names(runs: list[Run]) -> None:
    """Refuse two models of one name, and two budgets of one model that would be named alike."""
    if not runs:
        raise ValueError("models []: at least one is needed.")
    names: dict[str, int] = {}
    for place, run in enumerate(runs):
        if run.name.lower() in names:
            raise ValueError(
                f"models[{place}].name {run.name}: is that of models[{names[run.name.lower()]}] as well. Give each a "
                "name: of its own."
            )
        names[run.name.lower()] = place
        shown = [{kind: f"{100 * share:.4g}" for kind, share in budget.shares.items()} for budget in run.budgets]
        for number, budget in enumerate(shown):
            if budget in shown[:number]:
                raise ValueError(f"models[{place}]: budgets[{number}] {budget}: stands there twice. Leave one.")


def settings_of(run: Run) -> dict[str, Any]:
    """Return what the checkpoints of a model depend on, as JSON has it.

    Not the budgets, of which each is a checkpoint, the licence, which is text on a card, and where it runs.
    """
    settings = asdict(run)
    for name in ("license", "budgets"):
        del settings[name]
    for section, name in (("machine", "device"), ("machine", "workers"), ("data", "max_unreadable")):
        del settings[section][name]
    return settings
