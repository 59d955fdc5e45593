"""Training speed of the engine against a plain loop of the challenge's kind, in one process, alternating.

    python -m benchmarks.throughput --data_root data/faces --split_dir data/faces

The plain loop decodes and resizes each image at every access in loader workers, computes in float32, steps Adam
and reads the loss at each step; on a GPU TF32 and cuDNN's search, which a process has for both, make it faster than
the challenge's. The engine runs with its default settings. The achieved rate counts 268 GFLOP a trained 64x64 image;
the matrix rate is measured by bf16 products in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from custom_model import create_custom_model
from dataset import SimpsonsDataModule, get_data_iterator
from src.errors import UserError, one_line_errors
from src.objectives import make_objective, parse_stages
from src.training.data import load_images
from src.training.engine import Training
from src.training.recipe import Recipe, plan
from src.utils import pick_device

TRAINING_FLOP = 268e9  # of one 64x64 image through the challenge's U-Net, forward and backward


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step, steps: int, device: torch.device) -> float:
    """That `steps` calls take."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return time.perf_counter() - began


def plain_loop(args, device: torch.device) -> Callable[[], None]:
    """One training step as the challenge's base code does it (but with noise that is noise)."""
    torch.manual_seed(0)
    model = create_custom_model(device, objective=args.objective, use_additional_condition=True).train()
    loader = SimpsonsDataModule(args.data_root, args.batch_size, split_dir=args.split_dir).train_dataloader()
    batches = get_data_iterator(loader)
    optimizer = torch.optim.Adam(model.network.parameters(), lr=1e-4)

    def step():
        data = next(batches).to(device)
        loss = model.compute_loss(data, torch.randn_like(data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def engine(args, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    model = create_custom_model(device, objective=args.objective, use_additional_condition=True)
    images, _ = load_images(args.data_root, args.split_dir, 64)
    recipe = Recipe(batch_size=args.batch_size)
    stages = plan(
        parse_stages(f"{args.objective}:1"), lambda name: make_objective(name, model.scheduler), recipe.num_iterations
    )
    return Training(model, images, recipe, stages).step


LOOPS = {"plain": plain_loop, "engine": engine}


def matrix_rate(device: torch.device) -> float:
    """Best bf16 rate of square matrix products, in FLOP a second."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    (a @ b).sum().item()
    return 10 * 2 * n**3 / min(seconds(lambda: a @ b, 10, device) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--split_dir", required=True)
    parser.add_argument("--objective", default="shortcut")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of each in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=[*LOOPS])
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    args = parser.parse_args()
    if min(args.steps, args.rounds, args.batch_size) < 1:
        raise UserError("--steps, --rounds and --batch_size must be at least 1")
    device = pick_device(args.device)

    steps = {name: LOOPS[name](args, device) for name in args.loops}
    speeds = {name: [] for name in steps}
    warm_up = {name: seconds(step, 3, device) for name, step in tqdm(steps.items(), desc="warming up")}
    peak = {}
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            speeds[name].append(args.steps * args.batch_size / seconds(step, args.steps, device))
            if device.type == "cuda":
                peak[name] = torch.cuda.max_memory_allocated(device) / 1e9

    rate = matrix_rate(device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{args.objective}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps, {chip}")
    for name, values in speeds.items():
        achieved = statistics.median(values) * TRAINING_FLOP
        memory = f", peak memory {peak[name]:.1f} GB (all loops' weights)" if peak else ""
        print(f"{name:>7}: {statistics.median(values):.2f} images/s (min {min(values):.2f}, max {max(values):.2f}), "
              f"{achieved / 1e12:.2f} TFLOP/s, {100 * achieved / rate:.0f} % of the matrix rate{memory}; "
              f"its first 3 steps, compiling included: {warm_up[name]:.1f} s")  # fmt: skip
    if len(speeds) == len(LOOPS):
        ratios = [ours / theirs for ours, theirs in zip(speeds["engine"], speeds["plain"], strict=True)]
        print(f"  ratio: {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")
    print(f" matrix: {rate / 1e12:.2f} TFLOP/s in bf16")


if __name__ == "__main__":
    with one_line_errors():
        main()
