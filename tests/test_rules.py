import json
import sys

import pytest

from mlxq.rules import (
    OPERATIONS,
    QTYPES,
    QuantizationRule,
    RuleSet,
    assign,
    calibration,
    parse_rule,
    read_rules,
)

PATHS = [f"model/layers/{n}/{part}" for n in (0, 1, 10) for part in ("self_attn/q_proj", "mlp/down_proj")]
PATHS += ["model/embed_tokens", "lm_head"]


def bits_rule(pattern, bits, group_size=None):
    return QuantizationRule(
        module_path=pattern,
        weight_qtype=f"int{bits}",
        tile_size=group_size,
        weight_calibration_method="affine",
    )


def test_a_rule_reads_back_as_it_was_written():
    for text, rule in (
        (
            r"model/layers/\d+/mlp/down_proj=bits:8,group_size:32",
            bits_rule(r"model/layers/\d+/mlp/down_proj", 8, 32),
        ),
        ("lm_head=bits:6", bits_rule("lm_head", 6)),
        ("lm_head=bits:1,group_size:32", bits_rule("lm_head", 1, 32)),
        ("lm_head=bits:none", QuantizationRule(module_path="lm_head")),
        ("a=b|lm_head=group_size:128,bits:2", bits_rule("a=b|lm_head", 2, 128)),
        (
            "lm_head=weight_qtype:int8,act_qtype:int8,tile_size:64,act_static_scale:true,act_batch_axes:0,1,"
            "act_calibration_method:absmax,0.8,op_names:linear,matmul",
            QuantizationRule(
                module_path="lm_head",
                weight_qtype="int8",
                act_qtype="int8",
                tile_size=64,
                act_static_scale=True,
                act_batch_axes=(0, 1),
                act_calibration_method="absmax,0.8",
                op_names=("linear", "matmul"),
            ),
        ),
        (
            "x=bits:4,group_size:64,act_qtype:int8",
            QuantizationRule(
                module_path="x",
                weight_qtype="int4",
                tile_size=64,
                weight_calibration_method="affine",
                act_qtype="int8",
            ),
        ),
        (
            "x=weight_qtype:nf4,tile_size:0.25",
            QuantizationRule(module_path="x", weight_qtype="nf4", tile_size=0.25),
        ),
    ):
        assert parse_rule(text) == rule
        assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    "text, said",
    [
        ("lm_head", "PATTERN=bits:8"),
        ("=bits:8", "PATTERN=bits:8"),
        ("lm_head=", "PATTERN=bits:8"),
        ("lm_head=width:8", "PATTERN=bits:8"),
        ("lm_head=bits:8,bits:4", "PATTERN=bits:8"),
        ("lm_head=group_size:32", "bits are missing"),
        ("lm_head=bits:four", "takes a number"),
        ("lm_head=bits:-4", "takes a number"),
        ("lm_head=bits:7", "bits:7 does not exist; built: 1, 2, 3, 4, 5, 6, 8"),
        ("lm_head=bits:0", "bits:0 does not exist"),
        ("lm_head=bits:4,group_size:48", "group_size:48 does not exist; built: 32, 64, 128"),
        ("lm_(head=bits:4", "not a regular expression"),
        ("lm_head=bits:4,weight_qtype:int8", "use one form"),
        ("lm_head=weight_qtype:int9", "'int9' does not exist: built: int2"),
        ("lm_head=weight_qtype:uint8", "unsigned codes would clip"),
        ("lm_head=weight_qtype:int8,act_static_scale:true", "set act_qtype too"),
        ("lm_head=weight_qtype:int8,act_qtype:int8,act_static_scale:perhaps", "true or false"),
        ("lm_head=weight_qtype:int2,weight_calibration_method:minmax", "minmax serves int4 and int8"),
        ("lm_head=weight_qtype:int7,weight_calibration_method:affine", "int7 with affine does not exist"),
        ("lm_head=weight_qtype:int8,tile_size:0", "must be positive"),
        ("lm_head=weight_qtype:int8,tile_size:1.5", "at most 1"),
        ("lm_head=weight_qtype:int8,op_names:conv", "no operation 'conv'; built: linear"),
        (
            "lm_head=weight_qtype:int8,op_names:dot_general",
            "no operation 'dot_general': qwix's dot_general is linear here, as a layer",
        ),
        ("lm_head=weight_qtype:int8,act_qtype:int8,act_calibration_method:mlx", "is for weights"),
    ],
)
def test_a_malformed_rule_says_what_is_wanted(text, said):
    with pytest.raises(ValueError, match="lm_|=bits") as caught:
        parse_rule(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "method, want",
    [
        ("absmax", ("absmax", ())),
        ("absmax,0.8", ("absmax", (0.8,))),
        ("MinMax", ("minmax", ())),
        ("rms,3", ("rms", (3.0,))),
        ("fixed,4", ("fixed", (-4.0, 4.0))),
        ("fixed,-1,4", ("fixed", (-1.0, 4.0))),
    ],
)
def test_calibration_strings_are_taken_apart(method, want):
    assert calibration(method) == want


@pytest.mark.parametrize(
    "method",
    ["", "max", "rms", "rms,a", "fixed", "fixed,1,2", "fixed,2,1", "fixed,0", "fixed,1,2,3", "absmax,-1"],
)  # fmt: skip
def test_a_wrong_calibration_string_is_an_error(method):
    with pytest.raises(ValueError, match="calibration"):
        calibration(method)


def test_bounds_are_half_a_step_beyond_the_largest_integer_code():
    bounds = {name: qtype.bound for name, qtype in QTYPES.items()}
    assert bounds == {
        "int2": 1.5, "int3": 3.5, "int4": 7.5, "int5": 15.5, "int6": 31.5, "int7": 63.5, "int8": 127.5,
        "float8_e4m3fn": 448, "float8_e5m2": 57344, "nf4": 1, "mxfp8": 448, "mxfp4": 6, "nvfp4": 6,
    }  # fmt: skip


def test_the_pattern_must_match_the_whole_path():
    rule = QuantizationRule(module_path="model/layers/1", weight_qtype="int8")
    assert not any(rule.matches(path) for path in PATHS)
    rule = QuantizationRule(module_path=r"model/layers/1/.*", weight_qtype="int8")
    assert [path for path in PATHS if rule.matches(path)] == PATHS[2:4]


def test_the_first_match_wins():
    first, second = bits_rule(".*down_proj", 8, 32), bits_rule("model/.*", 2, 64)
    chosen = assign([first, second], PATHS)
    assert {path for path, rule in chosen.items() if rule is first} == {p for p in PATHS if "down_proj" in p}
    assert chosen["model/embed_tokens"] is second
    assert "lm_head" not in chosen


def test_a_first_match_without_a_weight_type_excludes_even_when_it_names_an_input_type():
    keep = QuantizationRule(module_path="lm_head", act_qtype="int8")
    chosen = assign([keep, bits_rule(".*", 4)], PATHS)
    assert chosen["lm_head"] is keep and chosen["lm_head"].weight_qtype is None
    assert chosen["model/embed_tokens"].bits == 4


def test_a_rule_holds_for_its_operations_only():
    sites = {"model/embed_tokens": "embedding", "lm_head": "linear"}
    chosen = assign([QuantizationRule(op_names="linear", weight_qtype="int8")], sites)
    assert list(chosen) == ["lm_head"]
    with pytest.raises(ValueError, match="its path matches, but no operation einsum is there"):
        assign([QuantizationRule(module_path="lm_head", op_names=("einsum",), weight_qtype="int8")], sites)
    assert set(sites.values()) < set(OPERATIONS)


def test_a_rule_that_only_repeats_an_earlier_one_is_no_error():
    rules = [bits_rule("lm_head", 8), bits_rule("lm_.*", 4)]
    assert assign(rules, PATHS)["lm_head"].bits == 8
    found = RuleSet(rules)
    found.find("lm_head")
    assert found.unused_rules() == [] and found.unused_rules(strict=True) == rules[1:]


def test_a_rule_that_matches_nothing_is_named_with_paths_that_look_like_it():
    rules = [bits_rule("lm_head", 8), bits_rule(r"model/layers/\d+/mlp/down", 8)]
    with pytest.raises(ValueError, match="matches no layer") as caught:
        assign(rules, PATHS)
    assert r"model/layers/\d+/mlp/down=bits:8 matches no layer" in str(caught.value)
    assert "model/layers/0/mlp/down_proj" in str(caught.value)
    assert "lm_head=bits" not in str(caught.value)
    assert list(assign(rules, PATHS, allow_unused=True)) == ["lm_head"]


def test_the_nearest_path_is_found_by_its_last_component_too():
    with pytest.raises(ValueError, match="layers are named like model/layers/0/mlp/down_proj and"):
        assign([bits_rule(".*/down_prog", 8)], PATHS)


def test_dots_between_components_are_recognised():
    with pytest.raises(ValueError, match="'/' between components"):
        assign([bits_rule(r"model\.layers\.\d+\.mlp\.down_proj", 8)], PATHS)


TOML = """
[[rule]]
module_path = "lm_head"
bits = "none"

[[rule]]
module_path = "model/layers/.*"
op_names = ["linear"]
weight_qtype = "int8"
act_qtype = "int8"
tile_size = 64
"""
WANTED = [
    QuantizationRule(module_path="lm_head"),
    QuantizationRule(
        module_path="model/layers/.*",
        op_names=("linear",),
        weight_qtype="int8",
        act_qtype="int8",
        tile_size=64,
    ),
]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11 for tomllib")
def test_a_toml_file_holds_rules_in_order(tmp_path):
    (tmp_path / "rules.toml").write_text(TOML)
    assert read_rules(tmp_path / "rules.toml") == WANTED


def test_what_a_rule_says_of_itself_makes_the_same_rule_from_json(tmp_path):
    file = tmp_path / "rules.json"
    file.write_text(json.dumps([rule.settings() for rule in WANTED]))
    assert read_rules(file) == WANTED
    file.write_text(json.dumps({"rule": [{"module_path": "x", "bits": 4, "group_size": 32}]}))
    assert read_rules(file, grid="mlx") == [
        QuantizationRule(module_path="x", weight_qtype="int4", tile_size=32, weight_calibration_method="mlx")
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("[{]", "Expecting"),
        ("{}", r"\[\[rule\]\]"),
        (
            '[{"module_path": "x", "wieght_qtype": "int8"}]',
            "rule 1: no setting .*did you mean 'weight_qtype'",
        ),
        ('[{"module_path": "x", "weight_qtype": "int99"}]', "rule 1: quantized type 'int99' does not exist"),
    ],
)
def test_a_wrong_rules_file_is_named(tmp_path, text, said):
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(ValueError, match=f"rules.json.*{said}"):
        read_rules(tmp_path / "rules.json")


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2"])
def test_a_dtype_of_torch_names_its_type(dtype):
    torch = pytest.importorskip("torch", reason="needs the package torch")
    assert QuantizationRule(weight_qtype=getattr(torch, dtype)).weight_qtype == dtype
