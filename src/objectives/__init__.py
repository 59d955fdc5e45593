"""The training objectives, and how a stage of training is written: `name/option=value/...`, `name:share,name:share`."""

from src.errors import UserError
from src.objectives.adversarial import Adversarial
from src.objectives.alpha_flow import AlphaFlow
from src.objectives.consistency import Consistency
from src.objectives.contract import Objective
from src.objectives.distribution_matching import DistributionMatching
from src.objectives.drifting import Drifting
from src.objectives.mean_flow import MeanFlow
from src.objectives.progressive import Progressive
from src.objectives.rectified_flow import RectifiedFlow, Reflow
from src.objectives.shortcut import Shortcut
from src.objectives.trajectory import Trajectory

OBJECTIVES = {
    "rectified_flow": RectifiedFlow,
    "reflow": Reflow,
    "shortcut": Shortcut,
    "progressive": Progressive,
    "mean_flow": MeanFlow,
    "alpha_flow": AlphaFlow,
    "consistency": Consistency,
    "trajectory": Trajectory,
    "adversarial": Adversarial,
    "distribution_matching": DistributionMatching,
    "drifting": Drifting,
}


def parse_objective(text: str) -> tuple[type[Objective], dict]:
    """The class and the options of `name/option=value/...`.

    Raises: UserError naming what is not known, and what is.
    """
    name, *settings = text.split("/")
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective {name!r}: choose one of {', '.join(OBJECTIVES)}")
    defaults = OBJECTIVES[name].defaults()
    options = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in defaults:
            raise UserError(f"{name} has no option {key!r}: its options are {', '.join(defaults)}")
        if key in options:
            raise UserError(f"{text} sets {key} twice")
        options[key] = _value(f"{name}/{key}", value, type(defaults[key]))
    return OBJECTIVES[name], options


def _value(option: str, text: str, kind: type):
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"{option} must be true or false, got {text!r}")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{option} must be of type {kind.__name__}, got {text!r}") from None


def make_objective(text: str, scheduler) -> Objective:
    """The objective of `name/option=value/...` on a scheduler's path; UserError if there is none."""
    kind, options = parse_objective(text)
    return kind(scheduler, **options)


def parse_stages(text: str) -> list[tuple[str, float]]:
    """Each stage's objective and share of the training, from `name/option=value:share,name:share,...`.

    An objective that stands for several stages (progressive) shares its share among them.

    Raises: UserError if something is not known, or the shares do not add up to 1.
    """
    stages = []
    for part in text.split(","):
        objective, colon, number = part.strip().rpartition(":")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if not colon or not 0 < share <= 1:
            raise UserError(f"stage {part.strip()!r} is not of the form objective:share with a share in (0, 1]")
        kind, options = parse_objective(objective)
        unfolded = kind.unfold(options)
        name = objective.split("/")[0]
        for one in unfolded:
            stages.append(
                ("/".join([name, *(f"{key}={_text(value)}" for key, value in one.items())]), share / len(unfolded))
            )
    total = sum(share for _, share in stages)
    if abs(total - 1) > 1e-6:
        parts = " + ".join(f"{share:g} ({objective})" for objective, share in stages)
        raise UserError(f"the stages' shares must add up to 1, but {parts} = {total:g}")
    return stages


def _text(value) -> str:
    return (
        str(value).lower() if isinstance(value, bool) else f"{value:.12g}" if isinstance(value, float) else str(value)
    )
