"""MoCo v2: queries find their key among a queue of past keys."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from clae_fast.distributed import World
from clae_fast.methods.options import Size
from clae_fast.methods.queue import Keys, QueueMethod
from clae_fast.nn.grouped_norm import grouped_norm
from clae_fast.nn.negatives import log_sum_exp
from clae_fast.nn.split_norm import dealt
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions, StepResult


class MoCo(QueueMethod):
    r"""Momentum contrast (He et al., CVPR 2020; v2: Chen et al., arXiv 2003.04297, 2020).

    Each query has to find its key, the projection of the other view by the momentum encoder, among
    the keys of past steps. The loss is

    .. math:: -\frac{1}{N} \sum_i \log \frac{e^{q_i \cdot k_i / T}}
        {e^{q_i \cdot k_i / T} + \sum_{j=1}^K e^{q_i \cdot n_j / T}}

    with the key k_i, a constant, and the rows n_j of the queue, which the keys of this step enter
    after the loss. Of what v2 changed, the MLP head, the blur and the cosine schedule are settings
    of the run, see the presets. With `symmetric` the loss is the mean of both directions, where the
    authors' demo on CIFAR-10 adds them.

    The authors spread a batch over 8 GPUs, whose BatchNorm layers see a part each, and shuffle the
    keys between them. Here `norm_splits` does this on one device, see ``clae_fast.nn.split_norm``;
    several processes leave it at 1 and synchronize BatchNorm.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(QueueMethod.Options):
        """Settings of MoCo.

        Attributes:
            queue_size: How many keys the queue holds, K.
            symmetric: Whether both views are queries and keys: 8 units, 11 with the pair attack.
            norm_splits: In how many parts BatchNorm sees a batch; 8 on one device stand for the 8
                GPUs of the authors.
        """

        queue_size: Size = 512
        symmetric: bool = False
        norm_splits: Size = 1

        @property
        def large_queries(self) -> int:
            """Both views where `symmetric`."""
            return 1 + self.symmetric

    name = "moco"
    options: Options

    def keys(self, x: Tensor, world: World) -> Tensor:
        """Unit keys of a view, of all processes' rows, with BatchNorm in `norm_splits` parts."""
        return self.unit(world.all_gather(dealt(self.key_encoder, x, self.options.norm_splits)))

    def negatives(self, u: Tensor) -> Tensor:  # [N, D] -> [N]
        """Logarithm of what all negatives add to the denominator of each unit query."""
        return log_sum_exp(u, self.queue, temperature=self.temperature)

    def loss(self, z: Tensor, target: Keys) -> Tensor:
        r"""Mean of :math:`\log (e^{s_i} + \sum_j e^{s_{ij}}) - s_i`, positive and negatives."""
        u = self.unit(z)
        positive = (u * target.rows).sum(1) / self.temperature
        return target.weight * F.softplus(self.negatives(u) - positive).mean()

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        splits = self.options.norm_splits
        if splits == 1:
            return super()._step(batch, options)
        rows = options.micro_batch or len(batch.views[0])
        if rows % splits:
            raise ValueError(
                f"norm_splits must divide the {rows} rows encoded at once, got {splits}"
            )
        encoders = [each for each in (self.encoder, self.adv_encoder) if each is not None]
        with grouped_norm(nn.ModuleList(encoders), splits, split=True):
            return super()._step(batch, options)
