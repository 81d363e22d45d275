"""How good the encoder is while it trains: a kNN vote at the end of an epoch."""

import functools

import torch
from torch import Tensor

from clae_fast import data
from clae_fast.config import Config
from clae_fast.evaluation import extract_features, knn_accuracy, leave_one_out_knn
from clae_fast.evaluation.features import batches
from clae_fast.nn import Encoder

# labeled training images that are watched where none are held out
_WATCHED = 512


class Watch:
    """Measures an encoder on held out images or, without any, on a few training images."""

    def __init__(
        self, config: Config, labeled: data.Split, held: data.Split | None, device: torch.device
    ) -> None:
        self._labeled = labeled
        self._held = held
        self._config = config
        self._device = device

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """An accuracy in percent by its name in metrics.jsonl; leaves `encoder` in eval mode.

        "val_knn" is that of the held out images, which the images that are trained on vote for.
        "train_knn" is that of the watched images, which vote for each other; it chooses nothing.
        """
        if self._held is None:
            return {"train_knn": self._watch(encoder)}
        voters, held = (
            extract_features(encoder, split, self._config, self._device)
            for split in (self._labeled, self._held)
        )
        return {"val_knn": knn_accuracy(*voters, *held)}

    @functools.cached_property
    def _watched(self) -> list[tuple[Tensor, Tensor]]:
        """The watched images in bytes, and their labels, on the device."""
        found = batches(self._labeled.evenly(_WATCHED), self._config, self._device)
        return [((255 * x).round().byte(), labels) for x, labels in found]

    @torch.no_grad()
    def _watch(self, encoder: Encoder) -> float:
        encoder.eval()
        # as in `extract_features`
        with torch.compiler.set_stance("force_eager"):
            features = torch.cat([encoder.features(x / 255) for x, _ in self._watched])
        return leave_one_out_knn(features, torch.cat([labels for _, labels in self._watched]))
