"""The tables: every column of every Parquet table, each with one sentence.

In: a pyarrow Table and the name of its schema. Out: the same table, checked and in schema order, or an AssertionError.
Keys that travel: `image` numbers the images of one probing dataset in its stored order and `image_id` is its readable,
storage-independent name; (`layer`, `unit`) is a unit; `concept_id` and `crop_id` are derived from content alone.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tasks.columns import (
    BOX,
    CAUSES,
    CONCEPT_ID,
    EMBEDDING,
    F16,
    F32,
    F64,
    I32,
    I64,
    IMAGE,
    IMAGE_ID,
    NEGATIVE,
    NEGATIVE_CONFIDENCE,
    PHRASE,
    SOURCE,
    STR,
    TAIL,
    UNIT,
)  # fmt: skip

VERSION = 8
"""Part of every fingerprint: raise it when the meaning of a column changes."""

COLUMNS: dict[str, dict[str, tuple[pa.DataType, str]]] = {
    "listing": IMAGE | IMAGE_ID | SOURCE,
    "images": IMAGE
    | IMAGE_ID
    | SOURCE
    | {
        "width": (I32, "pixels, upright; 0 where the image cannot be read"),
        "height": (I32, "pixels, upright"),
        "content": (STR, "SHA-256 of the file's bytes, hex"),
        "split": (STR, "explain, select, validate or unused: a hash of the content, so duplicates never straddle"),
        "status": (STR, "ok, or the reason why the image is left out"),
    },
    "image_embeddings": IMAGE | EMBEDDING,
    "phrases": PHRASE | {"is_class": (pa.bool_(), "whether it is the name of a class, which is always kept")},
    "phrase_embeddings": CONCEPT_ID | EMBEDDING,
    "concepts": PHRASE
    | {
        "synonyms": (pa.list_(STR), "phrases that CLIP's text vectors tell no difference from, merged into it"),
        "broader": (STR, "concept_id of the nearest concept that it is a kind of by its words, if there is one"),
        "parent": (STR, "concept_id it was refined from; null in round 0"),
        "round": (I32, "round of refinement, 0 first"),
    },
    "answers": {
        "prompt_id": (STR, "template file and hash of the filled prompt"),
        "family": (STR, "what was asked for; null where it is no family"),
        "sources": (pa.list_(STR), "class that the prompt is about, else the prompt"),
        "prompt": (STR, "what the language model was asked"),
        "answer": (STR, "what it said, raw"),
        "input_tokens": (I32, "tokens of the prompt"),
        "tokens": (I32, "tokens generated"),
        "status": (STR, "ok, or why nothing could be taken from the answer"),
    },
    "concept_embeddings": CONCEPT_ID | EMBEDDING,
    "candidates": UNIT
    | TAIL
    | {
        "image": (pa.list_(I32), "best images of the shard under the total order, best first"),
        "activation": (pa.list_(F32), "pooled activation of each"),
        "position": (pa.list_(I32), "index of the peak in the flattened map, prefix tokens left out"),
    },
    "stats": UNIT
    | {
        "count": (I64, "readable images with a finite activation"),
        "nonfinite": (I64, "readable images whose activation is not finite; they are left out of everything else"),
        "mean": (F64, "mean pooled activation"),
        "m2": (F64, "sum of squared deviations from the mean"),
        "minimum": (F32, "smallest pooled activation"),
        "maximum": (F32, "largest pooled activation"),
        "low": (F32, "smallest activation at any position"),
        "prefix_maximum": (F32, "largest activation on a prefix token (CLS, registers); null without prefix tokens"),
        "histogram": (pa.list_(I64), "counts of pooled activations over tasks.moments.EDGES"),
        "position_histogram": (
            pa.list_(I64),
            "counts of activations at single positions, a sixteenth of the explain images",
        ),
        "explain_count": (I64, "images of the explain split in the sums that follow"),
        "sum": (F64, "sum of activations, explain split"),
        "sum_cubed": (F64, "sum of cubed activations, explain split"),
        "embedding_sum": (pa.list_(F32), "sum of activation x image embedding, explain split"),
        "embedding_sum_cubed": (pa.list_(F32), "sum of cubed activation x image embedding, explain split"),
    },
    "pooled": UNIT
    | {
        "scale": (F32, "multiply the stored values by this"),
        "activation": (pa.list_(F16), "pooled activations of the shard's stored images, in image order"),
        "negative": (
            pa.list_(F16),
            "their negative sides: -a where that is above 0.376, else 0; a the smallest activation at any position, or "
            "with a pool other than max the pooled one",
        ),
    },
    "exemplars": UNIT
    | TAIL
    | {"rank": (I32, "0 is the strongest; images that lie no higher (bottom: lower) than all do are none")}
    | IMAGE
    | IMAGE_ID
    | {
        "activation": (F32, "pooled activation"),
        "position": (I32, "index of the peak in the flattened map"),
    },
    "unit_stats": UNIT
    | {
        "count": (I64, "readable images with a finite activation"),
        "nonfinite": (I64, "images whose activation is not finite"),
        "mean": (F64, "mean pooled activation"),
        "std": (F64, "its standard deviation over images"),
        "minimum": (F32, "smallest pooled activation"),
        "maximum": (F32, "largest pooled activation"),
        "low": (F32, "smallest activation at any position"),
        "prefix_maximum": (F32, "largest activation on a prefix token; null without prefix tokens"),
        "position_quantile": (F32, "quantile 0.995 of activations over positions, from the histogram"),
        "histogram": (pa.list_(I64), "counts of pooled activations over tasks.moments.EDGES"),
        "explain_count": (I64, "images of the explain split in the sums that follow"),
        "sum": (F64, "sum of activations"),
        "sum_cubed": (F64, "sum of cubed activations"),
        "embedding_sum": (pa.list_(F32), "sum of activation x image embedding"),
        "embedding_sum_cubed": (pa.list_(F32), "sum of cubed activation x image embedding"),
    },
    "patches": UNIT
    | TAIL
    | {"rank": (I32, "rank of the exemplar")}
    | IMAGE
    | IMAGE_ID
    | {"crop_id": (I64, "the crop that stands for the patch")}
    | BOX
    | {"active_fraction": (F32, "share of the map above the threshold")},
    "crops": {"crop_id": (I64, "image * 64 + number in the image's crop grid")}
    | IMAGE
    | {"level": (I32, "0 for the whole image, else 1 + index of the square's size")}
    | BOX,
    "embeddings": {"crop_id": (I64, "the crop")} | EMBEDDING,
    "scores": UNIT
    | {
        "rank": (I32, "0 is the best concept"),
        "concept_id": (STR, "hash of the concept"),
        "concept": (STR, "short phrase"),
        "family": (STR, "family of the concept"),
        "score": (F32, "value of the scorer"),
        "null_z": (F32, "mean similarity of the patches against random crops of the same sizes, standard deviations"),
        "share": (F32, "share of the patches that match the concept better than 95 % of random crops do"),
        "lead": (
            F32,
            "score over that of the vocabulary's median concept; where scores are logarithms, of weighted_mean",
        ),
        "adds": (pa.bool_(), "whether it says most of what the best one leaves unexplained, and enough"),
        "meaning": (F32, "share of the patches that it fits best of the unit's meanings; null if it is none of them"),
    }
    | NEGATIVE,
    "explanations": UNIT
    | {
        "phrase": (STR, "the best concept; null where a unit has no exemplars"),
        "concepts": (pa.list_(STR), "the best concept, the one that adds to it if any, then the next best"),
        "weights": (pa.list_(F32), "their weights: lead over the median concept, normalised to sum 1"),
        "margin": (F32, "score of the best minus score of the second"),
        "match": (F32, "share of the patches that match the best concept better than 95 % of random crops do"),
        "meanings": (pa.list_(STR), "the best concept, and the one that adds to it if any"),
        "shares": (pa.list_(F32), "of the patches: what each meaning fits best"),
        "exemplars": (pa.list_(STR), "image ids of the exemplars, strongest first"),
        "round": (I32, "round of refinement in which the unit got this explanation"),
    }
    | NEGATIVE,
    "clusters": {
        "prompt_id": (STR, "prompt about the cluster"),
        "parent": (STR, "concept_id of the phrase that fits it best so far"),
        "phrases": (pa.list_(STR), "phrases that fit its units best so far, the best one first"),
        "layers": (pa.list_(STR), "module path of each of its units"),
        "units": (pa.list_(I32), "channel of each"),
        "gap": (F32, "mean of how much better CLIP could follow the units than their names do, select split"),
    },
    "validation": UNIT
    | {
        "images": (I32, "images of the validate split used"),
        "correlation": (F32, "Pearson, activation against similarity to the phrase, validate split"),
        "lower": (F32, "95 % interval of the correlation, bootstrap over images"),
        "upper": (F32, "95 % interval"),
        "p": (F64, "one-sided p value of the correlation among all permutations of the images, from their moments"),
        "auprc": (
            F32,
            "average precision of the similarity for the unit's top images, above its explain quantile 0.95",
        ),
        "auc": (F32, "chance that a top image is more similar to the name than another image, ties half"),
        "f1": (F32, "the unit's top images against the name's, by similarity: harmonic mean of precision and recall"),
        "iou": (F32, "the same: intersection over union"),
        "mad": (F32, "mean activation on the name's top images less that on the others, in the others' deviations"),
        "rival": (STR, "best other concept on the select split"),
        "rival_gain": (
            F32,
            "how much better the rival correlates there, in standard errors of the difference (Meng et al. 1992)",
        ),
    }
    | NEGATIVE_CONFIDENCE,
    "chance": {
        "layer": (STR, "module path in the target model"),
        "concept": (STR, "short phrase"),
        "correlation": (F32, "what the best few of the layer's units, by chance, reach with it on the validate split"),
    },
    "neurons": UNIT
    | {
        "status": (STR, "explained, ambiguous, unexplained, dead, always_on or special_token_only"),
        "phrase": (STR, "the name; null where there is nothing to name"),
        "concepts": (pa.list_(STR), "best concepts, best first"),
        "weights": (pa.list_(F32), "their weights"),
        "meanings": (pa.list_(STR), "the best concept, and the one that adds to it if any"),
        "shares": (pa.list_(F32), "of the patches: what each meaning fits best"),
        "margin": (F32, "score of the best minus score of the second"),
        "confidence": (F32, "correlation with the phrase on the validate split; null without one"),
        "lower": (F32, "95 % interval of the confidence"),
        "upper": (F32, "95 % interval"),
        "probability": (
            F32,
            "that the name is right, as in drawn worlds; null for units that say nothing and other scorers",
        ),
        "bar": (F32, "what the interval must exceed: what random weights reach with the name, or min_correlation"),
        "q": (F64, "Benjamini-Hochberg over all units of the run; null without a validate split"),
        "exemplars": (pa.list_(STR), "image ids of the exemplars, strongest first"),
    }
    | NEGATIVE
    | NEGATIVE_CONFIDENCE,
    "traits": UNIT
    | {
        "monosemanticity": (
            F32,
            "mean cosine of two images' centred CLIP vectors, weighted by the unit's activation (scaled to 0 to 1) on "
            "both; null where fewer than two images of the explain sample excite it",
        ),
        "clarity": (F32, "the same, unweighted, of its exemplars; null where there are fewer than two"),
        "redundancy": (F32, "largest cosine of the direction in which its images lie with that of another unit"),
        "alike": (I32, "that unit of the layer"),
    },
    "census": {
        "layer": (STR, "module path in the target model"),
        "units": (I32, "its units"),
        "statuses": (pa.list_(STR), "statuses that its units have, the most frequent first"),
        "status_shares": (pa.list_(F32), "share of its units with each"),
        "families": (pa.list_(STR), "families of the names of its explained units, the most frequent first"),
        "family_shares": (pa.list_(F32), "share of its explained units with each"),
        "names": (F32, "distinct names per unit that has one; null where none has"),
        "confidence": (F32, "mean over the units that have one; null where none has"),
        "monosemanticity": (F32, "mean over the units that have one; null where none has"),
        "clarity": (F32, "mean over the units that have one; null where none has"),
        "redundancy": (F32, "mean over the units that have one; null where none has"),
    },
    "coverage": {
        "what": (
            STR,
            "above the null, explained, distinct names, confidence, gain, hub, never used, prompt, round, "
            "near-duplicates or near-duplicate",
        ),
        "layer": (STR, "module path in the target model; null for all layers"),
        "name": (STR, "concept, last line and id of a prompt, round or pair; null where it is about all units"),
        "value": (
            F64,
            "share of the named units; mean confidence, or its gain over another word list; cosine of a pair; "
            "units won per concept of a prompt or round",
        ),
        "units": (I64, "units behind it; for distinct names and near-duplicates, concepts"),
    },
    "drawn": UNIT
    | {
        "phrase": (STR, "the name; units without one have no row"),
        "auc": (
            F32,
            "chance that a fresh scene showing it excites the unit more than one that does not, ties half; "
            "null where the world cannot draw it",
        ),
        "shown": (I32, "scenes drawn that show it; 0 where the world cannot draw it"),
        "absent": (I32, "scenes drawn that do not show it"),
    },
    "truth": UNIT
    | {
        "phrase": (STR, "the name; units whose name the world does not know have no row"),
        "correlation": (
            F32,
            "Pearson, unit activation against 1 where a scene shows the name and else 0, validate split",
        ),
        "auprc": (F32, "average precision with which the activation finds the scenes that show the name"),
        "auc": (F32, "chance that a scene showing it excites the unit more than one that does not, ties half"),
        "f1": (F32, "harmonic mean of precision and recall of the unit's positives against those scenes"),
        "iou": (F32, "intersection over union of the two"),
        "shown": (I32, "scenes of validate that show it"),
        "absent": (I32, "those that do not; scenes of which it is hard to say are in neither"),
    },
    "benchmark": {
        "benchmark": (STR, "planted, final layer, held-out, collisions, controls, stability or annotations"),
        "scorer": (STR, "scorer that gave the names; - for a label that none gave"),
        "subject": (STR, "kind of planted unit, hidden units, final layer, control, ..."),
        "measure": (STR, "what was counted or averaged"),
        "value": (F64, "a share, a mean, or bits"),
        "lower": (F64, "95 % interval; NaN where there is none"),
        "upper": (F64, "95 % interval"),
        "units": (I64, "units behind it"),
    },
    "bench": {
        "name": (STR, "what was measured"),
        "value": (F64, "median over the pairs of the ratio that `what` states"),
        "low": (F64, "least of the pairs"),
        "high": (F64, "largest of the pairs"),
        "target": (F64, "what the value should reach, or where `at_least` is false stay below; null without one"),
        "at_least": (pa.bool_(), "which of the two"),
        "met": (pa.bool_(), "whether it does; null without a target"),
        "base": (F64, "median of what `what` names first, or of the bare models: seconds, MiB or bytes"),
        "ours": (F64, "median of the other"),
        "pairs": (I32, "how often both were measured, in turn"),
        "model": (STR, "name in timm; weights are random"),
        "what": (STR, "the ratio, and of how many images and units"),
        "size": (F64, "images, units, concepts or workers of a point of a cost curve; null elsewhere"),
        "device": (STR, "cpu or cuda"),
        "hardware": (STR, "name of the processor or GPU"),
        "threads": (I32, "torch threads on a CPU"),
        "batch": (I32, "images per model call"),
        "dtype": (STR, "number format of the target model"),
        "date": (STR, "when, UTC"),
        "versions": (STR, "of the libraries"),
    },
    "precision": {
        "dtype": (STR, "number format of the target model"),
        "overlap": (F32, "mean share of the float32 top 20 images that it keeps"),
    },
    "measures": {
        "model": (STR, "model of the drawn world"),
        "measure": (STR, "what was measured, on scenes that the model has not seen"),
        "value": (F64, "a share between 0 and 1"),
    },
    "planted": {"net": (STR, "net of the drawn world")}
    | UNIT
    | {
        "kind": (
            STR,
            "mono, relation, or, and, not, graded, duplicate, noise, dead, always_on, special_token_only or logit",
        ),
        "family": (STR, "family of the first concept; null where there is none"),
        "concepts": (pa.list_(STR), "what makes the unit fire: any of them"),
        "source": (I32, "unit of the layer that a duplicate repeats, else null"),
        "auroc": (F32, "largest activation against the truth on fresh scenes; null where there is no concept"),
    },
    "pages": {
        "layer": (STR, "module path in the target model"),
        "path": (STR, "page below the report folder"),
        "units": (I32, "units on the page"),
    },
} | CAUSES

SCHEMAS = {name: pa.schema([(c, dtype) for c, (dtype, _) in columns.items()]) for name, columns in COLUMNS.items()}


def make_table(name: str, columns: dict) -> pa.Table:
    """Table `name` from arrays or lists by column; every column of the schema must be given, no other."""
    schema = SCHEMAS[name]
    assert set(columns) == set(schema.names), f"{name}: columns {sorted(set(columns) ^ set(schema.names))} do not fit"
    return pa.table({c: _array(columns[c], schema.field(c).type) for c in schema.names}, schema=schema)


class Lists(NamedTuple):
    """A list column: how many values each row has, and the values of all rows in turn."""

    counts: np.ndarray
    values: np.ndarray | pa.Array


def _array(values, dtype: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    if isinstance(values, Lists):
        offsets = np.concatenate([[0], np.cumsum(values.counts)])
        return pa.ListArray.from_arrays(pa.array(offsets, I32), _array(values.values, dtype.value_type))
    if pa.types.is_list(dtype) and getattr(values, "ndim", 1) == 2:
        return _array(Lists(np.full(len(values), values.shape[1]), values.reshape(-1)), dtype)
    return pa.array(values, dtype)


def check(name: str, table: pa.Table, columns: list[str] | None = None) -> pa.Table:
    """The table itself if the columns named (default all) have the schema's types; AssertionError otherwise."""
    schema = SCHEMAS[name]
    wanted = pa.schema([schema.field(c) for c in columns or schema.names])
    assert table.schema.remove_metadata().equals(wanted), f"{name}: expected {wanted}, found {table.schema}"
    return table


def matrix(column: pa.ChunkedArray | pa.Array, width: int | None = None):
    """List column whose rows have one length -> numpy [rows, width]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(array), -1 if width is None else width) if len(array) else flat.reshape(0, width or 0)
