"""Protobuf text: messages read and printed, and errors and fields with their lines."""

from __future__ import annotations

import pytest
from google.protobuf import descriptor_pool

from amct_ext.proto import message_class
from amct_ext.proto.text import FieldLocations, MessageSyntaxError, close_matches, format_message, parse_message

CONFIG = "amct_ext.config.RetrainConfig"


def test_locations_follow_the_text() -> None:
    text = 'a: 1\nb { c: 2 #x {\n c: "]" "x"\n d <e: 1> }\nskip: ["a",\n"b"];\nb: {c:7 },\n'
    locations = FieldLocations("f", text)
    assert locations.at("a") == "f:1"
    assert locations.at("b") == "f:7"
    assert locations.at("b", 0, "c") == "f:3"
    assert locations.at("b", 0, "c", 0) == "f:2"
    assert locations.at("b", 0, "d", "e") == "f:4"
    assert locations.at("skip", 1) == "f:6"
    assert locations.at("b", 0, "absent") == "f:2"
    assert locations.at("absent") == "f"


def test_a_message_is_printed_as_it_was_read() -> None:
    text = 'batch_num: 3\nskip_layers: "conv1"\nskip_layers: "f\u00fcnf"\n'
    message = parse_message(CONFIG, text, "job.cfg")
    assert message.batch_num == 3 and list(message.skip_layers) == ["conv1", "f\u00fcnf"]
    assert format_message(message) == text


def test_a_scalar_given_twice_is_an_error_unless_the_last_one_counts() -> None:
    text = "batch_num: 1\nbatch_num: 2\n"
    with pytest.raises(MessageSyntaxError) as caught:
        parse_message(CONFIG, text, "job.cfg")
    assert "batch_num" in caught.value.reason and caught.value.args[1:] == (2, 12)
    assert parse_message(CONFIG, text, "job.cfg", repeated_scalars=True).batch_num == 2


def test_an_unknown_field_is_named_with_what_is_near() -> None:
    with pytest.raises(MessageSyntaxError) as caught:
        parse_message(CONFIG, "\nbatchnum: 1", "job.cfg")
    reason = caught.value.reason
    assert reason.startswith("job.cfg:2:") and "'batchnum' in RetrainConfig; did you mean 'batch_num'" in reason


def test_long_values_do_not_fill_the_message() -> None:
    with pytest.raises(MessageSyntaxError) as caught:
        parse_message(CONFIG, f"batch_num: {'x' * 5000}", "job.cfg")
    assert len(caught.value.reason) < 600


def test_close_matches_are_three_at_most_or_none() -> None:
    assert close_matches("conv", ["conv1", "conv2", "conv3", "conv4"]).count("conv") == 3
    assert close_matches("zzz", ["conv1"]) == ""


def test_messages_live_in_a_pool_of_their_own() -> None:
    assert message_class(CONFIG)().batch_num == 1
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName(CONFIG)
