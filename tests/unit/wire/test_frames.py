from __future__ import annotations

import itertools
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rostra.wire.errors import BadRequest
from rostra.wire.frames import (
    CONTAINERS_MAX,
    ITEMS_MAX,
    FrameDecoder,
    FrameTooLarge,
    frame,
    pack,
    unpack,
    unpack_first,
    unpack_request,
)
from rostra.wire.rpc import check_hello


@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(1, 20), min_size=1))
def test_frames_come_out_whole_however_the_stream_is_cut(payloads, cuts):
    stream = b"".join(map(frame, payloads))
    decoder, out, at, turn = FrameDecoder(), [], 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        out += decoder.payloads(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert out == payloads
    assert decoder.buffered == 0


def test_a_frame_that_is_not_complete_waits():
    decoder = FrameDecoder()
    assert decoder.payloads(frame(b"abc")[:-1]) == []
    assert decoder.buffered == 6
    assert decoder.payloads(b"c") == [b"abc"]


def test_an_announced_length_above_the_bound_is_refused_before_its_bytes_come():
    decoder = FrameDecoder(10)
    assert decoder.payloads(frame(b"x" * 10)) == [b"x" * 10]
    with pytest.raises(FrameTooLarge, match="11 bytes, at most 10"):
        decoder.payloads(b"\x00\x00\x00\x0b")


def test_the_bound_can_be_raised_after_the_hello():
    decoder = FrameDecoder(1)
    decoder.raise_bound(100)
    assert decoder.payloads(frame(b"x" * 100)) == [b"x" * 100]


@pytest.mark.parametrize("message", [None, 1, (), ("a", b"a", {"k": (1, None, True)}), {1: 2}, (1 << 64) - 1])
def test_a_message_comes_back_as_it_was_sent(message):
    assert unpack(pack(message)) == message


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x92\x01", b"\x01\x01", b"\xa1\xff", b"\xd9", b"\x81\x91\x01\x02"[:3]]
)
def test_anything_but_one_message_is_a_value_error(payload):
    with pytest.raises(ValueError, match="not a msgpack message"):
        unpack(payload)


@given(st.binary(max_size=64))
def test_hostile_bytes_raise_nothing_else(payload):
    try:
        unpack(payload)
    except ValueError:
        pass


def test_a_large_request_has_few_arrays_and_maps_and_a_small_one_as_many_as_fit():
    few: list[Any] = [{}] * CONTAINERS_MAX
    many: list[Any] = [[]] * (CONTAINERS_MAX * 2)
    assert unpack_request(pack([1, "write", b"x" * (1 << 19)]))[1] == "write"
    assert unpack_request(pack(few[: 1 << 10])) == ({},) * (1 << 10)
    assert len(unpack_request(pack(few[:-1]))) == CONTAINERS_MAX - 1
    with pytest.raises(ValueError, match="arrays and maps"):
        unpack_request(pack(few))
    with pytest.raises(ValueError, match="arrays and maps"):
        unpack_request(pack([[[]] * 10] * 4000))
    with pytest.raises(ValueError, match="max_array_len"):
        unpack_request(pack(many))


def test_a_large_request_has_few_items_however_they_are_nested():
    texts = ["x"] * (ITEMS_MAX - 1)
    assert len(unpack_request(pack(texts))) == ITEMS_MAX - 1
    with pytest.raises(ValueError, match="items in them"):
        unpack_request(pack([texts, texts]))
    with pytest.raises(ValueError, match="items in them"):
        unpack_request(pack([{str(i): 0 for i in range(ITEMS_MAX)}]))
    with pytest.raises(ValueError, match="max_map_len"):
        unpack_request(pack({str(i): 0 for i in range(ITEMS_MAX + 1)}))


def of_equal_hashes(count: int) -> bytes:
    """A map whose names all collide: Python's hash of -2 is that of -1."""
    names = itertools.islice(itertools.product((-1, -2), repeat=14), count)
    return msgpack.Packer().pack_map_pairs([(name, 0) for name in names])


@pytest.mark.parametrize("count", [2, 1000, 5000])
def test_a_peer_that_may_mean_harm_names_what_is_in_its_maps_by_text_only(count):
    for inside in (of_equal_hashes(count), pack({1: 0})):
        payload = b"\x93\x01" + pack("act") + inside
        with pytest.raises(ValueError, match=r"map key|items|arrays"):
            unpack_request(payload)
        with pytest.raises(ValueError, match="msgpack"):
            unpack_first(payload)
        with pytest.raises(BadRequest, match="first frame"):
            check_hello(inside)
    assert unpack_request(pack({"a": {b"b": 1}})) == {"a": {b"b": 1}}


def test_what_was_not_taken_stays_in_its_order_when_more_comes():
    decoder = FrameDecoder()
    decoder.feed(frame(b"a") + frame(b"b") + frame(b"c")[:5])
    assert decoder.take() == b"a"
    decoder.feed(frame(b"c")[5:] + frame(b"d"))
    assert decoder.buffered == len(frame(b"b") + frame(b"c") + frame(b"d"))
    assert list(iter(decoder.take, None)) == [b"b", b"c", b"d"]


def test_frames_before_one_that_is_too_large_come_out_first():
    decoder = FrameDecoder(10)
    decoder.feed(frame(b"a") + frame(b"x" * 11))
    assert decoder.take() == b"a"
    with pytest.raises(FrameTooLarge):
        decoder.take()
