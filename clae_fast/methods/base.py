"""What a contrastive method is to the schedules and to the training loop."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from clae_fast import _check
from clae_fast.nn.dual_norm import adversarial_twin


class Method(nn.Module, ABC):
    """Encoders, a loss at their embeddings, and whatever state the method trains with.

    A method knows formulas; `clae_fast.step` knows which pass runs when. All a method's state lives
    in parameters, buffers and submodules, so `state_dict()` is its checkpoint.

    Args:
        encoder: f, from views to raw projections; its BatchNorm layers see clean views only.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.

    Attributes:
        name: Name of the method in configurations.
        views: Views of a batch that one step takes.
        plain_units: Cost of a step without an attack, in encoder passes over one view.
        reforward_anchor: Whether CLAE's code encodes the anchor anew for the adversarial loss.
        encoder: f.
        adv_encoder: f_adv, None when not adversarial.
    """

    name: ClassVar[str]
    views: ClassVar[int] = 2
    plain_units: ClassVar[int] = 6
    reforward_anchor: ClassVar[bool] = False

    adv_encoder: nn.Module | None

    def __init__(self, encoder: nn.Module, *, temperature: float, adversarial: bool) -> None:
        super().__init__()
        _check.temperature(temperature)
        self.temperature = temperature
        self.encoder = encoder
        self.adv_encoder = adversarial_twin(encoder) if adversarial else None

    @abstractmethod
    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of a pair of views at their raw projections.

        Args:
            z_a: Projections of the anchor's view, [N, D].
            z_b: Projections of the other view, clean or adversarial, [N, D].

        Returns:
            A scalar, differentiable in both.
        """

    def attack_grad(self, z: Tensor) -> Tensor:
        """Gradient of `loss(z, z_b)` to z_b alone at z_b = z: what the self attack follows.

        Args:
            z: Projections through the adversarial encoder, [N, D].

        Returns:
            The gradient at the projections, [N, D].
        """
        z = z.detach()
        z_b = z.clone().requires_grad_()
        with torch.enable_grad():
            (dz,) = torch.autograd.grad(self.loss(z, z_b), z_b)
        return dz

    def after_step(self) -> None:
        """Runs after every optimiser step: momentum encoders, queues, banks."""
