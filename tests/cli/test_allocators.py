"""The two lines on which allocator won: sums over layers, silent for recipes that compare nothing."""

from bitquilt.cli.allocators import allocator_totals, print_allocators


def test_sums_over_layers_of_what_every_layer_was_given():
    layers = {
        "a": {"table_error": {"exact": 1.0, "graph": 2.0}, "swept_loss": {"exact": 1.5, "graph": 1.0}},
        "b": {"table_error": {"exact": 1.0, "graph": 2.5}, "swept_loss": {"exact": 0.5, "graph": 1.0, "uniform": 9}},
    }
    totals = allocator_totals({"layers": layers})
    assert totals == {"table_error": {"exact": 2.0, "graph": 4.5}, "swept_loss": {"exact": 2.0, "graph": 2.0}}
    assert allocator_totals({"layers": {"a": {"loss": 1.0}}}) == {}


def test_they_are_printed(capsys):
    print_allocators({"layers": {"a": {"table_error": {"exact": 1.25}, "swept_loss": {"exact": 1.5}}}})
    assert capsys.readouterr().out.splitlines() == [
        "  bits by by table: exact 1.25",
        "  bits by after sweep: exact 1.5",
    ]
    print_allocators({"layers": {"a": {"loss": 1.0}}})
    assert capsys.readouterr().out == ""


def test_from_the_command_line(command, tiny, text, tmp_path):
    flags = ("--recipe", "mg-ptq", "--bits", 2.5, "--group-size", 16, "--samples", 2, "--seq-len", 16)
    ran = command("quantize", tiny, tmp_path / "out", *flags, "--calibration", text)
    assert ran.code == 0
    assert "after sweep: exact" in ran.out
