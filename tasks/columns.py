"""Columns that several tables share, and the tables of the stages that switch units off.

In: nothing. Out: by column its Arrow type and one sentence; all other tables are in tasks/tables.py.
"""

import pyarrow as pa

I32, I64, F32, F64, F16 = pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.float16()
STR = pa.string()

IMAGE = {"image": (I32, "number of the image in the probing dataset's stored order")}
IMAGE_ID = {"image_id": (STR, "path below the dataset root, or tar + member, or Parquet file + row")}
UNIT = {"layer": (STR, "module path in the target model"), "unit": (I32, "channel of the layer")}
TAIL = {"tail": (STR, "top (largest activations) or bottom (smallest, for units that go below zero)")}
BOX = {
    "x0": (F32, "left edge in pixels of the upright image"),
    "y0": (F32, "upper edge"),
    "x1": (F32, "right edge, exclusive"),
    "y1": (F32, "lower edge, exclusive"),
}
EMBEDDING = {"embedding": (pa.list_(F16), "CLIP vector of norm 1")}
CONCEPT_ID = {"concept_id": (STR, "hash of the concept")}
NEGATIVE = {
    "negative": (
        STR,
        "concept that follows the unit's negative side best over the explain sample; null where the unit never goes "
        "below zero there, or its layer is rectified (tasks.signs)",
    )
}
NEGATIVE_CONFIDENCE = {
    "negative_confidence": (
        F32,
        "Pearson, negative side (max(0, -lowest activation)) against similarity to what `negative` says, validate "
        "split; null without one",
    )
}
PHRASE = CONCEPT_ID | {
    "concept": (STR, "short phrase"),
    "family": (STR, "colour, texture, pattern, shape, material, part, object, animal, plant, scene, action, ..."),
    "sources": (pa.list_(STR), "where it came from: classes, prompt ids, file"),
    "prompt_id": (STR, "prompt that brought it first; null for word lists"),
    "llm": (STR, "language model that wrote it; null for word lists"),
}
SOURCE = {
    "uri": (STR, "file that holds the bytes"),
    "offset": (I64, "first byte inside a tar, else null"),
    "length": (I64, "number of bytes inside a tar, else null"),
    "row": (I64, "row inside a Parquet file, else null"),
    "label": (STR, "class folder, cls member or label column; null where there is none"),
}
CLASS_INDEX = {"class_index": (I32, "output of the target model; null for an image whose label names no class")}
SCREEN = {"screen": (F32, "mean estimated fall of the logit over the class's select images, to first order")}
DROPS = {
    "images": (I32, "images of the class, validate split"),
    "logit_drop": (F32, "mean fall of the class's logit over them when the unit is switched off"),
    "logit_lower": (F32, "95 % interval over images, Student's t"),
    "logit_upper": (F32, "95 % interval"),
    "accuracy_drop": (F32, "share of them that are no longer right, minus the share that newly are"),
    "accuracy_lower": (F32, "95 % interval over images, Student's t"),
    "accuracy_upper": (F32, "95 % interval"),
    "other_logit_drop": (F32, "mean fall of the own class's logit over as many images of other classes"),
    "other_accuracy_drop": (F32, "the same for their accuracy"),
}

CAUSES: dict[str, dict[str, tuple[pa.DataType, str]]] = {
    "classes": IMAGE
    | CLASS_INDEX
    | {"predicted": (I32, "index of the largest logit; class_index is the same where images have no labels")},
    "screen": UNIT
    | {
        "effect": (pa.list_(F32), "by class of the part's screen_counts: sum over images of activation x gradient"),
        "gradient": (pa.list_(F32), "the same for the gradient alone"),
        "activation": (F64, "sum over images of the mean activation over positions"),
    },
    "screen_counts": CLASS_INDEX | {"images": (I32, "images of the class in the shard's select split")},
    "pairs": {"role": (STR, "pair, control, together or together_control")}
    | {"rank": (I32, "of the pair by its screen, 0 first; of the unit among those of its class switched off together")}
    | UNIT
    | CLASS_INDEX
    | SCREEN
    | {"value": (F32, "what the unit is set to when it is switched off")},
    "ablation": UNIT | CLASS_INDEX | SCREEN | DROPS,
    "cumulative": CLASS_INDEX
    | {
        "units": (I32, "units of the class that are switched off together, the most important ones by the screen"),
        "images": (I32, "images of the class, validate split"),
        "logit": (F32, "mean logit of the class over them"),
        "accuracy": (F32, "share of them whose largest logit is the class's"),
        "control_logit": (F32, "the same with as many random units of the same layers; null where there are too few"),
        "control_accuracy": (F32, "the same"),
    },
    "causes": {"rank": (I32, "0 is the pair with the largest screen")}
    | UNIT
    | {
        "status": (STR, "status of the unit in neurons"),
        "phrase": (STR, "name of the unit; null where there is nothing to name"),
        "class": (STR, "name of the class; null where the model has no names"),
    }
    | CLASS_INDEX
    | SCREEN
    | DROPS
    | {
        "controls": (I32, "random units of the layer that were switched off beside it"),
        "control_logit_drop": (F32, "mean of their logit_drop for the same class; null without any"),
        "control_accuracy_drop": (F32, "mean of their accuracy_drop"),
        "control_share": (F32, "share of them that cost the class less logit, ties half"),
        "cosine": (F32, "CLIP's text cosine of phrase and class name; null where one of them is no concept"),
        "cosine_chance": (F32, "mean text cosine of the phrase to all class names that are concepts"),
    },
    "agreement": {
        "what": (STR, "what was compared, over which rows"),
        "value": (F64, "its value; null where there is too little to compare"),
        "rows": (I32, "pairs or ablated units behind it"),
    },
}
