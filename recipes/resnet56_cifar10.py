"""Slim a CIFAR network of the literature on CIFAR-10: any `cifar_*` model, its weights given or trained here first.

Makes:     cifar_resnet56 at half of its MACs
Data:      CIFAR-10 from the Hub (`uoft-cs/cifar10`), or `--data-dir`; 2,000 training images calibrate
Result:    not measured; ResNet-20 from given weights, 2 epochs: 87.28 % dense, 86.14 % slim (model_cards/)
Hardware:  that on one thread of an Intel Xeon: 24 minutes with its controls
Versions:  torch 2.14.1, timm 1.0.31, accelerate 1.15

    accelerate launch recipes/resnet56_cifar10.py --weights dense.safetensors
    accelerate launch recipes/resnet56_cifar10.py --model cifar_resnet20 --data-dir DIR --weights W --epochs 2
"""

from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.measure import evaluate
from lfrns_hub.zoo import check_images, create_dense, example_input, guard_against_chance, load_data, make_transform

CALIBRATION_IMAGES = 2000
DENSE_LEARNING_RATE = 0.1  # He et al. 2016, section 4.2
DENSE_WEIGHT_DECAY = 1e-4  # the same
RETRAIN_LEARNING_RATE = 0.02
RETRAIN_WEIGHT_DECAY = 5e-4
FCR_STEPS = 200


def main() -> None:
    parser = recipe.recipe_parser(
        __doc__, path=__file__, model="cifar_resnet56", macs=0.5, epochs=40, batch_size=128, dense_epochs=None
    )
    parser.add_argument("--weights", default=None, help="weights of the dense model: safetensors or .pth")
    parser.add_argument("--no-controls", action="store_true", help="train no controls, the slim model only")
    args = parser.parse_args()
    out, accelerator = recipe.open_run(args)
    # Without weights the network is trained for as long as in the literature; with them, not at all.
    dense_epochs = args.dense_epochs if args.dense_epochs is not None else 0 if args.weights else 160
    epochs, fcr_steps, limit = args.epochs, FCR_STEPS, None
    if args.smoke:
        dense_epochs, epochs, fcr_steps, limit = min(dense_epochs, 1), min(epochs, 1), 5, 256

    # Load.
    dense = create_dense(args.model, num_classes=None if args.weights else 10, weights=args.weights)
    data = args.data_dir or "uoft-cs/cifar10"
    train_transform, test_transform = make_transform(dense, train=True), make_transform(dense, train=False)
    options = {"model": dense, "seed": args.seed}
    train_set = load_data(data, "train", transform=train_transform, limit=limit, **options)
    calibration_images = min(limit or CALIBRATION_IMAGES, CALIBRATION_IMAGES)
    calibration_set = load_data(data, "train", transform=test_transform, limit=calibration_images, **options)
    test_set = load_data(data, "validation", transform=test_transform, limit=limit, **options)
    train_loader = DataLoader(train_set, max(1, args.batch_size // accelerator.num_processes), shuffle=True)
    calibration_loader = DataLoader(calibration_set, 250)
    test_loader = DataLoader(test_set, 250)
    check_images(dense, calibration_loader)

    # The dense model. Every stage keeps in a folder of its own in work/ what --resume goes on from.
    work = recipe.begin_run(out, args, accelerator)
    common = {"accelerator": accelerator, "seed": args.seed}
    kept_weights = work / "dense.safetensors"
    if args.resume and kept_weights.exists():
        recipe.load_weights(dense, kept_weights)
    elif dense_epochs:
        lfrns.retrain(
            dense,
            train_loader,
            epochs=dense_epochs,
            learning_rate=DENSE_LEARNING_RATE,
            weight_decay=DENSE_WEIGHT_DECAY,
            checkpoint_dir=work / "dense",
            **common,
        )
    if not args.smoke:
        guard_against_chance(dense, calibration_loader, data)
    recipe.save_weights(dense, kept_weights, accelerator)

    # Slim and retrain.
    result = lfrns.slim(
        dense, calibration_loader, macs=args.macs, fcr_steps=fcr_steps, checkpoint_dir=work / "slim", **common
    )
    before = evaluate(result.model, test_loader, teacher=dense, accelerator=accelerator)
    if accelerator.is_main_process:
        print(f"Slim, not retrained: {before['top1_pct']:.2f} % top-1 of {before['images']} images", flush=True)
    retraining = {**common, "teacher": dense, "epochs": epochs}
    retraining |= {"learning_rate": RETRAIN_LEARNING_RATE, "weight_decay": RETRAIN_WEIGHT_DECAY}
    lfrns.retrain(result.model, train_loader, checkpoint_dir=work / "retrain", **retraining)
    saving = {"label_names": test_set.class_names, "overwrite": True}
    if accelerator.is_main_process:  # the weights at once; what is said of them comes last
        recipe.save_trained(result.model, out, **saving)

    # Beside it, equally trained: as many units drawn at random, and the dense model.
    rows = [recipe.control_row("slim, not retrained", before)]
    if not args.no_controls:
        groups = lfrns.find_units(dense, example_input(dense))
        rows += recipe.run_controls(dense, result.plan, groups, train_loader, test_loader, work, **retraining)

    # Evaluate the last epoch, on images that nothing was chosen by; then save, show and push.
    record = lfrns.measure(result.model, test_loader, dense=dense, accelerator=accelerator)
    record.setup |= recipe.describe_run(__file__) | recipe.describe_data(data)
    record.setup |= {"calibration_images": len(calibration_set), "seed": args.seed}
    record.setup |= {"epochs": epochs, "dense_epochs": dense_epochs, "smoke": args.smoke}
    record.setup |= {"label_names": test_set.class_names, "controls": rows}
    recipe.publish(args, accelerator, out, dense, result, calibration_loader, record, saving)


if __name__ == "__main__":
    recipe.run(main)
