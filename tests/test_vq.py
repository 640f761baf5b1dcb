"""Image tokenizers: published weights against the published architecture written apart, and small ones trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("diffusers")

from mutor.models import vq

SMALL = {"codes": 50, "width": 8, "channels": [8, 16, 16], "latent": 12, "layers": 2, "groups": 4, "colours": 3}


def norm(channels):
    return nn.GroupNorm(SMALL["groups"], channels, eps=1e-6)


class Res(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.norm1, self.conv1 = norm(inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2, self.conv2 = norm(outside), nn.Conv2d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class Attn(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2) for f in (self.q, self.k, self.v))
        weight = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5, -1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weight, v).view(x.shape))


class Move(nn.Module):
    """Half or double size: a convolution over the image padded right and below, or over each pixel doubled."""

    def __init__(self, channels, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if down else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0))


class Half(nn.Module):
    """Encoder or decoder under the published names."""

    def __init__(self, down):
        super().__init__()
        c, layers = SMALL["channels"], SMALL["layers"]
        order = c if down else c[::-1]
        self.down = down
        self.conv_in = nn.Conv2d(SMALL["colours"] if down else SMALL["latent"], order[0], 3, padding=1)
        blocks, inside = [], order[0]
        for level, outside in enumerate(order):
            block = nn.Module()
            block.res, block.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(layers + (not down)):
                block.res.append(Res(inside, outside))
                inside = outside
                if level == (len(c) - 1 if down else 0):
                    block.attn.append(Attn(inside))
            if level < len(c) - 1:
                block.add_module("downsample" if down else "upsample", Move(inside, down))
            blocks.append(block)
        middle = c[-1]
        self.mid = nn.ModuleList([Res(middle, middle), Attn(middle), Res(middle, middle)])
        self.conv_blocks = nn.ModuleList(blocks)
        self.norm_out = norm(order[-1])
        self.conv_out = nn.Conv2d(order[-1], SMALL["latent"] if down else SMALL["colours"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        if not self.down:
            x = self._middle(x)
        for block in self.conv_blocks:
            for number, res in enumerate(block.res):
                x = res(x)
                x = block.attn[number](x) if len(block.attn) else x
            for name in ("downsample", "upsample"):
                x = getattr(block, name)(x) if hasattr(block, name) else x
        if self.down:
            x = self._middle(x)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _middle(self, x):
        for part in self.mid:
            x = part(x)
        return x


class Published(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Half(True), Half(False)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(SMALL["codes"], SMALL["width"])
        self.quantize.register_buffer("codebook_used", torch.zeros(4))
        self.quant_conv = nn.Conv2d(SMALL["latent"], SMALL["width"], 1)
        self.post_quant_conv = nn.Conv2d(SMALL["width"], SMALL["latent"], 1)

    def codes(self, images):
        """The nearest of normalised vectors to the normalised latent."""
        z = F.normalize(self.quant_conv(self.encoder(images)).movedim(1, -1), dim=-1)
        book = F.normalize(self.quantize.embedding.weight, dim=-1)
        return (z[..., None, :] - book).square().sum(-1).argmin(-1)

    def images(self, codes):
        z = F.normalize(self.quantize.embedding.weight, dim=-1)[codes].movedim(-1, 1)
        return self.decoder(self.post_quant_conv(z))


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    model = Published()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_published_weights_give_the_same_codes_and_images(published, tools):
    ours = vq.convert(published.state_dict(), **SMALL)
    images = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = vq.encode(ours, images)
    assert codes.shape == (3, 4, 6) and torch.equal(codes, published.codes(images)) and len(codes.unique()) > 5
    some = torch.randint(50, (2, 4, 6), generator=torch.Generator().manual_seed(2))
    theirs = published.images(some)
    tools.close(vq.decode(ours, some), theirs.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    assert theirs.std() > 0.1


def test_the_published_size():
    """Every weight of VQ-16 has its place: names and shapes of the published architecture at its sizes."""
    small = dict(SMALL)
    try:
        SMALL.update(vq.VQ16)
        with torch.device("meta"):
            state, ours = Published().state_dict(), vq.build(**vq.VQ16)
    finally:
        SMALL.update(small)
    state = {vq._renamed(k): v for k, v in state.items() if "codebook_used" not in k}
    assert state.keys() == ours.state_dict().keys()
    assert sum(p.numel() for p in ours.parameters()) == sum(v.numel() for v in state.values())


def test_bad_checkpoints_are_named(published):
    state = published.state_dict()
    with pytest.raises(ValueError, match="'encoder\\.extra' is not one"):
        vq.convert({**state, "encoder.extra": torch.zeros(1)}, **SMALL)
    with pytest.raises(ValueError, match=r"becomes 'decoder\.conv_in\.bias' is missing"):
        vq.convert({k: v for k, v in state.items() if k != "decoder.conv_in.bias"}, **SMALL)
    with pytest.raises(ValueError, match=r"'quant_conv\.bias' has shape \(3,\), allowed: \(8,\)"):
        vq.convert({**state, "quant_conv.bias": torch.zeros(3)}, **SMALL)


def test_a_small_one_learns_its_images():
    """Far below the variance of the images within seconds, with many codes in use, and the same twice."""
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(8)
    stripes = torch.stack(
        [
            ((rows[:, None] * a + rows[None] * b + c) % 8 < 4).float() * 2 - 1
            for a, b, c in torch.randint(3, (64, 3), generator=g).tolist()
        ]
    )[:, None]

    class Stripes:
        def __len__(self):
            return len(stripes)

        def batch(self, index):
            return stripes[index]

    errors, books = [], []
    for _ in range(2):
        torch.manual_seed(0)
        small = vq.build(codes=16, width=4, channels=[8, 16], latent=8, layers=1, groups=4, colours=1)
        errors.append(vq.train(small, Stripes(), steps=120, batch_size=32, rate=4e-3, seed=0, log=lambda line: None))
        books.append(small.quantize.embedding.weight.detach())
    assert errors[0] < 0.25 * float(stripes.var()) and errors[0] == errors[1] and torch.equal(*books)
    codes = vq.encode(small, stripes)
    assert codes.shape == (64, 4, 4) and len(codes.unique()) >= 8
    assert torch.equal(codes, vq.encode(small, stripes))
    assert float((vq.decode(small, codes) - stripes).square().mean()) < 0.25 * float(stripes.var())
