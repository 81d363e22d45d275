"""Images and checks that tests of augment share."""

import torch

import clae_fast


def photos(count, height, width, *, seed=0):
    """Smooth images in strong colors, with some noise and with saturated and equal pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    noise = 0.1 * torch.randn(smooth.shape, generator=generator)
    return (((smooth - 0.5) * 1.5 + 0.5 + noise).clamp(0, 1) * 255).round().byte()


def ragged(images, *, gap=0):
    """Images, [3, H, W] each, one after another with some bytes in between."""
    between = torch.full((gap,), 255).byte()
    pieces, offsets, at = [between], [], gap
    for image in images:
        offsets.append(at)
        pieces += [image.permute(1, 2, 0).flatten(), between]
        at += image.numel() + gap
    sizes = torch.tensor([list(image.shape[1:]) for image in images]).long().view(-1, 2)
    return clae_fast.RaggedImages(torch.cat(pieces), torch.tensor(offsets).long(), sizes)


def every_step(height, width, N=8):
    """A table that leaves nothing out, between samples, of boxes that touch every edge."""
    generator = torch.Generator().manual_seed(height + width)

    def numbers(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    sides = torch.tensor([height, width])
    box = (numbers(0, 1, 2, N, 2) * sides).floor() + 1
    start = (numbers(0, 1, 2, N, 2) * (sides - box + 1)).floor()
    box[0, 0], start[0, 0] = sides, 0
    order = numbers(0, 1, 2, N, 4).argsort(-1)
    factors = torch.cat([numbers(0, 2.5, 2, N, 3), numbers(-0.5, 0.5, 2, N, 1)], -1)
    factors[:, 1], factors[:, 2, :3] = torch.tensor([1, 1, 1, 0]), 1
    flags = numbers(0, 1, 2, N, 4) < 0.5
    sigma = numbers(0.1, 2, 2, N, 1) * flags[..., :1]
    return torch.cat(
        [start, box, flags[..., 1:2], order, factors, flags[..., 2:3], sigma, flags[..., 3:]], -1
    )


def check_native(height, width, size, **options):
    """Raises unless the C++ agrees with the reference to the rounding of fp32."""
    images, params = photos(8, height, width), every_step(height, width)
    # gray, black and white pixels, which have no hue, and saturated ones
    images[0], images[1], images[2, :, ::2] = images[0, :1], 0, 255
    images[3, 0], images[4, 2] = 0, 255
    expected = torch.cat(clae_fast.augment(images, params, size=size, impl="reference", **options))
    actual = torch.cat(clae_fast.augment(images, params, size=size, impl="native", **options))
    # each of three factors amplifies the roundings before it up to 2.5 times
    assert (actual - expected).abs().max() < 2e-5
    halves = torch.cat(
        clae_fast.augment(
            images,
            params,
            size=size,
            dtype=torch.float16,
            memory_format=torch.channels_last,
            impl="native",
            **options,
        )
    )
    assert torch.equal(halves, actual.half())
