"""Slim a ViT from the Hub on CIFAR-100, or any timm or transformers classifier on your own pictures.

Makes:     google/vit-base-patch16-224-in21k, fine-tuned, then slimmed to two thirds of its MACs
Data:      CIFAR-100 from the Hub (`uoft-cs/cifar100`), or `--data-dir`; 2,000 training images calibrate
Result:    not measured; a small ViT on CIFAR-10, 1 epoch: 61.30 % dense, 61.10 % slim (model_cards/)
Hardware:  that on one thread of an Intel Xeon: 12 minutes with its controls
Versions:  torch 2.14.1, transformers 5.23, timm 1.0.31, accelerate 1.15

    accelerate launch recipes/vit_cifar100.py
    accelerate launch recipes/vit_cifar100.py --data-dir DIR --model FOLDER --macs 0.67 --epochs 3
"""

from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.pictures import load_processor
from lfrns_hub.zoo import (
    check_images,
    create_for_data,
    example_input,
    guard_against_chance,
    load_data,
    make_transform,
)

CALIBRATION_IMAGES = 2000
FINE_TUNE_EPOCHS = 3  # where the head does not fit the data
LEARNING_RATE = 1e-4  # fine-tuning and retraining
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
FCR_STEPS = 200


def main() -> None:
    parser = recipe.recipe_parser(
        __doc__,
        path=__file__,
        model="google/vit-base-patch16-224-in21k",
        macs=0.67,
        epochs=3,
        batch_size=64,
        dense_epochs=None,
    )
    parser.add_argument("--label-column", default=None, help="column in parquet files (default: fine_label or label)")
    parser.add_argument("--no-controls", action="store_true", help="train no controls, the slim model only")
    args = parser.parse_args()
    out, accelerator = recipe.open_run(args)
    epochs, fcr_steps, limit = (min(args.epochs, 1), 5, 128) if args.smoke else (args.epochs, FCR_STEPS, None)

    # Load; a head that does not fit the data is replaced, and has to be trained before units can be ranked.
    data = args.data_dir or "uoft-cs/cifar100"
    options = {"label_column": args.label_column, "seed": args.seed}
    dense, new_classes = create_for_data(args.model, data, **options)
    dense_epochs = args.dense_epochs if args.dense_epochs is not None else FINE_TUNE_EPOCHS if new_classes else 0
    if new_classes and not dense_epochs:
        raise ValueError(
            f"--dense-epochs 0: the head of {args.model} does not fit {len(new_classes)} classes and stays random. "
            f"Fine-tune it: --dense-epochs {FINE_TUNE_EPOCHS}."
        )
    train_transform, test_transform = make_transform(dense, train=True), make_transform(dense, train=False)
    options["model"] = dense
    train_set = load_data(data, "train", transform=train_transform, limit=limit, **options)
    calibration_images = min(limit or CALIBRATION_IMAGES, CALIBRATION_IMAGES)
    calibration_set = load_data(data, "train", transform=test_transform, limit=calibration_images, **options)
    test_set = load_data(data, "validation", transform=test_transform, limit=limit, **options)
    label_names = test_set.class_names
    train_loader = DataLoader(train_set, max(1, args.batch_size // accelerator.num_processes), shuffle=True)
    calibration_loader = DataLoader(calibration_set, args.batch_size)
    test_loader = DataLoader(test_set, args.batch_size)
    check_images(dense, calibration_loader)

    # The dense model. Every stage keeps in a folder of its own in work/ what --resume goes on from.
    work = recipe.begin_run(out, args, accelerator)
    common = {"accelerator": accelerator, "seed": args.seed}
    training = {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "label_smoothing": LABEL_SMOOTHING}
    kept_weights = work / "dense.safetensors"
    if args.resume and kept_weights.exists():
        recipe.load_weights(dense, kept_weights)
    elif dense_epochs:
        dense_epochs = 1 if args.smoke else dense_epochs
        lfrns.retrain(dense, train_loader, epochs=dense_epochs, checkpoint_dir=work / "dense", **training, **common)
    if not args.smoke:
        guard_against_chance(dense, calibration_loader, data)
    recipe.save_weights(dense, kept_weights, accelerator)

    # Slim and retrain.
    result = lfrns.slim(
        dense, calibration_loader, macs=args.macs, fcr_steps=fcr_steps, checkpoint_dir=work / "slim", **common
    )
    retraining = {**training, **common, "teacher": dense, "epochs": epochs}
    lfrns.retrain(result.model, train_loader, checkpoint_dir=work / "retrain", **retraining)
    saving = {"processor": load_processor(dense), "label_names": label_names, "overwrite": True}
    if accelerator.is_main_process:  # the weights at once; what is said of them comes last
        recipe.save_trained(result.model, out, **saving)

    # Beside it, equally trained: as many units drawn at random, and the dense model.
    rows = []
    if not args.no_controls:
        groups = lfrns.find_units(dense, example_input(dense))
        rows += recipe.run_controls(dense, result.plan, groups, train_loader, test_loader, work, **retraining)

    # Evaluate the last epoch, on images that nothing was chosen by; then save, show and push.
    record = lfrns.measure(result.model, test_loader, dense=dense, accelerator=accelerator)
    record.setup |= recipe.describe_run(__file__) | recipe.describe_data(data)
    record.setup |= {"calibration_images": len(calibration_set), "seed": args.seed}
    record.setup |= {"epochs": epochs, "dense_epochs": dense_epochs, "smoke": args.smoke}
    record.setup |= {"label_names": label_names, "controls": rows}
    recipe.publish(args, accelerator, out, dense, result, calibration_loader, record, saving)


if __name__ == "__main__":
    recipe.run(main)
