import pytest

from mlxq.rules import Rule, assign, parse_rule

PATHS = [f"model/layers/{n}/{part}" for n in (0, 1, 10) for part in ("self_attn/q_proj", "mlp/down_proj")]
PATHS += ["model/embed_tokens", "lm_head"]


def test_a_rule_reads_back_as_it_was_written():
    for text, rule in (
        (
            r"model/layers/\d+/mlp/down_proj=bits:8,group_size:32",
            Rule(r"model/layers/\d+/mlp/down_proj", 8, 32),
        ),
        ("lm_head=bits:6", Rule("lm_head", 6)),
        ("lm_head=bits:none", Rule("lm_head", None)),
        ("a=b|lm_head=group_size:128,bits:2", Rule("a=b|lm_head", 2, 128)),
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
    ],
)
def test_a_malformed_rule_says_what_is_wanted(text, said):
    with pytest.raises(ValueError, match="lm_|=bits") as caught:
        parse_rule(text)
    assert said in str(caught.value)


def test_the_pattern_must_match_the_whole_path():
    rule = Rule("model/layers/1", 8)
    assert not any(rule.matches(path) for path in PATHS)
    assert [path for path in PATHS if Rule(r"model/layers/1/.*", 8).matches(path)] == PATHS[2:4]


def test_the_first_match_wins():
    first, second = Rule(".*down_proj", 8, 32), Rule("model/.*", 2, 64)
    chosen = assign([first, second], PATHS)
    assert {path for path, rule in chosen.items() if rule is first} == {p for p in PATHS if "down_proj" in p}
    assert chosen["model/embed_tokens"] is second
    assert "lm_head" not in chosen


def test_a_rule_that_only_repeats_an_earlier_one_is_no_error():
    assert assign([Rule("lm_head", 8), Rule("lm_.*", 4)], PATHS)["lm_head"].bits == 8


def test_a_rule_that_matches_nothing_is_named_with_paths_that_look_like_it():
    with pytest.raises(ValueError, match="matches no layer") as caught:
        assign([Rule("lm_head", 8), Rule(r"model/layers/\d+/mlp/down", 8)], PATHS)
    assert r"model/layers/\d+/mlp/down=bits:8 matches no layer" in str(caught.value)
    assert "model/layers/0/mlp/down_proj" in str(caught.value)
    assert "lm_head=bits" not in str(caught.value)


def test_dots_between_components_are_recognised():
    with pytest.raises(ValueError, match="'/' between components"):
        assign([Rule(r"model\.layers\.\d+\.mlp\.down_proj", 8)], PATHS)
