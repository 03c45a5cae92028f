"""Layers are told from the model: presets, globs, layouts, grids and prefix tokens on architectures of every kind."""

import pytest
import torch
from torch import nn

from tasks.discovery import find_layers
from tasks.layers import LayersSettings, hooked, unit_blocks
from tasks.pixels import Preprocess
from tasks.target import TargetSettings, load_target


def layers(source, name, *names, pool="max", **more):
    target = load_target(TargetSettings(source, name, pretrained=False, **more))
    return target, find_layers(
        target.model, target.preprocess, LayersSettings(list(names), pool), more.get("prefix_tokens")
    )


@pytest.mark.parametrize(
    ("source", "name", "preset", "first", "units"),
    [
        ("torchvision", "resnet18", "conv", ("bn1", 64, "chw", (112, 112), 0), 4800),
        ("torchvision", "resnet18", "residual", ("layer1.0", 64, "chw", (56, 56), 0), 1920),
        ("torchvision", "resnet18", "logits", ("fc", 1000, "vector", (1, 1), 0), 1000),
        (
            "torchvision",
            "vit_b_16",
            "mlp",
            ("encoder.layers.encoder_layer_0.mlp.1", 3072, "tokens", (14, 14), 1),
            36864,
        ),
        ("torchvision", "swin_t", "mlp", ("features.1.0.mlp.1", 384, "hwc", (56, 56), 0), 17664),
        ("torchvision", "convnext_tiny", "residual", ("features.1.0", 96, "chw", (56, 56), 0), 6624),
        ("timm", "vit_tiny_patch16_224", "mlp", ("blocks.0.mlp.act", 768, "tokens", (14, 14), 1), 9216),
        ("timm", "vit_small_patch14_reg4_dinov2", "mlp", ("blocks.0.mlp.act", 1536, "tokens", (37, 37), 5), 18432),
        ("timm", "eva02_tiny_patch14_224", "mlp", ("blocks.0.mlp.norm", 512, "tokens", (16, 16), 1), 6144),
        ("timm", "convnext_atto", "mlp", ("stages.0.blocks.0.mlp.act", 160, "chw", (56, 56), 0), 7360),
        ("timm", "swin_tiny_patch4_window7_224", "residual", ("layers.0.blocks.0", 96, "hwc", (56, 56), 0), 4416),
        ("open_clip", "ViT-B-32", "mlp", ("transformer.resblocks.0.mlp.gelu", 3072, "tokens", (7, 7), 1), 36864),
    ],
)
def test_presets(source, name, preset, first, units):
    _, found = layers(source, name, preset)
    layer = found[0]
    assert (layer.name, layer.num_units, layer.layout, layer.grid, layer.prefix) == first
    assert sum(x.num_units for x in found) == units


def test_all_is_everything_in_forward_order():
    target, found = layers("torchvision", "mobilenet_v3_small", "all")
    parts = {p: layers("torchvision", "mobilenet_v3_small", p)[1] for p in ("mlp", "residual", "conv", "logits")}
    assert {x.name for x in found} == {x.name for p in parts.values() for x in p}
    order = []
    with hooked(target.model, [x.name for x in found], lambda name, _: order.append(name)), torch.inference_mode():
        target.model(torch.zeros(1, 3, 224, 224))
    assert [x.name for x in found] == order


def test_layout_is_not_guessed_from_sizes():
    """Channels, height and width are all 8 here; only what the model does with the tensor tells them apart."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 4, 4)
            self.last = nn.Sequential(nn.Linear(8, 8), nn.GELU())
            self.first = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.conv(x).permute(0, 2, 3, 1)
            return self.first((self.last(x) + x).permute(0, 3, 1, 2))

    found = find_layers(Same().eval(), Preprocess((32, 32), (32, 32)), LayersSettings(["**"]))
    assert {x.name: x.layout for x in found} == {
        "conv": "chw", "last.0": "hwc", "last.1": "hwc", "last": "hwc", "first": "chw",
    }  # fmt: skip


def test_globs_stay_within_one_step():
    _, found = layers("torchvision", "resnet18", "layer4.*")
    assert [x.name for x in found] == ["layer4.0", "layer4.1"]
    _, found = layers("torchvision", "resnet18", "layer4.**.conv?", "fc")
    assert [x.name for x in found] == ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2", "fc"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer9.*"], r"layers.names=layer9.\*: matches no module; allowed are mlp, residual, conv, logits, all"),
        (["layer1.0.relu"], "layers.names=layer1.0.relu: layer1.0.relu runs more than once per image"),
        (["mlp"], "layers.names=mlp: matches no module"),
    ],
)
def test_impossible_layers_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        layers("torchvision", "resnet18", *names)


def test_cls_pooling_needs_a_cls_token():
    with pytest.raises(ValueError, match=r"layers.pool=cls: layer layer1.0 has no CLS token; allowed are max, mean"):
        layers("torchvision", "resnet18", "residual", pool="cls")


def test_tokens_that_fit_no_grid_are_refused():
    with pytest.raises(
        ValueError, match=r"target.prefix_tokens=3: layer blocks.0.mlp.act has 197 tokens; 3 prefix tokens leave 194"
    ):
        layers("timm", "vit_tiny_patch16_224", "mlp", prefix_tokens=3)


def test_non_square_input_of_a_timm_vit():
    _, found = layers(
        "timm", "vit_tiny_patch16_224", "mlp", kwargs={"img_size": [96, 160]}, preprocess={"size": [96, 160]}
    )
    assert found[0].grid == (6, 10)


def test_blocks_cover_all_units_once_and_never_cross_layers():
    _, found = layers("torchvision", "resnet18", "conv", "logits")
    blocks = unit_blocks(found, 100)
    assert max(map(len, blocks)) == 100
    for layer in found:
        mine = [b for b in blocks if b.layer == layer.name]
        assert [b.start for b in mine[1:]] == [b.stop for b in mine[:-1]]
        assert (mine[0].start, mine[-1].stop) == (0, layer.num_units)
