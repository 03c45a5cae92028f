"""Latents of sparse autoencoders as units: against an encoder written out, over layers of every layout, end to end."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.config import compose
from flows.run import load_run
from flows.sweep import Sweep
from tasks.discovery import find_layers
from tasks.layers import LayersSettings, hooked, readers
from tasks.moments import BINS
from tasks.patches import PatchesJob, PatchesSettings, PatchesWorker
from tasks.pixels import Preprocess
from tasks.precision import PrecisionJob, PrecisionWorker
from tasks.probing import ProbingSettings
from tasks.replay import Change, ablated, recorded
from tasks.sae import AT_ONCE, Latents, SaeSettings, load_sae
from tasks.screen import first_order
from tasks.store import Folder, StoreSettings
from tasks.target import TargetSettings
from tests import samples
from tests.models import Tokens, random_cnn

TOKENS = TargetSettings(
    "factory", "tests/models.py:tokens", preprocess={"size": [64, 96], "resize_to": [64, 96]}, prefix_tokens=3
)
RELU = SaeSettings(centred=True)


def random_sae(path, width, num, metadata=None, seed=0, **more):
    """A file with a random encoder in the names of SAELens; None among `more` leaves a tensor out."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(width, num, generator=random),
        "b_enc": torch.randn(num, generator=random) - 0.5,
        "W_dec": torch.randn(num, width, generator=random),
        "b_dec": torch.randn(width, generator=random),
    }
    tensors = {name: tensor for name, tensor in (tensors | more).items() if tensor is not None}
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return str(path)


def written_out(path, x, centred=False, k=None, threshold=None):
    """float64 [..., L], one matrix product and one rule, nothing in blocks."""
    t = {name: tensor.double() for name, tensor in load_file(path).items()}
    weight = t["W_enc"] if "W_enc" in t else t["encoder.weight"].T
    bias = next(t[name] for name in ("b_enc", "encoder.bias", "latent_bias") if name in t)
    centre = t["pre_bias"] if "pre_bias" in t else centred * next(t[n] for n in ("b_dec", "decoder.bias") if n in t)
    inputs = (x.double() - centre) @ weight + bias
    if k:
        least = inputs.sort(dim=-1, descending=True).values[..., k - 1 : k]
        inputs = torch.where(inputs >= least, inputs, 0)
    if threshold is not None:
        inputs = torch.where(inputs > threshold, inputs, 0)
    return inputs.clamp(min=0)


def same(found, expected):
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def renamed(path, names, **more):
    tensors = load_file(path)
    found = {}
    for old, new in names.items():
        tensor = tensors[old]
        found[new] = (tensor.T if new.endswith("weight") else tensor).contiguous()
    save_file(found | more, path)
    return path


LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
JUMPS = torch.rand(5000, generator=torch.Generator().manual_seed(1)) * 3
FILES = {
    "relu": (lambda p: random_sae(p, 16, 5000), SaeSettings(centred=True), {"centred": True}),
    "not centred": (lambda p: random_sae(p, 16, 5000), SaeSettings(centred=False), {}),
    "topk": (lambda p: random_sae(p, 16, 5000, {"k": "7"}), RELU, {"centred": True, "k": 7}),
    "more than there are": (lambda p: random_sae(p, 16, 9, {"k": "20"}), RELU, {"centred": True}),
    "k of the config": (lambda p: random_sae(p, 16, 5000), SaeSettings("topk", 3, centred=False), {"k": 3}),
    "jumprelu": (lambda p: random_sae(p, 16, 5000, threshold=JUMPS), SaeSettings(centred=False), {"threshold": JUMPS}),
    "one threshold": (lambda p: random_sae(p, 16, 30), SaeSettings(threshold=1.5, centred=False), {"threshold": 1.5}),
    "linear layers": (
        lambda p: renamed(random_sae(p, 16, 50), LINEAR | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"}),
        RELU,
        {"centred": True},
    ),
    "pre-bias": (
        lambda p: renamed(
            random_sae(p, 16, 50), LINEAR | {"b_enc": "latent_bias", "b_dec": "pre_bias"}, k=torch.tensor(4)
        ),
        SaeSettings(),
        {"k": 4},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_latents_are_what_the_encoder_gives(name, tmp_path):
    make, settings, rule = FILES[name]
    path = make(tmp_path / "sae.safetensors")
    sae, x = load_sae(path, settings), torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(5))
    latents, expected = sae.read(x), written_out(path, x, **rule)
    same(latents[:], expected)
    assert 0 < (latents[:] > 0).float().mean() < 0.9
    for units in (slice(3, 8), slice(0, AT_ONCE), torch.tensor([len(sae.bias_L) - 1, 0, 5])):
        same(latents[units], expected[..., units])
        assert torch.equal(latents[units], sae.read(x)[units])


def test_cfg_json_beside_the_file_says_how_the_encoder_works(tmp_path):
    path, x = random_sae(tmp_path / "sae_weights.safetensors", 16, 40), torch.randn(2, 16)
    said = {"architecture": "topk", "k": 4, "apply_b_dec_to_input": True, "normalize_activations": "none", "d_in": 16}
    (tmp_path / "cfg.json").write_text(json.dumps(said))
    same(load_sae(path, SaeSettings()).read(x)[:], written_out(path, x, True, 4))
    same(load_sae(path, SaeSettings(k=2)).read(x)[:], written_out(path, x, True, 2))
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "apply_b_dec_to_input": False}))
    same(load_sae(path, SaeSettings()).read(x)[:], written_out(path, x))


GATED = {"b_gate": torch.zeros(5)}
BAD = {
    "no encoder": ({"W_enc": None}, {}, RELU, r"has no matrix W_enc or encoder.weight; its tensors are W_dec"),
    "bias": ({"b_enc": torch.zeros(6)}, {}, RELU, r"the encoder's bias has shape \[6\], but the encoder reads 4"),
    "centre": ({"b_dec": torch.ones(3)}, {}, RELU, r"the bias before the encoder has shape \[3\]"),
    "decoder": ({"W_dec": torch.zeros(4, 4)}, {}, RELU, r"the decoder has shape \[4, 4\]"),
    "threshold": ({"threshold": torch.zeros(2)}, {}, RELU, r"the threshold has shape \[2\]"),
    "gated": (GATED, {}, RELU, r"has b_gate; allowed are encoders of one linear layer and relu, topk, jumprelu$"),
    "scaled": ({}, {"normalize_activations": "layer_norm"}, RELU, r"has normalize_activations"),
    "unknown": ({}, {"activation": "groupmax"}, RELU, r"its activation function is groupmax; allowed are relu"),
    "k": ({}, {}, replace(RELU, activation="topk"), r"^layers.sae.k is missing: .* does not say how many"),
    "jumps": ({}, {}, replace(RELU, activation="jumprelu"), r"^layers.sae.threshold is missing: .* has no threshold"),
    "both": ({"threshold": torch.zeros(5)}, {"k": "2"}, RELU, r"^layers.sae.activation is missing: .*both k and"),
    "centred": ({}, {}, SaeSettings(), r"^layers.sae.centred is missing: .*; allowed are true, false$"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_used_are_refused_with_one_line(name, tmp_path):
    more, metadata, settings, message = BAD[name]
    path = random_sae(tmp_path / "sae.safetensors", 4, 5, metadata, **more)
    with pytest.raises(ValueError, match=message) as error:
        load_sae(path, settings)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_safetensors_is_never_unpickled(tmp_path):
    path = tmp_path / "sae.safetensors"
    torch.save({"W_enc": torch.zeros(4, 5)}, path)
    with pytest.raises(ValueError, match=f"layers.saes: {path}: no SAE in safetensors"):
        load_sae(str(path), RELU)
    with pytest.raises(ValueError, match=r"nowhere.safetensors: no SAE in safetensors"):
        load_sae(str(tmp_path / "nowhere.safetensors"), RELU)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layers.names=[sae]"], "layers.names=sae: layers.saes is empty; allowed is"),
        (["layers.saes={blocks.1: x.safetensors}"], "layers.saes={'blocks.1': 'x.safetensors'}: layers.names has no"),
        (["layers.saes.blocks=x"], "layers.saes.blocks=x: expected"),
        (["layers.sae.k=0"], "layers.sae.k=0: must be at least 1"),
        (["layers.sae.activation=gelu"], "layers.sae.activation=gelu: allowed are relu, topk, jumprelu"),
    ],
)
def test_mistakes_in_the_config_are_one_line(overrides, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        compose(overrides)
    assert str(error.value).startswith(message)


def test_runs_are_named_after_their_saes():
    config = compose(["layers=sae", "layers.saes={blocks.1: my/topk.safetensors}", "target=world_vit"])
    assert config.layers.saes == {"blocks.1": "my/topk.safetensors"}
    assert "-sae+topk-" in config.run


def find(model, saes, names=("sae",), size=(64, 96), **more):
    settings = LayersSettings(list(names), saes=saes, sae=RELU, **more)
    return find_layers(model, Preprocess(size, size), settings)


def kept(model, layers, x):
    """What HookedTarget would hand out, by layer, and the modules' outputs."""
    own, outputs = readers(model, layers), {}
    with (
        hooked(model, [layer.module for layer in layers], lambda n, out: outputs.update({n: out})),
        torch.inference_mode(),
    ):
        model(x)
    return {x.name: own[x.name].read(outputs[x.module]) for x in layers if x.name in own}, outputs


def test_layers_of_every_layout(tmp_path):
    """A convolution, tokens behind prefix tokens, and a vector; map by map against the written out encoder."""
    model, path = random_cnn(), random_sae(tmp_path / "a.safetensors", 16, 30)
    logits, x = random_sae(tmp_path / "b.safetensors", 10, 20), torch.randn(2, 3, 32, 32)
    layers = find(model, {"1": path, "7": logits}, ("sae", "1"), (32, 32))
    assert [(y.name, y.kind, y.layout, y.num_units, y.grid) for y in layers] == [
        ("1", "channels", "chw", 16, (16, 16)),
        ("1.sae", "latents", "chw", 30, (16, 16)),
        ("7.sae", "latents", "vector", 20, (1, 1)),
    ]  # fmt: skip
    found, outputs = kept(model, layers, x)
    expected = written_out(path, outputs["1"].movedim(1, -1), True).flatten(1, 2).transpose(1, 2)
    same(layers[1].maps(found["1.sae"]), expected)
    same(layers[1].maps(found["1.sae"], slice(4, 9)), expected[:, 4:9])
    images, units = torch.tensor([1, 0, 1]), torch.tensor([3, 3, 29])
    same(layers[1].maps_of(found["1.sae"], images, units), expected[images, units])
    same(layers[1].pooled(found["1.sae"], "mean", slice(2)), expected.mean(2)[:, :2])
    same(layers[2].pooled(found["7.sae"], "max"), written_out(logits, outputs["7"], True))
    tokens, path = Tokens().eval(), random_sae(tmp_path / "c.safetensors", 4, 11)
    (layer,) = find(tokens, {"block": path})
    assert (layer.name, layer.module, layer.prefix, layer.grid) == ("block.sae", "block", 3, (8, 12))
    found, outputs = kept(tokens, [layer], torch.randn(2, 3, 64, 96))
    expected = written_out(path, outputs["block"], True).transpose(1, 2)
    same(layer.prefix_maps(found["block.sae"]), expected[..., :3])
    same(layer.maps(found["block.sae"]), expected[..., 3:])
    same(layer.pooled(found["block.sae"], "cls", torch.tensor([7])), expected[:, [7], 0])


def test_wrong_places_are_refused(tmp_path):
    model, path = Tokens().eval(), random_sae(tmp_path / "a.safetensors", 5, 6)
    with pytest.raises(ValueError, match=r"layers.saes.block=.*: reads 5 channels, the module has 4"):
        find(model, {"block": path})
    with pytest.raises(ValueError, match=r"layers.saes.blocks.7=.*: matches no module; allowed are paths such as proj"):
        find(model, {"blocks.7": path})


def test_identity_is_the_files_content_and_how_it_is_read(tmp_path):
    model, paths = Tokens().eval(), [tmp_path / f"{n}/x.safetensors" for n in "abc"]
    first, moved, other = (random_sae(path, 4, 6, seed=n) for path, n in zip(paths, (0, 0, 1), strict=True))
    layers = [find(model, {"block": path})[0] for path in (first, moved, other)]
    assert layers[0].identity() == layers[1].identity() != layers[2].identity()
    assert load_sae(first, RELU).digest != load_sae(first, SaeSettings(centred=False)).digest
    plain = find(model, {"block": first}, ("block", "block.sae"))[0]
    assert set(plain.identity()) == set(asdict(plain)) - {"kind", "sae"}
    random_sae(paths[0], 4, 6, seed=2)
    with pytest.raises(ValueError, match="has changed since the sweep began"):
        readers(model, layers[:1])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    folder = samples.draw_folder(root / "photos", 40)
    return samples.probe(root / "store", ProbingSettings(str(folder), shard_size=32, batch_size=8))


def test_all_stages_see_the_same_latents_whatever_the_blocks(images, tmp_path):
    """Activations in blocks of 4 and all together; maximum, prefix maximum, boxes and histograms from whole maps."""
    path = random_sae(tmp_path / "sae.safetensors", 4, 11)
    settings = LayersSettings(["sae"], saes={"block": path}, sae=RELU)
    tables = []
    for block in (4, 1000):
        job, merged = samples.collect(tmp_path / str(block), images, TOKENS, settings, unit_block=block)
        names = ("candidates", "stats", "pooled")
        tables.append([job.out.read_all(name) for name in names] + [merged.out.read_all("exemplars")])
    for small, large in zip(*tables, strict=True):
        by = [(c, "ascending") for c in ("layer", "unit", "tail", "rank") if c in small.column_names]
        small, large = (t.sort_by(by).to_pylist() for t in (small, large))
        assert len(small) == len(large)
        for a, b in zip(small, large, strict=True):
            for column, value in a.items():
                if isinstance(value, float | list):
                    np.testing.assert_allclose(np.array(value, float), np.array(b[column], float), rtol=1e-4, atol=1e-4)
                else:
                    assert value == b[column]
    layer, model = job.model.layers[0], Tokens().eval()
    pixels = torch.cat(list(images.batches(images.shard_batches(0), Preprocess((64, 96), (64, 96)))))
    found, _ = kept(model, [layer], Preprocess((64, 96), (64, 96)).normalise(pixels))
    maps, prefix = layer.maps(found["block.sae"]), layer.prefix_maps(found["block.sae"])
    ok = torch.from_numpy(images.ok[: len(pixels)])
    for s in job.out.read("stats", 0).to_pylist():
        assert len(s["position_histogram"]) == BINS
        assert s["maximum"] == pytest.approx(float(maps[ok][:, s["unit"]].max()), rel=1e-4, abs=1e-4)
        assert s["prefix_maximum"] == pytest.approx(float(prefix[ok][:, s["unit"]].max()), rel=1e-4, abs=1e-4)
    out = Folder(StoreSettings(str(tmp_path / "p")), "patches", "x", ("patches", "crops"))
    worker = PatchesWorker(PatchesJob(out, job.model, merged.out, job.blocks, PatchesSettings(k=3)))
    rows = worker.run(0).rows["patches"]
    exemplars = merged.out.read_all("exemplars")
    first = exemplars.filter((pc.field("rank") < 3) & (pc.field("image") < 32) & (pc.field("tail") == "top"))
    assert rows == len(first) > 11
    precision = PrecisionJob(Folder(StoreSettings(str(tmp_path / "q")), "precision", "x", ("precision",)), job.model)
    PrecisionWorker(precision).run(0)
    assert precision.out.read("precision", 0)["overlap"].to_pylist()[-1] == 1.0


@pytest.mark.parametrize(("k", "positions"), [(None, "all"), (None, "prefix"), (3, "patches")])
def test_a_latent_switched_off_takes_what_it_adds(k, positions, tmp_path):
    """By hand: its activation times its row of the decoder; from a recording the same as the whole pass."""
    model, x = Tokens().eval().requires_grad_(False), torch.randn(2, 3, 64, 96)
    path = random_sae(tmp_path / "sae.safetensors", 4, 11, {"k": str(k)} if k else None)
    layers = find(model, {"block": path}, ("sae", "block"))
    layer = next(y for y in layers if y.kind == "latents")
    own = readers(model, [layer])[layer.name]
    with torch.inference_mode(), recorded(model, [layer.module]) as recording:
        model(x)
    before = recording["block"][-1].output
    latents, decoder = written_out(path, before, True, k), load_file(path)["W_dec"].double()
    chosen = {"all": slice(None), "patches": slice(3, None), "prefix": slice(3)}[positions]
    units, values = [2, 5], [0.0, 0.25]
    expected = before.double().clone()
    for unit, value in zip(units, values, strict=True):
        expected[:, chosen] += (value - latents[:, chosen, unit, None]) * decoder[unit]
    change = Change(layer, units, values, own)
    same(change(before, positions), expected)
    with torch.inference_mode():
        also = Change(layers[0], [1], [2.0])  # a channel of the same module, changed after
        found = ablated(model, x, recording, [change, also], positions)
        with hooked(model, ["block"], lambda _n, out: also(change(out, positions), positions)):
            assert torch.equal(found, model(x))


def test_screen_of_latents_is_activation_times_slope(tmp_path):
    """Of several layers on one module; slopes by autograd, one latent after the other."""
    model = Tokens().eval().requires_grad_(False)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    path = random_sae(tmp_path / "sae.safetensors", 4, AT_ONCE + 3)
    layers = find(model, {"norm": path}, ("sae", "norm"))
    own, x = readers(model, layers), torch.randn(2, 3, 64, 96)
    found = first_order(model, layers, x.clone(), np.array([0, 1]), "all", own)
    with torch.inference_mode():
        _, outputs = kept(model, layers, x)
    latents, decoder = written_out(path, outputs["norm"], True), load_file(path)["W_dec"].double()
    slope = model.head.weight.double() @ decoder.T  # of the logits, at CLS, which alone is read
    expected = latents[:, 0] * slope[[0, 1]]
    assert [y.kind for y in layers] == ["channels", "latents"]
    torch.testing.assert_close(found.effect_BU[:, 4:], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.activation_BU[:, 4:], latents.mean(1), rtol=1e-4, atol=1e-4)
    same(found.effect_BU[:, :4].float(), outputs["norm"][:, 0].double() * model.head.weight.double())


WORLD = [
    "target=world_vit",
    "probing.uri=world://heads/192",
    "probing.explain=0.2",
    "probing.select=0.4",
    "probing.validate=0.4",
    "probing.shard_size=64",
    "probing.batch_size=16",
    "layers.names=[blocks.2.attn.heads,sae]",
    "neurons.twin=true",
    "neurons.twin_nets=3",
    "ablation.pairs=4",
    "ablation.controls=2",
    "ablation.classes=1",
    "drawn.num=4",
    "patches.k=3",
    "unit_block=16",
    "cluster=none",
    "run=kinds",
]


def test_a_sweep_names_heads_and_latents(tmp_path):
    """The world's ViT: every table has every head and latent, twin, ablation and report included."""
    path = random_sae(tmp_path / "sae.safetensors", 128, 40, {"k": "8", "apply_b_dec_to_input": "false"})
    root = f"store.root={tmp_path}/store"
    arguments = [*WORLD, f"layers.saes={{blocks.3: {path}}}", root]
    flow = Sweep(compose(arguments))
    flow.run()
    run = load_run(StoreSettings(str(tmp_path / "store")), "kinds")
    every = [("blocks.2.attn.heads", unit) for unit in range(4)] + [("blocks.3.sae", unit) for unit in range(40)]
    for stage, table in (("neurons", "neurons"), ("traits", "traits"), ("validation", "validation")):
        rows = run.folder(stage).read_all(table, columns=["layer", "unit"]).to_pylist()
        assert [(row["layer"], row["unit"]) for row in rows] == every
    neurons = run.folder("neurons").read_all("neurons").to_pylist()
    heads = [n for n in neurons if n["layer"].endswith("heads")]
    assert all(n["phrase"] and n["status"] not in ("dead", "always_on") for n in heads)
    assert sum(n["phrase"] is not None for n in neurons) > 30
    pairs = run.folder("pairs").read_all("pairs").to_pylist()
    assert {p["layer"] for p in pairs} <= {layer for layer, _ in every}
    assert run.folder("ablation").read_all("ablation").num_rows >= 4
    moved = [a for a in run.folder("ablation").read_all("ablation").to_pylist() if a["logit_drop"]]
    assert moved
    pages = sorted(p.name for p in (tmp_path / "store").rglob("*.html"))
    assert any("blocks.2.attn.heads" in page for page in pages)
    assert any("blocks.3.sae" in page for page in pages)
    assert "k" in json.dumps(run.config["layers"])
    other = Sweep(compose(arguments))
    assert other.target.layers == flow.target.layers
    without = random_sae(tmp_path / "encoder.safetensors", 128, 5, {"k": "2"}, W_dec=None, b_dec=None)
    with pytest.raises(ValueError, match=r"ablation.pairs=4: .*encoder.safetensors has no decoder.*; allowed is 0"):
        Sweep(compose([*WORLD, f"layers.saes={{blocks.3: {without}}}", root]))
    assert isinstance(load_sae(without, SaeSettings()).read(torch.zeros(1, 128)), Latents)
