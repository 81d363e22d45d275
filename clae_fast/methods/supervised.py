"""Methods of two views whose loss knows the classes of the images."""

from abc import abstractmethod

import torch
from torch import Tensor

from clae_fast.methods.pair import PairMethod
from clae_fast.steps.options import ALONE, StepContext


class SupervisedMethod(PairMethod):
    """A method whose two views and their labels meet in one loss, that of the rows of both."""

    needs_labels = True

    @abstractmethod
    def class_loss(self, z: Tensor, labels: Tensor) -> Tensor:
        """The loss of rows whose classes are known.

        Args:
            z: Raw projections of the anchor's views, then of the other views, [2N, D].
            labels: Their classes, int64 [2N].

        Returns:
            A scalar, differentiable in `z`.
        """

    def loss(self, z_a: Tensor, z_b: Tensor, context: StepContext = ALONE) -> Tensor:
        """`class_loss` of the rows of both views.

        Raises:
            ValueError: If the context has no labels.
        """
        if context.labels is None:
            raise ValueError(f"labels must be given for {self.name}, got None")
        return self.class_loss(torch.cat([z_a, z_b]), context.labels.repeat(2))
