"""Configuration: Hydra composes conf/, dataclasses validate, one line says what is wrong.

In: overrides as typed (target=vit_l_16 probing.uri=photos). Out: a Config of plain dataclasses, or ValueError naming
the key, the value and what is allowed. No OmegaConf object leaves this file.
"""

import dataclasses
import difflib
import itertools
import os
import re
import subprocess
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import conf
import tasks.world
from flows.resources import ClusterSettings
from tasks.ablation import AblationSettings
from tasks.activations import ActivationsSettings
from tasks.clip import ClipSettings, JudgeSettings
from tasks.clusters import RefineSettings
from tasks.drawn import DrawnSettings
from tasks.layers import LayersSettings
from tasks.llm import check_llm
from tasks.neurons import NeuronsSettings
from tasks.patches import PatchesSettings
from tasks.phrases import VocabularySettings
from tasks.probing import ProbingSettings
from tasks.report import ReportSettings
from tasks.scorers import SCORERS, ScorerSettings
from tasks.store import SECRET_ARGUMENT, StoreSettings, refuse_secrets
from tasks.target import TargetSettings

CONF = Path(next(iter(conf.__path__)))
WORLD = Path(next(iter(tasks.world.__path__))) / "weights"
OWN = re.compile(r"experiment=|(target|probing)=(?!world)|probing\.uri=(?!\W*(world://[^,]*,?\W*)+$)")
"""Overrides that name a model or images of one's own. Without any, a sweep is one of the drawn world, experiment=world;
with one, all else is chosen for photos (conf/config.yaml), so that the world's tiny CLIP never meets them unasked."""

PLACE = re.compile(r"cluster=|cluster\.(address|ray)=")
"""Overrides that say where a sweep runs. Without any, it takes the GPUs of this machine where there are some."""


@dataclass
class Config:
    """Everything a sweep can be told; one dataclass per group, each beside the code that uses it."""

    run: str | None = None
    """Name of the run; default: made of target, layers, vocabulary and scorer."""
    unit_block: int = 2048
    """Units per part in the stages that go by units."""
    world: str = str(WORLD)
    """Folder of the drawn world's models, as `axonym world` writes them; the shipped one by default."""
    target: TargetSettings = field(default_factory=TargetSettings)
    layers: LayersSettings = field(default_factory=LayersSettings)
    probing: ProbingSettings = field(default_factory=ProbingSettings)
    vocabulary: VocabularySettings = field(default_factory=VocabularySettings)
    clip: ClipSettings = field(default_factory=ClipSettings)
    judge: JudgeSettings | None = None
    """The CLIP that validates the names; null for the one that made them."""
    activations: ActivationsSettings = field(default_factory=ActivationsSettings)
    patches: PatchesSettings = field(default_factory=PatchesSettings)
    refine: RefineSettings = field(default_factory=RefineSettings)
    scorer: ScorerSettings = field(default_factory=ScorerSettings)
    neurons: NeuronsSettings = field(default_factory=NeuronsSettings)
    drawn: DrawnSettings = field(default_factory=DrawnSettings)
    ablation: AblationSettings = field(default_factory=AblationSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)

    def __post_init__(self) -> None:
        for name, group in asdict(self).items():
            refuse_secrets(name, group, SECRET_ARGUMENT)
        if self.unit_block < 1:
            raise ValueError(f"unit_block={self.unit_block}: must be at least 1")
        if self.patches.k > self.activations.k:
            raise ValueError(f"patches.k={self.patches.k}: must be at most activations.k={self.activations.k}")
        if SCORERS[self.scorer.name].dense and self.probing.pooled_max == 0:
            raise ValueError(f"probing.pooled_max=0: must be above 0 for scorer.name={self.scorer.name}")
        if self.refine.rounds:
            check_llm(self.vocabulary.llm)
        if self.run is None:
            self.run = self._name()
        if not re.fullmatch(r"[\w.+-]+", self.run) or self.run.startswith("."):
            raise ValueError(f"run={self.run}: allowed are letters, digits and . _ + -")

    def _name(self) -> str:
        stem = Path(self.target.name.rpartition(":")[0] or self.target.name)
        target = stem.parent.name if stem.suffix == ".py" else stem.name
        if self.target.checkpoint:
            target += f"+{Path(self.target.checkpoint).stem}"
        words = Path(self.vocabulary.path).stem if self.vocabulary.path else self.vocabulary.source
        layers = [*self.layers.names, *(Path(path).stem for path in self.layers.saes.values())]
        parts = [target, "+".join(layers), words, self.scorer.name]
        return re.sub(r"[^\w.+-]+", "_", "-".join(parts))[:120].lstrip(".")


def compose(overrides: list[str]) -> Config:
    """What is not said follows from OWN and PLACE.

    Raises ValueError with one line for an unknown key or group choice, a wrong type or an impossible value.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = [override for override in overrides if override not in ("experiment=null", "judge=null")]  # Hydra's no
    checked = [_check(override) for override in given]
    part = next((override for override in given if override.startswith("judge.")), None)
    if part and not any(override.startswith("judge=") for override in given):  # which Hydra fails an assertion at
        raise ValueError(f"{part}: there is no judge to change; choose one too, for example judge=vit_l_14")
    if not any(OWN.match(override) for override in overrides):
        checked.append("experiment=world")
    if not any(PLACE.match(override) for override in overrides) and has_gpu():
        checked.append("cluster=gpu")
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            found = hydra_compose("config", overrides=checked)
        config = OmegaConf.to_object(found)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error, overrides)) from None
    assert isinstance(config, Config)
    return config


def check_world(config: Config) -> None:
    """Raises ValueError where the folder of the drawn world is not there: else CLIP would be said to be missing."""
    if not Path(config.world).is_dir():
        raise ValueError(f"world={config.world}: no such folder; axonym world out={config.world} makes one")


def has_gpu() -> bool:
    """Whether this machine's driver lists a GPU, and the environment does not hide it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "GPU " in listed


def multirun(overrides: list[str]) -> list[list[str]]:
    """One list of overrides per combination of the sweep values (scorer=contrastive,soft_wpmi), in Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    choices = []
    for given in overrides:
        key, _, value = given.partition("=")
        if is_text(key, value) and not re.match(r"(choice|range|sort|shuffle)\(", value):
            choices.append([f"{key}={text}" for text in value.split(",")])
            continue
        try:
            (override,) = OverridesParser.create().parse_overrides([given])
        except OverrideParseException as error:
            raise ValueError(_one_line(error, overrides)) from None
        swept = override.is_sweep_override()
        values = override.sweep_string_iterator() if swept else [override.get_value_string()]
        choices.append([f"{override.get_key_element()}={value}" for value in values])
    return [list(job) for job in itertools.product(*choices)]


def groups() -> list[str]:
    return sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_"))


def described() -> str:
    """Every group with its choices, then every key."""
    lines = ["Groups and their choices:"]
    lines += [
        f"  {group}={'|'.join(sorted(path.stem for path in (CONF / group).glob('*.yaml')))}" for group in groups()
    ]
    kinds = {
        f.name: get_args(f.type)[0] if isinstance(f.type, UnionType) else f.type for f in dataclasses.fields(Config)
    }
    inside = {key: [f.name for f in dataclasses.fields(kind)] for key, kind in kinds.items() if is_dataclass(kind)}
    lines += ["Keys, as in target.name=x:", f"  {', '.join(key for key in kinds if key not in inside)}"]
    return "\n".join(lines + [f"  {group}: {', '.join(names)}" for group, names in inside.items()])


def _check(override: str) -> str:
    """The override as Hydra wants it, if its key and group choice exist."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.\-]*", key):
        raise ValueError(f"{override}: expected key=value, for example target=vit_l_16 or probing.uri=photos")
    group = "clip" if key == "judge" else key  # the same choices
    if group in groups():
        allowed = sorted(p.stem for p in (CONF / group).glob("*.yaml"))
        if value not in allowed:
            raise ValueError(f"{key}={value}: unknown; allowed are {', '.join(allowed)}")
        return override if group == key else f"{group}@{override}"
    kind = _walk(key)
    if is_text(key, value):
        text = re.sub(r"(\\+)(?='|\Z)", r"\1\1", os.path.expanduser(value))  # elsewhere a backslash is one to Hydra
        return f"{key}='" + text.replace("'", r"\'") + "'"
    stage = re.fullmatch(r"cluster\.stages\.(\w+)\.(\w+)", key)
    if stage:  # OmegaConf makes a dataclass inside a dict only when a whole dict is merged
        return f"++cluster.stages={{{stage[1]}:{{{stage[2]}:{value}}}}}"
    free = kind is Any or get_origin(kind) is dict  # Hydra adds keys to a free dict only when told to
    return f"{'++' if free else ''}{key}={value}"


def is_text(key: str, value: str) -> bool:
    """Whether the value is free text, a name or a path, which means nothing in Hydra's grammar: run=1e5, a#b, ~/photos.

    What the user has quoted is Hydra's.
    """
    if key in groups() or value in ("null", "") or value[0] in "'\"":
        return False
    return not value.startswith("[") if key == "probing.uri" else _walk(key) in (str, str | None)


def _walk(key: str) -> Any:
    """Type of the key's value; Any inside a free dict. Raises ValueError where no field of that name exists."""
    kind: Any = Config
    steps = key.split(".")
    for depth, step in enumerate(steps):
        if isinstance(kind, UnionType):  # or None
            kind = get_args(kind)[0]
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        if kind is Any:
            return Any
        names = {f.name: f.type for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        if step not in names:
            place = ".".join(steps[: depth + 1])
            near = difflib.get_close_matches(step, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            allowed = f"allowed are {', '.join(names)}" if names else f"{'.'.join(steps[:depth])} takes a value"
            raise ValueError(f"{place}: unknown key{hint}; {allowed}")
        kind = names[step]
    return kind


def _one_line(error: BaseException, overrides: list[str]) -> str:
    """Key, value, what is expected and the reason, from Hydra's or OmegaConf's own exception."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for found in chain:
        override = getattr(found, "override", None)
        if override:
            return f"{str(override).lstrip('+')}: {str(found).splitlines()[0]}"
        key = getattr(found, "full_key", None)
        if key:
            given = next((o for o in overrides if o.lstrip("+").startswith(f"{key}=")), key)
            kind = _walk(key)
            reason = str(found).splitlines()[0]
            return f"{given.lstrip('+')}: expected {getattr(kind, '__name__', kind)}: {reason}"
    return " ".join(str(error).split())


def make_folder(out: str) -> Path:
    """Raises ValueError naming out= where there can be no such folder."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={out}: cannot be made: {error}") from None
    return Path(out)


def flow_arguments(arguments: list[str], own: dict[str, type], **defaults: Any) -> tuple[dict[str, Any], list[str]]:
    """Split `key=value` arguments into a flow's own keys, converted, and the overrides of the config.

    Raises ValueError for a malformed own key, or a missing one that has no default.
    """
    found: dict[str, Any] = dict(defaults)
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in own:
            rest.append(argument)
            continue
        try:
            found[key] = own[key](value)
        except ValueError:
            raise ValueError(f"{argument}: expected a {own[key].__name__}") from None
    missing = [key for key in own if key not in found]
    if missing:
        raise ValueError(f"{missing[0]} is missing: this flow needs {' '.join(f'{k}=...' for k in own)}")
    return found, rest
