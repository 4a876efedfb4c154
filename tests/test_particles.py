from __future__ import annotations

import json
from pathlib import Path

import pytest

from czii25d.errors import InputError, did_you_mean
from czii25d.particles import Particle, ParticleSet, load_particles


def test_czii_table_is_the_published_one() -> None:
    particles = load_particles()
    assert [(p.name, p.radius, p.weight) for p in particles] == [
        ("apo-ferritin", 60, 1),
        ("beta-galactosidase", 90, 2),
        ("ribosome", 150, 1),
        ("thyroglobulin", 130, 2),
        ("virus-like-particle", 135, 1),
        ("beta-amylase", 65, 0),
    ]
    assert len({p.color for p in particles}) == 6


def test_position_is_the_channel() -> None:
    particles = load_particles()
    assert [particles.channel(name) for name in particles.names] == list(range(6))
    assert particles[2].name == "ribosome" and particles[1:3].names == ("beta-galactosidase", "ribosome")
    assert particles.radii[3] == 130


def test_class_num_takes_the_first() -> None:
    particles = load_particles()
    assert particles.first(None) is particles
    assert "beta-amylase" not in particles.first(5).names and len(particles.first(5)) == 5
    for wrong in (0, 7, -1):
        with pytest.raises(InputError, match=rf"class_num: expected 1 to 6.*found {wrong}"):
            particles.first(wrong)


def test_unknown_particle_is_refused_with_a_guess() -> None:
    with pytest.raises(InputError, match="did you mean 'ribosome'"):
        load_particles().channel("ribosom")


def test_table_survives_json() -> None:
    particles = load_particles()
    again = ParticleSet.from_config(json.loads(json.dumps(particles.to_config())))
    assert again == particles and hash(again) == hash(particles)
    assert again.first(3) != particles


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "at least one"),
        ({"a": {"weight": 1}}, "radius"),
        ({"a": {"radius": 10, "colour": "#000000"}}, "colour"),
        ({"a": {"radius": "wide"}}, "numbers"),
        ({"a": {"radius": None}}, "numbers"),
        ({"a": 60}, "radius"),
        ({"a": {"radius": 0}}, "radius above 0"),
        ({"a": {"radius": float("nan")}}, "radius above 0"),
        ({"a": {"radius": 10, "weight": -1}}, "weight"),
        ({"a": {"radius": 10, "color": "red"}}, "color"),
        ({"": {"radius": 10}}, "name"),
    ],
)
def test_wrong_tables_are_refused(table: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParticleSet.from_config(table)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(InputError, match=r"'a'.*twice"):
        ParticleSet([Particle("a", 10), Particle("b", 20), Particle("a", 30)])


def test_own_table_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("spliceosome: {radius: 110}\nproteasome: {radius: '80', weight: 3}\n")
    particles = load_particles(path)
    assert particles.names == ("spliceosome", "proteasome")
    assert particles[1] == Particle("proteasome", 80.0, 3.0)


def test_error_is_one_line_of_four_parts() -> None:
    error = InputError("file.csv", "a header", "none\nat all", "add one")
    assert str(error) == "file.csv: expected a header, found none at all; add one"
    assert isinstance(error, ValueError)


def test_guess_only_where_one_is_near() -> None:
    assert did_you_mean("denoise", ["denoised", "wbp"]) == " (did you mean 'denoised'?)"
    assert did_you_mean("xyz", ["denoised", "wbp"]) == ""


def test_a_table_that_was_changed_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for radius in (75.0, 80.0):  # relative paths, as in particles=my.yaml
        (tmp_path / f"{radius:.0f}").mkdir()
        monkeypatch.chdir(tmp_path / f"{radius:.0f}")
        Path("my.yaml").write_text(f"proteasome: {{radius: {radius}}}\n")
        assert load_particles(Path("my.yaml")).radii == (radius,)
    assert load_particles() is load_particles(), "the default is read once"
