"""The command line: its flags are frozen, and what they mean for the pruning method."""

import pytest

from llava.eval import eval_gqa, eval_mme, eval_pope, eval_textvqa
from llava.eval.common.arguments import (
    GenerationOptions,
    check_budget,
    check_range,
    merge_type_from_args,
    method_from_args,
    parse_count,
    parse_method_args,
)
from llava.eval.model_vqa_loader import build_parser
from llava.utils import UserError

# Scripts, other people's tools and habits depend on these. Add to the list; remove nothing from it.
LOADER_FLAGS = """
    --answers-file --attn-implementation --batch-size --budget --chunk-idx --conv-mode --device --dtype --gamma --help
    --image-folder --k0 --limit --max-new-tokens --max_new_tokens --method --method-args --model-base
    --model-path --no-resume --num-beams --num-chunks --num_beams --positions --question-file --resume --seed --strict
    --target-ratio --target-token-num --temperature --top-p --top_p --trace-file --visual-token-num --x0 -h
    --mm-patch-merge-type --overwrite --max-image-pixels --num-workers --padding-attention --quiet --trace-kept
    --view-budget
""".split()


def parse(*flags):
    return build_parser().parse_args(["--model-path", "m", *flags])


def test_loader_flags_are_frozen():
    flags = [option for action in build_parser()._actions for option in action.option_strings]
    assert sorted(flags) == sorted(LOADER_FLAGS)


def test_loader_defaults_are_frozen():
    args = vars(parse())
    expected = {
        "conv_mode": "vicuna_v1", "temperature": 0.0, "top_p": None, "num_beams": 1, "max_new_tokens": 128,
        "seed": 0, "batch_size": 1, "method": "autoprune", "target_token_num": None, "num_chunks": 1, "chunk_idx": 0,
        "resume": True, "strict": False, "dtype": "auto", "device": None, "limit": None,
    }  # fmt: skip
    assert {key: args[key] for key in expected} == expected


@pytest.mark.parametrize("module", [eval_gqa, eval_mme, eval_pope, eval_textvqa])
def test_scorers_print_help(module, capsys):
    with pytest.raises(SystemExit) as exit_info:
        module.main(["--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "--result-file" in printed and "--json" in printed


def test_default_method_is_autoprune_at_64():
    method = method_from_args(parse())
    assert (method.name, method.target_tokens, method.x0, method.k0, method.gamma) == (
        "autoprune",
        64,
        14.9,
        0.4,
        0.2,
    )


def test_flags_and_method_args_reach_the_method():
    method = method_from_args(
        parse("--target-token-num", "128", "--x0", "7", "--gamma", "0.1", "--positions", "original")
    )
    assert (method.target_tokens, method.x0, method.gamma, method.positions) == (128, 7.0, 0.1, "original")
    method = method_from_args(parse("--method-args", "target_tokens=32, k0=0.3"))
    assert (method.target_tokens, method.k0) == (32, 0.3)


def test_dense_ignores_a_budget():
    for budget in (("--target-token-num", "64"), ("--target-ratio", "0.11")):
        method = method_from_args(parse("--method", "dense", *budget))
        assert (method.target_tokens, method.target_ratio) == (None, None)
        assert method_from_args(parse("--method", "2:fastv:0.5", *budget)).aim_of(576) is None


def test_a_budget_as_a_share():
    for flags in (("--target-ratio", "0.11"), ("--method-args", "target_ratio=0.11")):
        method = method_from_args(parse(*flags))
        assert (method.target_tokens, method.target_of(576), method.target_of(100)) == (None, 63, 11)
        check_budget(method, 5)
    first, last = method_from_args(
        parse("--method", "divprune+fastv", "--method-args", "divprune.target_ratio=0.5", "--target-ratio", "0.29")
    ).parts
    assert (first.target_of(100), last.target_of(100)) == (50, 29)


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_other_methods_get_the_same_budget(name):
    assert method_from_args(parse("--method", name, "--target-token-num", "100")).target_tokens == 100


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--target-token-num", "0"], ["--target-token-num", "at least 1", "0"]),
        (["--target-token-num", "-5"], ["--target-token-num", "-5"]),
        (["--target-ratio", "0"], ["--target-ratio must be above 0 and at most 1, got 0.0"]),
        (["--target-ratio", "1.5"], ["--target-ratio", "1.5"]),
        (["--target-ratio", "nan"], ["--target-ratio", "nan"]),
        (["--target-ratio", "0.1", "--target-token-num", "64"], ["--target-token-num and --target-ratio", "one"]),
        (["--method-args", "target_ratio=0.1", "--target-token-num", "64"], ["--target-token-num and --target-ratio"]),
        (["--method-args", "target_ratio=0.1,target_tokens=9"], ["--target-token-num and --target-ratio"]),
        (["--method", "dense", "--target-ratio", "0.1", "--target-token-num", "4"], ["--target-ratio", "give one"]),
        (["--method-args", "target_ratio=0.1", "--target-ratio", "0.1"], ["same option"]),
        (["--method-args", "target_ratio=2"], ["target_ratio must be above 0 and at most 1, got 2.0"]),
        (["--visual-token-num", "0"], ["--visual-token-num", "at least 1"]),
        (["--method", "nosuch"], ["--method", "nosuch", "autoprune", "dense"]),
        (["--method-args", "nosuch=1"], ["nosuch", "x0", "target_tokens"]),
        (["--method-args", "x0"], ["--method-args", "'x0'", "key=value"]),
        (["--method-args", "x0=1,x0=2"], ["x0", "twice"]),
        (["--method-args", "x0=high"], ["x0", "high"]),
        (["--x0", "3", "--method-args", "x0=4"], ["--x0", "--method-args"]),
        (["--method", "random", "--x0", "3"], ["random", "x0"]),
        (["--method-args", "amplitude=-1"], ["amplitude", "-1"]),
    ],
)
def test_wrong_method_options(flags, parts):
    with pytest.raises(UserError) as error:
        method_from_args(parse(*flags))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_method_args_of_nothing():
    assert parse_method_args("") == {} and parse_method_args(" , ") == {}


def test_budget_above_the_visual_tokens():
    method = method_from_args(parse("--target-token-num", "577"))
    with pytest.raises(UserError, match="--target-token-num 577 .*576 visual tokens"):
        check_budget(method, 576)
    check_budget(method, 577)
    check_budget(method_from_args(parse("--method", "dense")), 1)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"num_beams": 0},
        {"max_new_tokens": 0},
    ],
)
def test_wrong_generation_options(values):
    with pytest.raises(UserError, match=next(iter(values))):
        GenerationOptions(**values)


def test_sampling_parameters_are_passed_only_when_sampling():
    assert "temperature" not in GenerationOptions().generate_kwargs
    kwargs = GenerationOptions(temperature=0.7, top_p=0.9).generate_kwargs
    assert (kwargs["do_sample"], kwargs["temperature"], kwargs["top_p"]) == (True, 0.7, 0.9)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "spatial"),
        (["--method", "dense"], None),
        (["--mm-patch-merge-type", "spatial_unpad"], "spatial_unpad"),
        (["--method", "dense", "--mm-patch-merge-type", "flat"], "flat"),
    ],
)
def test_merge_type_follows_the_flag_and_else_the_method(flags, expected):
    assert merge_type_from_args(parse(*flags)) == expected


def test_budget_compositions_and_schedules_from_flags():
    assert method_from_args(parse("--method", "fastv", "--budget", "processed")).budget == "processed"
    args = ["--method", "divprune+autoprune", "--method-args", "divprune.target_tokens=128,autoprune.mi_layer=0"]
    first, last = method_from_args(parse(*args, "--target-token-num", "32", "--x0", "5")).parts
    assert (first.target_tokens, last.target_tokens, last.x0, last.mi_layer) == (128, 32, 5.0, 0)
    with pytest.raises(UserError, match="--method divprune.autoprune: .*give the budget of divprune too"):
        method_from_args(parse("--method", "divprune+autoprune"))
    assert method_from_args(parse("--method", "2:fastv:0.5;16:random:0.5")).aim_of(576) is None
    with pytest.raises(UserError, match="--method: schedule entry '2:fastv' must be"):
        method_from_args(parse("--method", "2:fastv"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", float("nan")), ("top_p", 2.0),
        ("num_beams", 10**30), ("max_new_tokens", 10**30), ("max_new_tokens", -1), ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_numbers_that_no_generation_takes(flag, value):
    with pytest.raises(UserError, match=f"^--{flag} must be") as error:
        GenerationOptions(**{flag: value})
    assert len(str(error.value)) < 100


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5", "\u00b2", "9" * 30, "9" * 5000])
def test_counts(text):
    assert parse_count(" 12", "--budgets") == 12
    with pytest.raises(UserError, match="^--budgets: .* is not a number of at least 1$") as error:
        parse_count(text, "--budgets")
    assert len(str(error.value)) < 100


def test_ranges():
    check_range("--limit", None, 1)
    check_range("--limit", 1, 1, 2)
    for value, message in ((0, "at least 1, got 0"), (3, "at most 2, got 3"), (float("nan"), "at least 1, got nan")):
        with pytest.raises(UserError, match=f"^--limit must be {message}"):
            check_range("--limit", value, 1, 2)
