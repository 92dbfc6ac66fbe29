"""The studies of MagNet and Defense-GAN: rows, resume, figures, bad input, the launchers."""

import csv
import dataclasses

import numpy as np
import pytest

from advjax.experiments import defended, defense_gan, magnet

MAGNET = dataclasses.replace(
    magnet.smaller(magnet.Config()),
    settings=magnet.SETTINGS,
    temperatures=(10.0,),
    ae_num_epochs=60,
    gray_num_examples=12,
)
DEFENSE_GAN = dataclasses.replace(
    defense_gan.smaller(defense_gan.Config()), attacks=("fgsm", "bpda"), gan_num_steps=300
)


@pytest.fixture(scope="module")
def magnet_run(tmp_path_factory):
    return magnet.run_study(MAGNET, tmp_path_factory.mktemp("magnet"))


@pytest.fixture(scope="module")
def gan_run(tmp_path_factory):
    return defense_gan.run_study(DEFENSE_GAN, tmp_path_factory.mktemp("gan"))


@pytest.mark.study
def test_magnet_folder(magnet_run):
    run = magnet_run.run
    settings = [row["setting"] for row in run.rows]
    assert settings[:4] == [
        "black box", "black box", "white box", "white box, past the detectors"
    ]  # fmt: skip
    # Clean images and two sources, for two targets and a random one.
    assert settings[4:] == ["gray box"] * 9
    for row in run.rows:
        # An image is defended when it is rejected or answered correctly.
        least = max(row["reformed"], row["detected"])
        assert least <= row["defended"] <= row["reformed"] + row["detected"] + 1e-6
    assert (run.workdir / "figures" / "gray_box.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.study
def test_attacks_behind_the_reformer_break_it(magnet_run):
    rows = {row["setting"]: row for row in magnet_run.run.rows}
    clean = magnet_run.run.rows[0]["reformed"]
    assert rows["white box"]["reformed"] < 0.5 * clean
    # The attacker who knows the detectors is rejected less often than a budget of clean images is
    # missed, and some images get through.
    assert rows["white box, past the detectors"]["defended"] < clean


@pytest.mark.study
def test_the_matrix_is_that_of_the_rows(magnet_run):
    values, targets = magnet.matrix(magnet_run.run.rows, "reformed")
    assert targets == ("1", "2", "random")
    assert values.shape == (2, 3)
    row = next(r for r in magnet_run.run.rows if (r["source"], r["target"]) == ("2", "1"))
    assert values[1, 0] == row["reformed"]
    with (magnet_run.run.workdir / "gray_box.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[1]["1"]) == row["reformed"]


@pytest.mark.study
def test_defense_gan_folder(gan_run):
    run = gan_run.run
    keys = [tuple(row[name] for name in defense_gan.KEY_COLUMNS) for row in run.rows]
    assert keys == DEFENSE_GAN.cells
    for name in ("steps", "fgsm", "bpda"):
        assert (run.workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for row in run.rows:
        assert row["attack"] != "none" or row["mean_distance_l2"] == 0


@pytest.mark.study
def test_more_steps_reconstruct_better(gan_run):
    errors = {
        row["num_steps"]: row["reconstruction_error"]
        for row in gan_run.run.rows
        if (row["trained_on"], row["attack"]) == ("original", "none")
    }
    assert errors[20] < errors[5]


@pytest.mark.study
@pytest.mark.parametrize(
    "study, config, fixture",
    [(magnet, MAGNET, "magnet_run"), (defense_gan, DEFENSE_GAN, "gan_run")],
)
def test_an_interrupted_study_goes_on_with_the_same_numbers(study, config, fixture, request):
    workdir = request.getfixturevalue(fixture).run.workdir
    path = workdir / "results.jsonl"
    complete = path.read_bytes()
    path.write_bytes(b"".join(complete.splitlines(keepends=True)[:-1]))
    study.run_study(config, workdir)
    assert path.read_bytes() == complete


@pytest.mark.study
def test_in_batches_covers_everything():
    x = np.arange(7.0)
    doubled, halved = defended.in_batches(lambda x: (2 * x, x / 2), 3, x)
    np.testing.assert_array_equal(doubled, 2 * x)
    np.testing.assert_array_equal(halved, x / 2)


@pytest.mark.parametrize(
    "study, config, change, sentence",
    [
        (magnet, MAGNET, dict(settings=("grey box",)), "magnet: unknown setting 'grey box'"),
        (magnet, MAGNET, dict(settings=()), "magnet: need at least one setting"),
        (magnet, MAGNET, dict(attacks=("pgd",)), "magnet: unknown attack 'pgd'; known: fgsm, bim"),
        (magnet, MAGNET, dict(false_positive_rate=1.5), "need 0 <= false_positive_rate <= 1"),
        (magnet, MAGNET, dict(alpha=1.0), "need 0 <= alpha < 1, got alpha=1.0"),
        (magnet, MAGNET, dict(temperatures=(10.0, 0.0)), "need finite positive temperatures"),
        (magnet, MAGNET, dict(temperatures=(float("inf"),)), "need finite positive temperatures"),
        (magnet, MAGNET, dict(num_held_out=0), "magnet: need num_held_out >= 1"),
        (
            magnet, MAGNET, dict(num_held_out=800),
            "need num_held_out < num_train, got num_held_out=800 and num_train=800",
        ),
        (magnet, MAGNET, dict(gray_widths=()), "need gray_widths >= 1"),
        (defense_gan, DEFENSE_GAN, dict(trained_on=("rec",)), "unknown training images 'rec'"),
        (defense_gan, DEFENSE_GAN, dict(trained_on=()), "need at least one of trained_on"),
        (defense_gan, DEFENSE_GAN, dict(restarts=0), "defense_gan: need restarts >= 1"),
        (defense_gan, DEFENSE_GAN, dict(curve=(0,)), "need curve >= 1, got curve=0"),
        (defense_gan, DEFENSE_GAN, dict(epsilon=-0.1), "finite epsilon >= 0"),
        (defense_gan, DEFENSE_GAN, dict(more_models=("vgg",)), "unknown model 'vgg'"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_one_sentence(tmp_path, study, config, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        study.run_study(dataclasses.replace(config, **change), tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("num_held_out", [1438, 1500])  # the digits have 1,438 training images
def test_held_out_images_leave_some_to_train_on(num_held_out):
    config = dataclasses.replace(MAGNET, num_train=0, num_held_out=num_held_out)
    with pytest.raises(
        ValueError, match=f"num_held_out < 1438, .* got num_held_out={num_held_out}"
    ):
        defended.load_splits(config, None)


@pytest.mark.parametrize("name, flag", [("magnet", "--alpha=2"), ("defense_gan", "--restarts=0")])
def test_bad_flags_are_one_sentence_and_exit_code_2(launcher, tmp_path, name, flag):
    done = launcher(name)(flag, f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr
