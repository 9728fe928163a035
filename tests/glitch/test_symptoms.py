from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.glitch.tiny_vocab import byte_level
from workbench.core.codec import codec_of, token_bytes
from workbench.core.errors import DegenerateInputError
from workbench.core.tokens import TokenBatch
from workbench.glitch.verification.symptoms import LABELS, label_of, succeeds, symptoms
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model

AT = byte_level().token_to_id
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


class Talker(Model):
    """Answers by task and token: `says` maps a token to its replies to repeat, spell and measure."""

    def __init__(self, says: dict[int, tuple[str, str, str]], template: str | None = None) -> None:
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
        self.tokenizer.chat_template = template
        self.codec, self.says = codec_of(self.tokenizer), says
        self.prompts: list[str] = []
        self.options: list[dict[str, Any]] = []

    def tokens(self, text: str) -> TokenBatch:
        return TokenBatch.of_rows(torch.tensor(self.codec.encode([text])))

    def generate(self, rows: TokenBatch, max_new_tokens: int, **options: Any) -> SimpleNamespace:
        self.options.append(options)
        said = []
        for ids, text in zip(rows.ids.tolist(), self.codec.decode(rows.ids.tolist()), strict=True):
            self.prompts.append(text)
            task = next(k for k, word in enumerate(("exactly as it is", "hyphen", "How many")) if word in text)
            said.append(next(replies[task] for i, replies in self.says.items() if i in ids))
        return SimpleNamespace(texts=said)


EMBER, HARBOR, SPACE = AT("ember"), AT("Ġharbor"), AT("ĊĠ") or AT("Ġ")
SAYS = {
    EMBER: ("embre»", " I'm sorry, I can't.", " 4"),
    HARBOR: (" harbor». Anything else?", " h - a - r - b - o - r\nand more", "\n6 characters"),
    AT("candle"): ("candle", " c-a-n-d-l-e", " 6"),
}


@pytest.mark.parametrize("template", [None, CHAT])
def test_replies_are_labelled_by_task_and_counted_beside_controls(template: str | None) -> None:
    talker = Talker(SAYS, template)
    vocabulary = analyse(talker.codec)
    found = symptoms(talker, vocabulary, [EMBER], [HARBOR, AT("candle"), SPACE], batch_size=2)
    assert found.form == ("raw" if template is None else "chat")
    assert {task: s.label for task, s in found.of(EMBER).items()} == {
        "repetition": "spelling_mistake", "spelling": "incapability", "length": "hallucinatory_completion",
    }  # fmt: skip
    assert {s.label for s in found.of(HARBOR).values()} == {"ok"} and not found.of(SPACE)
    assert found.of(HARBOR)["spelling"].reply == "h - a - r - b - o - r"
    assert {t: (r.value, r.n) for t, r in found.candidate_failures.items()} == {t: (1.0, 1) for t in found.failures}
    assert {(r.value, r.n) for r in found.failures.values()} == {(0.0, 2)}
    assert found.counts("length", True) == {"ok": 2}
    assert len(talker.prompts) == 9 and all(("<user>" in p) == (template is not None) for p in talker.prompts)
    assert all(options["temperature"] == 0.0 for options in talker.options)


def test_the_token_stands_in_the_question_and_nowhere_else() -> None:
    talker = Talker(SAYS)
    symptoms(talker, analyse(talker.codec), [EMBER], [])
    assert len(talker.prompts) == 3 and all(p.count("«ember»") == 1 for p in talker.prompts)
    assert all("harbor" not in p for p in talker.prompts)


def test_without_any_text_to_ask_about_there_is_an_error() -> None:
    talker = Talker(SAYS)
    with pytest.raises(DegenerateInputError, match="none of the 1 candidates"):
        symptoms(talker, analyse(talker.codec), [SPACE], [])


@pytest.mark.parametrize(
    ("task", "reply", "label"),
    [
        ("repetition", "the word emberharbor", "ok"), ("repetition", "Emberharbor", "spelling_mistake"),
        ("repetition", "embarharbor is it", "spelling_mistake"), ("repetition", "distribute", "hallucinatory_completion"),
        ("repetition", "", "incapability"), ("repetition", "I cannot do that", "incapability"),
        ("repetition", "#$%&*(", "random_characters"), ("repetition", "aaaaaaaa", "random_characters"),
        ("repetition", "Please give this text back, exactly", "question_repetition"),
        ("spelling", "e-m-b-e-r-h-a-r-b-o-r", "ok"), ("spelling", "E - M - b-e-r-h-a-r-b-o-r.", "ok"),
        ("spelling", "e-m-b-e-r-h-a-r-b-r", "spelling_mistake"), ("spelling", "c-a-t", "hallucinatory_completion"),
        ("length", "11", "ok"), ("length", "It has 11 of them", "ok"), ("length", "111", "hallucinatory_completion"),
        ("length", "eleven", "hallucinatory_completion"),
    ],
)  # fmt: skip
def test_labels_follow_their_rules(task: str, reply: str, label: str) -> None:
    question = "Please give this text back, exactly as it is: «»"
    assert label in LABELS and label_of(task, " emberharbor", reply, question) == label


def test_success_is_exact() -> None:
    assert succeeds("spelling", "a-b", "a---b") and not succeeds("spelling", "ab", "ab")
    assert not succeeds("length", "abc", "13") and succeeds("length", "abc", "3.")
    assert np.all([len(t) for t in token_bytes(Talker(SAYS).tokenizer)])
