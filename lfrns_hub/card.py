"""A model card from a Record: every number is read from it, and what is missing reads "not measured"."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

NOT_MEASURED = "not measured"
UNKNOWN = "unknown"
TAGS = ["image-classification", "pruned", "structured-pruning", "lfrns"]


def render_card(
    record: Any,
    *,
    model_name: str,
    base: str,
    provenance: dict[str, Any] | None = None,
    library: str = "timm",
    plot: str | None = None,
    gallery: str | None = None,
) -> str:
    """Render the model card.

    Args:
        record: A Record, its dict, or None where nothing was measured.
        model_name: Heading, and the name in the usage lines.
        base: Architecture of the dense model.
        provenance: Plan, widths, budget, seed of the slim model; by default the record's.
        library: What loads it: timm, transformers or pytorch.
        plot: File name of the picture of widths, beside the card.
        gallery: File name of the picture of clusters, beside the card.
    Returns:
        Markdown with the Hub's YAML header. Base model, licence and data stand there only if the record's setup
        names them (`base_model`, `license`, `dataset`).
    """
    record = read_record(record) or {"dense": None, "slim": {}, "setup": {}}
    setup = record.get("setup") or {}
    provenance = provenance or setup.get("provenance") or {}
    slim, dense = record.get("slim") or {}, record.get("dense") or {}
    known = {key: setup.get(key) or provenance.get(key) for key in ("base_model", "license", "dataset", "dataset_id")}
    data = ModelCardData(
        model_name=model_name,
        library_name=library,
        pipeline_tag="image-classification",
        tags=list(TAGS),
        license=known["license"] or UNKNOWN,
        base_model=known["base_model"],
        base_model_relation="finetune" if known["base_model"] else None,
        datasets=[known["dataset_id"]] if known["dataset_id"] else None,
        metrics=["accuracy"],
        eval_results=_eval_results(slim, known),
        ignore_metadata_errors=False,
    )
    return str(
        ModelCard.from_template(
            data,
            template_str=Path(__file__).with_name("card.md").read_text(encoding="utf-8"),
            model_name=model_name,
            base=base,
            rows=_rows(dense, slim),
            controls=[[row["name"], *_accuracy(row)] for row in setup.get("controls") or []],
            facts=_facts(setup, provenance, known),
            hardware=_hardware(setup),
            groups=_groups(provenance),
            plot=plot,
            gallery=gallery,
            library=library,
            worst=_worst(slim, setup),
        )
    )


def read_record(record: Any) -> dict[str, Any] | None:
    """Give a Record, or a dict of one, as a plain dict."""
    return record if record is None or isinstance(record, dict) else json.loads(record.to_json())


def _rows(dense: dict[str, Any], slim: dict[str, Any]) -> list[list[str]]:
    """Lay the figures out as rows of name, dense, slim."""
    both = [
        ("Top-1", lambda r: _number(r.get("top1_pct"), " %", 2)),
        ("Images tested", lambda r: _number(r.get("images"), "", 0)),
        ("Parameters", lambda r: _number(r.get("params_m"), " M", 3)),
        ("Compute", _compute),
        ("Latency, batch 1", lambda r: _number(r.get("latency_ms"), " ms", 2)),
        ("File", lambda r: _number(r.get("size_mb"), " MB", 2)),
    ]
    rows = [[name, show(dense), show(slim)] for name, show in both]
    rows.insert(2, ["Agreement with dense", "", _number(slim.get("agreement_pct"), " %", 2)])
    return rows


def _compute(side: dict[str, Any]) -> str:
    """Name both FLOPs and MACs, as no reader can tell which of them a bare figure means."""
    macs, flops = side.get("macs_g"), side.get("flops_g")
    if macs is None or flops is None:
        return NOT_MEASURED
    return f"{_significant(flops)} GFLOPs = {_significant(macs)} GMACs"


def _worst(slim: dict[str, Any], setup: dict[str, Any]) -> str:
    """Say which class lost most, by name where names are known."""
    worst = slim.get("worst_class")
    if not worst:
        return NOT_MEASURED
    names = setup.get("label_names")
    label = names[worst["class"]] if names else f"class {worst['class']}"
    return (
        f"{label}, {_number(worst['dense_pct'], ' %', 2)} dense, {_number(worst['slim_pct'], ' %', 2)} slim: "
        f"{_number(worst['drop_points'], ' points', 2)} lost"
    )


def _accuracy(row: dict[str, Any]) -> list[str]:
    """Show top-1 and the number of images of a control."""
    return [_number(row.get("top1_pct"), " %", 2), _number(row.get("images"), "", 0)]


def _facts(setup: dict[str, Any], provenance: dict[str, Any], known: dict[str, Any]) -> list[list[str]]:
    """List what the model was made from and how; what was not recorded reads unknown."""
    budget = provenance.get("budget") or {}
    shares = [f"{value:g} of the dense {name}" for name, value in budget.items() if isinstance(value, (int, float))]
    seed = setup.get("seed", provenance.get("seed"))
    facts = {
        "Base model": known["base_model"],
        "Licence of the base": known["license"],
        "Data": known["dataset"],
        "Budget asked for": ", ".join(shares) or None,
        "Method": provenance.get("preset"),
        "FCR steps": provenance.get("fcr_steps"),
        "Calibration images": provenance.get("calibration_images", setup.get("calibration_images")),
        "Epochs of retraining": setup.get("epochs"),
        "Seed": seed,
        "Commit": setup.get("commit"),
        "Command": f"`{setup['command']}`" if setup.get("command") else None,
    }
    return [[name, UNKNOWN if value is None else str(value)] for name, value in facts.items()]


def _hardware(setup: dict[str, Any]) -> str:
    """Say what the figures were measured on."""
    machine = setup.get("machine")
    if not machine:
        return UNKNOWN
    parts = [f"{k} {v}" for k, v in machine.items()] if isinstance(machine, dict) else [str(machine)]
    for key in ("dtype", "input_size", "batch_size"):
        if setup.get(key) is not None:
            parts.append(f"{key.replace('_', ' ')} {_plain(setup[key])}")
    parts += [f"{name} {version}" for name, version in (setup.get("versions") or {}).items() if version]
    return ", ".join(parts)


def _groups(provenance: dict[str, Any]) -> list[list[str]]:
    """List kind, dense and kept width of every group of units; an approximate one is called so."""
    kinds = dict(provenance.get("kinds") or {})
    for name in provenance.get("approximate") or []:
        kinds[name] = f"{kinds.get(name, UNKNOWN)}, approximate"
    widths = provenance.get("widths") or {}
    return [[name, kinds.get(name, UNKNOWN), str(dense), str(kept)] for name, (kept, dense) in widths.items()]


def _eval_results(slim: dict[str, Any], known: dict[str, Any]) -> list[EvalResult] | None:
    """Make the Hub's model-index, where accuracy was measured on data that has a name."""
    if slim.get("top1_pct") is None or not known["dataset"]:
        return None
    dataset = str(known["dataset"])
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=known["dataset_id"] or dataset,
            dataset_name=dataset,
            metric_type="accuracy",
            metric_name="top-1, %",
            metric_value=round(float(slim["top1_pct"]), 2),
        )
    ]


def _number(value: Any, unit: str, digits: int) -> str:
    """Show a number with its unit, or say that there is none."""
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}{unit}"


def _significant(value: float) -> str:
    """Show three significant digits without an exponent."""
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


def _plain(value: Any) -> str:
    """Write a size as 3x32x32."""
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
