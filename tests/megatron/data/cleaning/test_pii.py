# SPDX-License-Identifier: Apache-2.0
"""Personal data goes, look-alikes stay, and no report holds a match."""

from __future__ import annotations

import json
from collections import Counter

from megatron.data.cleaning.pii import Code, mask_text
from support.cleaning import run

KEY = "AKIA" + "IOSFODNN7EXAMPLE"
MASKED = {
    "mail jo.doe+x@mail.example.org.": "mail <EMAIL>.",
    "(j@b.co)": "(<EMAIL>)",
    "host 8.8.8.8, up": "host <IP>, up",
    "host 2001:4860:4860::8888 up": "host <IP> up",
    "call +44 20 7946 0958 now": "call <PHONE> now",
    "call +1 (415) 555-2671.": "call <PHONE>.",
    "call (415) 555-2671.": "call <PHONE>.",
    "call 415-555-2671.": "call <PHONE>.",
    "call 0049 30 901820": "call <PHONE>",
    "pay DE89 3704 0044 0532 0130 00 today": "pay <IBAN> today",
    "pay GB82WEST12345698765432": "pay <IBAN>",
    "card 4111 1111 1111 1111 ends": "card <CARD> ends",
    "card 5500-0000-0000-0004": "card <CARD>",
    f"key={KEY}": "key=<KEY>",
    "token ghp_" + "a1B2" * 9: "token <KEY>",
    "hf_" + "abcDEF12" * 5: "<KEY>",
    "sk-proj-" + "A1b2" * 10 + " x": "<KEY> x",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----": "<KEY>",
}
LEFT = [
    "at 192.168.0.1 and 127.0.0.1 and 10.0.0.7",  # no public host
    "version 1.2.3.4.5 of 300.1.2.3",
    "time 12:34:56 and a::b and std::vector<int>",
    "pay DE89 3704 0044 0532 0130 01 today",  # wrong checksum
    "number 4111 1111 1111 1112",  # wrong checksum
    "order 0000 0000 0000 0000",
    "in 1999-2004 and 2001-11-23, pages 120-135",
    "pi 3.14159265358979323846",
    "user@localhost and @mention and a @ b.c",
    "AKIAXY and sk-short and ghp_short",
    "2 + 2 = 4 and +1 for that",
]


def test_masked():
    counts = Counter()
    assert {text: mask_text(text, counts) for text in MASKED} == MASKED
    assert counts == {"email": 2, "ip": 2, "phone": 5, "iban": 2, "card": 2, "key": 5}


def test_left_alone():
    assert [mask_text(text) for text in LEFT] == LEFT


def test_masking_twice_is_masking_once():
    text = " ".join(MASKED)
    assert mask_text(mask_text(text)) == mask_text(text)


def test_long_lines_of_anything_do_not_take_long():
    for part in ("a.", "1 ", "a@", "1.1.", "A1", "+1 ", ":", "ab:", "-", "eyJa.", "x" * 50 + "@"):
        mask_text(part * (200_000 // len(part)))


def test_counted_and_never_told(tmp_path):
    """Not even by the examples of other rules."""
    secret = "jo.doe@mail.example.org"
    records = [{"text": f"{secret} wrote to {secret} from 8.8.8.8"}, {"text": f"{secret} once"}, {"text": f"{secret} once"}]
    kept, report = run(records, tmp_path, exact=True, pii=True)
    assert [record["text"] for record in kept] == ["<EMAIL> wrote to <EMAIL> from <IP>", "<EMAIL> once"]
    assert secret not in json.dumps(report)
    assert report["dropped"] == {"exact/same text": 1}
    (stage,) = [stage for stage in report["stages"] if stage["stage"] == "pii"]
    assert stage["changed"] == {"documents": 2, "email": 3, "ip": 1}
    assert [example["text"] for example in stage["examples"]] == [record["text"] for record in kept]


def test_code_is_left_alone(tmp_path):
    records = [{"text": "a@mail.org", "meta": {"set": "Github"}}, {"text": "a@mail.org", "meta": {"set": "Web"}}]
    kept, _ = run(records, tmp_path, pii=True, code=Code(where=(("meta.set", "Github"),)))
    assert [record["text"] for record in kept] == ["a@mail.org", "<EMAIL>"]
    assert Code(all=True).holds({})
    assert not Code().holds({"meta": {"set": "Github"}})
