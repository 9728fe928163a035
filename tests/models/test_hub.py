"""Models of the hub where it can't be reached."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import pytest

from tests.tiny import tiny_hf, tiny_tokenizer
from workbench.activations.sources import HubDataset
from workbench.core.errors import InvalidInputError, ModelUnavailableError
from workbench.models.loading import load_model
from workbench.saes.formats.load import load_sae, sae_lens_module


class _Hub:
    """Stands for the client of the hub: raises what it is given, and counts how often it is asked."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.asked = error, 0

    def model_info(self, name: str, *, revision: str | None, timeout: float) -> None:  # noqa: ARG002
        self.asked += 1
        if self.error:
            raise self.error

    dataset_info = model_info


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


def test_saes_and_data_sets_of_a_hub_that_can_t_be_reached_are_answered_at_once(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _Hub(huggingface_hub.errors.HTTPError("Name or service not known"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    fetched: list[str] = []
    monkeypatch.setattr(sae_lens_module().SAE, "from_pretrained", lambda *words, **_: fetched.append("/".join(words)))
    monkeypatch.setattr("datasets.load_dataset", _no_download)
    sae = "gpt2-small-res-jb/blocks.8.hook_resid_pre"
    with pytest.raises(ModelUnavailableError, match=r"can't be fetched \(.*Name or service.*folder that holds") as told:
        load_sae(sae)
    assert "Did you mean" not in str(told.value), "the release was named rightly"
    assert hub.asked == 1
    part = cached / "models--jbloom--GPT2-Small-SAEs-Reformatted" / "snapshots" / "abc" / "blocks.8.hook_resid_pre"
    part.mkdir(parents=True)
    with pytest.raises(AttributeError):  # what the cache holds is left to sae_lens
        load_sae(sae)
    assert (hub.asked, fetched) == (1, [sae])
    with pytest.raises(InvalidInputError, match=r"HubDataset\('org/texts'\).*Name or service.*--repo-type dataset"):
        next(HubDataset("org/texts")._texts())
    with pytest.raises(InvalidInputError, match=r"no folder here.*Data set '/no/such/folder'.*no name"):
        monkeypatch.undo()
        next(HubDataset("/no/such/folder")._texts())
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
