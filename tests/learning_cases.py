"""How a test sees that a method learns."""

from clae_fast.config.layers import resolve
from clae_fast.evaluation import extract_features, knn_accuracy
from clae_fast.training.trainer import Trainer


def assert_learns(least: float, **settings) -> Trainer:
    """Accuracy of neighbors on the digits' test images: `least` points above before training."""
    config = resolve({"device": "cpu", "attack": "none", "image_size": 8, "epochs": 3, **settings})
    trainer = Trainer(config)

    def accuracy() -> float:
        sets = (
            extract_features(trainer.method.encoder, split, config, trainer.device)
            for split in (trainer.labeled, trainer.test)
        )
        features = [part for found in sets for part in found]
        trainer.method.train()
        return knn_accuracy(*features)

    untrained = accuracy()
    for batch in trainer.views:
        trainer._train_step(batch)
        trainer.global_step += 1
    trained = accuracy()
    assert trained > untrained + least, (untrained, trained)
    return trainer
