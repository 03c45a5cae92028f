"""Runs: small manifests that say which stage folders belong together.

In: a store and a run's name. Out: `<root>/runs/<run>/run.json` with the resolved config and the fingerprint of every
stage.
"""

import difflib
import importlib.metadata
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tasks.store import Folder, Store, StoreSettings, fingerprint
from tasks.tables import VERSION

TABLES = {
    "listing": ("listing",),
    "probing": ("images",),
    "answers": ("answers",),
    "phrases": ("phrases",),
    "image_embeddings": ("image_embeddings",),
    "phrase_embeddings": ("phrase_embeddings",),
    "vocabulary": ("concepts", "concept_embeddings"),
    "precision": ("precision",),
    "activations": ("candidates", "stats", "pooled"),
    "exemplars": ("exemplars", "unit_stats"),
    "patches": ("patches", "crops"),
    "embeddings": ("embeddings",),
    "scores": ("scores",),
    "explanations": ("explanations",),
    "clusters": ("clusters",),
    "validation": ("validation",),
    "chance": ("chance",),
    "neurons": ("neurons",),
    "traits": ("traits", "census"),
    "coverage": ("coverage",),
    "drawn": ("drawn",),
    "truth": ("truth",),
    "screen": ("screen", "screen_counts", "classes"),
    "pairs": ("pairs",),
    "ablation": ("ablation", "cumulative"),
    "causes": ("causes", "agreement"),
    "report": ("pages",),
    "world": ("measures", "planted"),
    "benchmark": ("benchmark",),
}
"""Tables of each stage; the first-named is put last."""


@dataclass
class Run:
    """One run as its manifest states it."""

    name: str
    store: StoreSettings
    config: dict[str, Any]
    stages: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each stage that has been planned, in order; later rounds of a stage are stage/1, stage/2, ...,
    and what a second CLIP computes is stage/judge."""
    parts: dict[str, int] = field(default_factory=dict)
    """Number of parts of each stage."""
    changes: dict[str, str] = field(default_factory=dict)
    """Why a stage has another folder than it had when this run was last named: the fields that differ."""

    @property
    def path(self) -> str:
        return f"runs/{self.name}/run.json"

    @cached_property
    def previous(self) -> dict[str, Any]:
        """The manifest as it was before this process wrote to it."""
        return Store(self.store).get_json(self.path) or {"stages": {}}

    def folder(self, key: str) -> Folder:
        """Of a stage, of one of its rounds ('scores/2'), or of the second CLIP ('image_embeddings/judge')."""
        stage = key.partition("/")[0]
        return Folder(self.store, stage, self.stages[key], TABLES[stage])

    def rounds(self, stage: str) -> list[str]:
        """Keys of all rounds of a stage, the stage itself first."""
        return [key for key in self.stages if re.fullmatch(rf"{stage}(/\d+)?", key)]

    def last(self, stage: str) -> str:
        """Key of the last round of a stage; the stage itself where there is one round only."""
        return self.rounds(stage)[-1]

    def num_parts(self, folder: Folder) -> int:
        """Of a folder that has been planned."""
        return next(self.parts[key] for key, found in self.stages.items() if found == folder.fingerprint)

    def share(self, other: "Run", stages: tuple[str, ...]) -> None:
        """Take over what another run has of these stages, all rounds of them."""
        for key in [key for stage in stages for key in other.rounds(stage)]:
            self.stages[key], self.parts[key] = other.stages[key], other.parts[key]

    def plan(self, key: str, payload: dict[str, Any], parts: int, libraries: tuple[str, ...] = ()) -> Folder:
        """Folder of a stage from everything its numbers depend on; the payload is stored beside the tables.

        `libraries` are those whose version changes numbers.
        """
        versions = {name: importlib.metadata.version(name) for name in libraries}
        payload = {"settings": payload, "versions": versions, "tables": VERSION}
        before, stage = self.previous["stages"].get(key), key.partition("/")[0]
        self.stages[key], self.parts[key] = fingerprint({"stage": stage} | payload), parts
        folder = self.folder(key)
        if folder.store.get_json(f"{folder.name}/stage.json") is None:
            folder.store.put_json(f"{folder.name}/stage.json", payload)
        why = self.previous.get("changes", {}).get(key)
        if before not in (None, folder.fingerprint):
            old = folder.store.get_json(f"{stage}/{before}/stage.json") or {}
            why = ", ".join(differences(old, payload))
            print(f"{key}: a new folder, because of {why}")
        if why:
            self.changes[key] = why
        return folder

    def keep(self) -> None:
        """Write the manifest unless the one that is there lists all that has been planned so far.

        So a finished run that is named again stays finished, whenever its second time is broken off.
        """
        if not self.stages.items() <= self.previous["stages"].items():
            self.save()

    def save(self) -> None:
        """Write the manifest. It holds no secrets: the config has none."""
        found = {"run": self.name, "config": self.config, "stages": self.stages, "parts": self.parts}
        found["changes"] = self.changes
        Store(self.store).put_json(self.path, found)


def load_run(store: StoreSettings, name: str) -> Run:
    """Raises ValueError naming the runs there are where this one is not."""
    found = Store(store).get_json(f"runs/{name}/run.json")
    if found is None:
        runs = Store(store).names("runs")
        near = difflib.get_close_matches(name, runs, n=5, cutoff=0) or ["none yet"]
        raise ValueError(f"run={name}: no such run in {store.root}; there are {', '.join(near)}")
    return Run(name, store, found["config"], found["stages"], found["parts"], found.get("changes", {}))


def spent(folder: Folder) -> dict[str, Counter]:
    """Seconds by phase and skipped items by reason, summed over the finished parts of a stage."""
    totals = {"seconds": Counter(), "skipped": Counter()}
    for name in folder.store.names(f"{folder.name}/reports"):
        found = folder.store.get_json(f"{folder.name}/reports/{name}") or {}
        for key, total in totals.items():
            total.update(found.get(key, {}))
    return totals


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Dotted names of the fields in which two payloads differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(set(before) | set(after))
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{path}.{k}".lstrip("."))]
    short = [text if len(text) < 40 else text[:37] + "..." for text in (str(before), str(after))]
    return [] if before == after else [f"{path.removeprefix('settings.')} ({short[0]} -> {short[1]})"]
