"""The drop-ins beside torch at every size, from one element to 1e8: `python benches/sizes.py [FILE.json]`.

For each function, size and state (right after torch's work on all threads, and back to back), prints torch's time over
normclip's, the median over rounds of the ratio within a round. The last line names the smallest of all.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import normclip
from normclip.bench.gradients import Gradients
from normclip.bench.timing import Budget, Call, alternate, median_ratio

SIZES = (1, 100, 10_000, 100_000, 300_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000, 100_000_000)
BUDGET = Budget(seconds=1.0)


def drop_ins(gradients: Gradients) -> dict[str, tuple[Call, Call, Callable[[int], list[float]]]]:
    """By its name, each drop-in of torch and of normclip, and the function that makes the arguments of the next calls."""
    tensors, parameters, norm = gradients.tensors, gradients.parameters, gradients.exact_norm(2.0)
    size = torch.tensor(norm)

    def constant(value: float) -> Callable[[int], list[float]]:
        return lambda count: [value] * count

    def both(call: Callable[[Any], Call]) -> tuple[Call, Call]:
        return call(torch.nn.utils), call(normclip)

    return {
        "clip_grad_norm_, below": (*both(lambda library: partial(library.clip_grad_norm_, parameters)), constant(10.0 * norm)),
        "clip_grad_norm_, scaling": (*both(lambda library: partial(library.clip_grad_norm_, parameters)), gradients.halving_limits),
        "get_total_norm": (*both(lambda library: lambda _: library.get_total_norm(tensors)), constant(0.0)),
        "clip_grads_with_norm_": (
            *both(lambda library: lambda limit: library.clip_grads_with_norm_(parameters, limit, size)),
            constant(10.0 * norm),
        ),
        "clip_grad_value_": (*both(lambda library: partial(library.clip_grad_value_, parameters)), constant(10.0)),
    }


def main(path: Path | None) -> None:
    """Measure, print and, if there is a path, write JSON."""
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES:
            gradients = Gradients([torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)])
            for name, (theirs, ours, arguments) in drop_ins(gradients).items():
                most = gradients.halvings // 2 if "scaling" in name else BUDGET.max_calls
                for state, before, calls in (("in training", gradients.work, 1), ("back to back", lambda: None, max(1, most))):
                    budget = Budget(BUDGET.seconds, max_calls=calls)
                    times = alternate({"torch": theirs, "normclip": ours}, arguments, before=before, budget=budget)
                    gradients.restore()
                    ratio = median_ratio(times["torch"], times["normclip"])
                    rows.append({"dtype": str(dtype), "elements": size, "call": name, "state": state, "ratio": ratio})
                    sys.stdout.write(f"{dtype!s:15} {size:>11,} {name:25} {state:12} {ratio:6.2f}\n")
    worst = min(rows, key=lambda row: float(str(row["ratio"])))
    sys.stdout.write(f"smallest: {worst}\n")
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
