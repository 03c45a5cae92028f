"""Target models and CLIP: every source loads, weights are never pickled code, the model's own preprocessing is used."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from tasks.clip import Clip, ClipSettings, JudgeSettings, check_clip, clip_identity
from tasks.forward import HookedTarget, TargetPass, describe
from tasks.layers import LayersSettings
from tasks.precision import top_overlap
from tasks.target import TargetSettings, load_target, random_twin
from tests import samples
from tests.test_probing import image_list

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_torchvision_preprocessing_is_the_weights_own():
    target = load_target(TargetSettings("torchvision", "resnet50", pretrained=False))
    own = models.get_model_weights("resnet50")["DEFAULT"].transforms()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 411, 3), np.uint8))
    found = target.preprocess.normalise(torch.from_numpy(target.preprocess.pixels(image))[None])[0]
    assert torch.equal(found, own(image))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "eva02_tiny_patch14_336"])
def test_timm_preprocessing_is_the_models_own(name):
    target = load_target(TargetSettings("timm", name, pretrained=False))
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(timm.create_model(name)), is_training=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 411, 3), np.uint8))
    found = target.preprocess.normalise(torch.from_numpy(target.preprocess.pixels(image))[None])[0]
    torch.testing.assert_close(found, own(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints(tmp_path, ending, wrapped):
    state = models.resnet18(weights=None).half().state_dict()
    if wrapped:
        state = {f"module.{k}": v for k, v in state.items()}
    path = tmp_path / f"weights.{ending}"
    if ending == "pt":
        torch.save({"state_dict": state} if wrapped else state, path)
    else:
        save_file(state, path)
    target = load_target(TargetSettings("torchvision", "resnet18", checkpoint=str(path)))
    weight = target.model.state_dict()["conv1.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight.half(), state["module.conv1.weight" if wrapped else "conv1.weight"])


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"target.checkpoint=.*evil.pt: not weights of this model"):
        load_target(TargetSettings("torchvision", "resnet18", checkpoint=str(tmp_path / "evil.pt")))
    assert not (tmp_path / "ran").exists()


def test_digest_knows_weights_and_architecture():
    def digest(name, seed=0):
        return load_target(TargetSettings("torchvision", name, pretrained=False, seed=seed)).digest()

    assert digest("resnet18") == digest("resnet18")
    assert digest("resnet18") != digest("resnet18", seed=1)
    assert digest("resnet18") != digest("resnet34")


RANDOM = [
    ("torchvision", "squeezenet1_1"),
    ("timm", "test_vit"),
    ("open_clip", "ViT-S-32-alt"),
    ("factory", "torchvision.models:squeezenet1_1"),
]


def digests(seed):
    return [load_target(TargetSettings(*model, pretrained=False, seed=seed)).digest() for model in RANDOM]


def test_random_weights_follow_the_seed_in_every_process():
    before = torch.random.get_rng_state()
    found = digests(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not set(digests(4)) & set(found)
    elsewhere = [sys.executable, "-c", "from tests.test_target import digests; print(*digests(3))"]
    done = subprocess.run(elsewhere, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == found, done.stderr


def test_random_twin_has_the_architecture_and_preprocessing_alone():
    trained = TargetSettings("timm", "test_vit", checkpoint="x.pt", kwargs={"num_classes": 7}, seed=2)
    own = load_target(replace(trained, checkpoint=None, pretrained=False, preprocess={"mean": [0.1, 0.2, 0.3]}))
    settings = random_twin(trained, own.preprocess)
    assert (settings.pretrained, settings.checkpoint, settings.seed) == (False, None, 3)
    twin = load_target(settings)
    assert str(twin.model) == str(own.model)
    assert twin.preprocess == own.preprocess
    assert twin.digest() != own.digest()


def test_class_names(tmp_path):
    assert load_target(TargetSettings("factory", "tests/models.py:planted")).class_names is None
    file, layers = tmp_path / "names.txt", LayersSettings(["logits"])
    file.write_text("cat\ndog\ngolden retriever\n")
    settings = TargetSettings("factory", "tests/models.py:planted", class_names=str(file))
    assert describe(settings, layers).class_names == ["cat", "dog", "golden retriever"]
    file.write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"^target\.class_names=.*names.txt: 2 names for 3 outputs$"):
        describe(settings, layers)


def test_a_net_trained_on_other_classes_does_not_get_those_of_the_library(tmp_path):
    kwargs = {"num_classes": 10}
    save_file(models.resnet18(**kwargs).state_dict(), tmp_path / "w.safetensors")
    settings = TargetSettings("torchvision", "resnet18", checkpoint=str(tmp_path / "w.safetensors"), kwargs=kwargs)
    assert load_target(settings).class_names is None
    assert len(load_target(settings, weights=False).class_names or []) == 0
    whole = TargetSettings("torchvision", "resnet18", checkpoint="none")
    assert len(load_target(whole, weights=False).class_names or []) == 1000


FACTORY = """
import torch
class Scaled(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.mean((2, 3))) * {factor}
def make(**kwargs):
    torch.nn.init.ones_((model := Scaled(3, 2)).weight)
    return model
"""


def test_a_factory_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    """Of a file its folder, of a module the current one; afterwards the path is as it was."""
    (tmp_path / "neighbour_of_nets.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(2, 3)\n")
    (tmp_path / "my_nets.py").write_text("import neighbour_of_nets\n\nload = neighbour_of_nets.make\n")
    before = [*sys.path]
    assert load_target(TargetSettings("factory", f"{tmp_path}/my_nets.py:load")).model.out_features == 3
    monkeypatch.chdir(tmp_path)
    assert load_target(TargetSettings("factory", "my_nets:load")).model.out_features == 3
    assert sys.path == before


def test_code_and_arguments_are_part_of_a_target(tmp_path):
    """What weights and module names do not tell."""
    files = [tmp_path / "a.py", tmp_path / "b.py", tmp_path / "c.py"]
    for file, factor in zip(files, (1, 1, 2), strict=True):
        file.write_text(FACTORY.format(factor=factor))
    one, copy, other = (load_target(TargetSettings("factory", f"{file}:make")).digest() for file in files)
    assert one == copy != other
    more = load_target(TargetSettings("factory", f"{files[0]}:make", kwargs={"a": 1})).digest()
    assert more != one
    plain, kept = (
        TargetSettings(
            "torchvision", "googlenet", pretrained=False, kwargs={"transform_input": t, "init_weights": False}
        )
        for t in (False, True)
    )
    assert load_target(plain).digest() != load_target(kept).digest()


def test_weights_that_change_while_a_sweep_runs_are_refused(tmp_path):
    path, work = tmp_path / "w.safetensors", {}
    settings = TargetSettings("torchvision", "resnet18", checkpoint=str(path))
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(models.resnet18().state_dict(), path)
        about = describe(settings, LayersSettings(["logits"]))
        work[seed] = TargetPass(image_list(3), settings, about.layers, "float32", 1, about.channels_last, about.digest)
    HookedTarget(work[1])
    with pytest.raises(ValueError, match=rf"^target\.checkpoint={path}: has changed since the sweep began"):
        HookedTarget(work[0])


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"size": 256}, r"target\.preprocess\.size=256: must be a list of 2 numbers"),
        ({"resize_to": [256]}, r"target\.preprocess\.resize_to=\[256\]: must be a list of 2 numbers"),
        ({"mean": ["a", "b", "c"]}, r"target\.preprocess\.mean=.*: must be a list of 3 numbers"),
        ({"size": [100, 100]}, r"target\.preprocess\.size=\[100,100\]: the model does not take such images: .*100"),
    ],
)
def test_preprocessing_that_cannot_be(preprocess, message):
    with pytest.raises(ValueError, match=message) as caught:
        describe(TargetSettings("timm", "vit_tiny_patch16_224", False, preprocess=preprocess), LayersSettings(["mlp"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("timm", "vit_tinny"), "target.name=vit_tinny: unknown; [0-9]+ are allowed, among them"),
        (("torchvision", "resnet51"), "target.name=resnet51: unknown; [0-9]+ are allowed, among them .*resnet50"),
        (("factory", "tests/models.py:nothing"), "target.name=tests/models.py:nothing: expected file.py:function"),
        (("factory", "tests/samples.py:draw"), "target.name=tests/samples.py:draw: expected file.py:function"),
        (
            ("timm", "test_resnet", False, None, {"foo": 1}),
            "target.kwargs: target.name=test_resnet does not take them: ",
        ),
        (
            ("torchvision", "resnet18", False, None, {"foo": 1}),
            "target.kwargs: target.name=resnet18 does not take them",
        ),
        (
            ("open_clip", "ViT-B-32", False, None, {"foo": 1}),
            "target.kwargs={'foo': 1}: target.source=open_clip takes none",
        ),
        (("open_clip", "ViT-B-33"), "target.name=ViT-B-33: unknown; allowed are a local folder or open_clip's models"),
    ],
)
def test_unknown_targets_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_target(TargetSettings(*settings))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return samples.tiny_clip(tmp_path_factory.mktemp("clip"))


def test_clip_vectors_do_not_depend_on_their_neighbours(tiny):
    clip = Clip(ClipSettings(str(tiny)), CPU, 4)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8))
    alone = torch.cat([pixels[:1], torch.zeros_like(pixels[1:])])
    assert np.array_equal(clip.images(pixels)[0], clip.images(alone)[0])
    np.testing.assert_allclose(np.linalg.norm(clip.images(pixels).astype(np.float32), axis=1), 1, atol=2e-3)
    words = ["red", "a blue square", "x", "y", "z"]
    together = clip.concepts(words)
    assert np.array_equal(together[4:], clip.concepts(words[4:]))


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_clip_in_half_precision(tiny, dtype, error):
    """Nearly the same vectors, in a folder of their own; words stay float32."""
    settings = [ClipSettings(str(tiny)), ClipSettings(str(tiny), dtype=dtype)]
    assert clip_identity(settings[1]) == f"{clip_identity(settings[0])} {dtype}"
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8))
    whole, half = (Clip(s, CPU, 8) for s in settings)
    a, b = (clip.images(pixels).astype(np.float32) for clip in (whole, half))
    assert 0 < np.abs(a - b).max() < error
    assert np.array_equal(*(clip.concepts(["red", "blue"]) for clip in (whole, half)))


def test_templates_are_averaged(tiny):
    one = Clip(ClipSettings(str(tiny), templates=["a {}"]), CPU, 4).concepts(["cat"]).astype(np.float32)
    two = Clip(ClipSettings(str(tiny), templates=["the {}"]), CPU, 4).concepts(["cat"]).astype(np.float32)
    both = Clip(ClipSettings(str(tiny), templates=["a {}", "the {}"]), CPU, 4).concepts(["cat"]).astype(np.float32)
    mean = (one + two) / np.linalg.norm(one + two)
    np.testing.assert_allclose(both, mean, atol=1e-3)


def test_clip_identity_follows_the_bytes(tiny, tmp_path):
    copy = samples.tiny_clip(tmp_path / "elsewhere")
    assert clip_identity(ClipSettings(str(tiny))) == clip_identity(ClipSettings(str(copy)))
    config = copy / "open_clip_config.json"
    config.write_text(config.read_text().replace("0.5", "0.4"))
    assert clip_identity(ClipSettings(str(tiny))) != clip_identity(ClipSettings(str(copy)))
    named = ClipSettings("ViT-B-32", str(tmp_path / "w.pt"))
    (tmp_path / "w.pt").write_bytes(b"one")
    first = clip_identity(named)
    (tmp_path / "w.pt").write_bytes(b"two")
    assert clip_identity(named) != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("ViT-B-32", "mine"), "clip.pretrained=mine: unknown for ViT-B-32; allowed are a file, openai"),
        (("some/folder", None), "clip.name=some/folder: no such folder"),
        (("tests", None), "clip.name=tests: not an open_clip folder"),
        (("{empty}", None), "clip.name=.*: no weights there, such as open_clip_model.safetensors"),
    ],
)
def test_unknown_clips_are_refused(tiny, tmp_path, settings, message):
    (tmp_path / "open_clip_config.json").write_bytes((tiny / "open_clip_config.json").read_bytes())
    settings = (settings[0].format(empty=tmp_path), settings[1])
    with pytest.raises(ValueError, match=message):
        check_clip(ClipSettings(*settings))
    with pytest.raises(ValueError, match=message.replace("clip.", "judge.", 1)):
        clip_identity(JudgeSettings(*settings))


@pytest.mark.skipif(not samples.DATA.exists(), reason=samples.NO_DATA)
def test_folder_with_a_hugging_face_text_tower_names_photos():
    """A real CLIP on photos it was not trained on: at least 85 % of Imagenette's validation photos (README: 92 %)."""
    clip = Clip(ClipSettings(str(samples.DATA / "photo_clip")), CPU, 10)
    import json

    names = json.loads((samples.DATA / "imagenette160/names.json").read_text())
    texts = clip.concepts(list(names.values())).astype(np.float32)
    right = total = 0
    for number, wnid in enumerate(names):
        files = sorted((samples.DATA / "imagenette160/val" / wnid).iterdir())[:10]
        pixels = [clip.preprocess.pixels(Image.open(f).convert("RGB")) for f in files]
        found = clip.images(torch.from_numpy(np.stack(pixels))).astype(np.float32) @ texts.T
        right += int((found.argmax(1) == number).sum())
        total += len(files)
    assert right >= 0.85 * total


def test_top_overlap_counts_shared_top_images():
    reference = torch.arange(100.0)[:, None].repeat(1, 2)
    other = reference.clone()
    other[:90, 1] += 1000  # unit 1 keeps 10 of its top 20 at the top at best
    assert top_overlap(reference, reference) == 1
    assert top_overlap(reference, other) == pytest.approx((1 + 0.5) / 2)
