# SPDX-License-Identifier: Apache-2.0
"""Every stage on documents that it must keep and documents that it must drop."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import pytest

from megatron.data.cleaning.decontamination import Decontaminate, index_tasks
from megatron.data.cleaning.document import Document, StageStats
from megatron.data.cleaning.filters import Filter, Language, Normalise, Quality, datatrove, read_blocklist
from megatron.errors import BackendError, DataError
from support.cleaning import nonsense, prose, run, sentence, write_lines


def judged(stage, text):
    """(verdict, text afterwards)"""
    document = Document(text, "here:1")
    return stage.open(StageStats())(document), document.text


NORMAL = {
    "cafe\u0301": "caf\xe9",
    "a\x00b\x07c\td\n": "abc\td\n",
    "a\r\nb\rc\u2028d": "a\nb\nc\nd",
    "\ufeffplain": "plain",
    "\U0001f600 stays \u200d": "\U0001f600 stays \u200d",
}


def test_normalise():
    assert {text: judged(Normalise(), text) for text in NORMAL} == {text: (None, left) for text, left in NORMAL.items()}


def test_normalise_drops_what_is_empty():
    assert judged(Normalise(), " \x00\n ")[0] == "empty"


def test_ftfy_is_asked_for():
    wrong = "caf\u00c3\u00a9"
    assert judged(Normalise(), wrong)[1] == wrong
    assert judged(Normalise(ftfy=True), wrong)[1] == "caf\xe9"


def test_exact_ignores_case_and_spaces_only(tmp_path):
    texts = ["One two", "one  TWO\n", "one two!", "three", "One two"]
    kept, report = run([{"id": at, "text": text} for at, text in enumerate(texts)], tmp_path, exact=True, tasks=2)
    assert [record["id"] for record in kept] == [0, 2, 3]
    assert [example["id"] for example in report["stages"][0]["dropped"]["same text"]["examples"]] == [1, 4]


GOLDEN = Path(__file__).parents[3] / "golden" / "cleaning"
GOOD = prose(random.Random(0), 15)
FILTERED = {
    "gopher: gopher_short_doc": (Filter.GOPHER, "The house that we saw stood with others beside a lake. It has to be seen."),
    "gopher: gopher_too_many_hashes": (Filter.GOPHER, " # ".join(GOOD.split(" ")[:100])),
    "gopher: gopher_enough_stop_words": (Filter.GOPHER, " ".join(nonsense(random.Random(1), 80))),
    "gopher: gopher_too_many_bullets": (Filter.GOPHER, "\n".join(f"- {sentence(random.Random(at))}" for at in range(12))),
    "gopher: gopher_above_avg_threshold": (Filter.GOPHER, " ".join(w * 2 for w in nonsense(random.Random(2), 80)) + " the be"),
    "gopher repetition: dup_para_frac": (Filter.GOPHER, "\n\n".join(["Then to and of it: " + sentence(random.Random(3))] * 8)),
    "gopher repetition: dup_line_frac": (Filter.GOPHER, "\n".join(["Then to and of it: " + sentence(random.Random(3))] * 8)),
    "gopher repetition: top_2_gram": (Filter.GOPHER, " ".join(f"{word} very many" for word in nonsense(random.Random(4), 60)) + " to of"),
    "c4: too_few_sentences": (Filter.C4, "The house was seen. It was fine."),
    "c4: lorem_ipsum": (Filter.C4, GOOD + "\nThen lorem ipsum came along."),
    "c4: curly_bracket": (Filter.C4, GOOD + "\nThen { came along."),
    "fineweb: line_punct_ratio": (Filter.FINEWEB, GOOD.replace(".", "")),
    "fineweb: short_line_ratio": (Filter.FINEWEB, "\n".join(f"Line {word}." for word in nonsense(random.Random(5), 20))),
    "fineweb: char_dup_ratio": (Filter.FINEWEB, "\n".join([GOOD, sentence(random.Random(6)), sentence(random.Random(6))])),
}


def test_quality_drops():
    assert [judged(Quality((one,)), text) for one, text in FILTERED.values()] == [(reason, text) for reason, (_, text) in FILTERED.items()]


def test_quality_keeps_prose():
    assert judged(Quality(tuple(Filter)), GOOD) == (None, GOOD)


def test_c4_cuts_lines():
    verdict, text = judged(Quality((Filter.C4,)), f"Home | Menu\n{GOOD}\nPlease accept our cookie policy to go on.")
    assert verdict is None
    assert text == GOOD


def test_stop_words_are_those_of_the_language():
    german = " ".join(f"{word} der nicht" for word in nonsense(random.Random(7), 40))
    stage = {words: Quality((Filter.GOPHER,), words) for words in (None, (), ("der", "nicht"))}
    varied = " ".join(nonsense(random.Random(8), 80)) + " " + german.split(" ", 1)[1][:12]
    assert judged(stage[None], varied)[0] == "gopher: gopher_enough_stop_words"
    assert judged(stage[()], varied)[0] is None
    assert judged(stage["der", "nicht"], varied + " der nicht")[0] is None


@pytest.mark.parametrize("one", Filter)
def test_quality_bears_any_text(one):
    for text in ("", " ", "...", "\n\n", "{", "\x00", "# # #", "\u4e2d\u6587"):
        assert judged(Quality((one,)), text)[0], text


LANGUAGES, FOREIGN = json.loads((GOLDEN / "languages.json").read_text()).values()


def test_language_by_function_words():
    for code, text in LANGUAGES.items():
        assert judged(Language((code,)), text)[0] is None
        assert judged(Language(tuple(set(LANGUAGES) - {code})), text)[0] == code


def test_unknown_languages_are_dropped():
    assert [judged(Language(tuple(LANGUAGES)), text)[0] for text in FOREIGN] == ["unknown"] * len(FOREIGN)


def test_fasttext_says_what_to_install():
    with pytest.raises(BackendError, match="fasttext"):
        datatrove().language_filter(["en"], 0.65)


def test_without_datatrove_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(BackendError, match="clean"):
        datatrove()


QUESTION = "Which of the seven largest lakes on the northern continent was first mapped by a woman from the old harbour town"
ANSWER = "the deep blue one behind the third hill"


@pytest.fixture
def contaminated(tmp_path):
    """A judge that knows one question, one answer of eight words and one short text."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_lines(folder / "lakes.jsonl", [{"question": QUESTION, "choices": ["no", ANSWER]}])
    logged = {
        "doc": {"q": "Name the tall grey bird that stood beside our fountain all last winter long"},
        "resps": [["A model wrote this"]],
    }
    write_lines(folder / "birds.jsonl", [logged])
    gathered = index_tasks((str(folder),), tmp_path / "index.npz")
    assert (gathered.tasks, gathered.texts, gathered.short) == (["birds", "lakes"], 4, 1)
    return Decontaminate(str(tmp_path / "index.npz"), tuple(gathered.tasks))


CONTAMINATED = [
    (f"Quiz. {QUESTION.upper()}? Answer below.", ("13 words", "lakes")),
    (" ".join(QUESTION.split()[3:16]), ("13 words", "lakes")),
    (" ".join(QUESTION.split()[3:15]), None),  # twelve words of a text of 21
    (f"They said {ANSWER}, of course.", ("8 words", "lakes")),
    (ANSWER.rsplit(" ", 1)[0], None),
    ("the tall, grey bird that stood beside our fountain all last winter", ("8 words", "birds")),
    ("A model wrote this", None),
    (GOOD, None),
    ("", None),
]


def test_decontamination(contaminated):
    assert [(text, judged(contaminated, text)[0]) for text, _ in CONTAMINATED] == CONTAMINATED


def test_decontamination_needs_texts(tmp_path):
    (tmp_path / "task.txt").write_text("too short")
    with pytest.raises(DataError, match="none of the 1"):
        index_tasks((str(tmp_path / "task.txt"),), tmp_path / "index.npz")
    with pytest.raises(DataError, match="there is no"):
        index_tasks((str(tmp_path / "none"),), tmp_path / "index.npz")


LIST = "# words\nCaf\xe9\ndark matter\nre:\\bfoo\\d+\nc++\n\n"


BLOCKED = [
    ("A CAF\xc9 here", 2),
    ("cafe\u0301", 2),
    ("cafeteria", None),
    ("dark\nMatter!", 3),
    ("dark grey matter", None),
    ("see FOO12", 4),
    ("barfoo12", None),
    ("in C++ only", 5),
    ("in c only", None),
    ("in c++11 only", None),
]


def test_blocklist(tmp_path):
    (tmp_path / "list").write_text(LIST, encoding="utf-8")
    entries = read_blocklist(tmp_path / "list")
    assert [(text, entries.first_match(text)) for text, _ in BLOCKED] == BLOCKED


def test_blocklist_is_recorded(tmp_path):
    (tmp_path / "list").write_text(LIST, encoding="utf-8")
    kept, report = run([{"text": "dark matter"}, {"text": "light"}], tmp_path, blocklist=str(tmp_path / "list"))
    assert kept == [{"text": "light"}]
    assert report["settings"]["blocklist"] == {
        "file": str(tmp_path / "list"),
        "sha256": hashlib.sha256(LIST.encode()).hexdigest(),
        "entries": 4,
    }
    (rule,) = report["stages"][0]["dropped"].values()
    assert rule["examples"] == [{"at": f"{tmp_path}/in.jsonl:1", "text": "dark matter", "note": "line 3"}]


@pytest.mark.parametrize(("text", "what"), [("# nothing\n", "empty"), ("re:(\n", "not a regular expression")])
def test_blocklist_refused(text, what, tmp_path):
    (tmp_path / "list").write_text(text)
    with pytest.raises(DataError, match=what):
        read_blocklist(tmp_path / "list")


def test_examples_are_few_and_short(tmp_path):
    kept, report = run([{"id": at, "text": "word " * 100} for at in range(130)], tmp_path, exact=True, tasks=3)
    rule = report["stages"][0]["dropped"]["same text"]
    assert len(kept) == 1
    assert rule["count"] == 129
    assert [example["id"] for example in rule["examples"]] == list(range(1, 101))
    assert {len(example["text"]) for example in rule["examples"]} == {200}
    json.dumps(report)
