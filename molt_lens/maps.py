"""Every kind of sparse map by its name: from a saved config, or with as many parameters as a MOLT of size N."""

from typing import Any, Literal, get_args

from molt_lens.linear import LinearMap
from molt_lens.molt import Molt
from molt_lens.mxd import MixtureOfDecoders
from molt_lens.sparse_map import SparseMap
from molt_lens.transcoder import FEATURES_PER_N, Transcoder

Kind = Literal["molt", "molt-skip", "transcoder", "skip-transcoder", "mxd", "linear"]

CLASSES: dict[str, type[SparseMap]] = {c.kind: c for c in (Molt, Transcoder, MixtureOfDecoders, LinearMap)}


def make_map(config: dict[str, Any]) -> SparseMap:
    """The untrained map that `SparseMap.config` describes.

    Raises:
        ValueError: no such kind, or settings that it does not have or cannot have.
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind not in CLASSES:
        raise ValueError(f"no map is of the kind {kind!r}: expected {', '.join(CLASSES)}")
    if "ladder" in settings:
        settings["ladder"] = tuple((rank, count) for rank, count in settings["ladder"])
    try:
        return CLASSES[kind](**settings)
    except TypeError as error:
        raise ValueError(f"these are not the settings of a {kind}: {error}") from error


def matched_map(kind: Kind, d_in: int, d_out: int, *, n: int, gate: str) -> SparseMap:
    """An untrained map with the parameters of a MOLT of size `n`; a skip connection comes on top.

    A transcoder has round(2573 n) features. A mixture of decoders shares that number between its hidden layer, at most
    4 d_out wide as its authors have it, and its experts.

    Raises:
        ValueError: no such kind, or a gate that does not fit the number of units.
    """
    n_features = round(FEATURES_PER_N * n)
    match kind:
        case "molt" | "molt-skip":
            return Molt(d_in, d_out, n=n, gate=gate, skip=kind == "molt-skip")
        case "transcoder" | "skip-transcoder":
            return Transcoder(d_in, d_out, n_features=n_features, gate=gate, skip=kind == "skip-transcoder")
        case "mxd":
            hidden = min(4 * d_out, n_features // 2)
            return MixtureOfDecoders(d_in, d_out, n_experts=n_features - hidden, hidden=hidden, gate=gate)
        case "linear":
            return LinearMap(d_in, d_out)
    raise ValueError(f"no map is of the kind {kind!r}: expected {', '.join(get_args(Kind))}")
