"""Feature cards made up for tests of the page: plain values as `to_jsonable` gives them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"'`&amp;${1}{{ 7*7 }}",
    "\u202eabc\u200f",
    "a\nb\r\n\u2028\u2029\t",
    "nul\x00\udc80\ud800",
    "__proto__",
    "<!--",
    "long" * 5000,
)

WORDS = [
    " the",
    " of",
    " dog",
    " cat",
    " river",
    " bank",
    " king",
    " queen",
    "ing",
    "ed",
    " 1999",
    " Paris",
    ",",
    ".",
    "\n",
    " and",
    " is",
    " was",
    " music",
    " light",
]


def estimate(value: float, n: int = 40) -> dict[str, Any]:
    return {
        "value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": n,
        "method": "percentile bootstrap", "unit": "windows", "level": 0.95,
    }  # fmt: skip


def bare_card(feature: int) -> dict[str, Any]:
    """Nothing measured but that it exists."""
    return {
        "feature": feature, "frequency": None, "max_act": None, "n_tokens": 0, "flags": [], "histogram": [],
        "windows": [], "promoted": [], "suppressed": [], "neighbours": [], "explanation": None, "scores": None,
        "steering": [],
    }  # fmt: skip


def window(rng: random.Random, stratum: str, top: float, words: list[str], length: int = 24) -> dict[str, Any]:
    tokens = [rng.choice(words) for _ in range(length)]
    values: list[float | None] = [0.0] * length
    peak = rng.randrange(4, length - 4)
    values[peak] = top
    values[peak - 1] = top * rng.random()
    values[0] = None
    return {
        "tokens": tokens,
        "values": values,
        "peak": peak,
        "stratum": stratum,
        "row": rng.randrange(9000),
        "document": 7,
    }


def full_card(feature: int, n: int = 100, seed: int = 0) -> dict[str, Any]:
    """A card with everything measured; the same for the same number and seed."""
    rng = random.Random(seed * 1_000_003 + feature)
    words = rng.sample(WORDS, 12)
    top = round(rng.uniform(0.5, 30), 3)
    strata = ["top"] * 5 + [f"decile {i}" for i in range(1, 11)]
    lens = [{"token": w, "token_id": 100 + i, "logit": 3.0 - 0.2 * i} for i, w in enumerate(words[:10])]
    return bare_card(feature) | {
        "frequency": 10 ** rng.uniform(-5, -0.5), "max_act": top, "n_tokens": 200_000,
        "flags": ["dense: active on 31% of the tokens"] if feature % 10 == 3 else [],
        "histogram": [[top * i / 20, top * (i + 1) / 20, int(4000 * 0.7**i)] for i in range(20)],
        "windows": [window(rng, s, top * (1 - 0.06 * i), words) for i, s in enumerate(strata)],
        "promoted": lens,
        "suppressed": [{**t, "logit": -t["logit"]} for t in reversed(lens)],
        "neighbours": [
            {"feature": (feature + 1) % n, "kind": "activation", "value": 0.61, "jaccard": 0.4, "null": 0.05},
            {"feature": (feature + 7) % n, "kind": "decoder", "value": 0.08, "jaccard": None, "null": 0.12},
        ],
        "explanation": {
            "text": f"token is one of '{words[0]}', '{words[1]}' after '{words[2]}'", "method": "rule", "n_windows": 80,
            "scores": {"detection": estimate(rng.uniform(0.5, 0.95)), "precision": estimate(0.8), "fuzzing": estimate(rng.uniform(0.5, 0.9))},
            "controls": {
                "shuffled: detection": estimate(0.5), "shuffled: fuzzing": estimate(0.51), "empty: detection": estimate(0.5),
                "top tokens: detection": estimate(0.64),
            },
        },
        "scores": {"input_score": round(rng.random(), 3), "output_score": rng.random() ** 6, "output_score_delta": rng.random() ** 7},
        "steering": [{
            "prompt": "From my experience,", "strength": 10.0, "steered": " the dog and the cat are good dogs.",
            "unsteered": " it is best to plan ahead.", "random": " it is often the case that plans change.",
        }],
    }  # fmt: skip


def hostile_card(feature: int) -> dict[str, Any]:
    """A card whose every string tries to be something else than text."""
    card = full_card(feature)
    tokens = list(HOSTILE)
    values: list[float | None] = [float(i + 1) for i in range(len(tokens))]
    card["windows"] = [{"tokens": tokens, "values": values, "peak": 3, "stratum": "top", "row": 1, "document": 2}]
    card["promoted"] = [{"token": t, "token_id": i, "logit": 1.0} for i, t in enumerate(HOSTILE)]
    card["flags"] = [f"{HOSTILE[0]}: {HOSTILE[1]}"]
    card["explanation"] = {**card["explanation"], "text": "".join(HOSTILE[:9]), "method": HOSTILE[2]}
    card["steering"] = [
        {"prompt": HOSTILE[0], "strength": 1.0, "steered": HOSTILE[1], "unsteered": HOSTILE[4], "random": HOSTILE[6]}
    ]
    return card


def many_cards(n: int) -> Iterator[dict[str, Any]]:
    return (full_card(feature, n) for feature in range(n))
