"""The options that commands share: their types, the bundles that go together, and the checks that need no model."""

import re
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from typer import Argument, Option

DATA, PRUNING, TRAINING, LATENCY = "Data", "Choice of units", "Training", "Latency budgets"
MACHINE, HUB = "Machine and output", "Hub"
PREPROCESSING = "Preprocessing, in place of the model's own"
# The packages of which each tracker needs one.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "csv": ()}

Model = Annotated[str, Argument(help="timm name, hf-hub:..., transformers repo id, folder, or package.module:fn")]
Folder = Annotated[str, Argument(metavar="DIR", help="folder that lfrns slim wrote")]
Dense = Annotated[str | None, Option(metavar="MODEL", help="its dense model, where its files do not name one")]
Weights = Annotated[
    str | None, Option(metavar="FILE", help="weights of the dense model: safetensors, .pth or .ckpt; or their folder")
]
Out = Annotated[str, Option(metavar="DIR", help="output folder")]
Overwrite = Annotated[bool, Option("--overwrite", help="replace the checkpoint in the folder, once there is a new one")]
Resume = Annotated[bool, Option("--resume", help="go on with what an interrupted run left in the folder")]
Batch = Annotated[int, Option(min=1, help="images per step over all processes")]
Flip = Annotated[
    bool,
    Option(
        "--flip/--no-flip",
        help="mirror half of the training images; not for digits or signs",
        rich_help_panel=TRAINING,
    ),
]
Rate = Annotated[
    float | None,
    Option(
        help="peak learning rate (default: 0.01 or 1e-4; with a teacher by what the cut changed)",
        rich_help_panel=TRAINING,
    ),
]
ImgSize = Annotated[
    int | None,
    Option(
        "--img-size",
        min=1,
        help="height and width in pixels that the model is used at (default: its own)",
        rich_help_panel=PREPROCESSING,
    ),
]
LogWith = Annotated[
    Literal["tensorboard", "trackio", "csv"] | None,
    Option(
        help="log loss, learning rate and accuracy of the training, in logs/ of the folder", rich_help_panel=TRAINING
    ),
]
Preset = Annotated[
    Literal["ours", "paper"],
    Option(help="ours, or paper for the paper's abstract taken literally", rich_help_panel=PRUNING),
]
Calibration = Annotated[int, Option(help="training images that units are ranked by", rich_help_panel=PRUNING)]
Exclude = Annotated[
    list[str] | None, Option(help="groups to leave alone: a name or glob, repeatable", rich_help_panel=PRUNING)
]
WithImages = Annotated[
    bool,
    Option(
        "--with-images", help="push clusters.png too, which shows some of your training images", rich_help_panel=HUB
    ),
]
License = Annotated[
    str | None,
    Option(metavar="ID", help="licence of the slim model, for the card: apache-2.0", rich_help_panel=HUB),
]
Seed = Annotated[
    int, Option(min=0, max=2**32 - 1, help="of the images drawn, their order, and training", rich_help_panel=MACHINE)
]
Json = Annotated[
    bool,
    Option("--json", help="one JSON document on stdout, and nothing else there", rich_help_panel=MACHINE),
]
Channels = tuple[float, float, float] | None


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images are prepared, where it is not as the model says."""

    mean: Annotated[Channels, Option(help="pixel mean per channel", rich_help_panel=PREPROCESSING)] = None
    std: Annotated[Channels, Option(help="pixel standard deviation per channel", rich_help_panel=PREPROCESSING)] = None
    crop_pct: Annotated[
        float | None,
        Option(help="share of the shorter side in the central crop, in (0, 1]", rich_help_panel=PREPROCESSING),
    ] = None
    interpolation: Annotated[str | None, Option(help="bilinear, bicubic, ...", rich_help_panel=PREPROCESSING)] = None

    def arguments(self) -> list[str]:
        """Return the options that prepare images in the same way in another command."""
        words = []
        for name, value in vars(self).items():
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)] if value is not None else []
        return words


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of a dense model is to be kept, as fractions in (0, 1]; given together, all hold."""

    SHORT: ClassVar[str] = "macs"

    macs: float | None = None
    params: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        check_share("--macs", self.macs, "MACs")
        check_share("--params", self.params, "parameters")
        check_share("--latency", self.latency, "time of a forward pass")

    @property
    def shares(self) -> dict[str, float]:
        """The fractions that are given, by what they are of."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Images:
    """The data of a command."""

    data: Annotated[
        str,
        Option("--data", metavar="DIR", help="image folder, parquet files, a Hub id, or digits", rich_help_panel=DATA),
    ]
    label_column: Annotated[
        str | None,
        Option(help="column in parquet files (default: fine_label or label)", rich_help_panel=DATA),
    ] = None
    val_split: Annotated[
        float | None,
        Option(metavar="SHARE", help="share of the training images to test on", rich_help_panel=DATA),
    ] = None
    class_map: Annotated[
        str | None,
        Option(metavar="FILE", help="class names in the model's order, one a line", rich_help_panel=DATA),
    ] = None
    max_unreadable: Annotated[
        int | None,
        Option(
            min=0,
            help="damaged images that may be left out of a split; more are an error (default: 50)",
            rich_help_panel=DATA,
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.val_split is not None and not 0 < self.val_split < 1:
            raise ValueError(
                f"--val-split {self.val_split:g}: the share of the training images to test on must be in (0, 1). For "
                "10 % pass 0.1."
            )
        if self.class_map is not None and not Path(self.class_map).is_file():
            raise ValueError(f"--class-map {self.class_map}: there is no such file. Give one with a class name a line.")

    def arguments(self) -> list[str]:
        """Return the options that name the same data to another command."""
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items()}
        return [word for option, value in given.items() if value is not None for word in (option, str(value))]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a command runs, and how much it prints."""

    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps", "xpu"],
        Option(help="auto: a GPU where there is one", rich_help_panel=MACHINE),
    ] = "auto"
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"] | None,
        Option(
            help="numbers to train in (default: bf16 where the processor multiplies it fast)", rich_help_panel=MACHINE
        ),
    ] = None
    workers: Annotated[
        int, Option(min=0, help="processes that read images; 0: this one alone", rich_help_panel=MACHINE)
    ] = 0
    quiet: Annotated[bool, Option("--quiet", help="no progress bars", rich_help_panel=MACHINE)] = False
    as_json: Json = False

    @property
    def progress(self) -> bool:
        """Whether bars are shown."""
        return not (self.quiet or self.as_json)


def check_license(license: str | None) -> None:
    """Refuse a licence that is no identifier of the Hub's.

    Raises:
        ValueError: It is none.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"--license {license}: licences have the Hub's identifiers, as apache-2.0, mit or other. See "
            "huggingface.co/docs/hub/repositories-licenses."
        )


def check_calibration(images: int) -> None:
    """Refuse to rank units by no image.

    Raises:
        ValueError: There is none.
    """
    if images < 1:
        raise ValueError(
            f"--calibration-images {images}: at least one image is needed to rank units by. The default is 2000."
        )


def check_rate(rate: float | None) -> None:
    """Refuse a learning rate of 0 or less.

    Raises:
        ValueError: It is.
    """
    if rate is not None and not rate > 0:
        raise ValueError(f"--learning-rate {rate:g}: it must be above 0. Leave it out for the default.")


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ValueError: It is not.
    """
    packages = TRACKERS[name] if name else ()
    if packages and not any(map(find_spec, packages)):
        raise ValueError(
            f"--log-with {name}: {name} is not installed. Run pip install {name}, or pass --log-with csv, which needs "
            "nothing more."
        )


def check_share(option: str, value: float | None, what: str) -> None:
    """Refuse a budget outside of (0, 1].

    Raises:
        ValueError: It is.
    """
    if value is not None and not 0 < value <= 1:
        hint = f"For {value:g} % pass {value / 100:g}." if 1 < value <= 100 else "For 50 % pass 0.5."
        raise ValueError(f"{option} {value}: the fraction of the {what} to keep must be in (0, 1]. {hint}")


def check_weights(weights: str | None, option: str = "MODEL", model: str | None = "") -> None:
    """Refuse a file of weights that is not there, or whose model is not named.

    Args:
        weights: What follows `--weights`.
        option, model: What names the model that they are of, and the name; None if it is left out.
    Raises:
        ValueError: It is not there, or not named.
    """
    if weights is not None and model is None:
        raise ValueError(
            f"--weights {weights}: are those of {option}, which is not given. Add it, or leave the weights out."
        )
    if weights is not None and not Path(weights).exists():
        raise ValueError(f"--weights {weights}: there is no such file. Give a .safetensors, .pth or .ckpt file.")


def check_repository(option: str, repo: str | None, *, owner_alone: bool = False) -> None:
    """Refuse what is no repository id of the Hub.

    Raises:
        ValueError: It is none.
    """
    if repo is not None and not re.fullmatch(r"[\w.-]+" if owner_alone else r"([\w.-]+/)?[\w.-]+", repo):
        if owner_alone:
            raise ValueError(f"{option} {repo}: is no user of the Hub. Name the user or the organisation alone.")
        raise ValueError(f"{option} {repo}: is no repository of the Hub. Name it as user/name.")


def check_module(option: str, module: str) -> None:
    """Refuse a module that can be found neither among those installed nor in the working directory.

    Raises:
        ValueError: It cannot.
    """
    package = module.partition(".")[0]  # its parts are looked for when it runs: finding them imports it
    if not package.isidentifier() or not (find_spec(package) or PathFinder.find_spec(package, [str(Path.cwd())])):
        raise ValueError(f"{option} {module}: there is no module of this name. For a file leave -m out.")


def read_list(text: str, option: str, kind: type) -> list[Any]:
    """Read numbers with commas between them.

    Raises:
        ValueError: One is no number.

    Example:
        >>> read_list("0.75,0.5", "--macs", float)
        [0.75, 0.5]
    """
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(
            f"{option} {text}: numbers with commas between them are needed, as 1,32 or 0.75,0.5."
        ) from error


def read_budgets(text: str) -> list[float]:
    """Read fractions of the MACs to keep, the largest first.

    Raises:
        ValueError: One is no number, or outside (0, 1].
    """
    budgets = read_list(text, "--macs", float)
    for budget in budgets:
        if not 0 < budget <= 1:
            hint = f" For {budget:g} % pass {budget / 100:g}." if 1 < budget <= 100 else ""
            raise ValueError(f"--macs {text}: each fraction of the MACs to keep must be in (0, 1].{hint}")
    return sorted(budgets, reverse=True)
