"""Configuration: every preset composes; every mistake is one line that names key, value and what is allowed."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from flows import sweep
from flows.cli import main, run_flow
from flows.config import CONF, compose, groups, multirun
from flows.resources import Resources
from flows.run import load_run
from tasks.clip import JudgeSettings
from tasks.discovery import find_layers
from tasks.layers import LayersSettings
from tasks.store import StoreSettings
from tasks.target import load_target
from tasks.world.concepts import CONCEPTS
from tasks.world.targets import INPUT
from tests import samples

ROOT = Path(__file__).parents[1]
NEEDS = {
    "target": ["target.name=x"],
    "clip": ["clip.name=x"],
    "store": ["store.root=s3://bucket"],
    "vocabulary": ["vocabulary.llm.model=x", "vocabulary.llm.url=http://127.0.0.1:1/v1"],
    "layers=sae": ["layers.saes={blocks.7: sae.safetensors}"],
}


@pytest.mark.parametrize("group", groups())
def test_every_choice_of_every_group_composes(group):
    for path in (CONF / group).glob("*.yaml"):
        assert path.read_text().startswith("#"), f"{path.name} has no example in its first line"
        compose([f"{group}={path.stem}", *NEEDS.get(group, []), *NEEDS.get(f"{group}={path.stem}", [])])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("targt=resnet50", "targt: unknown key (did you mean target?); allowed are run, unit_block, world, target"),
        ("target=resnet51", "target=resnet51: unknown; allowed are factory, open_clip, resnet50"),
        ("target.nam=x", "target.nam: unknown key (did you mean name?); allowed are source, name"),
        ("target.name.x=1", "target.name.x: unknown key; target.name takes a value"),
        ("probing.shard_size=abc", "probing.shard_size=abc: expected int"),
        (
            "probing.shard_size=33",
            "probing.shard_size=33: allowed are 0, which is an eighth",
        ),
        ("probing.explain=0.9", "probing.explain=0.9, probing.select=0.1, probing.validate=0.2: shares must"),
        ("probing.format=zip", "probing.format=zip: allowed are auto, folder, webdataset, parquet"),
        ("activations.k=0", "activations.k=0: must be at least 1"),
        ("patches.k=200", "patches.k=200: must be at most activations.k=100"),
        ("patches.crops.sizes=[2]", "patches.crops.sizes=[2.0]: allowed are shares in (0, 1]"),
        ("clip.dtype=int8", "clip.dtype=int8: allowed are float32, float16, bfloat16"),
        ("layers.pool=median", "layers.pool=median: allowed are max, mean, cls"),
        ("layers.names=[]", "layers.names is empty: give presets such as mlp, or globs over"),
        ("scorer.name=best", "scorer.name=best: allowed are mean_cosine, contrastive, weighted_mean, correlation"),
        ("scorer.params.top=3", "scorer.params.top: unknown for joint; allowed are top_k, a"),
        ("scorer.params.top_k=abc", "scorer.params.top_k=abc: allowed are whole numbers from 1"),
        ("scorer.params.top_k=0", "scorer.params.top_k=0: allowed are whole numbers from 1"),
        ("scorer.params.a=true", "scorer.params.a=True: allowed are numbers from 0"),
        ("probing.pooled_max=0", "probing.pooled_max=0: must be above 0 for scorer.name=joint"),
        ("target.dtype=int8", "target.dtype=int8: allowed are auto, float32, float16, bfloat16"),
        ("target.source=keras", "target.source=keras: allowed are torchvision, timm, open_clip, factory"),
        ("target.preprocess.crop=3", "target.preprocess.crop: unknown key; allowed are size, resize_to"),
        ("clip.templates=[photo]", "clip.templates=['photo']: each template needs exactly one {}"),
        ("store.options.secret=x", "store.options.secret: secrets come from the environment"),
        ("target.kwargs.api_key=x", "target.kwargs.api_key: secrets come from the environment"),
        ("vocabulary.llm.engine.a=[{auth: x}]", "vocabulary.llm.engine.a.0.auth: secrets come from"),
        ("store.root=s3://me:word@bucket/x", "store.root: a URI with a password; secrets come from"),
        ("probing.uri=[a,'http://me:word@host/x']", "probing.uri.1: a URI with a password"),
        ("target.checkpoint=ftp://:word@host/x.pt", "target.checkpoint: a URI with a password"),
        ("judge=vit_l_15", "judge=vit_l_15: unknown; allowed are folder, open_clip, siglip_b_16, vit_b_32, vit_l_14"),
        ("judge.nam=x", "judge.nam: unknown key (did you mean name?); allowed are name, pretrained, templates"),
        ("judge.name=x", "judge.name=x: there is no judge to change; choose one too, for example judge=vit_l_14"),
        ("run=a/b", "run=a/b: allowed are letters, digits and . _ + -"),
        ("target.preprocess.std=[1,1,0]", "target.preprocess.std=[1, 1, 0]: must be above 0"),
        ("target.prefix_tokens=-1", "target.prefix_tokens=-1: must be at least 0"),
        ("neurons.min_correlation=1", "neurons.min_correlation=1.0: must lie between 0 and 1"),
        ("neurons.rival_gain=-1", "neurons.rival_gain=-1.0: must be at least 0"),
        ("probing.max_skipped=2", "probing.max_skipped=2.0: must be a share, from 0 to 1"),
        ("refine.least=2", "refine.least=2.0: must be a share, at most 1"),
        ("cluster.threads=0", "cluster.threads=0: must be at least 1"),
        ("cluster.num_cpus=0", "cluster.num_cpus=0: must be at least 1"),
        ("cluster.default.workers=0", "cluster.default.workers=0: must be at least 1"),
        ("cluster.stages.scores.num_gpus=-1", "cluster.stages.scores.num_gpus=-1: must be at least 0"),
        ("cluster.stages.activation.num_gpus=1", "cluster.stages.activation: no such stage; allowed are listing, "),
        ("store=s3", "store.root is empty: give a folder or a URI"),
        ("target=timm", "target.name is missing"),
        ("target=factory", "target.name is missing"),
        ("clip=folder", "clip.name is missing"),
        ("clip=open_clip", "clip.name is missing"),
        ("judge=folder", "judge.name is missing"),
        ("probing", "probing: expected key=value"),
        ("probing.uri=[a", "probing.uri=[a:"),
    ],
)
def test_mistakes_are_one_clear_line(override, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        compose([override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_judge_is_any_clip_or_none():
    assert compose([]).judge is None
    assert compose(["judge=null"]).judge is None
    judge = compose(["judge=vit_l_14", "judge.templates=['a {}']"]).judge
    assert judge == JudgeSettings("ViT-L-14", "laion2b_s32b_b82k", ["a {}"])
    assert compose(["judge=world"]).judge == JudgeSettings(f"{compose([]).world}/clip", None, ["{}"])
    with pytest.raises(ValueError, match=r"^judge\.templates=\['a'\]: each template needs exactly one"):
        compose(["judge=vit_l_14", "judge.templates=[a]"])
    assert multirun(["judge=null,vit_l_14"]) == [["judge=null"], ["judge=vit_l_14"]]


def test_free_text_and_free_keys():
    config = compose(["target=timm", "target.name=x", "target.kwargs.img_size=96", "run=1e5"])
    assert config.run == "1e5"
    assert config.target.kwargs == {"img_size": 96}
    assert compose(["scorer=soft_wpmi", "scorer.params.a=100"]).scorer.params == {"a": 100}
    assert compose(["cluster.stages.activations.num_gpus=1"]).cluster.resources("activations").num_gpus == 1
    some = ["cluster.stages.scores.num_gpus=0.5", "cluster.stages.scores.retries=1", "cluster.default.memory=9"]
    found = compose([*some, "cluster.default.num_cpus=2", "cluster.default.workers=8"]).cluster
    assert found.resources("scores") == Resources(2, 0.5, 9, None, 1)
    assert found.resources("answers") == Resources(2, 0, 9, None, 3)
    assert compose(["cluster=gpu"]).cluster.resources("embeddings").num_gpus == 1
    assert compose(["cluster=gpu"]).cluster.resources("exemplars").num_gpus == 0


def test_stages_that_run_models_have_a_gpu():
    """Ray hides the GPUs from a worker that asked for none. (`benchmark` encodes a few texts.)"""
    stages = compose(["cluster=gpu"]).cluster.stages
    runs = {p.stem for p in (ROOT / "tasks").glob("*.py") if re.search(r"[^.\w](HookedTarget|Clip)\(", p.read_text())}
    assert runs > {"activations", "embeddings", "chance"}
    assert [stage for stage in runs - {"clip", "benchmark"} if not stages[stage].num_gpus] == []


def test_a_machine_with_a_gpu_uses_it(tmp_path, monkeypatch):
    """Its driver decides; a cluster that is chosen stays, and GPUs that are hidden are none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = tmp_path / "nvidia-smi"
    for says, found in (("No devices were found", False), ("GPU 0: NVIDIA H100 (UUID: GPU-1)", True)):
        assert not compose(["target=resnet50"]).cluster.stages
        driver.write_text(f"#!/bin/sh\n[ $1 = -L ] && echo '{says}'\n")
        driver.chmod(0o755)
        assert bool(compose(["target=resnet50"]).cluster.stages) is found
    assert compose([]).cluster.stages["answers"].num_gpus == 1
    for place in ("cluster=local", "cluster.address=auto", "cluster.ray=false"):
        assert not compose(["target=resnet50", place]).cluster.stages
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not compose(["target=resnet50"]).cluster.stages


def test_runs_are_named_after_what_they_do():
    name = compose(["target=vit_l_16", "layers=mlp", "scorer=soft_wpmi"]).run
    assert name == "vit_large_patch16_224-mlp-lexicon-soft_wpmi"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["scorer=soft_wpmi", "clip=vit_b_32"],
        ["target=world_vit", "layers=mlp"],
        ["probing.uri=world://mine/40", "vocabulary=class_names"],
        ["probing.uri=[world://a/5,world://b/5]"],
        ["probing.uri=['world://a/5', \"world://b/5\"]"],
    ],
)
def test_a_sweep_without_model_or_images_is_one_of_the_drawn_world(overrides):
    config = compose(overrides)
    assert config == compose([*overrides, "experiment=world"])
    assert config.target.checkpoint.startswith(f"{config.world}/")
    assert all(uri.startswith("world://") for uri in config.probing.uris)
    assert config.clip.name == ("ViT-B-32" if "clip=vit_b_32" in overrides else f"{config.world}/clip")


@pytest.mark.parametrize(
    "own",
    [
        "target=resnet50",
        "probing.uri=world_photos",
        "probing.uri=[world://a/5,photos]",
        "probing=folder",
        "experiment=null",
    ],
)
def test_the_worlds_clip_never_meets_other_models_or_images_unasked(own):
    config = compose([own])
    assert (config.clip.name, config.vocabulary.path) == ("ViT-B-32", None)
    assert compose([own, "clip=world"]).clip.name == f"{config.world}/clip"


def test_the_worlds_folder_is_free_text():
    config = compose(["world=/my models/the world", "target=world_vit_registers"])
    assert config.target.checkpoint == "/my models/the world/vit_registers.safetensors"
    assert config.target.class_names == "/my models/the world/class_names.txt"
    assert config.vocabulary.path == "/my models/the world/lexicon.txt"
    assert config.clip.name == "/my models/the world/clip"


def test_runs_of_the_worlds_models_have_names_of_their_own():
    names = {compose([f"target={path.stem}"]).run for path in (CONF / "target").glob("world_*.yaml")}
    assert len(names) == 3


@pytest.mark.parametrize("target", ["world_resnet", "world_vit", "world_vit_registers"])
def test_the_worlds_architectures(target):
    """One output per concept, and maps fine enough to point at an object."""
    settings = replace(compose([f"target={target}"]).target, checkpoint=None, class_names=None, pretrained=False)
    found = load_target(settings)
    assert (found.preprocess.size, found.preprocess.resize) == ((INPUT, INPUT), "squash")
    layers = find_layers(found.model, found.preprocess, LayersSettings(["residual", "logits"]))
    assert layers[-1].num_units == len(CONCEPTS)
    assert layers[0].grid[0] == layers[0].grid[1] >= 8
    assert layers[0].prefix == {"world_resnet": 0, "world_vit": 1, "world_vit_registers": 5}[target]


ODD = [
    "a#b&c;d=e",
    "{photos}/x",
    "Möwen am Meer/é",
    "it's \\'ours'",
    "ends in \\",
    "a\\b",
    "photos (1)",
    "a, b: c",
    "1e5",
    "%$!*?@",
]


@pytest.mark.parametrize("path", ODD)
def test_paths_are_free_text(path):
    """They mean nothing in Hydra's grammar; without a comma not in that of --multirun either."""
    keys = ("probing.uri", "target.checkpoint", "vocabulary.path", "store.root", "clip.name", "probing.labels")
    overrides = ["target=resnet50", *(f"{key}={path}" for key in keys)]
    for given in [overrides, *([] if "," in path else multirun(overrides))]:
        found = compose(given)
        values = [found.probing.uri, found.target.checkpoint, found.vocabulary.path, found.store.root, found.clip.name]
        assert [*values, found.probing.labels] == [path] * len(keys)


def test_a_leading_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = compose(["probing.uri=~/photos", "vocabulary.path=~/words.txt"])
    assert (found.probing.uri, found.vocabulary.path) == ("/home/me/photos", "/home/me/words.txt")


def test_multirun_is_the_product():
    assert multirun(["vocabulary.path=null,x y.txt", "experiment=world"]) == [
        ["vocabulary.path=null", "experiment=world"],
        ["vocabulary.path=x y.txt", "experiment=world"],
    ]
    assert multirun(["scorer.name=choice(auc,linear)"]) == [["scorer.name=auc"], ["scorer.name=linear"]]
    assert multirun(["vocabulary.domain='a, b'"]) == [["vocabulary.domain='a, b'"]]
    jobs = multirun(["scorer=contrastive,soft_wpmi", "patches.k=3,4", "run=x", "probing.uri=[a,b]"])
    assert len(jobs) == 4
    assert jobs[0] == ["scorer=contrastive", "patches.k=3", "run=x", "probing.uri=[a,b]"]


def axonym(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments], cwd=cwd, capture_output=True, text=True, timeout=200
    )


def test_flows_are_listed():
    done = axonym()
    assert done.returncode == 0
    for flow in ("sweep", "status", "show"):
        assert f"axonym {flow} " in done.stdout


def test_help_lists_groups_and_keys(monkeypatch, capsys):
    for flow, shown in (("sweep", True), ("bench", False)):
        monkeypatch.setattr(sys, "argv", ["axonym", flow, "--help"])
        assert main() == 0
        said = capsys.readouterr().out
        assert f"axonym {flow} " in said
        assert ("store=local|s3" in said and "store: root, options" in said) == shown


def test_a_flow_that_is_broken_off_says_whether_it_goes_on(capsys):
    def broken(arguments):
        raise KeyboardInterrupt

    assert [run_flow(broken, []), run_flow(broken, [], resumes=False)] == [130, 130]
    goes_on, starts_anew = capsys.readouterr().err.splitlines()
    assert (goes_on.endswith("goes on from here"), starts_anew) == (True, "axonym: interrupted")


def test_mistakes_end_the_command_and_write_nothing(tmp_path, capsys):
    """Exit code 2, one line, no traceback, nothing in the store; the first through the command line."""
    arguments = [*samples.sweep_arguments(tmp_path), f"store.root={tmp_path}/store", "cluster=none"]
    (tmp_path / "empty").mkdir()
    for wrong, message in [
        ("layers.names=[block.9]", "axonym: layers.names=block.9: matches no module; allowed are mlp, residual"),
        (f"probing.uri={tmp_path}/empty", "axonym: probing.uri="),
        (f"probing.uri={tmp_path}/nowhere", "axonym: probing.uri="),
        (f"vocabulary.path={tmp_path}/nowhere.txt", "axonym: vocabulary.path="),
        (f"target.name={tmp_path}/nowhere.py:load", "axonym: target.name="),
        (f"target.checkpoint={tmp_path}/words.txt", "axonym: target.checkpoint="),
        ("vocabulary.against=nowhere.txt", "axonym: vocabulary.against=nowhere.txt: "),
        ("world=nowhere", "axonym: world=nowhere: no such folder; axonym world out=nowhere makes one"),
        (
            "clip.name=zzz",
            "axonym: clip.name=zzz: unknown; allowed are a local folder or open_clip's models, such as co",
        ),
        ("vocabulary.path=\x1b[31m", r"axonym: vocabulary.path=\x1b[31m: "),
        ("clip.name=ViT-B-33", "axonym: clip.name=ViT-B-33: unknown; allowed are a local folder or"),
    ]:
        assert run_flow(sweep.main, [*arguments, wrong]) == 2
        said = capsys.readouterr().err
        assert said.startswith(message)
        assert said.count("\n") == 1, said
        assert not (tmp_path / "store").exists()
    done = axonym("sweep", *arguments, wrong)
    assert (done.returncode, done.stderr, done.stdout) == (2, said, "")


NOBODY = """
import functools, sys
import ray._private.services
ray._private.services.find_gcs_addresses = functools.cache(set)  # other users of this machine are none of ours
from flows.cli import main
sys.exit(main())
"""


def test_no_cluster_to_join_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where "auto" looks for a running cluster
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    arguments = ["sweep", *samples.sweep_arguments(tmp_path), f"store.root={tmp_path}/store", "cluster=join"]
    command = [sys.executable, "-c", NOBODY, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert "axonym: cluster.address=auto: is Ray running there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999", "nosuch.invalid:123"])
def test_a_cluster_that_does_not_answer_is_told_at_once(tmp_path, monkeypatch, capsys, address):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    arguments = [*samples.sweep_arguments(tmp_path), f"store.root={tmp_path}/store", f"cluster.address={address}"]
    assert run_flow(sweep.main, arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"axonym: cluster.address={address}: is Ray running there")
    assert said.count("\n") == 1
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def check_comparison(printed: str, root: Path) -> None:
    """The last lines by a slow look at the tables of both runs."""
    lines = printed[printed.index("run                  ") :].splitlines()
    runs = [load_run(StoreSettings(str(root)), name) for name in ("drawn-0", "drawn-1")]
    named = [run.folder("neurons").read_all("neurons").filter(pc.field("phrase").is_valid()) for run in runs]
    assert [line.split()[:2] for line in lines[1:3]] == [["drawn-0", "11"], ["drawn-1", "11"]]
    for line, units in zip(lines[1:3], named, strict=True):
        on = [row for row in units.to_pylist() if row["status"] not in ("always_on", "special_token_only")]
        assert line.split()[2] == f"{np.mean([row['status'] == 'explained' for row in on]):.1%}"
        assert line.split()[5] == str(len({row["phrase"] for row in on}))
    one, other = ({(r["layer"], r["unit"]): r["phrase"] for r in units.to_pylist()} for units in named)
    same = np.mean([one[unit] == other[unit] for unit in one])
    assert lines[5].startswith(f"drawn-0 | drawn-1: {same:.1%} / ")


def test_command_line_sweep_show_and_status(tmp_path):
    arguments = [*samples.sweep_arguments(tmp_path), f"store.root={tmp_path}/store"]
    done = axonym("sweep", "--multirun", *arguments, "cluster=none", "scorer=contrastive,mean_cosine")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "store/runs").iterdir()) == ["drawn-0", "drawn-1"]
    check_comparison(done.stdout, tmp_path / "store")
    shown = axonym("show", "run=drawn-0", "layer=relu", "unit=0", f"store.root={tmp_path}/store")
    assert shown.returncode == 0, shown.stderr
    assert "relu" in shown.stdout
    status = axonym("status", "run=drawn-1", f"store.root={tmp_path}/store")
    assert status.returncode == 0, status.stderr
    assert "open" not in status.stdout
    assert "neurons" in status.stdout
    missing = axonym("status", "run=nothing", f"store.root={tmp_path}/store")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "drawn-0" in missing.stderr
