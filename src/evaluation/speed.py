"""What a sample costs: latency, throughput, memory, arithmetic."""

import argparse
import json
import time
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from custom_model import create_custom_model
from src.errors import UserError
from src.utils import NFES, load_model, pick_device


def seconds(work, device: torch.device, repeats: int) -> float:
    """Median time of a call, the first one not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times[1:])


def speed(args: argparse.Namespace) -> None:
    """Print, as JSON, the cost of samples at each NFE."""
    if args.repeats < 1 or min(args.batches) < 1:
        raise UserError("--repeats and --batches must be at least 1")
    device = pick_device(args.device)
    model = load_model(args.checkpoint, create_custom_model, device)
    size = model.image_size
    gpu = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads"
    content = {"device": chip, "nfe": {}}
    for nfe in NFES:

        def sample(batch: int, nfe: int = nfe) -> None:
            model.sample((batch, 3, size, size), nfe)

        with FlopCounterMode(display=False) as counter:
            sample(1)
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        rates = {batch: batch / seconds(lambda b=batch: sample(b), device, args.repeats) for batch in args.batches}
        best = max(rates, key=rates.get)
        content["nfe"][str(nfe)] = {
            "latency of one image, ms": round(1000 / rates[1], 3) if 1 in rates else None,
            "images a second": {str(batch): round(rate, 2) for batch, rate in rates.items()},
            "best batch": best,
            "GFLOP an image": round(counter.get_total_flops() / 1e9, 3),
            "peak memory, GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if gpu else None,
        }
    print(json.dumps(content, indent=2))
