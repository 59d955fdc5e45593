"""Train the flow map on the Simpsons faces: `python train.py`. The same command with the same --save_dir resumes."""

import argparse
import shutil
from dataclasses import fields
from pathlib import Path

from custom_model import IMAGE_SIZES, TIME_SAMPLINGS, UNETS, create_custom_model
from src.images import DATA_ROOT
from src.objectives import OBJECTIVES
from src.training.data import load_images
from src.training.engine import Recipe, train
from src.utils import get_current_time, one_line_errors, pick_device, replacing, seed_everything

BEST = Path("checkpoints/best_model.pt")  # what sampling.py reads by default


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # Flags of the challenge's base code.
    parser.add_argument("--batch_size", type=int, default=Recipe.batch_size)
    parser.add_argument("--num_iterations", type=int, default=Recipe.num_iterations)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--save_dir", default="./results", help="left as it is, a new ./results/<MM-DD-HHMMSS>")
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    parser.add_argument("--log_interval", type=int, default=Recipe.log_interval)
    parser.add_argument("--save_interval", type=int, default=Recipe.save_interval)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--use_additional_condition",
        action="store_true",
        default=None,
        help="add the condition even where the objective does without",
    )
    parser.add_argument("--num_train_timesteps", type=int, default=1000, help="scale of t and d before the embedding")
    # Ours.
    parser.add_argument("--objective", choices=OBJECTIVES, default="shortcut")
    parser.add_argument("--time_sampling", choices=TIME_SAMPLINGS, default="uniform")
    parser.add_argument("--unet", choices=UNETS, default="full", help="small: experiments only, no submission")
    parser.add_argument("--image_size", type=int, choices=IMAGE_SIZES, default=64, help="32: experiments only")
    parser.add_argument("--data_root", default=DATA_ROOT, help="folder of <id>.png; left as it is, downloaded")
    parser.add_argument("--split_dir", default="data", help="folder of train_split.txt and val_split.txt")
    parser.add_argument("--warmup", type=int, default=Recipe.warmup, help="steps of linear learning-rate increase")
    parser.add_argument("--weight_decay", type=float, default=Recipe.weight_decay)
    parser.add_argument("--grad_clip", type=float, default=Recipe.grad_clip, help="largest norm of the gradient")
    parser.add_argument("--ema_decay", type=float, default=Recipe.ema_decay)
    parser.add_argument("--accumulate", type=int, default=Recipe.accumulate, help="slices of a batch: less memory")
    parser.add_argument("--max_minutes", type=float, default=None, help="stop and export after so long")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    default_dir = Path(args.save_dir) == Path("results")
    save_dir = Path("results") / get_current_time() if default_dir else Path(args.save_dir)
    device = pick_device(args.device)

    images, data_hash = load_images(args.data_root, args.split_dir, args.image_size)
    settings = {
        "objective": args.objective,
        "use_additional_condition": args.use_additional_condition,
        "num_train_timesteps": args.num_train_timesteps,
        "unet": args.unet,
        "image_size": args.image_size,
        "time_sampling": args.time_sampling,
    }
    seed_everything(args.seed)
    model = create_custom_model(device, **settings)
    model_config = {
        "model_type": type(model).__name__,
        "scheduler_type": type(model.scheduler).__name__,
        **settings,
        "use_additional_condition": model.network.use_additional_condition,
    }
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.objective} on {len(images)} images ({data_hash}), {parameters:,} parameters, {device} -> {save_dir}")
    arguments = {**vars(args), "save_dir": str(save_dir), "device": str(device)}
    train(model, model_config, images, data_hash, recipe, save_dir, arguments)

    print("\nDone. " + (publish(save_dir) if default_dir and args.unet == "full" and args.image_size == 64 else ""))
    print(f"Next:\n  python sampling.py --ckpt_path {save_dir}/final_model.pt")


def publish(save_dir: Path) -> str:
    """Copy a run's final model to where sampling.py looks, unless a model is there already; say which."""
    if BEST.exists():
        return f"{BEST} was there already and is kept: copy final_model.pt and model_config.json there to replace it."
    for source, target in (("model_config.json", BEST.with_name("model_config.json")), ("final_model.pt", BEST)):
        with replacing(target) as temporary:
            shutil.copyfile(save_dir / source, temporary)
    return f"Published as {BEST}, which sampling.py takes by default."


if __name__ == "__main__":
    with one_line_errors():
        main()
