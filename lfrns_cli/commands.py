"""Every command: its options and what can be checked of them at once; lfrns_hub/cli does the work."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from lfrns_cli.app import app, call, command
from lfrns_cli.options import (
    DATA,
    HUB,
    LATENCY,
    MACHINE,
    PRUNING,
    TRAINING,
    Batch,
    Budget,
    Calibration,
    Dense,
    Exclude,
    Flip,
    Folder,
    Images,
    ImgSize,
    Json,
    License,
    LogWith,
    Machine,
    Model,
    Out,
    Overwrite,
    Preprocessing,
    Preset,
    Rate,
    Resume,
    Seed,
    Weights,
    WithImages,
    check_calibration,
    check_license,
    check_module,
    check_rate,
    check_repository,
    check_share,
    check_tracker,
    check_weights,
    read_budgets,
    read_list,
)
from lfrns_cli.zoo_file import read_zoo

MAKE, LOOK, JUDGE, SHIP = "Make a slim checkpoint", "Look at a model first", "Measure a checkpoint", "Take it elsewhere"
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@command(
    "train:train",
    "lfrns train resnet50.a1_in1k --data DIR --val-split 0.1 --epochs 10 --out dense/",
    "lfrns train google/vit-base-patch16-224-in21k --data DIR --img-size 384 --out dense/",
    panel=MAKE,
)
@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a dense model on your images, as lfrns slim needs it: with a new head where its classes are others.

    The folder is of timm's or transformers' own layout, which both open, and lfrns slim too. The weights are saved as
    soon as they are trained. What was interrupted goes on with the same command and --resume.
    """

    model: Model
    weights: Weights = None
    out: Out
    overwrite: Overwrite = False
    resume: Resume = False
    epochs: Annotated[int, Option(min=1, help="passes over the training images", rich_help_panel=TRAINING)] = 3
    learning_rate: Rate = None
    log_with: LogWith = None
    batch_size: Batch = 64
    images: Images
    flip: Flip = True
    img_size: ImgSize = None
    preprocessing: Preprocessing
    seed: Seed = 0
    machine: Machine

    def __post_init__(self) -> None:
        check_weights(self.weights)
        check_rate(self.learning_rate)
        check_tracker(self.log_with)


@command(
    "make:slim",
    "lfrns slim resnet50 --weights my.pth --data DIR --val-split 0.1 --macs 0.5 --epochs 10 --out slim/",
    "lfrns slim resnet50.a1_in1k --data DIR --macs 0.75,0.5,0.35 --out zoo/",
    "lfrns slim resnet50.a1_in1k --data DIR --latency 0.5 --latency-threads 4 --out fast/",
    "accelerate launch -m lfrns_hub slim google/vit-base-patch16-224 --data DIR --macs 0.5 --out slim/",
    panel=MAKE,
)
@dataclass(frozen=True, kw_only=True)
class Slim:
    """Slim a trained model to a budget, retrain it, measure both, save it with its card.

    Several budgets share one analysis; each gets a folder of its own, named as on the Hub, under one README.
    What was interrupted goes on with the same command and --resume.
    """

    model: Model
    weights: Weights = None
    macs: Annotated[
        str | None, Option(help="fraction of the MACs to keep, in (0, 1]; several make a folder of checkpoints")
    ] = None
    params: Annotated[float | None, Option(help="fraction of the parameters to keep, in (0, 1]")] = None
    latency: Annotated[
        float | None, Option(help="fraction of the time of a forward pass to keep, in (0, 1], measured here")
    ] = None
    out: Out
    overwrite: Overwrite = False
    resume: Resume = False
    epochs: Annotated[
        int,
        Option(min=0, help="epochs of retraining with the dense model as teacher", rich_help_panel=TRAINING),
    ] = 3
    learning_rate: Rate = None
    log_with: LogWith = None
    batch_size: Batch = 64
    preset: Preset = "ours"
    calibration_images: Calibration = 2000
    fcr_steps: Annotated[
        int, Option(min=0, help="training steps of the FCR gates; 0 ranks by cost", rich_help_panel=PRUNING)
    ] = 200
    exclude: Exclude = None
    latency_batch: Annotated[int, Option(min=1, help="images in a timed pass", rich_help_panel=LATENCY)] = 1
    latency_threads: Annotated[
        int | None, Option(min=1, help="CPU threads of a timed pass (default: all)", rich_help_panel=LATENCY)
    ] = None
    latency_compile: Annotated[
        bool, Option("--latency-compile", help="time the model under torch.compile", rich_help_panel=LATENCY)
    ] = False
    images: Images
    flip: Flip = True
    img_size: ImgSize = None
    preprocessing: Preprocessing
    seed: Seed = 0
    push_to_hub: Annotated[
        str | None,
        Option(
            metavar="REPO",
            help="repository for the finished checkpoint; for several the user alone",
            rich_help_panel=HUB,
        ),
    ] = None
    with_images: WithImages = False
    base_model: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="origin of the weights, for the card: a timm name, Hub id or folder",
            rich_help_panel=HUB,
        ),
    ] = None
    license: License = None
    machine: Machine

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None and self.latency is None:
            raise ValueError(
                "lfrns slim: --macs, --params or --latency must say how much to keep. For half of the MACs: --macs 0.5."
            )
        check_share("--params", self.params, "parameters")
        check_share("--latency", self.latency, "time of a forward pass")
        if self.several and self.push_to_hub and "/" in self.push_to_hub:
            raise ValueError(
                f"--push-to-hub {self.push_to_hub}: {len(self.budgets)} budgets make as many repositories, named as "
                "their folders. Give the user or the organisation alone."
            )
        check_repository("--push-to-hub", self.push_to_hub, owner_alone=self.several)
        check_license(self.license)
        check_weights(self.weights)
        check_rate(self.learning_rate)
        check_tracker(self.log_with)
        timed = {"--latency-batch": self.latency_batch != 1, "--latency-threads": self.latency_threads is not None}
        timed["--latency-compile"] = self.latency_compile
        if self.latency is None and (idle := [option for option, given in timed.items() if given]):
            raise ValueError(
                f"{idle[0]}: says how --latency is timed, which is not asked for. Add it, or leave this out."
            )
        if self.with_images and not self.push_to_hub:
            raise ValueError("--with-images: says what --push-to-hub sends, and nothing is pushed. Leave it out.")
        check_calibration(self.calibration_images)

    @property
    def budgets(self) -> list[Budget]:
        """What is to be kept: for each fraction of the MACs, the largest first, the other fractions as well."""
        shares = [None] if self.macs is None else read_budgets(self.macs)
        return [Budget(macs=share, params=self.params, latency=self.latency) for share in shares]

    @property
    def several(self) -> bool:
        """Whether there are several budgets, and so checkpoints."""
        return len(self.budgets) > 1

    @property
    def arch(self) -> str:
        """What the names of several checkpoints begin with."""
        return self.model


@command(
    "make:retrain",
    "lfrns retrain slim/ --data DIR --teacher resnet50 --weights my.pth --epochs 10",
    "accelerate launch -m lfrns_hub retrain slim/ --data DIR",
    panel=MAKE,
)
@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Train a slim model further, and bring its weights, record and card up to date.

    The weights are saved as soon as they are trained. The dense model is measured next to the slim one where it is the
    teacher, or found again by what the record says of its weights; it teaches only where it is named. What was
    interrupted goes on with the same command and --resume, and starts again with --no-resume.
    """

    directory: Folder
    teacher: Annotated[str | None, Option(metavar="MODEL", help="dense model to learn from")] = None
    weights: Weights = None
    resume: Annotated[
        bool | None, Option("--resume/--no-resume", help="go on with an interrupted retraining, or drop it")
    ] = None
    epochs: Annotated[int, Option(min=1, help="passes over the training images", rich_help_panel=TRAINING)] = 3
    learning_rate: Rate = None
    log_with: LogWith = None
    batch_size: Batch = 64
    images: Images
    flip: Flip = True
    seed: Seed = 0
    machine: Machine

    def __post_init__(self) -> None:
        check_weights(self.weights, "--teacher", self.teacher)
        check_rate(self.learning_rate)
        check_tracker(self.log_with)


@command("zoo:zoo", "lfrns zoo zoo.yaml", "lfrns zoo zoo.yaml --json > zoo.json", panel=MAKE)
@dataclass(frozen=True, kw_only=True)
class Zoo:
    """Slim several models to several budgets, time them, and compare all in one table; push and collect them if asked.

    Each model has a process of its own; one that fails or is killed stands in the table with its reason.
    What was interrupted goes on with the same command. docs/zoo.md shows such a file.
    """

    file: Annotated[str, Argument(metavar="FILE", help="yaml with models, budgets, data, training and runtimes")]
    as_json: Json = False

    def __post_init__(self) -> None:
        read_zoo(self.file)


@app.command(rich_help_panel=MAKE, context_settings=PASSED_ON)
def demo(context: typer.Context) -> object:
    """Slim a small ViT on handwritten digits: minutes, no network. Takes recipes/vit_digits.py's options and --json."""
    return partial(call, "make:demo", context.args)


@command(
    "look:units",
    "lfrns units resnet50",
    "lfrns units resnet50 --macs 0.5",
    "lfrns units my_package.module:build --json",
    panel=LOOK,
)
@dataclass(frozen=True, kw_only=True)
class Units:
    """List what can be removed from a model, and what cannot and why. Needs no weights and no network.

    MACs are the share of the model's in layers that make or read the units; a layer between two groups counts for both.
    Groups that are not exact are approximate: removing a unit changes a norm, so they are cut only on request.
    """

    model: Model
    macs: Annotated[
        float | None,
        Option(help="show sizes at this fraction of the MACs too, all groups narrowed alike; data decide otherwise"),
    ] = None
    img_size: ImgSize = None
    as_json: Json = False

    def __post_init__(self) -> None:
        check_share("--macs", self.macs, "MACs")


@command(
    "look:curve",
    "lfrns curve resnet50 --weights my.pth --data DIR --val-split 0.1",
    "lfrns curve resnet50.a1_in1k --data DIR --macs 0.9,0.7,0.5 --picture curve.png",
    panel=LOOK,
)
@dataclass(frozen=True, kw_only=True)
class Curve:
    """Show accuracy against MACs and latency at a ladder of budgets, without training, before one is chosen.

    Accuracies are those right after the cut; retraining brings much of the loss back.
    """

    model: Model
    weights: Weights = None
    macs: Annotated[str, Option(help="fractions of the MACs to keep")] = "0.9,0.75,0.6,0.5,0.35,0.25"
    preset: Preset = "ours"
    calibration_images: Calibration = 1000
    test_images: Annotated[
        int, Option(min=1, help="images that accuracy is measured on, at most", rich_help_panel=DATA)
    ] = 2000
    fcr_steps: Annotated[
        int, Option(min=0, help="training steps of the gates at each budget; 0 ranks by cost", rich_help_panel=PRUNING)
    ] = 0
    exclude: Exclude = None
    picture: Annotated[str, Option(metavar="FILE", help="the PNG to write", rich_help_panel=MACHINE)] = "curve.png"
    batch_size: Batch = 64
    images: Images
    img_size: ImgSize = None
    preprocessing: Preprocessing
    seed: Seed = 0
    machine: Machine

    def __post_init__(self) -> None:
        read_budgets(self.macs)
        check_weights(self.weights)


@app.command(rich_help_panel=LOOK, context_settings=PASSED_ON)
def coverage(context: typer.Context) -> object:
    """Try networks: build, slim, self-check, save, load, compare. Every family, or those named (--help: options)."""
    return partial(call, "look:coverage", context.args)


@command(
    "judge:evaluate",
    "lfrns evaluate slim/ --data DIR --val-split 0.1",
    "lfrns evaluate slim/ --data DIR --dense resnet50 --weights my.pth --json",
    panel=JUDGE,
)
@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a slim model again, and bring its record and card up to date.

    Its dense model is measured next to it where it is named, or found again by what the record says of its weights.
    """

    directory: Folder
    dense: Annotated[str | None, Option(metavar="MODEL", help="dense model to measure next to it")] = None
    weights: Weights = None
    batch_size: Batch = 64
    images: Images
    machine: Machine

    def __post_init__(self) -> None:
        check_weights(self.weights, "--dense", self.dense)


@command(
    "judge:predict",
    "lfrns predict slim/ cat.jpg dog.jpg",
    "lfrns predict slim/ photos/ --top 3 --json",
    panel=JUDGE,
)
@dataclass(frozen=True, kw_only=True)
class Predict:
    """Show what a slim model says of some photos: its classes and their probabilities, or its numbers."""

    directory: Folder
    photos: Annotated[list[str], Argument(metavar="PHOTO...", help="image files, or folders of them")]
    dense: Dense = None
    top: Annotated[int, Option(min=1, help="classes shown for each photo")] = 5
    as_json: Json = False

    def __post_init__(self) -> None:
        if missing := [photo for photo in self.photos if not Path(photo).exists()]:
            raise ValueError(f"lfrns predict: {missing[0]}: there is no such file. Name images, or folders of them.")


@command(
    "judge:bench",
    "lfrns bench slim/",
    "lfrns bench slim/ --batches 1,8,64 --runs 100 --json --plot speed.png",
    panel=JUDGE,
)
@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time a slim model against its dense one, in turns: eager, compiled, and in ONNX Runtime (on the CPU, if there).

    Medians, with first and third quartile; the ratio is that of passes side by side. Memory is the peak of a forward
    pass, weights included, in a fresh process. Speed does not depend on weights: those of the dense model are random.
    """

    directory: Folder
    dense: Dense = None
    batches: Annotated[str, Option(help="images per pass")] = "1,32"
    runs: Annotated[int, Option(help="timed passes of each runtime and batch, at most")] = 30
    seconds: Annotated[
        float, Option(min=0, help="seconds of passes for each runtime and batch; at least five passes")
    ] = 5.0
    compile: Annotated[bool, Option("--compile/--no-compile", help="try torch.compile, which takes long")] = True
    plot: Annotated[str | None, Option(metavar="FILE", help="chart to write (default: bench.png in DIR)")] = None
    as_json: Json = False

    def __post_init__(self) -> None:
        if min(self.sizes) < 1:
            raise ValueError(f"--batches {self.batches}: each must be 1 or more, as 1,32.")
        if self.runs < 1:
            raise ValueError(f"--runs {self.runs}: it must be 1 or more. The default is 30.")

    @property
    def sizes(self) -> list[int]:
        """The batch sizes."""
        return read_list(self.batches, "--batches", int)


@command(
    "cards:card",
    "lfrns card slim/",
    "lfrns card zoo/",
    panel=SHIP,
)
@dataclass(frozen=True, kw_only=True)
class Card:
    """Write cards anew from their records, without loading weights; sections that people wrote stay.

    Of a folder with an index, as lfrns slim at several budgets and lfrns zoo write it, the index and all below it.
    """

    directories: Annotated[list[str], Argument(metavar="DIR...", help="checkpoints, or folders of them")]
    as_json: Json = False

    def __post_init__(self) -> None:
        if missing := [name for name in self.directories if not Path(name).is_dir()]:
            raise ValueError(f"lfrns card {missing[0]}: there is no such folder. Name one that lfrns slim wrote.")


@command("ship:push", "lfrns push slim/ user/resnet50.lfrns50", "lfrns push slim/ user/name --private --pr", panel=SHIP)
@dataclass(frozen=True, kw_only=True)
class Push:
    """Push a folder to the Hub, as one commit: the checkpoint's own files; what else lies there stays and is named.

    Weights that come from others' are not pushed where these state no licence, or one that forbids it, until --license
    says under which one the slim model may be shared.
    """

    directory: Folder
    repo: Annotated[str, Argument(help="repository on the Hub, user/name")]
    private: Annotated[bool, Option("--private", help="create the repository as private")] = False
    revision: Annotated[str | None, Option(help="branch to push to, created if it does not exist")] = None
    message: Annotated[str | None, Option(help="commit message")] = None
    pull_request: Annotated[bool, Option("--pr", help="open a pull request instead of committing")] = False
    with_images: WithImages = False
    license: License = None
    as_json: Json = False

    def __post_init__(self) -> None:
        check_repository("lfrns push: REPO", self.repo)
        check_license(self.license)
        if not Path(self.directory).is_dir():
            raise ValueError(f"lfrns push {self.directory}: there is no such folder. Push one that lfrns slim wrote.")


@command(
    "ship:export", "lfrns export slim/ --format onnx", "lfrns export slim/ --format pt2 --out model.pt2", panel=SHIP
)
@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a slim model as ONNX or as a torch.export archive, checked against PyTorch before it is put in place."""

    directory: Folder
    format: Annotated[Literal["onnx", "pt2"], Option(help="onnx, or pt2 for torch.export's archive")] = "onnx"
    out: Annotated[str | None, Option(metavar="FILE", help="file to write (default: model.FORMAT in DIR)")] = None
    dense: Dense = None
    as_json: Json = False


@command(
    "ship:run",
    "lfrns run validate.py --model local-dir:slim/ --data-dir DIR",
    "lfrns run train.py --model local-dir:slim/ --pretrained --data-dir DIR --epochs 10",
    "lfrns run -m my_package.evaluate slim/",
    panel=SHIP,
    passes_on=True,
)
@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a Python script, such as timm's validate.py, in which timm and transformers know slim checkpoints.

    It uses the timm that is installed. For several processes: torchrun --nproc-per-node 2 -m lfrns_hub run train.py
    """

    script: Annotated[str, Argument(metavar="SCRIPT", help="script to run, or with -m a module")]
    arguments: Annotated[
        list[str] | None, Argument(metavar="ARGUMENT...", help="arguments of the script", show_default=False)
    ] = None
    module: Annotated[bool, Option("-m", "--module", help="SCRIPT is a module, as in python -m")] = False

    def __post_init__(self) -> None:
        if self.module:
            check_module("lfrns run -m", self.script)
        elif not Path(self.script).exists():
            raise ValueError(
                f"lfrns run {self.script}: there is no such file. timm's scripts are in its repository, not in its "
                "package: clone it and give the path."
            )
