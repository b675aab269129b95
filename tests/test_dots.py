"""The picture of a comparison: what stands in it, and where."""

from fdml.dots import MARKS, dots_figure


def test_the_best_is_on_top_and_every_kind_is_drawn_at_its_mean() -> None:
    rows = {
        "pgd-at": {"clean": [0.85, 0.87], "gray": [0.8, 0.8], "worst": [0.70, 0.74]},
        "fdml": {"clean": [0.86, 0.86], "gray": [0.81, 0.81], "worst": [0.75, 0.75]},
    }
    figure = dots_figure("a title", rows)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["pgd-at", "fdml"]
    drawn = {
        (line.get_marker(), tuple(line.get_ydata())): round(float(line.get_xdata()[0]), 6)  # pyright: ignore
        for line in axes.lines
        if line.get_marker() not in ("", "None")
    }
    assert drawn[MARKS["gray"][1], (1,)] == 0.81
    assert drawn[MARKS["gray"][1], (0,)] == 0.8
    assert [text.get_text() for text in axes.texts] == ["72.0 ± 2.8", "75.0 ± 0.0"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["clean", "gray box", "worst of all"]
    bars = [line for line in axes.lines if line.get_marker() in ("", "None")]
    assert sorted(bar.get_ydata()[0] for bar in bars) == [0, 0, 1, 1]  # pyright: ignore
    assert bars[0].get_color() == MARKS["clean"][2]


def test_one_seed_has_no_deviation() -> None:
    (axes,) = dots_figure("", {"fdml": {"clean": [0.9], "worst": [0.5]}}).axes
    assert [text.get_text() for text in axes.texts] == ["50.0"]
