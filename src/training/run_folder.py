"""A run's folder: all that the first process writes there while the engine trains."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from src.files import write_json
from src.training.checkpoints import LAST, best_score, clear_leftovers, save_averages, save_last, step_of
from src.training.engine import Training
from src.training.recipe import Teacher, history
from src.training.record import Metrics, RunRecord, environment, plot_curves, save_previews
from src.utils import save_model


class RunFolder:
    """Checkpoints (the EMA's weights), configs, `run.json`, metrics, curves and previews of a run.

    Args:
        path: what a killed process left half written there is deleted.
        training: whose weights are written, with how far it has come.
        arguments, model_config, data_hash, evaluate, teacher: those of `src.training.loop.train`.
    """

    def __init__(
        self,
        path: Path,
        training: Training,
        arguments: dict,
        model_config: dict,
        data_hash: str,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
        teacher: Teacher | None,
    ):
        self.scorer = getattr(evaluate, "key", "")
        self.best = best_score(path, self.scorer) if evaluate else math.inf  # before anything is written
        self.path, self.training, self.evaluate, self.teacher = path, training, evaluate, teacher
        self.model_config, self.data_hash = model_config, data_hash
        self.surroundings = environment(training.model.device)
        clear_leftovers(path, anew=training.steps == 0)
        # Whether all was trained before: a command that is run again leaves models and records as they are.
        final = path / "final_model.pt"
        self.ended = training.steps >= training.recipe.num_iterations and step_of(final) == training.steps
        if not self.ended:
            write_json(path / "training_config.json", arguments)
        write_json(path / "model_config.json", self.config())
        self.metrics = Metrics(path / "metrics.jsonl", training.steps)
        described = {"arguments": arguments, "model_config": self.config()}
        self.record = RunRecord(
            path / "run.json", training.steps, self.surroundings, training.world.size, described, self.ended
        )
        self.write_record()

    def config(self) -> dict:
        return {**self.model_config, "objective": self.training.last_trained.name}

    def facts(self) -> dict:
        """What the weights come from, so far: what the run trained that they began in, and then this one."""
        training, taught = self.training, self.teacher.stages if self.teacher else []
        return {
            "seed": training.recipe.seed,
            "data": {"hash": self.data_hash, "images": len(training.images)},
            "bf16": training.bf16,
            "teacher": self.teacher and self.teacher._asdict(),
            "stages": [*taught, *history(training.stages, training.steps, training.recipe)],
            "citations": training.citations,
        }

    def provenance(self) -> dict:
        return {**self.surroundings, **self.facts(), "step": self.training.steps}

    def write_record(self) -> None:
        self.record.write(self.training.steps, self.training.recipe.batch_size, self.facts())

    def log(self, row: dict) -> None:
        steps = self.training.steps
        self.metrics.add({"step": steps, "images": steps * self.training.recipe.batch_size, **row})
        self.write_record()

    def export(self, *names: str, **scores) -> None:
        """The average's weights, under each name."""
        for name in names:
            about = {**self.provenance(), **scores}
            save_model(self.training.ema.model, self.path / name, self.config(), provenance=about)

    def saved(self) -> bool:
        """Whether there is something to go on from."""
        return (self.path / LAST).exists()

    def save(self, identity: dict) -> None:
        """All that the run needs to go on, and its longer and shorter averages."""
        training, about = self.training, {"model_config": self.config(), "provenance": self.provenance()}
        averages = training.power_ema.averages
        save_averages(self.path, training.steps, averages, stage=training.index, age=training.age, **about)
        save_last(self.path, training.ema.model, training={**training.state(), "identity": identity}, **about)

    def score(self) -> None:
        """Score the average, unless it was at this step, and keep it if it is the best so far."""
        steps = self.training.steps
        if self.metrics.scored(steps) and self.best < math.inf:  # or the best was moved away, to score in another way
            return
        with torch.compiler.set_stance("force_eager"):  # its batches have other shapes
            scores = self.evaluate(self.training.ema.model)
        if scores["ratio"] < self.best:
            self.best = scores["ratio"]
            self.export("best_model.pt", ratio=self.best, scorer=self.scorer)
        self.metrics.add({"step": steps, **scores})  # last: a step whose model could not be written is scored again

    def plot(self) -> None:
        plot_curves(self.metrics.rows, self.path / "training_curves.png")

    def preview(self) -> None:
        training = self.training
        low = torch.autocast(training.model.device.type, torch.bfloat16, enabled=training.bf16)  # half the time on CPUs
        with torch.compiler.set_stance("force_eager"), low:
            save_previews(training.ema.model, self.path, training.steps, training.recipe.seed)
