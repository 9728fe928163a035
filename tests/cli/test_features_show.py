from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.features.test_tablecards import make_table
from workbench.cli.features_show import FeaturesShow
from workbench.core.errors import MissingFileError
from workbench.core.numbers import byte_size
from workbench.features.card import FeatureCard
from workbench.features.cards.cardset import CardSet


class _Cards:
    def __init__(self, cards: tuple[FeatureCard, ...]) -> None:
        self.cards = cards

    def card(self, place: int) -> FeatureCard:
        return self.cards[place]


def _save_cards(folder: Path) -> None:
    cards = tuple(FeatureCard(feature=i, frequency=0.1 * i, max_act=2.0, n_tokens=500) for i in (4, 7))
    CardSet((4, 7), {"site": "resid_post.1", "model": "other", "n_tokens": 500}, _Cards(cards)).save(folder)


def _shown(capsys: pytest.CaptureFixture[str], **options: object) -> tuple[dict, str]:
    FeaturesShow(json=True, **options).run()  # type: ignore[arg-type]
    summary = json.loads(capsys.readouterr().out)
    return summary, Path(summary["file"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("inner", ["", "features"])
def test_a_table_is_found_in_the_folder_or_in_the_sae(
    inner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_table().save(tmp_path / "sae" / inner)
    summary, page = _shown(capsys, folder=tmp_path / "sae", out=tmp_path / "page.html")
    assert summary["features"] == 2
    assert summary["bytes"] == len(page.encode()) > summary["index_bytes"] + summary["card_bytes"]
    assert "<h1>Features of tiny at resid_post.1</h1>" in page
    assert "resid_post.1 of tiny, 1000 tokens read" in page


def test_cards_are_found_and_completed_by_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save_cards(tmp_path / "cards")
    summary, page = _shown(capsys, folder=tmp_path, out=tmp_path / "page.html")
    assert summary["features"] == 2
    assert "resid_post.1 of other, 500 tokens read" in page
    make_table().save(tmp_path / "scores")
    options = {
        "folder": tmp_path,
        "table": tmp_path / "scores",
        "out": tmp_path / "page.html",
        "title": "All <of> them",
    }
    summary, page = _shown(capsys, **options)
    assert summary["features"] == 3, "4 and 7 have cards, 9 is in the table alone"
    assert "<title>All &lt;of&gt; them</title>" in page
    assert '"output_score":[0.02,null,null]' in page


def test_the_size_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save_cards(tmp_path)
    FeaturesShow(folder=tmp_path, out=tmp_path / "page.html").run()
    said = capsys.readouterr().out
    assert "2 features in " in said
    assert f"{byte_size((tmp_path / 'page.html').stat().st_size)}, of which " in said


def test_a_folder_without_either_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="features score"):
        FeaturesShow(folder=tmp_path).run()
    with pytest.raises(MissingFileError):
        FeaturesShow(folder=tmp_path, table=tmp_path / "nowhere").run()
