from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.glitch.tiny_copy import AT, LONG_IDS, SHORT_IDS, N, Parrot, wordy_model
from tests.glitch.tiny_vocab import WORDS
from tests.tiny import FP32_LOGITS, tiny_model
from workbench.core.codec import codec_of
from workbench.core.errors import DegenerateInputError, MismatchError
from workbench.core.tokens import TokenBatch
from workbench.glitch.verification import probing
from workbench.glitch.verification.probing import SHORT, SHORT_FILE, Prober, choose_dtype
from workbench.glitch.verification.prompts import prompt_set
from workbench.glitch.verification.scoring import greedy_logits
from workbench.glitch.vocabulary.tokenizer import Vocabulary, analyse
from workbench.models.model import Model

IDS = np.array([AT(word) for word in WORDS])
BAD = {int(IDS[0]): 0.001, int(IDS[1]): 0.009}


def _prober(parrot: Parrot, folder: Path | None = None, batch_size: int = 4, **options: object) -> Prober:
    options.setdefault("confirm", LONG_IDS)
    return Prober(parrot, SHORT_IDS, N, folder=folder, batch_size=batch_size, **options)  # type: ignore[arg-type]


def test_the_short_prompt_costs_a_few_positions_and_differs_between_tokens_in_one_place() -> None:
    assert len(SHORT_IDS.slots) == 1
    assert len(SHORT_IDS.ids) - SHORT_IDS.shared < 12 < SHORT_IDS.shared
    a, b = SHORT_IDS.fill(torch.from_numpy(IDS[:2]))
    assert (a != b).nonzero().flatten().tolist() == [SHORT_IDS.shared]


def test_every_token_gets_the_short_prompt_and_only_failing_ones_the_others() -> None:
    parrot = Parrot(BAD)
    best = _prober(parrot).best_probabilities(IDS)
    assert best.tolist() == pytest.approx([BAD.get(int(i), 0.5) for i in IDS], rel=1e-4)
    assert parrot.tokens_run(len(SHORT_IDS.ids)) == IDS.tolist()
    for made in LONG_IDS:
        assert set(parrot.tokens_run(len(made.ids))) == set(BAD)


def test_a_token_that_a_longer_prompt_gets_out_of_the_model_is_no_glitch_token() -> None:
    class Late(Parrot):
        def logits(self, batch: TokenBatch, keep: str = "all") -> Tensor:
            self.says = {int(IDS[0]): 0.001 if batch.ids.shape[1] == len(SHORT_IDS.ids) else 0.7}
            return super().logits(batch, keep)

    prober = _prober(Late({}))
    assert not prober.is_glitch(IDS).any()
    assert prober.short[IDS[0]] == pytest.approx(0.001, rel=1e-3) and prober.best[IDS[0]] == pytest.approx(0.7)
    alone = _prober(Late({}), confirm=())
    assert alone.is_glitch(IDS).tolist() == [True] + [False] * (len(IDS) - 1)


def test_repeated_and_known_ids_are_not_run_again() -> None:
    parrot = Parrot(BAD)
    prober = _prober(parrot)
    twice = prober.best_probabilities(np.concatenate([IDS[:3], IDS[:3]]))
    assert twice[:3].tolist() == twice[3:].tolist()
    run = len(parrot.rows)
    prober.best_probabilities(IDS[:3])
    assert len(parrot.rows) == run


@pytest.mark.parametrize("stop_after", [5, 12, 15])
def test_an_interrupt_loses_at_most_one_batch(tmp_path: Path, stop_after: int) -> None:
    parrot = Parrot(BAD)
    parrot.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        _prober(parrot, tmp_path).best_probabilities(IDS)
    before = parrot.tokens_run(len(SHORT_IDS.ids))
    parrot.stop_after, parrot.rows = None, []
    best = _prober(parrot, tmp_path).best_probabilities(IDS)
    assert best.tolist() == pytest.approx([BAD.get(int(i), 0.5) for i in IDS], rel=1e-4)
    assert parrot.tokens_run(len(SHORT_IDS.ids)) == [i for i in IDS.tolist() if i not in before]
    parrot.rows = []
    assert _prober(parrot, tmp_path).best_probabilities(IDS).tolist() == best.tolist() and not parrot.rows


def test_a_line_that_a_kill_cut_off_is_run_again(tmp_path: Path) -> None:
    parrot = Parrot(BAD)
    _prober(parrot, tmp_path).best_probabilities(IDS)
    file = tmp_path / SHORT_FILE
    file.write_bytes(file.read_bytes()[:-7])
    parrot.rows = []
    _prober(parrot, tmp_path).best_probabilities(IDS)
    assert parrot.tokens_run() == [IDS[-1]]


def test_results_of_another_model_or_dtype_are_refused(tmp_path: Path) -> None:
    _prober(Parrot(BAD), tmp_path).best_probabilities(IDS)
    other = Parrot(BAD)
    other.fingerprint = "another"
    with pytest.raises(MismatchError, match="another"):
        _prober(other, tmp_path)
    half = Parrot(BAD)
    half.dtype = torch.bfloat16
    with pytest.raises(MismatchError, match="bfloat16"):
        _prober(half, tmp_path)
    # other confirming prompts leave the short results usable
    fresh = Parrot(BAD)
    _prober(fresh, tmp_path, confirm=LONG_IDS[:1]).best_probabilities(IDS)
    assert fresh.tokens_run(len(SHORT_IDS.ids)) == []


def test_a_token_without_a_number_cannot_be_said_but_a_broken_model_is_an_error() -> None:
    class Broken(Parrot):
        bad: tuple[int, ...] = ()

        def logits(self, batch: TokenBatch, keep: str = "all") -> Tensor:
            rows = super().logits(batch, keep)
            asked = torch.tensor([i for i, _ in self.rows[-len(batch) :]])
            rows[torch.isin(asked, torch.tensor(self.bad))] = torch.nan
            return rows

    one = Broken({})
    one.bad = (int(IDS[2]),)
    assert np.flatnonzero(_prober(one).is_glitch(IDS)).tolist() == [2]
    every = Broken({})
    every.bad = tuple(IDS.tolist())
    with pytest.raises(DegenerateInputError, match="NaN"):
        _prober(every).best_probabilities(IDS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "gemma3", "mistral", "gpt_oss"])
@pytest.mark.parametrize("shared", [14, 90])
def test_the_shared_beginning_changes_nothing_also_behind_a_sliding_window(family: str, shared: int) -> None:
    model = tiny_model(family)
    rows = torch.randint(0, 200, (5, shared + 6), generator=torch.Generator().manual_seed(0))
    rows[:, :shared] = rows[0, :shared]
    whole = model.logits(TokenBatch.of_rows(rows), keep="last")
    (found,) = greedy_logits(model, rows, 1, shared=shared)
    assert (found - whole).abs().max() <= FP32_LOGITS
    (wrong,) = greedy_logits(model, rows, 1, shared=shared + 3)
    assert (wrong - whole).abs().max() > 10 * FP32_LOGITS


def analysed(model: Model) -> Vocabulary:
    return analyse(codec_of(model.tokenizer))


def test_the_faster_dtype_is_used_only_if_it_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wordy_model()
    made = prompt_set(model, analysed(model), [SHORT], "raw").templates[0]

    def pretend(speeds: list[float], apart: float) -> probing.DtypeChoice:
        p = [torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5 + apart])]
        monkeypatch.setattr(probing, "_measured", lambda models, *_: (speeds[: len(models)], p[: len(models)]))
        return choose_dtype(model, made, IDS.tolist())

    assert pretend([10.0, 20.0], 1e-4).dtype == "bfloat16"
    far = pretend([10.0, 20.0], 1e-2)
    assert far.dtype == "float32" and far.difference == pytest.approx(1e-2, rel=1e-3) and "2.00 times" in far.why
    assert pretend([20.0, 10.0], 1e-4).dtype == "float32"
    assert pretend([10.0, 20.0], 1e-4).seconds(200) == 10.0
    assert choose_dtype(model, made, IDS.tolist(), both=False).tokens_per_second.keys() == {"float32"}
    assert model.dtype == torch.float32


def test_the_measurement_compares_real_probabilities_and_leaves_the_model_alone() -> None:
    model = wordy_model()
    made = prompt_set(model, analysed(model), [SHORT], "raw").templates[0]
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    choice = choose_dtype(model, made, IDS.tolist())
    assert choice.difference is not None and 0 < choice.difference < 0.1
    assert all(speed > 0 for speed in choice.tokens_per_second.values())
    assert all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())
    with pytest.raises(DegenerateInputError, match="no tokens"):
        choose_dtype(model, made, [])
