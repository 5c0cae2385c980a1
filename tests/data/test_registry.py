"""The mixture language: expressions by hand, exact quotas, limits, nesting, and mistakes that are refused by name."""

from fractions import Fraction
from pathlib import Path

import pytest

from megatron_longvila.data.registry import Registry, load_registry, parse_expression

SIZES = {("a", ""): 100, ("b", ""): 60, ("c", ""): 7, ("a", "clean"): 80}
DATASETS = "datasets:\n  a: {path: rows/a, subsets: {clean: {exclude: bad.txt}}}\n  b: rows/b\n  c: /elsewhere/c\n"


def registry(tmp_path, mixtures: str = "", datasets: str = DATASETS) -> Registry:
    path = tmp_path / "mixtures.yaml"
    path.write_text(datasets + ("mixtures:\n" + mixtures if mixtures else ""))
    return load_registry(path)


def resolved(registry: Registry, expression: str, stage: str = "", sizes=SIZES) -> dict[str, Fraction]:
    found = registry.resolve(expression, stage, lambda dataset, subset: sizes[dataset, subset])
    return {wanted.label: samples for wanted, samples in found.items()}


def terms(text: str) -> list[tuple[str, Fraction]]:
    return [(term.label, term.weight) for term in parse_expression(text, "here")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", 1)]),
        ("a + 2*b", [("a", 1), ("b", 2)]),
        ("a*3+b", [("a", 3), ("b", 1)]),
        ("2*(a + 0.5*b@x)*3", [("a", 6), ("b@x", 3)]),
        ("0.1*a", [("a", Fraction(1, 10))]),
        ("(((a)))+.5*10k_data", [("a", 1), ("10k_data", Fraction(1, 2))]),
        ("2*3*a", [("a", 6)]),
        ("llava-1.5 + b.c_d", [("llava-1.5", 1), ("b.c_d", 1)]),
    ],
)
def test_expressions(text, expected):
    assert terms(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a name, a number or .*found its end"),
        ("a +", "found its end"),
        ("a b", "expected .*, found 'b'"),
        ("a * b", "only a number can be multiplied"),
        ("2 * 3", "number 6 stands without a name"),
        ("0*a", "must be above 0"),
        ("(a + b", r"expected \)"),
        ("a)", "found '\\)'"),
        ("a - b", "expected .* found '-'"),
        ("a / b", "'/' means nothing"),
        ("__import__('os')", "found '\\('"),
        ("(" * 60 + "a" + ")" * 60, "parentheses inside each other"),
        ("a@@b", "'@' means nothing"),
    ],
)
def test_wrong_expressions_show_the_place(text, message):
    with pytest.raises(ValueError, match=f"here.*{message}"):
        parse_expression(text, "here")


def test_weights_repeat_samples_and_equal_parts_add_up(tmp_path):
    found = registry(tmp_path, "  m: a + 2*b\n  n: 3*m + 0.5*c + a@clean\n  top: n + m + m\n")
    assert resolved(found, "m") == {"a": 100, "b": 120}
    assert resolved(found, "n") == {"a": 300, "b": 360, "c": Fraction(7, 2), "a@clean": 80}
    assert resolved(found, "top") == {"a": 500, "b": 600, "c": Fraction(7, 2), "a@clean": 80}
    assert resolved(found, "a + a + 2*(a@clean + c)") == {"a": 200, "a@clean": 160, "c": 14}


def test_shares_sizes_and_limits(tmp_path):
    found = registry(
        tmp_path,
        "  shares: {weights: {a: 3.0e-5, b: 1.0e-5}, size: 1000}\n"
        "  own_size: {weights: {a: 0.5, b: 0.5}}\n"
        "  sized: {mix: a + b, size: 320}\n"
        "  capped: {mix: a + 2*b, limit: 110}\n"
        "  roomy: {mix: a, limit: 1000}\n"
        "  nested: {weights: {capped: 0.25, c: 0.75}, size: 40, limit: 20}\n",
    )
    assert resolved(found, "shares") == {"a": 750, "b": 250}
    assert resolved(found, "own_size") == {"a": 80, "b": 80}
    assert resolved(found, "sized") == {"a": 200, "b": 120}
    assert resolved(found, "capped") == {"a": 50, "b": 60}
    assert resolved(found, "roomy") == {"a": 100}
    assert resolved(found, "nested") == {"a": Fraction(5) * 5 / 11, "b": Fraction(5) * 6 / 11, "c": 15}
    assert resolved(found, "2*capped + c") == {"a": 100, "b": 120, "c": 7}  # a limit holds inside, before what stands around it


def test_limits_of_stages(tmp_path):
    found = registry(tmp_path, "  m: {mix: a + b, limit: {stage3: 80, stage5: 16}}\n  n: {mix: m + c, limit: {stage2: 5}}\n")
    assert resolved(found, "m", "stage3") == {"a": 50, "b": 30}
    assert resolved(found, "n", "stage5") == {"a": 10, "b": 6, "c": 7}
    assert resolved(found, "m", "stage2") == {"a": 100, "b": 60}  # a stage that a limit does not name has none
    assert sum(resolved(found, "n", "stage2").values()) == 5
    with pytest.raises(ValueError, match="mixture m has limits for stage3, stage5, but data.stage is empty"):
        resolved(found, "m")
    assert resolved(found, "c") == {"c": 7}
    with pytest.raises(ValueError, match="data.stage='stage4' is named by no limit.*stage3"):
        resolved(found, "m", "stage4")


def test_seeds_belong_to_the_innermost_mixture(tmp_path):
    found = registry(tmp_path, "  m: {mix: a, seed: 3}\n  n: {mix: m + b, seed: 4}\n")
    wanted = found.resolve("n + c + a", "", lambda dataset, subset: 1)
    assert [(one.label, one.seed) for one in wanted] == [("a", 3), ("b", 4), ("c", 0), ("a", 0)]


def test_a_mixture_doubled_thirty_times_is_worked_out_once_a_level(tmp_path):
    levels = "".join(f"  m{level}: m{level - 1} + n{level - 1}\n  n{level}: n{level - 1} + m{level - 1}\n" for level in range(1, 60))
    found = registry(tmp_path, f"  m0: a\n  n0: b\n{levels}")
    assert sum(resolved(found, "m59").values()) == 2**58 * 160


@pytest.mark.parametrize(
    ("expression", "mixtures", "message"),
    [
        ("d", "", "there is no 'd'; known are a, b, c"),
        ("lava", "  llava: a\n", "llava\\?"),
        ("m", "  m: n\n  n: m\n", "holds itself: m > n > m"),
        ("a@dirty", "", "no subset 'dirty'.*clean"),
        ("m@clean", "  m: a\n", "subsets belong to datasets"),
        ("m", "  m: a + e\n", "mixture m: there is no 'e'"),
    ],
)
def test_unknown_names_and_circles(tmp_path, expression, mixtures, message):
    with pytest.raises(ValueError, match=message):
        resolved(registry(tmp_path, mixtures), expression)


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="b holds no sample"):
        resolved(registry(tmp_path), "a + b", sizes=SIZES | {("b", ""): 0})


def test_paths_start_at_the_file(tmp_path):
    found = registry(tmp_path)
    assert found.datasets["b"].path == tmp_path / "rows" / "b" and str(found.datasets["c"].path) == "/elsewhere/c"
    assert found.datasets["a"].subsets["clean"].exclude == tmp_path / "bad.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: {a: x}\nmixture: {}\n", "unknown key 'mixture'.*mixtures\\?"),
        ("datasets: {a: {folder: x}}\n", "dataset a: unknown key 'folder'"),
        ("datasets: {a: {}}\n", "dataset a: path must be"),
        ("datasets: {a: x}\nmixtures: {a: a}\n", "'a' is a dataset and a mixture"),
        ("datasets: {a: x, a: y}\n", "the key 'a' stands twice"),
        ("datasets: {2: x}\n", "name 2 in datasets"),
        ("datasets: {'a b': x}\n", "name 'a b' in datasets"),
        ("datasets: [a]\n", "datasets must map"),
        ("- a\n", "must be a mapping"),
        ("datasets: {a: {path: x, subsets: {s: {first: 1, count: 2}}}}\n", "first and count exclude"),
        ("datasets: {a: {path: x, subsets: {s: {seed: 2}}}}\n", "is the whole dataset"),
        ("datasets: {a: {path: x, subsets: {s: {fraction: 1.5}}}}\n", "at most 1"),
        ("datasets: {a: {path: x, subsets: {s: {first: 0}}}}\n", "first must be a whole number of at least 1"),
        ("mixtures: {m: {mix: a, weights: {a: 1}}}\n", "either mix .* or weights"),
        ("mixtures: {m: {size: 4}}\n", "either mix .* or weights"),
        ("mixtures: {m: {weights: {a: -1}}}\n", "weight of a must be a number above 0"),
        ("mixtures: {m: {weights: {a: .nan}}}\n", "weight of a must be a number above 0"),
        ("mixtures: {m: {weights: {2*a: 1}}}\n", "must be a name"),
        ("mixtures: {m: {mix: a, limit: {s: 0}}}\n", "limit of s must be a whole number"),
        ("mixtures: {m: {mix: a, limit: 2.5}}\n", "limit must be a whole number"),
        ("mixtures: {m: {mix: 'a +'}}\n", "mixture m.*found its end"),
        ("mixtures: {m: !!python/object/apply:os.system [ls]}\n", "cannot be read"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_mistakes_in_the_file_are_refused(tmp_path, text, message):
    path = tmp_path / "mixtures.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_registry(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.registry=.*cannot be read"):
        load_registry(tmp_path / "none.yaml")


def test_the_example_resolves():
    found = load_registry(Path(__file__).parents[2] / "examples" / "mixtures" / "longvila.yaml")
    for stage in ("trial", "full"):
        for name in found.mixtures:
            samples = found.resolve(name, stage, lambda dataset, subset: 700_000)
            assert samples and (stage == "full" or name not in ("short_sft", "long_sft") or sum(samples.values()) in (500, 2000))
    shown = found.resolve("short_sft", "full", lambda dataset, subset: 700_000)
    assert sum(shown.values()) == 600_000 and next(iter(shown.values())) == 360_000
