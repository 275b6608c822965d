"""The command line of a recipe: the options that all recipes have."""

import argparse
import ast
import os
from collections.abc import Callable
from pathlib import Path

CODE = "code_of_the_recipe"  # among a run's options, although it is not typed


def kept_fraction(text: str) -> float:
    """Read a budget from the command line.

    Args:
        text: The value of `--macs` or `--params`.
    Returns:
        The fraction of the dense model's cost to keep, in (0, 1].
    Raises:
        argparse.ArgumentTypeError: The text is not a number, or lies outside (0, 1].

    Example:
        >>> kept_fraction("0.5")
        0.5
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: the fraction to keep must be in (0, 1]. For 50 % pass 0.5.")
    return value


def whole_number(least: int, example: str) -> Callable[[str], int]:
    """Return a function that reads a count from the command line.

    Args:
        least: The smallest count allowed.
        example: A value to pass instead, as the error's last sentence.
    Returns:
        Function from the text to the count, which may raise argparse.ArgumentTypeError.

    Example:
        >>> whole_number(0, "0 skips it.")("3")
        3
    """

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: a whole number, {least} or more, is needed. {example}")
        return int(text)

    return read


def recipe_parser(
    description: str,
    *,
    path: str | os.PathLike,
    model: str | None,
    macs: float,
    epochs: int,
    batch_size: int,
    dense_epochs: int | None,
) -> argparse.ArgumentParser:
    """Build the command line of all recipes; a recipe adds its own options.

    Args:
        description: The recipe's docstring.
        path: The recipe's `__file__`; the default output folder is `out/<its name>`. Its code counts as an option of
            the run: `--resume` refuses a recipe that was edited in between.
        model: Default of `--model`; None if the recipe builds its own.
        macs: Default of `--macs`, the fraction kept.
        epochs: Default of `--epochs`, retraining after slimming.
        batch_size: Default of `--batch-size`, images per step over all processes.
        dense_epochs: Default of `--dense-epochs`; None if it depends on the model.
    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", default=None, help="folder of parquet with the Hub's columns, or an image folder")
    add("--model", default=model, help=f"name, repo id or folder of the dense model (default: {model or 'its own'})")
    add("--macs", type=kept_fraction, default=macs, help="fraction of the MACs to keep (default: %(default)s)")
    add(
        "--epochs",
        type=whole_number(0, "0 skips it."),
        default=epochs,
        help="epochs of retraining after slimming (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=whole_number(1, "64 is usual."),
        default=batch_size,
        help="images per step over all processes (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of everything drawn (default: %(default)s)")
    add(
        "--dense-epochs",
        type=whole_number(0, "0 skips it."),
        default=dense_epochs,
        help="epochs of training the dense model (default: %(default)s)",
    )
    add("--output-dir", default=f"out/{Path(path).stem}", help="folder of the checkpoint (default: %(default)s)")
    add("--overwrite", action="store_true", help="remove the checkpoint and the run in the output folder first")
    add("--resume", action="store_true", help="go on where a run stopped; nothing to do where all is done")
    add("--push-to-hub", default=None, metavar="REPO", help="push the finished checkpoint, e.g. user/name")
    add("--with-images", action="store_true", help="push clusters.png too, which shows some of the training images")
    add("--smoke", action="store_true", help="the whole way in under a minute, on a slice; figures mean nothing")
    parser.set_defaults(**{CODE: code_of(Path(path))})
    return parser


def code_of(path: Path) -> str:
    """Return the code of a file without comments, layout and the module docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree)
