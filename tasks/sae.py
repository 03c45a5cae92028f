"""Latents of sparse autoencoders as units.

In: a safetensors file with an encoder, attached to the output of a module. Out: the activation of every latent at every
position, made for the latents that are asked for: all of them at once are too many to hold (32,768 latents at 197
tokens of 32 images are 826 MB).

The names of the tensors are those of the usual libraries: W_enc [D, L] or encoder.weight [L, D]; b_enc, encoder.bias
or latent_bias [L]; pre_bias or b_pre [D], subtracted first; W_dec [L, D] or decoder.weight [D, L]; b_dec or
decoder.bias [D], subtracted first only if something says so, because libraries differ; threshold [L] or one number for
JumpReLU (Rajamanoharan et al. 2024). How the encoder works is told by, in this order: layers.sae, a cfg.json beside the
file, the metadata in the file, its tensors.

Shapes: D channels of the module's output, L latents.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import fsspec
import safetensors.torch
import torch
import torch.nn.functional as F

AT_ONCE = 2048
"""Latents whose activations are made at once where many are looked through."""
ACTIVATIONS = ("relu", "topk", "jumprelu")
FOREIGN = ("b_gate", "gate_bias", "r_mag", "b_mag", "mag_bias", "log_threshold")
"""Tensors without which an encoder that has them does something else."""
PLAIN = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "rescale_acts_by_decoder_norm": (False, None),
}
"""What a cfg.json may say of further steps, which are not done here."""

Units = slice | torch.Tensor
"""Numbers of units: a slice, or int64 [n]."""


@dataclass
class SaeSettings:
    activation: str | None = None
    """relu, topk or jumprelu."""
    k: int | None = None
    """Of topk: latents that are kept at each position."""
    threshold: float | None = None
    """Of jumprelu, where the file has none: latents at or below it are zero."""
    centred: bool | None = None
    """Whether the decoder's bias is subtracted from the input first."""

    def __post_init__(self) -> None:
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(f"layers.sae.activation={self.activation}: allowed are {', '.join(ACTIVATIONS)}")
        if self.k is not None and self.k < 1:
            raise ValueError(f"layers.sae.k={self.k}: must be at least 1")


@dataclass
class SaeFile:
    """Where an SAE lies, and what it is."""

    path: str
    settings: SaeSettings
    digest: str
    decodes: bool
    """Whether it has the decoder by which a latent can be switched off."""


@dataclass
class Sae:
    """Its tensors are float32."""

    encoder_LD: torch.Tensor
    bias_L: torch.Tensor
    centre_D: torch.Tensor
    decoder_LD: torch.Tensor | None
    threshold: torch.Tensor | None
    """[L] or one number; None: relu or topk."""
    k: int | None
    """None: relu or jumprelu."""
    digest: str
    """Of the file's bytes and how its encoder works."""

    channels_first: bool = False
    """Whether the channels of the module's output are its second dimension; else they are its last."""

    def to(self, device: torch.device, channels_first: bool) -> "Sae":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved, channels_first=channels_first)

    def read(self, x: torch.Tensor) -> "Latents":
        """Of a module's output."""
        return Latents(self, x.movedim(1, -1) if self.channels_first else x)

    def along(self, x: torch.Tensor, gradient: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """A few latents after the other, their activations [..., n] and the gradients along their decoder's directions.

        x and gradient [..., D] are of places of the module's output, channels last.
        """
        assert self.decoder_LD is not None
        latents = Latents(self, x)
        for start in range(0, len(self.bias_L), AT_ONCE):
            units = slice(start, start + AT_ONCE)
            yield units, latents.of(units), gradient.float() @ self.decoder_LD[units].T

    def put(self, x: torch.Tensor, units: list[int], values: torch.Tensor) -> None:
        """Move x [..., D], places of the module's output, along the decoder's directions of the latents, in place, by
        what their activations lack to these values: zero takes out what a latent adds."""
        assert self.decoder_LD is not None
        chosen = torch.tensor(units, device=x.device)
        x += ((values - Latents(self, x).of(chosen)) @ self.decoder_LD[chosen]).to(x.dtype)


class Latents:
    """Activations of an SAE over one output of its module, made when units are asked for."""

    def __init__(self, sae: Sae, x: torch.Tensor) -> None:
        """x [..., D]: channels last."""
        self.sae, self.x = sae, x.float() - sae.centre_D
        self.strongest = self._strongest(sae.k) if sae.k else None
        self.last: tuple[slice, torch.Tensor] | None = None

    def __getitem__(self, units: Units) -> torch.Tensor:
        """float32, the module's output with the latents `units` in place of its channels."""
        found = self.of(units)
        return found.movedim(-1, 1) if self.sae.channels_first else found

    def of(self, units: Units) -> torch.Tensor:
        """float32 [..., n]."""
        if isinstance(units, torch.Tensor):
            return self._made(units)
        if self.last is None or self.last[0] != units:  # maps and prefix maps ask for the same ones
            self.last = (units, self._made(units))
        return self.last[1]

    def _made(self, units: Units) -> torch.Tensor:
        return self._dense(units) if self.strongest is None else self._sparse(units, *self.strongest)

    def _inputs(self, units: Units) -> torch.Tensor:
        return F.linear(self.x, self.sae.encoder_LD[units], self.sae.bias_L[units])

    def _dense(self, units: Units) -> torch.Tensor:
        found, threshold = self._inputs(units).relu_(), self.sae.threshold
        return found if threshold is None else found.mul_(found > threshold.expand(len(self.sae.bias_L))[units])

    def _strongest(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest inputs to the latents of each position, none below zero, and their numbers: [..., k] each."""
        values, numbers = [], []
        for start in range(0, len(self.sae.bias_L), AT_ONCE):
            inputs = self._inputs(slice(start, start + AT_ONCE))
            found = inputs.topk(min(k, inputs.shape[-1]), dim=-1)
            values, numbers = [*values, found.values], [*numbers, found.indices + start]
            top = torch.cat(values, -1).topk(min(k, sum(v.shape[-1] for v in values)), dim=-1)
            values, numbers = [top.values], [torch.cat(numbers, -1).gather(-1, top.indices)]
        return values[0].relu(), numbers[0]

    def _sparse(self, units: Units, values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        column = torch.full((len(self.sae.bias_L),), -1, device=values.device)
        count = len(column[units])
        column[units] = torch.arange(count, device=values.device)
        found = torch.zeros(*values.shape[:-1], count + 1, device=values.device)
        return found.scatter_(-1, column[numbers] % (count + 1), values)[..., :count]  # all others into the last


def load_sae(path: str, settings: SaeSettings) -> Sae:
    """Raises ValueError, naming the key, for what is no safetensors, has no encoder or leaves open how it works."""
    key = f"layers.saes: {path}"
    try:
        with cast(fsspec.core.OpenFile, fsspec.open(path, "rb")) as file:
            data = file.read()
        tensors = safetensors.torch.load(data)
        said = {"k": int(tensors["k"])} if "k" in tensors else {}
        said |= _metadata(data) | _config(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{key}: no SAE in safetensors: {' '.join(str(error).split())[:300]}") from None
    tensors = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    steps = [name for name, allowed in PLAIN.items() if said.get(name) not in allowed]
    for name in [*(name for name in FOREIGN if name in tensors), *steps]:
        raise ValueError(f"{key}: has {name}; allowed are encoders of one linear layer and {', '.join(ACTIVATIONS)}")
    how = _how(key, said, settings, tensors)
    weight = _one(tensors, ("W_enc", "encoder.weight"))
    if weight is None or weight.ndim != 2:
        raise ValueError(f"{key}: has no matrix W_enc or encoder.weight; its tensors are {', '.join(sorted(tensors))}")
    encoder_LD = weight.T.contiguous() if "W_enc" in tensors else weight
    num, width = encoder_LD.shape
    decoder = tensors["decoder.weight"].T if "decoder.weight" in tensors else tensors.get("W_dec")
    centre = _one(tensors, ("pre_bias", "b_pre", *(("b_dec", "decoder.bias") if how.centred else ())))
    bias = _one(tensors, ("b_enc", "encoder.bias", "latent_bias"))
    threshold = None
    if how.activation == "jumprelu":
        threshold = tensors.get("threshold", torch.tensor(how.threshold or 0.0))
    for name, tensor, shapes in (
        ("encoder's bias", bias, ((num,),)),
        ("bias before the encoder", centre, ((width,),)),
        ("decoder", decoder, ((num, width),)),
        ("threshold", threshold, ((num,), (1,), ())),
    ):
        if tensor is not None and tuple(tensor.shape) not in shapes:
            expected = f"the encoder reads {width} channels and has {num} latents"
            raise ValueError(f"{key}: the {name} has shape {list(tensor.shape)}, but {expected}")
    digest = hashlib.sha256(data)
    digest.update(json.dumps(asdict(how)).encode())
    bias = torch.zeros(num) if bias is None else bias
    centre = torch.zeros(width) if centre is None else centre
    return Sae(encoder_LD, bias, centre, decoder, threshold, how.k, digest.hexdigest())


def _one(tensors: dict[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor | None:
    return next((tensors[name] for name in names if name in tensors), None)


def _metadata(data: bytes) -> dict[str, Any]:
    """Texts in the header of a safetensors file, read as JSON where they are."""
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, text in json.loads(data[8 : 8 + length]).get("__metadata__", {}).items():
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _config(path: str) -> dict[str, Any]:
    """The cfg.json in the file's folder, as SAELens and sparsify write it; empty where there is none."""
    try:
        with cast(fsspec.core.OpenFile, fsspec.open("/".join([*path.split("/")[:-1], "cfg.json"]), "rt")) as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def _how(key: str, said: dict[str, Any], settings: SaeSettings, tensors: dict[str, torch.Tensor]) -> SaeSettings:
    """Everything about the encoder that its tensors do not say, decided. Raises ValueError where nothing tells it."""
    k = settings.k or said.get("k") or (said.get("activation_fn_kwargs") or {}).get("k")
    threshold = settings.threshold if settings.threshold is not None else said.get("threshold")
    jumps = "threshold" in tensors or threshold is not None
    stated = [said.get(name) for name in ("architecture", "activation", "activation_fn", "activation_fn_str")]
    activation = next((a for a in (settings.activation, *stated) if a not in (None, "standard")), None)
    activation = "relu" if activation is None and "standard" in stated else activation
    if activation is None and k and jumps:
        allowed = ", ".join(ACTIVATIONS)
        raise ValueError(f"layers.sae.activation is missing: {key} has both k and a threshold; allowed are {allowed}")
    activation = str(activation or ("topk" if k else "jumprelu" if jumps else "relu")).lower()
    if activation not in ACTIVATIONS:
        raise ValueError(f"{key}: its activation function is {activation}; allowed are {', '.join(ACTIVATIONS)}")
    if activation == "topk" and not (isinstance(k, int) and k > 0):
        raise ValueError(f"layers.sae.k is missing: {key} does not say how many latents it keeps; allowed is 1 or more")
    if activation == "jumprelu" and not jumps:
        raise ValueError(f"layers.sae.threshold is missing: {key} has no threshold; allowed is any number")
    centred = settings.centred if settings.centred is not None else said.get("apply_b_dec_to_input")
    decoder = _one(tensors, ("b_dec", "decoder.bias"))
    undecided = decoder is not None and bool(decoder.any()) and not {"pre_bias", "b_pre"} & set(tensors)
    if centred is None and undecided:
        what = "does not say whether the decoder's bias is subtracted from its input"
        raise ValueError(f"layers.sae.centred is missing: {key} {what}; allowed are true, false")
    return SaeSettings(
        activation,
        k if activation == "topk" else None,
        float(threshold) if activation == "jumprelu" and threshold is not None else None,
        bool(centred),
    )
