"""What a sweep will cost, stage by stage: rows, bytes, model passes, operations and memory.

In: the sweep's settings and facts about its images, models and words. Out: one Estimate per stage, in the order of
flows/sweep.py. Each method below has the formulas of one stage; tasks/plan.py makes time and money of them.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tasks.activations import GROUP
from tasks.clip import ClipSettings
from tasks.correlation import DRAWS
from tasks.coverage import HUBS, PAIRS
from tasks.crops import crop_grid
from tasks.drawn import PHRASES_PER_PART
from tasks.embeddings import TEXTS_PER_PART
from tasks.exemplars import HELD
from tasks.layers import Layer, unit_blocks
from tasks.moments import BINS
from tasks.plan import (
    BASE,
    EVEN,
    EVEN_DRAWN,
    EVEN_RANDOM,
    PER_ANSWER,
    PER_PHRASE,
    Estimate,
    Facts,
    Rates,
    Settings,
    answered,
    distinct,
)
from tasks.plan_bytes import POPULAR, Shape
from tasks.plan_models import ClipSketch, Cost
from tasks.precision import SAMPLE
from tasks.scorers import SCORERS
from tasks.scores import NULL_CROPS

ENGINE_START = 12.0
"""Seconds in which a language model's engine starts."""
LETTERS = 4
"""Letters of a prompt per token."""
EXEMPLARS = {"joint": 10, "soft_wpmi": 100, "wpmi": 28}
"""Exemplars whose similarity to all concepts a scorer looks at."""
PAIRWISE = ("cos_cubed", "rank_reorder", "auc")
"""Scorers that look at the similarity of every image of the sample to every concept."""
PAGE_BYTES, THUMBNAIL = 5130, {"photo": 3.6, "drawn": 2.8}
"""Bytes of a neuron on the report's pages, and pixels of a thumbnail per byte of its JPEG."""
HANDLING = 60_000
"""Pixels in whose time an image of any size is opened, handed over and laid into its batch."""
REMEMBERED = 4096
"""Drawn scenes that a process keeps (tasks/world/files.py)."""


class Planner:
    """Estimates of all stages of one sweep, in order."""

    def __init__(self, settings: Settings, facts: Facts, rates: Rates) -> None:
        self.settings, self.facts, self.rates = settings, facts, rates
        probing = settings.probing
        self.layers, self.words = facts.target.layers, facts.words
        self.blocks = unit_blocks(self.layers, settings.unit_block)
        self.units = sum(layer.num_units for layer in self.layers)
        self.shards = -(-facts.images // probing.shard_size)
        used = 0.5 if probing.half is not None else 1
        shares = {"explain": probing.explain * used, "select": probing.select, "validate": probing.validate}
        self.split = {name: share * facts.images for name, share in shares.items()}
        self.kept = {name: min(count, probing.pooled_max) for name, count in self.split.items()}
        self.stored = sum(self.kept.values())
        self.concepts = float(facts.phrases)
        self.lowest = {x.name: low for x, low in zip(self.layers, facts.target.lowest, strict=True)}
        self.signed = {name: low != "never" for name, low in self.lowest.items()}
        self.of = {layer.name: layer for layer in self.layers}
        self.sizes = self.words.sizes
        self.photo = float(np.mean([w * h for w, h in self.sizes]))
        self.cells = float(np.mean([len(crop_grid(w, h, settings.patches.crops.sizes)[0]) - 1 for w, h in self.sizes]))
        self.random = settings.target.random
        self._choose(self.random)

    def _choose(self, random: bool) -> None:
        """How many different images and crops the patches lie in; fewer where the weights are random."""
        settings, images = self.settings, max(self.split["explain"], 1)
        k, both = min(settings.patches.k, images), settings.patches.tails
        units = {x.name: x.num_units * sum(t == "top" or self.signed[x.name] for t in both) for x in self.layers}
        maps = {x.name: units[x.name] * k for x in self.layers if x.layout != "vector"}
        self.patch_rows = sum(units.values()) * k
        self.map_rows, vectors = sum(maps.values()), self.patch_rows - sum(maps.values())
        tokens = sum(n for name, n in maps.items() if self.of[name].layout == "tokens") / max(self.map_rows, 1)
        shapes = EVEN_RANDOM if random else EVEN_DRAWN if self.facts.drawn else EVEN
        even = math.exp(tokens * math.log(shapes["tokens"]) + (1 - tokens) * math.log(shapes["maps"]))
        cells = self.cells + 1  # with the whole image, to which large boxes snap
        self.cut = distinct(self.map_rows * self.cells / cells, images * self.cells, even)
        snapped = distinct(self.map_rows / cells, images, even) / images
        named = distinct(vectors, images, shapes["images"]) / images
        self.whole = images * (1 - (1 - snapped) * (1 - named))
        self.exemplar_images = distinct(self.map_rows, images, EVEN["images"])

    # Sizes that several stages share.

    def _image(self, side: int, count: float) -> dict[str, float]:
        """Decoding and fitting so many images to a model's input."""
        return {
            "images": count,
            "pixels": count * (2 * self.photo + 2 * side**2 + HANDLING),
            "drawn": self._drawn(count),
        }

    def _drawn(self, count: float) -> float:
        """Scenes that must be drawn for it, where a process cannot have kept them."""
        return count if self.facts.drawn and self.facts.images > REMEMBERED else 0

    def _model(self, name: str, cost: Cost, passes: float, times: float = 1) -> dict[str, Any]:
        counted = {"passes": passes, "flops": times * passes * cost.flops, "values": times * passes * cost.values}
        return {"model": name} | counted

    def _by_block(self, table: str, per_unit: float, **shape: Any) -> tuple[dict[str, float], dict[str, float]]:
        """Rows and bytes of a table whose parts are unit blocks."""
        rows, size = 0.0, 0.0
        for block in self.blocks:
            n = round(len(block) * per_unit)
            one = Shape(n, len(block), max(round(per_unit), 1), **shape)
            rows, size = rows + n, size + self.words.bytes_of(table, one)
        return {table: rows}, {table: size}

    def _by_shard(self, table: str, rows: float, **shape: Any) -> tuple[dict[str, float], dict[str, float]]:
        """Rows and bytes of a table whose parts are image shards."""
        one = Shape(round(rows / self.shards), images=min(self.facts.images, self.settings.probing.shard_size), **shape)
        return {table: rows}, {table: self.shards * self.words.bytes_of(table, one)}

    def _once(self, table: str, rows: float, **shape: Any) -> tuple[dict[str, float], dict[str, float]]:
        return {table: rows}, {table: self.words.bytes_of(table, Shape(round(rows), **shape))}

    def _estimate(self, stage: str, parts: int, *tables: tuple[dict, dict], **facts: Any) -> Estimate:
        found = Estimate(stage, parts, **facts)
        for rows, size in tables:
            found.rows |= rows
            found.bytes |= size
        return found

    # The stages, in the order of flows/sweep.py.

    def estimates(self) -> list[Estimate]:
        found = [*self._data(), *self._vocabulary(self.facts.phrases), *self._evidence(), *self._names(self.concepts)]
        if self.settings.refine.rounds:
            found += self._rounds()
        found += self._validated()
        if self.settings.neurons.twin:
            self._choose(random=True)
            twin = [*self._evidence(), *self._names(self.concepts), *self._validated()]
            twin += [self._chance(), *self._neurons()]
            self._choose(self.random)
            found += [replace(e, stage=f"twin {e.stage}") for e in twin]
        found += self._neurons()
        if self.facts.against is not None:
            against = float(self.facts.against)
            other = [*self._vocabulary(against, asked=False), *self._names(against), *self._validated()]
            found += [replace(e, stage=f"lexicon {e.stage}") for e in other]
        found += self._findings()
        if self.settings.ablation.pairs:
            found += self._causes()
        return [*found, self._report()]

    def _data(self) -> Iterator[Estimate]:
        images = self.facts.images
        yield self._estimate("listing", 1, self._once("listing", images, images=images))
        rows = self._by_shard("images", images)
        work = {"images": images, "pixels": images * self.photo, "drawn": images * self.facts.drawn}
        yield self._estimate("probing", self.shards, rows, **work)
        yield self._image_embeddings("image_embeddings", "clip", self.facts.clip)
        if self.facts.judge:
            yield self._image_embeddings("image_embeddings/judge", "judge", self.facts.judge)

    def _image_embeddings(self, stage: str, name: str, clip: ClipSketch) -> Estimate:
        images, batch = self.facts.images, self.settings.probing.batch_size
        rows, size = self._by_shard("image_embeddings", images)
        table = rows, {"image_embeddings": size["image_embeddings"] * clip.width / self.words.width}
        work = self._model(name, clip.image, _padded(images, batch)) | self._image(clip.image.side, images)
        memory = BASE + self._weights(clip.image, clip.text) + self._batch(clip.image)
        return self._estimate(stage, self.shards, table, **work, memory=memory)

    def _weights(self, *costs: Cost) -> float:
        return 4.0 * sum(cost.parameters for cost in costs)

    def _batch(self, cost: Cost) -> float:
        """Inputs, decoded photos that wait, and the largest outputs of a few modules."""
        batch = self.settings.probing.batch_size
        return batch * (cost.side**2 * 15 + 2 * 3 * self.photo + 4 * cost.values / 20)

    def _vocabulary(self, phrases: float, asked: bool = True) -> Iterator[Estimate]:
        llm, prompts = self.settings.vocabulary.llm, self.facts.prompts if asked else []
        if prompts:
            table = self._once("answers", len(prompts), entries=min(PER_ANSWER, llm.max_tokens // PER_PHRASE))
            yield self._estimate("answers", -(-len(prompts) // llm.shard_size), table, **self._talk(prompts))
        yield self._estimate("phrases", 1, self._once("phrases", phrases), memory=BASE / 4)
        yield self._phrase_embeddings("phrase_embeddings", "clip", self.facts.clip, self.settings.clip, phrases)
        tables = self._once("concepts", phrases), self._once("concept_embeddings", phrases)
        yield self._estimate("vocabulary", 1, *tables, flops=2.0 * phrases**2 * self.words.width)
        if asked and self.facts.judge and self.settings.judge:
            stage = "phrase_embeddings/judge"
            yield self._phrase_embeddings(stage, "judge", self.facts.judge, self.settings.judge, phrases)

    def _talk(self, prompts: list[str]) -> dict[str, float]:
        said = len(prompts) * float(min(PER_ANSWER * PER_PHRASE, self.settings.vocabulary.llm.max_tokens))
        other = ENGINE_START + said / self.rates.tokens
        return {"asked": sum(map(len, prompts)) / LETTERS, "said": said, "other": other}

    def _phrase_embeddings(
        self, stage: str, name: str, clip: ClipSketch, settings: ClipSettings, phrases: float
    ) -> Estimate:
        passes = _padded(phrases, self.settings.probing.batch_size) * len(settings.templates)
        work = self._model(f"{name} text", clip.text, passes)
        memory = BASE + self._weights(clip.image, clip.text)
        parts = -(-round(phrases) // TEXTS_PER_PART)
        return self._estimate(stage, parts, self._once("phrase_embeddings", phrases), **work, memory=memory)

    def _evidence(self) -> Iterator[Estimate]:
        if "target" in self.facts.half and self.settings.target.dtype == "auto":
            work = self._model("target", self.facts.target.cost, 3 * min(SAMPLE, self.facts.images))
            yield self._estimate("precision", 1, self._once("precision", 3), **work)
        yield self._activations()
        yield self._exemplars()
        yield self._patches()
        yield self._embeddings()

    def _activations(self) -> Estimate:
        settings, images, width = self.settings, self.facts.images, self.words.width
        shard, batch, k = min(settings.probing.shard_size, images), settings.probing.batch_size, settings.activations.k
        explain, stored = shard * self.split["explain"] / images, round(shard * self.stored / images)
        rows: dict[str, float] = {"candidates": 0, "stats": 0, "pooled": 0}
        size = {table: self.shards * self.words.empty(table) for table in rows}
        for block in self.blocks:
            layer, units = self.of[block.layer], len(block)
            signed = self.lowest[layer.name] == "free"
            shape = Shape(units, units, positions=_positions(layer), negative=signed, prefix=layer.prefix > 0)
            lists = ("candidates", round(min(k, explain)), 1 + self.signed[layer.name])
            for table, entries, tails in (lists, ("stats", 0, 1), ("pooled", stored, 1)):
                for tail in range(tails):
                    one = replace(shape, entries=entries, images=round(shard), kind=self._kind(layer, tail))
                    rows[table] += self.shards * units
                    size[table] += self.shards * self.words.group_of(table, one)
        self.collected = size["candidates"] + size["stats"]
        size["pooled"] *= min(1.0, images / (self.shards * shard))  # the last shard is shorter
        places = sum(layer.num_units * _positions(layer) for layer in self.layers)
        passes, group = _padded(images, batch), GROUP * batch
        work = self._model("target", self.facts.target.cost, passes) | self._image(self.facts.target.cost.side, images)
        work["flops"] += passes * 4.0 * self.units * width  # sums of activation x embedding, two powers
        work["values"] += passes * (places * 2.0 + self.units * 2 * (k / group + 1) * 6)
        tails = 2 * k * 12
        state = tails + BINS * 16 + 16 * width + group * (4 + 24) + 4 * stored
        written = tails + BINS * 16 + 8 * width + 6 * stored
        largest = max(layer.num_units * _positions(layer) for layer in self.layers)
        memory = BASE + self._weights(self.facts.target.cost) + self._batch(self.facts.target.cost)
        memory += self.units * (state + 1.6 * written) + 12.0 * batch * largest
        return self._estimate("activations", self.shards, (rows, size), **work, memory=memory)

    def _kind(self, layer: Layer, tail: int) -> str:
        """Of a layer's activations: only the bottom tail lies at the bound, where there is one."""
        kind = self.lowest[layer.name]
        return "free" if kind == "bounded" and not tail else kind

    def _exemplars(self) -> Estimate:
        k, settings = min(self.settings.activations.k, self.split["explain"]), self.settings
        rows: dict[str, float] = {"exemplars": 0, "unit_stats": 0}
        size = dict(rows)
        for block in self.blocks:
            layer, tails = self.of[block.layer], 1 + self.signed[block.layer]
            shape = Shape(round(len(block) * k), len(block), max(round(k), 1), images=round(self.split["explain"]))
            shape = replace(shape, positions=_positions(layer), prefix=layer.prefix > 0)
            rows["exemplars"] += shape.rows * tails
            rows["unit_stats"] += len(block)
            for tail in range(tails):
                size["exemplars"] += self.words.bytes_of("exemplars", replace(shape, kind=self._kind(layer, tail)))
            size["unit_stats"] += self.words.bytes_of("unit_stats", replace(shape, rows=len(block), per_unit=1))
        tails = sum(layer.num_units * (1 + self.signed[layer.name]) for layer in self.layers)
        merged = 3e-7 * self.shards * tails * settings.activations.k
        block, held = max(map(len, self.blocks)), min(self.shards, HELD + 1)
        candidates, sums = held * 2 * settings.activations.k * 12 * 5, 3 * 16 * (BINS + self.words.width)
        memory = BASE + block * (candidates + sums)
        return self._estimate(
            "exemplars", len(self.blocks), (rows, size), other=merged, read=self.collected, memory=memory
        )

    def _patches(self) -> Estimate:
        settings, images = self.settings, self.facts.images
        batch = settings.probing.batch_size
        batches = -(-images // batch)
        run = batches * -math.expm1(-self.exemplar_images / batches) if self.map_rows else 0  # batches with an exemplar
        size = {"patches": self.shards * self.words.empty("patches")}
        for block in self.blocks:
            count = round(len(block) * settings.patches.k / self.shards)
            shape = Shape(count, len(block), 1, images=min(settings.probing.shard_size, images))
            shape = replace(shape, positions=_positions(self.of[block.layer]))
            size["patches"] += self.shards * self.words.group_of("patches", shape)
        size["patches"] *= len(settings.patches.tails)
        crops = self._by_shard("crops", self.cut + self.whole)
        cost = self.facts.target.cost
        work = self._model("target", cost, run * batch) | self._image(cost.side, min(run * batch, images))
        grown = self.map_rows * float(np.mean([_positions(layer) for layer in self.layers]))
        read = self.shards * settings.activations.k * self.units * 3e-8
        memory = BASE + self._weights(cost) + self._batch(cost) + 150 * self.patch_rows / self.shards
        memory += 40 * grown / max(batches, 1) / max(len(self.layers), 1)
        tables = ({"patches": self.patch_rows}, size), crops
        return self._estimate("patches", self.shards, *tables, **work, other=6e-8 * grown + read, memory=memory)

    def _embeddings(self) -> Estimate:
        clip, batch = self.facts.clip, self.settings.probing.batch_size
        table = self._by_shard("embeddings", self.cut)
        groups = -(-self.facts.images // batch)  # crops go in batches of their own, per batch of images
        each = self.cut / groups
        calls = groups * (each / batch + -math.expm1(-each) / 2)
        images = min(self.exemplar_images, self.cut)
        sides = [(w * h) ** 0.5 for w, h in self.sizes]
        crop = np.mean([(s * size) ** 2 for s in sides for size in self.settings.patches.crops.sizes])
        cut = self.cut * (float(crop) + 2 * clip.image.side**2 + HANDLING)
        work = self._model("clip", clip.image, calls * batch)
        work |= {"images": images, "pixels": images * self.photo, "cut": cut, "drawn": self._drawn(images)}
        memory = BASE + self._weights(clip.image, clip.text) + self._batch(clip.image)
        return self._estimate("embeddings", self.shards, table, **work, memory=memory)

    def _names(self, concepts: float) -> Iterator[Estimate]:
        settings, width = self.settings, self.words.width
        keep = min(settings.scorer.keep, concepts)
        passes = 2 if SCORERS[settings.scorer.name].marginal else 1  # the first for the marginal over all units
        compared = EXEMPLARS.get(settings.scorer.name, 0) * passes + settings.patches.k + 3
        per_unit = 2.0 * concepts * width * compared + 2.0 * self.kept["explain"] * width
        if settings.scorer.name in PAIRWISE:
            per_unit += 2.0 * concepts * self.kept["explain"]
        block = max(map(len, self.blocks))
        crops = (self.cut + self.whole) * (2 * width * 2 + 24)
        memory = BASE + crops + self.facts.images * width * 4 + block * self.stored * 8 + concepts * width * 8
        memory += self.kept["explain"] * width * 8 + 32 * concepts * (settings.patches.k + 20) * 8
        read = passes * self._read(("pooled", "patches")) + self._read(("embeddings", "image_embeddings"))
        other = 4e-4 * self.units + 3e-6 * (min(self.cut, 10 * NULL_CROPS) + self.facts.images)
        table = self._by_block("scores", keep)
        yield self._estimate(
            "scores", len(self.blocks), table, flops=per_unit * self.units, other=other, read=read, memory=memory
        )
        table = self._by_block("explanations", 1, images=self.facts.images)
        yield self._estimate("explanations", len(self.blocks), table, other=1e-5 * self.units)

    def _read(self, tables: tuple[str, ...]) -> float:
        """Bytes of tables that a later stage reads whole."""
        sizes = {"pooled": 2.0 * self.units * self.stored, "patches": 20.0 * self.patch_rows}
        sizes |= {"embeddings": 2.0 * self.cut * self.words.width}
        sizes |= {"image_embeddings": 2.0 * self.facts.images * self.words.width}
        return sum(sizes[table] for table in tables)

    def _validated(self) -> Iterator[Estimate]:
        validate, block = self.kept["validate"], max(map(len, self.blocks))
        table = self._by_block("validation", 1, images=round(validate))
        flops = 2 * 2.0 * self.units * validate * DRAWS * 5  # in float64, which takes twice as long
        flops += 2 * 2.0 * self.units * self.stored * self.words.width
        memory = BASE + block * self.stored * 8 + validate * (8 * DRAWS + 80 * 64)
        memory += self.facts.images * self.words.width * 6 + self.stored * self.words.width * 12
        yield self._estimate(
            "validation", len(self.blocks), table, flops=flops, other=2e-4 * self.units,
            read=self._read(("pooled", "image_embeddings")), memory=memory,
        )  # fmt: skip

    def _chance(self) -> Estimate:
        nets, validate = self.settings.neurons.twin_nets, self.kept["validate"]
        cost = self.facts.target.cost
        work = self._model("target", cost, nets * _padded(validate, self.settings.probing.batch_size))
        work |= self._image(cost.side, nets * validate)
        looked = sum(min(layer.num_units, 512) for layer in self.layers) * self.concepts * nets
        work["flops"] += 4.0 * looked * validate
        rows, size = self._once("chance", len(self.layers) * self.concepts)
        table = {"chance": nets * rows["chance"]}, {"chance": nets * size["chance"]}
        memory = BASE + self._weights(cost) + self._batch(cost) + validate * self.concepts * 12
        return self._estimate("chance", nets, table, **work, other=3e-8 * looked, memory=memory)

    def _neurons(self) -> Iterator[Estimate]:
        table = self._by_block("neurons", 1, images=self.facts.images)
        yield self._estimate("neurons", len(self.blocks), table, other=2e-5 * self.units)

    def _rounds(self) -> Iterator[Estimate]:
        """All rounds that are allowed; a sweep may end with fewer."""
        settings = self.settings
        for number in range(1, settings.refine.rounds + 1):
            prompts = settings.refine.clusters
            new = answered(prompts, settings.vocabulary.llm.max_tokens)
            self.concepts += new
            talk = self._talk([self.words.text] * prompts)
            yield self._estimate(f"clusters/{number}", 1, self._once("clusters", prompts), other=1e-3 * self.units)
            yield self._estimate(f"answers/{number}", 1, self._once("answers", prompts, entries=PER_ANSWER), **talk)
            for found in [*self._vocabulary(new, asked=False), *self._names(self.concepts)]:
                yield replace(found, stage=f"{found.stage}/{number}")

    def _findings(self) -> Iterator[Estimate]:
        facts, width, settings = self.facts, self.words.width, self.settings
        widest = max(layer.num_units for layer in self.layers)
        flops = 4.0 * self.units * self.kept["explain"] * width
        flops += 2.0 * width * sum(layer.num_units**2 for layer in self.layers)
        rows, size = {"traits": self.units, "census": len(self.layers)}, {"traits": 0.0, "census": 0.0}
        for layer in self.layers:
            size["traits"] += self.words.bytes_of("traits", Shape(layer.num_units, layer.num_units))
            size["census"] += self.words.bytes_of("census", Shape(1, layer.num_units))
        memory = BASE + max(map(len, self.blocks)) * self.stored * 12 + widest * width * 24 + facts.images * width * 4
        memory += self.kept["explain"] * width * 16
        other = (3e-4 + 5e-6 * settings.activations.k) * self.units
        yield self._estimate(
            "traits", len(self.layers), (rows, size), flops=flops, other=other,
            read=self._read(("pooled", "image_embeddings")), memory=memory,
        )  # fmt: skip
        named = distinct(self.units, self.concepts, POPULAR)
        figures = 6 * len(self.layers) + HUBS + 0.75 * PAIRS + (self.concepts - named) + len(facts.prompts)
        work = {"flops": 2.0 * self.concepts**2 * width, "other": 1e-5 * self.units}
        yield self._estimate("coverage", 1, self._once("coverage", figures), **work)
        if facts.drawn:
            parts = -(-round(named) // PHRASES_PER_PART)
            scenes = named * settings.drawn.num + parts * 2 * settings.drawn.num
            cost = facts.target.cost
            work = self._model("target", cost, scenes) | {"pixels": scenes * (2 * cost.side**2 + HANDLING)}
            memory = BASE + self._weights(cost) + self._batch(cost) + scenes / parts * 3 * self.photo * 4
            rows, size = self._once("drawn", self.units / parts, images=settings.drawn.num)
            table = {"drawn": parts * rows["drawn"]}, {"drawn": parts * size["drawn"]}
            yield self._estimate("drawn", parts, table, **work, drawn=scenes, memory=memory)
            pooled, scenes = self._read(("pooled",)), self.split["validate"]
            table = self._by_block("truth", 1, images=round(scenes))
            yield self._estimate("truth", len(self.blocks), table, drawn=scenes, read=pooled)

    def _causes(self) -> Iterator[Estimate]:
        chosen, target = self.settings.ablation, self.facts.target
        classes, cost = target.num_classes or 1, target.cost
        select, validate = self.split["select"], self.split["validate"]
        seen = min(distinct(select / self.shards, classes, 1e9), classes)
        table = self._by_shard("screen", self.shards * self.units, units=self.units, entries=round(2 * seen))
        work = self._model("target", cost, select + validate, (3 * select + validate) / max(select + validate, 1))
        memory = BASE + self._weights(cost) + 4 * self._batch(cost) + 16.0 * self.units * seen
        images = self._image(cost.side, select + validate)
        yield self._estimate("screen", self.shards, table, **work, **images, memory=memory)
        yield self._estimate("pairs", 1, other=1e-7 * self.units * classes)
        looked = 2 * min(chosen.images, validate / classes)
        passes = looked * chosen.pairs * (1 + chosen.controls) / 2  # half a pass is repeated on average
        yield self._estimate("ablation", min(chosen.pairs, classes), **self._model("target", cost, passes))
        yield self._estimate("causes", 1, self._once("causes", chosen.pairs))

    def _report(self) -> Estimate:
        settings = self.settings
        shown = distinct(
            self.units * min(settings.report.patches, settings.patches.k), self.split["explain"], EVEN["images"]
        )
        side = settings.report.thumbnail
        scale = [min(1.0, side / max(w, h)) for w, h in self.sizes]
        small = float(np.mean([w * h * s * s for (w, h), s in zip(self.sizes, scale, strict=True)]))
        pages = sum(-(-layer.num_units // settings.report.page_units) for layer in self.layers)
        rows = {"pages": pages + 3.0}
        jpeg = small / THUMBNAIL["drawn" if self.facts.drawn else "photo"]
        size = {"images": shown * jpeg, "layers": PAGE_BYTES * settings.report.patches / 8 * self.units}
        parts = self.shards + len(self.layers) + 1
        work = {"images": shown, "pixels": shown * (2 * self.photo + 4 * small)}
        other = 1.1e-3 * self.units
        memory = BASE + max(layer.num_units for layer in self.layers) * (PAGE_BYTES * 12.0)
        return self._estimate("report", parts, (rows, size), **work, other=other, memory=memory)


def _positions(layer: Layer) -> int:
    return layer.grid[0] * layer.grid[1]


def _padded(images: float, batch: int) -> float:
    """Images as whole batches."""
    return math.ceil(images / batch) * batch
