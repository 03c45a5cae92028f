"""Attention heads as units, on every library's attention: against attention written out, and switched off by hand."""

import math

import numpy as np
import open_clip
import pytest
import timm
import torch
from torchvision import models

from flows.config import compose
from tasks.discovery import find_layers
from tasks.forward import describe
from tasks.heads import Heads, open_heads
from tasks.layers import LayersSettings, hooked, readers
from tasks.pixels import Preprocess
from tasks.replay import Change, ablated, recorded
from tasks.screen import first_order
from tasks.target import TargetSettings, load_target

SIDE = 64


def world():
    return load_target(compose(["target=world_vit"]).target).model


def clip_tower():
    vision = {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(5, vision, text).visual


MODELS = {
    "timm": lambda: timm.create_model("test_vit", num_classes=7, reg_tokens=2, img_size=SIDE),
    "torchvision": lambda: models.VisionTransformer(SIDE, 16, 2, 4, 32, 64, num_classes=7),
    "odd heads": lambda: models.VisionTransformer(
        SIDE, 16, 2, 3, 48, 64, num_classes=7
    ),  # torch has no fast path for 3
    "open_clip": clip_tower,
    "world": world,
}


def built(name):
    """Model without anything at zero or one, and an input."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = MODELS[name]().eval().requires_grad_(False)
    for tensor in (t for t in model.state_dict().values() if t.is_floating_point()):
        tensor.add_(0.1 * torch.rand_like(tensor))
    return model, torch.randn(3, 3, SIDE, SIDE)


def layers_of(model, *names, **more):
    return find_layers(model, Preprocess((SIDE, SIDE), (SIDE, SIDE)), LayersSettings(list(names), **more))


def attention_modules(model):
    kinds = (torch.nn.MultiheadAttention, timm.layers.Attention)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def projection(module):
    return module.out_proj if isinstance(module, torch.nn.MultiheadAttention) else module.proj


def written_out(module, x_BNC):
    """What each head adds, float64 [B, H, N, O]: softmax attention in full, then the head's own columns of W_O."""
    packed = isinstance(module, torch.nn.MultiheadAttention)
    weight, bias = (module.in_proj_weight, module.in_proj_bias) if packed else (module.qkv.weight, module.qkv.bias)
    query, key, value = (x_BNC.double() @ weight.double().T + bias.double()).chunk(3, -1)
    width = query.shape[-1] // module.num_heads
    found = []
    for head in range(module.num_heads):
        own = slice(head * width, (head + 1) * width)
        scores = query[..., own] @ key[..., own].transpose(1, 2) / math.sqrt(width)
        result = scores.softmax(-1) @ value[..., own]
        found.append(result @ projection(module).weight[:, own].double().T)
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_maps_are_norms_of_what_heads_write(name):
    model, x = built(name)
    modules, seen, maps = attention_modules(model), {}, {}
    handles = [
        module.register_forward_hook(lambda _m, given, out, n=n: seen.update({n: (given[0], out)}))
        for n, module in modules.items()
    ]
    before = model(x)
    for handle in handles:
        handle.remove()
    layers = layers_of(model, "heads")
    assert [layer.name for layer in layers] == [f"{name}.heads" for name in modules]
    assert [layer.num_units for layer in layers] == [module.num_heads for module in modules.values()]
    own = readers(model, layers)
    with hooked(model, [layer.module for layer in layers], lambda n, out: maps.update({n: own[n].read(out)})):
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    for layer, (name, module) in zip(layers, modules.items(), strict=True):
        given, output = seen[name]
        output = output[0] if isinstance(output, tuple) else output
        added_BHNO = written_out(module, given)
        total = added_BHNO.sum(1) + projection(module).bias.double()
        torch.testing.assert_close(output.double(), total, rtol=1e-4, atol=1e-5)
        expected = added_BHNO.norm(dim=-1).float()
        found = torch.cat([layer.prefix_maps(maps[layer.name]), layer.maps(maps[layer.name])], 2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert layer.maps(maps[layer.name]).shape[2] == math.prod(layer.grid)


def test_half_precision_keeps_the_norms():
    model, x = built("torchvision")
    layers, peaks = layers_of(model, "heads"), []
    for dtype in (torch.float32, torch.bfloat16):
        fresh = built("torchvision")[0].to(dtype)
        own = readers(fresh, layers)
        kept = []
        with torch.inference_mode(), hooked(fresh, list(own), lambda n, out, o=own, k=kept: k.append(o[n].read(out))):
            fresh(x.to(dtype))
        peaks.append(torch.cat([norms_BNH.amax(1) for norms_BNH in kept], 1))
    assert peaks[1].dtype == torch.float32
    torch.testing.assert_close(peaks[1], peaks[0], rtol=0.1, atol=0.01)


@torch.inference_mode()
def test_opening_keeps_masks_and_weights():
    """A mask, other keys than queries, asked-for weights: everything that nn.MultiheadAttention can be told."""
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    for parameter in attention.parameters():
        parameter.add_(torch.rand_like(parameter))
    query, key = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    calls = [
        ((query, query, query), {"need_weights": False}),
        ((query, query, query), {"average_attn_weights": False}),
        ((query, key, key), {"attn_mask": torch.rand(5, 7) > 0.7}),
    ]
    before = [attention(*given, **options) for given, options in calls]
    open_heads(attention)
    open_heads(attention)  # a second time changes nothing
    assert [name for name, module in attention.named_modules() if isinstance(module, Heads)] == ["heads"]
    seen = []
    with hooked(attention, ["heads"], lambda _n, out: seen.append(out)):
        for (given, options), (output, weights) in zip(calls, before, strict=True):
            found = attention(*given, **options)
            torch.testing.assert_close(found[0], output)
            assert (found[1] is None) == (weights is None)
            assert weights is None or torch.allclose(found[1], weights)
    assert [x.shape for x in seen] == [(2, 5, 8)] * 3


def test_heads_are_chosen_by_glob_beside_channels():
    model, _ = built("timm")
    found = layers_of(model, "blocks.1.attn.heads", "residual")
    assert [(x.name, x.kind) for x in found[:3]] == [
        ("blocks.0", "channels"), ("blocks.1.attn.heads", "heads"), ("blocks.1", "channels"),
    ]  # fmt: skip
    assert {x.kind for x in found[3:]} == {"channels"}
    fresh, _ = built("timm")
    readers(fresh, found)
    assert [name for name, m in fresh.named_modules() if isinstance(m, Heads)] == ["blocks.1.attn.heads"]


def test_pooling_by_attention_has_no_heads():
    options = {"depth": 2, "num_heads": 2, "class_token": False, "global_pool": "map", "num_classes": 5}
    model = timm.models.VisionTransformer(img_size=SIDE, patch_size=16, embed_dim=32, **options).eval()
    assert hasattr(model.attn_pool, "num_heads")
    assert [x.name for x in layers_of(model, "heads")] == ["blocks.0.attn.heads", "blocks.1.attn.heads"]


def test_a_model_without_heads_is_refused():
    with pytest.raises(ValueError, match=r"^layers.names=heads: matches no module; allowed are mlp, residual"):
        layers_of(timm.create_model("test_resnet").eval(), "heads")


def test_weights_have_the_same_digest_whatever_is_looked_at():
    target = TargetSettings("timm", "test_vit", pretrained=False, kwargs={"img_size": SIDE})
    assert len({describe(target, LayersSettings([entry])).digest for entry in ("heads", "mlp")}) == 1


@pytest.mark.parametrize("name", ["timm", "torchvision", "open_clip"])
@torch.inference_mode()
def test_a_head_switched_off_is_one_without_weights(name):
    """Its columns of W_O at zero; from a recording the same to the bit as the whole pass."""
    model, x = built(name)
    layers = layers_of(model, "heads")
    own = readers(model, layers)
    with recorded(model, [layer.module for layer in layers]) as recording:
        unchanged = model(x)
    changes = [Change(layer, [1], [0.0], own[layer.name]) for layer in layers]
    for chosen in ([changes[0]], [changes[-1]], changes):
        found = ablated(model, x, recording, chosen, "all")
        by_name = {change.layer.module: change for change in chosen}
        with hooked(model, list(by_name), lambda n, out, by_name=by_name: by_name[n](out, "all")):
            assert torch.equal(model(x), found)
        without, _ = built(name)
        for change in chosen:
            module = without.get_submodule(change.layer.name.removesuffix(".heads"))
            width = module.head_dim
            projection(module).weight[:, width : 2 * width] = 0
        torch.testing.assert_close(found, without(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, unchanged, atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "patches", "prefix"])
@torch.inference_mode()
def test_a_head_set_to_a_value_has_this_activation_and_its_direction(positions):
    model, x = built("timm")
    layer, kept = layers_of(model, "heads")[2], []
    change = Change(layer, [1], [0.5], readers(model, [layer])[layer.name])
    with hooked(model, [layer.module], lambda _n, out: kept.append(out)):
        model(x)
    before, after = kept[0], change(kept[0], positions)
    norms, cosines = change.reader.read(after)[..., 1], torch.cosine_similarity(
        *(t.unflatten(-1, (layer.num_units, -1))[:, :, 1] for t in (before, after)), dim=-1
    )  # fmt: skip
    chosen = {"all": slice(None), "patches": slice(layer.prefix, None), "prefix": slice(layer.prefix)}[positions]
    torch.testing.assert_close(norms[:, chosen], torch.full_like(norms[:, chosen], 0.5))
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    rest = np.setdiff1d(np.arange(before.shape[1]), np.arange(before.shape[1])[chosen])
    assert torch.equal(after[:, rest], before[:, rest])


@pytest.mark.parametrize(("name", "positions"), [("timm", "all"), ("timm", "prefix"), ("torchvision", "patches")])
def test_screen_equals_finite_differences(name, positions):
    """What a head writes made smaller by a little, in float64."""
    model, x = built(name)
    layers, x = layers_of(model, "heads"), x.double()
    model = built(name)[0].double()
    own = readers(model, layers)
    found = first_order(model, layers, x.clone(), None, positions, own)
    logits, start, step = model(x), 0, 1e-6
    for layer in layers:

        def smaller(_name, out, layer=layer):
            out = out.clone()
            layer.places(out, positions).unflatten(-1, (layer.num_units, -1))[:, :, 1] *= 1 - step
            return out

        with hooked(model, [layer.module], smaller):
            slope = (logits - model(x))[range(3), logits.argmax(1)] / step
        torch.testing.assert_close(found.effect_BU[:, start + 1], slope, rtol=1e-4, atol=1e-5)
        start += layer.num_units
    assert found.activation_BU.min() > 0
