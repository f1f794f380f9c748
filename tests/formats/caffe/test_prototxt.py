"""The text format: what protobuf allows is read, what it does not is refused with its line."""

from __future__ import annotations

import pytest

from kindling.errors import FormatError
from kindling.formats.caffe.prototxt import MAX_DEPTH, parse

LAYER = 'name: "n" layer {{ name: "c" type: "Convolution" convolution_param {{ {} }} }}'


def setting(text: str, name: str) -> object:
    return parse(LAYER.format(text)).all("layer")[0].get("convolution_param").get(name)


def test_every_way_to_write_a_message_is_read() -> None:
    for text in (
        "layer { param { lr_mult: 2 } param: { lr_mult: 3 } }",
        "layer < param < lr_mult: 2; > param: < lr_mult: 3, > >",
        "layer: [{ param: [{ lr_mult: 2 }, { lr_mult: 3 }] }]",
        "# a comment\nlayer { # another\n param { lr_mult: 2.0f } param { lr_mult: 0.3e1 } }",
    ):
        (layer,) = parse(text).all("layer")
        assert [spec.get("lr_mult") for spec in layer.all("param")] == [2, 3]


def test_lists_of_numbers_may_be_short() -> None:
    assert parse("input_dim: [1, 3, 0x10, 010]").all("input_dim") == [1, 3, 16, 8]
    assert parse("input_dim: []").all("input_dim") == []


def test_strings_come_in_either_quote_in_parts_and_with_escapes() -> None:
    net = parse("""name: 'it\\'s' "\\101\\x42\\n" 'é'""")
    assert net.get("name") == "it'sAB\né"


def test_enums_come_by_name_and_by_number() -> None:
    pool = parse("layer { pooling_param { pool: 1 } }").all("layer")[0].get("pooling_param")
    assert pool.get("pool") == "AVE"
    assert parse("layer { include { phase: TRAIN } }").all("layer")[0].all("include")[0].get("phase") == "TRAIN"


def test_what_is_not_given_has_caffes_default() -> None:
    assert setting("", "bias_term") is True
    assert setting("", "group") == 1
    assert parse("layer { lrn_param { } }").all("layer")[0].get("lrn_param").get("beta") == 0.75


def test_the_last_of_two_values_counts_and_messages_are_merged() -> None:
    assert setting("group: 2 group: 4", "group") == 4
    layer = parse("layer { lrn_param { alpha: 2 beta: 3 } lrn_param { beta: 4 } }").all("layer")[0]
    assert (layer.get("lrn_param").get("alpha"), layer.get("lrn_param").get("beta")) == (2, 4)


def test_parameters_of_unknown_layers_are_kept() -> None:
    layer = parse('layer { type: "Mine" mine_param { size: 3 deep { name: "x" } } }').all("layer")[0]
    mine = layer.get("mine_param")
    assert (mine.get("size"), mine.get("deep").get("name")) == (3, "x")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('name: "x"\nlayer { nam: "y" }', r"line 2: LayerParameter has no field 'nam'. Did you mean 'name'\?"),
        ("layer {\n convolution_param {\n kernel: 3 } }", r"line 3: .*no field 'kernel'. Did you mean 'kernel_"),
        ("layer {\n", r"ends before the '}' of line 1. Is the file whole"),
        ("layer { name: }", "'}' stands where the value of 'name' should"),
        ("layer { name 'x' }", "':' is missing after 'name'"),
        ("name: 3", "'name' takes a text in quotes, not '3'"),
        ("layer { convolution_param { num_output: -1 } }", "takes a whole number from 0 to 4294967295, not '-1'"),
        ("layer { convolution_param { num_output: 5000000000 } }", "takes a whole number from 0"),
        ("layer { lrn_param { alpha: abc } }", "'alpha' takes a number, not 'abc'"),
        ("layer { pooling_param { pool: MIN } }", "takes a name of PoolingParameter.PoolMethod, not 'MIN'"),
        ("force_backward: maybe", "takes true or false"),
        ("layer: 3", "'layer' takes a message in braces, not '3'"),
        ("name { }", "'name' takes one value"),
        ('name: "x', "is not part of the text format"),
        ("\n\n\n@", "line 4: '@' is not part of the text format"),
        ("input_dim: [1, 2", "is not closed by ']'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        parse(text)


def test_deep_nesting_is_refused_before_python_gives_up() -> None:
    with pytest.raises(FormatError, match=f"nested more than {MAX_DEPTH} deep"):
        parse("layer { x_param " + "{ a " * 100_000)


def test_numbers_of_a_million_digits_are_refused_quickly() -> None:
    with pytest.raises(FormatError, match="takes a whole number"):
        parse("input_dim: " + "9" * 1_000_000)
