"""Encoders of runs and of libraries: the same features, frozen, and one error for what fails."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clae_fast
from clae_fast.config.layers import resolve
from clae_fast.training import checkpoint, encoders
from clae_fast.training.build import build_method
from clae_fast.training.encoders import load_encoder
from clae_fast.training.run_folder import RunFolder
from clae_fast.training.trainer import Trainer

TINY = {"limit": 16, "image_size": 8, "batch_size": 8, "epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = resolve(TINY | {"mean": (0.1, 0.2, 0.3), "keep_every": 1, "val_size": 4})
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "run", config)
    Trainer(config).fit(run)
    return run


def images(size=8):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def scrambled(network: nn.Module, seed: int = 2) -> dict[str, torch.Tensor]:
    """Moves weights and statistics to where no initialization leaves them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.02 * torch.rand(value.shape, generator=generator))
    return network.state_dict()


def test_a_run_builds_the_same_encoder():
    config = resolve(TINY)
    torch.manual_seed(3)
    method = build_method(config)
    torch.manual_seed(3)
    encoder = encoders.build(config)
    assert encoder.training
    expected = method.encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.state_dict().items())
    assert encoder.head[0].in_features == 64


def test_restore(folder):
    state = checkpoint.load(folder.checkpoint)
    encoder, step = encoders.restore(folder, folder.checkpoint)
    assert step == state["step"] == 1
    assert torch.equal(encoder.head[2].bias, state["method"]["encoder.head.2.bias"])


def test_a_run_as_a_frozen_encoder(folder):
    encoder = load_encoder(str(folder.path))
    assert (encoder.image_size, encoder.step) == (8, 1)
    whole, _ = encoders.restore(folder, folder.best)
    expected = whole.eval().features(images())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    owner = nn.ModuleList([encoder]).train()
    assert not any(layer.training for layer in encoder.modules())
    assert not any(weight.requires_grad for weight in owner.parameters())
    found = encoder(images())
    assert found.shape == (3, encoder.dim) == (3, 64)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    # larger images than those of the run
    assert encoder(images(16)).shape == (3, 64)


def test_the_package_has_it():
    assert clae_fast.load_encoder is load_encoder
    with pytest.raises(AttributeError, match="module 'clae_fast' has no attribute 'load_encoders'"):
        clae_fast.load_encoders  # noqa: B018


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16", "P"])
def test_its_transform_takes_images_of_any_kind(folder, mode):
    transform = pickle.loads(pickle.dumps(load_encoder(folder.path).transform))
    pixels = np.arange(10 * 12, dtype=np.uint8).reshape(10, 12)
    gray = Image.fromarray(pixels)
    image = Image.fromarray(pixels.astype(np.uint16) << 8) if mode == "I;16" else gray.convert(mode)
    x = transform(image)
    assert x.shape == (3, 8, 8)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, transform(gray), rtol=0, atol=1 / 255)


def test_its_transform_takes_tensors(folder):
    transform = load_encoder(folder.path, image_size=6).transform
    image = torch.arange(3 * 64, dtype=torch.uint8).view(3, 8, 8)
    x = transform(image)
    assert x.shape == (3, 6, 6)
    torch.testing.assert_close(x, transform(image / 255), rtol=0, atol=1 / 255)


@pytest.mark.parametrize("arch", ["resnet18", "timm/test_resnet"])
def test_weights_have_the_names_of_their_library(tmp_path, arch):
    """So that they load strictly there."""
    pytest.importorskip("timm")
    config = resolve(TINY | {"arch": arch, "image_size": 32})
    run = RunFolder.create(tmp_path / "run", config)
    method = build_method(config)
    weights = {f"encoder.{name}": value for name, value in scrambled(method.encoder).items()}
    checkpoint.save(run.checkpoint, {"step": 1, "method": weights})
    encoder = load_encoder(run.path)
    if arch == "resnet18":
        network = pytest.importorskip("torchvision.models").resnet18()
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = network.fc = nn.Identity()
    else:
        network = pytest.importorskip("timm").create_model("test_resnet", num_classes=0)
    network.load_state_dict(encoder.network.state_dict(), strict=True)
    x = images(32)
    torch.testing.assert_close(network.eval()((x - 0.5) / 0.5), encoder(x))


def test_which_checkpoint_of_a_run(folder, tmp_path):
    kept = folder.kept(1)
    state = checkpoint.load(kept)
    state["method"]["encoder.backbone.1.conv1.weight"].zero_()
    changed = RunFolder.create(tmp_path / "run", folder.config)
    checkpoint.save(changed.checkpoint, state)
    assert changed.best_or_last == changed.checkpoint
    last = load_encoder(changed.path)
    assert not last.network.conv1.weight.any()
    checkpoint.save(changed.best, checkpoint.load(kept))
    assert load_encoder(changed.path).network.conv1.weight.any()
    named = load_encoder(str(changed.checkpoint))
    assert not named.network.conv1.weight.any()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts weights where a download would have put them; there is no network."""
    if not pytest.importorskip("timm.models._hub").has_hf_hub():
        pytest.skip("timm cannot use huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name: str, weights: dict[str, torch.Tensor]) -> None:
        repository = tmp_path / f"models--timm--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        pytest.importorskip("safetensors.torch").save_file(weights, snapshot / "model.safetensors")

    return put


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 32), ("test_vit", 32)])
def test_timm(hub, name, size):
    timm = pytest.importorskip("timm")
    fixed = {"img_size": size} if "vit" in name else {}
    network = timm.create_model(name, **fixed)
    weights = scrambled(network)
    hub(f"{name}.r160_in1k", weights)
    encoder = load_encoder(f"timm/{name}", image_size=size)
    x = images(size)
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    network.reset_classifier(0)
    expected = network.eval()((x - mean) / std)
    torch.testing.assert_close(encoder(x), expected)
    assert encoder.dim == expected.shape[1]
    tagged = load_encoder(f"timm/{name}.r160_in1k", image_size=size)
    assert torch.equal(tagged(x), encoder(x))


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("mobilenet_v3_small", 1024)])
def test_torchvision(tmp_path, monkeypatch, name, width):
    models = pytest.importorskip("torchvision.models")
    network = models.get_model(name)
    weights = models.get_model_weights(name).DEFAULT
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(scrambled(network), tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    encoder = load_encoder(f"torchvision/{name}", image_size=32)
    inside = []
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    linear.register_forward_hook(lambda module, args, output: inside.append(args[0]))
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (weights.transforms().mean, weights.transforms().std)
    )
    x = images(32)
    network.eval()((x - mean) / std)
    torch.testing.assert_close(encoder(x), inside[0].detach())
    assert encoder.dim == width


def assert_none(source, reason):
    with pytest.raises(ValueError, match="no encoder from ") as caught:
        load_encoder(source, image_size=8)
    message = str(caught.value)
    assert repr(source) in message
    assert reason in message
    assert "\n" not in message


def test_one_error_for_all_that_fails(folder, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError(113, "No route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    models = pytest.importorskip("torchvision.models")
    squeezenet = models.get_model_weights("squeezenet1_1").DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "checkpoints" / squeezenet)
    other = RunFolder.create(tmp_path / "other", folder.config.replace(arch="resnet18"))
    checkpoint.save(other.checkpoint, checkpoint.load(folder.checkpoint))
    damaged = tmp_path / "damaged"
    RunFolder.create(damaged, folder.config)
    (damaged / "checkpoints" / "last.pt").write_text("no checkpoint")
    for source, reason in (
        ("nowhere", "neither a run folder, a checkpoint in one, timm/NAME nor torchvision/NAME"),
        (str(tmp_path), "is no run folder: it has no config.json"),
        (str(damaged), "cannot read checkpoint"),
        (str(other.path), "is not one of this run"),
        (str(other.path / "config.json"), "is no run folder"),
        ("torchvision/nonesuch", "torchvision has no such classifier"),
        ("torchvision/raft_large", "torchvision has no such classifier"),
        ("torchvision/resnet18", "No route to host"),
        ("torchvision/squeezenet1_1", "its classes come out of no linear layer"),
    ):
        assert_none(source, reason)


def test_what_timm_does_not_have(hub):
    assert_none("timm/nonesuch", "a model that timm does not have: 'nonesuch'")
    assert_none("timm/test_resnet", "test_resnet")


def test_images_that_do_not_fit(hub):
    timm = pytest.importorskip("timm")
    hub("test_vit.r160_in1k", scrambled(timm.create_model("test_vit", img_size=32)))
    with pytest.raises(ValueError, match="no encoder from 'timm/test_vit'"):
        load_encoder("timm/test_vit", image_size=0)
