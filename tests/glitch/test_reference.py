from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.glitch.tiny_vocab import N_UNUSED, byte_level, matrix
from workbench.core.codec import FastCodec
from workbench.core.errors import InvalidInputError
from workbench.glitch.ranking import reference, weights
from workbench.glitch.vocabulary.tokenizer import analyse

VOCABULARY = analyse(FastCodec.of(byte_level()))
N = len(VOCABULARY)
RESERVED = np.flatnonzero(VOCABULARY.reserved).tolist()
PADDING = list(range(N, N + 5))
IMPOSSIBLE = np.flatnonzero(np.isin(VOCABULARY.byte, [0xC0, 0xC1, *range(0xF5, 0x100)])).tolist()


def _choose(rows: torch.Tensor) -> reference.Reference:
    E_out = weights._of_tensor("rows", rows)
    proposed = reference.propose(VOCABULARY, len(rows), [])
    usable = np.asarray(torch.isfinite(rows).all(1) & (rows.norm(dim=1) > 0))
    ordinary = rows[np.flatnonzero(VOCABULARY.is_category("ok") & ~VOCABULARY.reserved)]
    return reference.choose(
        [
            reference.judge(name, why, ids, E_out, usable, ordinary, rows[usable].mean(0))
            for name, (why, ids) in proposed.items()
        ],
        E_out,
    )


def test_groups_are_proposed_from_the_tokenizer_and_the_shape() -> None:
    proposed = reference.propose(VOCABULARY, N + 5, [[3, 9, 4], [1, 2]])
    assert proposed["padding rows"][1] == PADDING
    assert proposed["unused bytes"][1] == IMPOSSIBLE and len(IMPOSSIBLE) == 13
    assert proposed["reserved names"][1] == RESERVED and len(RESERVED) == N_UNUSED
    assert proposed["identical rows"][1] == [3, 4, 9]


def test_agreeing_groups_confirm_each_other() -> None:
    chosen = _choose(matrix(N + 5, [*RESERVED, *PADDING, *IMPOSSIBLE]))
    assert chosen.name in ("padding rows", "reserved names", "unused bytes")
    assert "confirmed by" in chosen.why and all(cosine > 0.99 for _, _, cosine, _ in chosen.agreement)
    assert len(chosen.agreement) == 3


def test_a_group_whose_rows_were_trained_is_not_trusted() -> None:
    chosen = _choose(matrix(N + 5, PADDING))
    assert chosen.name == "padding rows" and "no second group" in chosen.why
    judged = {group.name: group for group in chosen.groups}
    assert not judged["reserved names"].trusted and "not tight" in judged["reserved names"].verdict


def test_trained_members_are_trimmed_away() -> None:
    chosen = _choose(matrix(N, RESERVED[:4]))
    assert (chosen.name, list(chosen.members)) == ("reserved names", RESERVED[:4])


def test_nothing_tight_means_no_reference() -> None:
    assert _choose(matrix(N + 5, [])).name is None


def test_groups_that_disagree_mean_no_reference() -> None:
    rows = matrix(N + 5, RESERVED)
    rows[PADDING] = matrix(5, list(range(5)), seed=9)
    chosen = _choose(rows)
    assert chosen.name is None and "disagree" in chosen.why


def test_two_against_one_sets_the_one_aside() -> None:
    rows = matrix(N + 5, [*RESERVED, *IMPOSSIBLE])
    rows[PADDING] = matrix(5, list(range(5)), seed=9)
    chosen = _choose(rows)
    assert chosen.name in ("reserved names", "unused bytes") and "padding rows point elsewhere" in chosen.why


def test_closeness_says_nothing_where_all_rows_are_close() -> None:
    rows = matrix(N + 5, RESERVED) * 0.05 + torch.ones(24)
    assert _choose(rows).name is None


def test_zero_rows_have_no_direction() -> None:
    rows = matrix(N + 5, RESERVED)
    rows[PADDING] = 0.0
    chosen = _choose(rows)
    assert chosen.name == "reserved names"
    assert {group.name: group.found for group in chosen.groups}["padding rows"] == 0


def test_a_given_reference_must_have_rows() -> None:
    usable = np.array([True, False, True])
    assert reference.given([2, 0, 2], usable).members == (0, 2)
    for ids in ([1], [3], [-1], []):
        with pytest.raises(InvalidInputError, match="reference="):
            reference.given(ids, usable)


def test_rows_that_resizing_added_are_no_reference() -> None:
    rows = matrix(N + 5, [*RESERVED, *IMPOSSIBLE])
    generator = torch.Generator().manual_seed(3)
    rows[PADDING] = rows[:N].mean(0) * (1 + 1e-3 * torch.randn(5, 24, generator=generator))
    chosen = _choose(rows)
    judged = {group.name: group for group in chosen.groups}
    assert not judged["padding rows"].trusted and "mean of all rows" in judged["padding rows"].verdict
    assert chosen.name in ("reserved names", "unused bytes") and "point elsewhere" not in chosen.why
    rows[[*RESERVED, *IMPOSSIBLE]] = matrix(N + 5, [], seed=4)[[*RESERVED, *IMPOSSIBLE]]
    rows[PADDING] = rows[:N].mean(0)
    assert _choose(rows).name is None


@pytest.mark.parametrize(
    ("name", "reserved"),
    [
        ("<|vision_reserved_special_token_7|>", True), ("<madeupword3>", True), (">>UNUSED_22<<", True),
        ("<｜place▁holder▁no▁0｜>", True), ("[PAD151936]", True), ("<|extra_id_3|>", True), ("<|placeholder1|>", True),
        ("<pad>", False), ("<|im_start|>", False), ("<0x41>", False), ("[toxicity=0]", False), ("<special>", False),
    ],
)  # fmt: skip
def test_reserved_names_of_known_families(name: str, reserved: bool) -> None:
    from tokenizers import AddedToken

    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(name, special=False)])
    vocabulary = analyse(FastCodec.of(tokenizer))
    assert vocabulary.reserved[tokenizer.token_to_id(name)] == reserved
