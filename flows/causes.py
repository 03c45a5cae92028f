"""The stages that switch units off: does the model need the unit, and for which class?

  probing, target model -> screen -> pairs -> ablation -> causes <- neurons, vocabulary

In: a config with ablation.pairs above 0, the target described, its units named. Out: one folder of Parquet parts per
stage, in the manifest; how well screen and ablation agree, and what a class loses with its units, in the terminal.
"""

from dataclasses import replace
from typing import Any

from flows.config import Config
from flows.evidence import MODEL
from flows.findings import FindingStages
from flows.show import plain
from tasks.ablation import AblationJob, ablated_classes
from tasks.causes import CausesJob
from tasks.classes import class_of_label
from tasks.forward import TargetPass
from tasks.layers import Layer
from tasks.pairs import PairsJob
from tasks.screen import ScreenJob
from tasks.store import fingerprint


def check_causes(config: Config, layers: list[Layer], num_classes: int | None) -> None:
    """Raises ValueError where the target model has no classes, or no layer has tokens of the chosen kind."""
    settings = config.ablation
    if not settings.pairs:
        return
    if num_classes is None:
        expected = f"target.name={config.target.name} has no output of one logit per class; allowed is 0"
        raise ValueError(f"ablation.pairs={settings.pairs}: {expected}")
    for layer in layers:
        if layer.sae and not layer.sae.decodes:
            expected = f"{layer.sae.path} has no decoder, without which latents are not switched off; allowed is 0"
            raise ValueError(f"ablation.pairs={settings.pairs}: {expected}")
    if settings.positions == "prefix" and not any(layer.prefix for layer in layers):
        raise ValueError("ablation.positions=prefix: no chosen layer has prefix tokens; allowed are all, patches")


class CausesStages(FindingStages):
    """Each method plans and runs one stage; none of them runs where ablation.pairs is 0."""

    def _causes_pass(self) -> TargetPass:
        """Always float32: a single unit may move a logit by less than half precision tells apart."""
        layers = self.target.layers
        if self.config.ablation.positions == "prefix":
            layers = [layer for layer in layers if layer.prefix]
        return replace(self._target_pass(), layers=layers, dtype="float32")

    def screen(self) -> None:
        labels, positions = self.images.column("label").tolist(), self.config.ablation.positions
        named = class_of_label({text for text in labels if text}, self.target.class_names, self.target.num_classes or 0)
        payload = self._target_payload() | {"positions": positions, "index_of": named}
        payload |= {"labels": fingerprint({"labels": [named.get(text) for text in labels]})}
        folder = self.manifest.plan("screen", payload, self.images.num_shards, MODEL)
        job = ScreenJob(folder, self._causes_pass(), self._causes_blocks, positions, named)
        self._stage(job, len(self.images), "image")

    @property
    def _causes_blocks(self) -> list[Any]:
        names = {layer.name for layer in self._causes_pass().layers}
        return [block for block in self.blocks if block.layer in names]

    def pairs(self) -> None:
        settings = self.config.ablation
        chosen = {key: getattr(settings, key) for key in ("pairs", "controls", "classes", "to")}
        folder = self.manifest.plan("pairs", chosen | {"screen": self.hash("screen")}, 1, ("numpy",))
        read, num_classes = self.folder("screen"), self.target.num_classes or 0
        self._stage(PairsJob(folder, self.images, read, self._causes_blocks, num_classes, **chosen), 1, "list")

    def ablation(self) -> None:
        settings, pairs = self.config.ablation, self.folder("pairs")
        parts = max(1, len(ablated_classes(pairs)))
        payload = {"pairs": pairs.fingerprint, "images": settings.images}
        folder = self.manifest.plan("ablation", payload, parts, (*MODEL, "scipy"))
        job = AblationJob(
            folder, self._causes_pass(), self.folder("screen"), pairs, settings.positions, settings.images
        )
        self._stage(job, parts, "class")

    def causes(self) -> None:
        read = ("pairs", "ablation", "neurons", "vocabulary")
        names = self.target.class_names
        payload: dict[str, Any] = {stage: self.hash(stage) for stage in read} | {"class_names": names}
        folder = self.manifest.plan("causes", payload, 1, ("numpy", "scipy"))
        self._stage(CausesJob(folder, **{stage: self.folder(stage) for stage in read}, class_names=names), 1, "list")
        for row in folder.read_all("agreement").to_pylist():
            if row["value"] is not None:
                print(f"{row['what']}: {row['value']:.3f} ({row['rows']:,})")
        self._print_cumulative()

    def _print_cumulative(self) -> None:
        """Accuracy of each class with 0, 1, 2, 4, ... of its units off, and with as many random ones."""
        lines: dict[int, list[str]] = {}
        for row in self.folder("ablation").read_all("cumulative").to_pylist():
            control = "" if row["control_accuracy"] is None else f" ({row['control_accuracy']:.0%})"
            lines.setdefault(row["class_index"], []).append(f"{row['units']}: {row['accuracy']:.0%}{control}")
        names = self.target.class_names or []
        for own, found in lines.items():
            name = names[own] if own < len(names) else f"class {own}"
            print(f"accuracy of {plain(name)} by units off (random ones): {', '.join(found)}")
