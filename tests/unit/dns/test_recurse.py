"""Recursors' addresses, and which answers of theirs count."""

from __future__ import annotations

from typing import Any

import dnslib
import pytest

from rostra.dns.recurse import is_answer_to, parse_recursor


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", ("192.0.2.1", 53)),
        ("192.0.2.1:5353", ("192.0.2.1", 5353)),
        ("fd00::1", ("fd00::1", 53)),
        ("[fd00::1]", ("fd00::1", 53)),
        ("[fd00::1]:5353", ("fd00::1", 5353)),
    ],
)
def test_a_recursor_has_an_address_and_perhaps_a_port(text: str, address: Any) -> None:
    assert parse_recursor(text) == address


def test_only_the_answer_to_our_question_under_our_id_counts() -> None:
    question = dnslib.DNSRecord.question("www.example.com")
    answer = question.reply()
    packed = bytes(answer.pack())
    assert is_answer_to(bytes(question.pack()), packed)
    assert not is_answer_to(bytes(question.pack()), b"\0\0" + packed[2:])
    assert not is_answer_to(bytes(question.pack()), bytes(question.pack()))
    other = dnslib.DNSRecord.question("evil.example.com").reply()
    other.header.id = question.header.id
    assert not is_answer_to(bytes(question.pack()), bytes(other.pack()))
    assert not is_answer_to(bytes(question.pack()), b"\0" * 5)


def test_an_answer_that_repeats_no_question_or_one_of_another_type_does_not_count() -> None:
    question = dnslib.DNSRecord.question("www.example.com", "A")
    asked = bytes(question.pack())
    bare = asked[:2] + b"\x81\x80\0\0\0\1\0\0\0\0" + bytes(question.reply().pack())[12:]
    assert not is_answer_to(asked, bare)
    other = dnslib.DNSRecord.question("www.example.com", "AAAA").reply()
    other.header.id = question.header.id
    assert not is_answer_to(asked, bytes(other.pack()))
    shouted = dnslib.DNSRecord.question("WWW.example.com", "A").reply()
    shouted.header.id = question.header.id
    assert is_answer_to(asked, bytes(shouted.pack()))
