"""Drifting: samples move toward data and away from one another (Deng et al., arXiv:2602.04770)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from src.objectives.contract import Nets, Objective, eval_mode
from src.objectives.encoder import encoded
from src.objectives.rollout import in_turn, sample_through
from src.utils import NFES

DRAWN = (1, 2, 1, 4)  # the NFE row by row: half of the samples are of NFE 1, which has furthest to go
TEMPERATURES = (0.02, 0.05, 0.2)  # of the kernel, in units of the mean distance


@dataclass(eq=False)
class Drifting(Objective):
    """||f - sg(f + V)||^2 of features f of the samples of NFE 1, 2 and 4, where V is the `drift` of each NFE's samples
    by themselves (arXiv:2602.04770, eq. 26); the gradient goes through all jumps (arXiv:2309.17400).

    Features: of one's own flow, the model that the stage began with, asked at time `t` for the image without noise; at
    each resolution of its way down the vectors of the places (up to 16x16), and means and deviations over 2x2 and 4x4
    places and over all (appendix A.5). No critic, and so no game; but what these features do not see nobody corrects.

    Samples drift among those of their slice of the batch and of their process: let slices be as large as memory allows.

    Args:
        t: the time that the features are asked at.
    """

    rate: float = 0.5
    t: float = 0.1

    needs_teacher = True
    keeps_velocity = False
    at_once = 8  # so that each NFE has two; a sample drifts by others of its NFE and by faces: the more the better
    beta1 = 0.0
    citations = ("deng2026drifting", "clark2024directly")

    def draw(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"nfe": in_turn(DRAWN, shape[0])}

    def loss(
        self, nets: Nets, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nfe = draw["nfe"]
        fake, *_ = sample_through(nets.student, noise, nfe, nfe - 1)
        with eval_mode(nets.teacher):
            with torch.no_grad():
                real = features(nets.teacher, data, self.t)
            found = features(nets.teacher, fake, self.t)
        loss, logs = fake.new_zeros(len(data)), {}
        for k in NFES:
            rows = (nfe == k).nonzero().squeeze(1)
            here = rows.to(data.device, non_blocking=True)
            each = 0.0
            for x, y in zip(found, real, strict=True):
                scale, v = drift(x.detach()[:, here], y)
                x = x[:, here] / scale
                each = each + (x - (x + v).detach()).square().mean(2).mean(0)
            loss = loss.index_copy(0, here, each / len(found))
            logs[f"loss_drift_{k}"] = each.detach() / len(found)
        return loss, logs


def features(model, x: Tensor, t: float) -> list[Tensor]:
    """Of images [B, 3, H, W]: vectors of places, means and deviations, [places, B, channels] each, in float32."""
    found = []
    for h in encoded(model.network, x, t * model.scheduler.num_train_timesteps):
        h = h.float()
        side = h.shape[-1]
        if side <= 16:
            found.append(h)
        for size in sorted({2, 4, side}):
            mean = F.avg_pool2d(h, size)
            found += [mean, (F.avg_pool2d(h.square(), size) - mean.square()).clamp(min=1e-6).sqrt()]
    return [h.flatten(2).permute(2, 0, 1) for h in found]


@torch.no_grad()
def drift(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where features x of samples drift among those y of data, [places, N or M, D] (arXiv:2602.04770, eq. 8 to 12).

    V = E[k(x, y+) y+] / E[k(x, y+)] - E[k(x, y-) y-] / E[k(x, y-)] over data y+ and the other samples y-, each place
    by itself, k = exp(-distance / tau); for each temperature brought to unit mean square, and added up (appendix A.6;
    scales are common to all places). Unlike there, each channel counts in units of its deviation over the data, and
    the kernel is normalised as in eq. 9 alone: by its algorithm 2 a sample far from all faces hardly moves.

    Returns: the scale [1, 1, D] that x is to be divided by, and V [places, N, D] in its units.
    """
    with torch.autocast(x.device.type, enabled=False):  # V is a small difference of large sums
        centre, n = y.mean(1, keepdim=True), x.shape[1]
        deviation = (y - centre).square().mean((0, 1), keepdim=True).sqrt().clamp(min=1e-6)
        x, y = (x - centre) / deviation, (y - centre) / deviation
        to_y, to_x = torch.cdist(x, y), torch.cdist(x, x)
        mean = (to_y.sum() + to_x.sum()) / (len(x) * n * (y.shape[1] + n - 1))
        scale = mean / x.shape[2] ** 0.5
        to_x = to_x + 1e6 * torch.eye(n, device=x.device) * mean  # no sample drifts from itself
        v = torch.zeros_like(x)
        for tau in TEMPERATURES:
            near, far = ((distance / (-tau * mean)).softmax(2) for distance in (to_y, to_x))
            one = near @ y - far @ x
            v += one / one.square().mean().sqrt().clamp(min=1e-12)
    return scale * deviation, v
