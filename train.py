"""Train the flow map on the Simpsons faces: `python train.py`. The same command with the same --save_dir resumes."""

import argparse
import json
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch

from custom_model import IMAGE_SIZES, TIME_SAMPLINGS, UNETS, create_custom_model
from src.errors import UserError, one_line_errors
from src.evaluation.scoring import CHOOSING_SEED, Scorer
from src.images import DATA_ROOT
from src.objectives import OBJECTIVES, make_objective, parse_objective, parse_stages
from src.training.checkpoints import alone_in
from src.training.data import load_images
from src.training.distributed import World, joined
from src.training.estimate import estimate
from src.training.export import TARGET, export
from src.training.loop import train
from src.training.recipe import Recipe, Teacher, plan
from src.training.record import environment
from src.utils import get_current_time, load_model, read_checkpoint, seed_everything, weights_hash

# Recipes for those who do not want to improvise; every value can be overridden by its flag. The shortcut is, beside
# `progressive`, the nearest at NFE 1 on the small network of all that needs no critic, no pairs and no other scale of
# times. Where there are hours for it, a critic follows, at the rates that drew faces with one call on the challenge's
# network after 443 steps of 64 (LOG, "the fifth GPU"), with what the small one gains by: wobbling faces shown to the
# critic, and the means of its features matched (LOG, "shown wobbling faces", "matching holds"). The shares are not
# measured.
CHAIN = "rectified_flow:0.6,shortcut/flow=0.5/levels=16:0.4"
CRITIC = "adversarial/rate=0.25/critic_rate=0.625/warped=0.25/matching=1"
LONG_CHAIN = f"rectified_flow:0.55,shortcut/flow=0.5/levels=16:0.4,{CRITIC}:0.05"
PRESETS = {
    # A look at whether everything works: 0.2 M images.
    "quick": dict(
        stages=CHAIN,
        batch_size=64,
        num_iterations=3000,
        lr=1e-4,
        warmup=100,
        lr_decay_start=1500,
        save_interval=500,
        micro_batch=32,
    ),
    # 10 M images; slices of 32 fit a consumer card.
    "one-gpu-day": dict(
        stages=LONG_CHAIN,
        batch_size=128,
        num_iterations=80_000,
        lr=2e-4,
        warmup=1000,
        lr_decay_start=40_000,
        micro_batch=32,
        save_interval=2000,
    ),
    # 0.9 M images on an H200-class card: 20 minutes of training, by the speeds measured there, beside compiling.
    "data-centre-25min": dict(
        stages=CHAIN,
        batch_size=128,
        num_iterations=7000,
        lr=2e-4,
        warmup=200,
        lr_decay_start=3500,
        micro_batch=128,
        save_interval=500,
        max_minutes=25,
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # Flags of the challenge's base code.
    add("--batch_size", type=int, default=Recipe.batch_size, help="of one step, over all processes")
    add("--num_iterations", type=int, default=Recipe.num_iterations, help="steps of the optimizer, in all stages")
    add("--lr", type=float, default=Recipe.lr, help="learning rate; an objective's `rate` multiplies it")
    add("--save_dir", default="./results", help="left as it is, a new ./results/<MM-DD-HHMMSS>")
    add("--device", default="cuda", help="without CUDA: the CPU")
    add("--log_interval", type=int, default=Recipe.log_interval, help="steps between rows of metrics.jsonl")
    add("--save_interval", type=int, default=Recipe.save_interval, help="steps between checkpoints")
    add("--seed", type=int, default=Recipe.seed, help="of weights, data and noise")
    add("--use_additional_condition", action="store_true", default=None,
        help="add the condition even where the objective does without")  # fmt: skip
    add("--num_train_timesteps", type=int, default=1000, help="scale of t and d before the embedding")
    # Ours.
    add("--preset", choices=PRESETS, help="a recipe; flags given beside it win")
    add("--dry_run", action="store_true", help="print what would be done, with estimates, and stop")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--objective", metavar="NAME[/OPTION=VALUE...]", help=f"one of {', '.join(OBJECTIVES)}")
    what.add_argument("--stages", default="shortcut:1", metavar="OBJECTIVE:SHARE,...",
                      help="several objectives in turn, each from the EMA of the last")  # fmt: skip
    add(
        "--teacher",
        metavar="CKPT",
        help="a trained model that the first stage starts from and, if it needs a teacher, learns from; a last.ckpt "
        "with a critic brings that too, for a first stage that needs one",
    )
    add("--time_sampling", choices=TIME_SAMPLINGS, default="uniform", help="of training times")
    add("--unet", choices=UNETS, default="full", help="small: experiments only, no submission")
    add("--image_size", type=int, choices=IMAGE_SIZES, default=64, help="32: experiments only")
    add("--data_root", default=DATA_ROOT, help="folder of <id>.png; left as it is, downloaded")
    add("--split_dir", default="data", help="folder of train_split.txt and val_split.txt")
    add("--warmup", type=int, default=Recipe.warmup, help="steps of rising lr; a later stage's, a tenth of it at most")
    add(
        "--lr_decay_start", type=int, default=Recipe.lr_decay_start, help="a stage's step; lr ~ 1/sqrt(step) from it on"
    )
    add("--beta1", type=float, default=Recipe.beta1, help="AdamW's; 0 in the stages that play against a critic")
    add("--beta2", type=float, default=Recipe.beta2, help="AdamW's")
    add(
        "--weight_decay",
        type=float,
        default=Recipe.weight_decay,
        help="weights lose this times lr of themselves at each step; a critic's none",
    )
    add("--grad_clip", type=float, default=Recipe.grad_clip, help="largest norm of the gradient")
    add("--ema_decay", type=float, default=Recipe.ema_decay, help="of the average that samples and is exported")
    add("--micro_batch", type=int, default=Recipe.micro_batch, help="most images a process computes at once; 0: all")
    add(
        "--max_minutes",
        type=float,
        default=None,
        help="end a session, save and export after so many minutes; reflow's pairs go on in the next",
    )
    add("--eval_interval", type=int, default=0, help="score every so many steps and keep best_model.pt; 0: never")
    add("--eval_samples", type=int, default=None, help="samples for each NFE; None: 500")
    add(
        "--features",
        help="TorchScript feature network to score with; left out, the official Inception network, for the FID",
    )
    first = argparse.ArgumentParser(add_help=False)  # for --help to tell the preset's defaults
    first.add_argument("--preset", choices=PRESETS)
    parser.set_defaults(**PRESETS.get(first.parse_known_args()[0].preset, {}))
    args = parser.parse_args()
    if args.objective is not None:
        args.stages = f"{args.objective}:1"
    for flag, given in (("--features", args.features), ("--eval_samples", args.eval_samples is not None)):
        if given and not args.eval_interval:
            parser.error(f"{flag} is for scoring during training: give --eval_interval too")
    args.eval_samples = 500 if args.eval_samples is None else args.eval_samples
    if args.eval_samples < 2:
        parser.error("--eval_samples must be at least 2")
    if not args.save_dir:
        parser.error("--save_dir is empty: name a folder")
    return args


def start_from(path: str, model) -> tuple[Teacher, dict | None]:
    """Give `model` the weights of a checkpoint and the objective they were trained with.

    Returns: where they were trained, and the weights of the critic beside them, which a run's last.ckpt may hold.
    Raises: UserError if the checkpoint's network is another one.
    """
    teacher = load_model(path, create_custom_model, model.device)
    facts = {
        "--image_size": lambda m: m.image_size,
        "--num_train_timesteps": lambda m: m.scheduler.num_train_timesteps,
        "--use_additional_condition": lambda m: m.network.use_additional_condition,
        "the U-Net's parameters": lambda m: sum(p.numel() for p in m.parameters()),
    }
    unfit = [
        f"{name} {fact(teacher)}, here {fact(model)}" for name, fact in facts.items() if fact(teacher) != fact(model)
    ]
    if unfit:
        raise UserError(
            f"the teacher {path} does not fit: {'; '.join(unfit)}. Pass what it was trained with, or train another"
        )
    model.load_state_dict(teacher.state_dict())
    model.objective = teacher.objective
    unknown = [{"objective": "unknown", "steps": 0, "citations": []}]  # of an older version: nothing to cite
    saved = read_checkpoint(path)
    origin, critic = saved.get("provenance", {}), saved.get("training", {}).get("critic")
    taught = origin.get("stages", unknown), origin.get("seed"), origin.get("data")
    return Teacher(weights_hash(teacher.state_dict())[:16], *taught), critic


def run(args: argparse.Namespace, world: World, device: torch.device) -> None:
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    default_dir = Path(args.save_dir) == Path("results")
    save_dir = Path("results") / get_current_time() if default_dir else Path(args.save_dir)
    shares = parse_stages(args.stages)
    kinds = [parse_objective(name)[0] for name, _ in shares]
    if kinds[0].needs_teacher and args.teacher is None:
        raise UserError(
            f"{shares[0][0]} learns from a trained model: name its checkpoint with --teacher, "
            f"or train one before it: --stages rectified_flow:0.5,{shares[0][0]}:0.5"
        )
    settings = {
        "use_additional_condition": bool(args.use_additional_condition) or any(k.needs_condition for k in kinds),
        "num_train_timesteps": args.num_train_timesteps,
        "unet": args.unet,
        "image_size": args.image_size,
        "time_sampling": args.time_sampling,
    }
    with world.one_a_machine_first():
        images, data_hash = load_images(args.data_root, args.split_dir, args.image_size)
    seed_everything(args.seed)
    model = create_custom_model(device, objective=shares[0][0], **settings)
    taught_by, critic = start_from(args.teacher, model) if args.teacher is not None else (None, None)
    started_from = model.objective if taught_by else None
    stages = plan(shares, lambda name: make_objective(name, model.scheduler), recipe.num_iterations, started_from)
    model_config = {
        "model_type": type(model).__name__,
        "scheduler_type": type(model.scheduler).__name__,
        **settings,
    }
    arguments = {**vars(args), "save_dir": str(save_dir), "device": str(device)}
    if args.dry_run:
        needs = estimate(model, images, recipe, stages, world, critic)
        intended = {
            "arguments": arguments,
            "model_config": model_config,
            "data": {"images": len(images), "hash": data_hash},
            "stages": [{"objective": stage.name, "steps": stage.steps} for stage in stages],
            "processes": world.size,
            "environment": environment(device),
            "estimate": needs,
        }
        if world.rank == 0:
            print(json.dumps(intended, indent=2))
        return

    if world.rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{', '.join(name for name, _ in shares)} on {len(images)} images ({data_hash}), {count:,} parameters, "
              f"{world.size} x {device.type} -> {save_dir}")  # fmt: skip
    evaluate = None
    if args.eval_interval and world.rank == 0:
        evaluate = Scorer(
            args.data_root, args.split_dir, args.image_size, args.eval_samples, args.features, device, CHOOSING_SEED
        )
    with alone_in(save_dir) if world.rank == 0 else nullcontext():
        done = train(
            model,
            model_config,
            images,
            data_hash,
            recipe,
            stages,
            save_dir,
            arguments,
            world,
            evaluate,
            taught_by,
            critic,
        )
    if world.rank > 0:
        return
    print(f"\nDone: {save_dir}")
    if done < recipe.num_iterations:
        print(f"--max_minutes ended it at iteration {done} of {recipe.num_iterations}: the same command goes on, "
              f"with --save_dir {save_dir}")  # fmt: skip
    if done == 0:  # all of the session went into pairs
        return
    challenges = args.unet == "full" and args.image_size == 64
    if default_dir and challenges and done == recipe.num_iterations and not TARGET.exists():
        print(f"{export(save_dir)} is now {TARGET}, which sampling.py takes by default")
    elif challenges:
        print(f"To make it {TARGET}, which sampling.py takes by default:\n  python -m src.submission export {save_dir}")
    print(f"To sample from it:\n  python sampling.py --ckpt_path {save_dir}/final_model.pt")


def main() -> None:
    args = parse_arguments()
    with joined(args.device) as (world, device):
        run(args, world, device)


if __name__ == "__main__":
    with one_line_errors():
        main()
