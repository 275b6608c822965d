"""Slim a ResNet-50 of timm on ImageNet-1k, read as a stream: file by file, each process its own, nothing kept on disk.

Makes:     resnet50.a1_in1k at half of its MACs
Data:      ImageNet-1k from the Hub (`ILSVRC/imagenet-1k`, behind a licence), or `--data-dir` of the same layout
Result:    not measured
Hardware:  not measured
Versions:  torch 2.14.1, timm 1.0.31, accelerate 1.15, datasets 5.2

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/resnet50_imagenet1k.py --output-dir DIR
"""

from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.measure import evaluate
from lfrns_hub.pictures.stream import stream_data
from lfrns_hub.zoo import check_images, create_dense, guard_against_chance, load_data, make_transform

CALIBRATION_IMAGES = 2000
LEARNING_RATE = 0.02  # at 256 images a step; it grows with them (Goyal et al. 2017)
WEIGHT_DECAY = 5e-5
LABEL_SMOOTHING = 0.1
FCR_STEPS = 200


def main() -> None:
    parser = recipe.recipe_parser(
        __doc__, path=__file__, model="resnet50.a1_in1k", macs=0.5, epochs=30, batch_size=1024, dense_epochs=0
    )
    parser.add_argument("--weights", default=None, help="weights of the dense model, in place of the published ones")
    parser.add_argument(
        "--train-images", type=int, default=None, help="training images per epoch (default: what the data says)"
    )
    parser.add_argument("--workers", type=int, default=8, help="decoder workers per process (default: %(default)s)")
    args = parser.parse_args()
    if args.dense_epochs:
        raise ValueError(f"--dense-epochs {args.dense_epochs}: the dense model is not trained here. Bring --weights.")
    out, accelerator = recipe.open_run(args)
    epochs, fcr_steps, limit = (min(args.epochs, 1), 5, 128) if args.smoke else (args.epochs, FCR_STEPS, None)

    # Load. Training pictures are a stream; those that calibrate are the front of it, kept in memory.
    dense = create_dense(args.model, weights=args.weights)
    data = args.data_dir or "ILSVRC/imagenet-1k"
    test_transform = make_transform(dense, train=False)
    stream = stream_data(
        data,
        "train",
        transform=make_transform(dense, train=True),
        model=dense,
        images=args.train_images,
        seed=args.seed,
    )
    test_set = load_data(data, "validation", transform=test_transform, model=dense, limit=limit, seed=args.seed)
    calibration_set = stream.front(min(limit or CALIBRATION_IMAGES, CALIBRATION_IMAGES), test_transform)
    batch_size = max(1, args.batch_size // accelerator.num_processes)
    train_loader = stream.loader(batch_size, workers=args.workers)
    calibration_loader = DataLoader(calibration_set, min(64, batch_size))
    test_loader = DataLoader(test_set, batch_size, num_workers=args.workers)
    check_images(dense, calibration_loader)
    if not args.smoke:
        guard_against_chance(dense, calibration_loader, data)

    # Slim and retrain. Every stage keeps in a folder of its own in work/ what --resume goes on from.
    work = recipe.begin_run(out, args, accelerator)
    common = {"accelerator": accelerator, "seed": args.seed}
    result = lfrns.slim(
        dense, calibration_loader, macs=args.macs, fcr_steps=fcr_steps, checkpoint_dir=work / "slim", **common
    )
    before = evaluate(result.model, test_loader, teacher=dense, accelerator=accelerator)
    lfrns.retrain(
        result.model,
        train_loader,
        teacher=dense,
        epochs=epochs,
        images_per_epoch=min(stream.images, limit or stream.images),
        learning_rate=LEARNING_RATE * args.batch_size / 256,
        weight_decay=WEIGHT_DECAY,
        label_smoothing=LABEL_SMOOTHING,
        checkpoint_dir=work / "retrain",
        **common,
    )
    saving = {"label_names": test_set.class_names, "overwrite": True}
    if accelerator.is_main_process:  # the weights at once; what is said of them comes last
        recipe.save_trained(result.model, out, **saving)

    # Evaluate the last epoch, on images that nothing was chosen by; then save, show and push.
    record = lfrns.measure(result.model, test_loader, dense=dense, accelerator=accelerator)
    rows = [recipe.control_row("slim, not retrained", before)]
    record.setup |= recipe.describe_run(__file__) | recipe.describe_data(data)
    record.setup |= {"calibration_images": len(calibration_set), "seed": args.seed}
    record.setup |= {"epochs": epochs, "smoke": args.smoke}
    record.setup |= {"label_names": test_set.class_names, "controls": rows}
    recipe.publish(args, accelerator, out, dense, result, calibration_loader, record, saving)


if __name__ == "__main__":
    recipe.run(main)
