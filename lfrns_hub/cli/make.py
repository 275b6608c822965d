"""Commands that make a slim checkpoint: demo, slim, retrain."""

import argparse
import contextlib
import json
import runpy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_cli.commands import Retrain, Slim
from lfrns_hub import recipe
from lfrns_hub.cli.cards import push_each
from lfrns_hub.cli.checkpoints import dense_beside, earlier_record, load_slim, refresh
from lfrns_hub.cli.data import analyse_images, load_images, shuffled, start_accelerator
from lfrns_hub.cli.dense_again import remember_dense, size_beside
from lfrns_hub.cli.logs import Logs
from lfrns_hub.cli.resume import LeftOver, is_unfinished, kept_run, record_of_ended
from lfrns_hub.cli.saving import described_later, train_each
from lfrns_hub.cli.terminal import layer_table, show
from lfrns_hub.hub.index import checkpoint_name, write_index
from lfrns_hub.hub.lineage import refuse_unlicensed
from lfrns_hub.measure import Record, format_table, main_figure, measure_each
from lfrns_hub.method.report import SlimResult
from lfrns_hub.pictures import load_processor
from lfrns_hub.runs.progress import about
from lfrns_hub.zoo import check_images, create_dense, origin_of, set_preprocessing, starts_random

PACKAGE = Path(__file__).resolve().parent.parent


def demo(arguments: list[str]) -> None:
    """Run the digits recipe, with its record as JSON on request."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    script = _digits_recipe()
    sys.argv = [str(script), *rest]
    try:
        with contextlib.redirect_stdout(sys.stderr) if own.json else contextlib.nullcontext():
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:  # a run that --resume finds finished, or one that SIGTERM stopped
        if ended.code:
            raise
    parser.add_argument("--output-dir", default="out/vit_digits")
    record = Path(parser.parse_known_args(rest)[0].output_dir) / "record.json"
    if own.json and record.is_file():
        print(record.read_text(encoding="utf-8"), end="")


@dataclass
class Made:
    """What a run of `lfrns slim` made.

    Attributes:
        results: By the checkpoints' folders.
        rows: Their records, as JSON has them; fewer where they could not be measured.
        failed: Why a budget has no checkpoint, by folder.
        out_of_reach: Those of them that no further try would change.
        lines: What else is to be said: unreadable images, where the index is.
    """

    results: dict[Path, SlimResult]
    rows: list[dict[str, Any]]
    failed: dict[Path, str]
    out_of_reach: dict[Path, str]
    lines: list[str]


def slim(asked: Slim) -> int:
    """Slim a model to each budget, retrain, measure, save and push; returns 1 where a budget failed."""
    if asked.push_to_hub and asked.license is None:  # known before anything is made
        facts = origin_of(asked.model, weights=asked.weights, base_model=asked.base_model)
        refuse_unlicensed(facts, f"lfrns slim: --push-to-hub {asked.push_to_hub}")
    run = LeftOver(Path(asked.out).resolve() / "work", vars(asked), afresh="Pass --overwrite")
    resume = asked.resume and (run.unfinished or run.finished)
    directory = recipe.check_output_dir(
        asked.out, resume=resume, overwrite=asked.overwrite, option="--out", several=asked.several
    )
    accelerator = start_accelerator(asked.machine, asked.seed, log_with=asked.log_with, directory=directory)
    folders = folders_of(asked, directory)
    for folder in dict.fromkeys([directory, *folders]):
        recipe.hold(folder, f"--out {asked.out}", accelerator)
    if resume:
        run.check()
        if run.finished:
            return _show_again(asked, folders, accelerator)
    made = make(asked, directory, run, accelerator, resume=resume)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        failed = {str(folder): why for folder, why in made.failed.items()}
        _push_and_show(asked, list(made.results), made.rows, failed, made.lines)
    accelerator.end_training()
    return 1 if made.failed else 0


def folders_of(asked: Slim, directory: Path) -> list[Path]:
    """Return the folder of each budget's checkpoint: of one alone the output folder, of several one each in it."""
    if not asked.several:
        return [directory]
    data = asked.images.data
    return [directory / checkpoint_name(asked.arch, data, **asdict(budget)) for budget in asked.budgets]


def make(
    asked: Slim, directory: Path, run: LeftOver, accelerator: Any, *, resume: bool, tolerant: bool = False
) -> Made:
    """Make the checkpoints of all budgets, from the model to the index over them.

    Args:
        asked: The options.
        directory: The output folder, which the process holds, and the folders in it.
        run: The run in it.
        accelerator: Of the run.
        resume: Go on with what was interrupted there.
        tolerant: A budget out of reach leaves the others.
    """
    machine, folders = asked.machine, folders_of(asked, directory)
    dense = create_dense(asked.model, weights=asked.weights, img_size=asked.img_size)
    set_preprocessing(dense, **vars(asked.preprocessing))
    train = load_images(asked.images, dense, "train", augment=True, flip=asked.flip)
    test = load_images(asked.images, dense, "validation")
    test_loader = DataLoader(test, asked.batch_size, num_workers=machine.workers)
    run.refuse_other_data("training images", train)
    run.refuse_other_data("test images", test)
    stages = {folder: _stage(directory, folder) for folder in folders}
    logs = Logs(asked.log_with, directory, run, list(stages.values()), resume=resume)
    with kept_run(run, accelerator, resume=resume) as work:
        results, out_of_reach, calibrated = _cut(asked, folders, dense, accelerator, work / "slim", tolerant=tolerant)
        run.drop_before(accelerator)
        saving = {"processor": load_processor(dense), "label_names": test.class_names or None, "overwrite": True}
        saving["base_model"] = asked.base_model
        if accelerator.is_main_process:
            remember_dense(dense, asked.model, asked.weights)
        training = {"epochs": asked.epochs, "learning_rate": asked.learning_rate, "seed": asked.seed}
        training |= {"teacher": dense, "accelerator": accelerator, "progress": machine.progress}
        train_loader = shuffled(train, asked.batch_size, machine.workers, accelerator)

        def train_one(folder: Path, model: nn.Module) -> None:
            with logs.of(stages[folder], model, test_loader, accelerator) as logging:
                lfrns.retrain(model, train_loader, checkpoint_dir=work / stages[folder], **training, **logging)

        models = {folder: result.model for folder, result in results.items()}
        failed = out_of_reach | train_each(models, train_one, saving, accelerator)
        made = {folder: result for folder, result in results.items() if folder not in failed}
        again = [*asked.images.arguments(), "--dense", asked.model]
        again += ["--weights", asked.weights] if asked.weights else []
        records: dict[str, Record] = {}
        lines = [train.describe_unreadable(), test.describe_unreadable()]
        with described_later(accelerator, list(made), [["evaluate", str(folder), *again] for folder in made]):
            records = _describe(asked, dense, made, test_loader, calibrated, saving, accelerator)
            if asked.several and accelerator.is_main_process:
                lines.append(f"Compared in {write_index(directory, f'{Path(asked.arch).name}, at several budgets')}")
        if records and failed == out_of_reach:
            run.finish(accelerator)
    return Made(made, _rows(records, made), failed, out_of_reach, list(filter(None, lines)))


def _cut(
    asked: Slim, folders: list[Path], dense: nn.Module, accelerator: Any, keep_in: Path, *, tolerant: bool
) -> tuple[dict[Path, SlimResult], dict[Path, str], DataLoader]:
    """Analyse a model once and cut it at each budget, before any training: one out of reach is known within minutes."""
    machine = asked.machine
    calibrated, analysis = analyse_images(
        dense,
        asked.images,
        limit=asked.calibration_images,
        batch_size=asked.batch_size,
        seed=asked.seed,
        workers=machine.workers,
        untrained=asked.weights is None and starts_random(asked.model),
        preset=asked.preset,
        exclude=tuple(asked.exclude or ()),
        accelerator=accelerator,
        progress=machine.progress,
        checkpoint_dir=keep_in,
    )
    timed = lfrns.LatencySetup(batch=asked.latency_batch, threads=asked.latency_threads, compile=asked.latency_compile)
    results, failed = {}, {}
    for folder, budget in zip(folders, asked.budgets, strict=True):
        setup = {} if budget.latency is None else {"latency_setup": timed}
        try:
            with about(folder.name if asked.several else ""):
                results[folder] = analysis.cut(**asdict(budget), fcr_steps=asked.fcr_steps, **setup)
        except ValueError as error:
            failed[folder] = f"{type(error).__name__}: {error}"
            if not tolerant or len(failed) == len(folders):
                raise
    return results, failed, calibrated


def _describe(
    asked: Slim,
    dense: nn.Module,
    made: dict[Path, SlimResult],
    test_loader: DataLoader,
    calibrated: DataLoader,
    saving: dict[str, Any],
    accelerator: Any,
) -> dict[str, Record]:
    """Measure the models of all budgets on the same images, and save each again with its record, card and figures."""
    machine, models = asked.machine, {folder.name: result.model for folder, result in made.items()}
    records = measure_each(models, test_loader, dense=dense, accelerator=accelerator, progress=machine.progress)
    setup = {
        **recipe.describe_command("lfrns", PACKAGE / "__init__.py"),
        **recipe.describe_data(asked.images.data),
        "calibration_images": len(calibrated.dataset),
        "seed": asked.seed,
        "epochs": asked.epochs,
        "val_split": asked.images.val_split,
        "label_names": saving["label_names"],
        **({"license": asked.license} if asked.license else {}),
    }
    if asked.several:
        setup["budgets"] = [{"name": name, **_budget_row(record)} for name, record in records.items()]
    for (folder, result), record in zip(made.items(), records.values(), strict=True):
        record.setup.update(setup)
        if accelerator.is_main_process:
            recipe.draw_clusters(dense, result, calibrated, folder)
            lfrns.save(result.model, folder, record=record, **saving)
            if not machine.as_json:
                recipe.print_results(record, [], folder)
                if result.report.latency:
                    show(False, None, layer_table(result))
    return records


def _rows(records: dict[str, Record], made: dict[Path, SlimResult]) -> list[dict[str, Any]]:
    """Return the records as JSON has them, with what a latency budget found."""
    rows = [json.loads(record.to_json()) for record in records.values()]
    for row, result in zip(rows, made.values(), strict=False):
        row |= {"latency": result.report.latency} if result.report.latency else {}
    return rows


def _budget_row(record: Record) -> dict[str, Any]:
    """Return what the cards of the other budgets say of this one."""
    names = ("output", main_figure(record.slim).key, "latency_ms", "occasion")
    share = record.slim["macs_g"] / record.dense["macs_g"]
    return {"macs_fraction": share, **{name: record.slim.get(name) for name in names}}


def _show_again(asked: Slim, folders: list[Path], accelerator: Any) -> int:
    """Print the records of a run that has ended, and push what it made once more if asked to."""
    if accelerator.is_main_process:
        records = [record_of_ended(folder, asked.out, "config.json") for folder in folders]
        if not asked.machine.as_json:
            for record, folder in zip(records, folders, strict=True):
                recipe.print_results(record, [], folder)
        _push_and_show(asked, folders, [json.loads(record.to_json()) for record in records], {}, [])
    accelerator.end_training()
    return 0


def _push_and_show(
    asked: Slim, folders: list[Path], rows: list[dict[str, Any]], failed: dict[str, str], lines: list[str]
) -> None:
    """Push the finished checkpoints, and print where everything is and what to do next."""
    repo = asked.push_to_hub
    repos = {folder: f"{repo}/{folder.name}" if asked.several else repo for folder in folders if repo and rows}
    urls, unsent = push_each(repos, with_images=asked.with_images)
    for error in unsent.values():
        raise error
    checkpoints = [{"directory": str(folder)} for folder in folders]
    for checkpoint, row in zip(checkpoints, rows, strict=False):
        checkpoint |= row
    following = [] if repo or not rows else [f"Next: lfrns bench {folders[0]}, or lfrns push {folders[0]} user/name"]
    found = {"checkpoints": checkpoints, "pushed": list(urls.values()), "failed": failed}
    show(asked.machine.as_json, found, *lines, *(f"Pushed: {url}" for url in urls.values()), *following)


def retrain(asked: Retrain) -> None:
    """Train a checkpoint further, from its labels and perhaps a teacher, and save it with its new record."""
    directory, machine = Path(asked.directory), asked.machine
    accelerator = start_accelerator(machine, asked.seed, log_with=asked.log_with, directory=directory)
    recipe.hold(directory, f"lfrns retrain {directory}", accelerator)
    run = _left_over_of(directory, asked)
    accelerator.wait_for_everyone()  # all have looked before one begins
    if asked.resume and run.ended_so:
        record = earlier_record(str(directory))
        if accelerator.is_main_process:
            show(machine.as_json, json.loads(record.to_json()), format_table(record))
        return accelerator.end_training()
    resume = bool(asked.resume and run.unfinished)
    if resume:
        run.check()
    model = load_slim(str(directory), asked.teacher)
    teacher = None
    if asked.teacher:
        teacher = create_dense(asked.teacher, weights=asked.weights, img_size=size_beside(model, asked.teacher))
    train = load_images(asked.images, model, "train", augment=True, flip=asked.flip)
    test = load_images(asked.images, model, "validation")
    test_loader = DataLoader(test, asked.batch_size, num_workers=machine.workers)
    check_images(model, test_loader)
    options = {"accelerator": accelerator, "progress": machine.progress}
    dense, missing = (teacher, "") if teacher else dense_beside(str(directory), model, None, None)
    before = earlier_record(str(directory))
    trained_before = run.note("epochs", before.setup.get("epochs") or 0)
    before.setup["epochs"] = trained_before + asked.epochs
    for key in ("budgets", "controls"):  # were trained as long as this one was
        before.setup.pop(key, None)
    saving = {"processor": load_processor(model), "label_names": test.class_names or None, "overwrite": True}
    saving["record"] = Record(None, {}, before.setup)  # figures of the weights of before are not those of these
    training = {"teacher": teacher, "epochs": asked.epochs, "learning_rate": asked.learning_rate, "seed": asked.seed}
    loader = shuffled(train, asked.batch_size, machine.workers, accelerator)
    run.refuse_other_data("training images", train)
    run.refuse_other_data("test images", test)
    logs = Logs(asked.log_with, directory, run, ["retrain"], resume=resume)
    with kept_run(run, accelerator, resume=resume) as work:

        def train_it(_: Path, slim: nn.Module) -> None:
            with logs.of("retrain", slim, test_loader, accelerator) as logging:
                lfrns.retrain(slim, loader, checkpoint_dir=work / "retrain", **training, **options, **logging)

        train_each({directory: model}, train_it, saving, accelerator)
    again = ["evaluate", str(directory), *asked.images.arguments()]
    again += ["--dense", asked.teacher] if asked.teacher else []
    again += ["--weights", asked.weights] if asked.weights else []
    with described_later(accelerator, [directory], [again]):
        record = lfrns.measure(model, test_loader, dense=dense, **options)
        if accelerator.is_main_process:
            record = refresh(
                str(directory), model, record, asked.images, test.class_names, before=before, missing=missing
            )
            left_out = filter(None, [train.describe_unreadable(), test.describe_unreadable()])
            show(machine.as_json, json.loads(record.to_json()), format_table(record), *left_out)
    run.finish(accelerator)
    accelerator.end_training()


def _left_over_of(directory: Path, asked: Retrain) -> LeftOver:
    """Return what an earlier retraining left in a checkpoint's folder.

    Raises:
        ValueError: It was interrupted, and neither option says what to do; or a run of `lfrns slim` is not finished.
    """
    run = LeftOver(directory / "work" / "further", vars(asked), afresh="Pass --no-resume")
    for work in (directory / "work", directory.parent / "work"):
        if is_unfinished(work):
            raise ValueError(
                f"lfrns retrain {directory}: a run of lfrns slim was interrupted in {work.parent}, and would write "
                "over this. Finish it first: the same lfrns slim command with --resume."
            )
    if run.unfinished and asked.resume is None:
        raise ValueError(
            f"lfrns retrain {directory}: an interrupted retraining lies in {run.directory}. Pass --resume to go on "
            "with it, or --no-resume to drop it."
        )
    return run


def _stage(directory: Path, folder: Path) -> str:
    """Name the folder in work/ where the training of a checkpoint is kept."""
    return "retrain" if folder == directory else f"retrain-{folder.name}"


def _digits_recipe() -> Path:
    """Find the recipe: inside the wheel, or next to the package in a checkout."""
    inside, checkout = PACKAGE / "_recipes" / "vit_digits.py", PACKAGE.parent / "recipes" / "vit_digits.py"
    return inside if inside.is_file() else checkout
