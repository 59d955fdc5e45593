"""The flow map: straight path, jump sampler, objective, and the factory the challenge's scripts call.

Time runs from t = 0 (data) to t = 1 (noise): x_t = (1 - t) x + t eps, v = eps - x. The network is a flow map
u(x_t, t, d), the mean velocity from t down to t - d, with d as the U-Net's extra condition. Training methods
differ only in their loss on u (`src/objectives/`); one sampler walks any grid of times with one call a jump.
"""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from src.base_model import BaseGenerativeModel, BaseScheduler
from src.errors import UserError
from src.filters import non_local_means, unsharp_mask
from src.network import UNet
from src.objectives import make_objective, parse_objective
from src.objectives.contract import Nets, eval_mode
from src.quantise import restore_quantised
from src.utils import expand_t

# The challenge's network, and a small one for tests and CPU experiments (no submission may use it).
UNETS = {
    "full": dict(ch=128, ch_mult=[1, 2, 2, 2], attn=[1], num_res_blocks=4, dropout=0.1),
    "small": dict(ch=32, ch_mult=[1, 2, 2, 2], attn=[1], num_res_blocks=1, dropout=0.1),
}
IMAGE_SIZES = (64, 32)
# Densities of the training times, and the keys of references.bib for those of others.
TIME_SAMPLINGS = {"uniform": (), "u_shaped": ("lee2024improving",), "logit_normal": ("esser2024scaling",)}


class CustomScheduler(BaseScheduler):
    """The straight path between data (t = 0) and noise (t = 1) of rectified flow (arXiv:2209.03003).

    Args:
        num_train_timesteps: what t and d in [0, 1] are multiplied with before the network embeds them.
        time_sampling: density of the training times: "uniform"; "u_shaped", proportional to
            exp(4t) + exp(4(1 - t)) (arXiv:2405.20320); "logit_normal", t = sigmoid(N(0, 1))
            (arXiv:2403.03206, section 3.1).
        time_grids: {NFE: [1, ..., 0]}, decreasing times for `sample`; uniform grids for NFEs not named.
        asking: {NFE: part}, how much of a jump the network is asked for late on the way, see `asked_until`.
        smoothing, sharpening: {NFE: sigma}, {NFE: amount} of `src/filters.py` for its samples; those of NFEs not named
            stay as they are.
    """

    def _setup(
        self,
        time_sampling: str = "uniform",
        time_grids: dict | None = None,
        asking: dict | None = None,
        smoothing: dict | None = None,
        sharpening: dict | None = None,
    ) -> None:
        if not 0 < self.num_train_timesteps < math.inf:  # JSON has NaN
            raise UserError(f"num_train_timesteps must be a positive number, got {self.num_train_timesteps}")
        if time_sampling not in TIME_SAMPLINGS:
            raise UserError(f"unknown time_sampling {time_sampling!r}: choose one of {', '.join(TIME_SAMPLINGS)}")
        self.time_sampling = time_sampling
        self.time_grids = {int(nfe): [float(t) for t in grid] for nfe, grid in (time_grids or {}).items()}
        for nfe, grid in self.time_grids.items():
            falling = all(a > b for a, b in zip(grid, grid[1:], strict=False))
            if len(grid) != nfe + 1 or grid[0] != 1 or grid[-1] != 0 or not falling:
                raise UserError(f"time grid for NFE {nfe} must fall from 1 to 0 in {nfe} jumps, got {grid}")
        self.asking = strengths("asking", asking)
        for nfe, part in self.asking.items():
            if nfe < 2 or part > 1:
                raise UserError(f"asking for NFE {nfe} is a part of a jump, at most 1, from NFE 2 on, got {part}")
        self.smoothing = strengths("smoothing", smoothing)
        self.sharpening = strengths("sharpening", sharpening)

    @property
    def citations(self) -> tuple[str, ...]:
        """Keys of references.bib: the path, the density of the times, and what a sampler was given."""
        return (
            "liu2023flow",
            *TIME_SAMPLINGS[self.time_sampling],
            *(("tong2025learning", "nelder1965simplex") if self.time_grids else ()),
            *(("buades2005nonlocal",) if self.smoothing else ()),
            *(("gonzalez2018digital",) if self.sharpening else ()),
        )

    def sample_timesteps(self, batch_size: int, device: torch.device) -> Tensor:
        """Draw training times in [0, 1], [batch_size], by `time_sampling`."""
        if self.time_sampling == "logit_normal":
            return torch.randn(batch_size, device=device).sigmoid()
        t = torch.rand(batch_size, device=device)
        if self.time_sampling == "u_shaped":  # by the inverse of the density's distribution function
            t = 0.5 + torch.asinh((2 * t - 1) * math.sinh(2)) / 4
        return t

    def time_grid(self, nfe: int) -> list[float]:
        """The times a sample visits in `nfe` jumps, nfe + 1 of them, from 1 down to 0."""
        if nfe < 1:
            raise ValueError(f"need at least one network call, got {nfe}")
        return self.time_grids.get(nfe) or [1 - i / nfe for i in range(nfe + 1)]

    def asked_until(self, t: float, t_next: float, nfe: int) -> float:
        """The time down to which the network is asked for the mean velocity, for the jump from t to t_next, one of nfe.

        It is t_next; but for jumps from t <= 1/2, `asking` may shorten the way to a part, whose velocity is then used
        for all of it. After an adversarial stage that gave better samples (benchmarks/LOG.md, "late jumps"); why is not
        known.
        """
        if t > 0.5 or nfe not in self.asking:
            return t_next
        return t - self.asking[nfe] * (t - t_next)

    def forward_process(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 - t) x + t eps; data and noise [B, ...], t [B] in [0, 1]."""
        t = expand_t(t, data)
        return (1 - t) * data + t * noise

    def reverse_process_step(self, xt: Tensor, pred: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Jump from x_t to x_{t_next} = x_t - (t - t_next) u; xt and pred [B, ...], times [B]."""
        return xt - expand_t(t - t_next, xt) * pred

    def filtered(self, x: Tensor, nfe: int) -> Tensor:
        """Samples [B, C, H, W] of `nfe` jumps, smoothed and then sharpened as the config says for that NFE."""
        if nfe in self.smoothing:
            x = non_local_means(x, self.smoothing[nfe])
        if nfe in self.sharpening:
            x = unsharp_mask(x, self.sharpening[nfe])
        return x

    def get_target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity v = dx_t/dt = eps - x, the same at every t."""
        return noise - data


def strengths(name: str, given: dict | None) -> dict[int, float]:
    """A sampler's setting for each NFE, of a config as JSON has it; UserError if one is not positive."""
    found = {int(nfe): float(strength) for nfe, strength in (given or {}).items()}
    for nfe, strength in found.items():
        if not 0 < strength < math.inf:
            raise UserError(f"{name} for NFE {nfe} must be a positive number, got {strength}")
    return found


class CustomGenerativeModel(BaseGenerativeModel):
    """A flow map u(x_t, t, d) on a network, trained by one of `src/objectives/`.

    Args:
        objective: a name in `src.objectives.OBJECTIVES`, with options as in `name/option=value`.
        image_size: height and width it is trained at; the challenge's is 64.
    """

    def _setup(self, objective: str = "shortcut", image_size: int = 64) -> None:
        self.objective = make_objective(objective, self.scheduler)
        self.image_size = image_size
        self._register_load_state_dict_pre_hook(restore_quantised)  # whichever loader reads an 8-bit checkpoint

    def predict(self, xt: Tensor, t: Tensor | float, d: Tensor | float | None = None) -> Tensor:
        """The mean velocity u(x_t, t, d) from t down to t - d, shaped like xt and in its precision.

        Args:
            xt: [B, ...].
            t: [B] or a number, in [0, 1].
            d: [B] or a number, in [0, t]; None is 0, the instantaneous velocity.
        Raises: ValueError if d is given to a network without the extra condition.
        """
        scale = self.scheduler.num_train_timesteps

        def embedded(time):
            if not isinstance(time, Tensor):  # filled on the device: copying a number there would wait for it
                return torch.full((len(xt),), time * scale, dtype=torch.float32, device=xt.device)
            return time.to(xt.device, torch.float32).expand(len(xt)) * scale

        conditions = [embedded(t)]
        if self.network.use_additional_condition:
            conditions.append(embedded(0.0 if d is None else d))
        elif d is not None:
            raise ValueError("this network has no extra condition, so it cannot be asked for a jump d")
        u = self.network(xt, *conditions).to(xt.dtype)
        if not torch.is_grad_enabled():
            # Or the next pass would take these casts of the weights from autocast's cache, and train nothing.
            torch.clear_autocast_cache()
        return u

    def velocity(self, xt: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The mean velocity of a jump from x_t [B, ...] to t_next, asked as the objective has taught it; times [B]."""
        return self.predict(xt, t, self.objective.asked(t, t_next))

    def jump(self, xt: Tensor, t: Tensor, t_next: Tensor, asked_until: Tensor | None = None) -> Tensor:
        """x_{t_next} from x_t [B, ...] by one network call; times [B].

        asked_until: jump with the mean velocity down to this time, by default t_next.
        """
        velocity = self.velocity(xt, t, t_next if asked_until is None else asked_until)
        return self.scheduler.reverse_process_step(xt, velocity, t, t_next)

    def compute_loss(self, data: Tensor, noise: Tensor, **kwargs) -> Tensor:
        """Scalar loss of images in [-1, 1] and Gaussian noise, both [B, 3, H, W].

        For loops that know nothing of an EMA: the network stands in for its own average, and the loss is that of the
        objective's end. The engine of `src/training/` calls the objective itself.

        Raises: UserError if the objective needs a teacher or a critic, which such a loop has not.
        """
        if self.objective.needs_teacher:
            raise UserError(
                f"{type(self.objective).__name__} learns from a trained model: use train.py, which keeps one"
            )
        loss, _ = self.objective.loss(Nets(student=self, ema=self), data, noise, 1.0, self.objective.draw(data.shape))
        return loss.mean()

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        num_inference_timesteps: int = 20,
        return_traj: bool = False,
        verbose: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Generate images with exactly `num_inference_timesteps` network calls (NFE).

        Args:
            shape: [B, 3, H, W].
            return_traj: return every state from noise to image (NFE + 1 of them) instead of the last.
            verbose: show a progress bar.
            generator: source of the noise; a list of B generators makes each image depend on its own alone.
                Default: the device's global generator.
            noise: start from this, of `shape`, instead of drawing any.
        Returns: float32 images on the model's device, about [-1, 1], not clamped.
        """
        x = self._noise(shape, generator) if noise is None else noise.to(self.device)
        traj = [x]
        grid = self.scheduler.time_grid(num_inference_timesteps)
        with eval_mode(self):
            for t, t_next in tqdm(list(zip(grid, grid[1:], strict=False)), disable=not verbose, desc="sampling"):
                asked_until = self.scheduler.asked_until(t, t_next, num_inference_timesteps)
                t, t_next, asked_until = (x.new_full((len(x),), time) for time in (t, t_next, asked_until))
                x = self.jump(x, t, t_next, asked_until)
                traj.append(x)
        x = traj[-1] = self.scheduler.filtered(x, num_inference_timesteps)
        return traj if return_traj else x

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        if isinstance(generator, list):
            if len(generator) != shape[0]:
                raise ValueError(f"{len(generator)} generators for {shape[0]} images")
            return torch.cat([self._noise((1, *shape[1:]), one) for one in generator])
        device = generator.device if generator is not None else self.device
        return torch.randn(shape, generator=generator, device=device).to(self.device)


def create_custom_model(
    device: str = "cpu",
    *,
    objective: str | None = None,
    use_additional_condition: bool | None = None,
    num_train_timesteps: int = 1000,
    unet: str = "full",
    image_size: int = 64,
    time_sampling: str = "uniform",
    time_grids: dict | None = None,
    asking: dict | None = None,
    smoothing: dict | None = None,
    sharpening: dict | None = None,
    model_type: str | None = None,
    scheduler_type: str | None = None,
    **unknown,
) -> CustomGenerativeModel:
    """Build the challenge's U-Net and its flow map on `device`. The keywords are what a saved config holds.

    Args:
        objective: default "shortcut"; but "rectified_flow" for a config that turns the condition off, as
            those of the challenge's base code do. With options: "name/option=value/...".
        use_additional_condition: default: whatever the objective needs. True adds the condition anyway.
        num_train_timesteps, time_sampling, time_grids, asking, smoothing, sharpening: see `CustomScheduler`.
        unet: "full" is the challenge's; "small" is for tests and experiments.
        image_size: 64, or 32 for experiments.
        model_type, scheduler_type: accepted and ignored; every saved config carries them.
    Raises: UserError naming the key or the value that is not known.
    """
    if unknown:
        raise UserError(f"unknown model setting {', '.join(map(repr, unknown))}: is this config from another project?")
    if not isinstance(use_additional_condition, bool | None):  # "false" is true
        raise UserError(f"use_additional_condition must be true or false, got {use_additional_condition!r}")
    if objective is None:
        objective = "rectified_flow" if use_additional_condition is False else "shortcut"
    for name, value, known in (("unet", unet, UNETS), ("image_size", image_size, IMAGE_SIZES)):
        if value not in known:
            raise UserError(f"unknown {name} {value!r}: choose one of {', '.join(map(str, known))}")
    needed = parse_objective(objective)[0].needs_condition
    if needed and use_additional_condition is False:
        raise UserError(f"the objective {objective} needs the extra condition, but use_additional_condition is false")

    network = UNet(**UNETS[unet], use_additional_condition=needed or bool(use_additional_condition))
    chosen = {"time_grids": time_grids, "asking": asking, "smoothing": smoothing, "sharpening": sharpening}
    scheduler = CustomScheduler(num_train_timesteps, time_sampling=time_sampling, **chosen)
    return CustomGenerativeModel(network, scheduler, objective=objective, image_size=image_size).to(device)
