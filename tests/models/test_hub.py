"""Models of the hub where it can't be reached."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import pytest

from tests.tiny import tiny_hf, tiny_tokenizer
from workbench.core.errors import ModelUnavailableError
from workbench.models.loading import load_model


class _Hub:
    """Stands for the client of the hub: raises what it is given, and counts how often it is asked."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.asked = error, 0

    def model_info(self, name: str, *, revision: str | None, timeout: float) -> None:  # noqa: ARG002
        self.asked += 1
        if self.error:
            raise self.error


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds the models org/tiny and tiny."""
    for name in ("models--org--tiny", "models--tiny"):
        (tmp_path / name / "refs").mkdir(parents=True)
        (tmp_path / name / "refs" / "main").write_text("abc")
        tiny_hf().save_pretrained(tmp_path / name / "snapshots" / "abc")
        tiny_tokenizer().save_pretrained(tmp_path / name / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def _no_download(*_: object, **__: object) -> None:
    raise AssertionError("nothing may be fetched")


@pytest.mark.usefixtures("cached")
def test_a_hub_that_can_t_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(huggingface_hub.errors.HTTPError("Name or service not known"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", _no_download)
    with pytest.raises(ModelUnavailableError, match=r"not in the local cache.*Name or service.*hf download org/other"):
        load_model("org/other")
    assert hub.asked == 1
    cached = load_model("org/tiny")
    assert cached.name == cached.source == "org/tiny"  # from the cache
    assert hub.asked == 2
    cached = load_model("tiny")  # a name without an owner is looked for in the cache alone
    assert cached.name == cached.source == "tiny"
    assert hub.asked == 2


def test_a_model_that_the_hub_does_not_have_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    response = cast(Any, SimpleNamespace(status_code=404, headers={}, request=None, text=""))
    error = huggingface_hub.errors.RepositoryNotFoundError("404\n\nRepository Not Found.", response=response)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: _Hub(error))
    with pytest.raises(ModelUnavailableError, match=r"Repository Not Found. Check the name"):
        load_model("org/other")


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(("status", "cached_answers", "other_says"), [
    (429, True, "it answered 429"), (401, True, "log in"), (503, True, "it answered 503"), (404, False, "Check the name"),
])  # fmt: skip
def test_what_the_hub_answers_decides_whether_the_cache_is_taken(
    status: int, cached_answers: bool, other_says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = cast(Any, SimpleNamespace(status_code=status, headers={}, request=None, text=""))
    hub = _Hub(huggingface_hub.errors.HfHubHTTPError(f"{status}\n\nRefused.", response=response))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    with pytest.raises(ModelUnavailableError, match=other_says):
        load_model("org/other")
    if cached_answers:
        assert load_model("org/tiny").name == "org/tiny"
    else:
        with pytest.raises(ModelUnavailableError, match=other_says):
            load_model("org/tiny")
