"""The floors that a comparison holds replacements against: what a map that does nothing sparse reaches.

    zero, mean      the target set to 0, and to its mean over the text
    ridge           the best linear map, from the first run's folder
    mean-jacobian   x -> E[J] x, the constant map nearest to all Jacobians: the mean over as many tokens of the same
                    text as Jacobians are compared at, none of them the same
    skip alone      of each map with a skip connection, the skip, its units held at the mean of what they write

All but the ridge have the mean output that is theirs on the text.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.jacobian import mean_jacobian
from analysis.subjects import SiteText, Subject, count, digest_of, is_run
from molt_lens import LinearMap, Replacement, Standardizer
from molt_lens.folder import CONFIG, check_site, load_replacement
from molt_lens.hosts import Host, Site

TOKENS_AT_A_TIME = 2_048


def controls_of(site: Site, subjects: list[Subject], host: Host, jacobian_tokens: int) -> list[Subject]:
    """The controls of these subjects, which are all of one site.

    Args:
        jacobian_tokens: at which Jacobians are compared; the mean is taken over as many others.

    Raises:
        ValueError: a ridge map that is damaged or of another host.
    """

    def mean_of_jacobians(text: SiteText) -> Replacement:
        return linear(mean_jacobian(host, site, text.beside(jacobian_tokens)).float(), text, text.mean_y)

    d = host.d_model
    controls = [
        Subject("zero", "zero", site, "zero", _zero, control=True, parameters=0),
        Subject("mean of the target", "mean", site, "mean", _mean, control=True, parameters=d),
        Subject(
            "mean Jacobian",
            "mean-jacobian",
            site,
            f"mean beside {jacobian_tokens}",
            mean_of_jacobians,
            control=True,
            parameters=d * d + d,
        ),
    ]
    folders = [Path(subject.name) / "ridge" for subject in subjects if is_run(subject.name)]
    if found := [folder for folder in folders if (folder / CONFIG).is_file()]:
        controls.append(_ridge(found[0], host))
    return controls + [_skip_alone(subject, d * d + d) for subject in subjects if "skip" in subject.kind]


def deviations(controls: list[Subject], text: SiteText) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_out"]]:
    """Of input and target, which standardised coordinates divide by: the ridge map's, which the first run was trained
    with, or without a run the text's own."""
    if ridge := ridge_among(controls):
        made = ridge.make(text)
        return made.input.std, made.output.std
    standardizers = []
    for acts in (text.sample.x, text.sample.y):
        standardizers.append(Standardizer(acts.shape[1]).to(acts.device))
        standardizers[-1].set(acts.mean(0), acts.std(0))
    return standardizers[0].std, standardizers[1].std


def ridge_among(controls: list[Subject]) -> Subject | None:
    return next((control for control in controls if control.kind == "ridge"), None)


def _ridge(folder: Path, host: Host) -> Subject:
    try:
        ridge, record = load_replacement(folder)
        check_site(record, host)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    ridge = ridge.to(host.device)
    return Subject(
        "ridge",
        "ridge",
        record.site,
        digest_of(ridge),
        lambda _: ridge,
        control=True,
        parameters=count(ridge),
        config={"folder": str(folder)},
    )


def _skip_alone(subject: Subject, parameters: int) -> Subject:
    def make(text: SiteText) -> Replacement:
        whole = subject.make(text)
        skip = whole.map.W_skip
        assert skip is not None
        # In raw coordinates.
        matrix = skip * whole.output.std[:, None] / whole.input.std
        with torch.no_grad():
            written = torch.stack([whole(x.float()).double().sum(0) for x in text.sample.x.split(TOKENS_AT_A_TIME)])
        return linear(matrix, text, (written.sum(0) / len(text.sample.x)).float())

    return Subject(
        f"{subject.name}, its skip alone",
        f"{subject.kind}, skip alone",
        subject.site,
        f"skip of {subject.key}",
        make,
        control=True,
        gate=subject.gate,
        parameters=parameters,
        seed=subject.seed,
        config=subject.config,
    )


def _zero(text: SiteText) -> Replacement:
    return linear(None, text, torch.zeros_like(text.mean_y))


def _mean(text: SiteText) -> Replacement:
    return linear(None, text, text.mean_y)


@torch.no_grad()
def linear(matrix: Float[Tensor, "d_out d_in"] | None, text: SiteText, mean: Float[Tensor, " d_out"]) -> Replacement:
    """x -> matrix (x - mean of x) + mean in raw coordinates; without a matrix the constant."""
    x = text.sample.x
    map = LinearMap(x.shape[1], len(mean)).to(x.device)
    assert map.W_skip is not None
    map.b_dec.copy_(mean)
    map.centre.copy_(x.double().mean(0))
    if matrix is not None:
        map.W_skip.copy_(matrix)
    return Replacement(map).to(x.device).eval()
