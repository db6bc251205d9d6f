"""Time flashconv's layers beside mlx.nn's and PyTorch's, all in one run: see README.md."""
import flashconv  # noqa: F401, before mlx.core, so that a fast BLAS is under it

import report
from competitors import COMPETITORS, arrays, reference
from rows import ROWS
from timing import HERE, Suite, arguments, run

PASSES = "forward", "gradients"
TOLERANCE = {"float16": 0.02, "bfloat16": 0.1}  # of the largest number; 1e-3 otherwise

SUITE = Suite(
    module="layers", rows=ROWS, competitors=COMPETITORS, passes=PASSES, arrays=arrays,
    reference=lambda row, data: dict.fromkeys(PASSES, reference(row, data)),
    tolerance=lambda row, which: TOLERANCE.get(row.dtype, 1e-3),
    facts=lambda row: {"products": row.products}, slow=2, seconds=1)


def main():
    options = arguments(SUITE, __doc__, "depthwise*")
    results, pictures = options.out or HERE, options.out or HERE.parent / "nbs" / "images"
    def write(found):
        report.write(found, results / "results.json", results / "results.md",
                     report.markdown(found))
        report.draw(found["rows"], pictures / "benchmark_layers.svg")
        report.draw_classes(found["rows"], pictures / "benchmark.svg")
    print(report.summary(run(SUITE, options, report.floors, write)))
    print(f"wrote {results}/results.json, results.md and two pictures in {pictures}")


if __name__ == "__main__": main()
