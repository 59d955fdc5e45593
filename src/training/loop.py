"""The training loop: resuming, and when to log, save, score and end, around the engine's steps."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from src.errors import UserError, on_stop
from src.training.checkpoints import load_last
from src.training.distributed import ALONE, World
from src.training.engine import Training
from src.training.pairs import TimeUp
from src.training.recipe import FREE, Recipe, Stage, Teacher
from src.training.record import early_preview
from src.training.run_folder import RunFolder


def train(
    model,
    model_config: dict,
    images: np.ndarray,
    data_hash: str,
    recipe: Recipe,
    stages: list[Stage],
    save_dir: Path,
    arguments: dict,
    world: World = ALONE,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    teacher: Teacher | None = None,
    critic: dict[str, Tensor] | None = None,
) -> int:
    """Train `model` on uint8 `images` [N, 3, H, W]; go on from `save_dir`/last.ckpt if it is there.

    Writes checkpoints (the EMA's weights), `model_config.json` (what rebuilds the model), `training_config.json`
    (`arguments`), `run.json`, previews, metrics and curves.

    Args:
        model: what the first stage starts from.
        model_config: of all stages but for the objective.
        world: this process among several; the first one writes.
        evaluate: scores a model every `eval_interval` steps: numbers to log, among them "ratio", the lower the
            better; the best so far is kept as `best_model.pt`.
        teacher: where `model` has its weights from, if from another run.
        critic: weights that the first stage's critic, if it has one, begins with.
    Returns: the steps that are done; fewer than planned if `max_minutes` ended the session.
    Raises: UserError if the loss is no longer finite, the run is stopped by a signal (after saving), or the
        checkpoints in `save_dir` are damaged, another run's or chosen by other scores (and are left as they are).
    """
    training = Training(model, images, recipe, stages, world)
    identity = _identity(model_config, data_hash, recipe, stages, teacher)
    defaults = {stage.name: stage.objective.defaults() for stage in stages}
    checkpoint = world.from_rank_0(lambda: load_last(save_dir, identity, defaults))
    if checkpoint:
        training.restore(checkpoint)
        del checkpoint
    elif critic and training.take_critic(critic) and world.rank == 0:
        print(f"{stages[0].name} goes on with the critic of its teacher")
    if training.steps > recipe.num_iterations:
        raise UserError(
            f"the run in {save_dir} has {training.steps} iterations already, more than --num_iterations "
            f"{recipe.num_iterations}: take its checkpoint of then, or choose another --save_dir"
        )

    folder = None

    def open_folder() -> None:
        nonlocal folder
        folder = RunFolder(save_dir, training, arguments, model_config, data_hash, evaluate, teacher)

    world.from_rank_0(open_folder)  # its refusals end all processes

    logs: dict[str, list[Tensor]] = {}
    step = interval_start = training.steps
    interval_began = time.monotonic()
    progress = tqdm(total=recipe.num_iterations, initial=step, desc="training", disable=folder is None)
    received: list[int] = []  # signals to stop, upon which the loop saves first
    with on_stop(lambda number, frame: received.append(number)), progress, ExitStack() as at_the_end:
        if folder:
            at_the_end.callback(folder.write_record)  # pairs may have taken all of a session, and ended it
        finished, stopped = world.any(folder is not None and folder.ended), False
        if folder and folder.ended and evaluate:
            folder.score()
        while not (finished or stopped):
            if step < recipe.num_iterations:
                try:
                    parts, norm = training.step()
                except TimeUp:  # the stage before is saved
                    finished = True
                    if folder and step:
                        folder.export("final_model.pt")
                    break
                step = training.steps
                for name, values in parts.items():
                    logs.setdefault(name, []).extend(values)

            logging = step % recipe.log_interval == 0
            finished = world.any(step >= recipe.num_iterations or time.monotonic() > training.ends)
            stopped = world.any(bool(received))
            at_interval = finished or step % recipe.save_interval == 0 or training.at_end_of_stage()
            scoring = recipe.eval_interval and (finished or step % recipe.eval_interval == 0)
            if logs and (logging or at_interval or scoring or stopped):
                row = {name: world.mean(torch.cat(values)) for name, values in logs.items()}
                row["gradient_norm"] = norm.item()
                _refuse_infinite(row, step, save_dir)
                now = time.monotonic()
                speed = (step - interval_start) * recipe.batch_size / (now - interval_began)
                row |= {"stage": training.index, "lr": training.lr, "images_per_second": speed}
                if folder:
                    folder.log(row)
                progress.update(step - progress.n)
                progress.set_postfix(loss=f"{row['loss']:.4f}", img_s=f"{speed:.1f}")
                logs, interval_start, interval_began = {}, step, now
            left = time.monotonic()
            if folder:
                if at_interval:  # first: a run that goes on from what is saved would not write it again
                    folder.export(f"checkpoint_iter_{step}.pt")
                try:
                    if at_interval or stopped or (scoring and not folder.saved()):
                        folder.save(identity)
                finally:  # a full disk may have room for this
                    if finished:
                        folder.export("final_model.pt")
                if evaluate and scoring:  # saved before: without, a best model would be refused
                    folder.score()
                if at_interval or stopped:
                    folder.plot()
                if at_interval or early_preview(step):
                    folder.preview()
            interval_began += time.monotonic() - left  # saving and scoring are not training
            if at_interval and not stopped:  # the next step may begin with hours of pairs
                stopped = world.any(bool(received))
    if not finished:
        raise UserError(f"stopped at iteration {step} and saved: the same command with --save_dir {save_dir} goes on")
    return step


def _identity(model_config: dict, data_hash: str, recipe: Recipe, stages: list[Stage], teacher: Teacher | None) -> dict:
    """The settings that make a run this run: with others, a resumed one is refused."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in FREE}
    # The steps of a single stage may grow, unless its loss or its rates depend on how many there are.
    fixed = len(stages) > 1 or stages[0].objective.follows_progress or stages[0].objective.steady < 1
    written = [[stage.name, stage.objective.options(), *([stage.steps] if fixed else [])] for stage in stages]
    weights = teacher and teacher.weights
    return {"model": model_config, "data": data_hash, "teacher": weights, "stages": written, **settings}


def _refuse_infinite(row: dict, step: int, save_dir: Path) -> None:
    """UserError if the loss or its gradient is not finite; nothing of it has been saved."""
    if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
        last = save_dir / "last.ckpt"
        kept = f"{last} is still good" if last.exists() else "nothing was saved yet"
        raise UserError(
            f"the loss or its gradient is not finite around iteration {step}; {kept}; "
            "start again with a lower --lr in a new --save_dir"
        )
