"""MEDUSA puts one global attention on any backbone's scales."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveal.medical.models.medusa import Medusa, MedusaConfig

SMALL = MedusaConfig(width=4, halvings=2, map_width=3, size=16)


def backbone() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def test_with_a_resnet_50_it_has_the_published_size():
    models = pytest.importorskip("torchvision.models")
    model = Medusa(models.resnet50(num_classes=2), ("layer1", "layer2", "layer3", "layer4"))
    assert abs(sum(parameter.numel() for parameter in model.parameters()) / 29.2e6 - 1) < 0.02
    assert [head.layers[2].out_channels for head in model.heads] == [256, 512, 1024, 2048]


def test_every_part_gets_a_gradient_and_the_backbone_keeps_no_hooks():
    torch.manual_seed(0)
    model = Medusa(backbone(), ("0", "2"), SMALL)
    out = model(torch.randn(3, 3, 20, 28))
    assert out.shape == (3, 2)
    out.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(head.layers[0].weight.grad.any() for head in model.heads)
    assert not any(module._forward_hooks for module in model.backbone.modules())


def test_each_scale_is_multiplied_by_its_heads_attention():
    model = Medusa(backbone(), ("0", "2"), SMALL).eval()
    image = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        attention = model.attention(image)
        first = model.backbone[0](image)
        second = model.backbone[2]((first * model.heads[0](attention, first.shape[-2:])).relu())
        expected = model.backbone[3:](second * model.heads[1](attention, second.shape[-2:]))
        torch.testing.assert_close(model(image), expected)
        for head in model.heads:
            nn.init.zeros_(head.layers[2].weight)
            nn.init.constant_(head.layers[2].bias, 50.0)
        torch.testing.assert_close(model(image), model.backbone(image), msg="attention of 1 everywhere is the plain backbone")


def test_the_body_sees_films_whatever_their_contrast():
    model = Medusa(backbone(), ("0",), SMALL).eval()
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(model.attention(7 * image + 3), model.attention(image), atol=1e-4, rtol=1e-4)
        assert model.attention(torch.zeros(1, 3, 24, 24)).isfinite().all()


def test_stages_that_cannot_be_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"expected names of the backbone's stages, such as 0, 1, .*; got layer9"):
        Medusa(backbone(), ("layer9",), SMALL)
    with pytest.raises(ValueError, match="expected stages that give maps"):
        Medusa(backbone(), ("5",), SMALL)
