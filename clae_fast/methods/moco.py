"""MoCo v2: queries find their key among a queue of past keys."""

from typing import ClassVar

from torch import nn

from clae_fast.methods.queue import QueueMethod, require_at_least


class MoCo(QueueMethod):
    r"""Momentum contrast (He et al., CVPR 2020; v2: Chen et al., arXiv 2003.04297, 2020).

    .. math:: -\frac{1}{N} \sum_i \log \frac{e^{q_i \cdot k_i / T}}
        {e^{q_i \cdot k_i / T} + \sum_{j=1}^K e^{q_i \cdot n_j / T}}

    with the key k_i of the momentum encoder, without gradient, and n_j in the queue, where this
    step's keys come after the loss. Of v2's changes, the MLP head, blur and the cosine schedule are
    settings of the run, see the presets.

    Args:
        encoder: f, from views to raw projections.
        temperature: T, above 0.
        adversarial: Whether to build the adversarial twin that attacks need.
        queue_size: Keys in the queue, K.
        key_momentum: Of the key encoder, from 0 to 1.
        symmetric: Whether both views are queries and keys: 8 units, 11 with the pair attack. The
            loss is the mean of both, where the authors' demo on CIFAR-10 adds them.
        norm_splits: Batches that BatchNorm sees a batch as; 8 on one device stand for MoCo's 8.
    """

    name: ClassVar[str] = "moco"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.2,
        adversarial: bool = False,
        queue_size: int = 512,
        key_momentum: float = 0.99,
        symmetric: bool = False,
        norm_splits: int = 1,
    ) -> None:
        super().__init__(
            encoder,
            temperature=temperature,
            adversarial=adversarial,
            queue_size=queue_size,
            key_momentum=key_momentum,
            symmetric=symmetric,
            norm_splits=norm_splits,
        )
        require_at_least(1, queue_size=queue_size)
