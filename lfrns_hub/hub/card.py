"""A model card from a Record: every number is read from it, and missing ones read "not measured"."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment

from lfrns_hub.format.markdown import Markdown, code, finish, link, plain, web_link
from lfrns_hub.hub.lineage import KEYS, UNKNOWN
from lfrns_hub.hub.reach import address_of
from lfrns_hub.measure import KINDS as OUTPUTS
from lfrns_hub.measure import (
    comparable_budgets,
    comparable_controls,
    comparable_dense,
    heads_of,
    main_figure,
    main_figures,
    why_no_dense,
    word_of,
)

NOT_MEASURED = "not measured"
TAGS = ["pruned", "structured-pruning", "lfrns"]
KINDS = {"channel": "channels", "head": "attention heads", "neuron": "MLP neurons"}
BUDGETS = {"macs": "MACs", "params": "parameters", "latency": "latency"}
MAX_NAMES = 12  # of classes; config.json has them all
MAX_NAME = 200  # characters of a name in a sentence
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def render_card(
    record: Any,
    *,
    model_name: str,
    base: str,
    provenance: dict[str, Any] | None = None,
    library: str = "timm",
    plot: str | None = None,
    gallery: str | None = None,
    curve: str | None = None,
    processor: bool | None = None,
    remote_code: bool = False,
) -> str:
    """Return the model card.

    Args:
        record: A Record, its dict, or None if nothing was measured.
        model_name: Heading, and the name in the usage lines.
        base: Architecture of the dense model.
        provenance: Plan, widths, budget, seed of the slim model; by default the record's.
        library: The library that loads it: timm, transformers or pytorch.
        plot: File name of the plot of widths, next to the card.
        gallery: File name of the figure of clusters, next to the card.
        curve: File name of the plot of accuracy against MACs, next to the card.
        processor: Whether a pipeline can find the image preprocessing. Default: whether timm's configuration states it.
        remote_code: Whether the folder has a modelling file for `trust_remote_code`.
    Returns:
        Markdown with the Hub's YAML header. It states base model, licence and data only if the record's setup or
        the provenance names them (`base_model`, `license`, `dataset`; see `lineage.base_facts`). All text of the record
        and the names is shown as one line of plain text: no markup, and no link except the licence's to the web and
        those to the models at other budgets on the Hub.
    """
    record = read_record(record) or {}
    setup = record.get("setup") or {}
    provenance = provenance or setup.get("provenance") or {}
    slim, dense = record.get("slim") or {}, comparable_dense(record)
    if isinstance(word := provenance.get("output"), str) and word in OUTPUTS:  # stated even where nothing was measured
        slim = {"output": word} | slim
    stated = {key: setup.get(key) or provenance.get(key) for key in (*KEYS, "dataset", "dataset_id")}
    known = {key: plain(value, MAX_NAME) if value else None for key, value in stated.items()}
    known["license_link"] = web_link(stated["license_link"])
    if known["license"] != "other":  # the Hub knows other licences by their identifier
        known["license_name"] = known["license_link"] = None
    ids = {
        key: known[key] if HUB_ID.fullmatch(known[key] or "") else None
        for key in ("base_model", "dataset_id", "license")
    }
    tasks = {OUTPUTS[word_of(of_head)].task for of_head in heads_of(slim).values()}
    task = tasks.pop() if len(tasks) == 1 else None  # the Hub has no name for quantities, nor for several tasks
    shown = main_figure(slim)
    data = ModelCardData(
        model_name=plain(model_name, MAX_NAME),
        library_name=library,
        pipeline_tag=task,
        tags=[*filter(None, [task]), *TAGS],
        license=ids["license"] or UNKNOWN,
        license_name=known["license_name"],
        license_link=known["license_link"],
        base_model=ids["base_model"],
        base_model_relation="finetune" if ids["base_model"] else None,
        datasets=[ids["dataset_id"]] if ids["dataset_id"] else None,
        metrics=_metrics(slim) or None,
        eval_results=_eval_results(slim, known),
        ignore_metadata_errors=False,
    )
    template = Environment(finalize=finish).from_string(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    return str(
        ModelCard(
            template.render(
                card_data=Markdown(data.to_yaml()),
                model_name=model_name,
                repo=Markdown(f"user/{re.sub(r'[^A-Za-z0-9_.-]+', '-', model_name).strip('-.')[:96] or 'name'}"),
                base=Markdown(base if base.isascii() and base.isidentifier() else "Net"),
                library=library,
                processor=library == "timm" if processor is None else processor,
                remote_code=remote_code,
                summary=_summary(base, dense, slim, provenance, known),
                smoke=setup.get("smoke"),
                rows=_rows(dense, slim, setup.get("label_names")),
                no_dense=why_no_dense(record),
                latency=_latency(setup, dense),
                controls=[[row["name"], _percent(row.get("top1_pct")), _count(row.get("images"))]
                          for row in comparable_controls(record)],
                budgets=[[link(_number(row["macs_fraction"], "", 3), address_of(row.get("pushed"))),
                          _figure(row.get(shown.key), shown), _ms(row.get("latency_ms"))]
                         for row in comparable_budgets(record)],
                shown=shown.title.lower() if shown.title[1:2].islower() else shown.title,
                removed=_removed(provenance),
                plot=plot,
                gallery=gallery,
                curve=curve,
                groups=_groups(provenance),
                facts=_facts(setup, provenance, known),
                limits=_limits(slim, setup, provenance, known),
            )
        )
    )  # fmt: skip


def read_record(record: Any) -> dict[str, Any] | None:
    """Return a Record, or its dict, as a plain dict."""
    return record if record is None or isinstance(record, dict) else json.loads(record.to_json())


def _summary(
    base: str, dense: dict[str, Any], slim: dict[str, Any], provenance: dict[str, Any], known: dict[str, Any]
) -> str:
    """Return a summary of the model in two sentences."""
    widths, kinds = provenance.get("widths") or {}, provenance.get("kinds") or {}
    narrower = {kinds.get(name) for name, (kept, full) in widths.items() if kept < full}
    units = _list([word for kind, word in KINDS.items() if kind in narrower]) or "units"
    told = [
        f"{slim[key] / dense[key]:.3f} of the {name}"
        for key, name in (("macs_g", "MACs"), ("params_m", "parameters"))
        if dense.get(key) and slim.get(key) is not None
    ]
    where = f" on {known['dataset']}" if known["dataset"] else ""
    for head, figure, value in main_figures(slim):
        title = figure.title[:1].lower() + figure.title[1:] if figure.title[1:2].islower() else figure.title
        what = f"{'an' if title.startswith('R') else 'a'} {title}{f' of {head}' if head else ''}"
        before = _figure(heads_of(dense).get(head, {}).get(figure.key), figure)
        told.append(f"{what} of {_figure(value, figure)}{where} (dense: {before})")
    return (
        f"{base} with fewer {units} than its dense model{': ' if told else ''}{_list(told)}. LFRNS (Fang and Yin 2025) "
        "removed the units that others can stand in for; the layers are the stock ones, only narrower."
    )


def _rows(dense: dict[str, Any], slim: dict[str, Any], names: list[str] | None) -> list[list[str]]:
    """Return the figures as rows of name, dense, slim, and change."""
    rows = []
    for head, of_head in heads_of(slim).items():
        kind, of_dense = OUTPUTS[word_of(of_head)], heads_of(dense).get(head, {})
        for figure in kind.figures:
            before, after = of_dense.get(figure.key), of_head.get(figure.key)
            sides = _change(before, after, figure) if figure.change else ["", _figure(after, figure), ""]
            rows.append([f"{head}: {figure.title}" if head else figure.title, *sides])
            if figure is kind.figures[0] and kind.worst:
                rows.append(_worst_row(head, of_head, None if head else names))
    rows.append(["Images tested", _count(dense.get("images")), _count(slim.get("images")), ""])
    for name, key, show in (
        ("Parameters", "params_m", lambda value: _with_prefix(value, 1e6)),
        ("FLOPs", "flops_g", lambda value: _with_prefix(value, 1e9)),
        ("MACs", "macs_g", lambda value: _with_prefix(value, 1e9)),
        ("Weights on disk", "size_mb", lambda value: _number(value, " MB", 2)),
        ("Latency, batch 1", "latency_ms", _ms),
    ):
        before, after = dense.get(key), slim.get(key)
        share = f"{after / before:.3f}" if before and after is not None else ""
        rows.append([name, show(before), show(after), share])
    return rows


def _worst_row(head: str, scores: dict[str, Any], names: list[str] | None) -> list[str]:
    """Return the row of the class or label that lost most."""
    worst, word = scores.get("worst_class") or {}, "Label" if word_of(scores) == "labels" else "Class"
    which = f": {names[worst['class']] if names else worst['class']}" if worst else ""
    sides = _change(worst.get("dense_pct"), worst.get("slim_pct"), OUTPUTS["classes"].figures[0])
    return [f"{head}: {word} that lost most{which}" if head else f"{word} that lost most{which}", *sides]


def _change(before: float | None, after: float | None, figure: Any) -> list[str]:
    """Return a figure of both models and its change."""
    points = " points" if figure.change == "points" else ""
    change = "" if before is None or after is None else f"{after - before:+{figure.form}}{points}"
    return [_figure(before, figure), _figure(after, figure), change]


def _figure(value: float | None, figure: Any) -> str:
    """Format a figure of the outputs."""
    return NOT_MEASURED if value is None else f"{value:{figure.form}}{figure.unit}"


def _latency(setup: dict[str, Any], dense: dict[str, Any]) -> str:
    """Return a sentence on the machine of the latency."""
    machine = setup.get("machine") or {}
    if not machine:
        return f"The machine of the latency: {UNKNOWN}."
    threads = machine.get("threads")
    where = [
        machine.get("cpu"),
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else None,
        f"device {machine['device']}" if machine.get("device") else None,
        setup.get("dtype"),
        f"input {_plain(setup['input_size'])}" if setup.get("input_size") else None,
    ]
    models = "the slim model alone" if dense.get("latency_ms") is None else "the two models in turns"
    return (
        f"Latency: the median of a forward pass of one image, {models}, on "
        f"{', '.join(str(part) for part in where if part)}."
    )


def _removed(provenance: dict[str, Any]) -> str:
    """Return a sentence on the removed units, and why they were removed."""
    widths, report = provenance.get("widths") or {}, provenance.get("report") or {}
    if not widths:
        return "Which units were removed is not recorded."
    total, kept = sum(dense for _, dense in widths.values()), sum(kept for kept, _ in widths.values())
    text = f"{total - kept:,} of {total:,} units in {len(widths)} groups."
    if "redundant" in report and "weak" in report:
        text += (
            f" {report['redundant']:,} were redundant: kept units explain them. {report['weak']:,} were weak: little "
            "explains them, and they hardly reach the next layer."
        )
    if "restored" in report:
        text += f" {report['restored']:,} more were marked for removal and restored, for what they contribute (FCR)."
    return text


def _groups(provenance: dict[str, Any]) -> list[list[str]]:
    """Return kind, dense and kept width and integrity of every group, with a note for approximate groups."""
    kinds = dict(provenance.get("kinds") or {})
    for name in provenance.get("approximate") or []:
        kinds[name] = f"{kinds.get(name, UNKNOWN)}, approximate"
    integrity = (provenance.get("report") or {}).get("integrity") or {}
    return [
        [code(name), kinds.get(name, UNKNOWN), f"{dense:,}", f"{kept:,}", _number(integrity.get(name), "", 3)]
        for name, (kept, dense) in (provenance.get("widths") or {}).items()
    ]


def _facts(setup: dict[str, Any], provenance: dict[str, Any], known: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return how the model was made; facts that were not recorded read "unknown"."""
    budget = provenance.get("budget") or {}
    shares = [f"{value:g} of the dense {BUDGETS.get(name, name)}" for name, value in budget.items()]
    versions = [f"{name} {version}" for name, version in (setup.get("versions") or {}).items() if version]
    names = setup.get("label_names") or []
    listed = ", ".join(plain(name, MAX_NAME) for name in names[:MAX_NAMES]) + (
        ", ..." if len(names) > MAX_NAMES else ""
    )
    meant = {"labels": "Labels", "quantities": "Quantities"}.get(str(provenance.get("output")), "Classes")
    trained = _of(setup.get("dense_epochs") or None, "epochs")
    facts = {
        "Base model": known["base_model"],
        "Licence of the base": _licence(known),
        **({"Dense model": f"trained for {trained} in the same run"} if trained else {}),
        "Data": known["dataset"],
        **({} if meant == "Quantities" and not names else {meant: f"{len(names):,}: {listed}" if names else None}),
        "Method": Markdown(f"LFRNS, preset {code(provenance['preset'])}") if provenance.get("preset") else None,
        "Budget": f"at most {_list(shares)}" if shares else None,
        "Calibration": _of(provenance.get("calibration_images", setup.get("calibration_images")), "images"),
        "FCR": _of(provenance.get("fcr_steps"), "steps"),
        "Retraining": _of(setup.get("epochs"), "epochs"),
        "Seed": setup.get("seed", provenance.get("seed")),
        "Versions": ", ".join(versions) or None,
        "Commit": setup.get("commit"),
        "Command": code(setup["command"]) if setup.get("command") else None,
    }
    return [(name, UNKNOWN if value is None else value) for name, value in facts.items()]


def _licence(known: dict[str, Any]) -> str | None:
    """Return the base's licence; the Hub calls a licence without an identifier "other"."""
    name = known["license_name"] or known["license"]
    return link(name, known["license_link"]) if name else None


def _limits(
    slim: dict[str, Any], setup: dict[str, Any], provenance: dict[str, Any], known: dict[str, Any]
) -> list[str]:
    """Return the limits of the figures."""
    limits = []
    scored = main_figures(slim)
    if scored:
        data = known["dataset"] or "one set of images"
        limits.append(
            f"Accuracy is of {data} and of one run; other data, other seeds, robustness and calibration were not "
            "measured."
        )
        worst = {word_of(of_head) for of_head in heads_of(slim).values() if of_head.get("worst_class")}
        what = {"classes": "classes", "labels": "labels"}.get(next(iter(worst)) if len(worst) == 1 else "", "parts")
        limits.append(
            Markdown(
                f"A mean hides {what} that lost more: the table names the one that lost most, `record.json` has all."
            )
            if worst or word_of(slim) == "classes"
            else "A mean hides images with larger errors."
        )
    else:
        limits.append("Its accuracy was not measured: measure it on your data before you use it.")
    if slim.get("images_skipped"):
        limits.append(f"{_of(slim['images_skipped'], 'images')} could not be read; no figure counts them.")
    limits.append("Latency falls less than MACs on small layers, and differs from machine to machine.")
    if provenance.get("approximate"):
        limits.append(
            "Groups marked approximate cross a norm whose mean changes with its width; no check proves such a cut."
        )
    limits.append("Biases of the dense model and of its data remain, and removing units can sharpen them.")
    return limits


def _eval_results(slim: dict[str, Any], known: dict[str, Any]) -> list[EvalResult] | None:
    """Return the Hub's model-index, if accuracy was measured on data with a name."""
    scored = main_figures(slim)
    if not scored or not known["dataset"]:
        return None
    dataset = str(known["dataset"])
    return [
        EvalResult(
            task_type=OUTPUTS[word_of(heads_of(slim)[head])].task or "image-regression",
            dataset_type=known["dataset_id"] or dataset,
            dataset_name=dataset,
            metric_type=figure.metric,
            metric_name=f"{plain(head, MAX_NAME)}: {figure.label}" if head else figure.label,
            metric_value=round(float(value), 2) if figure.unit else float(f"{value:{figure.form}}"),
        )
        for head, figure, value in scored
    ]


def _metrics(slim: dict[str, Any]) -> list[str]:
    """Return the Hub's names of the metrics of such outputs."""
    kinds = [OUTPUTS[word_of(of_head)] for of_head in heads_of(slim).values()]
    return list(dict.fromkeys(figure.metric for kind in kinds for figure in kind.figures if figure.metric))


def _list(words: list[str]) -> str:
    """Join words as "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _of(value: int | None, unit: str) -> str | None:
    """Format a number with its unit, None if there is none."""
    return None if value is None else f"{value:,} {unit.removesuffix('s') if value == 1 else unit}"


def _number(value: float | None, unit: str, digits: int) -> str:
    """Format a number with its unit, or return "not measured"."""
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}{unit}"


def _percent(value: float | None) -> str:
    return _number(value, " %", 2)


def _ms(value: float | None) -> str:
    return _number(value, " ms", 2)


def _count(value: int | None) -> str:
    return _number(value, "", 0)


def _with_prefix(value: float | None, unit: float) -> str:
    """Format a count to three digits with k, M or G."""
    if value is None:
        return NOT_MEASURED
    count, prefix = value * unit, ""
    for size, letter in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        if count >= size:
            prefix = letter
            shown = count / size
    if not prefix:
        return f"{count:.0f}"
    return f"{shown:.{2 if shown < 10 else 1 if shown < 100 else 0}f} {prefix}"


def _plain(value: Any) -> str:
    """Format a size as 3x32x32."""
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
