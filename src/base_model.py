"""What every scheduler and generative model of the challenge offers to its scripts."""

from abc import ABC, abstractmethod

import torch
import torch.nn as nn
from torch import Tensor


class BaseScheduler(nn.Module, ABC):
    """A path from noise to data: times, interpolation, one reverse step, the regression target.

    Keyword arguments beyond `num_train_timesteps` go to `_setup`, which the constructor calls.
    """

    def __init__(self, num_train_timesteps: int = 1000, **kwargs):
        super().__init__()
        self.num_train_timesteps = num_train_timesteps
        self._setup(**kwargs)

    def _setup(self, **kwargs) -> None:
        """Set the subclass up; called once by the constructor."""

    @abstractmethod
    def sample_timesteps(self, batch_size: int, device: torch.device) -> Tensor:
        """Draw training times, [batch_size]."""

    @abstractmethod
    def forward_process(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t from data x_0 and noise, all [B, ...], at times t, [B]."""

    @abstractmethod
    def reverse_process_step(self, xt: Tensor, pred: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The state at t_next, from the state xt at t and the network's prediction there."""

    @abstractmethod
    def get_target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at t."""


class BaseGenerativeModel(nn.Module, ABC):
    """A network and a scheduler that can be trained (`compute_loss`) and sampled from (`sample`).

    Keyword arguments go to `_setup`, which the constructor calls.
    """

    def __init__(self, network: nn.Module, scheduler: BaseScheduler, **kwargs):
        super().__init__()
        self.network = network
        self.scheduler = scheduler
        self._setup(**kwargs)

    def _setup(self, **kwargs) -> None:
        """Set the subclass up; called once by the constructor."""

    @property
    def device(self) -> torch.device:
        """Where the network's parameters live."""
        return next(self.network.parameters()).device

    @abstractmethod
    def compute_loss(self, data: Tensor, noise: Tensor, **kwargs) -> Tensor:
        """Scalar training loss of a batch of images and as much Gaussian noise, both [B, 3, H, W]."""

    @abstractmethod
    def predict(self, xt: Tensor, t: Tensor, **kwargs) -> Tensor:
        """The network's prediction at (xt, t), shaped like xt."""

    @abstractmethod
    def sample(
        self,
        shape: tuple[int, ...],
        num_inference_timesteps: int = 20,
        return_traj: bool = False,
        verbose: bool = False,
        **kwargs,
    ) -> Tensor | list[Tensor]:
        """Generate images of `shape` in [-1, 1], or with `return_traj` every state on the way."""
