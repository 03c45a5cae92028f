"""One neuron in the terminal: what is shown, what is refused, and nothing that a terminal would obey."""

import pytest

from flows.run import Run
from flows.show import plain, show
from tests.written_run import FOLDERS, HOSTILE, IDS, LAYERS, write_images, write_run


@pytest.fixture
def run(tmp_path) -> Run:
    job = write_run(tmp_path, write_images(tmp_path), LAYERS[1:], HOSTILE)
    return Run("night", job.out.settings, {}, dict.fromkeys(FOLDERS, "0" * 16), {"neurons": len(job.blocks)})


def test_show(run):
    lines = show(run, LAYERS[1].name, 1).splitlines()
    assert lines[0] == f"{LAYERS[1].name}, neuron 1: {HOSTILE[1]}"
    assert "status      ambiguous" in lines
    assert "confidence  0.89 on 50 held-out images, 95% interval 0.79 to 0.99, q = 0.01" in lines
    assert "bar         0.05: the interval must lie above it" in lines
    assert f"rival name  {HOSTILE[0]}" in lines
    assert f"  0.40  ########............     9.0    80%  {HOSTILE[1]}" in lines
    assert f"  0.05  #...................     5.0    80%  {HOSTILE[5]}" in lines


def test_show_redrawn_auc(run):
    line = "redrawn AUC 0.97 on 48 drawn scenes that show the name, 47 that do not"
    assert line in show(run, "head", 1).splitlines()
    assert "redrawn" not in show(run, "head", 4), "a name that cannot be drawn"
    del run.stages["drawn"]
    assert "redrawn" not in show(run, "head", 1), "images that are not drawn ones"


def test_show_negative_side(run):
    assert f"negative    {plain(HOSTILE[7])} (0.30)" in show(run, "head", 1).splitlines()
    assert f"negative    {HOSTILE[0]} (none)" in show(run, "head", 2).splitlines()
    assert "negative" not in show(run, "head", 4), "a unit that does not go below zero"


def test_show_exemplars_with_activation_and_box(run):
    lines = show(run, "head", 1).splitlines()
    assert f"         9     0    0  240  320  {IDS[1]}0" in lines
    assert len(lines) - lines.index("activation      box x0 y0 x1 y1  image") == 11


def test_show_without_validate_split_and_without_name(run):
    text = show(run, "head", 3)
    assert "no validate split" in text
    assert "neuron 3: no name" in text
    assert "weight" not in text


def test_show_neutralises_what_a_terminal_would_obey(run):
    text = "".join(show(run, layer.name, unit) for layer in LAYERS[1:] for unit in range(3))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert r"\x1b[31mred\x07" in text
    assert r"\u202e" in text
    assert "caf\u00e9" in text


def test_show_names_what_is_allowed(run):
    with pytest.raises(ValueError, match=r"^layer=haed: not in this run; allowed are head, blocks"):
        show(run, "haed", 0)
    with pytest.raises(ValueError, match=r"^layer=\\x1b\[2J: not in this run"):
        show(run, "\x1b[2J", 0)
    with pytest.raises(ValueError, match=r"^unit=9999: allowed are 0 to 11$"):
        show(run, "head", 9999)
    with pytest.raises(ValueError, match=r"^unit=-1: allowed are 0 to 11$"):
        show(run, "head", -1)


def test_show_refuses_an_unfinished_run(run):
    run.parts["neurons"] = 3
    with pytest.raises(ValueError, match=r"^run=night: the neurons are not finished \(2 of 3 parts there\)"):
        show(run, "head", 0)
    del run.stages["neurons"]
    with pytest.raises(ValueError, match=r"^run=night: the neurons are not finished \(none there\)"):
        show(run, "head", 0)
