"""Ids that training can not have used, found without being told: the reference that the indicators need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.core.numbers import number
from workbench.glitch.ranking.weights import Matrix
from workbench.glitch.vocabulary.tokenizer import IMPOSSIBLE_BYTES, Vocabulary

MIN_MEMBERS = 3
MIN_MEDOID_COSINE = 0.95
"""Cosine to the group's medoid above which a member stays: rows that never were a target drift along one direction."""
MIN_AGREEMENT_COSINE = 0.9
"""Cosine between the means of two groups from which on they confirm each other."""
MAX_RELATIVE_DISTANCE = 0.01
"""Relative distance below which two classes of identical rows are one group: one step of 8-bit quantisation."""
MAX_ORDINARY_SHARE = 0.25
"""Share of ordinary tokens as close to the medoid as its members from which on closeness says nothing."""
_N_SAMPLED = 1024


@dataclass(frozen=True, kw_only=True)
class ReferenceGroup:
    """Ids that share a reason to be unused, and whether their rows bear it out.

    Attributes:
        found: number of ids found (rows without a direction, zero or not finite, left out).
        members: the ids that stayed after trimming to those close to the medoid; the reference if `trusted`.
        cosine: median cosine of the members to their medoid.
        ordinary: share of ordinary tokens that lie as close to the medoid as a member must.
    """

    name: str
    why: str
    found: int
    members: tuple[int, ...]
    cosine: float
    ordinary: float
    trusted: bool
    verdict: str


@dataclass(frozen=True)
class Reference:
    """The choice among the groups; `name` is None if none can be trusted.

    The agreement is the cosine between the means of each pair of trusted groups, with the number of ids in both.
    """

    name: str | None
    members: tuple[int, ...]
    why: str
    groups: tuple[ReferenceGroup, ...]
    agreement: tuple[tuple[str, str, float, int], ...]


def propose(
    vocabulary: Vocabulary, n_rows: int, duplicates: Sequence[Sequence[int]]
) -> dict[str, tuple[str, list[int]]]:
    """Groups of ids that may be unused: name -> (how found, ids).

    `duplicates` are clusters of ids with (nearly) the same row, largest first.
    """
    ids = np.arange(min(len(vocabulary), n_rows))
    byte, category = vocabulary.byte[: len(ids)], np.asarray(vocabulary.category)[: len(ids)]
    reserved = vocabulary.reserved[: len(ids)]
    impossible = np.isin(byte, list(IMPOSSIBLE_BYTES))
    unreachable = np.char.startswith(category, "unreachable") | (category == "dropped")
    gaps = ids[category == "no_token"].tolist()
    groups = {
        "padding rows": ("rows of the matrix without a token", gaps + list(range(len(ids), n_rows))),
        "unused bytes": ("bytes that text never holds or that the tokenizer never gives",
                         ids[(byte >= 0) & (impossible | unreachable)].tolist()),
        "reserved names": ("named as unused, reserved or placeholder", ids[reserved].tolist()),
        "identical rows": ("the largest set of rows that are bit-identical or within one step of quantisation",
                           sorted(duplicates[0]) if duplicates else []),
        "unreachable tokens": ("tokens that no text encodes to", ids[unreachable & (byte < 0)].tolist()),
        "special tokens": ("marked special; those that training used are trimmed away",
                           ids[(category == "special") & ~reserved].tolist()),
    }  # fmt: skip
    return {name: (why, found) for name, (why, found) in groups.items() if found}


def judge(
    name: str, why: str, ids: Sequence[int], E_out: Matrix, usable: np.ndarray,
    ordinary: Float[Tensor, "rows d_model"], mean: Float[Tensor, " d_model"],
) -> ReferenceGroup:  # fmt: skip
    """Trims a group to its tight core and says whether it can be a reference.

    The core is what lies within cosine `MIN_MEDOID_COSINE` of the member with the most such neighbours (mode seeking,
    since groups such as the specials mix trained and untrained ids). It is trusted if it has `MIN_MEMBERS`, at most
    `MAX_ORDINARY_SHARE` of the `ordinary` rows lie as close (in a model whose rows all point the same way, closeness
    says nothing), and it is not just the `mean` of all rows, which is what resizing a vocabulary after training fills
    new rows with.
    """
    kept = [i for i in ids if usable[i]]
    if len(kept) < MIN_MEMBERS:
        return ReferenceGroup(
            name=name, why=why, found=len(kept), members=(), cosine=float("nan"), ordinary=float("nan"), trusted=False,
            verdict=f"{len(kept)} usable rows; needs {MIN_MEMBERS}",
        )  # fmt: skip
    sample = kept[:: -(-len(kept) // _N_SAMPLED)]
    unit = torch.nn.functional.normalize(E_out.rows(sample), dim=1)
    medoid = unit[int((unit @ unit.T > MIN_MEDOID_COSINE).sum(1).argmax())]
    every = torch.nn.functional.normalize(E_out.rows(kept), dim=1) @ medoid
    members = tuple(i for i, cosine in zip(kept, every.tolist(), strict=True) if cosine > MIN_MEDOID_COSINE)
    near = float((torch.nn.functional.normalize(ordinary, dim=1) @ medoid > MIN_MEDOID_COSINE).float().mean())
    cosine = float(every[every > MIN_MEDOID_COSINE].median())
    fault = None
    if len(members) < MIN_MEMBERS:
        fault = f"not tight: only {len(members)} of {len(kept)} rows lie together"
    elif near > MAX_ORDINARY_SHARE:
        fault = f"not distinct: a share of {number(near)} of ordinary tokens lies as close"
    elif bool(torch.dist(E_out.rows(members).mean(0), mean) < MAX_RELATIVE_DISTANCE * mean.norm()):
        fault = f"not evidence: the {len(members)} rows are the mean of all rows, as rows added after training are"
    verdict = fault or f"tight: {len(members)} of {len(kept)} rows at median cosine {number(cosine)}"
    return ReferenceGroup(
        name=name, why=why, found=len(kept), members=members, cosine=cosine, ordinary=near, trusted=fault is None,
        verdict=verdict,
    )  # fmt: skip


def choose(groups: Sequence[ReferenceGroup], E_out: Matrix) -> Reference:
    """Picks the reference: the tightest group of the largest set of groups that agree; nobody if that is a draw."""
    trusted = [group for group in groups if group.trusted]
    if not trusted:
        why = "no group of unused ids is tight and distinct" if groups else "the model has no ids known to be unused"
        return Reference(None, (), why, tuple(groups), ())
    means = torch.nn.functional.normalize(torch.stack([E_out.rows(g.members).double().mean(0) for g in trusted]), dim=1)
    cosine = means @ means.T
    pairs = tuple(
        (a.name, b.name, float(cosine[i, j]), len(set(a.members) & set(b.members)))
        for i, a in enumerate(trusted) for j, b in enumerate(trusted) if i < j
    )  # fmt: skip
    friends = (cosine > MIN_AGREEMENT_COSINE).sum(1)
    camp = cosine[int(friends.argmax())] > MIN_AGREEMENT_COSINE
    rivals = [i for i in range(len(trusted)) if not camp[i]]
    if rivals and int(friends[rivals].max()) == int(friends.max()):
        text = ", ".join(f"{a} and {b}: {number(c)}" for a, b, c, _ in pairs)
        return Reference(None, (), f"the groups disagree (cosine of {text})", tuple(groups), pairs)
    allies = [trusted[i] for i in range(len(trusted)) if camp[i]]
    chosen = max(allies, key=lambda group: (round(group.cosine, 3), len(group.members)))
    others = [group.name for group in allies if group is not chosen]
    why = f"{chosen.name} ({chosen.verdict}); " + (
        f"confirmed by {', '.join(others)}" if others else "no second group was there to confirm it"
    )
    if rivals:
        why += f"; {', '.join(trusted[i].name for i in rivals)} point elsewhere and were set aside"
    return Reference(chosen.name, chosen.members, why, tuple(groups), pairs)


def given(ids: Sequence[int], usable: np.ndarray) -> Reference:
    """A reference named by the user, taken as it is."""
    bad = [i for i in ids if not 0 <= i < len(usable) or not usable[i]]
    if bad or not ids:
        raise InvalidInputError(
            f"reference={list(ids)[:8]}: {len(bad)} of {len(ids)} ids have no usable row ({bad[:8]}; the matrix has "
            f"{len(usable)} rows, {int((~usable).sum())} of them zero or not finite). Name ids of unused tokens."
        )
    return Reference("given", tuple(sorted(set(ids))), f"{len(set(ids))} ids given by the user; not checked", (), ())


def merge_duplicates(classes: Sequence[Sequence[int]], E_out: Matrix) -> tuple[tuple[int, ...], ...]:
    """Clusters of identical classes whose rows differ by no more than `MAX_RELATIVE_DISTANCE`, largest first.

    Quantisation splits rows that were equal into classes one step apart, so exact equality alone would miss the group.
    """
    if not classes:
        return ()
    order = sorted(classes, key=lambda ids: (-len(ids), ids[0]))[:_N_SAMPLED]
    rows = E_out.rows([ids[0] for ids in order])
    near = torch.cdist(rows, rows) <= MAX_RELATIVE_DISTANCE * rows.norm(dim=1, keepdim=True)
    clusters: list[tuple[int, ...]] = []
    left = set(range(len(order)))
    while left:
        joined = [j for j in left if j == min(left) or bool(near[min(left), j])]
        left -= set(joined)
        clusters.append(tuple(sorted(i for j in joined for i in order[j])))
    return tuple(sorted(clusters, key=lambda ids: (-len(ids), ids[0])))
