"""Activations and exemplars equal a slow, obvious reference: unit by unit, rank by rank, on drawn images and photos."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from tasks.activations import Extreme, Images, LayerState, Room
from tasks.exemplars import ExemplarsWorker, _best
from tasks.forward import HookedTarget, TargetPass, describe
from tasks.layers import Layer, LayersSettings
from tasks.moments import BINS, EDGES, EMPTY, count_bins
from tasks.probing import ProbingSettings
from tasks.signs import RECTIFIED
from tasks.store import hash64
from tasks.tables import matrix
from tasks.target import TargetSettings
from tests import samples
from tests.device import simulated

PLANTED = TargetSettings("factory", "tests/models.py:planted", preprocess={"size": [64, 96], "resize_to": [64, 96]})
CNN = TargetSettings("factory", "tests/models.py:random_cnn", preprocess={"size": [64, 64], "resize_to": [64, 64]})
TOKENS = TargetSettings("factory", "tests/models.py:tokens", preprocess={"size": [64, 96], "resize_to": [64, 96]})


def dense(job, images):
    """Every layer's maps as one array per layer [N, U, P], by running the same batches and keeping everything."""
    maps = {layer.name: [] for layer in job.model.layers}
    prefix = {layer.name: [] for layer in job.model.layers}
    target = HookedTarget(job.model)
    batches = [b for part in range(images.num_shards) for b in images.shard_batches(part)]
    sizes = iter([len(b) for b in batches for _ in job.model.layers])

    def keep(layer, output):
        size = next(sizes)
        maps[layer.name].append(layer.maps(output)[:size].numpy().copy())
        if layer.prefix:
            prefix[layer.name].append(layer.prefix_maps(output)[:size].numpy().copy())

    target.run(batches, keep, lambda _: None)
    return {n: np.concatenate(m) for n, m in maps.items()}, {n: np.concatenate(p) for n, p in prefix.items() if p}


def check_against_reference(job, merged, images, k):
    maps, prefix = dense(job, images)
    explain = np.flatnonzero(images.split == "explain")
    known = np.flatnonzero(images.ok)
    order = {int(i): hash64(images.ids[i]) for i in range(len(images))}
    vectors = matrix(job.image_embeddings.read_all("image_embeddings")["embedding"]).astype(np.float64)
    exemplars = merged.out.read_all("exemplars").to_pylist()
    found = {}
    for row in exemplars:
        found.setdefault((row["layer"], row["unit"], row["tail"]), []).append(row)
    stats = {(r["layer"], r["unit"]): r for r in merged.out.read_all("unit_stats").to_pylist()}
    assert len(stats) == sum(layer.num_units for layer in job.model.layers)
    for layer in job.model.layers:
        for unit in range(layer.num_units):
            m = maps[layer.name][:, unit]
            value = m.max(1)
            least, most = value[known].min(), value[known].max()
            excite = [i for i in explain if value[i] > least]
            best = sorted(excite, key=lambda i: (-value[i], order[int(i)]))[:k]
            rows = sorted(found.get((layer.name, unit, "top"), []), key=lambda r: r["rank"])
            assert [r["rank"] for r in rows] == list(range(len(best)))
            assert [r["image"] for r in rows] == best
            assert [r["activation"] for r in rows] == [value[i] for i in best]
            assert [r["position"] for r in rows] == [int(m[i].argmax()) for i in best]
            assert [r["image_id"] for r in rows] == [images.ids[i] for i in best]
            low = m.min(1)
            worst = sorted((i for i in explain if low[i] < min(0, most)), key=lambda i: (low[i], order[int(i)]))[:k]
            rows = sorted(found.get((layer.name, unit, "bottom"), []), key=lambda r: r["rank"])
            assert [r["image"] for r in rows] == worst
            assert [r["position"] for r in rows] == [int(m[i].argmin()) for i in worst]
            s = stats[layer.name, unit]
            assert s["count"] == len(known)
            np.testing.assert_allclose(s["mean"], value[known].astype(np.float64).mean(), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(s["std"], value[known].astype(np.float64).std(), rtol=1e-6, atol=1e-9)
            assert (s["minimum"], s["maximum"], s["low"]) == (value[known].min(), value[known].max(), m[known].min())
            assert s["histogram"] == _histogram(value[known])
            weights = value[explain].astype(np.float64)
            np.testing.assert_allclose(s["embedding_sum"], weights @ vectors[explain], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(s["embedding_sum_cubed"], weights**3 @ vectors[explain], rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(s["sum_cubed"], (weights**3).sum(), rtol=1e-5, atol=1e-6)
            if layer.prefix:
                assert s["prefix_maximum"] == prefix[layer.name][known, unit].max()
            else:
                assert s["prefix_maximum"] is None


def _histogram(values):
    index = np.where(values < 0, np.searchsorted(EDGES, values) - 1, np.searchsorted(EDGES, values, side="right") - 1)
    return np.bincount(index, minlength=len(EDGES) - 1).tolist()


def check_pooled(job, images):
    maps, _ = dense(job, images)
    stored = np.flatnonzero(images.stored)
    top, negative = (stored_values(job, column) for column in ("activation", "negative"))
    for layer in job.model.layers:
        for unit in range(layer.num_units):
            m = maps[layer.name][stored, unit]
            for found, expected in ((top, m.max(1)), (negative, np.where(m.min(1) < RECTIFIED, -m.min(1), 0))):
                atol = np.abs(expected).max() / 1000
                np.testing.assert_allclose(found[layer.name, unit], expected, rtol=1e-3, atol=atol)


def stored_values(job, column):
    """One column of the table pooled by unit, scaled."""
    rows = {}
    for part in sorted(job.out.done()):
        for row in job.out.read("pooled", part).to_pylist():
            values = rows.setdefault((row["layer"], row["unit"]), [])
            values += [v * row["scale"] for v in row[column]]
    return rows


@pytest.mark.parametrize(
    ("target", "names"),
    [(PLANTED, ["conv", "relu", "logits"]), (CNN, ["conv", "4", "logits"]), (TOKENS, ["proj", "block"])],
    ids=["planted", "cnn", "tokens"],
)
def test_drawn_images_equal_reference(tmp_path, monkeypatch, target, names):
    """Ties, dead, constant and all-negative units, an unreadable image, a duplicate, a last batch that is not full."""
    folder = samples.draw_folder(tmp_path / "photos", 45)
    images = samples.probe(tmp_path, ProbingSettings(str(folder), shard_size=16, batch_size=8, max_skipped=1))
    job, merged = samples.collect(tmp_path, images, target, LayersSettings(names))
    check_against_reference(job, merged, images, 10)
    check_pooled(job, images)
    monkeypatch.setattr("tasks.exemplars.HELD", 0)  # as after many shards: nothing but the best is held
    folded = replace(merged, out=replace(merged.out, fingerprint="folded"))
    for part in range(len(merged.blocks)):
        ExemplarsWorker(folded).run(part)
    for table in merged.out.tables:
        assert folded.out.read_all(table).equals(merged.out.read_all(table))


@pytest.mark.skipif(not samples.DATA.exists(), reason=samples.NO_DATA)
def test_photos_equal_reference(tmp_path):
    """A real ViT on real photos: 9,216 MLP units would take the reference minutes, so two layers of them."""
    target = TargetSettings(
        "timm", "vit_tiny_patch16_224", checkpoint=str(samples.DATA / "vit_tiny_in1k/vit_tiny_patch16_224_fp16.pt")
    )
    settings = ProbingSettings(str(samples.DATA / "imagenette160" / "val"), shard_size=96, batch_size=32)
    images = samples.probe(tmp_path, settings)
    layers = LayersSettings(["blocks.2.mlp.act", "blocks.11.mlp.act"])
    job, merged = samples.collect(tmp_path, images, target, layers, k=20, unit_block=500)
    check_against_reference(job, merged, images, 20)


@given(st.dictionaries(st.integers(-(2**40), 2**40), st.integers(3, 9)), st.integers(1, 5))
def test_best_candidates_are_the_first_of_all_sorted(candidates, k):
    """Units in any order, of any number of candidates, some without."""
    keys, units = (np.array(list(x), np.int64) for x in (candidates.keys(), candidates.values()))
    rank, best = _best(units, torch.from_numpy(keys), k)
    expected = []
    for unit in sorted(set(units.tolist())):
        own = sorted(np.flatnonzero(units == unit).tolist(), key=lambda i: -keys[i])[:k]
        expected += list(enumerate(own))
    assert list(zip(rank.tolist(), best.tolist(), strict=True)) == expected


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_other_pools(tmp_path, pool):
    folder = samples.draw_folder(tmp_path / "photos", 20)
    images = samples.probe(tmp_path, ProbingSettings(str(folder), shard_size=16, batch_size=8, max_skipped=1))
    job, merged = samples.collect(tmp_path, images, TOKENS, LayersSettings(["block"], pool))
    maps, prefix = dense(job, images)
    value = maps["block"].mean(2) if pool == "mean" else prefix["block"][:, :, 0]
    rows = [r for r in merged.out.read_all("exemplars").to_pylist() if r["tail"] == "top"]
    above = value[images.explain] > value[images.ok].min(0) + 1e-6
    assert len(rows) == above.sum(0).clip(max=10).sum()
    for row in rows:
        assert row["activation"] == pytest.approx(value[row["image"], row["unit"]], rel=1e-5, abs=1e-6)
    negative = stored_values(job, "negative")
    assert any(map(any, negative.values()))
    for (_, unit), found in negative.items():
        low = value[np.flatnonzero(images.stored), unit]
        np.testing.assert_allclose(found, np.where(low < RECTIFIED, -low, 0), rtol=1e-3, atol=1e-3)


def test_nonfinite_activations_are_counted_and_left_out(tmp_path, monkeypatch):
    folder = samples.draw_folder(tmp_path / "photos", 20)
    images = samples.probe(tmp_path, ProbingSettings(str(folder), shard_size=16, batch_size=8, max_skipped=1))
    target = TargetSettings("factory", "tests/models.py:overflowing", preprocess=PLANTED.preprocess)
    _, merged = samples.collect(tmp_path, images, target, LayersSettings(["conv"]))
    stats = merged.out.read_all("unit_stats").to_pylist()
    assert stats[0]["nonfinite"] > 0
    assert stats[0]["nonfinite"] + stats[0]["count"] == images.ok.sum()
    assert all(np.isfinite(row["activation"]) for row in merged.out.read_all("exemplars").to_pylist())


def test_a_model_that_views_its_maps_is_given_rows_of_channels(tmp_path):
    """All others are given channels side by side; both collect the same."""
    folder, stats = samples.draw_folder(tmp_path / "photos", 20), []
    for name in ("random_cnn", "viewing"):
        images = samples.probe(tmp_path / name, ProbingSettings(str(folder), batch_size=8, max_skipped=1))
        target = replace(CNN, name=f"tests/models.py:{name}")
        job, merged = samples.collect(tmp_path / name, images, target, LayersSettings(["conv", "logits"]))
        assert job.model.channels_last == (name == "random_cnn")
        stats.append(merged.out.read_all("unit_stats"))
    for column in ("maximum", "mean", "minimum"):
        np.testing.assert_allclose(*(table[column].to_numpy() for table in stats), rtol=1e-4, atol=1e-5)


def test_weights_that_a_model_views_stay_rows(tmp_path):
    settings = TargetSettings("factory", "tests/models.py:standardised", preprocess=CNN.preprocess)
    images = samples.probe(tmp_path, ProbingSettings(str(samples.draw_folder(tmp_path / "photos", 8)), batch_size=8))
    job, _ = samples.collect(tmp_path, images, settings, LayersSettings(["conv"]))
    assert not job.model.channels_last


@pytest.mark.parametrize(("names", "last"), [(["3"], 3), (["7", "2"], 7), (["0", "19"], 19), (["logits"], 22)])
def test_the_model_stops_behind_the_last_layer(tmp_path, names, last):
    """Of its 23 modules only those up to the last layer run, once a batch; the outputs are those of a whole pass."""
    folder = samples.draw_folder(tmp_path / "photos", 20)
    images = samples.probe(tmp_path, ProbingSettings(str(folder), shard_size=16, batch_size=8, max_skipped=1))
    settings = TargetSettings("factory", "tests/models.py:deep", preprocess=CNN.preprocess)
    layers = describe(settings, LayersSettings(names)).layers
    target, batches = HookedTarget(TargetPass(images, settings, layers, "float32", 1)), images.shard_batches(0)
    ran, seen, whole = [0] * len(target.model), [], []
    with torch.inference_mode():
        for _, x in target.inputs(batches):
            for name, module in target.model.named_children():
                x = module(x)
                whole += [x.clone()] if name in {layer.name for layer in layers} else []
    for number, module in enumerate(target.model):
        module.register_forward_pre_hook(lambda _m, _i, number=number: ran.__setitem__(number, ran[number] + 1))
    after = []
    target.run(batches, lambda _, output: seen.append(output.clone()), after.append)
    assert ran == [len(batches)] * (last + 1) + [0] * (len(ran) - last - 1)
    assert [numbers.tolist() for numbers in after] == [numbers.tolist() for numbers in batches]
    assert len(seen) == len(whole) == len(layers) * len(batches)
    assert all(torch.equal(a, b) for a, b in zip(seen, whole, strict=True))


@pytest.mark.parametrize("layout", ["units apart", "units together", "units together, behind prefix tokens"])
def test_places_are_the_first_of_equal_values(layout):
    """Few distinct values, so nearly every map has its largest and smallest in several places."""
    maps = torch.from_numpy(np.random.default_rng(0).integers(-2, 3, (5, 6, 12)).astype(np.float32))
    maps[0, 0], maps[0, 1, 3] = 0, torch.nan
    if layout != "units apart":
        tokens = torch.zeros(5, 14, 6)
        tokens[:, 2:] = maps.transpose(1, 2)
        maps = tokens[:, 2:].transpose(1, 2) if "prefix" in layout else tokens[:, 2:].contiguous().transpose(1, 2)
    wanted = torch.from_numpy(np.random.default_rng(1).random((5, 6)) < 0.8)
    for sign in (1, -1):
        extreme = Extreme(maps, (3, 4), sign)
        expected = np.where(wanted.numpy(), (sign * maps).argmax(2).numpy(), -1)
        assert extreme.places(wanted).tolist() == expected.tolist()
        np.testing.assert_array_equal(extreme.values_BU.numpy(), sign * (sign * maps).amax(2).numpy())


@pytest.mark.parametrize("together", [False, True])
def test_bins_of_every_kind_of_float(together):
    """All exponents, both signs, edges and their neighbours, zeros, denormals; infinities and NaN are in no bin."""
    inner = EDGES[1:-1].astype(np.float32)
    known = [inner, np.nextafter(inner, np.float32(np.inf)), np.nextafter(inner, np.float32(-np.inf))]
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    values = np.concatenate([*known, powers, -powers, [0.0, -0.0, np.inf, -np.inf, np.nan]]).astype(np.float32)
    maps = torch.from_numpy(np.stack([values, values[::-1], np.roll(values, 7)]))[None].repeat(2, 1, 1)
    if together:
        maps = maps.transpose(1, 2).contiguous().transpose(1, 2)
    histogram = torch.zeros(3, BINS, dtype=torch.int64)
    count_bins(histogram, maps)
    assert histogram.tolist() == [[2 * n for n in _histogram(values[np.isfinite(values)])]] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_batch_on_a_gpu_is_not_waited_for(pool):
    """torch raises where anything between a layer's output and the folded statistics makes the host wait."""
    device, size = torch.device("cuda"), 8
    state = LayerState(Layer("x", 64, "tokens", (4, 4), 1), slice(0, 64), pool, Room(5, size, 6, 16), device)
    masks = [torch.rand(size, device=device) < 0.7 for _ in range(2)]
    places = torch.arange(3, device=device)
    images = Images(*masks, torch.arange(size, device=device), torch.rand(size, 16, device=device), places, places)
    outputs = [torch.randn(size, 17, 64, device=device) for _ in range(2)]
    for mode, output in zip(("default", "error"), outputs, strict=True):  # the first one copies a table
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            state.see(output, images)
            state.fold(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_a_shard_keeps_was_there_before_its_first_batch():
    """What is taken during a pass and kept lies between the tensors of the model, and the holes between them grow."""
    size, device = 8, torch.device("cpu")
    state = LayerState(Layer("x", 64, "tokens", (4, 4), 1), slice(0, 64), "max", Room(5, 2 * size, 12, 16), device)
    everyone, places = torch.ones(size, dtype=torch.bool), torch.arange(3)
    embeddings = torch.rand(2 * size, 16)

    def kept():
        owners = (state, state.top, state.bottom, state.moments)
        tensors = [x for owner in owners for x in tree_leaves(vars(owner)) if isinstance(x, torch.Tensor)]
        return {(x.data_ptr(), x.numel()) for x in tensors if x.numel() > 64}  # one value a unit does not matter

    before = kept()
    for turn in range(2):
        for batch in range(2):
            order = torch.arange(size) + (2 * turn + batch) * size
            state.see(torch.randn(size, 17, 64), Images(everyone, everyone, order, embeddings[:size], places, places))
            assert kept() == before
        both = everyone.repeat(2)
        state.fold(Images(both, both, torch.arange(2 * size), embeddings, torch.arange(6), places))
        assert kept() == before
    assert (state.stored, state.waiting, len(before)) == (12, 0, 10)
    assert state.top.keys.amin() > EMPTY


@pytest.mark.parametrize("layout", ["tokens", "chw", "vector"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_what_only_a_gpu_runs_finds_the_same(layout, pool):
    """Many equal values, and some that are not finite, on a GPU that is not there."""
    size, batches, rng = 8, 6, np.random.default_rng(0)
    shape = {"tokens": (size, 17, 24), "chw": (size, 24, 4, 4), "vector": (size, 24)}[layout]
    layer = Layer("x", 24, layout, (1, 1) if layout == "vector" else (4, 4), 1 if layout == "tokens" else 0)
    outputs = torch.from_numpy(rng.integers(-3, 4, (batches, *shape)).astype(np.float32))
    outputs[2, 1], outputs[3, 2] = torch.nan, torch.inf
    masks = torch.from_numpy(rng.random((3, batches, size)) < 0.7)
    embeddings = torch.from_numpy(rng.random((batches, size, 16), np.float32))
    order = torch.from_numpy(rng.permutation(batches * size)).view(batches, size)

    def found(device):
        state = LayerState(layer, slice(0, 24), pool, Room(5, 3 * size, batches * size, 16), torch.device(device))

        def images(rows):
            valid, explain, stored = (mask[rows].flatten() for mask in masks)
            lies = (valid, valid & explain, order[rows].flatten(), embeddings[rows].flatten(0, 1))
            return Images(*(x.to(device) for x in (*lies, torch.arange(len(stored))[stored], torch.arange(3))))

        for start in (0, 3):
            for batch in range(start, start + 3):
                state.see(outputs[batch].to(device), images(slice(batch, batch + 1)))
            state.fold(images(slice(start, start + 3)))
        assert state.stored == int(masks[2].sum())
        owners = {"top": state.top, "bottom": state.bottom, "moments": state.moments, "state": state}
        kept = {(o, n): v.cpu() for o, owner in owners.items() for n, v in vars(owner).items() if torch.is_tensor(v)}
        for tail in (state.top, state.bottom):
            keys, positions = tail.keys.cpu(), tail.positions.cpu()
            name = "top" if tail is state.top else "bottom"
            kept[name, "held"], places = keys.sort(1)
            kept[name, "held_at"] = positions.gather(1, places)
            assert (keys > EMPTY).all()
        del kept["state", "group_2GU"]  # what was folded last
        return kept

    ours = found("cpu")
    with simulated():
        theirs = found("cuda")
    assert set(ours) == set(theirs)
    assert len(ours) == 20
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
