"""The training objectives, by the name that `--objective` and every saved config use."""

from src.objectives.rectified_flow import RectifiedFlow
from src.objectives.shortcut import Shortcut

OBJECTIVES = {
    "rectified_flow": RectifiedFlow,
    "shortcut": Shortcut,
}
