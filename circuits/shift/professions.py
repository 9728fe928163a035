"""What people of a profession do, in own words for training and for test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Profession:
    """Activities of one profession, verb phrases in the third person, apart for training and test.

    Attributes:
        train: at least three.
        test: at least three.
        words: words that give the profession away.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    words: frozenset[str]


PROFESSIONS: Mapping[str, Profession] = {
    "professor": Profession(
        train=(
            "works at a large public university", "lectures on organic chemistry", "supervises doctoral students",
            "publishes papers on voting systems", "edits a journal of modern history",
            "leads seminars on ancient philosophy",
            "studies the economics of trade", "is known for research on early empires",
            "wrote a textbook on statistics",
            "belongs to an institute of political science",
        ),
        test=(
            "works at a private college", "teaches undergraduate courses in sociology",
            "writes academic articles about grammar",
            "directs a thesis programme", "reviews manuscripts for scholarly presses",
            "runs a laboratory for particle physics",
            "is known for a monograph on medieval trade", "belongs to the faculty of linguistics",
        ),
        words=frozenset(
            ["university", "lectures", "chemistry", "supervises", "doctoral", "students", "publishes", "papers",
             "voting", "journal", "history", "seminars", "philosophy", "economics", "research", "textbook",
             "statistics", "institute", "science", "edits", "studies"]
        ),
    ),
    "nurse": Profession(
        train=(
            "works at a regional hospital", "cares for patients after surgery",
            "checks vital signs through the night shift",
            "gives vaccinations to infants", "changes dressings and cleans wounds", "prepares medication for the ward",
            "comforts families in intensive care", "is known for gentle bedside care", "wrote a guide to first aid",
            "belongs to the staff of a stroke clinic",
        ),
        test=(
            "works at a community health centre", "monitors blood pressure and temperature",
            "assists doctors during operations",
            "helps the sick with bathing and meals", "administers injections and infusions",
            "keeps charts for recovering people",
            "is known for skill with difficult veins", "belongs to the maternity unit",
        ),
        words=frozenset(
            ["hospital", "cares", "patients", "surgery", "vital", "signs", "night", "shift", "vaccinations",
             "infants", "dressings", "wounds", "medication", "ward", "comforts", "intensive", "care", "bedside",
             "aid", "staff", "stroke", "clinic"]
        ),
    ),
    "attorney": Profession(
        train=(
            "works at a law firm downtown", "argues cases before the court of appeal",
            "drafts contracts for small companies",
            "represents tenants in disputes", "negotiates settlements", "advises clients on patents",
            "defends people accused of fraud", "is known for victories in civil trials", "wrote a brief on privacy law",
            "belongs to the office of the public defender",
        ),
        test=(
            "works at a legal aid bureau", "files lawsuits over unsafe products", "cross-examines witnesses",
            "prepares wills and estates", "handles bankruptcy petitions", "pleads before juries",
            "is known for a landmark verdict", "belongs to a chamber of barristers",
        ),
        words=frozenset(
            ["law", "firm", "argues", "cases", "court", "appeal", "drafts", "contracts", "represents", "disputes",
             "negotiates", "settlements", "advises", "clients", "patents", "defends", "accused", "fraud", "trials",
             "brief", "privacy", "defender"]
        ),
    ),
    "journalist": Profession(
        train=(
            "works at a daily newspaper", "reports on elections", "interviews ministers and mayors",
            "writes columns about city life", "covers wars and disasters", "edits the front page",
            "investigates corruption",
            "is known for a series on housing", "wrote features about sport",
            "belongs to an international press agency",
        ),
        test=(
            "works at a television channel", "chases stories about crime", "produces documentaries",
            "publishes exclusive scoops", "anchors the evening bulletin", "checks sources for headlines",
            "is known for dispatches from the border", "belongs to the foreign desk of a broadcaster",
        ),
        words=frozenset(
            ["daily", "newspaper", "reports", "elections", "interviews", "columns", "covers", "wars", "disasters",
             "edits", "page", "investigates", "corruption", "series", "features", "press", "agency"]
        ),
    ),
    "dentist": Profession(
        train=(
            "fills cavities in a small surgery", "straightens crooked teeth", "fits crowns and bridges",
            "takes moulds of the jaw", "pulls wisdom teeth", "explains how to floss", "is known for painless drilling",
            "belongs to a practice for oral health",
        ),
        test=(
            "treats sore gums", "polishes enamel", "orders dentures from a workshop", "places implants",
            "calms people in the treatment chair", "examines molars with a mirror", "is known for spotless root canals",
            "prescribes mouthwash and braces",
        ),
        words=frozenset(
            ["fills", "cavities", "straightens", "crooked", "teeth", "crowns", "moulds", "jaw", "wisdom", "floss",
             "drilling", "oral"]
        ),
    ),
    "architect": Profession(
        train=(
            "plans apartment blocks", "sketches facades and floor layouts", "restores railway halls",
            "supervises building sites", "enters competitions for town squares", "builds cardboard models of towers",
            "is known for a glass pavilion", "belongs to a studio for timber houses",
        ),
        test=(
            "converts warehouses into lofts", "drafts blueprints for libraries", "measures old farmhouses",
            "chooses bricks and beams", "designs staircases", "presents skylines to the council",
            "is known for bold roofs", "lays out courtyards",
        ),
        words=frozenset(
            ["apartment", "blocks", "sketches", "facades", "floor", "layouts", "restores", "railway", "building",
             "sites", "squares", "cardboard", "towers", "pavilion", "timber"]
        ),
    ),
    "painter": Profession(
        train=(
            "works in oils and tempera", "mixes pigments by hand", "exhibits in galleries", "stretches canvases",
            "makes portraits of strangers", "sells watercolours at fairs", "is known for murals in stairwells",
            "belongs to a circle of abstract artists",
        ),
        test=(
            "fills sketchbooks with charcoal", "prepares frescoes", "shows still lifes at the biennale",
            "cleans brushes in turpentine", "varnishes landscapes", "gives etchings to museums",
            "is known for blue monochromes", "shares an atelier by the harbour",
        ),
        words=frozenset(
            ["oils", "tempera", "mixes", "pigments", "exhibits", "galleries", "stretches", "canvases", "portraits",
             "watercolours", "murals", "abstract", "artists"]
        ),
    ),
    "chef": Profession(
        train=(
            "runs the kitchen of a bistro", "writes menus with the seasons", "fillets fish before lunch",
            "tastes every sauce", "trains apprentices at the stove", "buys vegetables at the market",
            "is known for slow braises", "belongs to a guild of pastry makers",
        ),
        test=(
            "plates starters for forty guests", "kneads dough at dawn", "seasons stews and broths",
            "grills lamb over embers", "opens oysters", "tests recipes for soups", "is known for a lemon tart",
            "holds a star in a restaurant guide",
        ),
        words=frozenset(
            ["kitchen", "bistro", "menus", "fillets", "fish", "lunch", "tastes", "sauce", "apprentices", "stove",
             "vegetables", "braises", "pastry"]
        ),
    ),
    "teacher": Profession(
        train=(
            "takes the second form in spelling", "marks homework at the weekend", "writes on the blackboard",
            "leads pupils through fractions", "organises the school play", "meets parents in the autumn",
            "is known for patient lessons", "belongs to the board of a primary school",
        ),
        test=(
            "explains multiplication to beginners", "reads fairy tales to a class", "supervises the playground",
            "hands out report cards", "prepares worksheets", "plans an outing to the zoo",
            "is known for fair grades", "runs the choir of a grammar school",
        ),
        words=frozenset(
            ["form", "spelling", "marks", "homework", "blackboard", "pupils", "fractions", "school", "parents",
             "lessons", "primary"]
        ),
    ),
    "photographer": Profession(
        train=(
            "shoots weddings in black and white", "develops film in a darkroom", "carries three lenses",
            "waits for the light at dusk", "sells prints to magazines", "retouches negatives",
            "is known for close-ups of insects", "belongs to a picture library",
        ),
        test=(
            "sets up tripods and flashes", "captures athletes in motion", "frames pictures of street life",
            "scans old slides", "adjusts aperture and focus", "makes contact sheets",
            "is known for foggy mountain views", "rents out a camera studio",
        ),
        words=frozenset(
            ["shoots", "weddings", "develops", "film", "darkroom", "lenses", "dusk", "prints", "magazines",
             "retouches", "negatives", "insects", "picture"]
        ),
    ),
}  # fmt: skip
