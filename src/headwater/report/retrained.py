"""What models that were trained again say, as a section of a page."""

from __future__ import annotations

from headwater.evaluate.left_out import LeftOut
from headwater.report.figures import Condition, Dots, Points, Section

LEFT_OUT = (
    "The test that counts: for each of {e} queries the {k} rows blamed for it are left out, and the model is trained "
    "again. So it is on all rows, with the same seeds, and without {k} rows drawn at random.\n\n{told}"
)


def left_out_section(found: LeftOut) -> Section:
    """What became of queries whose blamed rows were left out, beside what the scores foretold."""
    e, rows = len(found.queries), found.rows()
    outputs = Dots(
        title="The queries' loss, after training again",
        reading="Each dot is one seed, over all these queries; the tick is their mean. Further left is better.",
        x_label=f"mean loss of {e} queries",
        conditions=[Condition(f"without {name}" if k else "with all rows", v) for k, (name, v) in enumerate(rows)],
        ours=1,
    )
    points = Points(
        title="Foretold, and measured",
        reading="One point for each query. What scores foretell is their sum, to first order; a loss cannot fall below "
        "zero, so large sums tell too much.",
        x_label="fall of the loss that the scores foretell",
        y_label="fall of the loss that was measured",
        x=found.foretold,
        y=found.measured,
    )
    text = LEFT_OUT.format(e=e, k=found.k, told=found.in_words)
    return Section("Do the mistakes go away?", text, [outputs, points])
