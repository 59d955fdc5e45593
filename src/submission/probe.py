"""Runs inside a laid-out submission, as the TAs would, and tells what it saw. It knows none of our rooms.

    python probe.py TREE TASK.json

The task names the modules that may be imported, and either a script to run, or what to load, sample and count.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import runpy
import sys
import traceback
from pathlib import Path


class Guard(importlib.abc.MetaPathFinder):
    """Hides every installed module that is not provided, as if it were not there."""

    def __init__(self, provided: list[str]):
        self.provided = set(provided)

    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in self.provided:
            return None
        spec = importlib.machinery.PathFinder.find_spec(top)
        if spec is None or not {"site-packages", "dist-packages"} & set(Path(spec.origin or "").parts):
            return None  # the submission's own, a part of the standard library, or absent anyway
        raise ModuleNotFoundError(f"no module named {name!r} in the TAs' environment", name=name)


def run_script(command: list[str]) -> None:
    """`python command...`, in this process; RuntimeError if it exits with anything but success."""
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{command[0]} ended with: {stop.code}") from None


def inspect(task: dict, facts: dict) -> None:
    """Load the checkpoint by the official steps and describe the model."""
    import torch

    from custom_model import create_custom_model
    from src.network import UNet
    from src.utils import weights_hash

    spec = importlib.util.spec_from_file_location("loader", task["loader"])
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    saved = torch.load(task["checkpoint"], map_location="cpu", weights_only=True)
    facts["keys"] = list(saved.get("state_dict", saved))
    facts["provenance"] = saved.get("provenance", {})
    model = loader.load_model(task["checkpoint"], create_custom_model, "cpu", task["config"])
    facts["loaded"] = True
    facts["weights"] = weights_hash(model.state_dict())[:16]
    # As a report has both.
    settings = ("time_grids", "asking", "smoothing", "sharpening")
    facts["sampler"] = {name: getattr(model.scheduler, name, None) for name in settings}

    condition = getattr(model.network, "use_additional_condition", False)
    with torch.device("meta"):  # shapes alone
        official = UNet(
            ch=128, ch_mult=[1, 2, 2, 2], attn=[1], num_res_blocks=4, dropout=0.1, use_additional_condition=condition
        )
    shapes = lambda module: [(name, list(value.shape)) for name, value in module.state_dict().items()]  # noqa: E731
    facts["challenge_network"] = (
        type(model.network) is UNet
        and shapes(model.network) == shapes(official)
        and str(model.network) == str(official)  # dropout rates, and which modules there are
        and not any("forward" in vars(module) for module in model.modules())
    )
    facts["parameters"] = sum(p.numel() for p in model.network.parameters())
    facts["beyond"] = sum(value.numel() for value in model.state_dict().values()) - facts["parameters"]
    facts["finite"] = all(bool(value.isfinite().all()) for value in model.state_dict().values())


def sample(task: dict, facts: dict) -> None:
    """Run sampling.py at each NFE, counting the U-Net's calls and all arithmetic from outside."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from torch.utils.flop_counter import FlopCounterMode

    from src.network import UNet

    rows = []
    register_module_forward_hook(
        lambda module, args, output: rows.append(len(output)) if isinstance(module, UNet) else None
    )
    condition = json.loads(Path(task["config"]).read_text()).get("use_additional_condition", True)
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as unit:  # counted, not computed
        zero = torch.zeros(1)
        UNet(use_additional_condition=condition).eval()(torch.zeros(1, 3, 64, 64), zero, zero)
    count = task["samples"]
    facts["nfe"] = {}
    for nfe in task["nfes"]:
        rows.clear()
        command = ["sampling.py", "--ckpt_path", task["checkpoint"], "--save_dir", task["save_dir"]]
        command += ["--num_samples", str(count), "--batch_size", str(count)]
        with FlopCounterMode(display=False) as work:
            run_script([*command, "--nfe_list", str(nfe), "--device", task["device"]])
        calls = work.get_total_flops() / unit.get_total_flops() / count
        facts["nfe"][str(nfe)] = {"calls": sum(rows) / count, "arithmetic": calls}


def main() -> None:
    tree, task = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    os.chdir(tree)
    sys.path[0] = str(tree)
    sys.meta_path.insert(0, Guard(task["provided"]))
    facts: dict = {}
    with contextlib.redirect_stdout(sys.stderr):  # what the scripts print is not ours to tell
        for step in task["steps"]:
            try:
                {"inspect": inspect, "sample": sample, "run": lambda task, facts: run_script(task["command"])}[step](
                    task, facts
                )
            except BaseException as error:
                facts[f"{step} failed"] = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"
                traceback.print_exc()
                break
    Path(task["facts"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
