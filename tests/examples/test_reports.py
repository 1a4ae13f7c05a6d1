"""Tables of records: intervals over runs, and differences only between runs of one seed on one device model."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import pdist

from examples.pretrain.reports import code_colors, differences, evaluation, judged, sweep
from examples.pretrain.reports.pairing import Key

SPACE = "\N{NO-BREAK SPACE}"


def swept(variant, seed, points, device=None, trained_on=None):
    """A record of the sweep, `points` above one half with 1% of the labels."""
    record = {"variant": variant, "seed": seed, "auc": {"0.01": [0.5 + points / 100], "0.05": [0.5]}, "last_epoch": {}}
    return record | {"device": device, "pretrained_on": trained_on or []}


def cells(table):
    """The cells of each row of a markdown table, after the header."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip().replace(SPACE, " ") for cell in line.split("|")[1:-1]] for line in lines[2:]]


# ---- the sweep ----


def test_first_seeds_and_others_are_reported_apart():
    """Gains over BYOL of 1, 2, 3 in the first seeds, of -1 and -2 in the others; one variant has the first only."""
    gains = {"byol": [0] * 5, "full": [0] * 5, "cosine": [1, 2, 3, -1, -2], "shared": [5, 5, 5]}
    records = [swept(name, seed, gain) for name, values in gains.items() for seed, gain in enumerate(values)]
    full, cosine = cells(sweep.again(sweep.by_variant(records)))
    assert full == ["full", "0.0 ± 0.0", "0.0 ± 0.0", "0.0 ± 0.0", "0.0 ± 0.0", "–", "–", "–", "–"]
    first, other = "2.0 ± 2.5", "-1.5 ± 6.4"  # t(0.975) of 4.303 and 12.706, times 1 / sqrt(3) and 0.7071 / sqrt(2)
    assert cosine == ["cosine", first, other, "0.0 ± 0.0", "0.0 ± 0.0", first, other, "0.0 ± 0.0", "0.0 ± 0.0"]
    chosen = [record for record in records if record["variant"] in ("byol", "shared")]
    assert sweep.again(sweep.by_variant(chosen)) == ""


def test_the_short_table_has_the_figures_of_the_whole_one():
    records = sweep.by_variant(
        [swept(name, seed, 2 * seed + gain) for name, gain in (("byol", 0), ("full", 1)) for seed in (0, 1)]
    )
    byol, full = cells(sweep.short_table(records))
    whole = cells(sweep.table(records))
    assert byol == [*whole[0][:4], "–", "–"]
    assert full == [*whole[1][:4], "1.0 ± 0.0", "0.0 ± 0.0"] == whole[1][:6]


def test_seeds_that_chose_and_those_that_judge_stand_apart(tmp_path):
    """Seeds 0 to 5 chose; seeds 6 and 7 judge. BYOL is at 1 in all seeds, but seed 7 ran on another model."""
    gains = {0: 1, 1: 2, 2: 3, 6: -1, 7: -2}
    records = [swept("anchors", seed, 1 + gain, "A", ["A"]) for seed, gain in gains.items()]
    records += [swept("byol", seed, 1, "A", ["A"]) for seed in (0, 1, 2, 6)] + [swept("byol", 7, 1, "B", ["B"])]
    found = sweep.by_variant(records)
    _, ours = cells(judged.table(found))
    assert ours == ["anchors", "5", "51.6", "50.0", "+2.0 ± 2.5 (3)", "+0.0 ± 0.0 (3)", "-1.0 (1)", "+0.0 (1)"]
    assert "Device models: A (9 runs), B (1 run)" in judged.table(found)
    differences.draw(found, tmp_path / "differences.png", choosing=6)
    assert (tmp_path / "differences.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("ours", "theirs", "paired"),
    [
        ((None, []), (None, []), True),  # both of unknown models
        (("A", ["A"]), ("A", ["A"]), True),
        (("A", ["A"]), ("B", ["B"]), False),
        (("A", ["A"]), (None, []), False),
        (("A", ["A"]), ("A", ["B"]), False),  # measured on one model, trained on two
        (("A", ["A", "B"]), ("A", ["A"]), False),  # resumed on another model
        (("A", ["A"]), ("A", []), True),  # untrained
    ],
)
def test_runs_pair_within_one_device_model_only(ours, theirs, paired):
    records = [swept("full", 3, 4, *ours), swept("byol", 3, 1, *theirs)]
    assert sweep.gains(sweep.by_variant(records), "full", "0.01") == ([pytest.approx(3)] if paired else [])
    scores = [{"1%": [5.0]}, {"1%": [2.0]}]
    keys = [Key(3, device, tuple(trained)) for device, trained in (ours, theirs)]
    found = evaluation.difference({keys[0]: scores[0]}, {keys[1]: scores[1]}, "1%")
    assert found == ([[3.0]] if paired else [])


def test_one_seed_on_two_models_is_two_runs():
    records = sweep.by_variant(
        [swept(name, 0, points, model, [model]) for name, points, model in
         (("byol", 1, "A"), ("byol", 9, "B"), ("full", 3, "A"), ("full", 10, "B"))]
    )  # fmt: skip
    assert sweep.gains(records, "full", "0.01") == [pytest.approx(2), pytest.approx(1)]
    text = sweep.table(records)
    assert [row[:2] for row in cells(text)] == [["byol", "2"], ["full", "2"]]
    assert "Device models: A (2 runs), B (2 runs). Differences are only taken within one model." in text


def test_a_table_says_where_models_are_unknown():
    old, new = swept("byol", 0, 1), swept("full", 0, 1, "A", ["A"])
    assert "Device model: unknown (1 run), so that differences may mix models." in sweep.table(sweep.by_variant([old]))
    mixed = sweep.table(sweep.by_variant([old, new]))
    assert "Device models: unknown (1 run), A (1 run)." in mixed
    assert "those of an unknown model may mix several" in mixed


def test_two_records_of_one_run_are_refused():
    with pytest.raises(ValueError, match="two of byol, seed 0, on A"):
        sweep.by_variant([swept("byol", 0, 1, "A"), swept("byol", 0, 2, "A")])


def test_figures_that_a_method_does_not_log_are_dashes():
    record = swept("byol", 0, 1)
    record["last_epoch"] = {"alignment_global": 0.25, "target_spread": 0.7}
    [row] = cells(sweep.table(sweep.by_variant([record])))
    assert row[-6:] == ["0.25", "–", "–", "0.70", "–", "–"]


# ---- the evaluation ----


def key(seed, device=None):
    return Key(seed, device, ())


def test_intervals_are_over_runs_if_there_are_several():
    draws = [[70.0, 72.0], [74.0, 74.0], [75.0, 77.0]]
    mean, half = evaluation.interval(draws)
    means = [71.0, 74.0, 76.0]
    low, high = stats.t.interval(0.95, 2, sum(means) / 3, stats.sem(means))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    one, half = evaluation.interval(draws[:1])
    assert (one, half) == (71.0, pytest.approx(stats.t.ppf(0.975, 1) * stats.sem(draws[0])))
    assert evaluation.interval([[5.0]]) == (5.0, None)


def test_differences_are_paired_by_seed_and_subset():
    a = {key(0): {"1%": [3.0, 5.0]}, key(1): {"1%": [9.0, 9.0]}, key(2): {"1%": [1.0, 1.0]}}
    b = {key(0): {"1%": [1.0, 1.0]}, key(1): {"1%": [9.0, 8.0]}}
    assert evaluation.difference(a, b, "1%") == [[2.0, 4.0], [0.0, 1.0]]
    assert f"| dissect over byol | 2 | 1.8{SPACE}±" in evaluation.table_of({"byol": b, "dissect": a}, 1)


def test_no_gap_without_an_encoder_that_has_both():
    scores = {key(0): {"1%": [3.0, 5.0]}}
    assert evaluation.gap_of({"byol": scores}, {"random": scores}) == ""
    assert evaluation.gap_of({"byol": scores}, {"byol": {key(1): {"1%": [1.0, 1.0]}}}) == ""
    assert "| byol | 1 |" in evaluation.gap_of({"byol": scores, "random": scores}, {"byol": scores})


def evaluated(encoder, seed, score, **changes):
    record = {
        "protocol": "linear", "encoder": encoder, "seed": seed, "scores": {"1%": [score]}, "device": "A",
        "settings": {"subsets": 3}, "images": {"train": {"sha256": f"s{seed}"}},
        "pretraining": {"method": encoder, "seed": seed}, "checkpoint": {"sha256": f"{encoder}{seed}"},
    }  # fmt: skip
    return record | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"subsets": 5}}, r"settings\.subsets is 3 and 5"),
        ({"pretraining": {"method": "other", "seed": 1}}, r"pretraining\.method is byol and other"),
    ],
)
def test_records_that_do_not_belong_together_are_refused(changes, message):
    records = [evaluated("byol", 0, 70.0), evaluated("byol", 1, 71.0, **changes)]
    with pytest.raises(
        ValueError, match=r"linear of byol, seed 0 and linear of byol, seed 1 do not belong .*" + message
    ):
        evaluation.tables(records)


def test_other_images_or_another_checkpoint_of_one_run_are_refused():
    first = evaluated("byol", 0, 70.0)
    with pytest.raises(ValueError, match=r"images\.sha256 is s0 and other"):
        evaluation.tables([first, evaluated("dissect", 0, 71.0, images={"train": {"sha256": "other"}})])
    again = evaluated("byol", 0, 71.0, protocol="finetune", checkpoint={"sha256": "other"})
    with pytest.raises(ValueError, match=r"checkpoint\.sha256 is byol0 and other"):
        evaluation.tables([first, again])
    # The same seed on another model is another run, with a checkpoint of its own.
    text = evaluation.tables([first, again | {"device": "B", "pretrained_on": ["B"]}])
    assert "Device models: A (1 run), B (1 run)." in text


def test_records_of_the_first_layout_are_read():
    """Records without device model, whose settings nest in `model`, give a table of their own."""
    old = [
        {
            **evaluated(name, 0, score),
            "pretraining": {"method": name, "model": {"width": 12}, "seed": 0, "device": "cpu"},
        }
        for name, score in (("byol", 70.0), ("full", 72.5))
    ]
    for record in old:
        del record["device"]
    text = evaluation.tables(old)
    assert "| full over byol | 1 | 2.5 |" in text
    assert "Device model: unknown (2 runs)" in text


def test_near_codes_get_near_colours():
    """Codes on a plane in 16 dimensions: distances in L*a*b* are those of the codes, but for one factor."""
    rng = np.random.default_rng(0)
    plane, _ = np.linalg.qr(rng.standard_normal((16, 2)))
    codes = rng.uniform(-1, 1, (40, 2)) @ plane.T + 3
    ratio = pdist(code_colors.lab_of(codes)) / pdist(codes)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    shuffled = pdist(codes[rng.permutation(40)])
    assert abs(np.corrcoef(pdist(code_colors.lab_of(codes)), shuffled)[0, 1]) < 0.3


@pytest.mark.parametrize("codes", [np.zeros((5, 3)), np.ones((1, 8)), np.eye(2)])
def test_colours_of_few_or_equal_codes_are_colours(codes):
    found = code_colors.code_colors(codes)
    assert found.shape == (len(codes), 3)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found == found[0]).all() == (codes == codes[0]).all()


def test_pictures_are_drawn(tmp_path: Path):
    differences.draw(sweep.by_variant([swept("byol", 0, 1), swept("mine", 0, 2)]), tmp_path / "auc.png")
    evaluation.draw_shares([evaluated("byol", 0, 70.0)], tmp_path / "shares.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("auc.png", "shares.png"))
