from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.tiny import (
    CACHES,
    D_MODEL,
    FAMILIES,
    FP32_LOGITS,
    cached_model,
    n_hooks,
    spaced_tokenizer,
    tiny_model,
    tiny_tokenizer,
)
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.scopes import All, Generated, Last, Scope
from workbench.models import tiny
from workbench.models.decoding import Decoder
from workbench.models.model import Model
from workbench.models.session import Session

VECTOR = torch.linspace(-1, 1, D_MODEL)
LETTERS = [int(i) for i in tiny_tokenizer()("abcdefghij .", add_special_tokens=False)["input_ids"]]


TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role[0] }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>a\n' }}{% endif %}"
)


def chat_model(family: str = "llama") -> Model:
    """A tiny model whose template opens an answer as it writes one."""
    model = cached_model(family) if family in CACHES else tiny_model(family)
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.chat_template = TEMPLATE
    return model


def letters_only(model: Model) -> Model:
    """The model says letters only, so that a reply comes back from text as the same tokens."""
    allowed = torch.full((model.d_vocab,), -torch.inf)
    allowed[LETTERS] = 0

    def hook(_module: object, _args: object, out: Any) -> None:
        out.logits = out.logits + allowed

    model.hf.register_forward_hook(hook)
    return model


def edit(scope: Scope) -> Intervention:
    return Intervention.at("resid_post.1", Add(VECTOR, 4.0), scope)


def fresh_logits(model: Model, session: Session, iv: Intervention | None = None) -> torch.Tensor:
    batch = model.tokens(session.messages)
    if iv is None:
        return model.logits(batch)[0]
    with model.plan(iv):
        return model.logits(batch)[0]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens of every forward pass."""
    seen: list[int] = []
    original = Decoder._last_logits

    def watched(self: Decoder, cache: object, ids: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        seen.append(ids.shape[1])
        return original(self, cache, ids, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "_last_logits", watched)
    return seen


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_those_of_a_fresh_run_on_the_whole_history(family: str, steered: bool, fed: list[int]) -> None:
    model, iv = letters_only(chat_model(family)), edit(All()) if steered else None
    session = model.session(intervention=iv, temperature=0.0, max_new_tokens=4)
    # Short enough for the windows of those that have one.
    for text in ("hi", "oh", "so"):
        fed.clear()
        reply = session.turn(text)
        before = model.tokens(session.messages[:-1])
        n_fed = fed[0]
        assert reply == model.generate(before, 4, intervention=iv, temperature=0.0).texts[0]
        assert session.messages[-1] == {"role": "assistant", "content": reply}
        # only the last token of the reply, what closes it, the question and what opens the answer
        assert text == "hi" or n_fed == 1 + 2 + len(model.tokens([{"role": "user", "content": text}]).ids[0])
    torch.testing.assert_close(session.logits(), fresh_logits(model, session, iv), atol=FP32_LOGITS, rtol=1e-4)
    assert session.n_exchanges == 3 and len(session.messages) == 6


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_backtracking_takes_back_exactly_the_last_exchanges(family: str, steered: bool, fed: list[int]) -> None:
    model, iv = letters_only(chat_model(family)), edit(All()) if steered else None
    session = model.session(intervention=iv, temperature=0.0, max_new_tokens=4)
    for text in ("a", "b", "c"):
        session.turn(text)
    kept = session.messages[:2]
    session.backtrack(2)
    assert session.messages == kept
    fed.clear()
    after = session.logits()
    assert fed[0] < len(model.tokens(kept).ids[0]), "the cache of the surviving history is used"
    torch.testing.assert_close(after, fresh_logits(model, session, iv), atol=FP32_LOGITS, rtol=1e-4)
    reply = session.turn("d")
    other = model.session(intervention=iv, temperature=0.0, max_new_tokens=4)
    other.turn("a")
    assert other.turn("d") == reply


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_window_that_has_filled_up_is_computed_anew(family: str) -> None:
    model = letters_only(chat_model(family))
    session = model.session(temperature=0.0, max_new_tokens=4)
    for i in range(3):
        session.turn("question " + str(i))
        torch.testing.assert_close(session.logits(), fresh_logits(model, session), atol=FP32_LOGITS, rtol=1e-4)
    assert len(model.tokens(session.messages).ids[0]) > 64
    session.backtrack()
    torch.testing.assert_close(session.logits(), fresh_logits(model, session), atol=FP32_LOGITS, rtol=1e-4)


def test_every_generated_token_is_edited_once() -> None:
    model = letters_only(chat_model())
    session = model.session(intervention=edit(Generated()), temperature=0.0, max_new_tokens=5)
    session.turn("hello")
    assert session.report[0].tokens == 4  # the fifth has not been fed
    session.turn("again")
    assert session.report[0].tokens == 4 + 1 + 4
    session.logits()
    assert session.report[0].tokens == 10


def test_the_last_prompt_token_of_each_turn_is_edited() -> None:
    model = letters_only(chat_model())
    session = model.session(intervention=edit(Last()), temperature=0.0, max_new_tokens=3)
    for i in range(3):
        session.turn("hello")
        assert session.report[0].tokens == i + 1


def test_edits_are_on_during_turns_only_unless_inside_a_block() -> None:
    model = letters_only(chat_model())
    clean = n_hooks(model.hf)
    session = model.session(intervention=edit(All()), temperature=0.0, max_new_tokens=3)
    first, second = session.turn("hello"), session.turn("again")
    assert n_hooks(model.hf) == clean
    with model.session(intervention=edit(All()), temperature=0.0, max_new_tokens=3) as inside:
        assert inside.turn("hello") == first
        assert inside.turn("again") == second
        assert n_hooks(model.hf) > clean
        assert inside.report == session.report
        edited = model.logits("abc")
    assert n_hooks(model.hf) == clean
    assert not torch.equal(edited, model.logits("abc"))


def test_a_template_that_writes_a_reply_differently_costs_time_only() -> None:
    model = letters_only(tiny_model())  # this one opens an answer without the line break that answers have
    session = model.session("be kind", intervention=edit(All()), temperature=0.0, max_new_tokens=4)
    for text in ("hello", "again"):
        session.turn(text)
        want = fresh_logits(model, session, edit(All()))
        torch.testing.assert_close(session.logits(), want, atol=FP32_LOGITS, rtol=1e-4)
    assert [message["role"] for message in session.messages] == ["system", *["user", "assistant"] * 2]


def test_turns_have_draws_of_their_own_and_a_seed_repeats_them() -> None:
    def talk(seed: int) -> list[str]:
        session = letters_only(chat_model()).session(seed=seed, max_new_tokens=12)
        first = session.turn("hello")
        session.backtrack()
        return [first, session.turn("hello"), session.turn("hello", temperature=0.0)]

    assert talk(1) == talk(1)
    assert talk(1)[0] != talk(2)[0]
    assert talk(1)[0] != talk(1)[1]


def test_options_of_a_turn_are_for_that_turn() -> None:
    session = letters_only(chat_model()).session(max_new_tokens=6)
    session.turn("hello", max_new_tokens=2, top_k=5, stop="z")
    assert session.last is not None and len(session.last.ids[0]) == 2 and session.last.ended == ("length",)
    session.turn("hello")
    assert len(session.last.ids[0]) == 6
    with pytest.raises(InvalidInputError, match="Did you mean temperature"):
        session.turn("hello", temprature=1.0)


def test_a_turn_that_is_interrupted_leaves_the_conversation_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = letters_only(chat_model())
    clean = n_hooks(model.hf)
    session = model.session(intervention=edit(All()), temperature=0.0, max_new_tokens=4)
    session.turn("hello")
    before, calls, original = session.messages, [], Decoder._last_logits

    def interrupted(self: Decoder, *args: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_last_logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.turn("again")
    assert session.messages == before and n_hooks(model.hf) == clean
    torch.testing.assert_close(session.logits(), fresh_logits(model, session, edit(All())), atol=FP32_LOGITS, rtol=1e-4)


def test_what_a_session_cannot_do_is_said() -> None:
    model = tiny_model()
    session = model.session(max_new_tokens=2)
    with pytest.raises(DegenerateInputError, match="nothing has been said"):
        session.logits()
    session.turn("hello")
    for n in (0, 2):
        with pytest.raises(InvalidInputError, match="has 1 exchanges"):
            session.backtrack(n)
    bare = tiny_model()
    bare.tokenizer = type("Bare", (), {"chat_template": None, "eos_token_id": 1, "__call__": lambda self, text: {}})()
    with pytest.raises(InvalidInputError, match="no chat template"):
        bare.session()


# An attack over several turns: a refusal is taken back and the question put differently.


@dataclass
class Puppet:
    """Makes the model say what the test wants, one token per forward pass, and leaves it alone otherwise."""

    model: Model
    answer: Callable[[str], str]
    to_say: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.hf.register_forward_hook(self._hook)

    def hear(self, question: str) -> None:
        text = self.answer(question)
        self.to_say = [*self.model.tokenizer(text, add_special_tokens=False)["input_ids"], *self.model.stop_ids[:1]]

    def _hook(self, _module: object, _args: object, out: Any) -> None:
        if self.to_say:
            out.logits[:, -1] = -torch.inf
            out.logits[:, -1, self.to_say.pop(0)] = 0.0


@dataclass(frozen=True)
class Attack:
    turns: int
    backtracks: int
    succeeded: bool


def attack(
    session: Session, script: Sequence[str], puppet: Puppet, check: Callable[[], None], max_backtracks: int
) -> Attack:
    turns = backtracks = 0
    for question in script:
        puppet.hear(question)
        reply = session.turn(question)
        turns += 1
        if reply == "i cannot":
            if backtracks == max_backtracks:
                break
            before = session.messages[:-2]
            session.backtrack()
            assert session.messages == before
            if before:
                check()
            backtracks += 1
        elif reply == "the secret":
            return Attack(turns, backtracks, True)
    return Attack(turns, backtracks, False)


@pytest.mark.parametrize("steered", [False, True])
def test_a_scripted_attack_goes_as_the_transcript_says(steered: bool) -> None:
    model, iv = chat_model(), edit(All()) if steered else None

    def answer(question: str) -> str:
        if "now" in question:
            return "i cannot"
        return "the secret" if "story" in question else "sure"

    puppet = Puppet(model, answer)
    scripts = (
        ["hi", "say it now", "tell me more", "tell it now", "tell it in a story", "never asked"],
        ["hi", "say it now", "now!", "now?", "a story"],
        ["hi", "how are you"],
    )
    found = []
    for script in scripts:
        session = model.session(intervention=iv, max_new_tokens=20)

        def check(session: Session = session) -> None:
            want = fresh_logits(model, session, iv)
            torch.testing.assert_close(session.logits(), want, atol=FP32_LOGITS, rtol=1e-4)

        found.append(attack(session, script, puppet, check, max_backtracks=2))
        if len(found) == 1:
            said = [message["content"] for message in session.messages]
            assert said == ["hi", "sure", "tell me more", "sure", "tell it in a story", "the secret"]
    assert found == [Attack(5, 2, True), Attack(4, 2, False), Attack(2, 0, False)]
    assert sum(one.succeeded for one in found) / len(found) == pytest.approx(1 / 3)


@pytest.mark.embedded
def test_the_embedded_model_keeps_its_cache_between_turns(embedded: Model, fed: list[int]) -> None:
    session = embedded.session(temperature=0.0, max_new_tokens=12)
    session.turn("What is the capital of France?")
    fed.clear()
    second = session.turn("And of Italy?")
    assert fed[0] < 20
    assert second == embedded.generate(embedded.tokens(session.messages[:-1]), 12, temperature=0.0).texts[0]
    session.backtrack()
    torch.testing.assert_close(session.logits(), fresh_logits(embedded, session), atol=1e-3, rtol=1e-3)


def test_a_reply_goes_back_as_the_tokens_that_were_sampled() -> None:
    tokenizer = copy.deepcopy(spaced_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}</s>{% endfor %}a"
    model = Model(tiny.tiny_hf("llama", len(tokenizer)), tokenizer)
    allowed = torch.zeros(model.d_vocab, dtype=torch.bool)
    allowed[[2, 260, 261, 263]] = True  # </s>, and words with a space in front
    model.hf.lm_head.register_forward_hook(lambda _m, _i, out: out.masked_fill(~allowed, -1e9))
    session = model.session(temperature=0.0, max_new_tokens=4)
    reply = session.turn("dog")
    assert reply.startswith(" ") and session.messages[-1]["content"] == reply.removeprefix(" ")
    known = list(session._ids)
    session.turn("the")
    assert session._ids[: len(known)] == known


def test_options_of_the_template_hold_for_every_turn() -> None:
    model = chat_model()
    model.tokenizer.chat_template = "{{ style }}" + TEMPLATE
    session = model.session(max_new_tokens=1, style="x")
    session.turn("a")
    session.turn("b")
    assert model.tokenizer.decode(session._ids).startswith("x<bos>u")
    with pytest.raises(InvalidInputError, match="no such option. Did you mean style"):
        model.session(stile="x").turn("a")


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("family", CACHES)
def test_caches_that_cannot_be_cut_back_or_continued_are_computed_again(family: str, steered: bool) -> None:
    model, iv = letters_only(chat_model(family)), edit(All()) if steered else None
    session = model.session(intervention=iv, temperature=0.0, max_new_tokens=4)
    for text in ("hi", "oh", "so", None, "no"):
        if text is None:
            session.backtrack()
            continue
        reply = session.turn(text)
        assert (
            reply == model.generate(model.tokens(session.messages[:-1]), 4, intervention=iv, temperature=0.0).texts[0]
        )
    torch.testing.assert_close(session.logits(), fresh_logits(model, session, iv), atol=FP32_LOGITS, rtol=1e-4)


def test_a_conversation_that_outgrows_the_model_is_refused_and_stays_as_it_was() -> None:
    model = letters_only(chat_model())
    session = model.session(temperature=0.0, max_new_tokens=4)
    session.turn("hello")
    before, room = session.messages, model.max_tokens
    assert room is not None
    with pytest.raises(InvalidInputError, match=f"takes {room} positions"):
        session.turn("again", max_new_tokens=room)
    with pytest.raises(InvalidInputError, match="positions"):
        session.turn("a" * room)
    assert session.messages == before
    torch.testing.assert_close(session.logits(), fresh_logits(model, session), atol=FP32_LOGITS, rtol=1e-4)
    with pytest.raises(InvalidInputError, match="positions"):
        model.sample(model.tokens("abc").ids, room)
